"""Rows of a graph that one device, or one host, cannot hold: read one shard at a time, split over devices.

A shard needs rows of the table that others own. Which ones is known before the first step, and, because the matrix is
symmetric, to both sides: what shard ``p`` needs of ``q`` are the rows of ``q`` with an entry in a column of ``p``. So
every shard plans its exchange from its own rows, and no list of rows is ever sent.
"""

import operator
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np
import scipy.sparse

Ranges = Sequence[tuple[int, int]]


class ShardSummary(NamedTuple):
    """What splitting a graph costs each device, see :meth:`Shards.summary`.

    Attributes:
      num_shards: into how many shards the graph is split.
      rows: rows of the table a device, the last ones padded.
      entries: stored entries of the fullest shard. All devices reserve as many.
      largest_share: ``entries`` over the mean of all shards; 1 where all are equally full.
      exchanged: :math:`H`, the most rows that one shard needs of one other.
    """

    num_shards: int
    rows: int
    entries: int
    largest_share: float
    exchanged: int

    def bytes_per_layer(self, dim: int, itemsize: int = 4) -> int:
        """Bytes that a device sends, and receives, in one layer: :math:`(N-1) H d b`.

        Args:
          dim: :math:`d`, columns of the table a device.
          itemsize: :math:`b`, bytes a number.

        Returns:
          Bytes, without those that a device keeps for itself.
        """
        return (self.num_shards - 1) * self.exchanged * dim * itemsize

    def bytes_held(self, itemsize: int = 4) -> int:
        """Bytes of the graph that a device holds.

        Args:
          itemsize: bytes a weight.

        Returns:
          Bytes of the entries, the row pointers and the list of rows to send.
        """
        return (itemsize + 4) * self.entries + 4 * (self.rows + 1) + 4 * self.num_shards * self.exchanged


class Shards(Sequence[scipy.sparse.csr_array]):
    """Raw symmetric weights whose rows are read one shard at a time.

    Shard ``k`` of ``num_shards`` holds the rows from ``k * rows`` on, where ``rows`` is the number of nodes over
    ``num_shards``, rounded up; the last shards may hold fewer. Made by :func:`graph.shard` from weights in memory and
    by :func:`graph.from_parquet` from files, taken by :func:`sevo` with ``graph_sharding``. Indexing and iterating read
    a shard each time, as a SciPy CSR array of float64 and shape (rows of the shard, nodes), and keep none.

    Attributes:
      num_shards: how many there are.
      shape: (nodes, nodes).
    """

    def __init__(self, read: Callable[[Ranges], scipy.sparse.csr_array], num_nodes: int, num_shards: int) -> None:
        self._read = read
        self.num_shards = num_shards
        self.shape = (num_nodes, num_nodes)

    def __repr__(self) -> str:
        return f"Shards(num_shards={self.num_shards}, shape={self.shape})"

    def __len__(self) -> int:
        return self.num_shards

    @overload
    def __getitem__(self, index: int) -> scipy.sparse.csr_array: ...
    @overload
    def __getitem__(self, index: slice) -> list[scipy.sparse.csr_array]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(self.num_shards))]
        number = operator.index(index)
        if not -self.num_shards <= number < self.num_shards:
            raise IndexError(f"shard {number} of {self.num_shards}")
        return self.read(Layout([self.shape[0]], self.num_shards).ranges(number % self.num_shards))

    def read(self, ranges: Ranges) -> scipy.sparse.csr_array:
        """The rows of all ranges, one after the other."""
        return self._read(ranges)

    def summary(self) -> ShardSummary:
        """What each device holds and exchanges if the nodes are those of one table; reads every shard once.

        Several tables of one graph are split one by one, so that each device has a part of every table. That may be
        more or less than what is counted here.

        Returns:
          A :class:`ShardSummary`.
        """
        layout = Layout([self.shape[0]], self.num_shards)
        sizes = [measure(rows, layout, k)[1:] for k, rows in enumerate(self)]
        entries = [nnz for nnz, _ in sizes]
        mean = sum(entries) / len(entries)
        return ShardSummary(
            self.num_shards,
            layout.rows,
            max(entries),
            max(entries) / mean if mean else 1.0,
            max(exchanged for _, exchanged in sizes),
        )


def in_memory(matrix: scipy.sparse.csr_array, num_shards: int) -> Shards:
    """Shards of a checked matrix that the host holds."""

    def read(ranges: Ranges) -> scipy.sparse.csr_array:
        parts = [matrix[start:stop] for start, stop in ranges]
        return parts[0] if len(parts) == 1 else scipy.sparse.csr_array(scipy.sparse.vstack(parts, format="csr"))

    return Shards(read, matrix.shape[0], num_shards)


