"""Names of a text's modules and weights, which are others within a model that takes images as well."""

from __future__ import annotations

from collections.abc import Container

_WITHIN = "model.language_model."
_ALONE = "model."
_OLDER = "language_model.model."
_HEAD, _OLDER_HEAD = "lm_head.", "language_model.lm_head."


def name_in(name: str, known: Container[str]) -> str:
    """A name as `known` has it, of a module or weight of the text: of a model of text alone, or of one with images.

    Returns:
        The name itself, if `known` has none of its spellings.
    """
    if name in known:
        return name
    for spelling in (_WITHIN, _OLDER, _ALONE):  # the longest first
        if name.startswith(spelling):
            rest = name.removeprefix(spelling)
            return next((found for each in (_WITHIN, _ALONE, _OLDER) if (found := each + rest) in known), name)
    older = name.replace(_HEAD, _OLDER_HEAD) if name.startswith(_HEAD) else name
    return older if older in known else name
