"""What is known of a head before its weights are read, and everything that can be wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch

from asyncengine.config import EngineConfig
from asyncengine.errors import CheckpointError, ConfigError, UnsupportedModelError
from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.attention_modules import RecordedLayer, text_config
from asyncengine.model.draft_heads.eagle_config import EagleConfig, eagle_config
from asyncengine.model.draft_heads.entries import spec_of
from asyncengine.model.draft_heads.head import Head


@dataclass(frozen=True, slots=True)
class BuiltHead:
    """A head with its weights and without its KV cache.

    Attributes:
        head: It; a module.
        layers: Those that attend, as they record it.
        nbytes: Bytes of the weights that it does not share with the model.
        read_bytes: Bytes of the weights that are read for each guess.
    """

    head: Head
    layers: list[RecordedLayer]
    nbytes: int
    read_bytes: int


class HeadPlan(Protocol):
    """A head that can be loaded."""

    @property
    def target_layers(self) -> tuple[int, ...]:
        """Of the model, whose hidden states it sees, as `Taps` counts them."""
        ...

    @property
    def specs(self) -> dict[str, LayerSpec]:
        """Of its layers in the KV cache, by their names."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights at most, what it may share with the model included."""
        ...

    def rehearse(self, details: Any) -> None:
        """Refuses weights that are not those of the head, as far as headers tell and as that is not known already.

        Args:
            details: What is known of the model.

        Raises:
            CheckpointError: As it says.
        """
        ...

    def build(self, built: Any, details: Any) -> BuiltHead:
        """Reads its weights.

        Args:
            built: The model, an `asyncengine.model.built_model.Built`.
            details: What is known of that.

        Raises:
            ReloadError: They cannot be had.
        """
        ...


def check_head(
    config: EngineConfig, checkpoint: Any, hf_config: Any, dtype: torch.dtype, length: int
) -> HeadPlan | None:
    """The head that a configuration asks for; None if it asks for none.

    Args:
        config: What is wanted.
        checkpoint: Of the model, an `asyncengine.model.checkpoint.Checkpoint`.
        hf_config: The model's, as transformers reads it.
        dtype: Of weights and activations.
        length: Most tokens of a sequence.

    Raises:
        ConfigError: There is none, or it does not fit the model.
    """
    if config.speculative_mode == "mtp":
        from asyncengine.model.draft_heads.mtp_plan import mtp_plan

        plan: HeadPlan = mtp_plan(config, checkpoint, hf_config, dtype)
        return plan
    if config.speculative_mode != "eagle3":
        return None
    (name,) = config.additional_models
    try:
        return _eagle_plan(name, text_config(hf_config), dtype, length)
    except ConfigError as error:
        raise ConfigError(f"additional_models is [{name!r}]: {error}") from error


