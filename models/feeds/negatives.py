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
    :math:`p = 0`, every item is as likely as any other. A draw takes 64 random bits and two look-ups, however large the
    catalogue: each of ``num_items`` equal cells is shared by an item and its alias. Every probability is met to
    :math:`2^{-52}` of a cell.

    Attributes:
      threshold: shape (2, num_items), uint32, the share of cell ``i - 1`` that is item ``i``'s, as a multiple of
        :math:`2^{-64}`: its upper and its lower half. None: uniform draws.
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
        # Relative to the largest, or a large power would be more than a number can hold.
        shares = np.asarray(counts[1:], np.float64) / counts[1:].max()
        weights = np.where(counts[1:] > 0, shares**power, 0)
        probabilities = weights / weights.sum()
        threshold, alias = _alias_table(probabilities)
        with np.errstate(divide="ignore"):
            log_probabilities = np.log(np.concatenate([[0], probabilities]))
        return cls(
            threshold=jnp.asarray(_as_words(threshold)),
            alias=jnp.asarray(alias + 1, jnp.int32),
            log_probabilities=jnp.asarray(log_probabilities, jnp.float32),
            num_items=num_items,
        )

    def sample(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Draws items of the given shape, int32, with replacement."""
        cell, upper, lower = _random_below(key, shape, self.num_items)
        if self.threshold is None:
            return cell + 1
        mine_upper, mine_lower = self.threshold[0, cell], self.threshold[1, cell]
        mine = (upper < mine_upper) | ((upper == mine_upper) & (lower < mine_lower))
        return jnp.where(mine, cell + 1, self.alias[cell])

    def log_probability(self, items: jax.Array) -> jax.Array:
        """The logarithm of the probability of each item, float32, shaped as ``items``."""
        if self.log_probabilities is None:
            return jnp.full(items.shape, -np.log(self.num_items), jnp.float32)
        return self.log_probabilities[items]


def _random_below(
    key: jax.Array, shape: tuple[int, ...], count: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws integers from 0 to ``count - 1``, each with a probability within 2⁻⁶⁴ of ``1 / count``.

    Floats would not do, as float32 uniforms have 2²³ values, nor would ``jax.random.randint``, which takes 32 random
    bits modulo ``count`` where that is larger than 2¹⁶.

    Args:
      key: a random key.
      shape: of the draws.
      count: how many integers there are to draw from, at least 1, less than 2³¹; broadcasts to ``shape``.

    Returns:
      The integers, int32, and what is left of each draw, as uniform fractions of 2⁶⁴: their upper and lower half,
      uint32. All are shaped as ``shape``.
    """
    # The upper bits are those behind jax.random.uniform(key): a draw with floats would be the same but for rounding.
    upper = jax.random.bits(key, shape, jnp.uint32)
    lower = jax.random.bits(jax.random.fold_in(key, 1), shape, jnp.uint32)
    whole, upper, lower = _multiply(upper, lower, jnp.asarray(count).astype(jnp.uint32))
    return whole.astype(jnp.int32), upper, lower


def _multiply(upper: jax.Array, lower: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The 96 bits of ``(upper · 2³² + lower) · count`` in words of 32, highest first; JAX may have no wider ones."""
    middle, lowest = _multiply_words(lower, count)
    highest, rest = _multiply_words(upper, count)
    middle = middle + rest
    return highest + (middle < rest), middle, lowest


def _multiply_words(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The upper and the lower 32 bits of the product of two uint32."""
    a_upper, a_lower, b_upper, b_lower = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    # At most (2¹⁶ − 1)² + 2 (2¹⁶ − 1) = 2³² − 1 each: nothing overflows.
    left = a_upper * b_lower + (a_lower * b_lower >> 16)
    right = a_lower * b_upper + (left & 0xFFFF)
    return a_upper * b_upper + (left >> 16) + (right >> 16), a * b


def _as_words(shares: np.ndarray) -> np.ndarray:
    """Fractions of 2⁶⁴ as their upper and lower 32 bits, shape (2, n), uint32. 1 becomes the next smaller one."""
    # A share of 1 is that of an item which is its own alias, so nothing is lost.
    upper, rest = np.divmod(np.minimum(shares, 1 - 2.0**-53) * 2.0**32, 1)
    return np.stack([upper, rest * 2.0**32]).astype(np.uint32)


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
    data_fields=["unseen_before", "offsets", "proposal"],
    meta_fields=["num_items", "longest"],
)
@dataclasses.dataclass(frozen=True)
class NegativeSampler:
    """The items each user has not interacted with, for exact uniform draws on the device.

    Attributes:
      unseen_before: shape (distinct pairs,), int32: for each user's distinct items, in ascending order, how many
        smaller items the user has not interacted with.
      offsets: shape (users + 1,), int32: user ``u`` owns ``unseen_before[offsets[u]:offsets[u + 1]]``.
      proposal: draws of any items, seen or not, for the losses against a sample of the catalogue.
      num_items: size of the catalogue.
      longest: the largest number of distinct items of one user.
    """

    unseen_before: jax.Array
    offsets: jax.Array
    proposal: Proposal
    num_items: int
    longest: int

    @classmethod
    def from_interactions(
        cls, interactions: Interactions, negative_power: float = 0.0, *, drawn: bool = True
    ) -> "NegativeSampler":
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
        seen_before = np.arange(len(items)) - offsets[users]
        return cls(
            unseen_before=jnp.asarray(items - 1 - seen_before, jnp.int32),
            offsets=jnp.asarray(offsets, jnp.int32),
            proposal=Proposal.from_counts(
                np.bincount(interactions.items, minlength=interactions.num_items + 1), negative_power
            ),
            num_items=interactions.num_items,
            longest=int(counts.max()),
        )

    def sample(self, key: jax.Array, users: jax.Array) -> jax.Array:
        """Draws one unseen item for each entry of ``users``, uniformly.

        The unseen item with r unseen ones before it is r + 1 plus the number of seen items before it, which are those
        with at most r unseen ones before them: a binary search, without rejection.

        Args:
          key: a random key.
          users: any shape, int32.

        Returns:
          Item ids, shaped as ``users``. Each unseen item of a user has a probability within 2⁻⁶⁴ of the others'.
        """
        low, high = self.offsets[users], self.offsets[users + 1]
        rank, *_ = _random_below(key, users.shape, self.num_items - (high - low))
        left, right = low, high
        for _ in range(self.longest.bit_length()):
            middle = left + (right - left) // 2  # of the sum, int32 would be too small from 2³⁰ pairs on
            before = (left < right) & (self.unseen_before[middle] <= rank)
            left, right = jnp.where(before, middle + 1, left), jnp.where(before, right, middle)
        return rank + 1 + left - low
