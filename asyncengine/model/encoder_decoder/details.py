"""What a load needs to know of a model whose decoder attends to a source, and what it may not be asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from asyncengine.config import EngineConfig
from asyncengine.errors import CheckpointError, ConfigError
from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.checkpoint import tokenizer_key
from asyncengine.model.encoder_decoder.parting import filled
from asyncengine.model.load_check import Details, tokenizer_path_of
from asyncengine.model.load_settings import check_quantization
from asyncengine.step.model import LoadedModel

_CUDA_PAGE, _CPU_PAGE = 16, 32
_NOT_HERE: dict[str, object] = {
    "speculative_mode": "disable", "additional_models": (), "adapters": {}, "kv_cache_dtype": "auto",
}  # fmt: skip
"""Settings that mean nothing here yet, and how they may be."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a model is.

    Attributes:
        spec: What each of its decoder's layers needs.
        layers: How many of these there are.
        inner: Width of the encoder's feed-forward layers.
    """

    spec: LayerSpec
    layers: int
    inner: int


@dataclass(frozen=True, slots=True)
class SourceDetails(Details):
    """What a load needs to know of such a model.

    Attributes:
        sources: Most tokens of a source.
        fixed: Whether a source always has so many.
        written: Most tokens of its decoder, those included that it begins with.
        page_size: Tokens to a block.
        size: How large it is.
        kind: Its class.
    """

    sources: int = 0
    fixed: bool = False
    written: int = 0
    page_size: int = 1
    size: Shape | None = None
    kind: Any = None

    @property
    def shape(self) -> Shape:
        """How large it is."""
        assert self.size is not None
        return self.size

    @property
    def layer(self) -> LayerSpec:
        """What each of its decoder's layers needs."""
        return self.shape.spec

    def bytes_per_block(self, of_layer: Callable[[LayerSpec, int, torch.dtype], int]) -> int:
        """Of all layers together, by what each takes, as `AttentionBackend.bytes_per_block` has it."""
        return of_layer(self.layer, self.page_size, self.dtype) * self.shape.layers


@dataclass(frozen=True, slots=True)
class Ends:
    """How far a model goes.

    Attributes:
        sources: As `SourceDetails.sources`.
        written: As `SourceDetails.written`.
        fixed: Whether a source always has so many tokens.
        source: What a source is, in words.
    """

    sources: int
    written: int
    fixed: bool
    source: str

    def length(self, config: EngineConfig, page_size: int) -> int:
        """Most places in one sequence.

        Raises:
            ConfigError: More are wanted than there are, or too few.
        """
        places = filled(self.sources, page_size)
        least, longest = (places if self.fixed else page_size) + 2, places + self.written
        length = config.max_single_sequence_length or longest
        if not least <= length <= longest:
            up_to = "" if self.fixed else "up to "
            raise ConfigError(
                f"max_single_sequence_length is {length}; {self.source} takes {up_to}{places} tokens and the model's "
                f"positions allow {self.written} behind it: {least}..{longest}"
            )
        return length


def check_config(config: EngineConfig, does: str) -> None:
    """Refuses what there is nothing for.

    Args:
        config: What is wanted.
        does: What the model does, for messages.

    Raises:
        ConfigError: As it says.
    """
    for name, usual in _NOT_HERE.items():
        given = getattr(config, name)
        if given != usual and given:
            raise ConfigError(f"{name} is {given!r}; {config.model!r} {does}: leave it out")
    if config.decoder_backend == "compiled":
        raise ConfigError(f"decoder_backend is 'compiled'; {config.model!r} {does}; allowed: 'auto'")


def details_of(
    config: EngineConfig,
    current: LoadedModel | None,
    checkpoint: Any,
    device: torch.device,
    dtype: torch.dtype,
    *,
    hf_config: Any,
    ends: Ends,
    shape: Shape,
    vocab_size: int,
    kind: Any,
) -> SourceDetails:
    """What is known of a load.

    Args:
        config: What is wanted.
        current: The model that is loaded.
        checkpoint: An `asyncengine.model.checkpoint.Checkpoint`.
        device: Where.
        dtype: Of weights and activations.
        hf_config: As transformers reads it.
        ends: How far it goes.
        shape: How large it is.
        vocab_size: Tokens that have logits.
        kind: Its class.

    Raises:
        CheckpointError: There is no tokenizer.
        ConfigError: Its sequences are wanted longer than they can be, or its weights in a form in which nothing
            multiplies them.
    """
    if config.quantization == "auto":  # of these no checkpoint has codes
        config = config.replace(quantization="none")
    check_quantization(config, device, dtype)
    tokenizer_path = tokenizer_path_of(config, checkpoint)
    if tokenizer_key(tokenizer_path) is None:
        raise CheckpointError(f"{tokenizer_path}: there are no tokenizer files")
    page_size = config.kv_cache_page_size or (_CUDA_PAGE if device.type == "cuda" else _CPU_PAGE)
    compiled = device.type == "cpu" and config.attention_backend in ("auto", "cpu") and config.quantization != "fp8"
    copied = _tied_head(checkpoint, hf_config, vocab_size) if compiled else 0
    return SourceDetails(
        checkpoint,
        tokenizer_path,
        hf_config,
        vocab_size,
        device,
        dtype,
        checkpoint.weight_bytes(dtype)
        + _in_float32(checkpoint, kind, dtype)
        + copied * (dtype.itemsize if config.quantization == "none" else 1),
        ends.length(config, page_size),
        None if current is None else current.tokenizer,
        dtype,
        quantization=config.quantization,
        sources=ends.sources,
        fixed=ends.fixed,
        written=ends.written,
        page_size=page_size,
        size=shape,
        kind=kind,
    )


def _tied_head(checkpoint: Any, hf_config: Any, vocab_size: int) -> int:
    """Numbers of a head that is the table of tokens, too, of which compiled code has a copy in its own order.

    One that the checkpoint has is none, whatever its configuration says (T5).
    """
    tied = hf_config.tie_word_embeddings and "lm_head.weight" not in checkpoint.shapes
    return vocab_size * int(hf_config.d_model) if tied else 0


def _in_float32(checkpoint: Any, kind: Any, dtype: torch.dtype) -> int:
    """Bytes that weights take more than in the model's dtype, since transformers leaves them in float32."""
    wide = set(kind._keep_in_fp32_modules or ()) if dtype is torch.float16 else set[str]()
    kept = sum(prod(shape) for name, shape in checkpoint.shapes.items() if wide.intersection(name.split(".")))
    return int(kept) * (4 - dtype.itemsize)
