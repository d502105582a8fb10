"""Graphs over the rows of embedding tables, by name or from a file, and their descriptions."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from jax.experimental.sparse import BCOO

from models.architectures.base import Group, NodeSet, Recommender
from models.architectures.item_knn import nearest_items
from models.config import GraphConfig, TrainConfig
from models.data import Interactions, item_attributes, read_item_vectors
from sevo_optax import graph

# A force-directed drawing of more nodes is a grey ball, and slow.
LARGEST_DRAWING = 300
NAMED_GRAPHS = ("item-item", "shared-users", "user-item", "attributes", "knn")


@dataclasses.dataclass(frozen=True)
class Nodes:
    """The nodes of a graph that updates are smoothed over.

    Attributes:
      adjacency: raw weights, BCOO of shape (nodes, nodes).
      node_set: what the nodes stand for.
      groups: the tables that stand for the nodes; each group is smoothed by itself.
      axes: by path, the axis of the nodes in tables where it is not the first.
    """

    adjacency: BCOO
    node_set: NodeSet
    groups: tuple[Group, ...]
    axes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def rows(self) -> tuple[str, ...]:
        """The paths of the tables that have a row a node: those whose idle rows can be told from the gradient."""
        return tuple(table for table in self.tables if not self.axes.get(table))

    @property
    def tables(self) -> tuple[str, ...]:
        """The paths of all tables that are smoothed."""
        return tuple(table for group in self.groups for table in group)


def smoothed_nodes(train: Interactions, config: TrainConfig, model: Recommender) -> Nodes | None:
    """Builds the graph that a configuration asks for, over the rows of a model's tables.

    Args:
      train: the training part.
      config: ``graph`` and what belongs to it.
      model: the model, or one whose arrays are shapes alone.

    Returns:
      The graph; None: the model has no tables to smooth.

    Raises:
      ValueError: if the model has no table for the nodes, or a graph cannot be built.
    """
    if not model.node_sets:
        return None
    node_set: NodeSet = "users+items" if "user-item" in config.graph else "items"
    if node_set not in model.node_sets:
        raise ValueError(
            f"graph: user-item needs a table of users, which {config.model} does not have; "
            "give item-item, attributes or a file, or a model such as mf-bpr"
        )
    adjacency = build_graph(train, config, model.num_special)
    return Nodes(adjacency, node_set, model.node_sets[node_set], model.node_axes)


def build_graph(interactions: Interactions, config: GraphConfig, num_special: int = 1) -> BCOO:
    """Builds the graphs that a configuration names, and combines them.

    Args:
      interactions: what they are built from.
      config: ``graph`` and what belongs to it.
      num_special: rows of the item table that are no items, isolated nodes: row 0, and any behind the last item.

    Returns:
      Raw weights over the rows of an item table or, if ``user-item`` is among the graphs, over users and then these
      rows. Several graphs are normalised first.

    Raises:
      FileNotFoundError: if a file does not exist.
      ValueError: if a file or an option does not fit.
    """
    num_nodes = interactions.num_items + num_special
    matrices = [_matrix(name, interactions, config, num_nodes) for name in config.graph]
    if "user-item" in config.graph:
        num_nodes += interactions.num_users
    padded = [graph.from_scipy(_padded(matrix, num_nodes)) for matrix in matrices]
    if len(padded) == 1:
        return padded[0]
    weights = config.graph_weights or (1.0,) * len(padded)
    return graph.combine([graph.normalize(adjacency) for adjacency in padded], weights)


def item_graph(name: str, interactions: Interactions, config: GraphConfig) -> BCOO:
    """Builds a graph over rows 0 … num_items of an item table; rows that are no items are isolated.

    Args:
      name: item-item, shared-users, attributes, knn, or the path of a file that ``graph.save`` wrote.
      interactions: what the graph is built from.
      config: what belongs to graphs of that name.

    Raises:
      FileNotFoundError: if a file does not exist.
      ValueError: if a file or an option does not fit.
    """
    num_nodes = interactions.num_items + 1
    if name == "item-item":
        return graph.cooccurrence(
            (interactions.items, interactions.offsets),
            num_nodes,
            max_length=config.graph_max_length,
            keep=config.graph_keep,
            max_hops=config.max_hops,
            weighting=config.graph_weighting,
        )
    if name == "attributes":
        numbers, values = item_attributes(config, interactions.item_ids)
        return graph.shared_attributes(numbers, values, num_nodes)
    if name == "shared-users":
        return shared_users(interactions, config.max_neighbors)
    if name == "knn":
        vectors, known = _item_vectors(config, interactions.item_ids)
        try:
            return graph.knn(
                vectors,
                config.knn_neighbors,
                metric=config.knn_metric,
                method=config.knn_method,
                nodes=known.nonzero()[0],
            )
        except ImportError as error:
            raise ValueError(f"knn_method: {error}") from None
    if not Path(name).is_file():
        raise FileNotFoundError(f"graph: {name} is none of {', '.join(NAMED_GRAPHS)}, and no file of that name exists")
    found = graph.load(name)
    if found.shape[0] != num_nodes:
        raise ValueError(
            f"graph: {name} has {found.shape[0]:,} nodes, but the item table has {num_nodes:,} rows, row 0 included, "
            "which is no item; build it from the same data"
        )
    return found


def shared_users(interactions: Interactions, max_neighbors: int) -> BCOO:
    r"""Connects items that the same users interacted with, in whatever order and distance.

    .. math:: w_{ij} = \frac{|U_i \cap U_j|}{\sqrt{|U_i| \, |U_j|}}

    for the users :math:`U_i` of item :math:`i`, so that popular items do not outweigh the others. An edge stays if it
    is among the ``max_neighbors`` heaviest of at least one of its ends; of equal ones, those to smaller numbers.

    Args:
      interactions: who interacted with what; how often does not matter.
      max_neighbors: the bound on the edges that an item keeps.

    Returns:
      Raw symmetric weights, BCOO float32 of shape (num_items + 1, num_items + 1); row 0 is no item.

    Examples:
      >>> shared_users(Interactions.from_sequences([[1, 2], [1, 2], [2, 3]]), 2).todense().round(2)
      Array([[0.  , 0.  , 0.  , 0.  ],
             [0.  , 0.  , 0.82, 0.  ],
             [0.  , 0.82, 0.  , 0.58],
             [0.  , 0.  , 0.58, 0.  ]], dtype=float32)
    """
    num_nodes = interactions.num_items + 1
    neighbors, similarities = nearest_items(interactions, min(max_neighbors, interactions.num_items))
    row, place = np.nonzero(similarities)
    if not row.size:  # no two items have a user in common
        return graph.from_scipy(scipy.sparse.csr_array((num_nodes, num_nodes)))
    column, weight = neighbors[row, place], similarities[row, place]
    # Those that both ends count weigh the same from either.
    return graph.from_edges(row, column, weight, num_nodes=num_nodes, symmetrize="max")


def _item_vectors(config: GraphConfig, item_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if config.vectors is None:
        raise ValueError("vectors: the graph knn needs --vectors, an .npz with the arrays item_ids and vectors")
    return read_item_vectors(config.vectors, item_ids)


def graph_notes(config: Any, item_ids: np.ndarray) -> tuple[str, ...]:
    """What must be said of a configuration's graphs: how many items have no vector.

    Args:
      config: ``graph`` and what belongs to it; a model in closed form has none.
      item_ids: shape (num_items + 1,), the catalogue's raw ids.

    Raises:
      FileNotFoundError: if a file does not exist.
      ValueError: if a file does not fit.
    """
    if "knn" not in config.graph:
        return ()
    _, known = _item_vectors(config, item_ids)
    lacking = len(known) - 1 - int(known.sum())
    if not lacking:
        return ()
    return (
        f"{lacking:,} of {len(known) - 1:,} items have no vector in {config.vectors}: they get no edges of graph knn",
    )


def graph_files(config: Any) -> tuple[Path, ...]:
    """The files that a configuration's graphs, or the similarities of a model in closed form, are made of."""
    named = {"attributes": config.attributes, "knn": config.vectors}
    files = [named.get(name, None if name in NAMED_GRAPHS else Path(name)) for name in config.graph]
    return tuple(file for file in files if file is not None)


