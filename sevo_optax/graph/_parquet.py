"""Graphs from edges that an SQL engine has written to parquet files."""

import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import scipy.sparse
from jax.experimental import sparse as jsparse

from sevo_optax._shards import Ranges, Shards
from sevo_optax._weights import (
    check_choice,
    check_ids,
    check_num_nodes,
    check_positive_int,
    check_weights,
    raw_bcoo,
)
from sevo_optax.graph import _matrices
from sevo_optax.graph._matrices import SYMMETRIZE, Sum, both_ways, directed_csr, mirror

COOCCURRENCE_SQL = """\
WITH ranked AS (                               -- one row of `interactions` is one event:
  SELECT user_id, item_id,                     -- user_id, item_id (integers), and a position
         ROW_NUMBER() OVER (                   -- (or a time) that orders the events of a user
           PARTITION BY user_id
           ORDER BY position DESC              -- DESC: the last K events, ASC: the first K
         ) AS place
  FROM interactions
),
kept AS (
  SELECT user_id, item_id, place
  FROM ranked
  WHERE place <= 200                           -- K, the maximum sequence length
),
hops AS (
  SELECT DISTINCT place AS hop
  FROM kept
  WHERE place <= 1                             -- H, the maximum path length
)
SELECT a.item_id AS source,
       b.item_id AS target,
       SUM(1.0e0 / hops.hop) AS weight         -- by distance; SUM(1.0e0) is by frequency
FROM kept AS a
CROSS JOIN hops
JOIN kept AS b ON b.user_id = a.user_id AND b.place = a.place + hops.hop
GROUP BY a.item_id, b.item_id
"""
"""The edges of Algorithm 4 in portable SQL, one row for each ordered pair of items.

:func:`from_parquet` (or :func:`from_edges`) with ``symmetrize="sum"`` turns them into the weights :func:`cooccurrence`
returns. Break ties of ``position``, or the engine orders equal ones as it likes. The join is on
equality only, so its cost grows with interactions times H, not with the square of a sequence.
"""


