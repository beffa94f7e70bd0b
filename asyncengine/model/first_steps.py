"""What a model that was just loaded does before it serves: it is warmed up, measured, and the first of its steps are
captured. On the loader's thread.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from asyncengine.model import memory
from asyncengine.model.capacity import Fitted, all_in_place, graphs_of, state_scratch
from asyncengine.step.batch import StepBatch
from asyncengine.step.limits import Limits

if TYPE_CHECKING:
    from asyncengine.model.capturing import Room
    from asyncengine.model.fused.choice import Choice
    from asyncengine.model.graphs import StepGraphs

_SOME_TOKENS, _MANY_TOKENS = 64, 2048
"""Of a prompt that is neither short nor long to a device, and of one that is long."""


def captured(fitted: Fitted, model: Any, last: Any = None, adapting: Any = None) -> tuple[str, ...]:
    """Warms a model up and captures the first of its steps.

    Args:
        fitted: The model, as it was built.
        model: It as it runs, an `asyncengine.model.runner.TorchModel`.
        last: Has the tokens that the host does not know; None if it knows all.
        adapting: Computes with adapters; None if no steps with them are to be captured.

    Returns:
        What is slower than it could be, in words.
    """
    from asyncengine.model.attention.protocol import CarryingBackend
    from asyncengine.model.buckets import Buckets
    from asyncengine.model.capturing import Capturing
    from asyncengine.model.fused import choice
    from asyncengine.model.graphs import graphs_for

    config, details, limits, fused = fitted.config, fitted.details, fitted.limits, fitted.built.fused
    device, sequences = details.device, limits.max_num_sequence
    measures = fused is not None and config.decoder_backend == "auto"
    if fused is not None:
        model.use_fused(fused)
        if measures:  # not before it has been measured
            fused.rest()
    prompt = _SOME_TOKENS if device.type != "cpu" else 2 if fitted.built.program is None else 1
    _warm_up(model, limits, prompt, details.vocab_size)
    graphs, slower = graphs_for(model, fitted.backend, sequences, device, last, _waits(fitted), model.states)
    measured = None
    if measures:
        measured = choice.Choice(fused, choice.cuda_seconds(device), graphs)
        _choose_launched(model, measured, graphs, limits, device, details.vocab_size)
    if graphs is None:
        return slower if measured is None else (*measured.notes, *slower)
    mixed = None
    if isinstance(fitted.backend, CarryingBackend) and model.states is None:  # prompts are cut in ways of their own
        mixed = graphs.mixed(Buckets.mixed(limits.prefill_chunk_size + sequences), sequences)
    capturing = Capturing(
        graphs,
        measured,
        mixed=mixed,
        adapted=None if adapting is None else graphs.adapted(Buckets.doubling(sequences), adapting),
        seconds=choice.cuda_seconds(device, rounds=3, replays=3),
        at_once=config.graph_capture == "load",
        room=_room(fitted, adapting is not None and bool(config.adapters)),  # those that come later take what is left
    )
    capturing.begin()
    model.use_graphs(capturing)
    return slower


def _waits(fitted: Fitted) -> str | None:
    """Why a step of the model cannot be captured, if that is known."""
    if fitted.details.device.type != "cuda":
        return None
    from asyncengine.model import architecture

    return architecture.waits(fitted.built.model)


def _room(fitted: Fitted, adapters: bool) -> Room | None:
    """The memory that captures may take, of steps with adapters too or not; None if nobody counts it."""
    from asyncengine.model.capturing import Room

    details, layers, sequences = fitted.details, fitted.built.layers, fitted.limits.max_num_sequence
    if details.device.type != "cuda":
        return None
    specs = [layer.spec for layer in layers.attention]
    reserve = graphs_of(fitted.config, details, fitted.backend, sequences, specs, adapters)
    recurrent = [layer.spec for layer in layers.recurrent]
    reserve += state_scratch(recurrent, details.dtype, sequences, all_in_place(fitted.built))
    return Room(reserve.nbytes, functools.partial(memory.unheld_bytes, details.device))


def _choose_launched(
    model: Any, choice: Choice, graphs: StepGraphs | None, limits: Limits, device: torch.device, vocab_size: int
) -> None:
    """Has the choice measure, by steps that are launched, what it cannot measure by captured ones."""
    from asyncengine.model.fused.choice import cuda_seconds
    from asyncengine.model.fused.tiles import MOST_TOKENS, SOME_TOKENS

    longest = _longest_piece(limits)
    sorts: list[tuple[Sequence[int], int]] = []
    if graphs is None:
        sorts += [((1,), 1), (range(2, MOST_TOKENS + 1), MOST_TOKENS)]
    some_captured = graphs is not None and any(size > MOST_TOKENS and choice.is_open(size) for size in graphs.sizes)
    if longest > MOST_TOKENS and not some_captured:
        sorts.append(((SOME_TOKENS,), _SOME_TOKENS))
    if longest > SOME_TOKENS:  # else those of more tokens are run as those are
        sorts.append(((SOME_TOKENS + 1,), _MANY_TOKENS))
    for counts, tokens in sorts:
        tokens = min(tokens, longest)
        prefill = _prefill(tokens, limits.page_size, vocab_size)
        step = dataclasses.replace(prefill, sample_index=np.array([tokens - 1]))
        # The first run makes whatever is made on first use. A step of many tokens takes so long that two tell enough.
        seconds = cuda_seconds(device, rounds=2 if tokens == _MANY_TOKENS else 7, replays=1)
        with torch.inference_mode():
            choice.decide_launched(counts, tokens, functools.partial(model.logits, step), seconds)


def _warm_up(model: Any, limits: Limits, prompt: int, vocab_size: int) -> None:
    """Runs a prefill and a decode, so that whatever is built on first use is built before the model serves.

    For that a device wants some tokens; on the CPU nothing depends on how many there are. A compiled step has been run
    by the trial, and its prefill and decode are one code: a single token shows that it runs over this cache.
    """
    for count in {min(prompt, _longest_piece(limits)), 1}:
        model.execute(_prefill(count, limits.page_size, vocab_size))


def _longest_piece(limits: Limits) -> int:
    """Tokens of one prompt that a step can have."""
    return min(limits.prefill_chunk_size, limits.max_single_sequence_length, limits.num_blocks * limits.page_size)


def _prefill(count: int, page_size: int, vocab_size: int) -> StepBatch:
    """A step of so many tokens of one prompt, or of one that decodes. A token that there is not would lose a device."""
    positions = np.arange(count, dtype=np.int32)
    return StepBatch(
        token_ids=positions % min(16, vocab_size),
        positions=positions,
        query_start=np.array([0, count], dtype=np.int32),
        context_lens=np.zeros(1, dtype=np.int32),
        block_tables=np.arange(-(-count // page_size), dtype=np.int32)[None],
        slot_mapping=positions.astype(np.int64),
        sample_index=np.empty(0, dtype=np.int64),
        sample_slots=np.empty(0, dtype=np.int64),
        sample_positions=np.empty(0, dtype=np.int64),
        copies=np.empty((0, 2), dtype=np.int64),
        num_decodes=int(count == 1),
        slots=np.zeros(1, dtype=np.int64),
    )
