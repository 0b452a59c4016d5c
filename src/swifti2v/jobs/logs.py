"""The log: one format for the service, its workers and the app, a line of JSON each on standard error."""

from __future__ import annotations

import json
import logging
from typing import Any

REQUEST_FIELDS = ("request_id", "method", "path", "status", "milliseconds", "key", "bytes_in")
"""What the record of a request has beside its message."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        line: dict[str, Any] = {"time": round(record.created, 3), "level": record.levelname, "logger": record.name}
        line["message"] = record.getMessage()
        line |= {name: getattr(record, name) for name in REQUEST_FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


_LIBRARIES = ("diffusers", "transformers", "transformers.utils.import_utils")
_ENDED_STREAM = "ASGI callable returned without completing response."


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Leave out what uvicorn calls an error where a watched video ends early, because its job was cancelled."""
    return record.getMessage() != _ENDED_STREAM


def log_as_json(*, level: int = logging.INFO) -> None:
    """Log to standard error: what this package says from INFO, what others say from `level`, and warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler])
    logging.captureWarnings(capture=True)
    logging.getLogger("swifti2v").setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").addFilter(_is_worth_a_line)
    for name in _LIBRARIES:  # they write lines of another form to standard error, too
        logging.getLogger(name).setLevel(logging.ERROR)
