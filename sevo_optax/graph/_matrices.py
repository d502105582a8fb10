"""Sparse matrices on their way to a graph: adding up edges, mirroring, selecting."""

import numpy as np
import scipy.sparse

from sevo_optax._memory import require_memory

# Interactions (or edges) handled at a time; bounds the memory next to the edges themselves.
CHUNK = 1 << 22

# More entries than this cannot be counted in the int32 that SciPy and JAX index with.
MAX_ENTRIES = 2**31

_FEWER = "Keep fewer edges, or build the graph on a machine with more memory."

SYMMETRIZE = ("sum", "mean", "max", "min")


class Sum:
    """Adds up many sparse matrices in time linear in their size, up to a logarithm.

    Partial sums of similar size are merged first, like digits of a binary counter, so that no entry
    is copied once for every matrix that follows.
    """

    def __init__(self, num_nodes: int, num_rows: int | None = None) -> None:
        self._shape = (num_nodes if num_rows is None else num_rows, num_nodes)
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
        # A float64 and an int32 an entry; the row pointers were counted before the first part was made.
        require_memory(12 * (last.nnz + self._parts[-1].nnz), "adding up the edges", _FEWER)
        self._parts[-1] = self._parts[-1] + last


def directed_csr(
    sources: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray | None,
    num_nodes: int,
    num_rows: int | None = None,
) -> scipy.sparse.csr_array:
    """Adds up checked edges to a canonical float64 CSR without explicit zeros.

    ``sources`` number rows, of which there are ``num_rows``, by default as many as nodes.
    """
    num_rows = num_nodes if num_rows is None else num_rows
    # Weights, both indices and the result; and the row pointers of it, its transpose, their sum and the BCOO.
    require_memory(
        28 * sources.size + 24 * num_rows,
        f"a graph of {num_rows} nodes from {sources.size} edges",
        "Number the nodes that occur from 0 to n-1, or keep fewer edges.",
    )
    weights = np.ones(sources.size) if weights is None else weights
    csr = scipy.sparse.coo_array((weights, (sources, targets)), shape=(num_rows, num_nodes)).tocsr()
    csr.sum_duplicates()
    csr.eliminate_zeros()
    return csr


def mirror(directed: scipy.sparse.csr_array, how: str) -> scipy.sparse.csr_array:
    """Combines a canonical matrix with its transpose."""
    require_memory(36 * directed.nnz, f"making {directed.nnz} edges symmetric", _FEWER)
    return both_ways(directed, directed.T.tocsr(), how)


def both_ways(directed: scipy.sparse.csr_array, transposed: scipy.sparse.csr_array, how: str) -> scipy.sparse.csr_array:
    """Combines rows of a matrix with the same rows of its transpose."""
    if how == "max":
        return directed.maximum(transposed)
    if how == "min":
        return directed.minimum(transposed)
    both = directed + transposed
    return both * 0.5 if how == "mean" else both


def select(csr: scipy.sparse.csr_array, kept: np.ndarray) -> scipy.sparse.csr_array:
    """The entries of ``csr`` under a mask."""
    pointer = np.concatenate([[0], np.cumsum(kept)])[csr.indptr]
    return scipy.sparse.csr_array((csr.data[kept], csr.indices[kept], pointer), shape=csr.shape)