def refuse_pipes(config: Any) -> None:
    """Refuses what can be read only once: a run reads the files of its graphs again, to know them when it goes on.

    Raises:
      ValueError: if one of :func:`graph_files` is a pipe.
    """
    for file in graph_files(config):
        if file.is_fifo():
            raise ValueError(f"graph: {file} is a pipe, which can be read only once; write it to a file")


def files_digest(config: Any) -> str:
    """A digest of what is in :func:`graph_files`; empty: there are none."""
    digest, files = hashlib.sha256(), graph_files(config)
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16] if files else ""


def _matrix(name: str, train: Interactions, config: GraphConfig, num_nodes: int) -> scipy.sparse.csr_array:
    """A graph over the rows of item tables, or over users and these rows, as a matrix on the host."""
    if name == "user-item":
        return graph.to_scipy(graph.user_item(train.users, train.items, train.num_users, num_nodes))
    matrix = graph.to_scipy(item_graph(name, train, config))
    matrix.resize((num_nodes, num_nodes))
    return matrix


def _padded(matrix: scipy.sparse.csr_array, num_nodes: int) -> scipy.sparse.csr_array:
    """The matrix with as many isolated nodes in front as are missing: users."""
    missing = num_nodes - matrix.shape[0]
    if not missing:
        return matrix
    return scipy.sparse.block_diag([scipy.sparse.csr_array((missing, missing), dtype=matrix.dtype), matrix], "csr")


