"""Drawing negatives: items that a user has not interacted with, or any items."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from models.data.interactions import Interactions


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["threshold", "alias", "log_probabilities"],
    meta_fields=["num_items"],
)
@dataclasses.dataclass(frozen=True)
class Proposal:
    r"""Independent draws from the whole catalogue, with probability :math:`q_i \propto c_i^p` of item ``i``.

    Where :math:`p > 0`, :math:`c_i` is how often item ``i`` occurs, and items that do not occur are never drawn; where
    :math:`p = 0`, every item is as likely as any other. A draw takes two random numbers and two look-ups, however large
    the catalogue: each of ``num_items`` equal cells is shared by an item and its alias.

    Attributes:
      threshold: shape (num_items,), float32, the share of cell ``i - 1`` that is item ``i``'s. None: uniform draws.
      alias: shape (num_items,), int32, the item that has the rest of the cell. None: uniform draws.
      log_probabilities: shape (num_items + 1,), float32, :math:`\log q_i`; minus infinity at 0. None: uniform draws.
      num_items: size of the catalogue.

    References:
      Vose, `A linear algorithm for generating random numbers with a given distribution
      <https://doi.org/10.1109/32.92917>`_, 1991
    """

    threshold: jax.Array | None
    alias: jax.Array | None
    log_probabilities: jax.Array | None
    num_items: int

    @classmethod
    def from_counts(cls, counts: np.ndarray, power: float) -> "Proposal":
        """Builds the tables.

        Args:
          counts: shape (num_items + 1,), how often each item occurs; the first is not looked at.
          power: the exponent, at least 0.
        """
        num_items = len(counts) - 1
        if power == 0:
            return cls(None, None, None, num_items)
        weights = np.where(counts[1:] > 0, np.asarray(counts[1:], np.float64) ** power, 0)
        probabilities = weights / weights.sum()
        threshold, alias = _alias_table(probabilities)
        with np.errstate(divide="ignore"):
            log_probabilities = np.log(np.concatenate([[0], probabilities]))
        return cls(
            threshold=jnp.asarray(threshold, jnp.float32),
            alias=jnp.asarray(alias + 1, jnp.int32),
            log_probabilities=jnp.asarray(log_probabilities, jnp.float32),
            num_items=num_items,
        )

    def sample(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Draws items of the given shape, int32, with replacement."""
        cell_key, share_key = jax.random.split(key)
        item = jax.random.randint(cell_key, shape, 1, self.num_items + 1)
        if self.threshold is None:
            return item
        mine = jax.random.uniform(share_key, shape) < self.threshold[item - 1]
        return jnp.where(mine, item, self.alias[item - 1])

    def log_probability(self, items: jax.Array) -> jax.Array:
        """The logarithm of the probability of each item, float32, shaped as ``items``."""
        if self.log_probabilities is None:
            return jnp.full(items.shape, -np.log(self.num_items), jnp.float32)
        return self.log_probabilities[items]


def _alias_table(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares cells of equal size between at most two entries each, so that each entry gets its probability.

    Args:
      probabilities: shape (n,), float64.

    Returns:
      ``(threshold, alias)``, both of shape (n,): of cell ``i``, entry ``i`` has the share ``threshold[i]`` and entry
      ``alias[i]`` the rest.
    """
    left = (probabilities * len(probabilities)).tolist()
    threshold, alias = np.ones(len(left)), np.arange(len(left))
    small = [i for i, share in enumerate(left) if share < 1]
    large = [i for i, share in enumerate(left) if share >= 1]
    while small and large:
        i, giver = small.pop(), large[-1]
        threshold[i], alias[i] = left[i], giver
        left[giver] -= 1 - left[i]
        if left[giver] < 1:
            small.append(large.pop())
    # What is left in either list fills its cell, but for rounding.
    return threshold, alias


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["lowered", "offsets", "proposal"],
    meta_fields=["num_items", "longest"],
)
@dataclasses.dataclass(frozen=True)
class UnseenItems:
    """The items each user has not interacted with, for exact uniform draws on the device.

    Attributes:
      lowered: shape (distinct pairs,), int32: each user's distinct items in ascending order, the k-th lowered by k.
      offsets: shape (users + 1,), int32: user ``u`` owns ``lowered[offsets[u]:offsets[u + 1]]``.
      proposal: draws of any items, seen or not, for the losses against a sample of the catalogue.
      num_items: size of the catalogue.
      longest: the largest number of distinct items of one user.
    """

    lowered: jax.Array
    offsets: jax.Array
    proposal: Proposal
    num_items: int
    longest: int

    @classmethod
    def from_interactions(
        cls, interactions: Interactions, negative_power: float = 0.0, *, drawn: bool = True
    ) -> "UnseenItems":
        """Collects each user's distinct items.

        Args:
          interactions: what is known of each user.
          negative_power: the :class:`Proposal` draws items with probability ∝ count ** negative_power.
          drawn: whether unseen items will be drawn, by :meth:`sample`.

        Raises:
          ValueError: if they will be drawn, but a user has interacted with the whole catalogue.
        """
        users, items = interactions.distinct_pairs()
        counts = np.bincount(users, minlength=interactions.num_users)
        if drawn and counts.max() >= interactions.num_items:
            raise ValueError(
                f"user {interactions.user_ids[counts.argmax()]} has interacted with all {interactions.num_items} items:"
                " no unseen item is left to draw as a negative; use a larger catalogue, or --loss ce"
            )
        offsets = np.concatenate([[0], np.cumsum(counts)])
        lowered = items - (np.arange(len(items)) - offsets[users])
        return cls(
            lowered=jnp.asarray(lowered, jnp.int32),
            offsets=jnp.asarray(offsets, jnp.int32),
            proposal=Proposal.from_counts(
                np.bincount(interactions.items, minlength=interactions.num_items + 1), negative_power
            ),
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
