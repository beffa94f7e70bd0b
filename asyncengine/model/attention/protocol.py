"""What a back end of paged attention provides. The models and the runner know nothing else of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from numpy.typing import NDArray

from asyncengine.errors import ReloadError
from asyncengine.step.batch import StepBatch
from asyncengine.step.limits import Limits


class BackendUnavailableError(ReloadError):
    """The attention back end that was asked for cannot work here; the message says why."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one attention layer needs, recorded from a dummy forward.

    Attributes:
        num_heads: Query heads; a multiple of `num_kv_heads`. Query head h reads KV head h // (heads / kv heads).
        num_kv_heads: Key and value heads.
        key_dim: Size of a query or key head.
        value_dim: Size of a value head; may differ from `key_dim`.
        scaling: What query-key products are multiplied by.
        sliding_window: A token at position p attends to positions > p - sliding_window; None is unlimited.
        soft_cap: Scores become soft_cap * tanh(score / soft_cap) after scaling; None is off (Gemma 2).
        has_sinks: Whether each head has a learned logit that joins the softmax and attends to nothing (gpt-oss).
        key_scale: What keys are divided by where they are kept in fp8.
        value_scale: The same for values.
        looks_ahead: Whether tokens of an image attend to all of it, also to what follows them (`StepBatch.reach`).
            A sliding window bounds how far back they look, as it does for others.
        values_in_keys: Whether the value of a token is the beginning of its key, as of latents
            (`asyncengine.model.latent_attention`), so that a back end may keep it once.
        distances: How many distances between two tokens have a bias of their own, which is added to scores when they
            have been scaled and capped (T5); 0 is no bias.
    """

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scaling: float
    sliding_window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    key_scale: float = 1.0
    value_scale: float = 1.0
    looks_ahead: bool = False
    values_in_keys: bool = False
    distances: int = 0


class AttentionBackend(Protocol):
    """One way to store keys and values in pages and to attend to them. Used from the step thread alone."""

    name: str

    def check_dtype(self, dtype: torch.dtype, device: torch.device) -> None:
        """Looks whether keys and values can be stored in `dtype` on a device.

        Raises:
            BackendUnavailableError: They cannot; the message says why.
        """
        ...

    def bytes_per_block(self, spec: LayerSpec, page_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block of one layer takes."""
        ...

    def allocate(
        self, spec: LayerSpec, num_blocks: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> Any:
        """Returns the KV cache of one layer in this back end's own layout. Contents are uninitialised.

        Its ``stored`` are the tensors that it is made of, each by block first.
        """
        ...

    def plan(self, batch: StepBatch, page_size: int, device: torch.device) -> Any:
        """Prepares whatever all layers of one step share."""
        ...

    def attend(
        self,
        spec: LayerSpec,
        cache: Any,
        plan: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes the step's keys and values into `cache`, then attends.

        Args:
            spec: The layer.
            cache: From `allocate`.
            plan: From `plan`.
            query: (tokens, heads, key_dim), any strides.
            key: (tokens, kv heads, key_dim), any strides.
            value: (tokens, kv heads, value_dim), any strides.
            sinks: (heads,) or None.
            bias: (heads, distances) float32, or None: what is added to the score of a token that so many places before
                (Raffel et al., 2020). The last column holds for all that are farther, the first for all that follow.

        Returns:
            (tokens, heads, value_dim), contiguous, of the query's dtype.
        """
        ...

    def keys(self, spec: LayerSpec, cache: Any, blocks: torch.Tensor) -> torch.Tensor:
        """(tokens, kv heads, key_dim) the keys of all places of some blocks, (B,), in their order, as they are kept."""
        ...

    def copy_blocks(self, caches: Sequence[Any], copies: torch.Tensor) -> None:
        """Copies whole blocks in every layer; `copies` is (C, 2) of source and destination."""
        ...


@runtime_checkable
class ParticularBackend(AttentionBackend, Protocol):
    """A back end that does not know every kind of layer, and can say so before there is a model."""

    def check_layer(self, spec: LayerSpec) -> None:
        """Looks whether such a layer can be attended to.

        Raises:
            BackendUnavailableError: It cannot; the message says why.
        """
        ...


@runtime_checkable
class CarryingBackend(Protocol):
    """A back end whose plan reaches the device in one copy, which takes along what else the step brings there."""

    def plan_with(
        self,
        batch: StepBatch,
        page_size: int,
        device: torch.device,
        sections: Mapping[str, NDArray[Any]],
        mixed: bool = False,
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """As `AttentionBackend.plan`.

        Args:
            batch: As of `plan`.
            page_size: As of `plan`.
            device: As of `plan`.
            sections: Flat arrays of numbers that fit into int32.
            mixed: Whether what is launched serves every step of so many tokens; else that holds for decodes alone.

        Returns:
            The plan, and the sections on the device: int32 views that hold until the next plan is made. Where they lie
            depends on their lengths, as long as the plan's `graph_key` stays the same.
        """
        ...


@runtime_checkable
class CapturableBackend(Protocol):
    """A back end with plans of another sort for steps that are captured: what those read never moves."""

    def reserve(self, limits: Limits, device: torch.device) -> None:
        """Makes room for the plans of steps of one token for each sequence; what is large enough stays where it is."""
        ...

    def plan_captured(self, batch: StepBatch, page_size: int, device: torch.device) -> Any:
        """As `AttentionBackend.plan`, of a step of decodes that is padded to the tokens of a graph.

        All that is done on the host is done here, before the graph is replayed. The plan has a `graph_key`, which is
        None where rows have several tokens: such steps are not replayed.
        """
        ...

    def capture_bytes(self, specs: Collection[LayerSpec], sequences: int, device: torch.device) -> int:
        """Bytes that captured steps of up to `sequences` sequences take beside what others take as well."""
        ...


def is_capturable(backend: object) -> bool:
    """Whether steps over this attention can be captured: the plans have a place that stays, and a `graph_key`."""
    return isinstance(backend, CarryingBackend | CapturableBackend)
