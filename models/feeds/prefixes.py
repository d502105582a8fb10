"""Prefixes: each item of a training sequence but the first is the target of a sample of its own.

The input of a sample is what the user did before, its newest ``max_length`` items. A batch looks like one of packed
sequences, with a row a sample and a target at its newest token alone, so that every model of histories takes both.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from models.data import Interactions
from models.feeds.packed import NOTHING_TO_TRAIN_ON, Batch
from models.mesh import take


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["user", "first", "target", "items"],
    meta_fields=["num_batches", "batch_size", "max_length", "row_length"],
)
@dataclasses.dataclass(frozen=True)
class Prefixes:
    """Prefixes on the device.

    Attributes:
      user: shape (samples,), int32, the user of each sample.
      first: shape (samples,), int32, where the user's items begin in ``items``.
      target: shape (samples,), int32, where the sample's target is in ``items``; 0 in samples that fill the last batch.
      items: shape (interactions,), int32, all items, user after user.
      num_batches: batches in an epoch.
      batch_size: samples in a batch.
      max_length: the longest input a model takes.
      row_length: the longest input there is.
    """

    user: jax.Array
    first: jax.Array
    target: jax.Array
    items: jax.Array
    num_batches: int
    batch_size: int
    max_length: int
    row_length: int

    @classmethod
    def from_interactions(cls, interactions: Interactions, *, max_length: int, batch_size: int) -> "Prefixes":
        """Lists the prefixes of every user's sequence.

        Args:
          interactions: the sequences.
          max_length: the longest input a model takes.
          batch_size: samples in a batch; the last one of an epoch is filled up with samples that count nothing.

        Raises:
          ValueError: if no user has two interactions, or a number is smaller than 1.
        """
        for name, value in {"max_length": max_length, "batch_size": batch_size}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        first = np.repeat(interactions.offsets[:-1], interactions.lengths)
        (target,) = np.nonzero(np.arange(len(interactions)) > first)
        if not target.size:
            raise ValueError(NOTHING_TO_TRAIN_ON)
        num_batches = -(-len(target) // batch_size)
        blank = (0, num_batches * batch_size - len(target))
        return cls(
            user=jnp.asarray(np.pad(interactions.users[target], blank), jnp.int32),
            first=jnp.asarray(np.pad(first[target], blank), jnp.int32),
            target=jnp.asarray(np.pad(target, blank), jnp.int32),
            items=jnp.asarray(interactions.items, jnp.int32),
            num_batches=num_batches,
            batch_size=batch_size,
            max_length=max_length,
            row_length=int(min(max_length, interactions.lengths.max() - 1)),
        )

    @property
    def num_tokens(self) -> int:
        """Targets in an epoch."""
        return int(np.count_nonzero(np.asarray(self.target)))

    @property
    def max_num_targets(self) -> int:
        """The most targets that a batch can have: one a row."""
        return self.batch_size

    def shuffle(self, key: jax.Array) -> "Prefixes":
        """Deals samples to batches at random."""
        order = jax.random.permutation(key, len(self.user))
        return dataclasses.replace(self, user=self.user[order], first=self.first[order], target=self.target[order])

    def batch(self, index: jax.typing.ArrayLike) -> Batch:
        """Gathers batch ``index``, possibly traced."""

        def rows(values: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(values, index * self.batch_size, self.batch_size)[:, None]

        user, first, target = rows(self.user), rows(self.first), rows(self.target)
        place = target - self.row_length + jnp.arange(self.row_length)
        filled = place >= first
        length = jnp.minimum(target - first, self.row_length)
        newest = place == target - 1

        def fill(values: jax.Array) -> jax.Array:
            return jnp.where(filled, values, 0)

        return Batch(
            inputs=fill(take(self.items, jnp.maximum(place, 0))),
            positions=fill(jnp.arange(self.max_length - self.row_length, self.max_length)),
            padding=fill(self.max_length - length),
            segments=fill(jnp.ones_like(place)),
            users=fill(user),
            targets=jnp.where(newest & filled, take(self.items, target), 0),
        )
