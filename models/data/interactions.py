"""The one in-memory form of interaction data, and its leave-one-out split."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Self

import numpy as np


@dataclasses.dataclass(frozen=True)
class Interactions:
    """The interactions of many users, each user's in order of time.

    Attributes:
      items: shape (interactions,), int32, item ids from 1 to ``num_items``, user after user. 0 is kept for padding.
      offsets: shape (users + 1,), int64: user ``u`` owns ``items[offsets[u]:offsets[u + 1]]``.
      num_items: the largest item id that may occur.
    """

    items: np.ndarray
    offsets: np.ndarray
    num_items: int

    @classmethod
    def from_sequences(cls, sequences: Iterable[Iterable[int]], num_items: int | None = None) -> Self:
        """Builds interactions from one sequence of item ids a user.

        Args:
          sequences: oldest item first, ids from 1.
          num_items: size of the catalogue; None: the largest id.

        Raises:
          ValueError: if there is no interaction at all, or an id is smaller than 1 or larger than ``num_items``.
        """
        rows = [np.asarray(list(sequence), dtype=np.int64) for sequence in sequences]
        items = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        if not items.size:
            raise ValueError("sequences hold no interaction; at least one is needed")
        largest = int(items.max()) if num_items is None else num_items
        if items.min() < 1 or items.max() > largest:
            offender = int(items[(items < 1) | (items > largest)][0])
            raise ValueError(f"sequences hold the item id {offender}, but ids must lie between 1 and {largest}")
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        return cls(items.astype(np.int32), offsets, largest)

    @property
    def num_users(self) -> int:
        """The number of users."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Shape (users,), the number of interactions of each user."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.items[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True))

    def __str__(self) -> str:
        density = len(self) / (self.num_users * self.num_items)
        return (
            f"{self.num_users:,} users, {self.num_items:,} items, {len(self):,} interactions "
            f"({density:.2%} of all pairs, {len(self) / self.num_users:.1f} a user)"
        )

    def without_last(self, count: int) -> "Interactions":
        """The interactions without the last ``count`` of each user."""
        keep = np.arange(len(self)) < np.repeat(self.offsets[1:] - count, self.lengths)
        offsets = np.concatenate([[0], np.cumsum(np.maximum(self.lengths - count, 0))])
        return Interactions(self.items[keep], offsets.astype(np.int64), self.num_items)


@dataclasses.dataclass(frozen=True)
class LeaveOneOut:
    """A leave-one-out split.

    Attributes:
      train: all but the last two interactions of each user.
      validation_history: what is known when the validation item is predicted: ``train``.
      validation: shape (users,), int32, the last but one item of each user.
      test_history: what is known when the test item is predicted: all but the last interaction.
      test: shape (users,), int32, the last item of each user.
    """

    train: Interactions
    validation: np.ndarray
    test_history: Interactions
    test: np.ndarray

    @property
    def validation_history(self) -> Interactions:
        """The same interactions as ``train``."""
        return self.train


def leave_one_out(interactions: Interactions) -> LeaveOneOut:
    """Splits off each user's last item for test and the one before for validation.

    Raises:
      ValueError: if a user has fewer than three interactions, the least that leaves one to train on.
    """
    short = np.flatnonzero(interactions.lengths < 3)
    if short.size:
        raise ValueError(
            f"user {short[0] + 1} of {interactions.num_users} has {interactions.lengths[short[0]]} interactions, but "
            f"leave-one-out needs at least 3 (train, validation, test); {short.size} users are that short: remove them"
        )
    ends = interactions.offsets[1:]
    return LeaveOneOut(
        train=interactions.without_last(2),
        validation=interactions.items[ends - 2],
        test_history=interactions.without_last(1),
        test=interactions.items[ends - 1],
    )
