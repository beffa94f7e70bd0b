"""Everything that can happen to a core, in any order; what must hold is checked after every step."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from asyncengine import instructions as ins
from asyncengine.catalogue import Inventory, KeptPrefixes
from asyncengine.config import EngineConfig
from asyncengine.errors import (
    AsyncEngineError,
    DeadlineExceededError,
    EngineClosedError,
    EngineOverloadedError,
    InvalidRequestError,
    ReloadError,
)
from asyncengine.events import Pooled, PromptLogprobs
from asyncengine.generation import EarlyStopping, SearchParams
from asyncengine.instructions import Deadlines, NewRequest
from asyncengine.outputs import FinishReason
from asyncengine.state import EngineState
from asyncengine.step.limits import Limits
from asyncengine.step.model import LoadedModel, LoadPlan, ModelView
from asyncengine.step.sequence import SequenceState
from asyncengine.step.warming import QUIET_SECONDS
from asyncengine.testing import ByteTokenizer, Script, ScriptedLoader, pieces_of
from asyncengine.testing.adapters import ScriptedAdapter
from asyncengine.testing.scripted import DeviceLostError
from tests.speculation.drafters import Broken, Guesser, Liar, Oracle
from tests.step.beams import found_by

from .core_case import EOS, Case, config, prompt_of

LETTERS = "abc"


def script(prompt: Sequence[int], branch: int) -> Iterable[int]:
    """Every prompt and branch has an answer of its own, of 0 to 39 letters."""
    seed = sum((place + 1) * token for place, token in enumerate(prompt)) + 31 * branch
    return [97 + (seed * 7 + (i * i + seed) * (i + 3)) % 3 for i in range(seed % 40)]


def script_of(adapter: str | None) -> Script:
    """What is generated with an adapter: the same, however often it is loaded anew."""
    return lambda prompt, branch: script(prompt, branch + (0 if adapter is None else 7 * ord(adapter)))


def as_seen(new: NewRequest) -> list[int]:
    """A prompt as a script finds it: with what is seen of images in their places."""
    prompt = new.prompt.tolist()
    for image in () if new.media is None else new.media.items:
        for place, piece in zip(image.places.tolist(), pieces_of(image.inputs["data"]), strict=True):
            prompt[place] = piece
    return prompt


def whole(new: NewRequest, branch: int) -> tuple[list[int], int | str | None]:
    """All that a branch generates if no length limit ends it, and what ends it, told naively."""
    answer = [*script_of(new.adapter)(as_seen(new), branch)]
    answer += [EOS] * (new.params.max_tokens + 1)
    text = ""
    for count, token in enumerate(answer, 1):
        if token in new.params.stop_token_ids and count > new.params.min_tokens:
            return answer[:count], token
        text += "" if token == EOS else chr(token)
        if stops := [stop for stop in new.params.stop_strs if text.endswith(stop)]:
            return answer[:count], max(stops, key=len)
    return answer, None


DISTURBANCES = [
    "weights", "bad weights", "unpin", "unpin", "wait a little", "wait", "shutdown", "a fault", "a fault in a launch",
    "a lost device", "a device lost in a launch", "a refusal",
    "a fault in a warm-up", "save prefixes", "read prefixes", "load prefixes",
    "load prefixes",
    "Unload", "Reset", "Drain", "Pause", "Sleep", "Resume", "Wake", "Restart",
]  # fmt: skip

CURES: dict[EngineState, Any] = {
    EngineState.UNLOADED: lambda to: ins.Reload(config(max_total_sequence_length=48), "abort", to),
    EngineState.PAUSED: ins.Resume,
    EngineState.SLEEPING: ins.Wake,
    EngineState.FAILED: ins.Restart,
}


ADDED: dict[str, Any] = {
    "prefix": st.sampled_from(["", "aaaa", "aaaabbbb", "aaaabbbbcccc"]),
    "tail": st.text(LETTERS, min_size=1, max_size=9),
    "n": st.integers(1, 4),
    "beams": st.sampled_from([1, 1, 1, 2, 3]),
    "early_stopping": st.sampled_from([True, False, "never"]),
    "length_penalty": st.sampled_from([0.0, 1.0, 2.0]),
    "priority": st.integers(-1, 1),
    "max_tokens": st.integers(0, 14) | st.just(100) | st.just(100),
    "min_tokens": st.integers(0, 5),
    "stop_strs": st.lists(st.text(LETTERS, min_size=2, max_size=4), max_size=2) | st.just([]),
    "many_stop_ids": st.booleans(),
    "deadlines": st.none() | st.builds(Deadlines, queue=st.sampled_from([None, 3]), total=st.sampled_from([None, 9])),
    "pin": st.sampled_from([None, None, None, "p", "q"]),
    "when_full": st.sampled_from(["wait", "raise"]),
    "count": st.integers(1, 3),
    "same_id": st.booleans(),
    "adapter": st.sampled_from([None, None, "x", "y"]),
    "kind": st.sampled_from(["text", "text", "text", "text", "scored", "mean", "last"]),
    "pictures": st.just([]) | st.just([]) | st.lists(st.sampled_from([b"p", b"pic", b"pictu"]), max_size=2),
}
LOADED: dict[str, Any] = {
    "drafts": st.sampled_from(["none", "right", "guessed", "guessed", "wrong", "repeated", "broken"]),
    "longest": st.sampled_from([0, 1, 3, 20]),
    "adapters": st.sampled_from(["", "x", "x", "xy", "yx"]),
    "kept": st.sampled_from([None, None, 0, 1, 3, 50]),
    "set_aside": st.sampled_from([0, 1, 3, 16, 16]),
    "images": st.sampled_from(["", "", "parted", "whole"]),
}


def with_images(new: NewRequest, view: ModelView, prefix: str, pictures: list[bytes]) -> NewRequest:
    """A request with images behind the prefix of its prompt, if none of them is too large to be seen at once."""
    assert view.media_reader is not None
    tokens = ByteTokenizer()
    text = prefix + "\0" * len(pictures) + tokens.decode(new.prompt.tolist())[len(prefix) :]
    read = view.media_reader.read({"image": pictures}, lambda encode: encode(text), tokens.encode, 100)
    longest = max(len(image.places) for image in read.media.items)
    if read.media.whole and longest > (view.config.prefill_chunk_size or 0):
        return new
    room = max(view.max_tokens - len(read.token_ids), 0)
    params = dataclasses.replace(new.params, max_tokens=min(new.params.max_tokens, room), min_tokens=0)
    return dataclasses.replace(new, prompt=prompt_of(read.token_ids), media=read.media, params=params)


DRAFTERS: dict[str, Any] = {
    "right": Oracle,
    "guessed": lambda model: Guesser(model, 1),
    "wrong": Liar,
    "broken": Broken,
}


class Loader(ScriptedLoader):
    """Loads models that keep states, as many as drawn, and take images if that is drawn."""

    kept: int | None = None
    set_aside = 0
    images = ""

    def check(self, config: EngineConfig, current: LoadedModel | None) -> LoadPlan:
        self._choose()
        return super().check(config, current)

    def load(self, plan: LoadPlan) -> LoadedModel:
        self._choose()
        return super().load(plan)

    def _choose(self) -> None:
        self.kept_states, self.drafted_states = self.kept, self.set_aside
        self.takes_images, self.whole_images = bool(self.images), self.images == "whole"


def fit(view: ModelView, prompt_tokens: int, beams: int) -> bool:
    """Whether a model has room for so many beams."""
    limits = view.limits
    assert limits is not None
    return beams <= limits.max_num_sequence and limits.written_by_beams(prompt_tokens + 1, beams) > 0


def alive_and_open(machine: CoreMachine) -> bool:
    return machine.alive() and bool(machine.unwhole)


class CoreMachine(RuleBasedStateMachine):
    run_ahead = False

    def __init__(self) -> None:
        super().__init__()
        adapters = {name: script_of(name) for name in "xy"}
        self.loader = Loader(
            script, tokenizer=ByteTokenizer(), run_ahead=self.run_ahead, warm_up_pieces=3, adapters=adapters
        )
        self.case = Case(self.loader)
        self.news: dict[int, NewRequest] = {}
        self.limits = {48}  # of whatever was loaded so far, and of what `recover` loads
        self.served: set[Limits] = set()  # of whatever has computed something
        self.cut: set[int] = set()  # requests that did not come to their own end
        end = self.core.requests._end

        def noted(request: Any, reason: FinishReason, error: Any) -> None:
            if reason in (FinishReason.ABORT, FinishReason.ERROR):
                self.cut.add(request.new.number)
            end(request, reason, error)

        self.core.requests._end = noted
        self.admissions: dict[int, tuple[NewRequest, ...]] = {}
        self.expected: set[int] = set()  # tickets that must have an answer in the end
        self.pending: list[ins.Instruction] = []
        self.unwhole: dict[int, str] = {}  # prompts that come in pieces, so far
        self.inventory: tuple[int, Inventory] | None = None
        self.kept: KeptPrefixes | None = None

    # What is there

    @property
    def core(self) -> Any:
        return self.case.core

    def alive(self) -> bool:
        return not self.core.closed

    def ask(self, make: Any) -> int:
        ticket = self.case.call(make)
        self.expected.add(ticket)
        return ticket

    def later(self, data: st.DataObject, make: Any) -> None:
        """Gives an instruction now, or lets it arrive during the next step."""
        to = self.case.reply_to()
        self.expected.add(to.ticket)
        if data.draw(st.booleans(), label="during a step"):
            self.pending.append(make(to))
        else:
            self.case.give(make(to))

    def drafts_by(self, drafts: str, longest: int, kept: int | None, set_aside: int, images: str) -> dict[str, Any]:
        """Lets models have a drafter, images and states from now on; returns what to load them with."""
        self.loader.kept, self.loader.set_aside, self.loader.images = kept, set_aside, images
        self.case.loader.make_drafter = DRAFTERS.get(drafts)
        return {} if drafts == "none" else {"speculative_mode": "ngram", "spec_draft_length": longest}

    # Rules

    @initialize(
        size=st.sampled_from([32, 48, 64]),
        slots=st.sampled_from([1, 2, 5]),
        chunk=st.sampled_from([3, 8, 32]),
        hybrid=st.sampled_from(["hybrid", "chunked"]),
        recycling=st.sampled_from([None, 1]),
        queue=st.sampled_from([None, 2]),
        **LOADED,
    )
    def load(
        self,
        size: int,
        slots: int,
        chunk: int,
        hybrid: Any,
        recycling: int | None,
        queue: int | None,
        drafts: str,
        longest: int,
        adapters: str,
        kept: int | None,
        set_aside: int,
        images: str,
    ) -> None:
        self.limits.add(size)
        self.case.load(
            max_total_sequence_length=size,
            max_num_sequence=slots,
            prefill_chunk_size=chunk,
            prefill_mode=hybrid,
            prefix_cache_max_num_recycling_seqs=recycling,
            max_queue_size=queue,
            adapters=dict(zip(adapters, adapters, strict=True)),
            **self.drafts_by(drafts, longest, kept, set_aside, images),
        )

    @precondition(alive)
    @rule(data=st.data(), **ADDED)
    def add(self, data: st.DataObject, **drawn: Any) -> None:
        self.give_requests(data, **drawn)

    @precondition(alive)
    @rule(data=st.data(), **ADDED)
    def add_more(self, data: st.DataObject, **drawn: Any) -> None:
        self.give_requests(data, **drawn)

    def give_requests(
        self,
        data: st.DataObject,
        prefix: str,
        tail: str,
        n: int,
        beams: int,
        early_stopping: EarlyStopping,
        length_penalty: float,
        priority: int,
        max_tokens: int,
        min_tokens: int,
        stop_strs: list[str],
        many_stop_ids: bool,
        deadlines: Deadlines | None,
        pin: str | None,
        when_full: ins.WhenFull,
        count: int,
        same_id: bool,
        adapter: str | None,
        kind: str,
        pictures: list[bytes],
    ) -> None:
        view = self.core.view
        limits: dict[str, Any] = {}
        pooling: Any = None
        if kind == "scored":
            limits = {"num_prompt_logprobs": 0}
        elif kind != "text":
            pooling, n, max_tokens = kind, 1, 0
        prompt = prefix + tail
        room = 1000 if view is None else view.max_tokens - len(prompt)
        if room < 1:
            return
        max_tokens = min(max_tokens, room)
        if kind == "text" and beams > 1 and not pictures and view is not None and fit(view, len(prompt), beams):
            max_tokens = min(max_tokens, view.limits.written_by_beams(len(prompt) + 1, beams))
            limits = {"search": SearchParams(beams, length_penalty, early_stopping)}
            n, stop_strs = min(n, beams), []
        news = [
            self.case.new(
                prompt + LETTERS[i] * (len(prompt) + 1 < 20 and i > 0),
                n=n,
                request_id="same" if same_id and count == 1 else None,
                priority=priority,
                max_tokens=max_tokens,
                min_tokens=min(min_tokens, max_tokens),
                stop_strs=tuple(stop_strs),
                stop_token_ids=(EOS, *range(200, 212 if many_stop_ids else 200)),
                deadlines=deadlines,
                pin=pin,
                adapter=adapter,
                **limits,
            )
            for i in range(count)
        ]
        news = [dataclasses.replace(new, pooling=pooling) for new in news]
        if kind == "text" and pictures and view is not None and view.media_reader is not None:
            news = [with_images(new, view, prefix, pictures) for new in news]
        epoch = None
        if view is not None and any(len(new.prompt) >= view.max_tokens for new in news):
            return
        adding = self.case.adding(*news, when_full=when_full, epoch=epoch)
        to = self.case.reply_to()
        adding = ins.AddRequests(adding.requests, adding.epoch, adding.mailbox, to, when_full)
        self.expected.add(to.ticket)
        self.admissions[to.ticket] = tuple(news)
        for new in news:
            self.news[new.number] = new
        if data.draw(st.booleans(), label="during a step"):
            self.pending.append(adding)
        else:
            self.case.give(adding)

    @precondition(alive)
    @rule(
        n=st.integers(1, 3),
        max_tokens=st.integers(0, 9),
        priority=st.integers(-1, 1),
        scored=st.booleans(),
        adapter=ADDED["adapter"],
        beams=ADDED["beams"],
    )
    def open_a_prompt(
        self, n: int, max_tokens: int, priority: int, scored: bool, adapter: str | None, beams: int
    ) -> None:
        limits: dict[str, Any] = {"num_prompt_logprobs": 0} if scored else {}
        if beams > 1 and (view := self.core.view) is not None and fit(view, 0, beams):
            limits["search"] = SearchParams(beams, 1.0, False)
            n = min(n, beams)
        new = self.case.new("", arriving=True, n=n, max_tokens=max_tokens, priority=priority, adapter=adapter, **limits)
        to = self.case.reply_to()
        self.expected.add(to.ticket)
        self.admissions[to.ticket] = (new,)
        self.case.give(ins.AddRequests((new,), self.case.adding().epoch, self.case.box, to))
        self.news[new.number] = new
        if self.case.answered(to.ticket) and self.case.box.replies[to.ticket].value is True:
            self.unwhole[new.number] = ""

    @precondition(lambda self: alive_and_open(self))
    @rule(
        data=st.data(),
        text=st.sampled_from(["", "aaaa", "bbbb", "aaaabbbbcccc"]) | st.text(LETTERS, max_size=9),
        back=st.sampled_from([0, 0, 0, 0, 1, 5]),
        last=st.sampled_from([False, False, True]),
    )
    def give_a_piece(self, data: st.DataObject, text: str, back: int, last: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.unwhole)), label="request")
        so_far = self.unwhole[number]
        keep = max(len(so_far) - back, 0)
        prompt = so_far[:keep] + text
        last &= bool(prompt)
        piece = ins.ExtendPrompt(number, keep, prompt_of(text), last)
        self.unwhole[number] = prompt
        if last:
            self.news[number] = dataclasses.replace(self.news[number], prompt=prompt_of(prompt))
            del self.unwhole[number]
        if data.draw(st.booleans(), label="during a step"):
            self.pending.append(piece)
        else:
            self.case.give(*self.pending, piece)  # pieces of a prompt keep their order
            self.pending = []

    @precondition(alive)
    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        pending, self.pending = self.pending, []
        self.case.step(steps, pending)

    @precondition(alive)
    @rule(steps=st.integers(1, 12))
    def step_on(self, steps: int) -> None:
        self.step(steps)

    @precondition(lambda self: self.core.runnable)
    @rule(steps=st.integers(1, 4))
    def go_on(self, steps: int) -> None:
        self.step(steps)

    @precondition(alive)
    @rule(pieces=st.integers(1, 4), quiet=st.booleans())
    def rest(self, pieces: int, quiet: bool) -> None:
        """What the thread does when nothing is runnable."""
        if not self.core.runnable:
            self.case.step()
        self.case.now += QUIET_SECONDS if quiet else 0.0
        for _ in range(pieces):
            idle = not self.core.runnable and not len(self.core.requests) and self.core.state is EngineState.READY
            before = self.core.warming.progress
            advanced = self.core.warming.advance()
            assert not advanced or (idle and before.goes_on)
            assert advanced or not (quiet and idle and before.goes_on)

    @precondition(alive)
    @rule(data=st.data(), by_id=st.booleans())
    def abort(self, data: st.DataObject, by_id: bool) -> None:
        known = sorted(self.news)
        numbers = data.draw(st.lists(st.sampled_from([*known, 9999]), max_size=3), label="aborted")
        ids = tuple(self.news[n].request_id if n in self.news else "nobody" for n in numbers)
        if by_id:
            self.later(data, lambda to: ins.AbortRequests((), (*ids, "same"), to))
        else:
            self.later(data, lambda to: ins.AbortRequests(tuple(numbers), (), to))

    @precondition(alive)
    @rule(
        data=st.data(),
        in_flight=st.sampled_from(["abort", "wait", "carry"]),
        new_requests=st.sampled_from(["wait", "serve"]),
        model=st.sampled_from(["a", "b", "c", "fails check", "fails load"]),
        fits=st.booleans(),
        size=st.sampled_from([32, 48, 64, 96]),
        slots=st.sampled_from([1, 2, 5]),
        chunk=st.sampled_from([3, 8, 32]),
        hybrid=st.sampled_from(["hybrid", "chunked"]),
        cache=st.sampled_from(["radix", "radix", "disable"]),
        recycling=st.sampled_from([None, None, 0, 1, 3]),
        queue=st.sampled_from([None, 1, 2]),
        length=st.sampled_from([24, 40, 64]),
        **LOADED,
    )
    def reload(
        self,
        data: st.DataObject,
        in_flight: ins.InFlight,
        new_requests: ins.NewRequests,
        model: str,
        fits: bool,
        size: int,
        slots: int,
        chunk: int,
        hybrid: Any,
        cache: Any,
        recycling: int | None,
        queue: int | None,
        length: int,
        drafts: str,
        longest: int,
        adapters: str,
        kept: int | None,
        set_aside: int,
        images: str,
    ) -> None:
        loader = self.case.loader
        loader.fits_beside = fits
        loader.check_errors = {"fails check": ReloadError("no")}
        loader.load_errors = {"fails load": OSError("no")}
        self.limits.add(min(size // 4 * 4, length))
        new = config(
            model,
            max_total_sequence_length=size,
            max_num_sequence=slots,
            prefill_chunk_size=chunk,
            prefill_mode=hybrid,
            prefix_cache_mode=cache,
            prefix_cache_max_num_recycling_seqs=recycling,
            max_queue_size=queue,
            max_single_sequence_length=length,
            adapters=dict(zip(adapters, adapters, strict=True)),
            **self.drafts_by(drafts, longest, kept, set_aside, images),
        )
        self.later(data, lambda to: ins.Reload(new, in_flight, to, new_requests))

    @precondition(lambda self: bool(self.case.jobs))
    @rule(lost=st.booleans())
    def end_job(self, lost: bool) -> None:
        self.case.run_job(MemoryError("no room") if lost and len(self.case.jobs[0]) % 7 == 0 else None)

    def read_prefixes(self) -> None:
        """Reads what is still there of what the prefix cache once had."""
        if self.inventory is None:
            return
        epoch, found = self.inventory
        reply = self.case.box.replies.get(self.ask(lambda to: ins.ReadPrefixes(epoch, found.blocks, found.adopted, to)))
        if reply is not None and reply.value is not None:
            there, rows = reply.value
            assert rows.view(np.int64).reshape(-1, 4).tolist() == found.catalogue.tokens[there].tolist()
            before = found.catalogue.before[there]
            assert there[before[before >= 0]].all(), "a block is there, and one that it follows is not"
            if there.all():
                self.kept = KeptPrefixes(found.catalogue, 0, rows)

    @precondition(alive)
    @rule(data=st.data(), what=st.sampled_from(DISTURBANCES))
    def disturb(self, data: st.DataObject, what: str) -> None:
        loaded = self.core.loaded
        match what:
            case "weights" | "bad weights":
                weights = {"w": None if what == "bad weights" else 1}
                self.later(data, lambda to: ins.UpdateWeights(weights, to))
            case "unpin":
                pin = data.draw(st.sampled_from(["p", "q"]), label="unpinned")
                self.later(data, lambda to: ins.Unpin(pin, to))
            case "wait a little" | "wait":
                self.case.now += 0.5 if what == "wait a little" else 3.0
            case "shutdown":
                if data.draw(st.integers(0, 3), label="sure") == 0:
                    drain = data.draw(st.sampled_from([0.0, 2.0, 100.0]), label="drain")
                    self.later(data, lambda to: ins.Shutdown(drain, to))
            case "a fault" | "a fault in a launch" | "a lost device" | "a device lost in a launch" | "a refusal":
                if loaded is None:
                    return
                if what == "a fault":
                    loaded.model.fail_next(ValueError("a fault"))
                elif what == "a fault in a launch":
                    loaded.model.fail_next_launch(ValueError("a fault"))
                elif what == "a device lost in a launch":
                    loaded.model.fail_next_launch(DeviceLostError("lost"))
                elif what == "a lost device":
                    loaded.model.lose_device()
                else:
                    loaded.model.refuse_next(ValueError("a refusal"))
            case "save prefixes":
                view = self.core.view
                epoch = -1 if view is None else view.epoch
                reply = self.case.box.replies.get(self.ask(lambda to: ins.SavePrefixes(epoch, to)))
                if reply is not None and reply.value is not None:  # none while a reload holds it up
                    self.inventory = epoch, reply.value
                    self.read_prefixes()
            case "read prefixes":
                self.read_prefixes()
            case "load prefixes":
                view, kept = self.core.view, self.kept
                if kept is not None and view is not None:
                    start = data.draw(st.integers(0, len(kept.rows)), label="first block")
                    stop = data.draw(st.integers(start, len(kept.rows)), label="after the last block")
                    piece = dataclasses.replace(kept, start=start, rows=kept.rows[start:stop])
                    self.later(data, lambda to: ins.LoadPrefixes(piece, view.epoch, to))
            case "a fault in a warm-up":
                if self.case.loader.warm_ups:
                    self.case.loader.warm_ups[-1].fail_next(ValueError("a fault"))
            case _:
                self.later(data, getattr(ins, what))

    @precondition(alive)
    @rule(data=st.data(), name=st.sampled_from("xy"), unload=st.sampled_from([False, False, True]))
    def change_an_adapter(self, data: st.DataObject, name: str, unload: bool) -> None:
        view = self.core.view
        if unload:
            self.later(data, lambda to: ins.UnloadAdapter(name, to))
        elif view is not None:
            adapter = ScriptedAdapter(script_of(name))
            self.later(data, lambda to: ins.LoadAdapter(name, adapter, view.epoch, to))

    @precondition(lambda self: self.core.state in CURES)
    @rule()
    def recover(self) -> None:
        self.ask(CURES[self.core.state])

    @precondition(lambda self: self.core.state in CURES)
    @rule()
    def recover_and_step(self) -> None:
        self.ask(CURES[self.core.state])
        self.case.run_jobs()
        self.step(3)

    @precondition(lambda self: self.core.closed)
    @rule(instruction=st.sampled_from([ins.Reset, ins.Unload, ins.Drain, ins.Shutdown]))
    def give_to_a_closed_one(self, instruction: Any) -> None:
        ticket = self.ask(lambda to: instruction(reply_to=to))
        assert isinstance(self.case.error(ticket), EngineClosedError)

    # What must hold

    @invariant()
    def accounts_agree(self) -> None:
        self.case.check()
        core = self.core
        if core.scheduler is not None:
            self.served.add(core.scheduler.limits)
            running = core.scheduler.running()
            copied = [branch for _, _, branch in core.scheduler.blocks.copies]
            assert all(branch in running or branch.state is not SequenceState.DECODE for branch in copied)
        if core.closed:
            assert core.loaded is None and not len(core.requests)

    @invariant()
    def warm_ups_are_done_when_they_may_be(self) -> None:
        progress = self.core.warming.progress
        assert progress.goes_on or not progress.of or progress.done == progress.of or progress.notes
        assert all("ValueError('a fault')" in note for note in progress.notes)

    @invariant()
    def drafters_see_what_is_true(self) -> None:
        loaded = self.core.loaded
        if loaded is not None and loaded.drafting is not None and loaded.drafting.failure is not None:
            assert str(loaded.drafting.failure) == "the drafter is broken"

    @invariant()
    def what_was_delivered_is_true(self) -> None:
        box = self.case.box
        for number, new in self.news.items():
            if new.params.search is not None:
                self.what_was_found_is_best(number, new)
                continue
            for branch in range(new.params.n):
                got = box.tokens.get((number, branch), [])
                if not got and (number, branch) not in box.branch_ends:
                    continue
                tokens, stop = whole(new, branch)
                assert got == tokens[: len(got)], f"{number}.{branch}: {got} instead of {tokens}"
                assert len(got) <= new.params.max_tokens
                end = box.branch_ends.get((number, branch))
                if end is None:
                    continue
                assert (number in box.ends) or not all(
                    (number, other) in box.branch_ends for other in range(new.params.n)
                )
                if end.finish_reason is FinishReason.STOP:
                    assert (got, end.stop_reason) == (tokens, stop)
                elif end.finish_reason is FinishReason.LENGTH:
                    full = len(got) + len(new.prompt) in self.limits
                    assert len(got) == new.params.max_tokens or full, f"{got}, {new.params.max_tokens}"
                    assert stop is None or len(got) < len(tokens)
        for number, end in box.ends.items():
            cause: BaseException | None = end.error
            while cause is not None:  # the scripted model has found a mistake about blocks or states
                assert not isinstance(cause, AssertionError), f"{cause}"
                cause = cause.__cause__
            usage = end.usage
            assert 0 <= usage.accepted_draft_tokens <= min(usage.draft_tokens, usage.completion_tokens)
            reasons = {box.branch_ends[number, branch].finish_reason for branch in range(self.news[number].params.n)}
            assert (FinishReason.ERROR not in reasons) or isinstance(end.error, AsyncEngineError)
            if isinstance(end.error, DeadlineExceededError):
                assert self.news[number].deadlines is not None

    def what_was_found_is_best(self, number: int, new: NewRequest) -> None:
        """Nothing is told of a search before its end; then it is what the same search finds without an engine."""
        box, ends = self.case.box, [(number, branch) for branch in range(new.params.n)]
        if number not in box.ends:
            assert not any(key in box.tokens or key in box.branch_ends for key in ends)
            return
        reasons = {box.branch_ends[key].finish_reason for key in ends}
        if not new.params.max_tokens or number in self.cut or reasons & {FinishReason.ABORT, FinishReason.ERROR}:
            return
        texts = [box.tokens.get(key, []) for key in ends]
        prompt_tokens, beams = len(new.prompt), new.params.num_sequences
        could = {
            min(new.params.max_tokens, each.max_tokens - prompt_tokens, each.written_by_beams(prompt_tokens, beams))
            for each in self.served
        }
        assert any(texts == found_by(new, most) for most in could)

    def prompts_were_looked_at_once(self) -> None:
        """Scores and hidden states are of every position of the prompt, in order, whatever happened meanwhile."""
        scores: dict[int, list[float]] = {}
        pooled: dict[int, list[float]] = {}
        for event in self.case.box.log:
            if isinstance(event, PromptLogprobs):
                scores.setdefault(event.number, []).extend(entry.logprob for entry in event.logprobs)
            elif isinstance(event, Pooled):
                assert event.number not in pooled
                pooled[event.number] = event.vector.tolist()
        for number, new in self.news.items():
            prompt = new.prompt.tolist()
            found = scores.get(number, [])
            assert found == [-float(position) for position in range(len(found))]
            unbroken = number in self.case.box.ends and self.case.box.ends[number].error is None
            complete = unbroken and FinishReason.ABORT not in {
                self.case.box.branch_ends[number, branch].finish_reason for branch in range(new.params.n)
            }
            if new.params.num_prompt_logprobs >= 0 and complete:
                assert len(found) == len(prompt) - 1
            if new.pooling is not None and complete:
                states = np.array([[token, position, 1] for position, token in enumerate(prompt)], dtype=np.float64)
                wanted = states.mean(axis=0) if new.pooling == "mean" else states[-1]
                assert np.allclose(pooled[number], wanted)

    @precondition(lambda self: self.core.closed)
    @rule()
    def ask_what_is_closed(self) -> None:
        """Whatever comes too late is answered, and changes nothing."""
        box = self.case.box
        ends, tokens = len(box.ends), sum(map(len, box.tokens.values()))
        self.core.refuse([ins.AbortRequests(numbers=(1,)), ins.Reset(), ins.JobDone(-1)])
        self.core.step()
        assert (len(box.ends), sum(map(len, box.tokens.values()))) == (ends, tokens)

    @invariant()
    def refusals_are_those_that_may_be(self) -> None:
        for ticket, news in self.admissions.items():
            reply = self.case.box.replies.get(ticket)
            if reply is None:
                continue
            if reply.error is not None or reply.value is False:
                assert isinstance(reply.error, (AsyncEngineError, type(None))), reply.error
                if isinstance(reply.error, InvalidRequestError):
                    assert [new.request_id for new in news] == ["same"] or all(new.adapter for new in news)
                if isinstance(reply.error, EngineOverloadedError):
                    assert self.core.requests is not None

    def teardown(self) -> None:
        """Lets everything come to its end: nobody may be left waiting and nothing may be left behind."""
        case, core = self.case, self.core
        if self.pending:
            case.give(*self.pending)
            self.pending = []
        for number in [number for number, new in self.news.items() if new.arriving and not len(new.prompt)]:
            if number % 2 or number not in self.unwhole:
                case.abort(number)  # whoever has no more to say gives up
            else:
                case.piece(number, "cab", last=True)
                new = self.news[number]
                self.news[number] = dataclasses.replace(new, prompt=prompt_of(self.unwhole[number] + "cab"))
        for _ in range(50):
            while case.jobs:
                case.run_job()
            if core.closed:
                break
            if core.state is EngineState.PAUSED:
                case.give(ins.Resume())
            elif core.state is EngineState.SLEEPING:
                case.give(ins.Wake())
            elif core.state is EngineState.FAILED:
                case.give(ins.Restart())
            case.run(at_most=20_000)
            case.step()
            at_rest = not core.reloading.busy and not len(core.requests) and not case.jobs
            if at_rest and core.state is not EngineState.FAILED:  # the last step may have lost the device
                break
        note(f"{core.state} {core.reloading.phase} {core.requests.request_ids()}")
        self.prompts_were_looked_at_once()
        case.check()
        assert core.closed or not core.reloading.busy
        assert not len(core.requests)
        missing = self.expected - set(case.box.replies)
        assert not missing, f"nobody answered {missing}"
        for ticket, news in self.admissions.items():
            reply = case.box.replies[ticket]
            for new in news:
                admitted = reply.error is None and reply.value is True
                assert not admitted or new.number in case.box.ends, f"request {new.number} never ended"
                if admitted:
                    count = sum(key[0] == new.number for key in case.box.branch_ends)
                    assert count == new.params.n
        if core.scheduler is not None:
            pool, tree = core.scheduler.blocks.pool, core.scheduler.blocks.tree
            pinned = {block for _, blocks in tree._pins.values() for block in blocks.tolist()}
            assert pool.num_used == len(pinned)
            for pin in list(tree._pins):
                case.give(ins.Unpin(pin))
            if core.state is not EngineState.FAILED:  # its cache cannot be reset
                case.give(ins.Reset())
                assert pool.num_free == pool.num_blocks
                states = core.scheduler.blocks.states
                assert states is None or states.places.num_free == core.scheduler.limits.kept_states
        if not core.closed:
            case.shutdown()
        assert core.closed
        for model in case.loader.models:
            assert model.closed


class AheadMachine(CoreMachine):
    run_ahead = True


SETTINGS = settings(
    max_examples=int(os.environ.get("EXAMPLES", "18")),
    stateful_step_count=int(os.environ.get("STEPS", "40")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestCore = CoreMachine.TestCase
TestCore.settings = SETTINGS
TestCoreThatRunsAhead = AheadMachine.TestCase
TestCoreThatRunsAhead.settings = SETTINGS
