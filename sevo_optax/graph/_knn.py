"""Graphs of nearest neighbours, found exactly, block by block, or approximately, by an index."""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import scipy.sparse
from jax.experimental import sparse as jsparse
from numpy.typing import ArrayLike

from sevo_optax._memory import require_memory
from sevo_optax._weights import (
    check_choice,
    check_ids,
    check_num_nodes,
    check_positive_int,
    check_weight_dtype,
    first,
    refuse_masked,
    to_bcoo,
)
from sevo_optax.graph import _matrices
from sevo_optax.graph._matrices import mirror

_METRICS = ("cosine", "dot", "euclidean")
_METHODS = ("exact", "approximate")

# How many nodes look for their neighbours at the same time.
_ROWS = 1024

# The index: links of a node, and how many candidates are kept in mind while it is built and searched.
_LINKS, _BUILDING, _SEARCHING = 32, 80, 128
# Candidates beyond the k that are wanted, so that the exact ranking of them has something to choose from.
_SPARE = 8


def knn(
    vectors: ArrayLike,
    k: int,
    *,
    metric: Literal["cosine", "dot", "euclidean"] = "cosine",
    mutual: bool = False,
    method: Literal["exact", "approximate"] = "exact",
    nodes: ArrayLike | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> jsparse.BCOO:
    r"""Connects every node with the nodes whose vectors are nearest to its own.

    For embeddings of texts or images, coordinates, or any other features. An edge between two different nodes weighs

    ============= ====================================== ==========================================
    metric        :math:`w_{ij}`                         no edge where
    ============= ====================================== ==========================================
    "cosine"      :math:`x_i^\top x_j / (|x_i| |x_j|)`   the weight is not positive, or a vector zero
    "dot"         :math:`x_i^\top x_j`                   the weight is not positive
    "euclidean"   :math:`1 / (1 + |x_i - x_j|)`
    ============= ====================================== ==========================================

    and stays if at least one of its ends counts the other among its ``k`` heaviest, so that a node may end up with
    more than ``k`` edges; with ``mutual``, if both do, so that it has at most ``k``. Of neighbours at equal weight
    those with the smaller index are taken.

    Exactly, all pairs are compared: candidates are found in float32, then ranked and weighed in float64, so that the
    result does not depend on the rounding of the former. That takes time quadratic in the nodes and memory linear in
    them. Approximately, candidates come from an index (a navigable small world of faiss, which must be installed), and
    a few of the true neighbours are missed; those that are found weigh the same. That takes time nearly linear in the
    nodes, and pays from some hundred thousand of them on. Either way the same vectors give the same graph.

    Args:
      vectors: one vector for each node, shape (nodes, dim), finite, floating-point or integer.
      k: how many neighbours each node counts, at least 1.
      metric: "cosine", "dot" or "euclidean".
      mutual: whether both ends must count each other.
      method: "exact" or "approximate".
      nodes: ids of the nodes that take part, integers of shape (any,); the others have no neighbours, and their vectors
        are not read. Pass ``np.arange(1, num_nodes)`` to leave out a padding row 0. None: all.
      progress: called as ``progress(done, total)`` after each block, in nodes; with an index, building it is half.

    Returns:
      Raw symmetric weights, BCOO float32 of shape (nodes, nodes).

    Raises:
      ImportError: if ``method`` is "approximate" and faiss is not installed.
      TypeError: if ``vectors`` are not real numbers, or ``k`` or an id is not an integer.
      ValueError: if ``vectors`` is no matrix, a number is not finite, ``k`` is below 1, an id is out of range, or
        ``metric`` or ``method`` is none of those listed.

    Examples:
      Four directions in the plane; the last vector has none:

      >>> import numpy as np
      >>> from sevo_optax import graph
      >>> vectors = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 2.0], [-1.0, 3.0], [0.0, 0.0]])
      >>> graph.knn(vectors, 1).todense().round(2)
      Array([[0.  , 1.  , 0.  , 0.  , 0.  ],
             [1.  , 0.  , 0.  , 0.  , 0.  ],
             [0.  , 0.  , 0.  , 0.95, 0.  ],
             [0.  , 0.  , 0.95, 0.  , 0.  ],
             [0.  , 0.  , 0.  , 0.  , 0.  ]], dtype=float32)

    References:
      Malkov and Yashunin, `Efficient and Robust Approximate Nearest Neighbor Search Using Hierarchical Navigable Small
      World Graphs <https://arxiv.org/abs/1603.09320>`_, 2018
    """
    k = check_positive_int(k, "k")
    check_choice(metric, _METRICS, "metric")
    check_choice(method, _METHODS, "method")
    refuse_masked(vectors, "vectors")
    try:
        matrix = np.asarray(vectors)
    except ValueError as error:
        raise ValueError("vectors is ragged; wanted (nodes, dim), one vector for each node.") from error
    check_weight_dtype(matrix.dtype, "vectors")
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"vectors has shape {matrix.shape}; wanted (nodes, dim), one vector for each node.")
    num_nodes = check_num_nodes(matrix.shape[0], "vectors.shape[0]")
    if nodes is None:
        ids = np.arange(num_nodes)
    else:
        ids = np.unique(check_ids(nodes, num_nodes, "nodes", "the number of vectors"))
    k = min(k, max(1, ids.size - 1))
    require_memory(
        28 * ids.size * matrix.shape[1] + 60 * ids.size * k + (method == "approximate") * 320 * ids.size,
        f"a graph of {k} neighbours of each of {ids.size} vectors",
        "Lower k, or reduce the vectors to fewer dimensions.",
    )
    points = matrix[ids].astype(np.float64)
    bad = first(np.logical_not(np.isfinite(points).all(axis=1)))
    if bad is not None:
        raise ValueError(
            f"vectors[{ids[bad]}] holds NaN or infinity; wanted finite numbers. "
            "Repair the vector, or leave the node out with nodes=..."
        )
    points, unit = _scale(points, metric)
    if method == "exact":
        found = [_neighbours(points, start, k, metric) for start in _blocks(ids.size, progress)]
    else:
        found = _indexed_neighbours(points, k, metric, progress)
    row, column, score = (np.concatenate(parts) for parts in zip(*found, strict=True))
    with np.errstate(over="ignore"):  # infinite weights are refused below
        weight = 1 / (1 + unit * np.sqrt(-score)) if metric == "euclidean" else unit * (unit * score)
    if metric == "cosine":
        weight = np.minimum(weight, 1)  # rounding may exceed it
    directed = scipy.sparse.coo_array((weight, (ids[row], ids[column])), shape=(num_nodes,) * 2).tocsr()
    weights = mirror(directed, "min" if mutual else "max")
    graph = to_bcoo(weights)
    if weights.nnz and not graph.nse:
        raise ValueError(
            f"vectors are too long or too short for metric={metric!r}: all weights, up to {weights.data.max():g}, are "
            "0 in float32; divide the vectors by their mean length."
        )
    return graph


