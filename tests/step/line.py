"""A scheduler without a model, on counted blocks: the test is whoever draws the next token."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from asyncengine.instructions import NewRequest
from asyncengine.outputs import Pooling
from asyncengine.step.batch import Int32
from asyncengine.step.limits import Limits
from asyncengine.step.plan import Plan
from asyncengine.step.scheduler import Scheduler
from asyncengine.step.sequence import Request, Sequence, SequenceState

from .core_case import Box, params, prompt_of


def limits(**changes: Any) -> Limits:
    values: dict[str, Any] = {
        "max_num_sequence": 8,
        "max_single_sequence_length": 64,
        "prefill_chunk_size": 16,
        "page_size": 4,
        "num_blocks": 32,
    }
    return Limits(**(values | changes))


class Line:
    """A scheduler and requests that generate letters until they are ended."""

    def __init__(self, **changes: Any) -> None:
        self.placed: list[tuple[Sequence, list[int]]] = []
        self.refused: set[int] = set()
        self.scheduler = Scheduler(limits(**changes), self.place)
        self.arrivals = itertools.count(1)
        self.requests: list[Request] = []

    def place(self, sequence: Sequence, tokens: Int32) -> None:
        if sequence.branch in self.refused:
            raise ValueError(f"not branch {sequence.branch}")
        self.placed.append((sequence, tokens.tolist()))

    def add(
        self,
        prompt: str,
        n: int = 1,
        priority: int = 0,
        pooling: Pooling | None = None,
        second: int | None = None,
        **changes: Any,
    ) -> Request:
        arrival = next(self.arrivals)
        new = NewRequest(
            arrival, f"r{arrival}", prompt_of(prompt), params(n=n, **changes), priority, pooling=pooling, second=second
        )
        request = Request(new, Box(), arrival, 0.0)
        request.branches = [Sequence(request, branch) for branch in range(n)]
        self.requests.append(request)
        self.scheduler.add(request.branches[0])
        return request

    def schedule(self) -> Plan:
        plan = self.scheduler.schedule()
        assert plan is not None
        self.check(plan)
        return plan

    def finish(self, plan: Plan, token: int = 65, taken: list[int] | None = None) -> None:
        """What happens once the model has drawn; with drafts, `taken` of each row's tokens count."""
        scheduler = self.scheduler
        scheduler.advance(plan)
        scheduler.settle(plan, None if plan.drafts is None else np.array(taken))
        if plan.drafts is not None:
            assert taken is not None
            for sequence, count in zip(plan.decodes, taken, strict=True):
                scheduler.take(sequence, [token] * count)
        elif plan.decodes:
            scheduler.slots.append_tokens(plan.decode_slots, np.full(len(plan.decodes), token, dtype=np.int32))
        for chunk in plan.chunks:
            if chunk.last:
                trunk = chunk.sequence
                scheduler.residents.decode(trunk)
                scheduler.slots.append_tokens(np.array([trunk.slot]), prompt_of([token]))
                for index, branch in enumerate(chunk.branches[1:], 1):
                    scheduler.fork(trunk, branch, token + index)
                for branch in trunk.request.branches:
                    if branch.state is SequenceState.UNBORN:
                        scheduler.add(branch)
        scheduler.check()

    def step(self, steps: int | list[int] = 1) -> Plan:
        """So many steps, or one with drafts of which so many of each row's tokens count."""
        for _ in range(steps if isinstance(steps, int) else 1):
            plan = self.schedule()
            self.finish(plan, taken=steps if isinstance(steps, list) else None)
        return plan

    def end(self, request: Request) -> None:
        for branch in request.branches:
            if branch.state is not SequenceState.ENDED:
                self.scheduler.end(branch)
        self.scheduler.check()

    def check(self, plan: Plan) -> None:
        batch, pool = plan.batch, self.scheduler.blocks.pool
        rows = len(batch.context_lens)
        assert rows == len(plan.decodes) + len(plan.chunks) == len(batch.query_start) - 1
        assert batch.num_decodes == len(plan.decodes)
        assert len(batch.token_ids) == len(batch.positions) == len(batch.slot_mapping) == batch.query_start[-1]
        assert len(set(batch.slot_mapping.tolist())) == len(batch.slot_mapping)
        written = batch.slot_mapping // self.scheduler.limits.page_size
        assert (pool._refs[written] == 1).all(), "a block that is shared is written to"
        limits = self.scheduler.limits
        alone = limits.whole_prompts and len(plan.chunks) == 1
        assert alone or sum(chunk.count for chunk in plan.chunks) <= limits.prefill_chunk_size
        if self.scheduler.limits.kept_states is None:
            assert batch.slots is None and not len(batch.state_copies) and not len(batch.state_saves)
        else:
            chunks = [chunk.sequence.slot for chunk in plan.chunks]
            assert batch.slots is not None and batch.slots.tolist() == [*plan.decode_slots.tolist(), *chunks]
        slots, page_size = self.scheduler.slots, self.scheduler.limits.page_size
        if plan.drafts is not None:
            return
        for row, sequence in enumerate(plan.decodes):  # the columns that were moved on say what the table says
            slot, position = sequence.slot, int(slots.num_computed[sequence.slot])
            assert (plan.decode_slots[row], batch.sample_slots[row]) == (slot, slot)
            assert batch.token_ids[row] == slots.tokens[slot, position]
            assert batch.positions[row] == batch.context_lens[row] == position
            blocks = slots.block_table(slot)
            assert batch.block_tables[row, : len(blocks)].tolist() == blocks.tolist()
            assert batch.slot_mapping[row] == blocks[position // page_size] * page_size + position % page_size
            assert batch.sample_positions[row] == position + 1 - len(sequence.request.new.prompt)
