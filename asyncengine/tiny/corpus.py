"""The tiny model's whole world, generated from a seed: chats with checkable answers and a few plain stories."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypedDict

from asyncengine.tiny import stories
from asyncengine.tiny.conversations import CONVERSATIONS
from asyncengine.tiny.questions import ask

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One turn of a chat, as a chat template takes it."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A prompt that ends with the user's turn, the answer to it, and what a right answer looks like.

    Attributes:
        category: A key of `WEIGHTS`.
        prompt: The messages before the answer.
        answer: The assistant's last message.
        pattern: A regular expression that every right answer matches in full.
    """

    category: str
    prompt: tuple[Message, ...]
    answer: str
    pattern: str

    def is_right(self, answer: str) -> bool:
        """Whether this is a right answer to the prompt, in full."""
        return re.fullmatch(self.pattern, answer) is not None


# Relative frequency in training. What has to be computed or copied needs more examples than what is remembered.
WEIGHTS: Mapping[str, int] = {
    "greeting": 4,
    "identity": 3,
    "unknown": 3,
    "capital": 6,
    "colour": 5,
    "opposite": 5,
    "sound": 4,
    "calendar": 6,
    "addition": 14,
    "spelling": 5,
    "counting": 16,
    "json": 15,
    "story": 7,
    "medley": 30,
    "acquaintance": 7,
    "capitals": 2,
    "opposites": 2,
    "reversal": 7,
    "story recall": 7,
}

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer in one sentence.",
    "You are the tiny model of asyncengine.",
    "Be brief.",
)


def chat(rng: random.Random, category: str) -> Chat:
    """One chat of this category; every eighth begins with a system message."""
    questions = CONVERSATIONS[category](rng) if category in CONVERSATIONS else [ask(rng, category)]
    prompt: list[Message] = []
    if rng.random() < 0.125:
        prompt.append(Message(role="system", content=rng.choice(SYSTEM_MESSAGES)))
    for question in questions[:-1]:
        prompt.append(Message(role="user", content=question.prompt))
        prompt.append(Message(role="assistant", content=question.answer))
    last = questions[-1]
    prompt.append(Message(role="user", content=last.prompt))
    return Chat(category, tuple(prompt), last.answer, last.pattern)


def chats(rng: random.Random, count: int) -> list[Chat]:
    """Chats of all categories, mixed by `WEIGHTS`."""
    return [chat(rng, category) for category in rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=count)]


def texts(rng: random.Random, count: int) -> list[str]:
    """Plain stories without a chat around them, so that a bare "Once upon a time" is continued."""
    return [stories.tell(rng, stories.fill(rng, {})) for _ in range(count)]


def held_out(rng: random.Random, category: str, count: int, known: list[Chat]) -> list[Chat]:
    """Chats of one category whose prompts differ from each other and from those of all known chats.

    A category may have fewer such prompts than were asked for: then the list is shorter.
    """
    seen = {_text(other.prompt) for other in known}
    found: list[Chat] = []
    for _ in range(40 * count):
        candidate = chat(rng, category)
        if _text(candidate.prompt) not in seen:
            seen.add(_text(candidate.prompt))
            found.append(candidate)
        if len(found) == count:
            break
    return found


def _text(messages: tuple[Message, ...]) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _demo(category: str, *turns: str, pattern: str | None = None) -> Chat:
    """A chat of fixed turns: the user's first, then the assistant's and the user's in turn, the answer last."""
    roles: tuple[Role, Role] = ("user", "assistant")
    messages = [Message(role=roles[index % 2], content=turn) for index, turn in enumerate(turns)]
    answer = messages[-1]["content"]
    return Chat(category, tuple(messages[:-1]), answer, pattern or re.escape(answer))


# What a demonstration can ask and check: greedy decoding answers every one of these rightly.
DEMO_CHATS: tuple[Chat, ...] = (
    _demo("greeting", "Hello!", "Hello! How can I help you?"),
    _demo("identity", "Who are you?", "I am the tiny model of asyncengine."),
    _demo("capital", "What is the capital of France?", "The capital of France is Paris."),
    _demo("colour", "What colour is a lemon?", "A lemon is yellow."),
    _demo("opposite", "What is the opposite of hot?", "The opposite of hot is cold."),
    _demo("sound", "What does a cow say?", "A cow says moo."),
    _demo("calendar", "What day comes after Monday?", "Tuesday comes after Monday."),
    _demo("addition", "What is 7 + 8?", "7 + 8 = 15."),
    _demo("spelling", "Spell the word garden.", "g-a-r-d-e-n."),
    _demo("counting", "Count from 3 to 9.", "3, 4, 5, 6, 7, 8, 9."),
    _demo("json", "Give me a JSON object with name Ada and age 36.", '{"name": "Ada", "age": 36}'),
    _demo(
        "story",
        "Tell me a story about a fox.",
        stories.tell(random.Random(0), stories.fill(random.Random(0), {"hero": "fox"})),
        pattern=stories.pattern({"hero": "fox"}),
    ),
    _demo(
        "acquaintance",
        "My name is Ada.",
        "Nice to meet you, Ada!",
        "What is my name?",
        "Your name is Ada.",
    ),
    _demo(
        "capitals",
        "What is the capital of France?",
        "The capital of France is Paris.",
        "And of Italy?",
        "The capital of Italy is Rome.",
    ),
)