@overload
def from_parquet(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    num_nodes: int,
    source: str = ...,
    target: str = ...,
    weight: str | None = ...,
    symmetrize: Literal["sum", "mean", "max", "min"] = ...,
    num_shards: None = ...,
) -> jsparse.BCOO: ...
@overload
def from_parquet(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    num_nodes: int,
    source: str = ...,
    target: str = ...,
    weight: str | None = ...,
    symmetrize: Literal["sum", "mean", "max", "min"] = ...,
    num_shards: int,
) -> Shards: ...
def from_parquet(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    num_nodes: int,
    source: str = "source",
    target: str = "target",
    weight: str | None = "weight",
    symmetrize: Literal["sum", "mean", "max", "min"] = "sum",
    num_shards: int | None = None,
) -> jsparse.BCOO | Shards:
    """Makes symmetric weights from edges in parquet files, such as an SQL engine writes.

    Equals :func:`from_edges` on the three columns, but reads the files piece by piece, so that memory is
    bounded by the distinct edges. Needs pyarrow or polars. The result of ``COOCCURRENCE_SQL`` is read
    with the defaults.

    With ``num_shards``, nothing is read yet. What comes back is a sequence of rows for
    :func:`sevo` with ``graph_sharding``: each shard is read by itself, in one pass over the files that keeps the edges
    that begin or end there, so that memory is bounded by the distinct edges of one shard and one chunk of rows. While
    :func:`sevo` prepares the graph, it holds 8 bytes a node more, for the degrees, and reads each shard twice, or once
    if a process has one. On several processes, each reads the shards of its own devices alone.

    Args:
      path: a parquet file, a directory (all ``*.parquet`` below it) or a list of files.
      num_nodes: number of nodes.
      source: name of the column of source node ids, integers in 0..num_nodes-1.
      target: name of the column of target node ids.
      weight: name of the column of finite, non-negative weights; None weighs every row 1.
      symmetrize: as for :func:`from_edges`.
      num_shards: None: the whole graph. Or over how many devices its rows are split.

    Returns:
      Raw symmetric weights, BCOO float32 of shape (num_nodes, num_nodes); with ``num_shards`` a :class:`Shards`,
      whose reading raises what is listed here for the contents of files.

    Raises:
      FileNotFoundError: if there is no such file, or a directory holds no parquet file.
      ImportError: if neither pyarrow nor polars is installed.
      TypeError: if ids are not integers or weights not real numbers.
      ValueError: if a column is missing or holds nulls, or as for :func:`from_edges`.

    Examples:
      >>> import tempfile
      >>> import pyarrow
      >>> import pyarrow.parquet
      >>> from sevo_optax import graph
      >>> edges = pyarrow.table({"source": [0, 1], "target": [1, 2], "weight": [1.0, 0.5]})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     pyarrow.parquet.write_table(edges, f"{folder}/edges.parquet")
      ...     graph.from_parquet(folder, num_nodes=3).todense()
      Array([[0. , 1. , 0. ],
             [1. , 0. , 0.5],
             [0. , 0.5, 0. ]], dtype=float32)

      Two rows at a time:

      >>> with tempfile.TemporaryDirectory() as folder:
      ...     pyarrow.parquet.write_table(edges, f"{folder}/edges.parquet")
      ...     for rows in graph.from_parquet(folder, num_nodes=3, num_shards=2):
      ...         print(rows.toarray())
      [[0.  1.  0. ]
       [1.  0.  0.5]]
      [[0.  0.5 0. ]]
    """
    num_nodes = check_num_nodes(num_nodes)
    check_choice(symmetrize, SYMMETRIZE, "symmetrize")
    files = _parquet_files(path)

    def edges(chunk: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        return _edges(path, files, num_nodes, source, target, weight, max(_matrices.CHUNK, chunk))

    if num_shards is None:
        # Each partial sum has a row pointer for every node: chunks no smaller keep the time linear.
        summed = Sum(num_nodes)
        for sources, targets, weights in edges(num_nodes):
            summed.add(directed_csr(sources, targets, weights, num_nodes))
        return raw_bcoo(mirror(summed.total(), symmetrize))
    num_shards = check_positive_int(num_shards, "num_shards")

    def read(ranges: Ranges) -> scipy.sparse.csr_array:
        num_rows = sum(stop - start for start, stop in ranges)
        sums = Sum(num_nodes, num_rows), Sum(num_nodes, num_rows)
        for sources, targets, weights in edges(num_rows):
            for summed, begins, ends in zip(sums, (sources, targets), (targets, sources), strict=True):
                row = _row_of(begins, ranges)
                kept = np.flatnonzero(row >= 0)
                some = None if weights is None else weights[kept]
                summed.add(directed_csr(row[kept], ends[kept], some, num_nodes, num_rows))
        return both_ways(sums[0].total(), sums[1].total(), symmetrize)

    return Shards(read, num_nodes, num_shards)


def _row_of(nodes: np.ndarray, ranges: Ranges) -> np.ndarray:
    """The position of each node in the ranges one after the other, or -1."""
    row = np.full(nodes.shape, -1, np.int32)
    base = 0
    for start, stop in ranges:
        inside = (nodes >= start) & (nodes < stop)
        row[inside] = nodes[inside].astype(np.int64) - (start - base)
        base += stop - start
    return row


def _edges(
    path: Any,
    files: Sequence[Path],
    num_nodes: int,
    source: str,
    target: str,
    weight: str | None,
    chunk: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Yields the checked edges of all files, at most ``chunk`` at a time."""
    columns = [source, target] + ([] if weight is None else [weight])
    seen = 0
    for file in files:
        row = 0
        for sources, targets, *rest in _parquet_pieces(file, columns, chunk):
            place = f"{file}: column "
            sources = check_ids(sources, num_nodes, f"{place}{source!r}", "num_nodes", row)
            targets = check_ids(targets, num_nodes, f"{place}{target!r}", "num_nodes", row)
            weights = None
            if rest:
                weights = check_weights(rest[0], sources.size, f"{place}{weight!r}", row)
            yield sources, targets, weights
            row += sources.size
        seen += row
    if not seen:
        raise ValueError(f"{path} holds no rows; wanted at least one edge.")


def _parquet_files(path: Any) -> list[Path]:
    if not isinstance(path, str | os.PathLike):
        if not isinstance(path, Iterable):
            raise TypeError(f"path is {path!r}; wanted a parquet file, a folder or a list of files.")
        return [file for one in path for file in _parquet_files(os.fspath(one))]
    path = Path(path)
    files = [path]
    if path.is_dir():
        inside = sorted(path.rglob("*.parquet"))
        # Folders may be called so, too; and what a job has not finished lies in folders such as _temporary.
        files = [x for x in inside if x.is_file() and not any(y[0] in "_." for y in x.relative_to(path).parts)]
    if not files:
        raise FileNotFoundError(f"{path} holds no *.parquet file; wanted a file or a folder of some.")
    return files


def _parquet_pieces(file: Path, columns: Sequence[str], size: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields the columns of at most ``size`` rows at a time."""
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; wanted a parquet file or a folder of some.")
    if importlib.util.find_spec("pyarrow") is not None:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(file) as table:
            _check_columns(file, columns, table.schema_arrow.names)
            for batch in table.iter_batches(size, columns=list(columns)):
                series = [batch.column(name) for name in columns]
                nulls = [s.null_count for s in series]
                _check_nulls(file, columns, nulls)
                yield tuple(s.to_numpy(zero_copy_only=False) for s in series)
    elif importlib.util.find_spec("polars") is not None:
        import polars

        table = polars.scan_parquet(file)
        _check_columns(file, columns, table.collect_schema().names())
        height = table.select(polars.len()).collect().item()
        for begin in range(0, height, size):
            frame = table.select(columns).slice(begin, size).collect()
            series = [frame[name] for name in columns]
            _check_nulls(file, columns, [s.null_count() for s in series])
            yield tuple(s.to_numpy() for s in series)
    else:
        raise ImportError("reading parquet needs pyarrow or polars: pip install pyarrow")


def _check_columns(file: Path, wanted: Sequence[str], names: Sequence[str]) -> None:
    for name in wanted:
        if name not in names:
            raise ValueError(
                f"{file} has no column {name!r}, only {', '.join(map(repr, names))}. Name the columns "
                "with source=, target= and weight= (weight=None weighs every row 1)."
            )


def _check_nulls(file: Path, columns: Sequence[str], nulls: Sequence[int]) -> None:
    for name, count in zip(columns, nulls, strict=True):
        if count:
            raise ValueError(
                f"{file}: column {name!r} holds nulls; wanted a value in every row. "
                "Filter them out in the query that wrote the file."
            )
