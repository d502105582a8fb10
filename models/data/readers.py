"""Reading interaction files."""

from pathlib import Path

import numpy as np

from models.data.interactions import Interactions
from models.data.synthetic import drifting_interests


def load(path: str | Path | None) -> Interactions:
    """Reads a file of sequences, or generates the embedded data if there is no path."""
    return drifting_interests() if path is None else read_sequences(path)


def read_sequences(path: str | Path) -> Interactions:
    """Reads the S3-Rec text format: one user a line, ``user item item …``, oldest item first, integer ids from 1.

    Args:
      path: the file.

    Returns:
      The interactions, users in the order of the lines.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is empty or not text, or a line does not fit the format; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"data: {path} {what}; give a text file with one line 'user item item …' a user")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    sequences: list[np.ndarray] = []
    line_of: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"data: {path}, line {number}"
        try:
            values = np.array(line.split(), dtype=np.int64)
        except (ValueError, OverflowError):
            bad = next(field for field in line.split() if not field.lstrip("+-").isdigit() or len(field) > 18)
            raise ValueError(f"{where}: {bad!r} is no integer id; the format is 'user item item …'") from None
        if len(values) < 2:
            raise ValueError(f"{where}: user {values[0]} has no items; the format is 'user item item …'")
        user, items = int(values[0]), values[1:]
        if items.min() < 1:
            raise ValueError(f"{where}: the item id {items.min()} is smaller than 1; 0 is kept for padding")
        if items.max() >= 2**31 - 1:
            raise ValueError(f"{where}: the item id {items.max()} does not fit 32 bits; number the items from 1")
        if user in line_of:
            raise ValueError(f"{where}: user {user} has a line already, {line_of[user]}; a user has one line")
        line_of[user] = number
        sequences.append(items)
    if not sequences:
        raise ValueError(f"data: {path} holds no interactions; the format is one line 'user item item …' a user")
    return Interactions.from_sequences(sequences)
