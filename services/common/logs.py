"""Logs. Owns: the one format of all services, and which names ids have in it.

JSON lines on standard error, coloured text where that is a terminal. Events are named
`noun.past_participle`; ids are always `request_id worker_id gateway_id model revision`. One canonical
line per RPC comes from `interceptors`; little else is logged above DEBUG. Prompts, outputs, tokens and
secrets never are.
"""

from __future__ import annotations

import contextvars
import logging
import sys
from typing import Any

import structlog

# Locals of a frame may be prompts or secrets; a traceback without them says enough.
_TRACEBACKS = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)

_process = contextvars.Context()

Logger = structlog.stdlib.BoundLogger


def configure(service: str, instance: str, *, level: str = "info") -> None:
    """Sets the format for this process; `service` and `instance` stand on every line."""
    human = sys.stderr.isatty()
    renderer: Any = (
        structlog.dev.ConsoleRenderer() if human else structlog.processors.JSONRenderer(sort_keys=False)
    )
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True, key="timestamp")
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            stamp,
            structlog.processors.StackInfoRenderer(),
            *([] if human else [_TRACEBACKS]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service, instance=instance)
    _process.run(structlog.contextvars.bind_contextvars, service=service, instance=instance)


def process_context() -> contextvars.Context:
    """A context with the process's own fields alone, for tasks that outlive the call that starts them."""
    return _process.copy()


def get_logger() -> Logger:
    """The logger of this process."""
    logger: Logger = structlog.get_logger()
    return logger


def annotate(**fields: object) -> None:
    """Adds fields to every later line of the current task, its canonical line included."""
    structlog.contextvars.bind_contextvars(**fields)
