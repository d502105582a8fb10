"""Reading interaction data: the one way in, whatever the file."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from models.checks import shortened
from models.config import DataFormat, Duplicates
from models.data.filters import drop_duplicates, k_core
from models.data.interactions import Interactions
from models.data.named import NAMED, fetch_named
from models.data.rows import interactions_of
from models.data.synthetic import drifting_interests
from models.data.tables import TABLE_SUFFIXES, Source, open_table, suffix_of

# Suffix (before .gz) -> format.
SUFFIXES: dict[str, DataFormat] = TABLE_SUFFIXES | {".txt": "s3rec"}
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
    rating_column: str | None = None,
    min_rating: float | None = None,
    where: Sequence[str] = (),
    duplicates: Duplicates = "all",
    min_user_interactions: int = 0,
    min_item_interactions: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Interactions:
    """Reads interaction data and filters it.

    Rows go first that do not fit ``where`` and ``min_rating``, then repetitions, then users and items with too few
    interactions.

    Args:
      path: a file or a pipe, or the name of a public data set, see :data:`models.data.named.NAMED`, which is fetched
        the first time (a file of that name wins); None: the embedded data.
      data_format: how the file is written. ``auto`` goes by its suffix: ``.csv``, ``.tsv``, ``.parquet`` and ``.pq``,
        ``.inter`` (RecBole), ``.dat`` (MovieLens), ``.data`` (ml-100k's u.data: a tsv without a header), ``.json``,
        ``.jsonl`` and ``.ndjson`` (one object a line, as Amazon's reviews), ``.txt`` (S3-Rec, see
        :func:`read_sequences`); ``.gz`` may follow.
      user_column: see :func:`models.data.rows.interactions_of`.
      item_column: as above.
      time_column: as above.
      header: whether the first line of csv or tsv names the columns; if not, they are called 1, 2, 3 ….
      rating_column: see :func:`models.data.rows.interactions_of`.
      min_rating: as above.
      where: as above.
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
    options = {"user_column": user_column, "item_column": item_column, "time_column": time_column}
    options |= {"rating_column": rating_column, "min_rating": min_rating, "where": tuple(where) or None}
    options = {name: value for name, value in options.items() if value is not None}
    if path is None:
        _check_no_columns(options, "the embedded data is used")
        interactions = drifting_interests()
    else:
        interactions = _read(Path(path), data_format, options, header, cache_dir)
    interactions = drop_duplicates(interactions, duplicates)
    return k_core(
        interactions,
        min_user_interactions=min_user_interactions,
        min_item_interactions=min_item_interactions,
    )


def _read(
    path: Path,
    data_format: DataFormat,
    options: dict[str, Any],
    header: bool,
    cache_dir: str | os.PathLike[str] | None,
) -> Interactions:
    named = NAMED.get(str(path))
    if named is not None and path.is_file():
        named = None
    if named is not None:
        path = fetch_named(str(path), cache_dir)
    source = _source(path)
    suffix = suffix_of(path)
    if data_format == "auto":
        data_format = SUFFIXES.get(suffix, "auto")
        header = header and suffix != HEADLESS
    if data_format not in get_args(DataFormat)[1:]:
        raise ValueError(
            f"data: the suffix of {path} says nothing of its format; rename it to one of {', '.join(SUFFIXES)} "
            f"or give --data-format {{{','.join(get_args(DataFormat)[1:])}}}"
        )
    if not header and data_format in ("parquet", "json", "s3rec"):
        raise ValueError(f"header is not heeded by {data_format}, which has none, got False; leave it out")
    if data_format == "s3rec":
        _check_no_columns(options, f"{path} is read as S3-Rec text")
        return _sequences(source)
    table = open_table(source, data_format, header=header)
    return interactions_of(table, **options, num_rows=None if named is None else named.num_interactions)


def _source(path: Path) -> Source:
    return Source(path, "data", f"a file of interactions ({', '.join(SUFFIXES)}) or one of {', '.join(NAMED)}")


def _check_no_columns(options: dict[str, Any], why: str) -> None:
    if options:
        raise ValueError(f"{next(iter(options))}: {why}, which has no columns; give a table and its --data-format")


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
    return _sequences(_source(Path(path)))


def _sequences(source: Source) -> Interactions:
    sequences: list[np.ndarray] = []
    line_of: dict[int, int] = {}
    for number, line in enumerate(source.text().split(b"\n"), start=1):
        if not (fields := line.decode().split()):
            continue
        where = f"{source}, line {number}"
        try:
            values = np.array(fields, dtype=np.int64)
        except (ValueError, OverflowError):
            bad = next((field for field in fields if not re.fullmatch(r"[+-]?[0-9]{1,18}", field)), fields[0])
            raise ValueError(f"{where}: {shortened(bad)} is no integer id; the format is 'user item item …'") from None
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
        raise ValueError(f"{source} holds no interactions; the format is one line 'user item item …' a user")
    _check_dense(source, np.concatenate(sequences))
    return Interactions.from_sequences(sequences, user_ids=list(line_of)).with_notes("in the order of each line")


def _check_dense(source: Source, items: np.ndarray) -> None:
    """Refuses ids that are far from numbers: there is a row of every table for each number up to the largest."""
    if items.max() > SPARSE and items.max() > 100 * (occurring := len(np.unique(items))):
        raise ValueError(
            f"{source}: the item ids reach to {items.max()}, but only {occurring} occur; number the items from 1, "
            "or write one interaction a line (.tsv), where ids may be anything"
        )
