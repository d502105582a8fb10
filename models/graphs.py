"""Building and describing item graphs from data files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from jax.experimental.sparse import BCOO

from models.data import Interactions, leave_one_out, load, read_attributes
from sevo_optax import graph

# A force-directed drawing of more nodes is a grey ball, and slow.
LARGEST_DRAWING = 300


def item_cooccurrence(
    interactions: Interactions,
    *,
    num_nodes: int,
    graph_max_length: int,
    max_hops: int,
    keep: Literal["last", "first"] = "last",
    weighting: Literal["distance", "frequency"] = "distance",
) -> BCOO:
    """Co-occurrence weights over the ``num_nodes`` rows of an item table: rows that are no items are isolated."""
    return graph.cooccurrence(
        (interactions.items, interactions.offsets),
        num_nodes,
        max_length=graph_max_length,
        keep=keep,
        max_hops=max_hops,
        weighting=weighting,
    )


def build(
    data: Path | None,
    part: Literal["train", "all"],
    graph_max_length: int,
    keep: Literal["last", "first"],
    max_hops: int,
    weighting: Literal["distance", "frequency"],
    attributes: Path | None,
    item_column: str,
    attribute_column: str,
) -> tuple[BCOO, str]:
    """Builds the graph that the options describe.

    Returns:
      The raw weights and a title.

    Raises:
      FileNotFoundError: if a file does not exist.
      ValueError: if a file or an option does not fit.
    """
    interactions = load(data)
    source = "embedded data" if data is None else data.stem
    if attributes is not None:
        items, values = read_attributes(attributes, item_column=item_column, attribute_column=attribute_column)
        weights = graph.shared_attributes(items, values, interactions.num_items + 1)
        return weights, f"{source}: items that share {attribute_column}"
    if part == "train":
        interactions = leave_one_out(interactions).train
    weights = item_cooccurrence(
        interactions,
        num_nodes=interactions.num_items + 1,
        graph_max_length=graph_max_length,
        max_hops=max_hops,
        keep=keep,
        weighting=weighting,
    )
    what = "training interactions" if part == "train" else "all interactions"
    return (
        weights,
        f"{source}: co-occurrence in {what}, {keep} {graph_max_length}, up to {max_hops} hops, by {weighting}",
    )


def describe(adjacency: BCOO, title: str, output_dir: Path) -> Iterator[str]:
    """Saves and draws a graph; yields the lines to print."""
    from models import plots  # matplotlib is slow to import and not needed to train

    yield str(graph.summary(adjacency))
    matrix = graph.to_scipy(adjacency)
    graph.save(output_dir / "weights.npz", adjacency)
    plots.graph_degrees(matrix, output_dir / "degrees.png", title=title)
    yield f"weights: {output_dir / 'weights.npz'}, degrees: {output_dir / 'degrees.png'}"
    drawing = output_dir / "drawing.png"
    if adjacency.shape[0] <= LARGEST_DRAWING:
        plots.graph_drawing(matrix, drawing, title=title)
        yield f"drawing: {drawing}"
    else:
        drawing.unlink(missing_ok=True)  # of an earlier, smaller graph
        yield f"no drawing: {adjacency.shape[0]:,} nodes are more than {LARGEST_DRAWING}"
