"""Reading and writing files: whole or not at all, and one process at a time."""

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

# Names of files that are not finished yet, and of the one that a process locks: hidden, and never data of a user's.
PARTIAL = ".partial-"
LOCK = ".lock"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that appears at ``path`` when the block is over, complete and on the disk, or not at all.

    Until then, and if anything goes wrong, what was there before stays. Several processes may write the same file: the
    last one wins. A symbolic link stays one: the file that it names is written. What is no regular file (a device, a
    FIFO, ``/dev/stdout``) stays what it is, and is written to directly.

    Raises:
      OSError: if it cannot be written; it names ``path``.

    Examples:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "file"
      >>> with writing(path) as file:
      ...     _ = file.write(b"all of it")
      >>> path.read_bytes()
      b'all of it'
    """
    temporary = None
    try:
        if _is_special(path):
            with path.open("wb") as file:
                yield file
            return
        target = Path(os.path.realpath(path))
        mode = _mode_to_keep(target)
        temporary = target.with_name(f"{PARTIAL}{os.getpid()}-{secrets.token_hex(4)}")
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            temporary.chmod(mode)
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        # Errors of writing name the temporary file or none; others are not about this file.
        ours = error.filename is None or (temporary is not None and str(error.filename) == str(temporary))
        if error.errno is None or not ours:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Removes files that processes were writing in a folder when they were killed.

    Those of other processes that live on this machine stay. This process writes none there at the moment; a file with
    its number is of an earlier one, as the first process of each container has the same.
    """
    for path in folder.glob(f"{PARTIAL}*"):
        number = path.name.removeprefix(PARTIAL).partition("-")[0]
        if not number.isdecimal() or int(number) == os.getpid() or not _is_alive(int(number)):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is another user's
        pass
    return True


def _is_special(path: Path) -> bool:
    """Whether there is something at ``path`` that is written to, not replaced."""
    place = os.path.abspath(path)
    if place.startswith(("/dev/", "/proc/")) and not place.startswith("/dev/shm/"):
        return True  # /dev/stdout is a regular file where the shell redirects it, and still must not be replaced
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return not stat.S_ISREG(mode)


def _mode_to_keep(target: Path) -> int | None:
    """The permissions of a file that is to be replaced; None: there is none."""
    if not target.exists():
        return None
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    return stat.S_IMODE(target.stat().st_mode)


def _sync_folder(folder: Path) -> None:
    """Makes a new name in a folder last, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_bytes(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Has ``write`` fill a file, see :func:`writing`."""
    with writing(path) as file:
        write(file)


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path``, see :func:`writing`."""
    with writing(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, see :func:`writing`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def append_text(path: Path, text: str) -> None:
    """Adds ``text`` to the end of a file, as a whole or not at all, unless the process is killed.

    Raises:
      OSError: if it cannot be written; it names ``path``.
    """
    try:
        data = text.encode("utf-8")
        with path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(before)  # half of it would spoil what comes behind
                raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def drop_half_line(path: Path) -> None:
    """Cuts off what stands behind the last line's end, if there is such a file: a kill or a full disk left it."""
    with contextlib.suppress(FileNotFoundError), path.open("rb+") as file:
        data = file.read()
        if not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      FileNotFoundError: if there is no such file.
      OSError: if it cannot be read.
      ValueError: if it holds something else; it says what, but not where: callers know what the file is for.
    """
    text = path.read_bytes()
    if not text.strip():
        raise ValueError("it is empty")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:  # of the text or of its encoding
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def check_format(values: Mapping[str, Any], known: int) -> str:
    """Whether a file was written by a later version of this program, whose fields may mean something else.

    Args:
      values: what it holds; ``format`` is a number, and 1 where there is none.
      known: the latest format that this version knows.

    Returns:
      What to say; empty: it is of a known format.

    Raises:
      ValueError: if the format is no number.
    """
    found = values.get("format", 1)
    if type(found) is not int or found < 1:
        raise ValueError(f"its format is {found!r}, not a number")
    if found <= known:
        return ""
    return f"was written by a later version of this program (format {found}; known are those up to {known}): update it"


def make_folder(option: str, folder: Path) -> None:
    """Makes the folder that an option names, so that what cannot be written fails before anything else is done.

    Raises:
      ValueError: if it cannot be made or written to; it names the option.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option}: {folder} cannot be made ({error.strerror}); give another folder") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{option}: {folder} cannot be written to; give another folder")


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process may do what the lock file ``path`` stands for.

    The claim ends with the block, or with the process, however it ends: the system keeps it. The file stays.
    """
    import filelock  # not needed to show the options of a command

    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        mine = False
    else:
        mine = True
    try:
        yield mine
    finally:
        if mine:
            lock.release()
