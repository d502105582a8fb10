"""What Orbax says while it fails, kept from the terminal: its caller says it in one line."""

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import orbax.checkpoint as ocp

_PACKAGE = str(Path(ocp.__file__).parent)
# These loggers keep their levels: only what comes from Orbax, or from tasks that it forgot, is left out.
_LOGGERS = ("absl", "asyncio")


class _NotOrbax(logging.Filter):
    """Lets everything pass but what Orbax logs, and what asyncio logs about tasks of Orbax and TensorStore."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "asyncio":
            text = record.getMessage()
            return not (_PACKAGE in text or "tensorstore" in text or _passes_orbax(record))
        return not record.pathname.startswith(_PACKAGE)


def _passes_orbax(record: logging.LogRecord) -> bool:
    frame: TracebackType | None = record.exc_info[2] if record.exc_info else None
    while frame is not None:
        if frame.tb_frame.f_code.co_filename.startswith(_PACKAGE):
            return True
        frame = frame.tb_next
    return False


_FILTER = _NotOrbax()


class _NoClosedLoops:
    """Drops what TensorStore says of results that come when Orbax has closed the loop that waited for them."""

    def __init__(self, before: Any) -> None:
        self.before = before

    def __call__(self, unraisable: Any) -> None:
        # TensorStore names no object; asyncio itself always does.
        closed = isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"
        if not (closed and unraisable.object is None):
            self.before(unraisable)


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keeps what Orbax logs off the terminal, and waits for its threads if it fails.

    Orbax raises its first error while its threads still write, and what they find then is logged, or told to
    :func:`sys.unraisablehook`, at any later time. So the filters stay once they are set, and let pass what others say.

    Raises:
      Exception: what the block raises, when nothing of Orbax's writes any more.
    """
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_FILTER)  # once, however often it is added
    before = sys.unraisablehook
    if not isinstance(before, _NoClosedLoops):
        sys.unraisablehook = _NoClosedLoops(before)
    try:
        yield
    except BaseException:
        for thread in threading.enumerate():
            if type(thread).__module__.startswith("orbax."):
                with contextlib.suppress(Exception):  # the thread's own error, which the block has raised already
                    thread.join(60)
        raise
    else:
        if isinstance(sys.unraisablehook, _NoClosedLoops) and sys.unraisablehook.before is before:
            sys.unraisablehook = before  # nothing is left that could come late
