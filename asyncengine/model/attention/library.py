"""What the kernels of other projects have in common: how they are imported, what they store, how they take rows."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from asyncengine.model.attention.protocol import BackendUnavailableError, LayerSpec
from asyncengine.model.attention.token_major import TokenMajorCache, TokenMajorLayout
from asyncengine.step.batch import Int32, Int64, StepBatch

_DTYPES = (torch.bfloat16, torch.float16)
_CAPABILITY = (8, 0)


def imported(module: str, whose: str) -> Any:
    """A module.

    Raises:
        BackendUnavailableError: It is not there, or does not fit the system.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever a package that does not fit the system raises when it is imported
        raise BackendUnavailableError(f"{module}, the module of {whose}, cannot be imported: {error}") from error


class LibraryAttention(TokenMajorLayout):
    """What both refuse.

    Attributes:
        name: Of the back end.
        head_dims: The sizes of heads that it takes.
        head_dims_in_words: The same, for messages.
    """

    name: str
    head_dims: tuple[int, ...]
    head_dims_in_words: str
    _nowhere: int = 0

    def check_dtype(self, dtype: torch.dtype, device: torch.device) -> None:
        """Looks whether keys and values are in 16 bits, on a device that has matrix units for both kinds.

        Raises:
            BackendUnavailableError: They are not.
        """
        if dtype not in _DTYPES:
            given = str(dtype).removeprefix("torch.")
            raise BackendUnavailableError(
                f"the {self.name} attention back end stores bfloat16 and float16, not {given}"
            )
        if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < _CAPABILITY:
            raise BackendUnavailableError(
                f"the {self.name} attention back end needs a device of compute capability 8.0 or later, not "
                f"{capability[0]}.{capability[1]} ({torch.cuda.get_device_name(device)})"
            )

    def check_layer(self, spec: LayerSpec) -> None:
        """As `ParticularBackend` says."""
        if spec.has_sinks:
            raise BackendUnavailableError(f"the {self.name} attention back end has no attention sinks")
        if spec.distances:
            raise BackendUnavailableError(f"the {self.name} attention back end adds no bias to scores")
        if spec.looks_ahead:
            raise BackendUnavailableError(
                f"with the {self.name} attention back end tokens of an image cannot attend to later ones of it"
            )
        if spec.key_dim != spec.value_dim or spec.key_dim not in self.head_dims:
            raise BackendUnavailableError(
                f"the {self.name} attention back end takes key and value heads of one size, {self.head_dims_in_words}, "
                f"not of {spec.key_dim} and {spec.value_dim}"
            )

    def allocate(
        self, spec: LayerSpec, num_blocks: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> TokenMajorCache:
        """Returns the uninitialised KV cache of one layer, and one block more: captured steps write padding there.

        Raises:
            BackendUnavailableError: The package has no kernel for such a layer.
        """
        self.check_dtype(dtype, device)
        self.check_layer(spec)
        self._nowhere = num_blocks
        return super().allocate(spec, num_blocks + 1, page_size, dtype, device)


@dataclass(frozen=True, slots=True)
class PagedRows:
    """A step's R rows that have query tokens, on the host; row r's are the last ones of its context.

    Attributes:
        query_start: (R + 1,) row r owns the query tokens query_start[r]:query_start[r + 1].
        lengths: (R,) tokens of the row, those of this step included.
        tables: (R, longest row's blocks) blocks, zero past the row's end.
        filled: (R, longest row's blocks) which of them are blocks of the row.
        longest_query: Query tokens of the row that has most.
    """

    query_start: Int32
    lengths: Int32
    tables: Int32
    filled: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
    longest_query: int

    @classmethod
    def of(cls, batch: StepBatch, page_size: int) -> PagedRows:
        """Those of a step."""
        queries = np.diff(batch.query_start)
        rows = np.flatnonzero(queries)
        queries = queries[rows]
        lengths = (batch.context_lens[rows] + queries).astype(np.int32)
        blocks = -(-lengths // page_size)
        width = int(blocks.max(initial=0))
        filled = np.arange(width) < blocks[:, None]
        return cls(
            query_start=np.concatenate(([0], np.cumsum(queries))).astype(np.int32),
            lengths=lengths,
            tables=np.where(filled, batch.block_tables[rows, :width], 0).astype(np.int32),
            filled=filled,
            longest_query=int(queries.max(initial=0)),
        )

    @property
    def tokens(self) -> int:
        """Query tokens of all rows."""
        return int(self.query_start[-1])


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """A step of one token for each row, on the host, with rows of one token each where it is padded.

    A kernel need not know what to do with an empty row: the rows that pad have their token in a block of nobody's.

    Attributes:
        slots: (T,) where the keys and values of the tokens go.
        lengths: (T,) tokens of the row, that of this step included.
        blocks: (T,) how many blocks that are.
        tables: (T, longest row's blocks) the blocks, zero past the row's end.
    """

    slots: Int64
    lengths: Int32
    blocks: Int32
    tables: Int32

    @classmethod
    def of(cls, batch: StepBatch, page_size: int, nowhere: int) -> DecodeRows | None:
        """Those of a step, or None where one of its rows has not one token.

        Args:
            batch: The step; its tokens beyond the last row pad it.
            page_size: Tokens to a block.
            nowhere: The block of nobody's.
        """
        if (np.diff(batch.query_start) != 1).any():
            return None
        tokens, rows = len(batch.slot_mapping), len(batch.context_lens)
        lengths = np.ones(tokens, np.int32)
        lengths[:rows] += batch.context_lens
        blocks = -(-lengths // page_size)
        tables = np.zeros((tokens, int(blocks.max(initial=1))), np.int32)
        width = int(blocks[:rows].max(initial=0))
        tables[:rows, :width] = np.where(np.arange(width) < blocks[:rows, None], batch.block_tables[:, :width], 0)
        tables[rows:, 0] = nowhere
        slots = np.where(batch.slot_mapping < 0, nowhere * page_size, batch.slot_mapping)
        return cls(slots, lengths, blocks, tables)


def with_padding(attended: torch.Tensor, tokens: int) -> torch.Tensor:
    """What was attended to, and zeros for the tokens that pad the step to `tokens`."""
    if attended.shape[0] == tokens:
        return attended
    output = attended.new_zeros(tokens, *attended.shape[1:])
    output[: attended.shape[0]] = attended
    return output
