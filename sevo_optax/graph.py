"""Building the weighted graphs that SEvo smooths along.

Every function here runs once, on the host, in NumPy and SciPy, and returns *raw symmetric weights*:
a `jax.experimental.sparse.BCOO` of float32 values whose int32 indices are sorted row by row and
unique. Nodes are numbered 0..num_nodes-1. The transformation normalises the weights itself, so a
graph is handed over as it comes out of a builder:

* `cooccurrence`: items that follow each other in a sequence (Algorithm 4),
* `user_item`: users and the items they interacted with, as one bipartite graph,
* `shared_attributes`: prior knowledge, such as movies of the same genre,
* `from_edges`, `from_parquet`, `from_scipy`: anything else, directed edges included.

`combine` adds several relations over the same nodes, `top_k` and `drop_below` thin a graph out,
`summary` describes it, `save` and `load` keep it.

A log too large for one machine is reduced to edges where it lies. `COOCCURRENCE_SQL` is Algorithm 4
as one SQL statement; write its result to parquet and read that::

    duckdb.sql(f"COPY ({graph.COOCCURRENCE_SQL}) TO 'edges.parquet'")
    weights = graph.from_parquet("edges.parquet", num_nodes=num_items + 1)
"""

import dataclasses
import importlib.util
import itertools
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import scipy.sparse
from jax.experimental import sparse as jsparse
from numpy.typing import ArrayLike
from scipy.sparse import csgraph

from sevo_optax._weights import Adjacency as Adjacency
from sevo_optax._weights import (
    check_choice,
    check_num_nodes,
    check_positive_int,
    check_weight_dtype,
    first,
    normalize_csr,
    raw_bcoo,
    symmetric_csr,
    to_bcoo,
)

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

