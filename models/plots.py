"""Pictures of runs and graphs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import scipy.sparse

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

# Colours that stay apart for colour-blind readers, one an optimizer everywhere.
COLORS = {"adamw": "#7f7f7f", "sevo-adamw": "#0072b2", "sevo-gradient": "#d55e00"}


def validation_curves(curves: Mapping[str, Sequence[tuple[int, float]]], path: Path, *, title: str = "") -> None:
    """Draws NDCG@10 on the validation items over epochs.

    Args:
      curves: by name, points (epoch, NDCG@10).
      path: the PNG to write.
      title: what was trained on what.
    """
    fig, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, points in curves.items():
        epochs, values = zip(*points, strict=True)
        best = max(range(len(values)), key=values.__getitem__)
        (line,) = ax.plot(epochs, values, label=name, color=COLORS.get(name), linewidth=2)
        ax.plot(epochs[best], values[best], "o", color=line.get_color())
    ax.set(xlabel="epoch", ylabel="validation NDCG@10", title=title)
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="lower right")
    _save(fig, path)


def graph_degrees(adjacency: scipy.sparse.csr_array, path: Path, *, title: str = "") -> None:
    """Draws how many nodes have at least so many neighbours, and how many edges at least such a weight.

    Both axes are logarithmic, so that a power law is a straight line.

    Args:
      adjacency: symmetric weights, shape (nodes, nodes); self-loops are left out.
      path: the PNG to write.
      title: what is drawn.
    """
    edges = scipy.sparse.triu(adjacency, k=1).tocoo()
    neighbours = np.bincount(np.concatenate([edges.row, edges.col]), minlength=adjacency.shape[0])
    fig, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for ax, values, xlabel, ylabel in [
        (axes[0], neighbours, "neighbours", "nodes with at least as many"),
        (axes[1], edges.data, "weight", "edges with at least as much"),
    ]:
        distinct, counts = np.unique(values[values > 0], return_counts=True)
        ax.loglog(distinct, counts[::-1].cumsum()[::-1], ".-", color=COLORS["sevo-adamw"], markersize=4)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    fig.suptitle(title)
    _save(fig, path)


def graph_drawing(adjacency: scipy.sparse.csr_array, path: Path, *, title: str = "") -> None:
    """Draws a small graph: related nodes close together, heavier edges darker, isolated nodes left out.

    Args:
      adjacency: symmetric weights, shape (nodes, nodes).
      path: the PNG to write.
      title: what is drawn.
    """
    import networkx

    network = networkx.from_scipy_sparse_array(scipy.sparse.triu(adjacency, k=1))
    network.remove_nodes_from(list(networkx.isolates(network)))
    places = networkx.spring_layout(network, seed=0)
    # The heavy edges last, so that they lie on top.
    edges = sorted(network.edges(data="weight"), key=lambda edge: edge[2])
    weights = np.array([weight for _, _, weight in edges])
    fig, ax = plt.subplots(figsize=(8, 8), layout="constrained")
    networkx.draw_networkx_edges(
        network,
        places,
        edges,
        ax=ax,
        edge_color=weights,
        edge_cmap=plt.cm.Greys,
        edge_vmin=-weights.max() / 8,
        width=0.8,
    )
    sizes = 10 + 6 * np.array([degree for _, degree in network.degree()])
    networkx.draw_networkx_nodes(network, places, ax=ax, node_size=sizes, node_color=COLORS["sevo-adamw"])
    if len(network) <= 100:
        networkx.draw_networkx_labels(network, places, ax=ax, font_size=6, font_color="white")
    ax.set_title(title)
    ax.set_axis_off()
    _save(fig, path)


def _save(fig: Figure, path: Path) -> None:
    """Writes the PNG whole or not at all, and frees the figure."""
    partial = path.with_name(path.name + ".partial")
    fig.savefig(partial, format="png", dpi=150)
    plt.close(fig)
    partial.replace(path)
