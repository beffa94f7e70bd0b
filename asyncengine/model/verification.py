"""A last look before a model serves: does it, over the paged cache, compute what transformers computes?

Every assumption about an architecture that recording its attention cannot see (a bias added elsewhere, a state kept
elsewhere) shows here as wrong logits, and the model is refused instead of served wrongly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from asyncengine.config import Quantization
from asyncengine.errors import UnsupportedModelError
from asyncengine.model.attention import fp8
from asyncengine.model.attention.protocol import AttentionBackend
from asyncengine.model.attention_modules import HOOK, attach, text_config
from asyncengine.model.decoder.program import CompiledDecoder
from asyncengine.model.draft_heads.taps import Taps, tapped
from asyncengine.model.findings import Findings
from asyncengine.model.fused.decoder import FusedDecoder
from asyncengine.model.fused.tiles import MOST_TOKENS
from asyncengine.model.in_float32 import SHORT, ExpertsOneByOne, InFloat32
from asyncengine.model.recorded import Recorded
from asyncengine.model.recurrent.states import States
from asyncengine.model.trial_bound import COMPILED_TOLERANCE, Bound, Seen, in_parts, relative
from asyncengine.model.widened import WidenedLinears, is_faster
from asyncengine.step.batch import StepBatch
from asyncengine.step.limits import Limits

if TYPE_CHECKING:
    from asyncengine.model.decoder.roundings import Roundings
    from asyncengine.model.decoder.weights import Rounding
    from asyncengine.model.runner import TorchModel

PAGE = 4
_TOKENS = 12
_CUTS = (0, 6, 10, 11, 12)
"""Two sequences of 12 tokens are computed in these pieces: prefills of 6 and 4 tokens, then single decodes."""

_RECALLED_CUTS = (0, 6)
"""The same where an earlier load has tried more pieces: a prefill of 12 tokens has to do with all weights, and is one
row of tiles."""

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Relative error of the median row. The median, because in low precision a router may send single tokens elsewhere."""

_KEPT_COLUMNS = 4096
_FUSED_TOKENS = 8
"""Of each sequence, for kernels that run few tokens at a time."""
_NARROW_TOLERANCE: dict[str, float] = {"bytes": 0.3, "int8": 0.3, "int4": 0.6}
"""Of weights that are rounded to so few bits. Random ones, which no training has made robust, come to 0.3 in int4."""
_FP8_ROUNDING = 3.0
"""How much farther off than the modules fused kernels may be, where weights are in fp8."""
_FP8_TOLERANCE = 0.4
"""Of a KV cache or weights in fp8. Larger: the model's numbers do not fit into it."""


