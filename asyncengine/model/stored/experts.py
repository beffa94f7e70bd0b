"""Experts that a checkpoint stores one by one, which transformers puts together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from asyncengine.model.stored.weight import OF_EXPERT

Shape = tuple[int, ...]


def experts_of(shapes: Mapping[str, Shape]) -> dict[str, dict[str, dict[int, Shape]]]:
    """The shapes of experts' weights: by the names of their layers and of their parts, and by their numbers.

    Args:
        shapes: Of all weights, by their names.
    """
    found: dict[str, dict[str, dict[int, Shape]]] = defaultdict(lambda: defaultdict(dict))
    for name, shape in shapes.items():
        if ".experts." in name and (expert := OF_EXPERT.fullmatch(name)) is not None:
            found[expert[1]][expert[3]][int(expert[2])] = shape
    return found


def first_experts(shapes: Mapping[str, Shape]) -> tuple[dict[str, Shape], int]:
    """The same weights with one expert for each layer, and how many it stands for: all of a layer are alike.

    Returns:
        All weights and 1, where some differ, or layers have different numbers of them.
    """
    layers = experts_of(shapes)
    parts = [each for layer in layers.values() for each in layer.values()]
    count = len(parts[0]) if parts else 1
    if any(len(set(part.values())) != 1 or part.keys() != set(range(count)) for part in parts):
        return dict(shapes), 1
    others = {
        f"{layer}.experts.{number}.{part}.weight"
        for layer, found in layers.items()
        for part in found
        for number in range(1, count)
    }
    return {name: shape for name, shape in shapes.items() if name not in others}, count
