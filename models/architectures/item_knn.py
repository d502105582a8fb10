"""Item-kNN: items like those of the history, by who interacted with both, or by what they have in common."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from flax import nnx

from models.architectures.base import Encoded, Group, NodeSet, Recommender
from models.checks import OF_GRAPH, Heeded, check_heeded
from models.config import ClosedFormConfig, among
from models.data import Interactions, item_attributes
from models.feeds import Batch

# Pairs of items that may be counted at once on the host, some 60 bytes each.
PAIRS_AT_ONCE = 2**22


@dataclasses.dataclass(frozen=True)
class ItemKNNConfig(ClosedFormConfig):
    """Item-kNN's options."""

    heeded: ClassVar[Heeded] = {
        **ClosedFormConfig.heeded,
        **dict.fromkeys(OF_GRAPH["attributes"], (among("similarity", "attributes"),)),
    }

    model: str = "item-knn"
    num_neighbors: int = 100
    """Neighbours of an item in the history that get a score."""
    max_length: int = 50
    """How many of a history's newest items count."""
    similarity: Literal["users", "attributes"] = "users"
    """What makes two items similar: users in common, or attributes."""
    attributes: Path | None = None
    """attributes: a .tsv or .csv with one line an item."""
    attribute_item_column: str = "item_id"
    """Its column of item ids, as they are in the data."""
    attribute_column: str = "genres"
    """Its column of attributes, several separated by '|'."""

    @property
    def graph(self) -> tuple[str, ...]:
        """What the similarities come from, as graphs are called: it says which options are heeded."""
        return ("attributes",) if self.similarity == "attributes" else ("item-item",)

    def _at_least_one(self) -> tuple[str, ...]:
        return ("num_neighbors", "max_length", *super()._at_least_one())

    def _check(self) -> None:
        if self.attributes is not None:
            check_heeded([self], {"attributes": self.attributes})
        super()._check()


class ItemKNN(Recommender):
    r"""Scores an item by its similarity to the items of the history.

    .. math::

      s_{hj} = \sum_{i \in h} [\, j \in N_k(i) \,] \cos(i, j), \qquad
      \cos(i, j) = \frac{|U_i \cap U_j|}{\sqrt{|U_i| \, |U_j|}}

    over the distinct items of the history :math:`h`, where :math:`U_i` are the users with item :math:`i` in their
    training data, and :math:`N_k(i)` the ``num_neighbors`` items that are most similar to it. With ``similarity``
    attributes, :math:`U_i` are the attributes of item :math:`i`: then items are found that nobody has interacted with.

    Args:
      num_items: size of the catalogue.
      num_neighbors: k; items with fewer neighbours have as many as there are.
      max_length: how many of a history's newest items count.

    Examples:
      >>> model = ItemKNN(num_items=3, num_neighbors=1)
      >>> model.fit(Interactions.from_sequences([[1, 2], [1, 2], [2, 3]]), ItemKNNConfig(num_neighbors=1))
      >>> history = jnp.array([[0, 1]])
      >>> model.scores(history, None).round(3).tolist()
      [[0.0, 0.0, 0.816..., 0.0]]

    References:
      Deshpande and Karypis, `Item-Based Top-N Recommendation Algorithms <https://doi.org/10.1145/963770.963776>`_, 2004
    """

    config_class = ItemKNNConfig
    item_tables = 0
    feed = "none"

    def __init__(self, num_items: int, *, num_neighbors: int = 100, max_length: int = 50) -> None:
        width = max(1, min(num_neighbors, num_items - 1))
        self.max_length = max_length
        self.neighbors = nnx.Variable(jnp.zeros((num_items + 1, width), jnp.int32))
        self.similarities = nnx.Variable(jnp.zeros((num_items + 1, width)))

    @classmethod
    def from_config(cls, config: ItemKNNConfig, *, num_users: int, num_items: int, rngs: nnx.Rngs) -> Self:
        """A model that knows nothing yet, see :meth:`fit`."""
        del num_users, rngs
        return cls(num_items, num_neighbors=config.num_neighbors, max_length=config.max_length)

    @property
    def node_sets(self) -> Mapping[NodeSet, tuple[Group, ...]]:
        """Nothing is smoothed."""
        return {}

    def fit(self, train: Interactions, config: Any) -> None:
        """Finds every item's neighbours, on the host."""
        if config.similarity == "attributes":
            numbers, values = item_attributes(config, train.item_ids)
            _, code = np.unique(values.astype(str), return_inverse=True)
            # Attributes take the place of users: each is a set of items.
            offsets = np.concatenate([[0], np.bincount(code).cumsum()]).astype(np.int64)
            train = Interactions(numbers[np.argsort(code, kind="stable")], offsets, train.num_items)
        neighbors, similarities = nearest_items(train, self.neighbors.shape[1])
        self.neighbors[...] = jnp.asarray(neighbors)
        self.similarities[...] = jnp.asarray(similarities, self.similarities.dtype)

    def encode(
        self, batch: Batch, represented: Any = None, key: jax.Array | None = None, candidates: jax.Array | None = None
    ) -> Encoded:
        """At each token, the item numbers of its history up to it.

        Returns:
          Vectors of shape (rows, row_length, max_length), int32, the newest item last, 0 in front of the oldest.

        Raises:
          ValueError: if there are candidates: scores are no inner products.
        """
        del represented, key
        if candidates is not None:
            raise ValueError("candidates must be None: item-knn is not trained, and its scores are no inner products")
        row_length = batch.inputs.shape[1]
        place = jnp.arange(row_length)[:, None] + jnp.arange(1 - self.max_length, 1)
        inside = jnp.maximum(place, 0)
        mine = (place >= 0) & (batch.segments[:, inside] == batch.segments[:, :, None])
        return Encoded(jnp.where(mine, batch.inputs[:, inside], 0))

    def items(self, represented: Any = None) -> tuple[jax.Array, jax.Array]:
        """There is no item table: see :meth:`scores`.

        Raises:
          ValueError: always.
        """
        raise ValueError("item-knn has no item table: its scores are no inner products; call scores instead")

    def scores(self, vectors: jax.Array, represented: Any = None) -> jax.Array:
        """Scores of every item, shape (queries, num_items + 1), from histories (queries, max_length)."""
        del represented
        neighbors, similarities = self.neighbors[...], self.similarities[...]
        items = jnp.sort(vectors, axis=1)
        repeated = jnp.pad(items[:, 1:] == items[:, :-1], ((0, 0), (1, 0)))
        items = jnp.where(repeated, 0, items)
        query = jnp.arange(items.shape[0])[:, None]

        # One place of the history at a time: no more than (queries, num_neighbors) numbers beside the scores.
        def add(place: jax.Array, scores: jax.Array) -> jax.Array:
            item = items[:, place]
            return scores.at[query, neighbors[item]].add(similarities[item])

        scores = jnp.zeros((items.shape[0], neighbors.shape[0]), similarities.dtype)
        return jax.lax.fori_loop(0, items.shape[1], add, scores)


