"""User-item pairs, for models with a table of users."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.data import Interactions
from models.mesh import take


class PairBatch(NamedTuple):
    """Users, and what each has interacted with.

    Attributes:
      users: shape (pairs,), int32.
      targets: shape (pairs,), int32, an item of the user; 0: the pair counts nothing.
    """

    users: jax.Array
    targets: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["owners", "offsets", "items", "user", "target"],
    meta_fields=["num_batches", "batch_size"],
)
@dataclasses.dataclass(frozen=True)
class Pairs:
    """Draws of pairs: a user, uniformly and with replacement, then one of the user's items, uniformly.

    Attributes:
      owners: shape (owners,), int32, the users that have an item.
      offsets: shape (users + 1,), int32, where each user's items begin.
      items: shape (interactions,), int32, all items, user after user.
      user: shape (num_batches * batch_size,), int32, the draws of an epoch, after :meth:`shuffle`.
      target: shape (num_batches * batch_size,), int32, likewise; 0 in what fills the last batch.
      num_batches: batches in an epoch, which has as many pairs as there are interactions.
      batch_size: pairs in a batch.
    """

    owners: jax.Array
    offsets: jax.Array
    items: jax.Array
    user: jax.Array
    target: jax.Array
    num_batches: int
    batch_size: int

    @classmethod
    def from_interactions(cls, interactions: Interactions, *, batch_size: int) -> "Pairs":
        """Copies the interactions to the device.

        Args:
          interactions: the sequences.
          batch_size: pairs in a batch; the last one of an epoch is filled up with pairs that count nothing.

        Raises:
          ValueError: if there is no interaction, or ``batch_size`` is smaller than 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not len(interactions):
            raise ValueError("there is no interaction to train on; at least one is needed")
        num_batches = -(-len(interactions) // batch_size)
        blank = jnp.zeros(num_batches * batch_size, jnp.int32)
        return cls(
            owners=jnp.asarray(np.flatnonzero(interactions.lengths), jnp.int32),
            offsets=jnp.asarray(interactions.offsets, jnp.int32),
            items=jnp.asarray(interactions.items, jnp.int32),
            user=blank,
            target=blank,
            num_batches=num_batches,
            batch_size=batch_size,
        )

    @property
    def num_tokens(self) -> int:
        """Pairs in an epoch."""
        return len(self.items)

    @property
    def max_num_targets(self) -> int:
        """The most targets that a batch can have."""
        return self.batch_size

    def shuffle(self, key: jax.Array) -> "Pairs":
        """Draws the pairs of an epoch."""
        user_key, item_key = jax.random.split(key)
        user = self.owners[jax.random.randint(user_key, self.user.shape, 0, len(self.owners))]
        first, count = self.offsets[user], self.offsets[user + 1] - self.offsets[user]
        place = first + jax.random.randint(item_key, user.shape, 0, count)
        counted = jnp.arange(len(user)) < self.offsets[-1]  # the items may be filled up
        return dataclasses.replace(self, user=user, target=jnp.where(counted, take(self.items, place), 0))

    def batch(self, index: jax.typing.ArrayLike) -> PairBatch:
        """Cuts out batch ``index``, possibly traced."""
        start = index * self.batch_size
        user, target = (
            jax.lax.dynamic_slice_in_dim(values, start, self.batch_size) for values in (self.user, self.target)
        )
        return PairBatch(user, target)