class Layout:
    """Which shard owns which node, when every table of a node set is split by rows over all shards.

    Tables are padded one by one, so that each device stacks what it holds already and nothing moves between devices.
    """

    def __init__(self, tables: Sequence[int], num_shards: int) -> None:
        self.num_shards = num_shards
        self.tables = np.asarray(tables, np.int64)
        self.parts = -(-self.tables // num_shards)  # rows of each table a shard
        self.starts = np.concatenate([[0], np.cumsum(self.tables)])  # first node of each table
        self.bases = np.concatenate([[0], np.cumsum(self.parts)])  # first row of each table in a shard

    @cached_property
    def rows(self) -> int:
        """Rows a shard, padding included."""
        return int(self.bases[-1])

    def ranges(self, shard: int) -> list[tuple[int, int]]:
        """The nodes that a shard owns, a range a table."""
        begin = np.minimum(shard * self.parts, self.tables) + self.starts[:-1]
        end = np.minimum((shard + 1) * self.parts, self.tables) + self.starts[:-1]
        return [(int(a), int(b)) for a, b in zip(begin, end, strict=True)]

    def nodes(self, shard: int) -> np.ndarray:
        """The nodes that a shard owns."""
        return np.concatenate([np.arange(a, b) for a, b in self.ranges(shard)])

    def place(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard of each node, and its row there."""
        table = np.searchsorted(self.starts[1:], nodes, side="right")
        offset = nodes - self.starts[table]
        part = np.maximum(self.parts[table], 1)
        return offset // part, self.bases[table] + offset % part


class Plan(NamedTuple):
    """One shard, with columns as positions among its own rows, followed by those it receives.

    Attributes:
      data: shape (entries,), float64.
      indices: shape (entries,), int32: row ``r`` of its own is r, row number ``h`` from shard ``q`` is rows + q·H + h.
      indptr: shape (rows + 1,), int32.
      send: shape (num_shards, H), int32, the own rows that each shard needs, padded with row 0.
    """

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    send: np.ndarray


def _own_rows(csr: scipy.sparse.csr_array, layout: Layout, shard: int) -> np.ndarray:
    """The row in the shard of each entry."""
    _, local = layout.place(layout.nodes(shard))
    return np.repeat(local, np.diff(csr.indptr))


def _foreign(owner: np.ndarray, row: np.ndarray, layout: Layout, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pairs of another shard and a row, in order, and how many there are of each shard."""
    away = owner != shard
    keys = np.unique(owner[away] * layout.rows + row[away])
    return keys, np.bincount(keys // max(layout.rows, 1), minlength=layout.num_shards)


def measure(csr: scipy.sparse.csr_array, layout: Layout, shard: int) -> tuple[np.ndarray, int, int]:
    """The degree of each row of a shard, its entries, and the most rows that it exchanges with one other."""
    owner, row = layout.place(csr.indices.astype(np.int64))
    _, counts = _foreign(owner, row, layout, shard)
    rows = np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))
    return np.bincount(rows, weights=csr.data, minlength=csr.shape[0]), csr.nnz, int(counts.max(initial=0))


def plan(csr: scipy.sparse.csr_array, layout: Layout, shard: int, exchanged: int, degree: np.ndarray | None) -> Plan:
    """Normalises the rows of one shard and says what it exchanges.

    Args:
      csr: raw rows that the shard owns, shape (own rows, nodes).
      layout: who owns what.
      shard: its number.
      exchanged: the room for rows from one shard to another, in all shards alike.
      degree: of all nodes, float64; None if ``csr`` is normalised already.

    Returns:
      The plan of the shard.
    """
    owner, row = layout.place(csr.indices.astype(np.int64))
    own = _own_rows(csr, layout, shard)
    data = csr.data
    if degree is not None:
        root = np.sqrt(degree)
        nodes = np.repeat(layout.nodes(shard), np.diff(csr.indptr))
        data = data / (root[nodes] * root[csr.indices])

    needed, counts = _foreign(owner, row, layout, shard)
    first = np.concatenate([[0], np.cumsum(counts)])
    away = owner != shard
    position = np.searchsorted(needed, owner[away] * layout.rows + row[away])
    indices = row.copy()
    indices[away] = layout.rows + owner[away] * exchanged + position - first[owner[away]]

    # The same entries seen from the other side: a row that has an entry in a column of shard p is needed by p.
    sent, counts = _foreign(owner, own, layout, shard)
    first = np.concatenate([[0], np.cumsum(counts)])
    send = np.zeros((layout.num_shards, exchanged), np.int32)
    to = sent // max(layout.rows, 1)
    send[to, np.arange(sent.size) - first[to]] = sent % max(layout.rows, 1)

    indptr = np.concatenate([[0], np.cumsum(np.bincount(own, minlength=layout.rows))])
    return Plan(data, indices.astype(np.int32), indptr.astype(np.int32), send)
