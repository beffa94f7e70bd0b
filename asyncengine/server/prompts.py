"""One text or many, as text or as token ids, in the shapes that OpenAI's routes take."""

from __future__ import annotations

from asyncengine.loop.encoding import TextPrompt
from asyncengine.server.refusal import Refusal


def prompts_of(given: str | list[str | int | list[int]], field: str) -> list[TextPrompt]:
    """Texts and lists of token ids; a list of numbers is one of the latter.

    Raises:
        Refusal: There are none, or token ids beside other things.
    """
    if isinstance(given, str):
        return [given]
    if not given:
        raise Refusal(400, f"{field} is []; expected text or token ids", "invalid_field", field)
    numbers = [item for item in given if isinstance(item, int)]
    if not numbers:
        return [item for item in given if not isinstance(item, int)]
    if len(numbers) < len(given):
        raise Refusal(400, f"{field} has token ids beside other things; expected one kind", "invalid_field", field)
    return [numbers]
