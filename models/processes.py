"""Several processes that train one model together: how they meet, what they agree on, and what is said if one ends.

The engine is :mod:`jax.distributed`. Where a process ends, the others' collectives fail at once, or JAX's native code
stops them with pages of text: here is one line instead.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from models.config import DeviceOptions

# Bytes of an error that the other processes are told.
LONGEST_ERROR = 1000
# Seconds without a sign of life after which a process counts as ended.
HEARTBEAT_SECONDS = 30
# Exit statuses of the program.
USAGE_ERROR, INTERRUPTED = 2, 130
# Words in the errors of collectives that a process has left, and in JAX's last ones.
LOST = ("Gloo", "coordination", "Connection closed", "heartbeat")
FATAL = "JAX distributed service detected fatal errors"
ENDED = "another of the processes has ended; start all of them again with --resume"
# Runs beside a process, outlives it, and has its native code's last words in one line.
INTERPRETER = f"""
import re, sys
told = False
noise = r"^[IWEF]\\d{{4}} |^\\[Gloo\\]|^\\*\\*\\* |^ +@ |^Additional GRPC|^:?UNKNOWN|^RPC: |^:UN|^$"
for line in sys.stdin:
    if "{FATAL}" in line and not told:
        told = True
        print("error: {ENDED}", file=sys.stderr, flush=True)
    elif not re.search(noise, line) and not told:
        print(line, end="", file=sys.stderr, flush=True)
"""


def join(options: DeviceOptions) -> bool:
    """Joins the other processes, if there are any; before JAX has looked for devices.

    Args:
      options: ``coordinator`` and what belongs to it; what is left out is taken from the environment.

    Returns:
      Whether there are others.

    Raises:
      ValueError: if an option is missing or out of range.
    """
    coordinator = options.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if coordinator is None:
        for name in ("num_processes", "process_id"):
            if getattr(options, name) is not None:
                raise ValueError(f"{name} is not heeded without a coordinator; give --coordinator HOST:PORT")
        if options.join_timeout != DeviceOptions.join_timeout:
            raise ValueError(
                f"join_timeout is not heeded without a coordinator, got {options.join_timeout}; "
                "give --coordinator HOST:PORT"
            )
        return False
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"coordinator must be HOST:PORT, got {coordinator!r}")
    processes = _number("num_processes", options.num_processes, 1)
    process = _number("process_id", options.process_id, 0)
    if process >= processes:
        raise ValueError(f"process_id must be smaller than num_processes, {processes}, got {process}")
    if options.join_timeout < 1:
        raise ValueError(f"join_timeout must be at least 1, got {options.join_timeout}")

    import jax

    _interpret_native_errors()
    what = f"the coordinator {coordinator} was not reached"
    if not process:
        what = f"not all of {processes} processes came to the coordinator {coordinator}"
    late = threading.Timer(options.join_timeout, _give_up, [f"{what} within {options.join_timeout} s"])
    late.daemon = True
    late.start()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        initialization_timeout=options.join_timeout + 60,  # JAX would stop the process without a word for readers
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=HEARTBEAT_SECONDS,
    )
    late.cancel()
    return True


def _number(name: str, value: int | None, least: int) -> int:
    variable = f"JAX_{name.upper()}"
    text = os.environ.get(variable) if value is None else str(value)
    if text is None:
        raise ValueError(f"{name} must be given with a coordinator; give --{name.replace('_', '-')}, or set {variable}")
    if not text.lstrip("-").isdecimal() or int(text) < least:
        raise ValueError(f"{name} must be a number of at least {least}, got {text}")
    return int(text)


def _interpret_native_errors() -> None:
    """Has a small process of its own read what native code writes to standard output and standard error."""
    sys.stdout.flush()
    out, err = os.dup(1), os.dup(2)
    reader = subprocess.Popen([sys.executable, "-c", INTERPRETER], stdin=subprocess.PIPE, stdout=err, stderr=err)
    for descriptor in (1, 2):
        os.dup2(reader.stdin.fileno(), descriptor)
    reader.stdin.close()  # what is open now ends with this process, and the reader with it
    sys.stdout, sys.stderr = (os.fdopen(own, "w", buffering=1, errors="backslashreplace") for own in (out, err))


def _give_up(text: str) -> NoReturn:
    print(f"error: {text}; start all processes with the same --coordinator", file=sys.stderr, flush=True)
    os._exit(USAGE_ERROR)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends the process at once after an error, so that nobody waits for it; all else is said by the first one alone."""
    if num_processes() == 1:
        yield
        return
    try:
        if is_first():
            yield
        else:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                yield
    except BaseException as error:
        status = USAGE_ERROR
        if any(word in str(error) for word in LOST):
            os.write(2, f"{FATAL}\n".encode())  # the interpreter says it, once
        elif isinstance(error, KeyboardInterrupt):
            status = INTERRUPTED
            print(f"\n{str(error) or 'interrupted; what was written so far is kept'}", file=sys.stderr, flush=True)
        elif isinstance(error, (ValueError, TypeError, OSError)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        if is_first():
            time.sleep(2)  # the others have something to say too, and end with the coordinator
        os._exit(status)


def check_same(what: str, digest: str) -> None:
    """Checks that all processes have the same of something.

    Args:
      what: what it is, in words.
      digest: of it, 64 ASCII characters at most.

    Raises:
      ValueError: if a process has another than the first.
    """
    if num_processes() == 1:
        return
    digests = _gather(np.frombuffer(digest.encode().ljust(64, b"\0"), np.uint8))
    others = [process for process in range(num_processes()) if (digests[process] != digests[0]).any()]
    if others:
        raise ValueError(
            f"process {others[0]} has {what} that differ from those of process 0; start all processes with the same"
        )


def program_digest() -> str:
    """A digest of the sources of :mod:`models` and :mod:`sevo_optax`, and of the versions of what computes."""
    import importlib.metadata

    digest = hashlib.sha256()
    for package in ("models", "sevo_optax"):
        (folder,) = importlib.import_module(package).__path__
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.read_bytes())
    for name in ("jax", "jaxlib", "optax", "flax", "numpy"):
        digest.update(importlib.metadata.version(name).encode())
    return digest.hexdigest()


def num_processes() -> int:
    """How many processes there are; 1 before JAX knows."""
    import jax

    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the first, which writes and speaks for all."""
    import jax

    return num_processes() == 1 or jax.process_index() == 0


def wait_for_all() -> None:
    """Returns when all processes are here."""
    if num_processes() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("wait")


def any_of_all(value: bool) -> bool:
    """Whether the value is true in any process."""
    return value if num_processes() == 1 else bool(_gather(np.asarray(value)).any())


def on_first(function: Callable[[], Any]) -> None:
    """Calls a function in the first process, while the others wait.

    Raises:
      Exception: what the function raises; in the other processes, a :class:`ValueError` with the same text.
    """
    if num_processes() == 1:
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

    return np.asarray(multihost_utils.process_allgather(value, tiled=False)).reshape(num_processes(), *value.shape)
