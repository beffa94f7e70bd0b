"""A transformers model with a paged KV cache and a sampler: what the step thread steps. Owned by the step thread."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from asyncengine.errors import InsufficientMemoryError
from asyncengine.generation import SamplingParams
from asyncengine.media import MediaFailure
from asyncengine.model import memory, token_draw, token_logprobs, verified_draw
from asyncengine.model.adapters.adapted_modules import AdaptedModules, groups_of, places_of
from asyncengine.model.capturing import Capturing
from asyncengine.model.debug_functions import debug_function
from asyncengine.model.decoder.adapted import CompiledAdapters
from asyncengine.model.decoder.program import CompiledDecoder, Seen
from asyncengine.model.draft_heads.taps import Taps, tap_modules
from asyncengine.model.fused.decoder import FusedDecoder
from asyncengine.model.graphs import Ran
from asyncengine.model.hidden_states import hidden_states, summed
from asyncengine.model.kept_blocks import KeptBlocks
from asyncengine.model.last_tokens import LastTokens
from asyncengine.model.letting_go import take_apart
from asyncengine.model.lost_device import is_lost
from asyncengine.model.media.encoder import MediaEncoder
from asyncengine.model.paged_layers import PagedLayers
from asyncengine.model.quantised import new_values
from asyncengine.model.recurrent.states import States
from asyncengine.model.sampler import Drawn, Sampler
from asyncengine.model.skeleton import Skeleton
from asyncengine.model.step_inputs import StepInputs
from asyncengine.model.token_draw import DrawSettings
from asyncengine.model.token_ranking import argmax
from asyncengine.model.way_back import OnItsWay, WayBack
from asyncengine.model.weight_writer import replace_weights
from asyncengine.step.batch import NO_TOKENS, Int32, Int64, StepBatch, StepTokens


class Companion(Protocol):
    """What sleeps, wakes and goes with a model."""

    def sleep(self) -> None:
        """Gives its KV cache's memory back."""
        ...

    def wake(self) -> None:
        """Undoes `sleep`."""
        ...

    def close(self) -> None:
        """Lets everything go."""
        ...


