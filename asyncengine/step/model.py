"""What the core asks of a model and of whoever loads one. Implemented with torch in `model/`, without in `testing/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from asyncengine.classifier import Classifier
from asyncengine.config import EngineConfig
from asyncengine.dense import Dense
from asyncengine.generation import GenerationConfig, SamplingParams
from asyncengine.media import UNENCODED, Kind, MediaReader
from asyncengine.outputs import Pooling
from asyncengine.reranking import RerankPrompt
from asyncengine.source import SourceReader
from asyncengine.step.batch import Int32, StepBatch, StepTokens
from asyncengine.step.drafting import Drafting
from asyncengine.step.limits import Limits
from asyncengine.tokenizer import Tokenizer
from asyncengine.warm_up import WarmUp


class Model(Protocol):
    """A model on its device, with its KV cache. Used from the step thread alone."""

    def place(self, slot: int, params: SamplingParams, branch: int, prompt: Int32, output: Int32) -> None:
        """A sequence takes a slot: its sampling state is built from what it has generated.

        An exception ends that request only.
        """
        ...

    def execute(self, batch: StepBatch) -> StepTokens:
        """Runs one step and draws a token per row of `batch.sample_index`. Blocks until they are on the host.

        An exception ends the batch's requests with `StepError`.
        """
        ...

    def device_lost(self, error: BaseException) -> bool:
        """Whether an exception of `execute` means that nothing will work until the model is loaded again."""
        ...

    def sleep(self) -> None:
        """Gives the KV cache's memory back."""
        ...

    def wake(self) -> None:
        """Allocates the KV cache anew; its contents are gone."""
        ...

    def update_weights(self, weights: Mapping[str, Any]) -> None:
        """Replaces weights in place: all of them, or none and an exception.

        Raises:
            ReloadError: A name, shape or dtype does not fit.
        """
        ...

    def debug_call(self, name: str, args: tuple[Any, ...]) -> list[Any]:
        """Calls a function beside the model; one result per worker."""
        ...

    def close(self) -> None:
        """Lets go of weights and KV cache. Idempotent."""
        ...


class KeepingModel(Protocol):
    """A model whose keys and values can be kept and taken over, block by block."""

    def kept_parts(self) -> Mapping[str, int]:
        """By name, how many bytes each part of the KV cache has for a block."""
        ...

    def read_blocks(self, blocks: Int32) -> NDArray[np.uint8]:
        """(blocks, bytes) what the KV cache has for some blocks, part behind part.

        Raises:
            PrefixCacheError: The weights are not the checkpoint's.
        """
        ...

    def write_blocks(self, blocks: Int32, rows: NDArray[np.uint8]) -> None:
        """Writes what `read_blocks` has read.

        Args:
            blocks: (B,) where.
            rows: (B, bytes) what.

        Raises:
            PrefixCacheError: The weights are not the checkpoint's.
        """
        ...


class AdaptableModel(Protocol):
    """A model that computes each sequence with the adapter that its request names, or with none."""

    def put_adapter(self, index: int, prepared: Any) -> None:
        """Has an adapter from now on, which rows of `StepBatch.adapters` call by its index; it replaces what was there.

        Args:
            index: 0, 1, and so on.
            prepared: From the model's `AdapterFormat`.
        """
        ...

    def remove_adapter(self, index: int) -> None:
        """Lets one go. No row calls it any longer."""
        ...


class AdapterFormat(Protocol):
    """What an adapter must be to fit a model. Used from any thread, beside the model's steps; holds no weights."""

    def prepare(self, source: Any, config: Mapping[str, Any] | None) -> Any:
        """Reads an adapter, checks that it fits, and puts it in the form in which the model takes it.

        Args:
            source: A directory, or tensors by their names.
            config: What ``adapter_config.json`` has in a directory; needed for tensors.

        Raises:
            AdapterError: It is missing or damaged, or does not fit.
        """
        ...


