"""What a recommender is: the interface between models and everything that trains, evaluates and serves them.

A trained model scores an item by an inner product of a *query* (a history, or a known user) with a row of an item
table, plus a bias. Training, losses, evaluation and serving need five things of every model:

* its **feed**: what a batch is (packed sequences, prefixes or user-item pairs), see :mod:`models.feeds`;
* its **node sets**: which tables stand for the nodes of which kind of graph;
* :meth:`Recommender.represent`: what is computed once a step, such as a propagation over a graph;
* :meth:`Recommender.encode`: a batch's queries, and :meth:`Recommender.items`: what they are multiplied with;
* :meth:`Recommender.penalty`: what is added to the loss.

All else has a default that few models change: what is prepared from the training part (``make_context``), what of a
history is fed (``history_inputs``), what a batch asks for (``training_batch``, ``max_num_targets``), scores that are no
inner product (``scores``), what decays (``decay_mask``), what holds after each step (``constrain``), a closed form
(``fit``).
"""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import SequenceConfig, TrainConfig
from models.data import Interactions
from models.mesh import DATA, constrain, current_mesh

FeedName = Literal["sequences", "prefixes", "pairs", "none"]
NodeSet = Literal["items", "users+items"]
# Paths of the tables that are one set of nodes, in the order of the nodes.
Group = tuple[str, ...]


class Encoded(NamedTuple):
    """The queries of a batch.

    Attributes:
      vectors: shape (…, dim), with the shape of the batch's targets in front: what an item's row is multiplied with.
      rows: shape (count, …, dim): rows of the item table for the candidates that were asked for; None: none were.
      biases: the candidates' biases, which broadcast to (count, …); None: none were asked for.
    """

    vectors: jax.Array
    rows: jax.Array | None = None
    biases: jax.Array | None = None


class Queries(NamedTuple):
    """What a loss works on: the queries that have a target, and some that have none and count nothing.

    Attributes:
      vectors: shape (queries, dim).
      targets: shape (queries,), int32, the item to find; 0: none.
      users: shape (queries,), int32.
      candidates: shape (count, queries), int32, items that each query is compared with, the target first; None: the
        loss draws or needs none.
      rows: shape (count, queries, dim), the candidates' rows of the item table; None likewise.
      biases: the candidates' biases, which broadcast to (count, queries); None likewise.
    """

    vectors: jax.Array
    targets: jax.Array
    users: jax.Array
    candidates: jax.Array | None = None
    rows: jax.Array | None = None
    biases: jax.Array | None = None

    @property
    def weights(self) -> jax.Array:
        """Shape (queries,), float32 at least: averages over the queries that have a target."""
        counted = (self.targets > 0).astype(jnp.promote_types(self.vectors.dtype, jnp.float32))
        return counted / jnp.maximum(jnp.sum(counted), 1)


