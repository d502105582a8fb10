"""What is seen of a training run while it goes on: a bar on a terminal, else a line an evaluated epoch."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, Self

from models.config import SELECTION
from models.processes import is_first

# tqdm's own variables, so that processes started from here, and whatever else draws bars, are silent as well.
SILENCE, POSITION = "TQDM_DISABLE", "TQDM_POSITION"


@contextlib.contextmanager
def silent(wanted: bool = True) -> Iterator[None]:
    """Shows no progress inside the block, here and in processes that are started there.

    Args:
      wanted: False: the block changes nothing.
    """
    before = os.environ.get(SILENCE)
    if wanted:
        os.environ[SILENCE] = "1"
    try:
        yield
    finally:
        if wanted and before is None:
            del os.environ[SILENCE]
        elif wanted:
            os.environ[SILENCE] = before


class Progress:
    """The progress of a run, on standard error.

    On a terminal it is a bar, redrawn every epoch. Elsewhere (a file, a pipe) an evaluated epoch is one plain line. The
    first epoch is not timed: most of it is compiling.

    Args:
      name: of what is trained.
      epochs: how many there will be.
      done: how many there are already.

    Examples:
      >>> with silent(), Progress("adamw", epochs=10) as progress:
      ...     progress.epoch(1, loss=1.25, seconds=0.5, tokens=1000)
    """

    def __init__(self, name: str, *, epochs: int, done: int = 0) -> None:
        self._name, self._epochs, self._first = name, epochs, done + 1
        self._after_first: float | None = None
        self._best: float | None = None
        self._first_process = is_first()
        self._silent = bool(os.environ.get(SILENCE)) or not self._first_process
        self._bar: Any = None
        if not self._silent and sys.stderr.isatty():
            from tqdm import tqdm

            # tqdm reads its variables when it is imported; a process that has others beside it sets this one later.
            position = os.environ.get(POSITION)
            line = None if position is None else int(position)
            self._bar = tqdm(total=epochs, initial=done, desc=name, unit="epoch", dynamic_ncols=True, position=line)
            self._bar.set_postfix_str("compiling")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def epoch(
        self,
        number: int,
        *,
        loss: float,
        seconds: float,
        tokens: int,
        validation: float | None = None,
        best: float | None = None,
    ) -> None:
        """Reports an epoch.

        Args:
          number: of the epoch, counted from 1.
          loss: its mean training loss.
          seconds: how long it took to train.
          tokens: how many were trained on.
          validation: NDCG@10 of the validation items; None: they were not evaluated.
          best: the best of these so far.
        """
        now = time.perf_counter()
        if number == self._first:
            self._after_first = now
        self._best = self._best if best is None else best
        if self._silent:
            return
        compiled = number == self._first
        if self._bar is not None:
            parts = [f"loss {loss:.4f}"]
            if not compiled:
                parts.append(f"{tokens / seconds:,.0f} tokens/s")
            if self._best is not None:
                parts.append(f"best {SELECTION} {self._best:.4f}")
            self._bar.set_postfix_str(", ".join(parts))
            self._bar.update()
        elif validation is not None:
            parts = [
                f"epoch {number} of {self._epochs}",
                f"loss {loss:.4f}",
                f"validation {SELECTION} {validation:.4f}",
            ]
            parts.append(f"{seconds:.1f} s with compiling" if compiled else f"{seconds:.2f} s an epoch")
            if not compiled and self._after_first is not None:
                left = (now - self._after_first) / (number - self._first) * (self._epochs - number)
                parts.append(f"{duration(left)} left")
            print(f"{self._name}: {', '.join(parts)}", file=sys.stderr, flush=True)

    def note(self, text: str, *, warning: bool = False) -> None:
        """Says what became of the run, in silence too, and beside the bar; a warning goes to standard error."""
        if not self._first_process:
            return
        file = sys.stderr if warning else sys.stdout
        if self._bar is not None:
            self._bar.write(text, file=file)
        else:
            print(text, file=file, flush=True)


def duration(seconds: float) -> str:
    """A time for readers.

    >>> duration(42), duration(754), duration(9000)
    ('42 s', '12 min 34 s', '2 h 30 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
