"""What the runs of a group were trained on: the graphs that updates were smoothed over, and the items' popularity."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import scipy.sparse

from models.architectures.registry import model_class
from models.config import GraphConfig
from models.data import Interactions, load_interactions, split_interactions
from models.graphs import build_graph, describe_graphs, files_digest, graph_files
from models.report.runs import EMBEDDED, Arm, Group
from models.training.checkpoints import RunInfo
from sevo_optax import graph

GRAPH_FIELDS = tuple(field.name for field in dataclasses.fields(GraphConfig))


@dataclasses.dataclass(frozen=True)
class ReportedGraph:
    """A graph that updates were smoothed over.

    Attributes:
      title: what it is made from.
      summary: the graph in a few numbers.
      degrees: how many nodes have 0, 1, 2 … neighbours.
      items: shape (items, items), its part over the items alone.
      origin: tells it from others, whatever their titles say.
    """

    title: str
    summary: graph.GraphSummary
    degrees: np.ndarray
    items: scipy.sparse.csr_array
    origin: Any

    @classmethod
    def of(cls, arm: Arm, adjacency: Any, num_items: int, num_special: int) -> Self:
        """Describes a graph over the rows of an item table, or over users and these rows.

        Args:
          arm: one that smooths over it.
          adjacency: raw weights, BCOO.
          num_items: size of the catalogue.
          num_special: rows of the item table that are no items; row 0 is one of them.
        """
        matrix = graph.to_scipy(adjacency)
        bare = scipy.sparse.csr_array(matrix - scipy.sparse.diags_array(matrix.diagonal()))
        bare.eliminate_zeros()
        first = matrix.shape[0] - (num_items + num_special) + 1  # users stand in front
        items = scipy.sparse.csr_array(bare[first : first + num_items, first : first + num_items])
        degrees = np.bincount(np.diff(bare.indptr))
        return cls(_title(arm), graph.summary(adjacency), degrees, items, _origin(arm))


@dataclasses.dataclass(frozen=True)
class Source:
    """The data of a group.

    Attributes:
      text: what it is, or why it is not known.
      counts: shape (items,), training interactions of items 1 …; None: not known.
      graphs: those that the arms smooth over, each once.
    """

    text: str
    counts: np.ndarray | None = None
    graphs: tuple[ReportedGraph, ...] = ()

    def graph_of(self, arm: Arm) -> ReportedGraph | None:
        """The graph that an arm smooths over, and for a plain one the only one; None: there is none, or several."""
        if len(self.graphs) == 1:
            return self.graphs[0]
        return None if arm.plain else next((x for x in self.graphs if x.origin == _origin(arm)), None)


def source_of(group: Group, data: Path | None = None) -> Source:
    """Reads the data of a group again, and builds its graphs from them.

    Args:
      group: the group.
      data: where the data lies now; None: where it was in training.
    """
    folders = [(arm, run) for arm in group.arms for run in arm.runs if run.directory is not None]
    if not folders:
        return Source("Read from cells, which keep no data: there is no graph to describe, and no item to look at.")
    _, first = folders[0]
    config = first.config if data is None else dataclasses.replace(first.config, data=data)
    name = EMBEDDED if config.data is None else str(config.data)
    try:
        interactions = load_interactions(config)
    except (OSError, ValueError) as error:
        return Source(f"The data, {name}, cannot be read ({error}); --data says where they are now.")
    if not RunInfo.read(first.directory).trained_on(interactions):
        return Source(f"The data, {name}, are not those of training; --data says where those are.")
    train = split_interactions(interactions, config).train
    arms = [arm for arm, _ in folders]
    try:
        graphs = _graphs(arms, train)
    except (OSError, ValueError) as error:
        return Source(f"{interactions}. The graph cannot be built again: {error}", _counts(train))
    return Source(f"{interactions}.", _counts(train), graphs)


def known_source(group: Group, interactions: Interactions, train: Interactions, adjacency: Any) -> Source:
    """The data of a group that was trained just now, with one graph.

    Args:
      group: the group.
      interactions: all of them.
      train: the training part.
      adjacency: the graph of all arms; None: there is none.
    """
    config = group.arms[0].config
    graphs: tuple[ReportedGraph, ...] = ()
    if adjacency is not None and not all(arm.plain for arm in group.arms):
        special = model_class(config.model).num_special
        graphs = (ReportedGraph.of(group.arms[0], adjacency, interactions.num_items, special),)
    return Source(f"{interactions}.", _counts(train), graphs)


def _graphs(arms: Sequence[Arm], train: Interactions) -> tuple[ReportedGraph, ...]:
    found: dict[Any, ReportedGraph] = {}
    for arm in arms:
        if arm.plain or _origin(arm) in found:
            continue
        if (files := arm.runs[0].files) and files != files_digest(arm.config):
            held = " or ".join(map(str, graph_files(arm.config)))
            raise ValueError(f"{held} held something else in training")
        special = model_class(arm.config.model).num_special
        adjacency = build_graph(train, arm.config, special)
        found[_origin(arm)] = ReportedGraph.of(arm, adjacency, train.num_items, special)
    return tuple(found.values())


def _origin(arm: Arm) -> tuple[Any, ...]:
    """What an arm's graph is made from: options, and what was in the files that they name."""
    return (*(getattr(arm.config, name) for name in GRAPH_FIELDS), arm.runs[0].files)


def _title(arm: Arm) -> str:
    return describe_graphs(arm.runs[0].dataset, "train", arm.config)


def _counts(train: Interactions) -> np.ndarray:
    return np.bincount(train.items, minlength=train.num_items + 1)[1:]
