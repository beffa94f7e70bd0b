"""A `Core` on a scripted model, driven by hand: jobs, the clock and the mailbox are plain objects of the test."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from asyncengine import instructions as ins
from asyncengine.config import EngineConfig
from asyncengine.errors import AsyncEngineError
from asyncengine.events import BranchEnded, BranchKey, Event, Reply, RequestEnded, Tokens
from asyncengine.generation import SamplingParams
from asyncengine.instructions import Deadlines, Instruction, JobDone, NewRequest, ReplyTo
from asyncengine.outputs import FinishReason, Usage
from asyncengine.state import EngineState
from asyncengine.step.adapters import NO_SPACE
from asyncengine.step.core import Core
from asyncengine.step.sequence import SequenceState
from asyncengine.testing import ByteTokenizer, Script, ScriptedLoader, ScriptedModel, echo
from asyncengine.testing.media import are_of_one_item

EOS = ByteTokenizer.eos_token_id


def params(**changes: Any) -> SamplingParams:
    values: dict[str, Any] = {
        "n": 1,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "num_logprobs": -1,
        "logprobs_mode": "raw",
        "logit_bias": (),
        "max_tokens": 1000,
        "min_tokens": 0,
        "seed": 0,
        "stop_strs": (),
        "stop_token_ids": (EOS,),
        "skip_special_tokens": True,
        "detokenize": True,
    }
    return SamplingParams(**(values | changes))


def config(model: str = "scripted", **changes: Any) -> EngineConfig:
    values: dict[str, Any] = {
        "max_num_sequence": 8,
        "max_single_sequence_length": 64,
        "max_total_sequence_length": 128,
        "prefill_chunk_size": 16,
        "kv_cache_page_size": 4,
    }
    return EngineConfig(model, **(values | changes))


def prompt_of(tokens: Sequence[int] | str) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(list(tokens.encode()) if isinstance(tokens, str) else list(tokens), dtype=np.int32)


class Box:
    """A mailbox that keeps what it gets, and notices what must never happen."""

    def __init__(self) -> None:
        self.open = True
        self.tokens: dict[BranchKey, list[int]] = {}
        self.logprobs: dict[BranchKey, list[Any]] = {}
        self.branch_ends: dict[BranchKey, BranchEnded] = {}
        self.ends: dict[int, RequestEnded] = {}
        self.replies: dict[int, Reply] = {}
        self.log: list[Event] = []

    def post(self, events: list[Event]) -> bool:
        for event in events:
            self.log.append(event)
            match event:
                case Tokens():
                    assert len(event.keys) == len(event.token_ids)
                    assert event.logprobs is None or len(event.logprobs) == len(event.keys)
                    for row, (key, token_id) in enumerate(zip(event.keys, event.token_ids, strict=True)):
                        assert key not in self.branch_ends, f"a token for {key} after its end"
                        self.tokens.setdefault(key, []).append(token_id)
                        if event.logprobs is not None:
                            self.logprobs.setdefault(key, []).append(event.logprobs[row])
                case BranchEnded():
                    assert event.key not in self.branch_ends, f"{event.key} ended twice"
                    assert event.key[0] not in self.ends
                    self.branch_ends[event.key] = event
                case RequestEnded():
                    assert event.number not in self.ends, f"request {event.number} ended twice"
                    self.ends[event.number] = event
                    keys = [key for key in self.branch_ends if key[0] == event.number]
                    assert sorted(key[1] for key in keys) == list(range(len(keys))) != []
                    delivered = sum(len(self.tokens.get(key, ())) for key in keys)
                    assert event.usage.completion_tokens == delivered, f"{event.usage}, delivered {delivered}"
                case Reply():
                    assert event.ticket not in self.replies, f"ticket {event.ticket} was answered twice"
                    self.replies[event.ticket] = event
        return self.open


@dataclass
class Case:
    """One core and everything around it."""

    loader: ScriptedLoader
    now: float = 100.0
    box: Box = field(default_factory=Box)
    jobs: list[tuple[int, Callable[[], Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.core = Core(self.loader, lambda job, function: self.jobs.append((job, function)), clock=lambda: self.now)
        self.tickets = itertools.count()
        self.numbers = itertools.count(1)

    # Giving instructions

    def reply_to(self) -> ReplyTo:
        return ReplyTo(self.box, next(self.tickets))

    def give(self, *instructions: Instruction) -> None:
        self.core.handle(instructions)
        self.flush()

    def call(self, make: Callable[[ReplyTo], Instruction]) -> int:
        """Gives an instruction; returns its ticket."""
        to = self.reply_to()
        self.give(make(to))
        return to.ticket

    def ask(self, make: Callable[[ReplyTo], Instruction]) -> Any:
        """Gives an instruction that is answered at once; returns the answer or raises it."""
        return self.answer(self.call(make))

    def answered(self, ticket: int) -> bool:
        return ticket in self.box.replies

    def answer(self, ticket: int) -> Any:
        reply = self.box.replies[ticket]
        if reply.error is not None:
            raise reply.error
        return reply.value

    def error(self, ticket: int) -> BaseException:
        error = self.box.replies[ticket].error
        assert error is not None
        return error

    def new(
        self,
        prompt: Sequence[int] | str,
        *,
        request_id: str | None = None,
        priority: int = 0,
        deadlines: Deadlines | None = None,
        pin: str | None = None,
        arriving: bool = False,
        adapter: str | None = None,
        **changes: Any,
    ) -> NewRequest:
        number = next(self.numbers)
        name = f"r{number}" if request_id is None else request_id
        prompt = prompt_of(prompt)
        return NewRequest(number, name, prompt, params(**changes), priority, deadlines, pin, arriving, adapter=adapter)

    def adding(
        self, *new: NewRequest, when_full: ins.WhenFull = "wait", to: ReplyTo | None = None, epoch: int | None = None
    ) -> ins.AddRequests:
        if epoch is None:
            epoch = -1 if self.core.view is None else self.core.view.epoch
        return ins.AddRequests(new, epoch, self.box, to, when_full)

    def add(self, prompt: Sequence[int] | str, **changes: Any) -> int:
        """Adds a request; returns its number."""
        new = self.new(prompt, **changes)
        assert self.ask(lambda to: self.adding(new, to=to)) is True
        return new.number

    def open(self, **changes: Any) -> int:
        """Adds a request whose prompt comes in pieces; returns its number."""
        return self.add("", arriving=True, **changes)

    def piece(self, number: int, tokens: str, *, keep: int | None = None, last: bool = False) -> None:
        """Gives a request the next piece of its prompt."""
        request = self.core.requests._requests.get(number)
        before = 0 if request is None else request.prompt_tokens
        self.give(ins.ExtendPrompt(number, before if keep is None else keep, prompt_of(tokens), last))

    def abort(self, *numbers: int) -> None:
        self.ask(lambda to: ins.AbortRequests(numbers, (), to))

    def shutdown(self, drain: float = 0.0) -> int:
        return self.call(lambda to: ins.Shutdown(drain, to))

    # Time

    def run_job(self, error: BaseException | None = None) -> None:
        """Lets the oldest job end."""
        job, function = self.jobs.pop(0)
        value = None
        if error is None:
            try:
                value = function()
            except Exception as raised:
                error = raised
        self.give(JobDone(job, value, error))

    def run_jobs(self) -> None:
        while self.jobs:
            self.run_job()

    def load(self, model: str = "scripted", in_flight: ins.InFlight = "abort", **changes: Any) -> Any:
        """Reloads, all the way; returns the answer or raises it."""
        ticket = self.call(lambda to: ins.Reload(config(model, **changes), in_flight, to))
        self.run_jobs()
        if not self.answered(ticket):
            self.step()
            self.run_jobs()
        return self.answer(ticket)

    def step(self, steps: int = 1, pending: Iterable[Instruction] = ()) -> None:
        """Steps; `pending` arrives while the first of them is executed."""
        waiting = list(pending)

        def drain() -> list[Instruction]:
            taken = waiting[:]
            waiting.clear()
            return taken

        for _ in range(steps):
            self.core.handle(())
            self.core.step(drain)
            self.flush()
            self.check()
        if waiting:
            self.give(*waiting)

    def run(self, at_most: int = 500) -> int:
        """Steps until there is nothing to do; returns how often."""
        steps = 0
        while self.core.runnable:
            steps += 1
            assert steps <= at_most, "it does not come to an end"
            self.step()
        return steps

    def flush(self) -> None:
        for box in self.core.outbox.flush():
            self.core.requests.abort_mailbox(box)
            self.core.outbox.flush()

    # Looking

    @property
    def state(self) -> EngineState:
        return self.core.state

    @property
    def model(self) -> ScriptedModel:
        return self.loader.model

    @property
    def pool(self) -> Any:
        assert self.core.scheduler is not None
        return self.core.scheduler.blocks.pool

    def tokens(self, number: int, branch: int = 0) -> list[int]:
        return self.box.tokens.get((number, branch), [])

    def text(self, number: int, branch: int = 0) -> str:
        return bytes(token for token in self.tokens(number, branch) if token < 256).decode()

    def reason(self, number: int, branch: int = 0) -> FinishReason | None:
        end = self.box.branch_ends.get((number, branch))
        return None if end is None else end.finish_reason

    def stop_reason(self, number: int, branch: int = 0) -> int | str | None:
        return self.box.branch_ends[number, branch].stop_reason

    def ended(self, number: int) -> bool:
        return number in self.box.ends

    def usage(self, number: int) -> Usage:
        return self.box.ends[number].usage

    def end_error(self, number: int) -> AsyncEngineError:
        error = self.box.ends[number].error
        assert isinstance(error, AsyncEngineError)
        return error

    def check(self) -> None:
        """Every account of the core, counted anew."""
        core, requests = self.core, self.core.requests
        assert len(requests._numbers) == len(requests)
        assert set(requests._numbers.values()) == {*requests._requests, *requests._queued}
        fresh = sum(request.started_at is None for request in requests._requests.values())
        assert requests._waiting_new == fresh, f"{requests._waiting_new} counted as not begun, {fresh} are"
        if not core.reloading.busy:
            assert not core._held and not core._cancelled
        scheduler = core.scheduler
        if scheduler is None:
            return
        scheduler.check()
        assert not scheduler.dropped
        running = scheduler.running()
        of_running, of_waiting = {*map(id, running)}, {*map(id, scheduler.waiting)}
        slots = [*(s.slot for s in running)]
        for request in requests._requests.values():
            assert any(b.state is not SequenceState.ENDED for b in request.branches)
            for branch in request.branches:
                if branch.state is SequenceState.UNBORN and branch.slot >= 0:
                    kept = request.search is not None or request.branches[0].state is SequenceState.PREFILL
                    assert kept, "a slot is kept for nothing"
                    slots.append(branch.slot)
                if branch.state is SequenceState.WAITING:
                    assert id(branch) in of_waiting and branch.slot == -1
                if branch.state is SequenceState.HELD:
                    assert request.arriving is not None and id(branch) not in of_waiting and branch.slot == -1
                assert branch.resident == (id(branch) in of_running)
                assert branch.state is not SequenceState.ENDED or branch.slot == -1
        owned = {id(branch) for request in requests._requests.values() for branch in request.branches}
        assert of_running | of_waiting <= owned
        assert sorted([*slots, *scheduler.slots._free]) == list(range(scheduler.limits.max_num_sequence))
        assert set(scheduler.slots.more_stop_ids) <= set(slots)
        # Who holds each block?
        pool, tree = scheduler.blocks.pool, scheduler.blocks.tree
        refs, in_tree = [0] * pool.num_blocks, [0] * pool.num_blocks
        for sequence in running:
            table = scheduler.slots.block_table(sequence.slot).tolist()
            assert len(set(table)) == len(table)
            for block in table:
                refs[block] += 1
        for _, blocks in tree._pins.values():
            for block in blocks.tolist():
                refs[block] += 1
        stamps = {NO_SPACE: 0} | {adapter.space: adapter.prepared.stamp for adapter in requests.adapters}
        assert set(tree._roots) <= set(stamps), "something is left of an adapter that is gone"
        stack: list[tuple[Any, int, tuple[int, ...]]] = [
            (node, stamps[space], ()) for space, root in tree._roots.items() for node in root.children.values()
        ]
        assert core.loaded is not None
        model: Any = core.loaded.model
        cache = model._cache.reshape(pool.num_blocks, -1)
        seen: dict[int, set[int]] = {}  # pieces of images by what stands for them
        while stack:
            node, stamp, before = stack.pop()
            of_node = node.blocks.tolist()
            for block in of_node:
                in_tree[block] += 1
            known = node.tokens.astype(np.int64) + stamp * (1 << 32)
            if not model.asleep:
                there, of_images = cache[node.blocks].ravel(), node.tokens < 0
                if of_images.any():  # the tree has what stands for an image, the cache what is seen
                    known[of_images] = there[of_images]
                    for token_id, piece in zip(node.tokens[of_images].tolist(), there[of_images].tolist(), strict=True):
                        seen.setdefault(token_id, set()).add(piece - stamp * (1 << 32))
                assert there.tolist() == known.tolist(), "not what is known"
            after = tuple(known.tolist())
            if node.children:
                path = before + after
                stack += [(child, stamp, path) for child in node.children.values()]
            self.check_states(of_node, before, after)
        assert all(are_of_one_item(pieces) for pieces in seen.values()), "one id stands for several images"
        assert max(in_tree, default=0) <= 1
        held = [holders + known for holders, known in zip(refs, in_tree, strict=True)]
        assert pool._refs.tolist() == held, "a block is held by nobody, or freed too early"
        assert pool.num_free + pool.num_cached + pool.num_used == pool.num_blocks
        if scheduler.blocks.states is not None:
            places = scheduler.blocks.states.places
            assert places.num_free + places.num_known + places.num_held == scheduler.limits.kept_states
            assert all(in_tree[block] for block in places._block_of.values()), "a state of nothing is known"

    def check_states(self, blocks: list[int], before: tuple[int, ...], tokens: tuple[int, ...]) -> None:
        """What the prefix tree takes for the states at the ends of an edge's blocks."""
        assert self.core.scheduler is not None and self.core.loaded is not None
        states, model = self.core.scheduler.blocks.states, self.core.loaded.model
        if states is None:
            return
        assert isinstance(model, ScriptedModel) and model._states is not None
        for count, block in enumerate(blocks, 1):
            place = int(states.places._place_of[block])
            if place >= 0 and not model.asleep:
                assert model._states.at(place) == (*before, *tokens[: count * states._page_size]), "another state"


def loaded(
    script: Script = echo,
    *,
    tokenizer: bool = True,
    fits_beside: bool = True,
    run_ahead: bool = False,
    kept_states: int | None = None,
    **changes: Any,
) -> Case:
    """A core that serves a scripted model."""
    loader = ScriptedLoader(
        script,
        tokenizer=ByteTokenizer() if tokenizer else None,
        fits_beside=fits_beside,
        run_ahead=run_ahead,
        kept_states=kept_states,
    )
    case = Case(loader)
    case.load(**changes)
    return case


def answer(text: str) -> Script:
    """A script that says the same to everyone."""
    return lambda prompt, branch: text.encode()
