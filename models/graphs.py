"""Building and describing item graphs from data files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from jax.experimental.sparse import BCOO

from models.data import Interactions, item_numbers, read_attributes
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
    interactions: Interactions,
    source: str,
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

    Args:
      interactions: what the graph is built from, the ``part`` called so.
      source: what the data is called.
      part: which part of the data it is.
      graph_max_length: see :func:`item_cooccurrence`, as for the next three.
      keep: as above.
      max_hops: as above.
      weighting: as above.
      attributes: a table of attributes; given: items that share one are related, instead of those that occur together.
      item_column: its column of the items' raw ids.
      attribute_column: its column of attributes.

    Returns:
      The raw weights and a title.

    Raises:
      FileNotFoundError: if a file does not exist.
      ValueError: if a file or an option does not fit.
    """
    if attributes is not None:
        items, values = read_attributes(attributes, item_column=item_column, attribute_column=attribute_column)
        numbers = item_numbers(interactions.item_ids, items.tolist())
        if not numbers.any():
            raise ValueError(
                f"item_column: no item of {attributes} is among the items of {source}; the first is {items[0]}, "
                f"those look like {interactions.item_ids[1]}"
            )
        known = numbers > 0  # filters may have left items out
        weights = graph.shared_attributes(numbers[known], values[known], interactions.num_items + 1)
        return weights, f"{source}: items that share {attribute_column}"
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