`from_parquet` (or `from_edges`) with `symmetrize="sum"` turns them into the weights `cooccurrence`
returns. Break ties of `position`, or the engine orders equal ones as it likes. The join is on
equality only, so its cost grows with interactions times H, not with the square of a sequence.
"""

# Interactions (or edges) handled at a time; bounds the memory next to the edges themselves.
_CHUNK = 1 << 22

# More entries than this cannot be counted in the int32 that SciPy and JAX index with.
_MAX_ENTRIES = 2**31

_SYMMETRIZE = ("sum", "mean", "max", "min")


def cooccurrence(
    sequences: Iterable[Sequence[int] | np.ndarray] | tuple[ArrayLike, ArrayLike],
    num_nodes: int,
    *,
    max_length: int | None = None,
    keep: Literal["last", "first"] = "last",
    max_hops: int = 1,
    weighting: Literal["distance", "frequency"] = "distance",
    progress: Callable[[int, int], object] | None = None,
) -> jsparse.BCOO:
    r"""Weighs pairs of items by how often and how closely they follow each other.

    Algorithm 4 of the paper. Every sequence is cut to its last (or first) :math:`K` items
    :math:`v_1, \dots, v_T`, and each pair of positions at most :math:`H` apart adds to both
    directions of an edge:

    .. math::
      w_{v_i v_j} \mathrel{+}= \omega(j - i), \quad
      w_{v_j v_i} \mathrel{+}= \omega(j - i) \qquad \text{for } 1 \le j - i \le H,

    with :math:`\omega(h) = 1/h` by distance and :math:`\omega(h) = 1` by frequency. The algorithm is
    followed literally where an item meets itself: both additions then fall on the same entry, so
    the self-loop of :math:`v` gains :math:`2\,\omega(h)`.

    Edges are summed in chunks, in time linear in the number of pairs and in memory proportional to
    the number of distinct edges.

    Args:
      sequences: Item ids in 0..num_nodes-1, oldest first: a list (or another iterable, read once) of
        integer sequences of any lengths. Or the tuple `(flat_items, offsets)`, the fastest form:
        sequence number s is `flat_items[offsets[s]:offsets[s + 1]]`. A tuple of length two is
        always read in this second way.
      num_nodes: Number of nodes of the graph, at least the largest id plus one.
      max_length: :math:`K`, how many items of a sequence to look at; None looks at all.
      keep: Which end of a longer sequence to keep, "last" or "first".
      max_hops: :math:`H`, the longest distance between two items that are still related.
      weighting: "distance" or "frequency".
      progress: Called as `progress(done, total)` after each chunk, in interactions.

    Returns:
      Raw symmetric weights, BCOO float32 of shape (num_nodes, num_nodes).

    Raises:
      TypeError: If an id is not an integer, or `sequences` holds something else than sequences.
      ValueError: If an id lies outside 0..num_nodes-1, there are no interactions, the offsets do not
        fit, or an option is none of those listed.

    Examples:
      Items 2, 1, 3 in this order, related over at most two hops:

      >>> from sevo_optax import graph
      >>> graph.cooccurrence([[2, 1, 3]], num_nodes=4, max_hops=2).todense()
      Array([[0. , 0. , 0. , 0. ],
             [0. , 0. , 1. , 1. ],
             [0. , 1. , 0. , 0.5],
             [0. , 1. , 0.5, 0. ]], dtype=float32)
    """
    num_nodes = check_num_nodes(num_nodes)
    max_hops = check_positive_int(max_hops, "max_hops")
    check_choice(keep, ("last", "first"), "keep")
    check_choice(weighting, ("distance", "frequency"), "weighting")
    if max_length is not None:
        max_length = check_positive_int(max_length, "max_length")

    items, offsets = _flatten(sequences, num_nodes)
    starts, ends = offsets[:-1], offsets[1:]
    if max_length is not None and keep == "last":
        starts = np.maximum(starts, ends - max_length)
    elif max_length is not None:
        ends = np.minimum(ends, starts + max_length)
    # The kept interactions are numbered 0..total-1; sequence s owns bounds[s]..bounds[s + 1]-1.
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(ends - starts)])
    total = int(bounds[-1])
    shift = starts - bounds[:-1]

    summed = _Sum(num_nodes)
    # Each partial sum has a row pointer for every node: chunks no smaller keep the time linear.
    chunk = max(_CHUNK, num_nodes)
    for begin in range(0, total, chunk):
        end = min(begin + chunk, total)
        low = int(np.searchsorted(bounds, begin, side="right")) - 1
        high = int(np.searchsorted(bounds, end, side="left"))
        count = np.diff(np.clip(bounds[low : high + 1], begin, end))
        number = np.arange(begin, end)
        position = number + np.repeat(shift[low:high], count)
        following = np.repeat(bounds[low + 1 : high + 1] - 1, count) - number
        for hop in range(1, max_hops + 1):
            alive = following >= hop
            if not alive.all():
                position, following = position[alive], following[alive]
            if not position.size:
                break
            weight = 1.0 / hop if weighting == "distance" else 1.0
            one, other = items[position], items[position + hop]
            # One triangle is enough: it is mirrored at the end.
            count = _directed_csr(np.minimum(one, other), np.maximum(one, other), None, num_nodes)
            summed.add(count * weight)
        if progress is not None:
            progress(end, total)
    # Mirroring only doubles the diagonal: in float32 already it costs no accuracy.
    triangle = summed.total().astype(np.float32)
    return to_bcoo(_mirror(triangle, "sum"))


def user_item(
    users: ArrayLike,
    items: ArrayLike,
    num_users: int,
    num_items: int,
    *,
    weights: ArrayLike | None = None,
) -> jsparse.BCOO:
    r"""Connects users with the items they interacted with.

    The bipartite graph of Section 5.2 of the paper: :math:`w_{ui} = 1` if user :math:`u` interacted
    with item :math:`i`, and 0 otherwise. Users are the nodes 0..num_users-1, items follow as nodes
    num_users..num_users+num_items-1; stack the tables in the same order.

    Args:
      users: User ids in 0..num_users-1, integers of shape (interactions,).
      items: Item ids in 0..num_items-1, integers of shape (interactions,).
      num_users: Number of users.
      num_items: Number of items.
      weights: Finite, non-negative weights of shape (interactions,), such as ratings; those of
        repeated interactions add up. With None every pair that occurs weighs 1, however often it
        is repeated.

    Returns:
      Raw symmetric weights, BCOO float32 of shape (num_users + num_items, num_users + num_items).

    Raises:
      TypeError: If ids are not integers or weights not real numbers.
      ValueError: If an id is out of range, a weight negative or not finite, lengths differ, or there
        are no interactions.

    Examples:
      >>> from sevo_optax import graph
      >>> graph.user_item([0, 1, 1], [1, 0, 1], num_users=2, num_items=2).todense()
      Array([[0., 0., 0., 1.],
             [0., 0., 1., 1.],
             [0., 1., 0., 0.],
             [1., 1., 0., 0.]], dtype=float32)
    """
    num_users = check_num_nodes(num_users, "num_users")
    num_items = check_num_nodes(num_items, "num_items")
    num_nodes = check_num_nodes(num_users + num_items, "num_users + num_items")
    users = _check_ids(users, num_users, "users", "num_users")
    items = _check_ids(items, num_items, "items", "num_items")
    _check_same_length(users=users, items=items)
    directed = _directed_csr(
        users,
        items.astype(np.int64) + num_users,
        None if weights is None else _check_weights(weights, users.size),
        num_nodes,
    )
    if weights is None:
        directed.data[:] = 1.0
    return raw_bcoo(_mirror(directed, "sum"))


def shared_attributes(
    nodes: ArrayLike,
    attributes: ArrayLike,
    num_nodes: int,
    *,
    weighting: Literal["any", "count"] = "any",
) -> jsparse.BCOO:
    r"""Connects nodes that share an attribute, such as movies of the same genre.

    Similarity based on prior knowledge (Section 4 of the paper): with :math:`S_i` the attributes
    of node :math:`i`, two different nodes weigh

    .. math::
      w_{ij} = \begin{cases} \min(1, |S_i \cap S_j|) & \text{"any"} \
      |S_i \cap S_j| & \text{"count".} \end{cases}

    A node has no self-loop. An attribute of m nodes yields m (m - 1) stored entries; leave out those
    that nearly all nodes have.

    Args:
      nodes: Node ids in 0..num_nodes-1, integers of shape (pairs,).
      attributes: The attribute of each pair, shape (pairs,): numbers, strings or any hashable
        objects. Repeated pairs count once.
      num_nodes: Number of nodes.
      weighting: "any" weighs 1 if at least one attribute is shared, "count" the number shared.

    Returns:
      Raw symmetric weights, BCOO float32 of shape (num_nodes, num_nodes).

    Raises:
      TypeError: If ids are not integers or an attribute is not hashable.
      ValueError: If an id is out of range, an attribute is missing (None or NaN) or too common to
        store its edges, lengths differ, or there are no pairs.

    Examples:
      >>> from sevo_optax import graph
      >>> genres = {0: "Comedy|Drama", 1: "Drama|Comedy", 2: "Drama", 3: "Western"}
      >>> pairs = [(movie, genre) for movie in genres for genre in genres[movie].split("|")]
      >>> movies, labels = zip(*pairs)
      >>> graph.shared_attributes(movies, labels, num_nodes=4, weighting="count").todense()
      Array([[0., 2., 1., 0.],
             [2., 0., 1., 0.],
             [1., 1., 0., 0.],
             [0., 0., 0., 0.]], dtype=float32)
    """
    num_nodes = check_num_nodes(num_nodes)
    check_choice(weighting, ("any", "count"), "weighting")
    nodes = _check_ids(nodes, num_nodes, "nodes", "num_nodes")
    codes, distinct = _encode(attributes)
    _check_same_length(nodes=nodes, attributes=codes)

    incidence = scipy.sparse.csr_array(
        (np.ones(nodes.size, np.int32), (nodes, codes)), shape=(num_nodes, len(distinct))
    )
    incidence.sum_duplicates()
    incidence.data[:] = 1
    sharing = np.bincount(incidence.indices, minlength=len(distinct))
    common = int(sharing.argmax())
    entries = int(sharing[common]) ** 2
    if entries >= _MAX_ENTRIES:
        raise ValueError(
            f"attribute {distinct[common]!r} is shared by {sharing[common]} nodes, which makes {entries:.1e} "
            f"entries; wanted fewer than {_MAX_ENTRIES:.1e}. "
            "Leave out attributes this common: they tell little about similarity."
        )
    shared = (incidence @ incidence.T).tocoo()
    off_diagonal = shared.row != shared.col
    data = shared.data[off_diagonal].astype(np.float32)
    if weighting == "any":
        data[:] = 1.0
    indices = (shared.row[off_diagonal], shared.col[off_diagonal])
    return to_bcoo(scipy.sparse.coo_array((data, indices), shape=shared.shape).tocsr())


def from_edges(
    sources: ArrayLike,
    targets: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    num_nodes: int,
    symmetrize: Literal["sum", "mean", "max", "min"] = "sum",
) -> jsparse.BCOO:
    r"""Makes symmetric weights from a list of edges, directed or not.

    Weights of the same (source, target) add up to a directed matrix :math:`B`; the result is

    ========== =============================== =====================================================
    symmetrize :math:`A`                       use
    ========== =============================== =====================================================
    "sum"      :math:`B + B^\top`              each edge is listed once; both directions add up
    "mean"     :math:`(B + B^\top) / 2`        each edge is listed in both directions
    "max"      :math:`\max(B, B^\top)`         directed; the stronger direction counts
    "min"      :math:`\min(B, B^\top)`         directed; only mutual edges stay
    ========== =============================== =====================================================

    Under "sum" a self-loop counts twice, as in Algorithm 4 of the paper, so that all pairs of a
    sequence as edges give the same weights as `cooccurrence`.

    Args:
      sources: Node ids in 0..num_nodes-1, integers of shape (edges,).
      targets: Node ids in 0..num_nodes-1, integers of shape (edges,).
      weights: Finite, non-negative numbers of shape (edges,); None weighs every edge 1. An edge of
        weight 0 is no edge.
      num_nodes: Number of nodes.
      symmetrize: "sum", "mean", "max" or "min".

    Returns:
      Raw symmetric weights, BCOO float32 of shape (num_nodes, num_nodes).

    Raises:
      TypeError: If ids are not integers or weights not real numbers.
      ValueError: If an id is out of range, a weight negative, not finite or outside the range of
        float32, lengths differ, or there are no edges.

    Examples:
      >>> from sevo_optax import graph
      >>> graph.from_edges([0, 1, 1], [1, 0, 2], [2.0, 1.0, 4.0], num_nodes=3).todense()
      Array([[0., 3., 0.],
             [3., 0., 4.],
             [0., 4., 0.]], dtype=float32)

      Directed edges of which only mutual ones should stay:

      >>> graph.from_edges([0, 1, 1], [1, 0, 2], num_nodes=3, symmetrize="min").todense()
      Array([[0., 1., 0.],
             [1., 0., 0.],
             [0., 0., 0.]], dtype=float32)
    """
    num_nodes = check_num_nodes(num_nodes)
    check_choice(symmetrize, _SYMMETRIZE, "symmetrize")
    sources = _check_ids(sources, num_nodes, "sources", "num_nodes")
    targets = _check_ids(targets, num_nodes, "targets", "num_nodes")
    _check_same_length(sources=sources, targets=targets)
    if weights is not None:
        weights = _check_weights(weights, sources.size)
    return raw_bcoo(_mirror(_directed_csr(sources, targets, weights, num_nodes), symmetrize))


def from_parquet(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    num_nodes: int,
    source: str = "source",
    target: str = "target",
    weight: str | None = "weight",
    symmetrize: Literal["sum", "mean", "max", "min"] = "sum",
) -> jsparse.BCOO:
    """Makes symmetric weights from edges in parquet files, such as an SQL engine writes.

    Equals `from_edges` on the three columns, but reads the files piece by piece, so that memory is
    bounded by the distinct edges. Needs pyarrow or polars. The result of `COOCCURRENCE_SQL` is read
    with the defaults.

    Args:
      path: A parquet file, a directory (all `*.parquet` below it) or a list of files.
      num_nodes: Number of nodes.
      source: Name of the column of source node ids, integers in 0..num_nodes-1.
      target: Name of the column of target node ids.
      weight: Name of the column of finite, non-negative weights; None weighs every row 1.
      symmetrize: As for `from_edges`.

    Returns:
      Raw symmetric weights, BCOO float32 of shape (num_nodes, num_nodes).

    Raises:
      FileNotFoundError: If there is no such file, or a directory holds no parquet file.
      ImportError: If neither pyarrow nor polars is installed.
      TypeError: If ids are not integers or weights not real numbers.
      ValueError: If a column is missing or holds nulls, or as for `from_edges`.
    """
    num_nodes = check_num_nodes(num_nodes)
    check_choice(symmetrize, _SYMMETRIZE, "symmetrize")
    columns = [source, target] + ([] if weight is None else [weight])
    summed = _Sum(num_nodes)
    chunk = max(_CHUNK, num_nodes)
    seen = 0
    for file in _parquet_files(path):
        row = 0
        for sources, targets, *rest in _parquet_pieces(file, columns, chunk):
            place = f"{file}: column "
            sources = _check_ids(sources, num_nodes, f"{place}{source!r}", "num_nodes", row)
            targets = _check_ids(targets, num_nodes, f"{place}{target!r}", "num_nodes", row)
            weights = None
            if rest:
                weights = _check_weights(rest[0], sources.size, f"{place}{weight!r}", row)
            summed.add(_directed_csr(sources, targets, weights, num_nodes))
            row += sources.size
        seen += row
    if not seen:
        raise ValueError(f"{path} holds no rows; wanted at least one edge.")
    return raw_bcoo(_mirror(summed.total(), symmetrize))


def from_scipy(matrix: scipy.sparse.sparray | scipy.sparse.spmatrix) -> jsparse.BCOO:
    """Takes over symmetric weights from a SciPy sparse matrix.

    Args:
      matrix: Symmetric, non-negative and finite weights of shape (nodes, nodes) and a real dtype, in
        any SciPy format. A dense array is taken as well. Duplicates add up.

    Returns:
      The same weights, BCOO float32 of shape (nodes, nodes).

    Raises:
      TypeError: If it is no matrix or not of a real number dtype.
      ValueError: If it is not square, or a weight is negative, not finite, not symmetric or outside
        the range of float32. `from_edges` symmetrises directed edges.

    Examples:
      >>> import scipy.sparse
      >>> from sevo_optax import graph
      >>> path = scipy.sparse.csr_array([[0, 1, 0], [1, 0, 2], [0, 2, 0]])
      >>> graph.from_scipy(path).todense()
      Array([[0., 1., 0.],
             [1., 0., 2.],
             [0., 2., 0.]], dtype=float32)
    """
    return raw_bcoo(symmetric_csr(matrix, "matrix"))


def to_scipy(adjacency: Adjacency) -> scipy.sparse.csr_array:
    """Hands weights over to SciPy.

    Args:
      adjacency: Symmetric weights of shape (nodes, nodes), raw or normalised.

    Returns:
      The same weights as a `csr_array` with sorted, unique indices: float64 if `adjacency` is,
      float32 otherwise.

    Raises:
      TypeError: If it is no matrix, or traced.
      ValueError: If the weights are not valid, see `from_scipy`.

    Examples:
      >>> from sevo_optax import graph
      >>> graph.to_scipy(graph.from_edges([0], [1], num_nodes=2)).toarray()
      array([[0., 1.],
             [1., 0.]], dtype=float32)
    """
    csr = symmetric_csr(adjacency)
    return csr if adjacency.dtype == np.float64 else csr.astype(np.float32)


def combine(graphs: Sequence[Adjacency], coefficients: Sequence[float] | None = None) -> jsparse.BCOO:
    r"""Adds several relations over the same nodes.

    .. math::
      A = \sum_r c_r A_r

    Raw weights of different relations differ in scale: a count of co-occurrences reaches thousands
    where a shared genre weighs 1. Pass `normalize(graph)` in place of each graph to let only the
    coefficients decide.

    Args:
      graphs: Symmetric weights, all of shape (nodes, nodes).
      coefficients: One finite, non-negative number for each graph, not all 0; None adds the graphs
        as they are.

    Returns:
      Symmetric weights, BCOO float32 of shape (nodes, nodes).

    Raises:
      TypeError: If `graphs` is a single graph, or holds something else.
      ValueError: If there are no graphs, shapes differ, or coefficients are invalid.

    Examples:
      >>> from sevo_optax import graph
      >>> bought = graph.from_edges([0], [1], [6.0], num_nodes=3)
      >>> viewed = graph.from_edges([0, 1], [1, 2], num_nodes=3)
      >>> graph.combine([bought, viewed], [0.5, 2.0]).todense()
      Array([[0., 5., 0.],
             [5., 0., 2.],
             [0., 2., 0.]], dtype=float32)
    """
    if hasattr(graphs, "shape") or not isinstance(graphs, Iterable):
        raise TypeError(f"graphs is a {type(graphs).__name__}; wanted a list of graphs, such as [a, b].")
    graphs = list(graphs)
    if not graphs:
        raise ValueError("graphs is empty; wanted at least one graph.")
    if coefficients is None:
        coefficients = [1.0] * len(graphs)
    coefficients = list(coefficients)
    if len(coefficients) != len(graphs):
        raise ValueError(f"there are {len(coefficients)} coefficients for {len(graphs)} graphs; wanted one each.")
    for index, value in enumerate(coefficients):
        _check_non_negative(value, f"coefficients[{index}]")
    if not any(coefficients):
        raise ValueError("all coefficients are 0; wanted at least one above.")

    total = None
    for index, (graph, coefficient) in enumerate(zip(graphs, coefficients, strict=True)):
        csr = symmetric_csr(graph, f"graphs[{index}]")
        if total is not None and csr.shape != total.shape:
            raise ValueError(
                f"graphs[{index}] has {csr.shape[0]} nodes but graphs[0] has {total.shape[0]}; "
                "wanted the same nodes in every graph. Build them with one num_nodes."
            )
        with np.errstate(over="ignore"):  # refused with the other weights too large for float32
            csr = csr * float(coefficient)
        total = csr if total is None else total + csr
    total.eliminate_zeros()
    return raw_bcoo(total)


def top_k(adjacency: Adjacency, k: int) -> jsparse.BCOO:
    """Keeps the k heaviest edges of each node.

    An edge stays if at least one of its two ends keeps it, so that the result is symmetric and no
    node loses its last neighbour; a node may therefore end up with more than k edges. Among edges
    of equal weight the neighbour of the smaller index is kept. Self-loops always stay and do not
    count towards k.

    Args:
      adjacency: Symmetric weights of shape (nodes, nodes).
      k: How many neighbours each node keeps, at least 1.

    Returns:
      Symmetric weights, BCOO float32 of shape (nodes, nodes).

    Raises:
      TypeError: If `k` is not an integer, or `adjacency` no matrix.
      ValueError: If `k` is below 1, or the weights are invalid.

    Examples:
      Node 2 keeps its edge to node 0, which would drop it in favour of node 1:

      >>> from sevo_optax import graph
      >>> weights = graph.from_edges([0, 0, 1], [1, 2, 2], [3.0, 2.0, 1.0], num_nodes=3)
      >>> graph.top_k(weights, 1).todense()
      Array([[0., 3., 2.],
             [3., 0., 0.],
             [2., 0., 0.]], dtype=float32)
    """
    k = check_positive_int(k, "k")
    csr = symmetric_csr(adjacency)
    num_nodes = csr.shape[0]
    kept = np.ones(csr.nnz, bool)
    begin = 0
    while begin < num_nodes:
        # Whole rows, as many as fit into a chunk: sorting takes several times their memory.
        end = int(np.searchsorted(csr.indptr, csr.indptr[begin] + _CHUNK, side="right")) - 1
        end = min(max(end, begin + 1), num_nodes)
        span = slice(csr.indptr[begin], csr.indptr[end])
        row = np.repeat(np.arange(begin, end), np.diff(csr.indptr[begin : end + 1]))
        neighbour = np.flatnonzero(csr.indices[span] != row)
        row = row[neighbour]
        # lexsort is stable: equal weights stay in the order of their column.
        order = np.lexsort((-csr.data[span][neighbour], row))
        first = np.searchsorted(row, row)
        lighter = neighbour[order[np.arange(row.size) - first >= k]]
        kept[span][lighter] = False
        begin = end
    return raw_bcoo(_mirror(_select(csr, kept), "max"))


def drop_below(adjacency: Adjacency, threshold: float) -> jsparse.BCOO:
    """Keeps the edges whose weight is at least a threshold, self-loops included.

    Args:
      adjacency: Symmetric weights of shape (nodes, nodes).
      threshold: A finite, non-negative number. Both sides are compared in float32, so that a weight
        set to 0.7 reaches a threshold of 0.7.

    Returns:
      Symmetric weights, BCOO float32 of shape (nodes, nodes).

    Raises:
      TypeError: If `threshold` is not a number, or `adjacency` no matrix.
      ValueError: If `threshold` is negative or not finite, or the weights are invalid.

    Examples:
      >>> from sevo_optax import graph
      >>> weights = graph.from_edges([0, 1], [1, 2], [1.0, 3.0], num_nodes=3)
      >>> graph.drop_below(weights, 2.0).todense()
      Array([[0., 0., 0.],
             [0., 0., 3.],
             [0., 3., 0.]], dtype=float32)
    """
    _check_non_negative(threshold, "threshold")
    csr = symmetric_csr(adjacency)
    with np.errstate(over="ignore"):  # what is too large for float32 compares as infinity
        kept = csr.data.astype(np.float32) >= np.float32(threshold)
    return raw_bcoo(_select(csr, kept))


def normalize(adjacency: Adjacency, *, isolated: Literal["zero", "identity"] = "zero") -> jsparse.BCOO:
    r"""Normalises weights symmetrically by the degrees of their two ends.

    .. math::
      \tilde{A} = D^{-1/2} A D^{-1/2}, \qquad D_{ii} = \textstyle\sum_j A_{ij}

    as in Section 2.1 of the paper. The result does not depend on the scale of the weights, and its
    eigenvalues lie in [-1, 1]. The transformation does this itself; call it to look at the result,
    or to bring graphs to one scale for `combine`.

    Args:
      adjacency: Raw symmetric weights of shape (nodes, nodes).
      isolated: What to do with a node without edges, whose row is zero. "zero" leaves it: smoothing
        then shrinks its update by :math:`(1-\beta)/(1-\beta^{L+1})`, about 0.25 at
        :math:`\beta=0.99, L=3`, as in the paper. "identity" puts a 1 on its diagonal, and the row
        keeps its update unchanged.

    Returns:
      Normalised weights, BCOO float32 of shape (nodes, nodes), computed in float64.

    Raises:
      TypeError: If `adjacency` is no matrix, or traced.
      ValueError: If the weights are invalid, or `isolated` is none of the above.

    Examples:
      >>> from sevo_optax import graph
      >>> weights = graph.from_edges([0, 0], [1, 2], [8.0, 8.0], num_nodes=4)
      >>> graph.normalize(weights, isolated="identity").todense().round(3)
      Array([[0.   , 0.707, 0.707, 0.   ],
             [0.707, 0.   , 0.   , 0.   ],
             [0.707, 0.   , 0.   , 0.   ],
             [0.   , 0.   , 0.   , 1.   ]], dtype=float32)
    """
    return to_bcoo(normalize_csr(symmetric_csr(adjacency), isolated))


def save(path: str | os.PathLike[str], adjacency: Adjacency) -> None:
    """Writes weights to a file.

    The file is in SciPy's npz format, holds no pickle, and can be read with `scipy.sparse.load_npz`
    as well. It appears under its name only when it is complete.

    Args:
      path: Where to write, by convention `*.npz`; an existing file is replaced.
      adjacency: Symmetric weights of shape (nodes, nodes).

    Raises:
      TypeError: If `adjacency` is no matrix, or traced.
      ValueError: If the weights are invalid.

    Examples:
      >>> import tempfile
      >>> from sevo_optax import graph
      >>> weights = graph.from_edges([0, 1], [1, 2], num_nodes=3)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     graph.save(f"{folder}/graph.npz", weights)
      ...     graph.load(f"{folder}/graph.npz")
      BCOO(float32[3, 3], nse=4)
    """
    csr = to_scipy(adjacency)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            scipy.sparse.save_npz(file, csr, compressed=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> jsparse.BCOO:
    """Reads weights that `save` (or `scipy.sparse.save_npz`) wrote.

    Args:
      path: The file.

    Returns:
      Symmetric weights, BCOO float32 of shape (nodes, nodes).

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it holds something else than symmetric weights.
    """
    with open(path, "rb") as file:
        try:
            return raw_bcoo(symmetric_csr(scipy.sparse.load_npz(file)))
        except MemoryError:
            raise
        except Exception as error:  # a damaged archive fails in many ways
            raise ValueError(
                f"{os.fspath(path)} holds no graph: {error} Write graphs with graph.save(path, adjacency)."
            ) from error


@dataclasses.dataclass(frozen=True)
class GraphSummary:
    """What a graph looks like; `print` shows it as a table.

    Attributes:
      nodes: Number of nodes.
      edges: Number of pairs of different nodes that are connected.
      self_loops: Number of nodes connected with themselves.
      isolated: Number of nodes without any edge, whose normalised row is zero.
      degree_quantiles: Number of neighbours (other nodes) at the quantiles `QUANTILES`.
      weight_quantiles: Weight of an edge between different nodes at the same quantiles; zeros if
        there is none.
      components: Number of connected components, each isolated node being one.
      largest_component: Number of nodes in the largest component.
      memory: Bytes of the weights as a float32 BCOO: 12 for each stored entry.
    """

    QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.99, 1.0)

    nodes: int
    edges: int
    self_loops: int
    isolated: int
    degree_quantiles: tuple[float, ...]
    weight_quantiles: tuple[float, ...]
    components: int
    largest_component: int
    memory: int

    def __str__(self) -> str:
        names = ["min" if q == 0 else "max" if q == 1 else f"{q:.0%}" for q in self.QUANTILES]

        def spread(values: tuple[float, ...]) -> str:
            return "  ".join(f"{name} {v:.4g}" for name, v in zip(names, values, strict=True))

        rows = {
            "nodes": f"{self.nodes:,} ({self.isolated:,} isolated)",
            "edges": f"{self.edges:,} (and {self.self_loops:,} self-loops)",
            "neighbours": spread(self.degree_quantiles),
            "weights": spread(self.weight_quantiles),
            "components": f"{self.components:,} (largest: {self.largest_component:,} nodes)",
            "memory": f"{self.memory / 1e6:,.1f} MB",
        }
        return "\n".join(f"{name:<12}{value}" for name, value in rows.items())


def summary(adjacency: Adjacency) -> GraphSummary:
    """Describes a graph in a few numbers.

    Args:
      adjacency: Symmetric weights of shape (nodes, nodes).

    Returns:
      A `GraphSummary`, which prints as a table.

    Raises:
      TypeError: If `adjacency` is no matrix, or traced.
      ValueError: If the weights are invalid.

    Examples:
      >>> from sevo_optax import graph
      >>> print(graph.summary(graph.from_edges([0, 0], [1, 2], [1.0, 3.0], num_nodes=4)))
      nodes       4 (1 isolated)
      edges       2 (and 0 self-loops)
      neighbours  min 0  25% 0.75  50% 1  75% 1.25  99% 1.97  max 2
      weights     min 1  25% 1  50% 2  75% 3  99% 3  max 3
      components  2 (largest: 3 nodes)
      memory      0.0 MB
    """
    csr = symmetric_csr(adjacency)
    entries = np.diff(csr.indptr)
    row = np.repeat(np.arange(csr.shape[0], dtype=csr.indices.dtype), entries)
    loops = row == csr.indices
    self_loops = int(loops.sum())
    neighbours = entries - np.bincount(row[loops], minlength=csr.shape[0])
    weights = csr.data[~loops] if csr.nnz > self_loops else np.zeros(1)
    components, labels = csgraph.connected_components(csr, directed=False)

    def quantiles(values: np.ndarray) -> tuple[float, ...]:
        return tuple(float(q) for q in np.quantile(values, GraphSummary.QUANTILES))

    return GraphSummary(
        nodes=csr.shape[0],
        edges=(csr.nnz - self_loops) // 2,
        self_loops=self_loops,
        isolated=int((entries == 0).sum()),
        degree_quantiles=quantiles(neighbours),
        weight_quantiles=quantiles(weights),
        components=int(components),
        largest_component=int(np.bincount(labels).max()),
        memory=12 * csr.nnz,
    )


class _Sum:
    """Adds up many sparse matrices in time linear in their size, up to a logarithm.

    Partial sums of similar size are merged first, like digits of a binary counter, so that no entry
    is copied once for every matrix that follows.
    """

    def __init__(self, num_nodes: int) -> None:
        self._shape = (num_nodes, num_nodes)
        self._parts: list[scipy.sparse.csr_array] = []

    def add(self, matrix: scipy.sparse.csr_array) -> None:
        self._parts.append(matrix)
        while len(self._parts) > 1 and self._parts[-2].nnz <= self._parts[-1].nnz:
            self._merge()

    def total(self) -> scipy.sparse.csr_array:
        while len(self._parts) > 1:
            self._merge()
        return self._parts.pop() if self._parts else scipy.sparse.csr_array(self._shape)

    def _merge(self) -> None:
        last = self._parts.pop()
        self._parts[-1] = self._parts[-1] + last


def _directed_csr(
    sources: np.ndarray, targets: np.ndarray, weights: np.ndarray | None, num_nodes: int
) -> scipy.sparse.csr_array:
    """Adds up checked edges to a canonical float64 CSR without explicit zeros."""
    weights = np.ones(sources.size) if weights is None else weights
    csr = scipy.sparse.coo_array((weights, (sources, targets)), shape=(num_nodes,) * 2).tocsr()
    csr.sum_duplicates()
    csr.eliminate_zeros()
    return csr


def _mirror(directed: scipy.sparse.csr_array, how: str) -> scipy.sparse.csr_array:
    """Combines a canonical matrix with its transpose."""
    transposed = directed.T.tocsr()
    if how == "max":
        return directed.maximum(transposed)
    if how == "min":
        return directed.minimum(transposed)
    both = directed + transposed
    return both * 0.5 if how == "mean" else both


def _select(csr: scipy.sparse.csr_array, kept: np.ndarray) -> scipy.sparse.csr_array:
    """The entries of `csr` under a mask."""
    pointer = np.concatenate([[0], np.cumsum(kept)])[csr.indptr]
    return scipy.sparse.csr_array((csr.data[kept], csr.indices[kept], pointer), shape=csr.shape)


def _flatten(sequences: Any, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Checks sequences and returns their ids in one int32 array, with int64 offsets."""
    if isinstance(sequences, tuple) and len(sequences) == 2:
        items, offsets = sequences
        hint = "A tuple of two is read as (flat_items, offsets): pass several sequences as a list."
        items = _check_ids(items, num_nodes, "flat_items", "num_nodes", hint=hint)
        offsets = _check_offsets(offsets, items.size, hint)
        return items.astype(np.int32, copy=False), offsets
    if isinstance(sequences, str | bytes | Mapping) or not isinstance(sequences, Iterable):
        raise TypeError(
            f"sequences is a {type(sequences).__name__}; wanted a list of integer sequences or the "
            "tuple (flat_items, offsets)."
        )
    if isinstance(sequences, jax.Array):
        sequences = np.asarray(sequences)

    pieces, lengths, number = [], [], 0
    source = iter(sequences)
    while batch := list(itertools.islice(source, 4096)):
        rows = [_as_row(row, number + index) for index, row in enumerate(batch)]
        lengths.append(np.fromiter(map(len, rows), np.int64, len(rows)))
        pieces.append(_join(rows, number, num_nodes))
        number += len(rows)
    offsets = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum()
    if not offsets[-1]:
        raise ValueError("sequences holds no items; wanted at least one interaction.")
    return np.concatenate(pieces), offsets