def _blocks(total: int, progress: Callable[[int, int], object] | None) -> Any:
    """Yields where each block of nodes begins, and reports the one before."""
    for start in range(0, total, _ROWS):
        yield start
        if progress is not None:
            progress(min(start + _ROWS, total), total)


def _scale(points: np.ndarray, metric: str) -> tuple[np.ndarray, float]:
    """Points with norms of at most one, and the unit of length: then rounding is bounded, and nothing overflows."""
    if metric == "euclidean":
        # Distances do not depend on the origin, but their rounding does.
        points = points - np.mean(points / len(points), axis=0) * len(points)
    largest = np.abs(points).max(axis=1 if metric == "cosine" else None, keepdims=True)
    # Powers of two round nothing.
    exponent = np.frexp(np.where(largest == 0, 1, largest))[1]
    points = np.ldexp(points, -exponent)
    norm = np.sqrt(np.sum(points**2, axis=1, keepdims=True))
    if metric == "cosine":
        return points / np.where(norm == 0, 1, norm), 1.0
    further = math.frexp(norm.max())[1]
    return np.ldexp(points, -further), math.ldexp(1.0, int(exponent.item()) + further)


def _neighbours(points: np.ndarray, start: int, k: int, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ``k`` best neighbours of the points from ``start`` on, as rows, columns and scores.

    The score is the inner product or minus the squared distance. Columns are taken in blocks that grow, so that the
    first ones set a bar that few of the later candidates pass.
    """
    total, dim = points.shape
    rows = points[start : start + _ROWS]
    small = rows.astype(np.float32)
    square = np.sum(small**2, axis=1, keepdims=True)
    # Twice the bound of the rounding of an inner product of vectors of norm one.
    slack = 8 * (dim + 8) * float(np.finfo(np.float32).eps)
    lowest = -np.inf if metric == "euclidean" else 0.0
    bar = np.full(len(rows), lowest)
    kept = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    begin, width = 0, max(256, 4 * k)
    while begin < total:
        width = max(1, min(width, _matrices.CHUNK // len(rows)))
        others = points[begin : begin + width].astype(np.float32)
        score = small @ others.T
        if metric == "euclidean":
            score = 2 * score - square - np.sum(others**2, axis=1)
        # No node is its own neighbour: not in the bar, and not among the candidates.
        own = np.arange(max(start, begin), min(start + len(rows), begin + width, total))
        score[own - start, own - begin] = -np.inf
        if begin == 0 and score.shape[1] > k:
            # k candidates are at least this good already; without it, half of the first block would be ranked.
            bar = np.maximum(bar, np.partition(score, -k, axis=1)[:, -k] - slack)
        # One dimension is searched several times faster than two.
        place = np.flatnonzero(score >= (bar - slack)[:, None].astype(np.float32))
        row, column = np.divmod(place, score.shape[1])
        column += begin
        different = row + start != column
        row, column = row[different], column[different]
        step = max(1, _matrices.CHUNK // dim)
        for piece in range(0, row.size, step):
            new_row, new_column = row[piece : piece + step], column[piece : piece + step]
            exact = _score(rows[new_row], points[new_column], metric)
            passed = (exact > lowest) & (exact >= bar[new_row])
            new = (new_row[passed], new_column[passed], exact[passed])
            kept, bar = _best([np.concatenate(pair) for pair in zip(kept, new, strict=True)], k, lowest, len(rows))
        begin += width
        width *= 2
    row, column, exact = kept
    return row + start, column, exact


def _indexed_neighbours(
    points: np.ndarray, k: int, metric: str, progress: Callable[[int, int], object] | None
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The ``k`` best of the neighbours that an index finds, as :func:`_neighbours` gives them, block by block."""
    try:
        import faiss
    except ImportError:
        raise ImportError(
            "method 'approximate' needs faiss, which is not installed: pip install faiss-cpu, or take method='exact'"
        ) from None
    total = len(points)
    small = points.astype(np.float32)
    # Cosines are inner products of points with norm one. By distance, points of zeros would be nearer than most others.
    distance = faiss.METRIC_L2 if metric == "euclidean" else faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexHNSWFlat(small.shape[1], _LINKS, distance)
    index.hnsw.efConstruction = _BUILDING
    count = min(total, k + 1 + _SPARE)
    index.hnsw.efSearch = max(_SEARCHING, 2 * count)
    threads = faiss.omp_get_max_threads()
    # Several threads would link the points in an order of chance.
    faiss.omp_set_num_threads(1)
    try:
        for start in range(0, total, _ROWS):
            index.add(small[start : start + _ROWS])
            if progress is not None:
                progress(min(start + _ROWS, total) // 2, total)
    finally:
        faiss.omp_set_num_threads(threads)
    lowest = -np.inf if metric == "euclidean" else 0.0
    found = []
    for start in range(0, total, _ROWS):
        rows = points[start : start + _ROWS]
        _, column = index.search(small[start : start + _ROWS], count)
        row, column = np.repeat(np.arange(len(rows)), count), column.ravel().astype(np.int64)
        different = (column >= 0) & (column != row + start)  # -1: fewer were found
        row, column = row[different], column[different]
        score = _score(rows[row], points[column], metric)
        passed = score > lowest
        (row, column, score), _ = _best([row[passed], column[passed], score[passed]], k, lowest, len(rows))
        found.append((row + start, column, score))
        if progress is not None:
            progress((total + min(start + _ROWS, total)) // 2, total)
    return found


def _score(one: np.ndarray, other: np.ndarray, metric: str) -> np.ndarray:
    """Scores of pairs in float64, bit by bit the same in both directions and for equal vectors."""
    if metric == "euclidean":
        return -np.sum((one - other) ** 2, axis=1)
    return np.sum(one * other, axis=1)


def _best(
    candidates: list[np.ndarray], k: int, lowest: float, num_rows: int
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """The first ``k`` candidates of each row, and the score that a further one must reach."""
    row, column, score = candidates
    order = np.lexsort((column, -score, row))
    row, column, score = row[order], column[order], score[order]
    place = np.arange(row.size) - np.searchsorted(row, row)
    bar = np.full(num_rows, lowest)
    last = place == k - 1
    bar[row[last]] = score[last]
    chosen = place < k
    return (row[chosen], column[chosen], score[chosen]), bar
