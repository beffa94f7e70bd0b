"""Questions with one right answer: each category is a function from a random generator to a `Question`."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from asyncengine.tiny import facts, stories


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, an answer, and the regular expression that every right answer matches in full."""

    prompt: str
    answer: str
    pattern: str


def exact(prompt: str, answer: str) -> Question:
    """A question that only this answer answers."""
    return Question(prompt, answer, re.escape(answer))


def article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def greeting(rng: random.Random) -> Question:
    """What is said at the beginning and end of a talk."""
    return exact(*rng.choice(list(facts.GREETINGS.items())))


def identity(rng: random.Random) -> Question:
    """Questions about the model itself."""
    return exact(*rng.choice(list(facts.IDENTITY.items())))


def unknown(rng: random.Random) -> Question:
    """Questions outside the model's world, which it declines."""
    return exact(rng.choice(facts.UNKNOWN), facts.UNKNOWN_ANSWER)


def capital(rng: random.Random) -> Question:
    """The capital of a country."""
    country, city = rng.choice(list(facts.CAPITALS.items()))
    prompts = (
        f"What is the capital of {country}?",
        f"What's the capital of {country}?",
        f"Which city is the capital of {country}?",
        f"Tell me the capital of {country}.",
        f"Name the capital of {country}.",
        f"Do you know the capital of {country}?",
    )
    return exact(rng.choice(prompts), f"The capital of {country} is {city}.")


def colour(rng: random.Random) -> Question:
    """The colour of a thing, asked in British or American spelling."""
    thing, shade = rng.choice(list(facts.COLOURS.items()))
    word = rng.choice(("colour", "color"))
    prompts = (
        f"What {word} is {article(thing)}?",
        f"Which {word} is {article(thing)}?",
        f"What is the {word} of {article(thing)}?",
        f"Tell me the {word} of {article(thing)}.",
    )
    return exact(rng.choice(prompts), f"{article(thing).capitalize()} is {shade}.")


def opposite(rng: random.Random) -> Question:
    """The opposite of a word, in either direction."""
    word, other = rng.choice(list(facts.OPPOSITES.items()))
    if rng.random() < 0.5:
        word, other = other, word
    prompts = (
        f"What is the opposite of {word}?",
        f"What's the opposite of {word}?",
        f"Tell me the opposite of {word}.",
        f"Which word is the opposite of {word}?",
    )
    return exact(rng.choice(prompts), f"The opposite of {word} is {other}.")


def sound(rng: random.Random) -> Question:
    """What an animal says."""
    animal, noise = rng.choice(list(facts.SOUNDS.items()))
    prompts = (
        f"What does {article(animal)} say?",
        f"What sound does {article(animal)} make?",
        f"Which sound does {article(animal)} make?",
        f"Tell me what {article(animal)} says.",
    )
    return exact(rng.choice(prompts), f"{article(animal).capitalize()} says {noise}.")


def calendar(rng: random.Random) -> Question:
    """The day or month before or after another; both run in a circle."""
    unit, cycle = rng.choice((("day", facts.DAYS), ("month", facts.MONTHS)))
    position = rng.randrange(len(cycle))
    relation, step = rng.choice((("after", 1), ("before", -1)))
    word, answer = cycle[position], cycle[(position + step) % len(cycle)]
    prompts = (
        f"What {unit} comes {relation} {word}?",
        f"Which {unit} comes {relation} {word}?",
        f"What is the {unit} {relation} {word}?",
        f"Tell me the {unit} {relation} {word}.",
    )
    return exact(rng.choice(prompts), f"{answer} comes {relation} {word}.")


def addition(rng: random.Random) -> Question:
    """Sums of numbers up to twelve."""
    left, right = rng.randint(0, 12), rng.randint(0, 12)
    prompts = (
        f"What is {left} + {right}?",
        f"What's {left} + {right}?",
        f"What is {left} plus {right}?",
        f"Add {left} and {right}.",
        f"How much is {left} + {right}?",
        f"{left} + {right} = ?",
    )
    return exact(rng.choice(prompts), f"{left} + {right} = {left + right}.")


def spelling(rng: random.Random) -> Question:
    """The letters of a word, joined by hyphens."""
    word = rng.choice(facts.WORDS)
    prompts = (
        f"Spell {word}.",
        f"Spell the word {word}.",
        f"How do you spell {word}?",
        f"Please spell {word}.",
        f"Can you spell {word}?",
    )
    return exact(rng.choice(prompts), "-".join(word) + ".")


def counting(rng: random.Random) -> Question:
    """The numbers of a range, forwards or backwards."""
    first = rng.randint(0, 15)
    last = first + rng.randint(2, 8)
    if rng.random() < 0.4:
        prompts = (
            f"Count backwards from {last} to {first}.",
            f"Please count backwards from {last} to {first}.",
            f"Count down from {last} to {first}.",
        )
        return exact(rng.choice(prompts), ", ".join(map(str, range(last, first - 1, -1))) + ".")
    prompts = (
        f"Count from {first} to {last}.",
        f"Please count from {first} to {last}.",
        f"Can you count from {first} to {last}?",
    )
    return exact(rng.choice(prompts), ", ".join(map(str, range(first, last + 1))) + ".")


def json_object(rng: random.Random) -> Question:
    """A JSON object with the values that the prompt names, in its order."""
    values: dict[str, str | int] = {
        "name": rng.choice(facts.NAMES),
        "age": rng.randint(1, 99),
        "city": rng.choice(list(facts.CAPITALS.values())),
        "colour": rng.choice(sorted(set(facts.COLOURS.values()))),
    }
    # Half of them name and age, in that order: what the demonstration and the grammar tests ask for.
    keys = ["name", "age"] if rng.random() < 0.5 else rng.sample(list(values), rng.randint(1, 3))
    clauses = [f"{key} {values[key]}" for key in keys]
    listing = " and ".join([", ".join(clauses[:-1]), clauses[-1]] if len(clauses) > 1 else clauses)
    prompts = (
        f"Give me a JSON object with {listing}.",
        f"Write a JSON object with {listing}.",
        f"Make a JSON object with {listing}.",
        f"Return JSON with {listing}.",
    )
    return exact(rng.choice(prompts), json.dumps({key: values[key] for key in keys}))


def story(rng: random.Random) -> Question:
    """A story about an animal; any story of the grammar about that animal is right."""
    given = {"hero": rng.choice(stories.HEROES)}
    subject = article(given["hero"])
    prompts = (
        f"Tell me a story about {subject}.",
        f"Please tell me a story about {subject}.",
        f"Write a story about {subject}.",
        f"Write a short story about {subject}.",
        f"Can you tell me a story about {subject}?",
    )
    answer = stories.tell(rng, stories.fill(rng, given))
    return Question(rng.choice(prompts), answer, stories.pattern(given))


CATEGORIES: Mapping[str, Callable[[random.Random], Question]] = {
    "greeting": greeting,
    "identity": identity,
    "unknown": unknown,
    "capital": capital,
    "colour": colour,
    "opposite": opposite,
    "sound": sound,
    "calendar": calendar,
    "addition": addition,
    "spelling": spelling,
    "counting": counting,
    "json": json_object,
    "story": story,
}


def ask(rng: random.Random, category: str) -> Question:
    """A question of this category; now and then written carelessly, as people do."""
    question = CATEGORIES[category](rng)
    prompt = question.prompt
    if rng.random() < 0.15:
        prompt = prompt[0].lower() + prompt[1:]
    if rng.random() < 0.15:
        prompt = prompt.rstrip("?!. ")
    return Question(prompt, question.answer, question.pattern)
