"""Queries outside of training: from histories or known users to vectors, for evaluation, serving and export alike."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.architectures.base import Recommender
from models.data import Interactions
from models.data.ids import id_lookup
from models.feeds import Batch, PackedSequences, PairBatch, pack
from models.mesh import split_batch


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["packed", "newest", "place"],
    meta_fields=["num_users"],
)
@dataclasses.dataclass(frozen=True)
class Histories:
    """Queries that are histories, packed.

    Attributes:
      packed: every user's history, as the model's inputs.
      newest: shape (batches, most users of a batch), int32, where each user's newest token is among the batch's tokens.
      place: shape (users,), int32, where each user is among all entries of ``newest``.
      num_users: number of users.
    """

    packed: PackedSequences
    newest: jax.Array
    place: jax.Array
    num_users: int

    @classmethod
    def from_interactions(
        cls, history: Interactions, *, model: type[Recommender], max_length: int, batch_size: int = 512
    ) -> "Histories":
        """Packs the histories.

        Args:
          history: what is known of each user; nobody's may be empty.
          model: the kind of model, which decides what follows the history in its inputs.
          max_length: the longest sequence the model takes.
          batch_size: users encoded at once, on average.
        """
        inputs = model.history_inputs(history)
        packed = pack(inputs, max_length=max_length, batch_size=batch_size, with_targets=False)
        # The last rows hold many short histories each. Dealt out in turn, all batches have about as many users, and
        # little is kept beside them.
        dealt = packed.dealt(jnp.arange(len(packed.slot)))
        packed = dataclasses.replace(packed, slot=packed.slot[dealt], step=packed.step[dealt])
        slot, step, length = (np.asarray(x) for x in (packed.slot, packed.step, packed.slot_length))
        slot, step = (x.reshape(packed.num_batches, -1) for x in (slot, step))
        ends = (slot >= 0) & (step == length[slot] - 1)
        counts = ends.sum(axis=1)
        batch, token = np.nonzero(ends)
        column = np.arange(len(batch)) - np.repeat(np.cumsum(counts) - counts, counts)
        newest = np.zeros((packed.num_batches, counts.max()), np.int32)
        newest[batch, column] = token
        place = np.empty(history.num_users, np.int32)
        place[np.asarray(packed.user)[slot[batch, token]]] = batch * newest.shape[1] + column
        return cls(packed, jnp.asarray(newest), jnp.asarray(place), history.num_users)

    def vectors(self, model: Recommender, represented: Any) -> jax.Array:
        """Every user's query, shape (users, dim). Of each batch, the newest tokens' vectors alone are kept."""

        def encode(index: jax.Array) -> jax.Array:
            vectors = model.encode(split_batch(self.packed.batch(index)), represented).vectors
            return vectors.reshape(-1, vectors.shape[-1])[self.newest[index]]

        found = jax.lax.map(encode, jnp.arange(self.packed.num_batches))
        return found.reshape(-1, found.shape[-1])[self.place]


@partial(jax.tree_util.register_dataclass, data_fields=["users"], meta_fields=["num_users"])
@dataclasses.dataclass(frozen=True)
class UserQueries:
    """Queries that are users of the training data.

    Attributes:
      users: shape (users,), int32.
      num_users: number of users.
    """

    users: jax.Array
    num_users: int

    @classmethod
    def from_interactions(cls, history: Interactions, *, user_ids: np.ndarray) -> "UserQueries":
        """Looks the users up by their raw ids.

        Args:
          history: whose users are meant.
          user_ids: shape (known users,), the raw id of each user that the model knows.

        Raises:
          ValueError: if the model does not know a user.
        """
        users = list(map(id_lookup(user_ids), history.user_ids.tolist()))
        if None in users:
            raise ValueError(
                f"user {history.user_ids[users.index(None)]} is unknown to the model, which has a table of "
                "the users that it was trained with; take a model of histories, such as sasrec"
            )
        return cls(jnp.asarray(users, jnp.int32), len(users))

    def vectors(self, model: Recommender, represented: Any) -> jax.Array:
        """Every user's query, shape (users, dim)."""
        return model.encode(PairBatch(self.users, jnp.zeros_like(self.users)), represented).vectors


def make_queries(
    history: Interactions, *, model: type[Recommender], config: Any, user_ids: np.ndarray | None
) -> Histories | UserQueries:
    """The queries of a model that stand for users with a history.

    Args:
      history: what is known of each user; nobody's may be empty.
      model: the kind of model.
      config: its configuration.
      user_ids: shape (known users,), the raw ids of the users that the model knows, if it has a table of users.
    """
    if model.query == "user":
        return UserQueries.from_interactions(history, user_ids=user_ids)
    return Histories.from_interactions(history, model=model, max_length=config.max_length)


def history_batch(model: Recommender, histories: jax.Array, *, num_items: int, max_length: int) -> Batch:
    """A batch of one history a row, as a model's inputs.

    Args:
      model: the model.
      histories: shape (rows, length), int32, item numbers, newest last, 0 in front of short histories. Where something
        follows the history in the model's inputs (BERT4Rec's mask token), the first column is not seen.
      num_items: size of the catalogue.
      max_length: the longest sequence the model takes; at least ``length``.
    """
    behind = jnp.asarray(behind_history(model, num_items), jnp.int32)
    rows, length = histories.shape
    inputs = jnp.concatenate([histories[:, len(behind) :], jnp.broadcast_to(behind, (rows, len(behind)))], axis=1)
    filled = inputs > 0
    unused = jnp.zeros_like(inputs)
    return Batch(
        inputs=inputs,
        positions=jnp.where(filled, jnp.arange(max_length - length, max_length), 0),
        padding=jnp.where(filled, max_length - jnp.sum(filled, axis=1, keepdims=True), 0),
        segments=filled.astype(jnp.int32),
        users=unused,
        targets=unused,
    )


def behind_history(model: Recommender, num_items: int) -> np.ndarray:
    """What follows a history in the model's inputs: nothing, or BERT4Rec's mask token."""
    return model.history_inputs(Interactions.from_sequences([[1]], num_items)).items[1:]


def history_scores(
    model: Recommender, represented: Any, histories: jax.Array, *, num_items: int, max_length: int
) -> jax.Array:
    """Scores every item as the one that follows each history.

    Args:
      model: the model, of histories.
      represented: what :meth:`Recommender.represent` returned.
      histories: as for :func:`history_batch`, as for what follows.
      num_items: size of the catalogue.
      max_length: the longest sequence the model takes.

    Returns:
      Shape (rows, num_items + 1), float32; minus infinity in column 0, which is no item.
    """
    batch = history_batch(model, histories, num_items=num_items, max_length=max_length)
    vectors = model.encode(batch, represented).vectors[:, -1]
    return _of_items(model.scores(vectors, represented), num_items)


def user_scores(model: Recommender, represented: Any, users: jax.Array, *, num_items: int) -> jax.Array:
    """Scores every item for known users, shape (users,), int32; like :func:`history_scores`."""
    vectors = model.encode(PairBatch(users, jnp.zeros_like(users)), represented).vectors
    return _of_items(model.scores(vectors, represented), num_items)


def _of_items(scores: jax.Array, num_items: int) -> jax.Array:
    return scores[:, : num_items + 1].astype(jnp.float32).at[:, 0].set(-jnp.inf)
