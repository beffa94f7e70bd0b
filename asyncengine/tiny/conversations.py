"""Conversations in which a later question leans on what was said before."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from asyncengine.tiny import facts, stories
from asyncengine.tiny.questions import CATEGORIES, Question, article, ask, exact


def acquaintance(rng: random.Random) -> list[Question]:
    """The user's name is remembered, over a question in between or none."""
    name = rng.choice(facts.NAMES)
    introduction = rng.choice((f"My name is {name}.", f"Hello, I am {name}.", f"Hi, my name is {name}."))
    between = [ask(rng, rng.choice(("capital", "opposite", "addition", "colour"))) for _ in range(rng.randint(0, 2))]
    recall = rng.choice(("What is my name?", "Who am I?", "Do you remember my name?"))
    return [exact(introduction, f"Nice to meet you, {name}!"), *between, exact(recall, f"Your name is {name}.")]


def capitals(rng: random.Random) -> list[Question]:
    """The second question names only the country."""
    country, city = rng.choice(list(facts.CAPITALS.items()))
    prompt = rng.choice((f"And of {country}?", f"And the capital of {country}?", f"And {country}?"))
    return [ask(rng, "capital"), exact(prompt, f"The capital of {country} is {city}.")]


def opposites(rng: random.Random) -> list[Question]:
    """The second question names only the word."""
    word, other = rng.choice(list(facts.OPPOSITES.items()))
    prompt = rng.choice((f"And of {word}?", f"And the opposite of {word}?", f"And {word}?"))
    return [ask(rng, "opposite"), exact(prompt, f"The opposite of {word} is {other}.")]


def reversal(rng: random.Random) -> list[Question]:
    """The same numbers once more, backwards."""
    first = rng.randint(0, 12)
    numbers = [str(number) for number in range(first, first + rng.randint(3, 8))]
    prompt = rng.choice(("Now backwards.", "And backwards?", "Now count backwards."))
    return [
        exact(f"Count from {numbers[0]} to {numbers[-1]}.", ", ".join(numbers) + "."),
        exact(prompt, ", ".join(reversed(numbers)) + "."),
    ]


def story_recall(rng: random.Random) -> list[Question]:
    """A story, then a question about it."""
    filling = stories.fill(rng, {})
    hero, thing, friend = filling["hero"], filling["thing"], filling["friend"]
    story = Question(
        f"Tell me a story about {article(hero)}.", stories.tell(rng, filling), stories.pattern({"hero": hero})
    )
    recall = (
        (f"What did the {hero} find?", f"The {hero} found a {thing}."),
        (f"Who did the {hero} meet?", f"The {hero} met an old {friend}."),
        ("Who was the story about?", f"The story was about {article(hero)}."),
    )
    return [story, exact(*rng.choice(recall))]


def medley(rng: random.Random) -> list[Question]:
    """Unrelated questions and conversations: each has to be answered without regard to the others."""
    questions: list[Question] = []
    for topic in rng.choices([*CATEGORIES, *TOPICS], k=rng.randint(2, 4)):
        questions += TOPICS[topic](rng) if topic in TOPICS else [ask(rng, topic)]
    return questions


TOPICS: Mapping[str, Callable[[random.Random], list[Question]]] = {
    "acquaintance": acquaintance,
    "capitals": capitals,
    "opposites": opposites,
    "reversal": reversal,
    "story recall": story_recall,
}

CONVERSATIONS: Mapping[str, Callable[[random.Random], list[Question]]] = {"medley": medley, **TOPICS}
