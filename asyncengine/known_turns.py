"""Turns of a conversation whose tokens are known: they go into the prompt as they were generated.

Text that a model wrote token by token may be cut into other tokens when it is encoded as a whole. The prompt of the
next turn then differs from what was computed, from that place on, and is computed again. A message that brings its
`token_ids` is written into the chat template as a mark, and its tokens take the place of the mark.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]


def has_known_turns(messages: Sequence[Message]) -> bool:
    """Whether a message brings its tokens."""
    return any(message.get("token_ids") is not None for message in messages)


def encode_known_turns(
    messages: Sequence[Message],
    render: Callable[[Sequence[Message]], str],
    encode: Callable[[str], list[int]],
    decode: Callable[[Sequence[int], bool], str],
) -> list[int]:
    """Token ids of a conversation in which some turns are known.

    Args:
        messages: The `token_ids` of one stand for all that was said in that turn: content, reasoning, calls.
        render: Writes messages into the chat template.
        encode: Token ids of a piece of the result, without special tokens around it.
        decode: Text of token ids, without or with special tokens.

    Raises:
        ValueError: The template does not write the content of a message as it is, so that nothing can stand for it.
    """
    marked: list[Message] = []
    known: list[tuple[int, str, list[int]]] = []
    for index, message in enumerate(messages):
        if (token_ids := message.get("token_ids")) is None:
            marked.append(message)
            continue
        mark = f"turn-{index}-{secrets.token_hex(8)}"
        known.append((index, mark, list(token_ids)))
        marked.append({"role": message["role"], "content": mark})
    rest = render(marked)
    ids: list[int] = []
    for index, mark, token_ids in known:
        before, found, rest = rest.partition(mark)
        if not found or mark in rest:
            raise ValueError(
                f"the chat template does not write the content of messages[{index}] once and as it is, so its "
                "token_ids cannot stand for it; leave them out"
            )
        ids += encode(before) if before else []
        # The template ends the turn by itself: what ended the generation would be there twice.
        last = token_ids[-1:]
        if last and not decode(last, True) and (end := decode(last, False)) and rest.startswith(end):
            del token_ids[-1]
        ids += token_ids
    return ids + (encode(rest) if rest else [])
