"""Reading interaction data: the one way in, whatever the file."""

import os
from pathlib import Path
from typing import get_args

import numpy as np

from models.config import DataFormat, Duplicates
from models.data.filters import drop_duplicates, k_core
from models.data.interactions import Interactions
from models.data.named import NAMED, fetch_named
from models.data.synthetic import drifting_interests
from models.data.tables import TableFormat, read_bytes, read_table

# Suffix (before .gz) -> format.
SUFFIXES: dict[str, DataFormat] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".data": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".inter": "inter",
    ".dat": "dat",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".txt": "s3rec",
}
SPARSE = 1_000_000
HEADLESS = ".data"  # ml-100k's u.data has no header


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    data_format: DataFormat = "auto",
    user_column: str | None = None,
    item_column: str | None = None,
    time_column: str | None = None,
    header: bool = True,
    duplicates: Duplicates = "all",
    min_user_interactions: int = 0,
    min_item_interactions: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Interactions:
    """Reads interaction data and filters it.

    Repetitions go first, then users and items with too few interactions.

    Args:
      path: a file, or the name of a public data set, see :data:`models.data.named.NAMED`, which is fetched the first
        time (a file of that name wins); None: the embedded data.
      data_format: how the file is written. ``auto`` goes by its suffix: ``.csv``, ``.tsv``, ``.parquet`` and ``.pq``,
        ``.inter`` (RecBole), ``.dat`` (MovieLens), ``.data`` (ml-100k's u.data: a tsv without a header), ``.json``,
        ``.jsonl`` and ``.ndjson`` (one object a line, as Amazon's reviews), ``.txt`` (S3-Rec, see
        :func:`read_sequences`); ``.gz`` may follow.
      user_column: see :func:`models.data.tables.read_table`.
      item_column: as above.
      time_column: as above.
      header: as above.
      duplicates: see :func:`models.data.filters.drop_duplicates`.
      min_user_interactions: see :func:`models.data.filters.k_core`.
      min_item_interactions: as above.
      cache_dir: where public data sets are kept; None: see :func:`models.data.download.cache_folder`.

    Returns:
      The interactions. Their ``notes`` tell where the order is from and what was left out.

    Raises:
      FileNotFoundError: if there is no such file, or a public data set can be fetched neither.
      ValueError: if the file does not fit its format or an option; the message names the place and the way out.
    """
    columns = {"user_column": user_column, "item_column": item_column, "time_column": time_column}
    interactions = drifting_interests() if path is None else _read(Path(path), data_format, columns, header, cache_dir)
    interactions = drop_duplicates(interactions, duplicates)
    return k_core(
        interactions,
        min_user_interactions=min_user_interactions,
        min_item_interactions=min_item_interactions,
    )


def _read(
    path: Path,
    data_format: DataFormat,
    columns: dict[str, str | None],
    header: bool,
    cache_dir: str | os.PathLike[str] | None,
) -> Interactions:
    named = NAMED.get(str(path)) if not path.is_file() else None
    if named is not None:
        path = fetch_named(str(path), cache_dir)
    _check_exists(path)
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if data_format == "auto":
        data_format = SUFFIXES.get(suffix, "auto")
    if data_format not in get_args(DataFormat)[1:]:
        raise ValueError(
            f"data: the suffix of {path} says nothing of its format; rename it to one of {', '.join(SUFFIXES)} "
            f"or give --data-format {{{','.join(get_args(DataFormat)[1:])}}}"
        )
    if data_format == "s3rec":
        given = [name for name, column in columns.items() if column is not None]
        if given:
            raise ValueError(f"{given[0]}: {path} is read as S3-Rec text, which has no columns; give a --data-format")
        return read_sequences(path)
    table_format: TableFormat = data_format
    interactions = read_table(path, table_format, **columns, header=header and suffix != HEADLESS)
    if named is not None and len(interactions) != named.num_interactions:
        raise ValueError(
            f"data: {path} holds {len(interactions):,} interactions, but its publisher counts "
            f"{named.num_interactions:,}; delete it to fetch it again, or give it by its path to use it as it is"
        )
    return interactions


def _check_exists(path: Path) -> None:
    """Fails unless there is such a file."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"data: {path} {what}; give a file of interactions ({', '.join(SUFFIXES)}) or one of {', '.join(NAMED)}"
        )


def read_sequences(path: str | os.PathLike[str]) -> Interactions:
    """Reads the S3-Rec text format: one user a line, ``user item item …``, oldest item first, integer ids from 1.

    The ids are the item numbers as they are: the catalogue reaches to the largest one.

    Args:
      path: the file, possibly compressed with gzip.

    Returns:
      The interactions, users in the order of the lines.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is empty or not text, or a line does not fit the format; the message names the line.
    """
    path = Path(path)
    _check_exists(path)
    sequences: list[np.ndarray] = []
    line_of: dict[int, int] = {}
    for number, line in enumerate(read_bytes(path).decode().splitlines(), start=1):
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
    _check_dense(path, np.concatenate(sequences))
    return Interactions.from_sequences(sequences, user_ids=list(line_of)).noting("in the order of each line")


def _check_dense(path: Path, items: np.ndarray) -> None:
    """Refuses ids that are far from numbers: there is a row of every table for each number up to the largest."""
    if items.max() > SPARSE and items.max() > 100 * (occurring := len(np.unique(items))):
        raise ValueError(
            f"data: {path}: the item ids reach to {items.max()}, but only {occurring} occur; number the items from 1, "
            "or write one interaction a line (.tsv), where ids may be anything"
        )
