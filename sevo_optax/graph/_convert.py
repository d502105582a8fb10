"""Graphs from edges and SciPy matrices, and back."""

from typing import Literal

import numpy as np
import scipy.sparse
from jax.experimental import sparse as jsparse
from numpy.typing import ArrayLike

from sevo_optax._weights import (
    Adjacency,
    check_choice,
    check_ids,
    check_num_nodes,
    check_same_length,
    check_weights,
    raw_bcoo,
    symmetric_csr,
)
from sevo_optax.graph._matrices import SYMMETRIZE, directed_csr, mirror


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
    sequence as edges give the same weights as :func:`cooccurrence`.

    Args:
      sources: node ids in 0..num_nodes-1, integers of shape (edges,).
      targets: node ids in 0..num_nodes-1, integers of shape (edges,).
      weights: finite, non-negative numbers of shape (edges,); None weighs every edge 1. An edge of
        weight 0 is no edge.
      num_nodes: number of nodes.
      symmetrize: "sum", "mean", "max" or "min".

    Returns:
      Raw symmetric weights, BCOO float32 of shape (num_nodes, num_nodes).

    Raises:
      TypeError: if ids are not integers or weights not real numbers.
      ValueError: if an id is out of range, a weight negative, not finite or outside the range of
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
    check_choice(symmetrize, SYMMETRIZE, "symmetrize")
    sources = check_ids(sources, num_nodes, "sources", "num_nodes")
    targets = check_ids(targets, num_nodes, "targets", "num_nodes")
    check_same_length(sources=sources, targets=targets)
    if weights is not None:
        weights = check_weights(weights, sources.size)
    return raw_bcoo(mirror(directed_csr(sources, targets, weights, num_nodes), symmetrize))


def from_scipy(matrix: scipy.sparse.sparray | scipy.sparse.spmatrix) -> jsparse.BCOO:
    """Takes over symmetric weights from a SciPy sparse matrix.

    Args:
      matrix: symmetric, non-negative and finite weights of shape (nodes, nodes) and a real dtype, in
        any SciPy format. A dense array is taken as well. Duplicates add up.

    Returns:
      The same weights, BCOO float32 of shape (nodes, nodes).

    Raises:
      TypeError: if it is no matrix or not of a real number dtype.
      ValueError: if it is not square, or a weight is negative, not finite, not symmetric or outside
        the range of float32. :func:`from_edges` symmetrises directed edges.

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
      adjacency: symmetric weights of shape (nodes, nodes), raw or normalised.

    Returns:
      The same weights as a ``csr_array`` with sorted, unique indices: float64 if ``adjacency`` is,
      float32 otherwise.

    Raises:
      TypeError: if it is no matrix, or traced.
      ValueError: if the weights are not valid, see :func:`from_scipy`.

    Examples:
      >>> from sevo_optax import graph
      >>> graph.to_scipy(graph.from_edges([0], [1], num_nodes=2)).toarray()
      array([[0., 1.],
             [1., 0.]], dtype=float32)
    """
    csr = symmetric_csr(adjacency)
    return csr if getattr(adjacency, "dtype", None) == np.float64 else csr.astype(np.float32)
