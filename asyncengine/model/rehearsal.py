"""A load without weights: what transformers would find wrong with those that a checkpoint's headers describe.

Where the present model has to go before the next one is loaded, that is what it must not go for. transformers itself
says which weights are missing and which are of another shape, having renamed them and put them together as in a load;
it is given tensors without memory for them, and makes nothing up in the place of those that are missing.

What cannot be rehearsed is left to the load.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from asyncengine.model import architecture
from asyncengine.model.attention_modules import ATTENTION
from asyncengine.model.hidden_states import hidden_size
from asyncengine.model.load_check import Details, check_drafts, vector_size
from asyncengine.model.load_report import check_experts, check_weights, head_of, loaded
from asyncengine.model.stored.experts import Shape, first_experts
from asyncengine.model.stored.nothing import nothing

Rehearsed = tuple[Any, dict[str, Any]]
"""A model without weights, and what transformers says of those that it was given."""


def rehearse(details: Details) -> None:
    """Refuses a load that would fail for its weights.

    Args:
        details: Of the load. One that goes by findings of an earlier one had all its weights then.

    Raises:
        CheckpointError: Weights are missing, of other shapes or, in some files, left over.
    """
    if details.findings is not None:
        vector_size(details, details.findings.description["hidden_size"])
        return
    if (found := _decoder(details)) is not None:
        vector_size(details, hidden_size(found[0]))
    draft = details.draft
    if draft is not None and (found := _decoder(draft)) is not None:
        check_drafts(draft, not found[1]["missing_keys"] and not draft.checkpoint.classifies)
    if details.draft_head is not None:
        details.draft_head.rehearse(details)


def rehearsed(
    checkpoint: Any, kind: Any, shapes: Mapping[str, Shape], config: Any, dtype: Any, **arguments: Any
) -> Rehearsed | None:
    """A load of weights that nobody has.

    Args:
        checkpoint: Where they are stored, an `asyncengine.model.checkpoint.Checkpoint`.
        kind: transformers' class.
        shapes: Of all weights, by the names that the load would have.
        config: As transformers takes it.
        dtype: Of the model.
        arguments: Further ones of `from_pretrained`.

    Returns:
        None, if it cannot be done.

    Raises:
        CheckpointError: They cannot be put together.
    """

    def found(shapes: Mapping[str, Shape]) -> Rehearsed:
        weights = {name: nothing(shape, dtype) for name, shape in shapes.items()}
        return loaded(_unmade(kind), weights, config=config, dtype=dtype, **arguments)

    some, count = first_experts(shapes)
    try:
        if count > 1:  # each of hundreds would cost as much as in the load
            model, report = found(some)
            if not report["missing_keys"] and all(
                len(was) == 3 and was[0] == 1 and (count, *was[1:]) == tuple(of)
                for _, was, of in report["mismatched_keys"]
            ):  # all that is wrong with one in the place of all of them is that it is one
                return model, report | {"mismatched_keys": set()}
        return found(shapes)
    except Exception as error:  # whatever is in transformers' code
        if isinstance(error, RuntimeError):
            check_experts(checkpoint)
        return None


def _decoder(details: Details) -> Rehearsed | None:
    """As `rehearsed`, of a model's own checkpoint, whose weights are judged."""
    checkpoint = details.checkpoint
    if not checkpoint.tensors:  # there are no headers in pickles
        return None
    kind, config = architecture.model_class(details.hf_config, details.media)
    shapes = {tensor.name: tensor.shape for tensor in checkpoint.plain}
    try:
        shapes |= {weight.name: weight.shape for weight in architecture.coded_for(checkpoint, kind, config)}
    except Exception:  # whatever is in transformers' code
        return None
    found = rehearsed(checkpoint, kind, shapes, config, details.dtype, attn_implementation=ATTENTION)
    if found is not None:
        check_weights(checkpoint, found[1], head_of(found[0]))
    return found


@cache
def _unmade(kind: Any) -> Any:
    """A class of transformers' that leaves weights that are missing where there is no memory for them."""

    def leave(*_: Any, **__: Any) -> None:
        pass

    changes = {"_move_missing_keys_from_meta_to_device": leave, "_initialize_missing_keys": leave}
    return type(kind.__name__, (kind,), {"__module__": kind.__module__} | changes)
