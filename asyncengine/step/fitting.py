"""Whether what was asked of one model can be asked of the one that takes its place. On the step thread; a function."""

from __future__ import annotations

from asyncengine.errors import InvalidRequestError
from asyncengine.instructions import AlignmentQuestion, NewRequest, PromptQuestion
from asyncengine.media import PLURALS, PromptMedia
from asyncengine.step.adapters import AdapterTable, unknown_adapter
from asyncengine.step.batch import Int32
from asyncengine.step.model import LoadedModel


def misfit(
    new: NewRequest, sequences: list[Int32], loaded: LoadedModel, adapters: AdapterTable, looked_at: int = 0
) -> InvalidRequestError | None:
    """Why a request does not fit a model; None if it does.

    Args:
        new: The request.
        sequences: (tokens,) each: what its branches go on from.
        loaded: The model.
        adapters: Those that it has.
        looked_at: How many tokens before those of each sequence are known to fit.
    """
    why = (
        _of_tokens(new, sequences, loaded, looked_at)
        or _of_purpose(new, loaded)
        or (None if new.media is None else _of_media(new.media, loaded))
    )
    if why is None and new.adapter is not None and adapters.get(new.adapter) is None:
        why = f"the new model does not have its adapter: {unknown_adapter(new.adapter, adapters.names)}"
    return None if why is None else InvalidRequestError(f"request {new.request_id}: {why}")


def _of_tokens(new: NewRequest, sequences: list[Int32], loaded: LoadedModel, looked_at: int) -> str | None:
    limits, vocab_size = loaded.limits, loaded.vocab_size
    longest = looked_at + max(map(len, sequences), default=0)
    if longest > limits.max_prompt_tokens:
        return f"its tokens do not fit the new model: at most {limits.max_tokens} tokens"
    if (search := new.params.search) is not None and (
        search.num_beams > limits.max_num_sequence or limits.written_by_beams(longest, search.num_beams) < 1
    ):
        return f"its {search.num_beams} beams do not fit the new model's KV cache, or its max_num_sequence"
    asked = new.question.token_id if isinstance(new.question, PromptQuestion) else -1
    if asked >= vocab_size or any(int(tokens.max(initial=0)) >= vocab_size for tokens in sequences):
        return f"it has token ids outside the new vocabulary of {vocab_size}"
    return None


def _of_purpose(new: NewRequest, loaded: LoadedModel) -> str | None:
    poolings = loaded.poolings
    if new.pooling is not None and not new.classifies and new.pooling not in poolings:
        can = f"pools by {', '.join(poolings)}" if poolings else "gives out no hidden states to embed"
        return f"it pools by {new.pooling!r}; the new model {can}"
    if new.second is not None and not loaded.takes_pairs:
        return "the new model takes no pairs of texts"
    if new.classifies and loaded.classifier is None:
        return "the new model has no classification head"
    if new.pooling is None and not loaded.has_head:
        return "the new model has no language-model head"
    if isinstance(new.question, AlignmentQuestion) and not loaded.aligns:
        return "the new model does not tell what its tokens attend to"
    if new.media is None and loaded.begins_with_audio:
        return "the new model writes what it hears; it has no audio"
    if new.media is None and loaded.source_reader is not None:
        return "the new model writes one text of another; it was not read as a source"
    return None


def _of_media(media: PromptMedia, loaded: LoadedModel) -> str | None:
    if media.kinds == {"text"}:
        reads = loaded.source_reader is not None and media.reader == loaded.source_reader.key
    else:
        reader = loaded.media_reader
        reads = reader is not None and media.reader == reader.key and media.kinds <= set(reader.kinds)
    if not reads:
        return f"the new model does not take its {' and '.join(PLURALS[kind] for kind in sorted(media.kinds))}"
    chunk = loaded.limits.prefill_chunk_size
    if media.longest_whole > chunk:
        return (
            f"an image of {media.longest_whole} tokens must be computed in one step; prefill_chunk_size of the new "
            f"model allows {chunk}"
        )
    return None
