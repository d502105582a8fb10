"""Graphs in a few numbers."""

import dataclasses

import numpy as np
from scipy.sparse import csgraph

from sevo_optax._weights import Adjacency, symmetric_csr


@dataclasses.dataclass(frozen=True)
class GraphSummary:
    """What a graph looks like; ``print`` shows it as a table.

    Attributes:
      nodes: number of nodes.
      edges: number of pairs of different nodes that are connected.
      self_loops: number of nodes connected with themselves.
      isolated: number of nodes without any edge, whose normalised row is zero.
      degree_quantiles: number of neighbours (other nodes) at the quantiles ``QUANTILES``.
      weight_quantiles: weight of an edge between different nodes at the same quantiles; zeros if
        there is none.
      components: number of connected components, each isolated node being one.
      largest_component: number of nodes in the largest component.
      memory: bytes of the weights as a float32 BCOO: 12 for each stored entry.
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
      adjacency: symmetric weights of shape (nodes, nodes).

    Returns:
      A :class:`GraphSummary`, which prints as a table.

    Raises:
      TypeError: if ``adjacency`` is no matrix, or traced.
      ValueError: if the weights are invalid.

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
