"""Several processes that train one model together: which is the first, and what they agree on."""

from collections.abc import Callable
from typing import Any

import numpy as np

# Bytes of an error that the other processes are told.
LONGEST_ERROR = 1000


class ProcessEndedError(ValueError):
    """A process that takes part in the training has ended, or cannot be reached."""


def count() -> int:
    """How many processes there are; 1 before JAX knows."""
    import jax

    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the first, which writes and speaks for all."""
    import jax

    return count() == 1 or jax.process_index() == 0


def wait_for_all() -> None:
    """Returns when all processes are here."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("wait")


def any_of_all(value: bool) -> bool:
    """Whether the value is true in any process."""
    return value if count() == 1 else bool(_gather(np.asarray(value)).any())


def on_first(function: Callable[[], Any]) -> None:
    """Calls a function in the first process, while the others wait.

    Raises:
      Exception: what the function raises; in the other processes, an error of the same kind with the same text.
    """
    if count() == 1:
        function()
        return
    error: Exception | None = None
    if is_first():
        try:
            function()
        except Exception as raised:  # whatever it is, the others wait to hear of it
            error = raised
    text = "" if error is None else str(error) or type(error).__name__
    told = _gather(np.frombuffer(text.encode()[:LONGEST_ERROR].ljust(LONGEST_ERROR, b"\0"), np.uint8))[0]
    if error is not None:
        raise error
    if told.any():
        raise ValueError(bytes(told).rstrip(b"\0").decode(errors="replace"))


def _gather(value: np.ndarray) -> np.ndarray:
    """The values of all processes, one behind the other along a new first axis."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(value, tiled=False)).reshape(count(), *value.shape)
