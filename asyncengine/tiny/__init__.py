"""The embedded chat model: one million parameters trained here from generated text, so that nothing is downloaded.

`PATH` is an ordinary checkpoint directory; ``python -m asyncengine.tiny.train`` made it. Importing this package loads
neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["DRAFT_PATH", "EAGLE_PATH", "PATH"]

PATH = Path(__file__).resolve().parent / "checkpoint"

DRAFT_PATH = Path(__file__).resolve().parent / "draft"
"""A smaller one with the same tokens, which drafts for it: ``python -m asyncengine.tiny.train --draft`` made it."""

EAGLE_PATH = Path(__file__).resolve().parent / "eagle3"
"""A head that drafts from its hidden states: ``python -m asyncengine.tiny.train_head`` made it."""