def _as_row(row: Any, index: int) -> Sequence[int] | np.ndarray:
    """One sequence as something with a length, items unchecked."""
    if isinstance(row, list | tuple | range):
        return row
    if hasattr(row, "__array__"):
        row = np.asarray(row)
        if row.ndim == 1:
            return row
        raise TypeError(
            f"sequences[{index}] has {row.ndim} dimensions; wanted one sequence of integers. "
            "Wrap a single sequence in a list: [sequence]."
        )
    if isinstance(row, Iterable) and not isinstance(row, str | bytes | Mapping | set | frozenset):
        return list(row)
    raise TypeError(
        f"sequences[{index}] is {row!r}; wanted a sequence of integers. Wrap a single sequence in a list: [sequence]."
    )


def _join(rows: list[Sequence[int] | np.ndarray], number: int, num_nodes: int) -> np.ndarray:
    """Concatenates rows of ids to int32; `number` is the index of the first in `sequences`."""
    arrays = [row for row in rows if isinstance(row, np.ndarray)]
    kinds = {row.dtype.kind for row in arrays if row.size}
    # NumPy joins signed and unsigned 64-bit integers to floats: mixtures take the other way.
    if len(arrays) == len(rows) and (kinds <= {"i"} or kinds == {"u"}):
        items = np.concatenate([row for row in arrays if row.size] or [np.zeros(0, np.int32)])
    else:
        values = list(
            itertools.chain.from_iterable(row.tolist() if isinstance(row, np.ndarray) else row for row in rows)
        )
        integer = all(issubclass(kind, int | np.integer) and kind is not bool for kind in set(map(type, values)))
        try:
            items = np.fromiter(values if integer else (), np.int64, len(values) if integer else 0)
        except OverflowError:
            integer = False
        if not integer:
            _raise_for(rows, number, num_nodes)
    if items.size and (items.min() < 0 or items.max() >= num_nodes):
        _raise_for(rows, number, num_nodes)
    return items.astype(np.int32, copy=False)