def nearest_items(
    interactions: Interactions, num_neighbors: int, *, pairs_at_once: int = PAIRS_AT_ONCE
) -> tuple[np.ndarray, np.ndarray]:
    """The most similar items of every item, by the cosine of their columns of the binary users × items matrix.

    Items are worked through in parts, so that the items × items matrix never exists.

    Args:
      interactions: who interacted with what; how often does not matter.
      num_neighbors: how many to keep.
      pairs_at_once: the bound on the pairs of items counted at once; a part has one item at least.

    Returns:
      ``(neighbors, similarities)``, both of shape (num_items + 1, num_neighbors): item numbers, int32, the most similar
      first and of equal ones the smaller number; float64. Both 0 where an item has fewer neighbours, and in row 0.

    Examples:
      >>> neighbors, similarities = nearest_items(Interactions.from_sequences([[1, 2], [1, 2], [2, 3]]), 2)
      >>> neighbors.tolist()
      [[0, 0], [2, 0], [1, 3], [2, 0]]
    """
    num_nodes = interactions.num_items + 1
    users, items = interactions.distinct_pairs()
    by_user = scipy.sparse.csr_array((np.ones(len(items)), (users, items)), shape=(interactions.num_users, num_nodes))
    by_item = by_user.T.tocsr()
    counts = np.diff(by_item.indptr).astype(np.float64)
    neighbors = np.zeros((num_nodes, num_neighbors), np.int32)
    similarities = np.zeros((num_nodes, num_neighbors))
    # An item meets at most as many others as its users have interactions, and never more than there are.
    met = np.minimum(by_item @ np.diff(by_user.indptr), num_nodes)
    for start, stop in _parts(met, pairs_at_once):
        common = (by_item[start:stop] @ by_user).tocoo()
        row, column = common.coords
        other = row + start != column
        row, column = row[other], column[other]
        # The product of the counts is exact, so that cosines which are equal compare equal more often than not.
        similarity = common.data[other] / np.sqrt(counts[start + row] * counts[column])
        order = np.lexsort((column, -similarity, row))
        row, column, similarity = row[order], column[order], similarity[order]
        place = np.arange(len(row)) - np.searchsorted(row, np.arange(stop - start))[row]
        kept = place < num_neighbors
        neighbors[start + row[kept], place[kept]] = column[kept]
        similarities[start + row[kept], place[kept]] = similarity[kept]
    return neighbors, similarities


def _parts(sizes: np.ndarray, limit: int) -> list[tuple[int, int]]:
    """Cuts a range into parts whose sizes add up to ``limit`` at most, one entry at least."""
    ends = np.cumsum(sizes)
    parts, start = [], 0
    while start < len(sizes):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + limit, side="right")))
        parts.append((start, stop))
        start = stop
    return parts
