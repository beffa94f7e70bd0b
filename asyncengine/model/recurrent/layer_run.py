"""One recurrent layer over one step: its tokens, row by row, by transformers' own code. Owned by the step thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asyncengine.model.recurrent.drafted_rows import DraftedRows
from asyncengine.model.recurrent.functions import Present
from asyncengine.model.recurrent.places import Places
from asyncengine.model.recurrent.recorded import Key, RecurrentLayer
from asyncengine.model.recurrent.row_states import RowStates
from asyncengine.model.recurrent.step_rows import StepRows

Tensors = dict[Key, torch.Tensor]
_Part = Callable[[torch.Tensor], torch.Tensor]
"""Takes the tokens that are computed now from (1, tokens, ...) of the step: (B, tokens of each, ...)."""

_DIFFERS = 0.1
"""Relative error between tokens computed at once and one by one, beyond which a layer has not looked at its state."""
_IN_PLACE = {torch.float32: 1e-2, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative error between kernels and torch, by dtype of a model, beyond which they do not compute the same.

A device may compute torch's convolutions in float32 with ten bits of mantissa, and what transformers rounds to the
model's dtype in between is float32 in kernels.
"""


class _Standing(nn.Module):
    """Stands for a linear layer whose products are there already, or are made later.

    Attributes:
        products: (1, tokens, outputs) of the whole step; None to hand on what it is given.
        part: Takes those of the tokens that are computed now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: torch.Tensor | None = None
        self.part: _Part = lambda whole: whole

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """The products of the tokens that are computed now."""
        return given if self.products is None else self.part(self.products)


@dataclass(frozen=True, slots=True)
class Outside:
    """A linear layer of a recurrent one that is computed for all tokens of a step at once, and what stands for it.

    Attributes:
        parent: Has it.
        name: By which the parent has it.
        linear: Itself.
        stand: What is in its place while rows are computed.
        first: Whether it takes the recurrent layer's input; else it makes its output.
    """

    parent: nn.Module
    name: str
    linear: nn.Module
    stand: _Standing
    first: bool

    @classmethod
    def all_of(cls, layer: RecurrentLayer) -> list[Outside]:
        """Those of a layer: once for all steps."""
        spec, found = layer.spec, []
        for name in (*spec.entries, *(() if spec.last is None else (spec.last,))):
            path, _, leaf = name.rpartition(".")
            parent = layer.module.get_submodule(path)
            found.append(cls(parent, leaf, parent.get_submodule(leaf), _Standing(), name != spec.last))
        return found


class LayerRun:
    """One call of a recurrent layer.

    Args:
        layer: It.
        outside: Its linear layers that are computed for all tokens at once.
        plain: Its forward, as transformers has it.
        present: Is told what states that is given.
        tensors: Its states, (places, ...) each, the last of which is nowhere.
        args: Of the call, for all tokens of the step: (1, tokens, hidden).
        kwargs: The same.
    """

    def __init__(
        self,
        layer: RecurrentLayer,
        outside: list[Outside],
        plain: Callable[..., Any],
        present: Present,
        tensors: Tensors,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        self._spec, self._outside = layer.spec, outside
        self._plain, self._present = plain, present
        self._tensors = tensors
        self._args, self._kwargs = args, kwargs
        self._tokens = given.shape[1]
        for each in outside:
            if each.first:
                each.stand.products = each.linear(given)

    def over(self, rows: StepRows, places: torch.Tensor, continues: bool, in_place: bool = False) -> Any:
        """What the layer computes for a step; its states are those behind it then.

        Args:
            rows: Of the step.
            places: (rows,) of those that decode.
            continues: Whether it computes several tokens at once behind others.
            in_place: Whether its functions take one token of each sequence to the states of all.
        """
        outputs: list[Any] = []
        try:
            self._stand_in()
            if rows.drafted is not None:
                outputs.append(self._waves(rows.drafted, in_place))
            elif rows.num_decodes:
                outputs.append(self._decodes(rows.num_decodes, rows.alike, places, in_place))
            for piece in rows.pieces:
                start, end = piece.tokens
                own = {key: tensor[piece.place : piece.place + 1] for key, tensor in self._tensors.items()}
                if piece.fresh or continues:
                    outputs.append(self._piece(start, end, own, piece.fresh))
                else:
                    outputs += [self._piece(at, at + 1, own, False) for at in range(start, end)]
                for to in piece.saves:
                    for tensor in self._tensors.values():
                        tensor[to].copy_(tensor[piece.place])
        finally:
            self._put_back()
            for each in self._outside:
                each.stand.products = None  # they would be held until the next step
        output = outputs[0] if len(outputs) == 1 else _joined(outputs)
        return output if self._spec.last is None else self._outside[-1].linear(output)

    def continues(self, rows: StepRows) -> bool:
        """Whether a piece of several tokens comes to the same at once and one by one, as far as the step has such.

        From states that are none that any text leads to, so that it shows whether they are looked at.
        """
        piece = next((p for p in rows.pieces if not p.fresh and p.tokens[1] - p.tokens[0] > 1), None)
        if piece is None:
            return True
        (start, end), outputs = piece.tokens, []
        generator = torch.Generator().manual_seed(0)
        strange = {
            key: (10 * torch.randn(1, *tensor.shape[1:], generator=generator)).to(tensor)
            for key, tensor in self._tensors.items()
        }
        try:
            self._stand_in()
            for cuts in ([(start, end)], [(at, at + 1) for at in range(start, end)]):
                own = {key: tensor.clone() for key, tensor in strange.items()}
                outputs.append(_first(_joined([self._piece(*part, own, False) for part in cuts])).float())
        finally:
            self._put_back()
        at_once, one_by_one = outputs
        return bool((at_once - one_by_one).norm() <= _DIFFERS * one_by_one.norm())

    def differs_in_place(self) -> str | None:
        """Tries one token of each of two sequences, over states that are gathered and over those of all sequences.

        From states that are none that any text leads to, in an order of their own; one goes to another place than it
        was in, as behind a guess. Beside them is one that is nobody's.

        Returns:
            What is wrong with the latter, in words; None if it is the same but for rounding.
        """
        generator = torch.Generator().manual_seed(0)
        strange = {
            key: (2 * torch.randn(5, *tensor.shape[1:], generator=generator)).to(tensor)
            for key, tensor in self._tensors.items()
        }
        device = next(iter(strange.values())).device
        sources, targets = (torch.tensor(at).to(device) for at in ([2, 0, 4], [2, 3, 4]))
        tokens = torch.tensor([0, self._tokens - 1, 0]).to(device)

        def part(whole: torch.Tensor) -> torch.Tensor:
            return whole[0].index_select(0, tokens)[:, None]

        gathered = {key: tensor.index_select(0, sources) for key, tensor in strange.items()}
        placed = {key: tensor.clone() for key, tensor in strange.items()}
        try:
            self._stand_in()
            expected = _first(self._run(part, gathered, False))[:2]
            found = _first(self._run(part, placed, False, Places(sources, targets, 4)))[:2]
        except Exception as error:  # whatever a compiler or a driver raises
            return f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            self._put_back()
        pairs = [("outputs", found, expected)]
        for key, tensor in placed.items():
            expected_states = strange[key].index_copy(0, targets[:2], gathered[key][:2])
            if not torch.equal(tensor[:2], expected_states[:2]):
                return f"{key[0]} states of others are changed"
            pairs.append((f"{key[0]} states", tensor[2:4], expected_states[2:4]))
        for what, one, other in pairs:
            if one.shape != other.shape:
                return f"{what} have another shape"
            off = float((one.float() - other.float()).norm() / other.float().norm())
            if not off <= _IN_PLACE.get(expected.dtype, 1e-2):  # NaN is no less a failure
                return f"relative error {off:.2g} of {what}"
        return None

    def _stand_in(self) -> None:
        for each in self._outside:
            each.parent._modules[each.name] = each.stand

    def _put_back(self) -> None:
        for each in self._outside:
            each.parent._modules[each.name] = each.linear

    def _decodes(self, count: int, alike: tuple[int, int] | None, places: torch.Tensor, in_place: bool) -> Any:
        """All rows that decode, as a batch."""

        def part(whole: torch.Tensor) -> torch.Tensor:
            return whole[:, :count].transpose(0, 1)

        if in_place:
            return _flat(self._run(part, self._tensors, False, Places.same(places, self._nowhere)))
        own = self._own(alike, places)
        output = self._run(part, own, False)
        self._give_back(own, alike, places)
        return _flat(output)

    def _waves(self, rows: DraftedRows, in_place: bool) -> Any:
        """All rows that decode, in a step with drafts: in waves of one token each, as batches."""
        if in_place:
            outputs = [_flat(self._run(wave.part, self._tensors, False, wave.places)) for wave in rows.waves]
            return _chosen(_joined(outputs), rows.back)
        own, outputs = self._own(rows.alike, rows.places), []
        for wave in rows.waves:
            of_wave = {key: tensor[: wave.count] for key, tensor in own.items()}
            outputs.append(_flat(self._run(wave.part, of_wave, False)))
            start, end = wave.aside
            for key, tensor in of_wave.items():
                self._tensors[key][start:end].copy_(tensor[: end - start])
        self._give_back(own, rows.alike, rows.places)
        return _chosen(_joined(outputs), rows.back)

    def _own(self, alike: tuple[int, int] | None, places: torch.Tensor) -> Tensors:
        """The states at places; where these lie side by side, the states themselves."""
        if alike is not None:
            return {key: tensor[slice(*alike)] for key, tensor in self._tensors.items()}
        return {key: tensor.index_select(0, places) for key, tensor in self._tensors.items()}

    def _give_back(self, own: Tensors, alike: tuple[int, int] | None, places: torch.Tensor) -> None:
        if alike is None:
            for key, tensor in own.items():
                self._tensors[key].index_copy_(0, places, tensor)

    def _piece(self, start: int, end: int, own: Tensors, fresh: bool) -> Any:
        return self._run(lambda whole: whole[:, start:end], own, fresh)

    @property
    def _nowhere(self) -> int:
        return len(next(iter(self._tensors.values()))) - 1

    def _run(self, part: _Part, own: Tensors, fresh: bool, places: Places | None = None) -> Any:
        for each in self._outside:
            each.stand.part = part
        args, kwargs = (_parts(each, part, self._tokens) for each in (self._args, self._kwargs))
        rows = self._present.rows = RowStates(own, fresh, places)
        args, kwargs = self._spec.cache.put(args, kwargs, rows)
        try:
            return self._plain(*args, **kwargs)
        finally:
            self._present.rows = None


def _parts(value: Any, part: _Part, tokens: int) -> Any:
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


def _chosen(output: Any, tokens: torch.Tensor) -> Any:
    """Some tokens of an output, in their order."""
    if isinstance(output, torch.Tensor):
        return output.index_select(1, tokens)
    return tuple(_chosen(each, tokens) for each in output) if isinstance(output, tuple) else output


def _first(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor
