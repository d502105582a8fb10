"""The one in-memory form of interaction data."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import numpy as np


@dataclasses.dataclass(frozen=True)
class Interactions:
    """The interactions of many users, each user's in order of time.

    Inside, users are numbered from 0 and items from 1. What they are called in the data is kept beside the numbers, so
    that results can be given in the caller's own ids: ``interactions.item_ids[numbers]``.
    :func:`models.data.ids.item_numbers` leads back.

    Attributes:
      items: shape (interactions,), int32, item numbers from 1 to ``num_items``, user after user. 0 is kept for padding.
      offsets: shape (users + 1,), int64: user ``u`` owns ``items[offsets[u]:offsets[u + 1]]``.
      num_items: the largest item number that may occur.
      user_ids: shape (users,), int64 or str: the raw id of each user. None: ``u + 1``.
      item_ids: shape (num_items + 1,), int64 or str: the raw id of each item. Entry 0 belongs to padding and means
        nothing: it is 0 or the empty string. None: the numbers themselves.
      times: shape (interactions,), int64 or float64, ascending inside each user; None: only the order is known.
      notes: what was done to the data on the way here, one line each, to be printed with the statistics. Those that
        begin with ``warning:`` tell what may be wrong with them.
    """

    items: np.ndarray
    offsets: np.ndarray
    num_items: int
    user_ids: np.ndarray | None = None
    item_ids: np.ndarray | None = None
    times: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        lengths = np.diff(self.offsets)
        if (lengths < 0).any() or self.offsets[0] != 0 or self.offsets[-1] != len(self.items):
            raise ValueError(f"offsets must ascend from 0 to the number of interactions, {len(self.items)}")
        if self.user_ids is None:
            object.__setattr__(self, "user_ids", np.arange(1, len(lengths) + 1))
        if self.item_ids is None:
            object.__setattr__(self, "item_ids", np.arange(self.num_items + 1))
        if len(self.user_ids) != len(lengths):
            raise ValueError(
                f"user_ids must hold one id for each of the {len(lengths)} users, got {len(self.user_ids)}"
            )
        if len(self.item_ids) != self.num_items + 1:
            raise ValueError(
                f"item_ids must hold {self.num_items + 1} ids, one for padding and one an item, "
                f"got {len(self.item_ids)}"
            )
        if self.times is None:
            return
        if len(self.times) != len(self.items):
            raise ValueError(f"times must hold one time an interaction, {len(self.items)}, got {len(self.times)}")
        # "not at least as late" rather than "earlier": NaN is neither.
        back = np.flatnonzero(~(self.times[1:] >= self.times[:-1])) + 1
        back = np.setdiff1d(back, self.offsets)
        if back.size:
            user = int(np.searchsorted(self.offsets, back[0], side="right")) - 1
            raise ValueError(
                f"times must ascend inside each user, but user {self.user_ids[user]} has "
                f"{self.times[back[0]]} behind {self.times[back[0] - 1]}; sort the interactions first"
            )

    @classmethod
    def from_sequences(
        cls,
        sequences: Iterable[Iterable[int]],
        num_items: int | None = None,
        *,
        user_ids: Sequence[Any] | None = None,
        times: Iterable[Iterable[float]] | None = None,
    ) -> Self:
        """Builds interactions from one sequence of item ids a user.

        Args:
          sequences: oldest item first, ids from 1.
          num_items: size of the catalogue; None: the largest id.
          user_ids: the raw id of each user; None: numbers from 1.
          times: one sequence of times a user, as long as the user's items; None: only the order is known.

        Raises:
          ValueError: if there is no interaction at all, or an id is no whole number, smaller than 1 or larger than
            ``num_items``.
        """
        rows = [_whole(list(sequence)) for sequence in sequences]
        items = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        if not items.size:
            raise ValueError("sequences hold no interaction; at least one is needed")
        moments = None if times is None else [np.asarray(list(row)) for row in times]
        if moments is not None and [len(row) for row in moments] != [len(row) for row in rows]:
            raise ValueError("times must hold one time for each interaction of each user, as many a user as sequences")
        largest = int(items.max()) if num_items is None else num_items
        if items.min() < 1 or items.max() > largest:
            offender = int(items[(items < 1) | (items > largest)][0])
            raise ValueError(f"sequences hold the item id {offender}, but ids must lie between 1 and {largest}")
        return cls(
            items.astype(np.int32),
            _offsets([len(row) for row in rows]),
            largest,
            user_ids=None if user_ids is None else np.asarray(user_ids),
            times=None if moments is None else np.concatenate(moments),
        )

    @property
    def num_users(self) -> int:
        """The number of users."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Shape (users,), the number of interactions of each user."""
        return np.diff(self.offsets)

    @property
    def users(self) -> np.ndarray:
        """Shape (interactions,), int64, the user of each interaction."""
        return np.repeat(np.arange(self.num_users), self.lengths)

    def distinct_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Users and items of the distinct (user, item) pairs, both of shape (pairs,), ascending by user, then item."""
        pairs = np.unique(self.users * (self.num_items + 1) + self.items)
        return np.divmod(pairs, self.num_items + 1)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.items[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True))

    def __str__(self) -> str:
        density = len(self.distinct_pairs()[0]) / (self.num_users * self.num_items)
        return (
            f"{self.num_users:,} users, {self.num_items:,} items, {len(self):,} interactions "
            f"({density:.2%} of all pairs, {len(self) / self.num_users:.1f} a user)"
        )

    def without_last(self, count: int) -> "Interactions":
        """The interactions without the last ``count`` of each user."""
        return self.where(np.arange(len(self)) < np.repeat(self.offsets[1:] - count, self.lengths))

    def where(self, keep: np.ndarray) -> "Interactions":
        """The interactions where ``keep``, shape (interactions,), is true. Users and items stay, even if bereft."""
        return dataclasses.replace(
            self,
            items=self.items[keep],
            offsets=_offsets(np.bincount(self.users[keep], minlength=self.num_users)),
            times=None if self.times is None else self.times[keep],
        )

    def of_users(self, keep: np.ndarray) -> "Interactions":
        """The users where ``keep``, shape (users,), is true, numbered anew in the same order. The items stay."""
        mine = np.repeat(keep, self.lengths)
        return dataclasses.replace(
            self,
            items=self.items[mine],
            offsets=_offsets(self.lengths[keep]),
            user_ids=self.user_ids[keep],
            times=None if self.times is None else self.times[mine],
        )

    def with_notes(self, *notes: str) -> "Interactions":
        """The same interactions with more ``notes``."""
        return dataclasses.replace(self, notes=self.notes + notes)


def _whole(sequence: list[Any]) -> np.ndarray:
    """Ids as int64; a fraction would be cut off in silence."""
    ids = np.asarray(sequence)
    if ids.dtype.kind not in "iu":
        is_whole = ids == np.floor(ids) if ids.dtype.kind == "f" else np.zeros(ids.shape, bool)
        if not is_whole.all():
            raise ValueError(
                f"sequences hold {sequence[int(np.argmin(is_whole))]!r}; ids must be whole numbers: number the items "
                "from 1, or read them with models.data.load, which does"
            )
    return ids.astype(np.int64)


def _offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