class Recommender(nnx.Module):
    """A model that recommends items 1 … num_items. Subclasses implement :meth:`encode` and :meth:`items`.

    Random numbers come from explicit keys: ``key`` None means evaluation. State that is not ``nnx.Param`` (running
    statistics, masks) may change inside :meth:`represent`, :meth:`encode` and :meth:`penalty`; training keeps the
    changes, and checkpoints hold them.
    """

    config_class: ClassVar[type[TrainConfig]]
    """The model's options, with its published settings for Amazon Beauty as defaults."""
    feed: ClassVar[FeedName] = "sequences"
    """What a batch is. none: the model is fitted in closed form, see :meth:`fit`."""
    query: ClassVar[Literal["history", "user"]] = "history"
    """Whether a query is a history, or a user that was known in training."""
    predicts_next: ClassVar[bool] = True
    """Whether every training token predicts the item behind it; otherwise :meth:`training_batch` makes the targets."""
    num_special: ClassVar[int] = 1
    """Rows of the item tables that are no items: row 0, and any behind the last item."""
    item_tables: ClassVar[int] = 1
    """Trained tables with a row for each item, as wide as the embeddings."""
    undecayed: ClassVar[frozenset[str]] = frozenset()
    """Names of the parameters that weight decay leaves alone, in whichever layer, such as ``bias``."""

    @classmethod
    def from_config(cls, config: Any, *, num_users: int, num_items: int, rngs: nnx.Rngs) -> Self:
        """A freshly initialised model.

        Args:
          config: of the model's ``config_class``.
          num_users: users of the training data.
          num_items: size of the catalogue.
          rngs: random state for the initialisation.
        """
        raise NotImplementedError

    @classmethod
    def make_context(cls, train: Interactions, config: Any) -> dict[str, Any]:
        """Arrays and graphs that the model computes with, such as an adjacency: an argument of every compiled step.

        Args:
          train: the training part of the interactions.
          config: of the model's ``config_class``.

        Returns:
          Arrays, or BCOO matrices, by name. They are saved beside the checkpoints.
        """
        del train, config
        return {}

    @staticmethod
    def history_inputs(history: Interactions) -> Interactions:
        """The sequences whose newest token's query scores the item that follows ``history``."""
        return history

    @property
    def node_sets(self) -> Mapping[NodeSet, tuple[Group, ...]]:
        """Which tables may be smoothed over which nodes; each group of tables is smoothed by itself.

        A group of ``items`` is one table over items (and special rows); one of ``users+items`` a table over users and
        one over items, stacked in this order.
        """
        return {"items": (("item_embedding",),)}

    @property
    def node_axes(self) -> Mapping[str, int]:
        """By path, the axis of the nodes in tables where they are no rows: 1 for a kernel (dim, nodes)."""
        return {}

    @classmethod
    def decay_mask(cls, params: Any) -> Any:
        """The tree of the parameters, with True where weight decay acts and False at those of :attr:`undecayed`."""

        def decays(path: Any, _: Any) -> bool:
            return cls.undecayed.isdisjoint(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))

        return jax.tree_util.tree_map_with_path(decays, params)

    def fit(self, train: Interactions, config: Any) -> None:
        """Computes the state of a model without gradients (``feed`` none) from the training part."""
        raise NotImplementedError

    def max_num_targets(self, num_tokens: int) -> int:
        """How many of ``num_tokens`` training tokens can be targets at once."""
        return num_tokens

    def training_batch(self, batch: Any, key: jax.Array) -> Any:
        """What the model is trained on: inputs as it shall see them, and targets."""
        del key
        return batch

    def represent(self, context: Mapping[str, Any], key: jax.Array | None = None) -> Any:
        """What is computed once a step or evaluation and handed to :meth:`encode`, :meth:`items`, :meth:`penalty`."""
        del context, key

    def encode(
        self, batch: Any, represented: Any = None, key: jax.Array | None = None, candidates: jax.Array | None = None
    ) -> Encoded:
        """The queries of a batch, and the item table's rows for some candidates.

        Args:
          batch: of the model's feed.
          represented: what :meth:`represent` returned.
          key: random key for dropout; None: evaluation.
          candidates: items, int32, of any shape (count, …); None: none.
        """
        raise NotImplementedError

    def __call__(self, batch: Any, key: jax.Array | None = None, represented: Any = None) -> jax.Array:
        """The vectors alone that :meth:`encode` makes of a batch."""
        return self.encode(batch, represented, key).vectors

    def items(self, represented: Any = None) -> tuple[jax.Array, jax.Array]:
        """Table (at least num_items + 1, dim) and bias (as many,) of the scores: row ``i`` scores item ``i``."""
        raise NotImplementedError

    def scores(self, vectors: jax.Array, represented: Any) -> jax.Array:
        """Scores of every row of the item table, shape (queries, rows); vectors as :meth:`encode` makes them."""
        table, bias = self.items(represented)
        return vectors.astype(jnp.promote_types(vectors.dtype, table.dtype)) @ table.T + bias

    def constrain(self) -> None:
        """Puts the parameters back to where the model wants them; training calls it after every update."""

    def penalty(
        self, batch: Any, queries: Queries, represented: Any, loss: jax.Array, key: jax.Array | None = None
    ) -> jax.Array | float:
        """What is added to the loss.

        Args:
          batch: what :meth:`training_batch` made.
          queries: what the loss worked on.
          represented: what :meth:`represent` returned.
          loss: the loss of the batch.
          key: random key; None: without randomness.
        """
        del batch, queries, represented, loss, key
        return 0.0


class SequenceRecommender(Recommender):
    """A recommender whose item table is also what it reads histories with, and scores with, without biases."""

    item_embedding: nnx.Embed

    @classmethod
    def from_config(cls, config: SequenceConfig, *, num_users: int, num_items: int, rngs: nnx.Rngs) -> Self:
        """A freshly initialised model, see :meth:`Recommender.from_config`."""
        del num_users
        return cls(num_items, **options_of(cls, config), rngs=rngs)  # type: ignore[call-arg]  # each model has its own

    def items(self, represented: Any = None) -> tuple[jax.Array, jax.Array]:
        """The item table and no bias."""
        del represented
        table = self.item_embedding.embedding[...]
        return table, jnp.zeros(len(table), table.dtype)


def options_of(model: type[Recommender], config: TrainConfig) -> dict[str, Any]:
    """The fields of a configuration that are arguments of the model's constructor; ``compute_dtype`` is ``dtype``."""
    names = inspect.signature(model.__init__).parameters
    values = {name: getattr(config, name) for name in names if hasattr(config, name)}
    if "dtype" in names:
        values["dtype"] = config.compute_dtype
    return values


def look_up(table: jax.Array, *indices: jax.Array | None) -> tuple[jax.Array | None, ...]:
    """Rows of a table for several arrays of indices, in one gather, so that the table's gradient is one scatter.

    Args:
      table: shape (rows, dim).
      indices: int32 arrays of any shape; None: nothing. The first of several belongs to the batch, a row
        each: on a mesh its embeddings are split as batches are.

    Returns:
      For each, an array of its shape with the rows behind; None for None.

    Examples:
      >>> table = jnp.array([[0.0], [10.0], [20.0]])
      >>> first, nothing, second = look_up(table, jnp.array([2, 1]), None, jnp.array([[0]]))
      >>> first.tolist(), nothing, second.tolist()
      ([[20.0], [10.0]], None, [[[0.0]]])
    """
    if current_mesh() is not None:
        # Joined and cut again, indices that are split over devices would be exchanged.
        apart = [None if index is None else table[index] for index in indices]
        if len(apart) > 1 and apart[0] is not None:
            apart[0] = constrain(apart[0], DATA)  # what follows needs whole rows, however the table is split
        return tuple(apart)
    asked = [index for index in indices if index is not None]
    rows = table[jnp.concatenate([index.ravel() for index in asked])]
    found, start = [], 0
    for index in indices:
        if index is None:
            found.append(None)
            continue
        found.append(rows[start : start + index.size].reshape(*index.shape, -1))
        start += index.size
    return tuple(found)
