"""Keeps transformers' report of a load from being printed: what matters of it is an error here, and says so."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

_REPORT = " LOAD REPORT"


@contextlib.contextmanager
def without_report() -> Iterator[None]:
    """Within the block, loads on this thread log no table of weights that are missing or left over."""
    loading = threading.get_ident()

    def goes_on(record: logging.LogRecord) -> bool:
        return record.thread != loading or _REPORT not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(goes_on)
    try:
        yield
    finally:
        logger.removeFilter(goes_on)


def cannot_load(error: Exception) -> str:
    """Why transformers cannot load weights, in words: of shapes, its own refer to the report."""
    if "ignore_mismatched_sizes" in str(error):
        return "transformers cannot load its weights: some are of another shape than config.json says"
    return f"transformers cannot load its weights: {error}"