class Trial:
    """Two short random sequences, and what transformers makes of them.

    Attributes:
        layers: What keeps something of the tokens before, in what is tried next.
        apart: Recurrent layers whose functions were found not to work in place, and why not.

    Args:
        name: Of the model, for messages.
        dtype: Its own.
        layers: As the attribute.
        device: Where it is.
        ids: (2, tokens) the sequences.
        expected: (2, tokens, columns) what transformers makes of them.
        every: Which columns of the logits these are: those whose numbers are multiples of it.
        cuts: Between which places the sequences are computed at once.
        bound: How far off a compiled step may be; None is what its dtype allows.
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        layers: Recorded,
        device: torch.device,
        ids: NDArray[np.int32],
        expected: torch.Tensor,
        every: int = 1,
        cuts: Sequence[int] = _CUTS,
        bound: Bound | None = None,
    ) -> None:
        self.layers = layers
        self.apart: dict[str, str] = {}
        self._name = name
        self._dtype = dtype
        self._device = device
        self._ids = ids
        self._expected = expected
        self._every = every
        self._bound = bound
        self._states: list[torch.Tensor] = []
        self._cuts = sorted({min(cut, ids.shape[1]) for cut in cuts})

    @classmethod
    def of(cls, model: Any, layers: Recorded, device: torch.device) -> Trial:
        """A trial of a model with its weights: transformers computes what is expected."""
        text = text_config(model.config)
        ids = _sequences(text.vocab_size, getattr(text, "max_position_embeddings", None) or _TOKENS)
        dtype = next(model.parameters()).dtype
        states: list[torch.Tensor] = []
        watching: Any = contextlib.nullcontext(states)
        if device.type == "cpu" and dtype in SHORT and layers.attention and not layers.recurrent:  # see `of_step`
            watching = tapped(model, layers.attention[0].name, _CUTS[1])
        with watching as states:
            logits = _plain(model, ids, device)
        trial = cls(type(model).__name__, dtype, layers, device, ids, logits)
        trial._states = states
        return trial

    @classmethod
    def recalled(cls, findings: Findings, dtype: torch.dtype, layers: Recorded, device: torch.device) -> Trial:
        """A trial whose expected logits were computed by an earlier load."""
        about, expected = findings.description, findings.tensors["expected"]
        ids = findings.tensors["ids"].numpy()  # to draw them again would import numpy's random numbers, for 0.1 s
        bound = None if about["bound"] is None else Bound(*about["bound"])
        return cls(about["name"], dtype, layers, device, ids, expected, about["every"], _RECALLED_CUTS, bound)

    def kept(self) -> Findings:
        """What `recalled` needs: a sample of the expected logits, since all of them would be megabytes."""
        every = -(-self._expected.shape[-1] // _KEPT_COLUMNS)
        expected = self._expected[..., ::every].contiguous()
        ids = torch.from_numpy(self._ids)
        bound = None if self._bound is None else (self._bound.tolerance, self._bound.sparse)
        about = {"name": self._name, "every": every, "bound": bound}
        return Findings(about, {"ids": ids, "expected": expected})

    def of_step(self, model: Any, roundings: Roundings) -> Trial:
        """The same for a compiled step: in float32, and of weights that are rounded as the step has them.

        What is left between the two is how the step rounds what is between its products. By that it may be as far off
        as transformers' modules, which round more, are from float32; whatever else moves the logits farther shows.

        Args:
            model: As it was given before.
            roundings: What becomes of its weights.

        Returns:
            The trial; this one where the numbers are float32 and stay so, or where that cannot be computed.
        """
        if not self._states or not roundings.told:
            return self

        def seen(within: InFloat32) -> Seen:
            with tapped(model, self.layers.attention[0].name, _CUTS[1]) as states:
                logits = _plain(model, self._ids, self._device, within)
            return Seen(logits, torch.stack(states))

        try:
            with ExpertsOneByOne(model):
                exact = expected = seen(InFloat32())
                if roundings.some:
                    expected = seen(InFloat32(roundings.of))
        except (RuntimeError, TypeError):  # some function of torch's takes no numbers of two dtypes
            return self
        rounded = Seen(self._expected, torch.stack(self._states))
        bound = Bound.of(rounded, exact, expected, roundings.sparse, self._dtype)
        return Trial(self._name, self._dtype, self.layers, self._device, self._ids, expected.logits, bound=bound)

    def run(
        self,
        model: Any,
        backend: AttentionBackend,
        program: CompiledDecoder | None = None,
        kv_dtype: torch.dtype | None = None,
        fp8_weights: bool = False,
    ) -> float:
        """Compares paged with plain logits.

        Args:
            model: As it was given before; without its weights, if they are in `program`.
            backend: How it attends.
            program: Runs in the model's place.
            kv_dtype: Of keys and values, if it is not the model's.
            fp8_weights: Whether the model was quantised since.

        Returns:
            Relative error of the median row.

        Raises:
            UnsupportedModelError: They differ by more than rounding.
        """
        narrow = fp8_weights or kv_dtype not in (None, self._dtype)
        rounded = program is not None and program.rounded_to != "none"
        number = "fp8" if fp8_weights else str(kv_dtype or self._dtype)
        expected, first = self._expected[:, : self._cuts[-1]], self._cuts[1]
        bound = None if program is None else self._bound
        taps = None if bound is None else bound.taps()
        found = self._found(2, self._cuts, model, backend, program, kv_dtype, taps=taps)
        if bound is not None:
            for layer, (error, allowed) in enumerate(bound.errors_of_states(taps)):
                self._judge(error, allowed, f"{number} as layer {layer} begins")
            self._judge(bound.error(found, expected, first), bound.tolerance, number)
        error = relative(found, expected) if narrow or rounded else in_parts(found, expected, first)
        self._judge(error, tolerance_of(self._dtype, program, "none", narrow), number)
        return error

    def off(self, before: Trial, rounded_to: Rounding = "int4") -> float:
        """How far rounding weights since `before` has moved what is expected, as `run` returns it.

        Raises:
            UnsupportedModelError: By more than rounding does.
        """
        error, tolerance = relative(self._expected, before._expected), _NARROW_TOLERANCE[rounded_to]
        if not error <= tolerance:
            raise UnsupportedModelError(
                f"{self._name} is too far off in {rounded_to}: relative error {error:.2g}, allowed {tolerance:g}"
            )
        return error

    def scaled(self, model: Any, backend: AttentionBackend) -> Recorded:
        """The layers with what their keys and values are to be divided by in fp8, after the largest of the trial's."""
        largest: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

        def watched(hook: Any) -> Any:
            def watching(module: nn.Module, query: Any, key: Any, value: Any, kwargs: Any) -> Any:
                seen = (key.abs().max().float(), value.abs().max().float())
                if before := largest.get(module):
                    seen = (torch.maximum(before[0], seen[0]), torch.maximum(before[1], seen[1]))
                largest[module] = seen
                return hook(module, query, key, value, kwargs)

            return watching

        self._error(2, (0, self._ids.shape[1]), model, backend, around=watched)
        layers = []
        for layer in self.layers.attention:
            key, value = (fp8.scale_for(float(number)) for number in largest[layer.module])
            if layer.spec.values_in_keys:  # which are kept once, and what is largest of both is in the key
                value = key
            spec = dataclasses.replace(layer.spec, key_scale=key, value_scale=value)
            layers.append(dataclasses.replace(layer, spec=spec))
        return dataclasses.replace(self.layers, attention=layers)

    def run_fused(self, model: Any, backend: AttentionBackend, fused: FusedDecoder, fp8_weights: bool = False) -> float:
        """As `run`, of fused kernels: those for a single token, for several, and for many are judged apart.

        With weights in fp8, what differs in rounding may get another code in each layer. What the modules make of the
        same pieces tells how much that is.

        Returns:
            The largest error of the three.

        Raises:
            UnsupportedModelError: They differ by more than rounding.
        """
        most = self._ids.shape[1]
        length = min(_FUSED_TOKENS, most)
        several = min(MOST_TOKENS // 2, length)  # of each of the two sequences
        cuts = range(0, length + 1)
        pieces: list[tuple[int, Sequence[int]]] = [(1, cuts), (2, cuts[::several])]
        fused.some = 2 * most > MOST_TOKENS
        if fused.some:
            pieces.append((2, (0, most)))
        errors = [self._error(rows, each, model, backend, fused=fused) for rows, each in pieces]
        for (rows, each), error in zip(pieces, errors, strict=True):
            tolerance = COMPILED_TOLERANCE[self._dtype]
            if fp8_weights and error > tolerance:
                tolerance = min(_FP8_ROUNDING * self._error(rows, each, model, backend), _FP8_TOLERANCE)
            self._judge(error, tolerance, "fp8" if fp8_weights else self._dtype)
        return max(errors)

    def _error(
        self,
        rows: int,
        cuts: Sequence[int],
        model: Any,
        backend: AttentionBackend,
        fused: FusedDecoder | None = None,
        around: Callable[[Any], Any] | None = None,
    ) -> float:
        """Relative error of the median row over the first `rows` sequences, computed in pieces from cut to cut: of the
        first piece or of all others, whichever is larger.

        Each layer's attention is called through what `around` makes of it.
        """
        found = self._found(rows, cuts, model, backend, fused=fused, around=around)
        return in_parts(found, self._expected[:rows, : cuts[-1]], cuts[1])

    def _found(
        self,
        rows: int,
        cuts: Sequence[int],
        model: Any,
        backend: AttentionBackend,
        program: CompiledDecoder | None = None,
        kv_dtype: torch.dtype | None = None,
        fused: FusedDecoder | None = None,
        around: Callable[[Any], Any] | None = None,
        taps: Taps | None = None,
    ) -> torch.Tensor:
        """The logits of the first `rows` sequences, (rows, tokens, columns), in the same pieces.

        A program leaves the states of the first piece in `taps`.
        """
        length = self._ids.shape[1]
        dtypes = self._dtype, kv_dtype or self._dtype
        with stepping(model, self.layers, backend, program, dtypes, self._device, length, 2, around) as runner:
            if fused is not None:
                runner.use_fused(fused)
            pieces = []
            for start, end in itertools.pairwise(cuts):
                if program is not None:
                    program.taps = None if start else taps
                with torch.inference_mode():
                    pieces.append(runner.logits(piece(self._ids[:rows], start, end)).reshape(rows, end - start, -1))
            if program is not None:
                program.taps = None
            found = torch.cat([each[..., :: self._every] for each in pieces], dim=1).float()
            states = runner.states
        if states is not None:
            self.layers = self.layers.alone(states.alone).apart(states.apart)
            self.apart |= states.apart
        return found

    def _judge(self, error: float, tolerance: float, number: object) -> None:
        if not error <= tolerance:  # NaN is no less a failure
            raise UnsupportedModelError(
                f"{self._name} does not compute over a paged KV cache what it computes without one: relative "
                f"error {error:.2g}, allowed {tolerance:g} in {number}"
            )


def tolerance_of(
    dtype: torch.dtype, program: CompiledDecoder | None, quantization: Quantization, narrow: bool
) -> float:
    """How far off a model may be.

    Args:
        dtype: Its own.
        program: Runs in its place.
        quantization: What weights were rounded to since it was computed what is expected.
        narrow: Whether weights or KV cache are in fp8.
    """
    if narrow:
        return _FP8_TOLERANCE
    if program is None:
        return _NARROW_TOLERANCE.get(quantization, _TOLERANCE[dtype])
    return _NARROW_TOLERANCE.get(program.rounded_to, COMPILED_TOLERANCE[dtype])


@contextlib.contextmanager
def stepping(
    model: Any,
    layers: Recorded,
    backend: AttentionBackend,
    program: CompiledDecoder | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device,
    length: int,
    rows: int,
    around: Callable[[Any], Any] | None = None,
) -> Iterator[TorchModel]:
    """Something that steps a model over a small cache, within the block.

    Args:
        model: The model; without its weights, if they are in `program`.
        layers: Its layers.
        backend: How it attends.
        program: Runs in the model's place.
        dtypes: Of activations, and of keys and values.
        device: Where it is.
        length: Of each sequence.
        rows: How many sequences there are.
        around: Makes, of what each layer's attention calls, what it is to call.
    """
    from asyncengine.model.paged_layers import PagedLayers
    from asyncengine.model.runner import TorchModel

    recurrent = layers.recurrent
    limits = Limits(rows, length, rows * length, PAGE, rows * -(-length // PAGE), kept_states=0 if recurrent else None)
    dtype, kv_dtype = dtypes
    states = States(recurrent, limits, dtype, device, trying=True) if recurrent else None
    paged = PagedLayers(layers.attention, backend, limits, kv_dtype, device, states)
    paged.allocate()
    if around is not None:
        attach({layer.module: around(getattr(layer.module, HOOK)) for layer in layers.attention})
    try:
        yield TorchModel(model, paged, None, device, program)  # type: ignore[arg-type]
    finally:
        paged.free()


def _sequences(vocab_size: int, longest: int) -> NDArray[np.int32]:
    return np.random.default_rng(0).integers(0, vocab_size, size=(2, min(_TOKENS, longest)), dtype=np.int32)


def _plain(
    model: Any, ids: Any, device: torch.device, within: contextlib.AbstractContextManager[Any] | None = None
) -> torch.Tensor:
    """Logits by transformers alone, (2, tokens, vocabulary); in a context of how torch's functions are computed."""
    from asyncengine.model import architecture

    model.set_attn_implementation("eager")
    if within is None:
        within = WidenedLinears() if is_faster(device) else contextlib.nullcontext()
    try:
        with torch.inference_mode(), within:
            found = model(input_ids=torch.from_numpy(ids.astype(np.int64)).to(device), use_cache=False)
        logits: torch.Tensor = found.logits.float()
        return logits
    finally:
        architecture.attend_here(model)


def piece(ids: Any, start: int, end: int) -> StepBatch:
    """Tokens start:end of every sequence as one step; every token's logits are wanted."""
    sequences, count, blocks = len(ids), end - start, -(-ids.shape[1] // PAGE)
    tables = np.arange(sequences * blocks, dtype=np.int32).reshape(sequences, blocks)
    positions = np.tile(np.arange(start, end), sequences)
    rows = np.repeat(np.arange(sequences), count)
    return StepBatch(
        token_ids=ids[:, start:end].reshape(-1).copy(),
        positions=positions.astype(np.int32),
        query_start=np.arange(sequences + 1, dtype=np.int32) * np.int32(count),
        context_lens=np.full(sequences, start, dtype=np.int32),
        block_tables=tables,
        slot_mapping=tables[rows, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE,
        sample_index=np.arange(sequences * count, dtype=np.int64),
        sample_slots=np.zeros(sequences * count, dtype=np.int64),
        sample_positions=np.zeros(sequences * count, dtype=np.int64),
        copies=np.empty((0, 2), dtype=np.int64),
        num_decodes=sequences if count == 1 else 0,
        slots=np.arange(sequences),
    )
