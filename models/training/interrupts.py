"""Stopping politely: the first Ctrl-C or SIGTERM waits for a good moment, the second does not."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(Exception):
    """Whoever watches a run has had enough of it; its newest checkpoint is that of the epoch that was watched."""


@contextlib.contextmanager
def stop_gently() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C (or SIGTERM) into an event: to stop when the epoch is over.

    A second SIGTERM ends the process at once, in the middle of a compiled epoch too. A second Ctrl-C raises
    ``KeyboardInterrupt`` as soon as Python can: a notebook survives it. Outside the main thread signals are left alone.

    Yields:
      The event.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    received: list[int] = []
    handled: list[int] = []

    # Python runs this when the compiled code returns, once for all the signals of one kind that came before.
    def handle(number: int, frame: Any) -> None:
        del frame
        handled.append(number)
        asked.set()
        if max(len(handled), len(received)) > 1:
            raise KeyboardInterrupt

    # The system's own handler writes the number of each signal into the socket at once, and compiled code lets other
    # threads run.
    def watch() -> None:
        while byte := reader.recv(1):
            number = byte[0]
            if number not in NUMBERS:
                continue
            received.append(number)
            if len(received) == 1:
                asked.set()
                again = "a second one" if number == signal.SIGTERM else "Ctrl-C again"
                tqdm.write(f"{signal.Signals(number).name}: saving after this epoch; {again} stops at once")
            elif number == signal.SIGTERM:
                for stream in (sys.stdout, sys.stderr):
                    with contextlib.suppress(Exception):
                        stream.flush()
                os._exit(128 + number)

    reader, writer = socket.socketpair()
    writer.setblocking(False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, handle) for number in NUMBERS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor)
        writer.close()
        watcher.join()
        reader.close()
