"""The states of a model's recurrent layers, for all sequences, and how the layers use them. Owned by the step thread.

What the layers compute is transformers' own: each is called as `generate` would call it, once with all sequences that
decode, as a batch of one token each, and once for each piece of a prompt. Its first and last linear layers, which look
at no neighbours, are taken out of that and computed for all tokens of the step at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from asyncengine.model.recurrent.recorded import Key, RecurrentLayer
from asyncengine.model.recurrent.row_states import RowStates
from asyncengine.model.recurrent.step_rows import StepRows, cut
from asyncengine.step.batch import StepBatch
from asyncengine.step.limits import Limits

Tensors = dict[Key, torch.Tensor]


def bytes_per_place(layers: Iterable[RecurrentLayer], dtype: torch.dtype) -> int:
    """Bytes of the states of one sequence, of a model in a dtype."""
    return sum(state.nbytes(dtype) for layer in layers for state in layer.spec.states)


class States:
    """The states of all recurrent layers of a model.

    A place is a row of each tensor: first the slots' own, then those of states that are kept, then one that stands for
    nowhere.

    Args:
        layers: In the order of execution.
        limits: Number of slots and of states that are kept.
        dtype: The model's.
        device: Theirs.

    Attributes:
        rows: Of the present step.
        nowhere: The place that nobody reads.
    """

    def __init__(self, layers: list[RecurrentLayer], limits: Limits, dtype: torch.dtype, device: torch.device) -> None:
        self._layers = layers
        self._dtype = dtype
        self._device = device
        self._tensors: list[Tensors] = []
        self.nowhere = limits.max_num_sequence + (limits.kept_states or 0)
        self.rows: StepRows | None = None

    def allocate(self) -> None:
        """Makes the tensors, of zeros, and lets the layers use them."""
        self._tensors = [
            {
                state.key: torch.zeros(
                    (self.nowhere + 1, *state.shape), dtype=state.dtype or self._dtype, device=self._device
                )
                for state in layer.spec.states
            }
            for layer in self._layers
        ]
        for layer, tensors in zip(self._layers, self._tensors, strict=True):
            layer.module.forward = _forward(layer, tensors, self)

    def free(self) -> None:
        """Lets the tensors go; the layers are as transformers made them."""
        self._tensors, self.rows = [], None
        for layer in self._layers:
            layer.module.__dict__.pop("forward", None)

    def begin(self, batch: StepBatch) -> None:
        """Prepares a step: copies states, then cuts it."""
        self._copy(batch.state_copies.tolist())
        self.rows = cut(batch, self._device)

    def end(self) -> None:
        """Keeps states as they are behind the step."""
        if self.rows is not None and self.rows.late:
            self._copy(self.rows.late)

    def _copy(self, pairs: Iterable[tuple[int, int]]) -> None:
        for source, to in pairs:
            for tensors in self._tensors:
                for tensor in tensors.values():
                    tensor[to].copy_(tensor[source])


class _Given(nn.Module):
    """Stands for a linear layer whose products are there already, or are made later.

    Attributes:
        products: (1, tokens, outputs) of the whole step; None to hand on what it is given.
        part: The tokens that are computed now, of the rows that decode, one for each sequence.
    """

    def __init__(self, products: torch.Tensor | None) -> None:
        super().__init__()
        self.products = products
        self.part: Callable[[torch.Tensor], torch.Tensor] = lambda whole: whole

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """The products of the tokens that are computed now."""
        return given if self.products is None else self.part(self.products)


def _forward(layer: RecurrentLayer, tensors: Tensors, states: States) -> Callable[..., Any]:
    """A recurrent layer's forward over the present step: (1, tokens, hidden) in and out."""
    module, spec = layer.module, layer.spec
    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        rows = states.rows
        assert rows is not None
        given = args[0] if args else kwargs["hidden_states"]
        tokens = given.shape[1]
        swapped = {name: module.get_submodule(name) for name in spec.entries}
        stands = {name: _Given(linear(given)) for name, linear in swapped.items()}
        if spec.last is not None:
            swapped[spec.last] = module.get_submodule(spec.last)
            stands[spec.last] = _Given(None)
        outputs: list[Any] = []

        def run(part: Callable[[torch.Tensor], torch.Tensor], own: Tensors, fresh: bool) -> Any:
            for stand in stands.values():
                stand.part = part
            some, named = (_parts(each, part, tokens) for each in (args, kwargs))
            some, named = spec.cache.put(some, named, RowStates(own, fresh))
            return plain(*some, **named)

        try:
            for name, stand in stands.items():
                module.set_submodule(name, stand)
            if count := rows.num_decodes:
                own = _rows_of(tensors, rows)
                outputs.append(_flat(run(lambda whole: whole[:, :count].transpose(0, 1), own, False)))
                if rows.alike is None:
                    for key, tensor in own.items():
                        tensors[key].index_copy_(0, rows.decodes, tensor)
            for piece in rows.pieces:
                start, end = piece.tokens
                own = {key: tensor[piece.place : piece.place + 1] for key, tensor in tensors.items()}
                outputs.append(run(lambda whole, s=start, e=end: whole[:, s:e], own, piece.fresh))  # type: ignore[misc]
                for to in piece.saves:
                    for tensor in tensors.values():
                        tensor[to].copy_(tensor[piece.place])
        finally:
            for name, linear in swapped.items():
                module.set_submodule(name, linear)
        output = outputs[0] if len(outputs) == 1 else _joined(outputs)
        return output if spec.last is None else swapped[spec.last](output)

    return forward


def _rows_of(tensors: Tensors, rows: StepRows) -> Tensors:
    """The states of the rows that decode: where they lie, if they lie side by side, else copies."""
    if rows.alike is not None:
        first, end = rows.alike
        return {key: tensor[first:end] for key, tensor in tensors.items()}
    return {key: tensor.index_select(0, rows.decodes) for key, tensor in tensors.items()}


def _parts(value: Any, part: Callable[[torch.Tensor], torch.Tensor], tokens: int) -> Any:
    """Arguments, with the part of each tensor that has something for each of the step's tokens."""
    if isinstance(value, torch.Tensor):
        return part(value) if value.dim() > 1 and value.shape[:2] == (1, tokens) else value
    if isinstance(value, tuple):
        return tuple(_parts(each, part, tokens) for each in value)
    if isinstance(value, dict):
        return {name: _parts(each, part, tokens) for name, each in value.items()}
    return value


def _flat(output: Any) -> Any:
    """What B sequences of one token each come to, as one of B tokens."""
    if isinstance(output, torch.Tensor):
        return output.transpose(0, 1)
    return tuple(_flat(each) for each in output) if isinstance(output, tuple) else output


def _joined(outputs: list[Any]) -> Any:
    """Outputs one after the other."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(outputs, dim=1)
    return tuple(_joined(list(each)) for each in zip(*outputs, strict=True)) if isinstance(first, tuple) else first
