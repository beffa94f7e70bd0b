"""Stories from a grammar: each can be generated, and recognised by a regular expression built from the same grammar."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

HEROES = (
    "fox",
    "owl",
    "cat",
    "dog",
    "rabbit",
    "bear",
    "mouse",
    "turtle",
    "dragon",
    "robot",
    "horse",
    "penguin",
    "wolf",
    "frog",
)

# Words that follow "a" begin with a consonant, so that no template needs to choose between "a" and "an".
SLOTS: Mapping[str, tuple[str, ...]] = {
    "hero": HEROES,
    "kind": ("brave", "little", "clever", "curious", "gentle", "young"),
    "home": ("in a deep forest", "by the sea", "on a green hill", "near a quiet lake", "under a tall tree"),
    "hobby": ("walk in the rain", "look at the stars", "sing to the moon", "swim in the river", "pick flowers"),
    "day": ("day", "morning", "evening", "winter night", "sunny afternoon"),
    "thing": ("golden key", "red ball", "silver bell", "blue feather", "wooden box"),
    "where": ("in the grass", "behind a rock", "beside the path", "at the edge of the water"),
    "friend": ("badger", "squirrel", "duck", "goat", "deer"),
    "mood": ("tired", "hungry", "sad", "lost", "cold"),
}

# One inner tuple is one sentence of the story, in one of its versions. A slot is filled once and then keeps its word;
# the first mention of a slot stands in a sentence that has only one version, so that `pattern` can refer back to it.
# The friend is always called old: a model this small finds the right animal again by the word before it.
SENTENCES: tuple[tuple[str, ...], ...] = (
    ("Once upon a time there was a {kind} {hero} who lived {home}.",),
    ("The {hero} liked to {hobby}.",),
    ("One {day}, the {hero} found a {thing} {where}.",),
    (
        '"What a beautiful {thing}!" said the {hero}.',
        "The {hero} had never seen such a {thing}.",
    ),
    ("Then an old {friend} came by, and the old {friend} was {mood}.",),
    (
        "The {hero} gave the {thing} to the old {friend}.",
        "The {hero} took the old {friend} home and made some soup.",
        '"Do not worry," said the {hero}, "I will help you."',
    ),
    (
        "From that day on, the two of them were best friends.",
        "The old {friend} smiled, and the {hero} was happy too.",
    ),
    ("The end.",),
)

_SLOT = re.compile(r"\{(\w+)\}")


def fill(rng: random.Random, given: Mapping[str, str]) -> dict[str, str]:
    """Chooses a word for every slot that is not given."""
    return {slot: given.get(slot) or rng.choice(words) for slot, words in SLOTS.items()}


def tell(rng: random.Random, filling: Mapping[str, str]) -> str:
    """One story with these words, in a random version of each sentence."""
    return " ".join(rng.choice(versions).format_map(filling) for versions in SENTENCES)


def pattern(given: Mapping[str, str]) -> str:
    """A regular expression that matches exactly the stories `tell` can tell when the given slots have these words."""
    seen: set[str] = set()

    def slot(match: re.Match[str]) -> str:
        name = match[1]
        if name in given:
            return re.escape(given[name])
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return f"(?P<{name}>{'|'.join(map(re.escape, SLOTS[name]))})"

    def sentence(template: str) -> str:
        # Only the slots' braces are special to us: everything between them is matched literally.
        literals = [re.escape(part) for part in _SLOT.split(template)[::2]]
        slots = [slot(match) for match in _SLOT.finditer(template)]
        return "".join(literal + group for literal, group in zip(literals, [*slots, ""], strict=True))

    return " ".join(f"(?:{'|'.join(map(sentence, versions))})" for versions in SENTENCES)