class Reader(Protocol):
    """Who reads the hidden states that a model hands out."""

    def read(self, batch: StepBatch) -> None:
        """A step was computed; its states are where the model's taps are."""
        ...


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was launched: what it draws, and the way on which that comes to the host."""

    drawn: Drawn | None
    back: OnItsWay


class TorchModel:
    """As `asyncengine.step.model.Model` and `LaunchingModel`, over a transformers model.

    Args:
        model: The model; with a program it has given its weights up.
        layers: Its KV cache.
        sampler: Draws from its logits.
        device: Where all of that is.
        program: Runs whole steps in the model's place.
        last: Keeps the tokens that are drawn on the device, so that steps can be launched; None if they never are.

    Attributes:
        capturing: What is captured of its steps, if anything is.
        companion: What sleeps, wakes and goes with it.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: PagedLayers,
        sampler: Sampler,
        device: torch.device,
        program: CompiledDecoder | None = None,
        last: LastTokens | None = None,
    ) -> None:
        self._model: nn.Module | None = model
        self._layers = layers
        self._sampler = sampler
        self._device = device
        self._program = program
        if program is not None:
            program.bind(layers.caches)
        self._adapters: CompiledAdapters | AdaptedModules | None = None
        self._some_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.capturing: Capturing | None = None
        self._fused: FusedDecoder | None = None
        self._media: MediaEncoder | None = None
        self._inputs = StepInputs(device, last=last)
        self._last = last
        self._back = None if last is None else WayBack(device)
        self.companion: Companion | None = None
        self._taps: Taps | None = None
        self._updated = False
        self._reader: Reader | None = None

    def place(self, slot: int, params: SamplingParams, branch: int, prompt: Int32, output: Int32) -> None:
        """As the protocol says."""
        self._sampler.place(slot, params, branch, prompt, output)

    def execute(self, batch: StepBatch) -> StepTokens:
        """As the protocol says."""
        with torch.inference_mode():
            drawn = self._executed(batch)
        if self._reader is not None:
            self._reader.read(batch)
        return drawn

    def _executed(self, batch: StepBatch) -> StepTokens:
        if len(batch.pool_spans):
            return self._pooling(batch)
        if not len(batch.score_index):
            return self._draw(batch, self.logits(batch))
        # Further rows of logits, after those that are drawn from.
        rows = np.append(batch.sample_index, batch.score_index)
        return self._draw(batch, self.logits(dataclasses.replace(batch, sample_index=rows)))

    def launch(self, batch: StepBatch) -> Flight:
        """As the protocol says: nothing here waits for the device."""
        assert self._last is not None and self._back is not None
        with torch.inference_mode():
            ran = self._queue(batch)
            slots, positions = batch.sample_slots, batch.sample_positions
            if not len(batch.sample_index):
                return Flight(None, self._back.send(()))
            if ran.tokens is not None:
                drawn = self._sampler.drawn(ran.tokens, slots, positions)
            else:
                drawn = self._sampler.draw(ran.logits, slots, positions, follows=False)
                self._last.store(ran.slots, drawn.tokens)
            return Flight(drawn, self._back.send(drawn.tensors))

    def collect(self, flight: Flight) -> StepTokens:
        """As the protocol says."""
        tensors = flight.back.wait()
        if flight.drawn is None:
            return StepTokens(NO_TOKENS)
        return self._sampler.finish(flight.drawn, tensors)

    def _queue(self, batch: StepBatch) -> Ran:
        """Runs the model on a batch whose tokens the host need not know, and draws where nothing but that is needed."""
        assert self._last is not None
        if self._program is not None:
            batch = self._last.known(batch)
            return Ran(self.logits(batch), torch.from_numpy(batch.sample_slots))
        if (replayed := self._replayed(batch, self._sampler)) is not None:
            return replayed
        kind, settings = None, None
        slots, positions = batch.sample_slots, batch.sample_positions
        if self._inputs.packed and len(slots):
            kind = self._sampler.kind(slots, positions)
            settings = self._sampler.settings(kind, slots, positions, len(slots))
        logits = self._send_and_run(batch, self.forward, settings)
        if kind is None:
            return Ran(logits, self._inputs.sample_slots)
        tokens = token_draw.draw(kind, logits, argmax(logits), DrawSettings.of(self._inputs.sent))
        self._last.store(self._inputs.sample_slots, tokens)
        return Ran(logits, self._inputs.sample_slots, tokens)

    def _send_and_run(
        self,
        batch: StepBatch,
        run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        others: Mapping[str, NDArray[Any]] | None = None,
    ) -> torch.Tensor:
        """Sends a step, and whatever else goes with it, and launches the model."""

        def carry(sections: Mapping[str, NDArray[Any]]) -> dict[str, torch.Tensor] | None:
            return self.begin_with(batch, sections)[1]

        sections, states, tokens = dict(others or {}), self.states, len(batch.token_ids)
        if states is not None:
            assert batch.slots is not None
            sections["states"] = batch.slots[: batch.num_decodes]
        adapters, by_token = self._adapters, False
        if batch.adapters is not None:
            assert isinstance(adapters, AdaptedModules)
            if by_token := adapters.by_token(tokens):
                sections["adapters"] = places_of(batch, tokens)
            else:
                sections["adapted"], groups = groups_of(batch)
        inputs = self._inputs.send(batch, sections, carry)
        sent = self._inputs.sent
        if states is not None:
            states.places = sent["states"].long()
        around: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if batch.adapters is not None:
            assert isinstance(adapters, AdaptedModules)
            if by_token:
                around = adapters.looked_up(sent["adapters"])
            else:
                around = adapters.applied(groups, sent["adapted"].long(), tokens)
        with around:
            logits = run(*inputs)
        self._layers.end()
        return logits

    def _draw(self, batch: StepBatch, logits: torch.Tensor) -> StepTokens:
        """Tokens and scores from logits, those that are drawn from first."""
        drawn, scores = len(batch.sample_index), []
        if len(batch.score_index):
            scores = token_logprobs.scores(logits[drawn:], batch.score_token_ids, batch.score_tops)
        if not drawn:
            return StepTokens(NO_TOKENS, scores=scores)
        if batch.draft_lengths is None:
            tokens = self._sampler.sample(logits[:drawn], batch.sample_slots, batch.sample_positions)
        else:
            tokens = verified_draw.draw(self._sampler, logits[:drawn], batch)
            if self.states is not None:
                assert tokens.taken is not None
                self.states.take(tokens.taken)
        return dataclasses.replace(tokens, scores=scores) if scores else tokens

    def _pooling(self, batch: StepBatch) -> StepTokens:
        """A step in which hidden states are summed: what else is in it is done as ever, with the logits at hand."""
        rows = np.append(batch.sample_index, batch.score_index)
        step = dataclasses.replace(batch, sample_index=rows)
        if self._program is not None:
            logits, pooled = self._program.run(step, self.begin(batch), self._seen(batch))
        else:
            with hidden_states(self._model) as hidden:
                logits = self._send_and_run(step, self._seeing(batch) if batch.media else self._forward)
            pooled = summed(hidden, batch.pool_spans)
        return dataclasses.replace(self._draw(batch, logits), pooled=pooled)

    def logits(self, batch: StepBatch) -> torch.Tensor:
        """Runs the model; returns (M, vocabulary), one row per entry of `batch.sample_index`."""
        if batch.media:
            if self._program is not None:
                return self._program.logits(batch, self.begin(batch), self._seen(batch))
            return self._send_and_run(batch, self._seeing(batch))
        if (replayed := self._replayed(batch)) is not None:
            return replayed.logits
        if self._program is not None:
            return self._program.logits(batch, self.begin(batch))
        return self._send_and_run(batch, self.forward)

    def _seen(self, batch: StepBatch) -> Seen | None:
        """What a step has of images, audio and videos, for the program."""
        if not batch.media:
            return None
        assert self._media is not None
        assert self._program is not None
        return self._media.seen(batch, self._program)

    def _seeing(self, batch: StepBatch) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        """As `_forward`, of a step with images, audio or videos."""
        assert self._media is not None
        axes, more = self._media.arguments(batch)
        around = self._media.at_the_door(batch)

        def forward(ids: torch.Tensor, positions: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            with around:
                return self._forward(ids, positions if axes is None else axes, index, **more)

        return forward

    def _replayed(self, batch: StepBatch, sampler: Sampler | None = None) -> Ran | None:
        """Replays a step that was captured, if there is one."""
        ran = None if self.capturing is None else self.capturing.run(batch, sampler)
        if ran is not None:
            self._layers.end()
        return ran

    @property
    def states(self) -> States | None:
        """Of its recurrent layers, if it has some."""
        return self._layers.states

    def copy_blocks(self, copies: Int64) -> None:
        """Copies whole blocks of the KV cache: (C, 2) of source and destination."""
        self._layers.copy_blocks(copies)

    def begin(self, batch: StepBatch) -> Any:
        """Prepares a step and returns the attention's plan."""
        return self._layers.begin(batch)

    def begin_with(
        self, batch: StepBatch, sections: Mapping[str, NDArray[Any]], captured: bool = False, mixed: bool = False
    ) -> tuple[Any, dict[str, torch.Tensor] | None]:
        """As `PagedLayers.begin_with`."""
        return self._layers.begin_with(batch, sections, captured, mixed)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Runs the model: (1, tokens) ids and positions, (M,) rows of logits that are wanted; (M, vocabulary)."""
        adapted = isinstance(self._adapters, AdaptedModules) and self._adapters.active
        if self._fused is not None and not adapted and self._fused.serves(ids.shape[1]):
            return self._fused.forward(ids, positions, index)
        return self._forward(ids, positions, index)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, index: torch.Tensor, **more: Any) -> torch.Tensor:
        """As `forward`, by the model's own modules."""
        assert self._model is not None
        if self._some_logits:
            output = self._model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=index, **more)
            logits: torch.Tensor = output.logits[0]
            return logits
        output = self._model(input_ids=ids, position_ids=positions, use_cache=False, **more)
        logits = output.logits[0, index]
        return logits

    def use_graphs(self, capturing: Capturing) -> None:
        """Replays steps that are captured, from now on. They are captured from this model."""
        self.capturing = capturing

    def use_adapters(self, adapters: CompiledAdapters | AdaptedModules) -> None:
        """Computes steps with adapters, from now on."""
        self._adapters = adapters

    def use_media(self, media: MediaEncoder) -> None:
        """Computes steps with images, audio and videos, from now on."""
        self._media = media

    def use_fused(self, fused: FusedDecoder) -> None:
        """Runs steps of the sizes that it serves through the model's fused kernels, from now on."""
        self._fused = fused
        fused.taps = self._taps

    @property
    def compiled(self) -> bool:
        """Whether a program runs its steps."""
        return self._program is not None

    def use_taps(self, taps: Taps, reader: Reader) -> None:
        """Hands out hidden states from now on. Set before anything is captured, and before fused kernels are used."""
        self._taps, self._reader = taps, reader
        if self._program is not None:
            self._program.taps = taps
        else:
            assert self._model is not None
            tap_modules(self._model, self._layers.first_layer, taps)

    def device_lost(self, error: BaseException) -> bool:
        """As `asyncengine.model.lost_device.is_lost`; that of an image, audio or video is what it came from."""
        if isinstance(error, MediaFailure) and error.__cause__ is not None:
            error = error.__cause__
        return is_lost(self._device, error)

    def sleep(self) -> None:
        """Frees the KV cache; on CUDA the weights wait in host memory."""
        assert self._model is not None
        if self.companion is not None:
            self.companion.sleep()
        if self.capturing is not None:
            self.capturing.clear()
        if self._media is not None:
            self._media.clear()
        self._layers.free()
        if self._device.type == "cuda":
            self._model.to("cpu")
            if self._adapters is not None:
                self._adapters.move(torch.device("cpu"))
            if self._fused is not None:
                self._fused.move(torch.device("cpu"))
        memory.give_back()

    def wake(self) -> None:
        """Undoes `sleep`."""
        assert self._model is not None
        if self._device.type == "cuda":
            self._model.to(self._device)
            if self._adapters is not None:
                self._adapters.move(self._device)
        if self._fused is not None:
            self._fused.move(self._device)
        self._layers.allocate()
        if self._program is not None:
            self._program.bind(self._layers.caches)
        if self.capturing is not None:
            self.capturing.begin()
        if self.companion is not None:
            self.companion.wake()

    def put_adapter(self, index: int, prepared: Any) -> None:
        """As the protocol says; what was there before stays if there is no memory for it."""
        assert self._adapters is not None
        try:
            self._adapters.put(index, prepared)
        except torch.OutOfMemoryError as error:
            raise InsufficientMemoryError(f"there is no memory for the adapter: {error}") from error
        if self.capturing is not None:
            self.capturing.adapters_changed()

    def remove_adapter(self, index: int) -> None:
        """As the protocol says."""
        assert self._adapters is not None
        self._adapters.remove(index)
        if self.capturing is not None:
            self.capturing.adapters_changed()

    def update_weights(self, weights: Mapping[str, Any]) -> None:
        """As the protocol says. The old values are kept until all new ones are in place."""
        assert self._model is not None
        writers = new_values.writers(self._model) if self._program is None else self._program.writers()
        if self._media is not None:
            self._media.clear()
        replace_weights(self._model, weights, writers, new_values.taken_for(self._model))
        self._updated = True

    def kept_blocks(self) -> KeptBlocks:
        """What keeps the keys and values of its prefix cache."""
        return KeptBlocks(self._layers, lambda: self._updated)

    def debug_call(self, name: str, args: tuple[Any, ...]) -> list[Any]:
        """Calls ``package.module:function`` with the transformers model first, or a debug function of this module.

        Where none was needed to load, one is made for it, without weights.
        """
        assert self._model is not None
        model = self._model.transformed() if isinstance(self._model, Skeleton) else self._model
        return [debug_function(name)(model, *args)]

    def close(self) -> None:
        """Lets weights and KV cache go and returns their memory."""
        companion, self.companion = self.companion, None
        if companion is not None:
            companion.close()
        if self._model is None:
            return
        if self.capturing is not None:
            self.capturing.clear()
            self.capturing = None
        self._fused = self._media = self._reader = self._taps = None
        self._layers.free()
        take_apart(self._model)
        self._model = None
        self._layers = None  # type: ignore[assignment]
        self._sampler = None  # type: ignore[assignment]
        self._program = None
        self._adapters = None
        memory.give_back()
