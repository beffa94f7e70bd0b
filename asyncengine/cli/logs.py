"""What ``asyncengine serve`` writes to standard error: lines for people, or one JSON object each for programs."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}
"""What every record has; the rest is what the one who logged has added."""


class JsonLines(logging.Formatter):
    """A record as one JSON object: time, level, logger, message, whatever was given as ``extra``, and the exception."""

    def format(self, record: logging.LogRecord) -> str:
        """As `logging.Formatter`."""
        values: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        values |= {name: value for name, value in vars(record).items() if name not in _PLAIN}
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False, default=str)


def log_to_stderr(form: LogFormat) -> None:
    """Sets the process's logging up."""
    handler = logging.StreamHandler(sys.stderr)
    lines = JsonLines() if form == "json" else logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
    handler.setFormatter(lines)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
