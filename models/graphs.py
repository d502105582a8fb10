"""Graphs over the rows of embedding tables, by name or from a file, and their descriptions."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import scipy.sparse
from jax.experimental.sparse import BCOO

from models.architectures.base import Group, NodeSet, Recommender
from models.config import GraphConfig, TrainConfig
from models.data import Interactions, item_numbers, read_attributes
from sevo_optax import graph

# A force-directed drawing of more nodes is a grey ball, and slow.
LARGEST_DRAWING = 300
NAMED_GRAPHS = ("item-item", "user-item", "attributes")


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
      name: item-item, attributes, or the path of a file that ``graph.save`` wrote.
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
        return _attribute_graph(interactions, config)
    if not Path(name).is_file():
        raise FileNotFoundError(f"graph: {name} is none of {', '.join(NAMED_GRAPHS)}, and no file of that name exists")
    found = graph.load(name)
    if found.shape[0] != num_nodes:
        raise ValueError(
            f"graph: {name} has {found.shape[0]:,} nodes, but the item table has {num_nodes:,} rows, row 0 included, "
            "which is no item; build it from the same data"
        )
    return found


def _attribute_graph(interactions: Interactions, config: GraphConfig) -> BCOO:
    if config.attributes is None:
        raise ValueError("attributes: the graph of attributes needs --attributes, a .tsv or .csv with one line an item")
    items, values = read_attributes(
        config.attributes, item_column=config.attribute_item_column, attribute_column=config.attribute_column
    )
    numbers = item_numbers(interactions.item_ids, items.tolist())
    if not numbers.any():
        raise ValueError(
            f"attribute_item_column: no item of {config.attributes} is among the items of the data; the first is "
            f"{items[0]}, those look like {interactions.item_ids[1]}"
        )
    known = numbers > 0  # filters may have left items out
    return graph.shared_attributes(numbers[known], values[known], interactions.num_items + 1)


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
        "user-item": f"users and items in {what}",
        "attributes": f"items that share {config.attribute_column}",
    }
    return f"{source}: {' and '.join(words.get(name, name) for name in config.graph)}"


def describe(adjacency: BCOO, heading: str, output_dir: Path) -> Iterator[str]:
    """Saves and draws a graph; yields the lines to print."""
    from models import plots  # matplotlib is slow to import and not needed to train

    yield str(graph.summary(adjacency))
    matrix = graph.to_scipy(adjacency)
    graph.save(output_dir / "weights.npz", adjacency)
    plots.graph_degrees(matrix, output_dir / "degrees.png", title=heading)
    yield f"weights: {output_dir / 'weights.npz'}, degrees: {output_dir / 'degrees.png'}"
    drawing = output_dir / "drawing.png"
    if adjacency.shape[0] <= LARGEST_DRAWING:
        plots.graph_drawing(matrix, drawing, title=heading)
        yield f"drawing: {drawing}"
    else:
        drawing.unlink(missing_ok=True)  # of an earlier, smaller graph
        yield f"no drawing: {adjacency.shape[0]:,} nodes are more than {LARGEST_DRAWING}"
