"""Drawing items that a user has not interacted with."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from models.data.interactions import Interactions


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["lowered", "offsets"],
    meta_fields=["num_items", "longest"],
)
@dataclasses.dataclass(frozen=True)
class UnseenItems:
    """The items each user has not interacted with, for exact uniform draws on the device.

    Attributes:
      lowered: shape (distinct pairs,), int32: each user's distinct items in ascending order, the k-th lowered by k.
      offsets: shape (users + 1,), int32: user ``u`` owns ``lowered[offsets[u]:offsets[u + 1]]``.
      num_items: size of the catalogue.
      longest: the largest number of distinct items of one user.
    """

    lowered: jax.Array
    offsets: jax.Array
    num_items: int
    longest: int

    @classmethod
    def from_interactions(cls, interactions: Interactions) -> "UnseenItems":
        """Collects each user's distinct items.

        Raises:
          ValueError: if a user has interacted with the whole catalogue, so that nothing is unseen.
        """
        users, items = interactions.distinct_pairs()
        counts = np.bincount(users, minlength=interactions.num_users)
        if counts.max() >= interactions.num_items:
            raise ValueError(
                f"user {int(counts.argmax()) + 1} has interacted with all {interactions.num_items} items: "
                "no unseen item is left to draw as a negative; use a larger catalogue"
            )
        offsets = np.concatenate([[0], np.cumsum(counts)])
        lowered = items - (np.arange(len(items)) - offsets[users])
        return cls(
            lowered=jnp.asarray(lowered, jnp.int32),
            offsets=jnp.asarray(offsets, jnp.int32),
            num_items=interactions.num_items,
            longest=int(counts.max()),
        )

    def sample(self, key: jax.Array, users: jax.Array) -> jax.Array:
        """Draws one unseen item for each entry of ``users``, uniformly.

        The r-th unseen item is r plus the number of seen items before it. With the k-th seen item lowered by k, that
        number is where r belongs in the user's ascending list: a binary search, without rejection.

        Args:
          key: a random key.
          users: any shape, int32.

        Returns:
          Item ids, shaped as ``users``.
        """
        low, high = self.offsets[users], self.offsets[users + 1]
        count = self.num_items - (high - low)
        rank = 1 + jnp.minimum((jax.random.uniform(key, users.shape) * count).astype(jnp.int32), count - 1)
        left, right = low, high
        for _ in range(self.longest.bit_length()):
            middle = (left + right) // 2
            before = (left < right) & (self.lowered[middle] <= rank)
            left, right = jnp.where(before, middle + 1, left), jnp.where(before, right, middle)
        return rank + left - low