def describe_graphs(source: str, part: str, config: GraphConfig) -> str:
    """The graphs of a configuration in words.

    Args:
      source: what the data is called.
      part: which part of it they are built from: train or all.
      config: ``graph`` and what belongs to it.
    """
    what = "training interactions" if part == "train" else "all interactions"
    words = {
        "item-item": (
            f"co-occurrence in {what}, {config.graph_keep} {config.graph_max_length}, up to {config.max_hops} hops, "
            f"by {config.graph_weighting}"
        ),
        "shared-users": f"shared users in {what}, {config.max_neighbors} an item, normalised by popularity",
        "user-item": f"users and items in {what}",
        "attributes": f"items that share {config.attribute_column}",
        "knn": (
            f"{config.knn_neighbors} nearest items by {config.knn_metric} of "
            f"{'vectors' if config.vectors is None else config.vectors.name}"
        ),
    }
    return f"{source}: {' and '.join(words.get(name, name) for name in config.graph)}"


def check_folder(output_dir: Path) -> None:
    """Refuses a folder for a graph whose files would replace others of the same names.

    Raises:
      ValueError: if there is a weights.npz that holds no graph, or a picture without one.
    """
    weights = output_dir / "weights.npz"
    if weights.exists():
        # What is no archive, or a damaged one, fails in many ways.
        with contextlib.suppress(Exception), weights.open("rb") as file, np.load(file) as arrays:
            if {"format", "shape", "data"} <= set(arrays.files):
                return
        what = "weights.npz, which holds no graph"
    else:
        pictures = [name for name in ("degrees.png", "drawing.png") if (output_dir / name).exists()]
        if not pictures:
            return
        what = f"{pictures[0]}, but no weights.npz that it could be of"
    raise ValueError(f"output_dir: {output_dir} holds {what}; give another --output-dir, or empty it yourself")


def describe(adjacency: BCOO, heading: str, output_dir: Path) -> Iterator[str]:
    """Saves and draws a graph; yields the lines to print."""
    from models import plots  # matplotlib is slow to import and not needed to train

    yield str(graph.summary(adjacency))
    matrix = graph.to_scipy(adjacency)
    graph.save(output_dir / "weights.npz", adjacency)
    plots.graph_degrees(matrix, output_dir / "degrees.png", title=heading)
    yield f"weights: {output_dir / 'weights.npz'}, degrees: {output_dir / 'degrees.png'}"
    drawing = output_dir / "drawing.png"
    why_not = ""
    if adjacency.shape[0] > LARGEST_DRAWING:
        why_not = f"{adjacency.shape[0]:,} nodes are more than {LARGEST_DRAWING}"
    elif not scipy.sparse.triu(matrix, k=1).nnz:
        why_not = "no two nodes are connected"
    if why_not:
        drawing.unlink(missing_ok=True)  # of an earlier graph
        yield f"no drawing: {why_not}"
    else:
        plots.graph_drawing(matrix, drawing, title=heading)
        yield f"drawing: {drawing}"