def _raise_for(rows: list[Sequence[int] | np.ndarray], number: int, num_nodes: int) -> None:
    """Finds the first bad id, slowly, and names it."""
    for index, row in enumerate(rows):
        for position, item in enumerate(row):
            place = f"sequences[{number + index}][{position}]"
            if not isinstance(item, int | np.integer) or isinstance(item, bool | np.bool_):
                raise TypeError(
                    f"{place} is {item!r}; wanted an integer. "
                    "Number the items 0..num_nodes-1 and convert the ids with int."
                )
            if not 0 <= item < num_nodes:
                raise ValueError(_out_of_range(place, item, num_nodes, "num_nodes"))


def _out_of_range(place: str, value: Any, bound: int, bound_name: str) -> str:
    return (
        f"{place} = {value}; wanted 0..{bound - 1}, as {bound_name} is {bound}. Renumber the ids from 0, "
        f"or raise {bound_name}: ids that start at 1 need one more than there are."
    )


def _check_offsets(offsets: Any, size: int, hint: str) -> np.ndarray:
    offsets = np.asarray(offsets)
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or offsets.size < 2:
        raise ValueError(
            f"offsets has shape {offsets.shape} and dtype {offsets.dtype}; wanted integers of shape "
            f"(num_sequences + 1,). {hint}"
        )
    if offsets[0] != 0 or offsets[-1] != size:
        raise ValueError(
            f"offsets runs from {offsets[0]} to {offsets[-1]}; wanted from 0 to {size}, the length "
            f"of flat_items. {hint}"
        )
    bad = first(offsets[1:] < offsets[:-1])
    if bad is not None:
        raise ValueError(
            f"offsets[{bad + 1}] = {offsets[bad + 1]} is below offsets[{bad}] = {offsets[bad]}; "
            f"wanted offsets that never decrease. {hint}"
        )
    return offsets.astype(np.int64)


