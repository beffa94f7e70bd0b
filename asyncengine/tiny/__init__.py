"""The embedded chat model: one million parameters trained here from generated text, so that nothing is downloaded.

`PATH` is an ordinary checkpoint directory; ``python -m asyncengine.tiny.train`` made it. Importing this package loads
neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["PATH"]

PATH = Path(__file__).resolve().parent / "checkpoint"