class LaunchingModel(Protocol):
    """A model whose steps can be launched without waiting for them, so that one may be computed behind the other.

    What was launched, and whatever other methods change on the device, happens in the order of the calls. At most two
    steps are under way at a time, and they are collected in the order in which they were launched, all but those that a
    model was let go with.
    """

    def launch(self, batch: StepBatch) -> Any:
        """Queues one step; returns what `collect` needs of it.

        The input tokens of `batch.unknown` rows are those that the steps before have drawn last for their slots. An
        exception means that nothing was launched; it ends the batch's requests with `StepError`.
        """
        ...

    def collect(self, flight: Any) -> StepTokens:
        """Blocks until the tokens of a launched step are on the host; an exception is as one of `execute`."""
        ...


class WarmingModel(Protocol):
    """A model that is served at once and becomes faster by work that is done while there is nothing else to do."""

    @property
    def warmth(self) -> WarmUp:
        """How far it is. Read from any thread, also while the model is let go."""
        ...

    def warm_up(self) -> str:
        """Does the next piece of that work; returns what it was, in words.

        Called between two steps, while `warmth.goes_on` and there are no requests. Whatever comes meanwhile waits, so a
        piece takes some tens of milliseconds. An exception ends the work.
        """
        ...


@dataclass(frozen=True, slots=True)
class ModelView:
    """What the event loops know of a loaded model. Immutable.

    Attributes:
        epoch: Number of the load; requests prepared for another epoch are prepared again.
        config: The completed configuration.
        vocab_size: Token ids lie below it.
        eos_token_ids: End a branch unless ignored.
        max_tokens: Most tokens in one sequence.
        max_prompt_tokens: Most of them in a prompt.
        limits_text: Which limits that comes from, for messages.
        default_generation_config: The model's own.
        tokenizer: None if there is none: prompts are token ids and outputs carry no text.
        tokenizer_key: Equal for equal tokenizers.
        hidden_size: Numbers in an embedding; None if the model cannot embed.
        pooling: How it embeds where the caller does not say, in the checkpoint's word.
        poolings: How it can embed.
        embedding_prompts: What its checkpoint puts in front of texts to embed, by the name of what they are for.
        has_head: Whether it has a language-model head; without, it can only embed and classify.
        takes_pairs: Whether its tokenizer makes one prompt of two texts, in a way that the model was trained for.
        classifier: Its classification head; None without one.
        ranking: How it ranks documents, if its checkpoint says so.
        adapters: Names of the adapters that are loaded.
        adapter_format: Reads adapters; None if the model takes none.
        media_reader: Reads images, audio and videos; None if the model takes none.
        no_media: By kind, why it takes none of it, in words.
        begins_with_audio: Whether each prompt begins with an audio, which is not among the tokens that the model writes
            on, but beside them (Whisper).
        source_reader: Reads the text that the model writes another one of, which each prompt begins with in the same
            way; None if it is no such model.
        limits: All of what it can take; None only where nothing is computed by it.
        prefix_identity: As of `LoadedModel`; None if its prefix cache cannot be kept.
        no_keeping: Why it cannot, in words.
    """

    epoch: int
    config: EngineConfig
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_tokens: int
    max_prompt_tokens: int
    limits_text: str
    default_generation_config: GenerationConfig
    tokenizer: Tokenizer | None
    tokenizer_key: str | None
    hidden_size: int | None = None
    pooling: str = "mean"
    poolings: tuple[Pooling, ...] = ("mean", "last")
    embedding_prompts: Mapping[str, str] = field(default_factory=dict)
    has_head: bool = True
    takes_pairs: bool = False
    classifier: Classifier | None = None
    ranking: RerankPrompt | None = None
    adapters: tuple[str, ...] = ()
    adapter_format: AdapterFormat | None = None
    media_reader: MediaReader | None = None
    no_media: Mapping[Kind, str] = field(default_factory=lambda: UNENCODED)
    begins_with_audio: bool = False
    source_reader: SourceReader | None = None
    limits: Limits | None = None
    prefix_identity: Callable[[], Mapping[str, str]] | None = None
    no_keeping: str = ""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What a loader makes. Attributes as in `ModelView`.

    Attributes:
        model: What the step thread steps.
        limits: What it can take.
        memory_bytes: What weights and KV cache take on their device.
        notes: What is not as fast as it could be, in words.
        dense: Layers between pooled hidden states and an embedding.
        drafting: Guesses tokens for speculative decoding; None for none.
        launching: The model again, if its steps may be launched ahead; None if each is executed and waited for.
        warming: The model again, if there is more to do that makes it faster.
        adapting: The model again, if it takes adapters.
        adapters: Those that it has, name and what `AdapterFormat.prepare` made; it calls them 0, 1, and so on.
        aligns: Whether it tells what tokens attend to (`StepBatch.attention_spans`).
        keeping: Keeps and takes over what its prefix cache has; None if it cannot.
        no_keeping: Why it cannot, in words.
        prefix_identity: What keys and values hang on, by name: where all of it is equal, they are the same, bit for
            bit. Not for the step thread, since weights are read. It raises `PrefixCacheError` where they are not there
            any longer.
    """

    model: Model
    limits: Limits
    config: EngineConfig
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    default_generation_config: GenerationConfig
    tokenizer: Tokenizer | None
    tokenizer_key: str | None
    memory_bytes: int = 0
    notes: tuple[str, ...] = ()
    hidden_size: int | None = None
    pooling: str = "mean"
    dense: tuple[Dense, ...] = ()
    embedding_prompts: Mapping[str, str] = field(default_factory=dict)
    has_head: bool = True
    takes_pairs: bool = False
    classifier: Classifier | None = None
    ranking: RerankPrompt | None = None
    drafting: Drafting | None = None
    launching: LaunchingModel | None = None
    warming: WarmingModel | None = None
    adapting: AdaptableModel | None = None
    adapters: tuple[tuple[str, Any], ...] = ()
    adapter_format: AdapterFormat | None = None
    media_reader: MediaReader | None = None
    no_media: Mapping[Kind, str] = field(default_factory=lambda: UNENCODED)
    begins_with_audio: bool = False
    source_reader: SourceReader | None = None
    aligns: bool = False
    keeping: KeepingModel | None = None
    no_keeping: str = "it keeps nothing that could be"
    prefix_identity: Callable[[], Mapping[str, str]] | None = None

    @property
    def poolings(self) -> tuple[Pooling, ...]:
        """How it can embed."""
        if self.hidden_size is None:
            return ()
        return ("cls", "mean", "last") if self.limits.whole_prompts else ("mean", "last")

    def view(self, epoch: int) -> ModelView:
        """What the event loops may know of it."""
        limits = self.limits
        text = f"max_single_sequence_length = {limits.max_single_sequence_length}"
        if not limits.whole_prompts:
            capacity = limits.num_blocks * limits.page_size
            text += f", KV cache capacity = {limits.num_blocks} blocks x {limits.page_size} tokens = {capacity}"
        return ModelView(
            epoch=epoch,
            config=self.config,
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
            max_tokens=limits.max_tokens,
            max_prompt_tokens=limits.max_prompt_tokens,
            limits_text=text,
            default_generation_config=self.default_generation_config,
            tokenizer=self.tokenizer,
            tokenizer_key=self.tokenizer_key,
            hidden_size=self.hidden_size,
            pooling=self.pooling,
            poolings=self.poolings,
            embedding_prompts=self.embedding_prompts,
            has_head=self.has_head,
            takes_pairs=self.takes_pairs,
            classifier=self.classifier,
            ranking=self.ranking,
            adapters=tuple(name for name, _ in self.adapters),
            adapter_format=self.adapter_format,
            media_reader=self.media_reader,
            no_media=self.no_media,
            begins_with_audio=self.begins_with_audio,
            source_reader=self.source_reader,
            limits=limits,
            prefix_identity=None if self.keeping is None else self.prefix_identity,
            no_keeping=self.no_keeping,
        )


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """A load that has passed every check that can be made before a model is let go.

    Attributes:
        config: What to load.
        fits_beside: Whether there is memory for it while the present model stays.
        tokenizer_key: As in `ModelView`.
        details: The loader's own.
    """

    config: EngineConfig
    fits_beside: bool
    tokenizer_key: str | None = None
    details: Any = None


class Loader(Protocol):
    """Loads models. Its methods run on a thread of their own, never on the step thread or an event loop."""

    def check(self, config: EngineConfig, current: LoadedModel | None) -> LoadPlan:
        """Checks everything that can be checked without letting go of `current`.

        Raises:
            ReloadError: The load cannot succeed.
        """
        ...

    def load(self, plan: LoadPlan) -> LoadedModel:
        """Loads and warms up.

        Raises:
            ReloadError: It failed; nothing is left behind.
        """
        ...
