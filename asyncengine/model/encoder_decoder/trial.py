"""A last look before a model serves: does it compute, over a paged cache and with the products that it has here, what
transformers computes?
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutput

from asyncengine.config import Quantization
from asyncengine.errors import UnsupportedModelError
from asyncengine.model import verification
from asyncengine.model.encoder_decoder.details import SourceDetails
from asyncengine.model.encoder_decoder.layers import attend_here
from asyncengine.model.encoder_decoder.loading import Backends, serving
from asyncengine.model.encoder_decoder.parting import filled, of_text
from asyncengine.model.encoder_decoder.parts import parts_of
from asyncengine.model.encoder_decoder.products import compiles, with_products
from asyncengine.model.graphs import reason_of
from asyncengine.model.letting_go import take_apart
from asyncengine.model.plain_loads import with_weights
from asyncengine.model.quantised.four_bit_experts import use_kernels
from asyncengine.model.trial_bound import relative
from asyncengine.step.batch import Int32, StepBatch
from asyncengine.step.limits import Limits

_PIECES = (3, 2, 1, 1)
"""Tokens of the pieces in which a model is tried."""
_READ = 11
"""Rows that its encoder is tried with, no multiple of a block. Where a source has more, they are repeated."""


def trial_ids(details: SourceDetails, never: int | None) -> Int32:
    """(tokens,) what its decoder is tried with; a token that stands for padding is not among it."""
    usable = np.delete(np.arange(details.vocab_size), [] if never is None else [never])
    return usable[np.arange(sum(_PIECES)) * 7 % len(usable)].astype(np.int32)


class _Made(NamedTuple):
    """What a model makes of what it is tried with: (source, hidden) by its encoder, (tokens, vocabulary) logits."""

    rows: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class Trial:
    """What a model is tried with: random numbers in the place of what its encoder embeds, and tokens of its decoder.

    Attributes:
        details: Of the load.
        backends: What attends.
        never: As of `trial_ids`.
        begin: Has the model's forward be that of a step, where it is not yet.
    """

    details: SourceDetails
    backends: Backends
    never: int | None = None
    begin: Callable[[Any], None] = lambda model: None

    def run(self, made: list[Any]) -> tuple[Any, list[str]]:
        """Compares a model as it will run with transformers. Where compiled code turns out to compute something else
        with weights that are not rounded, torch multiplies.

        Args:
            made: Where the model is, as soon as it has been read, for whoever lets it go after an error.

        Returns:
            The model, which is ready to take steps, and what there is to be said of it, in words.

        Raises:
            UnsupportedModelError: It computes something else, or cannot be in as few bits as is wanted.
        """
        model, details = self._read(made), self.details
        if details.quantization != "none":
            return model, self._narrow(model)
        expected = self._plain(model)
        try:
            with_products(model, details, self.backends[0])
            self._take_steps(model)
            self._compare(model, expected)
            return model, []
        except Exception as error:  # a module that reads the weights of its linear layers raises anything
            if not compiles(details, self.backends[0]):
                raise
            reason = reason_of(error)
        model = self._read(made)
        self._take_steps(model)
        self._compare(model, expected)
        return model, [f"linear layers: run as torch has them, which is slower: {reason}"]

    def _read(self, made: list[Any]) -> Any:
        """The model with its weights; one that was read before is let go."""
        while made:
            take_apart(made.pop())
        made.append(with_weights(self.details, self.details.kind))
        return made[0]

    def _narrow(self, model: Any) -> list[str]:
        """The same of a model whose weights are to be rounded: what that moves is judged by itself."""
        details, quantization = self.details, self.details.quantization
        exact = self._plain(model)
        share = with_products(model, details, self.backends[0])
        use_kernels(model, False)  # they are what is tried
        try:
            expected = self._plain(model)
        except Exception as error:  # as above
            raise UnsupportedModelError(
                f"{details.checkpoint.name} cannot be in {quantization}: {reason_of(error)}"
            ) from error
        use_kernels(model, True)
        _, off = (
            self._judged(*each, quantization, f"is too far off in {quantization}")
            for each in zip(expected, exact, strict=True)
        )
        self._take_steps(model)
        slow = "; slow on cpu" if quantization == "fp8" and details.device.type == "cpu" else ""
        how = f"{share:.0%} of the weights, rounded: logits of a trial are {off:.1%} of their norm off{slow}"
        notes = [f"quantization: {quantization}, {how}"]
        try:
            self._compare(model, expected)
            return notes
        except Exception as error:  # also what a compiler or a driver raises
            if details.device.type != "cuda" or quantization != "int4":
                raise
            reason = reason_of(error)
        use_kernels(model, False)
        self._compare(model, expected)
        return [*notes, f"quantization: numbers are made of codes in each step, which is slow: {reason}"]

    def _plain(self, model: Any) -> _Made:
        """By transformers' own forward."""
        ids = torch.from_numpy(trial_ids(self.details, self.never)[None])
        kind: Any = type(model).__base__
        with torch.inference_mode():
            rows = self._encoded(model)
            given = {
                "encoder_outputs": BaseModelOutput(last_hidden_state=rows[None]),
                "decoder_input_ids": ids.to(self.details.device).long(),
            }
            return _Made(rows, kind.forward(model, **given, use_cache=False).logits[0])

    def _encoded(self, model: Any) -> torch.Tensor:
        """(source, hidden) what an encoder's layers make of random numbers."""
        details, encoder = self.details, parts_of(model).encoder
        source = details.sources if details.fixed else min(_READ, details.sources)
        hidden = torch.randn(1, _READ, details.hf_config.d_model, generator=torch.Generator().manual_seed(0))
        hidden = hidden.to(details.device, details.dtype)
        if not details.fixed:
            hidden = encoder(inputs_embeds=hidden).last_hidden_state
        else:  # it embeds what is heard, and much of it
            for layer in encoder.layers:
                hidden = layer(hidden, None)
            hidden = encoder.layer_norm(hidden)
        rows: torch.Tensor = hidden[0].repeat(-(-source // _READ), 1)[:source]
        return rows

    def _take_steps(self, model: Any) -> None:
        attend_here(model)
        self.begin(model)

    def _compare(self, model: Any, expected: _Made) -> None:
        """Compares what a model computes in steps over a paged cache with what is expected of it."""
        details, page_size = self.details, verification.PAGE
        with torch.inference_mode():
            rows = self._encoded(model)
        self._judged(rows, expected.rows, "none", "does not encode what it encodes as transformers has it")
        ids, source = trial_ids(details, self.never)[None], len(rows)
        places = filled(source, page_size)
        length = places + ids.shape[1]
        limits = Limits(1, length, length, page_size, -(-length // page_size))
        text, layers, _ = serving(model, details, self.backends, limits, None, {})
        sequence = np.concatenate((np.zeros((1, places), np.int32), ids), axis=1)

        def piece(start: int, end: int) -> StepBatch:
            batch = verification.piece(sequence, start, end)
            return dataclasses.replace(batch, sources=np.full(1, source, np.int32))

        found = []
        with torch.inference_mode():
            layers.write(rows, piece(0, source).slot_mapping)
            for start, end in itertools.pairwise(itertools.accumulate((places, *_PIECES))):
                batch = piece(start, end)
                own = of_text(batch, page_size)
                assert own is not None
                layers.begin(batch, own.attention_spans)
                found.append(text.logits(own))
        layers.free()  # before it is reckoned what memory there is
        wrong = "does not compute over a paged KV cache what it computes without one"
        self._judged(torch.cat(found), expected.logits, "none", wrong)

    def _judged(self, found: torch.Tensor, expected: torch.Tensor, rounded_to: Quantization, wrong: str) -> float:
        """How far off something is.

        Args:
            found: One of `_Made`.
            expected: As that.
            rounded_to: What weights were rounded to in between.
            wrong: What is to be said if that is too far.

        Raises:
            UnsupportedModelError: So it is.
        """
        details = self.details
        error = relative(found.float(), expected.float())
        tolerance = verification.tolerance_of(details.dtype, None, rounded_to, details.quantization == "fp8")
        if not error <= tolerance:  # NaN is no less a failure
            raise UnsupportedModelError(
                f"{details.checkpoint.name} {wrong}: relative error {error:.2g}, allowed {tolerance:g}"
            )
        return error
