"""What the draft model computes, and what it attends to, over a model that remembers the text behind each place."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch

from asyncengine.model.draft_model import DraftModel
from asyncengine.model.runner import TorchModel
from asyncengine.model.sampler import Sampler
from asyncengine.step.batch import Int64, StepBatch
from asyncengine.step.limits import Limits
from asyncengine.step.slots import SlotTable
from tests.step.core_case import params, prompt_of

PAGE, VOCAB = 4, 300
LIMITS = Limits(max_num_sequence=4, max_single_sequence_length=64, prefill_chunk_size=32, page_size=PAGE, num_blocks=16)


class Remembering:
    """Says the token after the last one; raises where a token would attend to what is of another text."""

    def __init__(self) -> None:
        self.texts: dict[int, tuple[int, ...]] = {}
        self.computed = 0

    def logits(self, batch: StepBatch) -> torch.Tensor:
        for row, table in enumerate(batch.block_tables):
            start, end = batch.query_start[row : row + 2]
            for at in range(start, end):
                position = int(batch.positions[at])
                places = [int(table[i // PAGE]) * PAGE + i % PAGE for i in range(position + 1)]
                assert places[-1] == batch.slot_mapping[at]
                before = self.texts[places[-2]] if position else ()
                assert [self.texts[place] for place in places[:-1]] == [before[: i + 1] for i in range(position)]
                self.texts[places[-1]] = (*before, int(batch.token_ids[at]))
        self.computed += len(batch.token_ids)
        last = torch.from_numpy(batch.token_ids[batch.sample_index].astype(np.int64))
        return torch.nn.functional.one_hot(last + 1, VOCAB).float()

    def copy_blocks(self, copies: Int64) -> None:
        for source, to in copies.tolist():
            for i in range(PAGE):
                if source * PAGE + i in self.texts:
                    self.texts[to * PAGE + i] = self.texts[source * PAGE + i]


class Drafted:
    """A draft model and a slot table, by hand."""

    def __init__(self) -> None:
        self.model = Remembering()
        sampler = Sampler(LIMITS.max_num_sequence, VOCAB, torch.device("cpu"))
        self.drafter = DraftModel(cast(TorchModel, self.model), sampler, LIMITS, ord("#"))
        self.table = SlotTable(LIMITS.max_num_sequence, LIMITS.max_single_sequence_length, PAGE)

    def place(self, slot: int, text: str, *blocks: int) -> None:
        self.table.fill(slot, prompt_of(text), len(text), 64, 0, ())
        self.table.append_blocks(slot, np.array(blocks, dtype=np.int32))
        self.table.num_computed[slot] = len(text)
        self.drafter.place(slot, params(), 0)

    def follow(self, *slots: int) -> int:
        """Returns how many tokens were computed."""
        before = self.model.computed
        self.drafter.follow(self.table, np.array(slots))
        return self.model.computed - before

    def propose(self, slot: int, length: int) -> list[int]:
        self.table.append_tokens(np.array([slot]), prompt_of("x"))
        found: Any = self.drafter.propose(self.table, np.array([slot]), np.array([length]))
        at = self.model.texts[int(self.table.blocks[slot, 0]) * PAGE]
        assert at == (int(self.table.tokens[slot, 0]),)
        return cast("list[int]", found[0].tolist())


def test_what_is_there_of_the_same_text_is_not_computed_again() -> None:
    case = Drafted()
    case.place(0, "abcdefgh", 3, 5, 6)
    assert case.follow(0) == 8
    case.place(1, "abcdefghij", 3, 5, 7)
    assert case.follow(1) == 2
    assert case.follow(0, 1) == 0


def test_the_same_tokens_after_another_text_are_computed_again() -> None:
    case = Drafted()
    case.place(0, "abcdXY", 3, 5)
    case.follow(0)
    case.place(0, "efghXY", 4, 5)
    case.follow(0)
    case.place(1, "abcdXY", 3, 5)  # its beginning was cached, the block of its end was another's meanwhile
    assert case.follow(1) == 2
    assert case.propose(1, 2) == [ord("y"), ord("z")]


def test_blocks_of_the_same_text_that_take_the_place_of_others_are_looked_at() -> None:
    case = Drafted()
    case.place(0, "abcdefgh", 3, 5, 6)
    case.follow(0)
    case.table.blocks[0, :2] = 8, 9  # another sequence published the same tokens, and was not drafted for
    case.table.append_tokens(np.array([0]), prompt_of("i"))
    case.table.num_computed[0] = 9
    assert case.follow(0) == 9
    assert case.propose(0, 2) == [ord("y"), ord("z")]


def test_wrong_drafts_are_written_over_and_right_ones_kept() -> None:
    case = Drafted()
    case.place(0, "abcd", 3, 5, 6, 7)
    case.follow(0)
    assert case.propose(0, 3) == [ord("y"), ord("z"), ord("{")]
    case.table.append_tokens(np.array([0]), prompt_of("y"))  # one was right
    before = case.model.computed
    assert case.propose(0, 2) == [ord("y"), ord("z")]
    assert case.model.computed - before == 2  # the two drafts alone: "x" and "y" are there


def test_copied_blocks_are_known_as_what_they_are() -> None:
    case = Drafted()
    case.place(0, "abcdef", 3, 5)
    case.follow(0)
    case.drafter.copy(np.array([[5, 6]]))
    case.place(1, "abcdef", 3, 6)
    assert case.follow(1) == 0
    assert case.propose(1, 1) == [ord("y")]


def test_a_piece_of_an_image_is_the_token_that_stands_for_one() -> None:
    case = Drafted()
    case.place(0, "ab..ef", 3, 5)
    case.table.tokens[0, 2:4] = -7
    case.follow(0)
    assert case.model.texts[5 * PAGE + 1] == tuple(prompt_of("ab##ef").tolist())
    assert case.propose(0, 1) == [ord("y")]
