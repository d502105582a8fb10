"""Fetching and unpacking files: whole or not at all, and nowhere but in their folder."""

import contextlib
import gzip
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

from tqdm import tqdm

from models.files import writing

# pooch is imported where it is used: most data is on this machine already.

CACHE_VARIABLE = "SEVO_OPTAX_CACHE"
TIMEOUT = 30.0
CHUNK_SIZE = 1 << 16
# Without the second, some servers would compress what is compressed already.
HEADERS = {"User-Agent": "sevo-optax", "Accept-Encoding": "identity"}


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Where downloads are kept.

    Args:
      folder: this folder; None: what the environment variable ``SEVO_OPTAX_CACHE`` says, or else ``sevo-optax`` where
        the platform keeps the user's caches (``XDG_CACHE_HOME`` on Linux).
    """
    folder = folder or os.environ.get(CACHE_VARIABLE)
    if folder:
        return Path(folder).expanduser()
    import pooch

    return pooch.os_cache("sevo-optax")


def download(url: str, path: Path, *, md5: str | None = None, timeout: float = TIMEOUT) -> None:
    """Downloads a file with a progress bar. It appears at ``path`` complete and checked, or not at all.

    Args:
      url: from where.
      path: to where; the folder is made.
      md5: the publisher's digest, in hexadecimal; None: checked are the length, if the server tells it, and the check
        sums inside a gzip file.
      timeout: seconds without any data after which to give up.

    Raises:
      FileNotFoundError: if it cannot be fetched, with the reason and where to put the file instead.
      ValueError: if what came is not what was published.
      OSError: if it cannot be written.
    """
    import pooch
    import requests

    by_hand = f"download it by other means and put it at {path}"
    with _writing(path) as file:
        try:
            with contextlib.ExitStack() as stack:
                silent = bool(os.environ.get("TQDM_DISABLE"))  # tqdm itself has read it when it was imported
                options = {"unit": "B", "unit_scale": True, "dynamic_ncols": True, "delay": 0.5, "disable": silent}
                bar = _Bar(desc=path.name, total=1, **options)

                def close_later(response: requests.Response, **_: Any) -> None:
                    stack.callback(response.close)

                options = {"timeout": timeout, "headers": HEADERS, "hooks": {"response": close_later}}
                pooch.HTTPDownloader(stack.enter_context(bar), CHUNK_SIZE, **options)(url, file, None)
        except requests.RequestException as error:
            raise FileNotFoundError(f"cannot download {url} ({_reason(error, timeout)}); {by_hand}") from None
        file.flush()
        if md5 is not None:
            check_md5(Path(file.name), md5, what=url, advice=f"it was not kept; try again, or {by_hand}")
        elif path.suffix == ".gz":
            _check_gzip(Path(file.name), url, by_hand)


class _Bar(tqdm):
    """A progress bar that keeps its time when pooch fills it at the end."""

    def reset(self, total: float | None = None) -> None:
        self.n = self.last_print_n = 0


def _reason(error: BaseException, timeout: float) -> str:
    """The first cause of a failed request, in few words."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code} {response.reason}"
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    if isinstance(error, TimeoutError):
        return f"no answer for {timeout:g} s"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def check_md5(path: Path, md5: str, *, what: str, advice: str) -> None:
    """Compares a file with its publisher's digest.

    Raises:
      ValueError: if they differ; ``what`` names the file, ``advice`` tells the way out.
    """
    import pooch

    found = pooch.file_hash(str(path), alg="md5")
    if found != md5:
        raise ValueError(f"{what} has the MD5 digest {found}, but its publisher gives {md5}; {advice}")


def _check_gzip(path: Path, url: str, by_hand: str) -> None:
    try:
        with gzip.open(path) as file:
            while file.read(1 << 20):
                pass
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{url} came damaged ({error}); it was not kept; try again, or {by_hand}") from None


def extract(archive: Path, folder: Path) -> None:
    """Unpacks the folder of that name from a zip archive, which then appears as ``folder``, complete or not at all.

    Args:
      archive: a zip file with a folder called ``folder.name`` at its top.
      folder: to where; must not exist yet.

    Raises:
      ValueError: if the archive is damaged, has no such folder, or an entry would end up outside.
      FileExistsError: if the folder is there already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already, but lacks files; move it away to unpack {archive} again")
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with _advising(folder), zipfile.ZipFile(archive) as file:
            for entry in file.infolist():
                _check_inside(archive, entry)
            file.extractall(partial)
            if not (partial / folder.name).is_dir():
                raise ValueError(f"{archive} holds no folder {folder.name!r}; delete it to fetch it again")
            try:
                os.rename(partial / folder.name, folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was faster
                    raise
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{archive} is damaged ({error}); delete it to fetch it again") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_inside(archive: Path, entry: zipfile.ZipInfo) -> None:
    """Refuses an entry that is a link or leads out of the folder, on any system."""
    name = entry.filename
    parts = PurePosixPath(name).parts + PureWindowsPath(name).parts
    leads_out = ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor
    if leads_out or stat.S_ISLNK(entry.external_attr >> 16):
        raise ValueError(f"{archive} holds {name!r}, which leads out of its folder; nothing was unpacked")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears at ``path`` when all has gone well, and leaves nothing otherwise."""
    with _advising(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path) as file:
            yield file


@contextlib.contextmanager
def _advising(path: Path) -> Iterator[None]:
    """Tells the way out when the disk is full or closed."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # says all there is to say already
            raise
        raise OSError(
            f"cannot write {path} ({error.strerror}); give another folder with --cache-dir or {CACHE_VARIABLE}"
        ) from None