def _encode(attributes: Any) -> tuple[np.ndarray, Sequence[Any]]:
    """Numbers attributes in 0..len(distinct)-1; returns the codes and the distinct attributes."""
    if isinstance(attributes, str | bytes | Mapping) or not isinstance(attributes, Iterable):
        raise TypeError(f"attributes is a {type(attributes).__name__}; wanted one attribute for each of nodes.")
    # NumPy would turn a list of mixed types into strings, and tuples into a second dimension.
    values = np.asarray(attributes) if hasattr(attributes, "__array__") else list(attributes)
    if isinstance(values, np.ndarray):
        if values.ndim != 1:
            raise ValueError(
                f"attributes has shape {values.shape}; wanted (pairs,), one row for each pair of a "
                "node and one of its attributes."
            )
        if values.dtype.kind in "iubSU":
            distinct, codes = np.unique(values, return_inverse=True)
            return codes, distinct
        values = values.tolist()
    numbers: dict[Any, int] = {}
    codes = np.empty(len(values), np.int64)
    for index, value in enumerate(values):
        if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
            raise ValueError(
                f"attributes[{index}] is {value}, a missing value, which nodes cannot share. Leave out such pairs."
            )
        try:
            codes[index] = numbers.setdefault(value, len(numbers))
        except TypeError as error:
            raise TypeError(
                f"attributes[{index}] is {value!r}, which is not hashable; wanted numbers, strings "
                "or other hashable objects. Convert lists to tuples, or list one pair for each."
            ) from error
    return codes, list(numbers)


