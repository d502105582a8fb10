"""Graphs from graphs: adding relations up, thinning out, normalising."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jax.experimental import sparse as jsparse

from sevo_optax._memory import require_memory
from sevo_optax._weights import (
    Adjacency,
    check_non_negative,
    check_positive_int,
    normalize_csr,
    raw_bcoo,
    symmetric_csr,
    to_bcoo,
)
from sevo_optax.graph import _matrices
from sevo_optax.graph._matrices import mirror, select


def combine(graphs: Sequence[Adjacency], coefficients: Sequence[float] | None = None) -> jsparse.BCOO:
    r"""Adds several relations over the same nodes.

    .. math::
      A = \sum_r c_r A_r

    Raw weights of different relations differ in scale: a count of co-occurrences reaches thousands
    where a shared genre weighs 1. Pass ``normalize(graph)`` in place of each graph to let only the
    coefficients decide.

    Args:
      graphs: symmetric weights, all of shape (nodes, nodes).
      coefficients: one finite, non-negative number for each graph, not all 0; None adds the graphs
        as they are.

    Returns:
      Symmetric weights, BCOO float32 of shape (nodes, nodes).

    Raises:
      TypeError: if ``graphs`` is a single graph, or holds something else.
      ValueError: if there are no graphs, shapes differ, or coefficients are invalid.

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
    if isinstance(coefficients, Mapping):
        raise TypeError("coefficients is a mapping; wanted a list, one number for each graph in their order.")
    coefficients = list(coefficients)
    if len(coefficients) != len(graphs):
        raise ValueError(f"there are {len(coefficients)} coefficients for {len(graphs)} graphs; wanted one each.")
    for index, value in enumerate(coefficients):
        check_non_negative(value, f"coefficients[{index}]")
    if not any(coefficients):
        raise ValueError("all coefficients are 0; wanted at least one above.")

    total: Any = None
    for index, (graph, coefficient) in enumerate(zip(graphs, coefficients, strict=True)):
        csr = symmetric_csr(graph, f"graphs[{index}]")
        if total is not None and csr.shape != total.shape:
            raise ValueError(
                f"graphs[{index}] has {csr.shape[0]} nodes but graphs[0] has {total.shape[0]}; "
                "wanted the same nodes in every graph. Build them with one num_nodes."
            )
        if total is not None:
            require_memory(
                24 * (total.nnz + csr.nnz), "adding up the graphs", "Thin them out first, with top_k or drop_below."
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
      adjacency: symmetric weights of shape (nodes, nodes).
      k: how many neighbours each node keeps, at least 1.

    Returns:
      Symmetric weights, BCOO float32 of shape (nodes, nodes).

    Raises:
      TypeError: if ``k`` is not an integer, or ``adjacency`` no matrix.
      ValueError: if ``k`` is below 1, or the weights are invalid.

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
        end = int(np.searchsorted(csr.indptr, csr.indptr[begin] + _matrices.CHUNK, side="right")) - 1
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
    return raw_bcoo(mirror(select(csr, kept), "max"))


def drop_below(adjacency: Adjacency, threshold: float) -> jsparse.BCOO:
    """Keeps the edges whose weight is at least a threshold, self-loops included.

    Args:
      adjacency: symmetric weights of shape (nodes, nodes).
      threshold: a finite, non-negative number. Both sides are compared in float32, so that a weight
        set to 0.7 reaches a threshold of 0.7.

    Returns:
      Symmetric weights, BCOO float32 of shape (nodes, nodes).

    Raises:
      TypeError: if ``threshold`` is not a number, or ``adjacency`` no matrix.
      ValueError: if ``threshold`` is negative or not finite, or the weights are invalid.

    Examples:
      >>> from sevo_optax import graph
      >>> weights = graph.from_edges([0, 1], [1, 2], [1.0, 3.0], num_nodes=3)
      >>> graph.drop_below(weights, 2.0).todense()
      Array([[0., 0., 0.],
             [0., 0., 3.],
             [0., 3., 0.]], dtype=float32)
    """
    check_non_negative(threshold, "threshold")
    csr = symmetric_csr(adjacency)
    with np.errstate(over="ignore"):  # what is too large for float32 compares as infinity
        kept = csr.data.astype(np.float32) >= np.float32(threshold)
    return raw_bcoo(select(csr, kept))


def normalize(adjacency: Adjacency, *, isolated: Literal["zero", "identity"] = "zero") -> jsparse.BCOO:
    r"""Normalises weights symmetrically by the degrees of their two ends.

    .. math::
      \tilde{A} = D^{-1/2} A D^{-1/2}, \qquad D_{ii} = \textstyle\sum_j A_{ij}

    as in Section 2.1 of the paper. The result does not depend on the scale of the weights, and its
    eigenvalues lie in [-1, 1]. The transformation does this itself; call it to look at the result,
    or to bring graphs to one scale for :func:`combine`.

    Args:
      adjacency: raw symmetric weights of shape (nodes, nodes).
      isolated: what to do with a node without edges, whose row is zero. "zero" leaves it: smoothing
        then shrinks its update by :math:`(1-\beta)/(1-\beta^{L+1})`, about 0.25 at
        :math:`\beta=0.99, L=3`, as in the paper. "identity" puts a 1 on its diagonal, and the row
        keeps its update unchanged.

    Returns:
      Normalised weights, BCOO float32 of shape (nodes, nodes), computed in float64.

    Raises:
      TypeError: if ``adjacency`` is no matrix, or traced.
      ValueError: if the weights are invalid, or ``isolated`` is none of the above.

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