def _eagle_plan(name: str, target: Any, dtype: torch.dtype, length: int) -> HeadPlan:
    from asyncengine.model import rope_limits
    from asyncengine.model.checkpoint import Checkpoint
    from asyncengine.model.draft_heads import eagle
    from asyncengine.model.draft_heads.weights import HeadFiles
    from asyncengine.model.location import locate

    path = locate(name)
    if not path.is_dir():
        raise ConfigError("it is a file; expected the directory of a head")
    try:
        checkpoint = Checkpoint(path)
    except UnsupportedModelError as error:
        raise ConfigError(f"it is quantised in a way that cannot be read: {error}") from error
    about = eagle_config(checkpoint.config, target.num_hidden_layers)
    if about.target_hidden != target.hidden_size:
        raise ConfigError(
            f"it is for hidden states of {about.target_hidden} numbers; the model's have {target.hidden_size}"
        )
    if about.vocab_size != target.vocab_size:
        raise ConfigError(f"its vocabulary has {about.vocab_size} tokens; the model's has {target.vocab_size}")
    if (limit := rope_limits.limit_of(eagle.llama_config(about), length)) is not None:
        raise ConfigError(
            f"its rotary embeddings of type {limit.kind!r} change once a sequence has more than {limit.tokens} tokens; "
            f"set max_single_sequence_length to at most {limit.tokens}"
        )
    files = HeadFiles(checkpoint)
    stored = {eagle.named(weight): weight for weight in files.shapes if "rotary_emb" not in weight}
    shapes = {weight: tuple(value.shape) for weight, value in eagle.EagleHead(about).state_dict().items()}
    if eagle.OFFSETS in stored or about.draft_vocab != about.vocab_size:
        shapes[eagle.OFFSETS] = (about.draft_vocab,)
    if eagle.KNOWN in stored:
        shapes[eagle.KNOWN] = (about.vocab_size,)
    shared = []
    if about.width == about.target_hidden:
        shared = [weight for weight in ("embed_tokens.weight", "lm_head.weight") if weight not in stored]
        if about.draft_vocab != about.vocab_size and "lm_head.weight" in shared:
            shared.remove("lm_head.weight")
    if missing := sorted(shapes.keys() - stored.keys() - set(shared)):
        raise ConfigError(f"{len(missing)} of its weights are missing: {', '.join(missing[:4])}")
    if strange := sorted(stored.keys() - shapes.keys()):
        raise ConfigError(f"{len(strange)} of its weights are none of an EAGLE-3 head's: {', '.join(strange[:4])}")
    for weight, of in stored.items():
        if tuple(files.shapes[of]) != shapes[weight]:
            raise ConfigError(f"its {of} is {tuple(files.shapes[of])}; expected {shapes[weight]}")
    nbytes = sum(prod(shape) for shape in shapes.values()) * dtype.itemsize
    return EaglePlan(about, files, stored, tuple(shared), nbytes, dtype)


@dataclass(frozen=True, slots=True)
class EaglePlan:
    """As `HeadPlan`, of an EAGLE-3 head.

    Attributes:
        about: Its configuration.
        files: Its weights, an `asyncengine.model.draft_heads.weights.HeadFiles`.
        stored: Their names there, by those in `EagleHead`.
        shared: Those that it has of the model.
        weight_bytes: As of the protocol.
        dtype: Of the weights.
    """

    about: EagleConfig
    files: Any
    stored: dict[str, str]
    shared: tuple[str, ...]
    weight_bytes: int
    dtype: torch.dtype

    @property
    def target_layers(self) -> tuple[int, ...]:
        """As the protocol says."""
        return self.about.target_layers

    @property
    def specs(self) -> dict[str, LayerSpec]:
        """As the protocol says."""
        from asyncengine.model.draft_heads import eagle

        return {eagle.ATTENDS: spec_of(eagle.spec_of(self.about))}

    def rehearse(self, details: Any) -> None:
        """As the protocol says: `check_head` has compared all shapes."""

    def build(self, built: Any, details: Any) -> BuiltHead:
        """As the protocol says."""
        from asyncengine.model.draft_heads import eagle
        from asyncengine.model.draft_heads.weights import shared_weight

        weights = {
            name: tensor.to(self.dtype) if (tensor := self.files.tensor(of)).is_floating_point() else tensor
            for name, of in self.stored.items()
        }
        nbytes = sum(tensor.nbytes for tensor in weights.values())
        for name in self.shared:
            of_model = shared_weight(built, details, of_head=name == "lm_head.weight")
            if tuple(of_model.shape) != (self.about.vocab_size, self.about.width):
                raise CheckpointError(f"the model's {name} is {tuple(of_model.shape)}, which the draft head cannot use")
            weights[name] = of_model
        head = eagle.EagleHead(self.about)
        head.load(weights, details.device)
        read = sum(value.nbytes for name, value in head.named_parameters() if name != "embed_tokens.weight")
        return BuiltHead(head, head.recorded(), nbytes, read)
