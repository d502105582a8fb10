"""Writing files whole or not at all."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from models.config import SELECTION


def write_bytes(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Has ``write`` fill a file; an interrupted write leaves what was there before."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            write(file)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path``, see :func:`write_bytes`."""
    write_bytes(path, lambda file: file.write(text.encode("utf-8")))


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, see :func:`write_bytes`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_history(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a ``history.jsonl``."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def curve(history: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """Points (epoch, validation NDCG@10) of a history."""
    return [(record["epoch"], record["validation"][SELECTION]) for record in history if "validation" in record]


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
