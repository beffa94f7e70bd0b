"""The table of combinations in docs/features.md, made from what the tests of combinations draw. Run it to print it.

A dot stands where at least `ENOUGH` requests had both features, and were compared with the scalar reference.
"""

from __future__ import annotations

from tests.model.wishes import FEATURES, Asked, case

ENOUGH = 3
ENGINE = [
    "small chunks",
    "separate prefill",
    "prefix cache",
    "preemption",
    "transformers' modules",
    "compiled step",
    "speculation",
]
REMARKS = {
    ("jump-forward", "log-probabilities"): "a",
    ("jump-forward", "logits processors"): "a",
    ("log-probabilities of the prompt", "prefix cache"): "b",
    ("log-probabilities of the prompt", "prompt in pieces"): "c",
    ("prefix cache", "prompt in pieces"): "d",
}
"""Pairs about which there is something to say, and the letter under which the page says it."""


def drawn() -> list[Asked]:
    """Every request in every engine of the cases that the suite runs, with random models."""
    story = list(range(60, 160))  # as long as the story of the cases, and as good as it
    asked = []
    for seed in range(3):
        found = case(seed, 288, 0, story, requests=28, engines=3).asked()
        # The architecture of the last case is not of the family that is compiled.
        asked += [request for request in found if seed < 2 or not FEATURES["compiled step"](request)]
    return asked


def table() -> str:
    asked = drawn()
    rows = [name for name in FEATURES if name not in ENGINE]
    columns = [*rows, *ENGINE]
    numbers = {name: str(number) for number, name in enumerate(rows, start=1)}
    lines = ["| | " + " | ".join(numbers.get(name, name) for name in columns) + " |"]
    lines.append("|" + "---|" * (len(columns) + 1))
    for row in rows:
        cells = ["" if row == column else _cell(asked, row, column) for column in columns]
        lines.append(f"| {numbers[row]} {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(asked: list[Asked], one: str, other: str) -> str:
    both = sum(FEATURES[one](request) and FEATURES[other](request) for request in asked)
    remark = REMARKS.get((one, other)) or REMARKS.get((other, one)) or ""
    return " ".join(filter(None, ["●" if both >= ENOUGH else "", remark]))


if __name__ == "__main__":
    print(table())