def _parquet_files(path: Any) -> list[Path]:
    if not isinstance(path, str | os.PathLike):
        if not isinstance(path, Iterable):
            raise TypeError(f"path is {path!r}; wanted a parquet file, a folder or a list of files.")
        return [Path(file) for file in path]
    path = Path(path)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path} holds no *.parquet file; wanted a file or a folder of some.")
    return files


def _parquet_pieces(file: Path, columns: Sequence[str], size: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields the columns of at most `size` rows at a time."""
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


def _check_vector(values: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} is ragged; wanted one dimension.") from error
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; wanted one dimension.")
    return array


def _check_ids(values: Any, bound: int, name: str, bound_name: str, row: int = 0, hint: str = "") -> np.ndarray:
    """Node ids as a one-dimensional, non-empty integer array within 0..bound-1."""
    array = _check_vector(values, name)
    if not array.size:
        raise ValueError(f"{name} is empty; wanted at least one id. {hint}".rstrip())
    if array.dtype.kind not in "iu":
        bad = 0
        if array.dtype.kind == "f":  # point at the fraction, if there is one
            bad = first(~(array == np.floor(array))) or 0
        raise TypeError(
            f"{name}[{row + bad}] is {array[bad]!r} (dtype {array.dtype}); wanted integers. "
            f"Convert the ids with astype(np.int64). {hint}".rstrip()
        )
    if array.min() < 0 or array.max() >= bound:
        bad = first((array < 0) | (array >= bound))
        message = _out_of_range(f"{name}[{row + bad}]", array[bad], bound, bound_name)
        raise ValueError(f"{message} {hint}".rstrip())
    return array


def _check_weights(values: Any, size: int, name: str = "weights", row: int = 0) -> np.ndarray:
    """Weights as a float64 array of shape (size,), finite and non-negative."""
    array = _check_vector(values, name)
    check_weight_dtype(array.dtype, name)
    if array.size != size:
        raise ValueError(f"{name} has length {array.size}; wanted {size}, one for each edge.")
    array = array.astype(np.float64)
    bad = first(~(np.isfinite(array) & (array >= 0)))
    if bad is not None:
        raise ValueError(
            f"{name}[{row + bad}] = {array[bad]:g}; weights must be finite and non-negative. "
            "Remove the edge or repair its weight."
        )
    return array


def _check_same_length(**arrays: np.ndarray) -> None:
    (first, a), (second, b) = arrays.items()
    if a.size != b.size:
        raise ValueError(f"{first} has length {a.size} but {second} has {b.size}; wanted the same length.")


def _check_non_negative(value: Any, name: str) -> None:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} is {value!r}; wanted a finite, non-negative number.")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value}; wanted a finite, non-negative number.")
