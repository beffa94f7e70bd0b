"""What transformers says of a checkpoint's weights: judged here, and kept from being printed."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from asyncengine.errors import CheckpointError
from asyncengine.model.building import BUILDING
from asyncengine.model.stored.experts import experts_of

_REPORTS = (" LOAD REPORT", "specifies to tie ")


@contextlib.contextmanager
def without_report() -> Iterator[None]:
    """Within the block, loads on this thread log no table of weights that are missing or left over, nor that a head is
    not the table of tokens, as the configuration says that it is: transformers makes that of any T5's.
    """
    loading = threading.get_ident()

    def goes_on(record: logging.LogRecord) -> bool:
        return record.thread != loading or not any(report in record.getMessage() for report in _REPORTS)

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(goes_on)
    try:
        yield
    finally:
        logger.removeFilter(goes_on)


def loaded(kind: Any, source: Path | Mapping[str, Any], **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """A model of transformers', and what that says of its weights.

    Args:
        kind: Its class.
        source: Where its weights are, or what stands for them.
        arguments: Further ones of `from_pretrained`.

    Raises:
        RuntimeError: They cannot be put together, or do not fit into memory.
    """
    path, state = (source, None) if isinstance(source, Path) else (None, source)
    with BUILDING, without_report():
        model, report = kind.from_pretrained(
            path,
            state_dict=state,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # what they are is said below
            **arguments,
        )
    return model, report


def check_weights(checkpoint: Any, report: Mapping[str, Any], spared: Collection[str] = ()) -> None:
    """Refuses weights that are not those of a model; transformers would make up what is missing.

    Args:
        checkpoint: Where they are stored, an `asyncengine.model.checkpoint.Checkpoint`.
        report: What transformers says of them.
        spared: Names of modules whose weights may be missing.

    Raises:
        CheckpointError: As it says.
    """
    missing = (name for name in report["missing_keys"] if name.rpartition(".")[0] not in spared)
    _refuse(checkpoint, missing, (name for name, *_ in report["mismatched_keys"]))
    if checkpoint.complete and (left := sorted(report["unexpected_keys"])):
        raise CheckpointError(f"{checkpoint.name}: its model has no use for {len(left)} weights: {left[0]}, ...")


def head_of(model: Any) -> set[str]:
    """Names of the module that is a model's head: models of embeddings are published without its weights."""
    head = model.get_output_embeddings()
    return {name for name, module in model.named_modules() if module is head}


def check_experts(checkpoint: Any) -> None:
    """Refuses experts that transformers cannot put together, of which it says too little.

    Raises:
        CheckpointError: One of a layer's has weights that another has not, or of other shapes.
    """
    missing, other = [], []
    for layer, parts in experts_of(checkpoint.shapes).items():
        numbers = set().union(*parts.values())
        for part, shapes in parts.items():
            names = {number: f"{layer}.experts.{number}.{part}.weight" for number in numbers}
            missing += [name for number, name in names.items() if number not in shapes]
            [(of_most, _)] = Counter(shapes.values()).most_common(1)
            other += [names[number] for number, shape in shapes.items() if shape != of_most]
    _refuse(checkpoint, missing, other)


def cannot_load(checkpoint: Any, error: Exception) -> CheckpointError:
    """What there is to be said of weights that transformers could not put together."""
    try:
        checkpoint.check_unchanged()
        check_experts(checkpoint)
    except CheckpointError as found:
        return found
    return CheckpointError(f"{checkpoint.name}: transformers cannot load its weights: {error}")


def _refuse(checkpoint: Any, missing: Iterator[str] | Collection[str], other: Iterator[str] | Collection[str]) -> None:
    if names := sorted(missing):
        raise CheckpointError(f"{checkpoint.name}: {len(names)} weights are missing: {names[0]}, ...")
    if names := sorted(other):
        raise CheckpointError(f"{checkpoint.name}: {len(names)} weights are of another shape: {names[0]}, ...")
