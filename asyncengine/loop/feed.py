"""Feeds a request the pieces of its prompt while they come, in the task of whoever adds the request.

There is no task of its own: `AsyncEngine.add_request` returns once the prompt is whole, and until then nothing could
be read anyway. So a cancellation, an exception of the iterator, and a piece that is refused end the call as they end
any other, and the request with it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable

from asyncengine.instructions import ExtendPrompt
from asyncengine.loop.encoding import Piece, StreamedPrompt
from asyncengine.loop.growing_prompt import GrowingPrompt
from asyncengine.loop.interruption import Interruption
from asyncengine.loop.stream import RequestStream
from asyncengine.step.model import ModelView


async def feed(
    stream: RequestStream, pieces: StreamedPrompt, view: ModelView, give: Callable[[ExtendPrompt], None]
) -> None:
    """Gives an admitted request its prompt; returns once that is whole, or the request has ended.

    Args:
        stream: The request's; withdrawn if this raises.
        pieces: An async generator is closed if it is not read to its end.
        view: Of the model that the request was prepared for.
        give: Gives an instruction.

    Raises:
        InvalidRequestError: A piece is wrong, or the prompt is empty or too long.
        BaseException: Whatever the iterator raises.
    """
    prompt = GrowingPrompt(view)
    number = stream.number
    iterator: AsyncIterator[Piece] | None = None
    try:
        iterator = aiter(pieces)
        while True:
            ended, piece = await _next(iterator, stream)
            if stream.ended:
                return
            keep, tokens = await (prompt.finish() if ended else prompt.add(piece))
            if ended:
                stream.prompt_is(prompt.token_ids)
            if ended or len(tokens):
                give(ExtendPrompt(number, keep, tokens, ended))
            if ended:
                return
    except BaseException:
        stream.withdraw()
        raise
    finally:
        if isinstance(iterator, AsyncGenerator):
            await iterator.aclose()


async def _next(iterator: AsyncIterator[Piece], stream: RequestStream) -> tuple[bool, Piece]:
    """Whether there are no more pieces, and the next one; returns early when the request ends."""
    if not stream.ended:
        with Interruption() as interruption:
            stream.wait_with(interruption)
            try:
                return False, await anext(iterator)
            except StopAsyncIteration:
                return True, ""
    return True, ""
