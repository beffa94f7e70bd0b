"""Loads scripted models, late or wrongly where a test wants that. Runs on the engine's loading threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from asyncengine.classifier import Classifier
from asyncengine.config import EngineConfig
from asyncengine.generation import GenerationConfig
from asyncengine.media import KINDS
from asyncengine.reranking import RerankPrompt
from asyncengine.speculation.lengths import DraftLengths
from asyncengine.speculation.ngram import NgramDrafter
from asyncengine.speculation.protocol import Drafter
from asyncengine.step.drafting import Drafting
from asyncengine.step.limits import Limits
from asyncengine.step.model import LoadedModel, LoadPlan
from asyncengine.testing.adapters import Script, ScriptedFormat
from asyncengine.testing.media import ScriptedMediaReader
from asyncengine.testing.scripted import ScriptedModel, echo
from asyncengine.testing.tokenizer import ByteTokenizer
from asyncengine.testing.warming import ScriptedWarmUp
from asyncengine.tokenizer import Tokenizer


class ScriptedLoader:
    """Loads `ScriptedModel`s, with faults where a test wants them.

    Args:
        script: What the models generate.
        step_seconds: How long each step takes.
        tokenizer: Given to the engine; None for none.
        vocab_size: Of the models.
        fits_beside: Whether a new model is loaded while the old one serves.
        make_drafter: Makes who drafts for a model, whatever `speculative_mode` says; None leaves it to that.
        run_ahead: Whether the engine launches steps ahead of the tokens of the steps before. Then a step more may be
            under way than a test expects that counts them.
        kept_states: How many states the models keep beside those of running sequences, as models with recurrent layers
            do; None makes models that have none.
        drafted_states: How many tokens such models can have drafted in a step.
        adapters: What is generated with each adapter, by the directory that `EngineConfig.adapters` and `load_adapter`
            name. The latter takes a script itself as well.
        takes_images: Whether the models do, as `asyncengine.testing.ScriptedMediaReader` reads them.
        takes_audio: The same of audio.
        takes_videos: The same of videos.
        whole_images: Whether an image must be seen in one step then.
        warm_up_pieces: Pieces of work that the engine lets a model do while there are no requests.

    Attributes:
        models: All models loaded so far, the newest last.
        hold_warm_ups: Whether the warm-ups of models that are loaded from now on are held.
        warm_ups: Theirs, where `warm_up_pieces` was more than 0 when they were loaded.
        check_errors: Model name to what checking it raises.
        load_errors: Model name to what loading it raises.
        gate: If set, loading waits until the event is.
        hidden_size: Of the models; None makes models that cannot embed.
        classifier: Their classification head, which they have in place of a language-model head; None for none.
        ranking: How their checkpoints say that they rank.
        takes_pairs: Whether they take prompts of two texts, which their tokenizer puts together by `encode_texts`.
    """

    def __init__(
        self,
        script: Script = echo,
        *,
        step_seconds: float = 0.0,
        tokenizer: Tokenizer | None = None,
        vocab_size: int = ByteTokenizer.vocab_size,
        fits_beside: bool = True,
        make_drafter: Callable[[ScriptedModel], Drafter] | None = None,
        run_ahead: bool = False,
        warm_up_pieces: int = 0,
        kept_states: int | None = None,
        drafted_states: int = 16,
        adapters: Mapping[str, Script] | None = None,
        takes_images: bool = False,
        takes_audio: bool = False,
        takes_videos: bool = False,
        whole_images: bool = False,
    ) -> None:
        self.script = script
        self.step_seconds = step_seconds
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.fits_beside = fits_beside
        self.make_drafter = make_drafter
        self.run_ahead = run_ahead
        self.warm_up_pieces = warm_up_pieces
        self.kept_states = kept_states
        self.drafted_states = drafted_states
        self.adapters = dict(adapters or {})
        self.takes_images = takes_images
        self.takes_audio = takes_audio
        self.takes_videos = takes_videos
        self.whole_images = whole_images
        self.hold_warm_ups = False
        self.warm_ups: list[ScriptedWarmUp] = []
        self.models: list[ScriptedModel] = []
        self.check_errors: dict[str, BaseException] = {}
        self.load_errors: dict[str, BaseException] = {}
        self.gate: threading.Event | None = None
        self.hidden_size: int | None = 3
        self.classifier: Classifier | None = None
        self.ranking: RerankPrompt | None = None
        self.takes_pairs = False

    @property
    def model(self) -> ScriptedModel:
        """The newest model."""
        return self.models[-1]

    def check(self, config: EngineConfig, current: LoadedModel | None) -> LoadPlan:
        """As `asyncengine.step.model.Loader`."""
        error = self.check_errors.get(config.model)
        if error is not None:
            raise error
        return LoadPlan(config, self.fits_beside, "bytes" if self.tokenizer is not None else None)

    def load(self, plan: LoadPlan) -> LoadedModel:
        """As `asyncengine.step.model.Loader`."""
        config = plan.config
        if self.gate is not None:
            self.gate.wait()
        error = self.load_errors.get(config.model)
        if error is not None:
            raise error
        complete = config.replace(
            device="cpu",
            dtype="float32",
            max_num_sequence=config.max_num_sequence or 64,
            max_single_sequence_length=config.max_single_sequence_length or 4096,
            max_total_sequence_length=config.max_total_sequence_length or 16384,
            prefill_chunk_size=config.prefill_chunk_size or 512,
            kv_cache_page_size=config.kv_cache_page_size or 16,
            attention_backend="torch",
            images=self.takes_images,
            audio=self.takes_audio,
            videos=self.takes_videos,
        )
        assert complete.max_num_sequence is not None
        assert complete.max_single_sequence_length is not None
        assert complete.max_total_sequence_length is not None
        assert complete.prefill_chunk_size is not None
        assert complete.kv_cache_page_size is not None
        limits = Limits(
            max_num_sequence=complete.max_num_sequence,
            max_single_sequence_length=complete.max_single_sequence_length,
            prefill_chunk_size=complete.prefill_chunk_size,
            page_size=complete.kv_cache_page_size,
            num_blocks=max(complete.max_total_sequence_length // complete.kv_cache_page_size, 1),
            hybrid=complete.prefill_mode == "hybrid",
            prefix_cache=complete.prefix_cache_mode == "radix",
            max_recycling=complete.prefix_cache_max_num_recycling_seqs,
            kept_states=self.kept_states,
            drafted_states=self.drafted_states if self.kept_states is not None else 0,
        )
        model = ScriptedModel(self.script, limits, self.step_seconds)
        self.models.append(model)
        format = ScriptedFormat(self.adapters)
        adapters = [(name, format.prepare(path, None)) for name, path in config.adapters.items()]
        for index, (_, prepared) in enumerate(adapters):
            model.put_adapter(index, prepared)
        warming = ScriptedWarmUp(model, self.warm_up_pieces) if self.warm_up_pieces else None
        if warming is not None:
            self.warm_ups.append(warming)
            if self.hold_warm_ups:
                warming.hold()
        return LoadedModel(
            model=model,
            limits=limits,
            config=complete,
            vocab_size=self.vocab_size,
            eos_token_ids=(ByteTokenizer.eos_token_id,),
            default_generation_config=GenerationConfig(),
            tokenizer=self.tokenizer,
            tokenizer_key="bytes" if self.tokenizer is not None else None,
            hidden_size=self.hidden_size,
            has_head=self.classifier is None,
            classifier=self.classifier,
            takes_pairs=self.takes_pairs,
            ranking=self.ranking,
            drafting=self._drafting(model, complete),
            launching=model if self.run_ahead else None,
            warming=warming,
            adapting=model,
            adapters=tuple(adapters),
            adapter_format=format,
            media_reader=self._media_reader(),
            keeping=model if self.kept_states is None else None,
            no_keeping="states are not kept",
            prefix_identity=lambda: {"model": "scripted", "page size": str(limits.page_size)},
            aligns=self.takes_audio,
        )

    def _media_reader(self) -> ScriptedMediaReader | None:
        takes = {"image": self.takes_images, "audio": self.takes_audio, "video": self.takes_videos}
        kinds = [kind for kind in KINDS if takes[kind]]
        return ScriptedMediaReader(self.whole_images, kinds) if kinds else None

    def _drafting(self, model: ScriptedModel, config: EngineConfig) -> Drafting | None:
        if self.make_drafter is not None:
            drafter = self.make_drafter(model)
        elif config.speculative_mode == "ngram":
            drafter = NgramDrafter()
        else:
            return None
        return Drafting(drafter, DraftLengths(model.limits.max_num_sequence, config.spec_draft_length, 8.0))
