"""Packed sequences: several users share a row.

Most histories are short: with one user a row, nearly all of a padded batch is padding. Here users share rows. Attention
stays inside a user (``segments``), and positions are counted from each user's newest item, so a user's outputs do not
depend on who shares the row.

Which users share a row, and which rows share a batch, changes every epoch without packing again: rows are cut into
slots once, one slot a user; rows are shuffled, and users are dealt anew to slots of their own length.

A history that is longer than the model's limit loses its oldest items or, where every item shall be a target, is cut
into several *windows* that overlap: what is said of users here is true of windows.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.data import Interactions
from models.mesh import take

# Rows that fill no batch are padded, and shuffling spreads the padding at random: a batch of so few rows might be only
# padding. Its step would still decay the weights, and its loss of zero would count. So such rows are dealt one by one.
FEW_ROWS = 7
NOTHING_TO_TRAIN_ON = (
    "no user has two interactions to train on; give data where one has (leave-one-out keeps two more of each aside)"
)


class Batch(NamedTuple):
    """Rows of packed sequences.

    Attributes:
      inputs: shape (rows, row_length), int32 item ids, 0 where a row is not filled.
      positions: shape (rows, row_length), int32: ``max_length - 1`` at a user's newest item, one less for each item
        before.
      padding: shape (rows, row_length), int32: how many places were empty if the user had a row of ``max_length``
        alone.
      segments: shape (rows, row_length), int32: tokens of a row belong together where these agree; 0 where not filled.
      users: shape (rows, row_length), int32, the user of each token.
      targets: shape (rows, row_length), int32, the item that follows, 0 where there is nothing to predict.
    """

    inputs: jax.Array
    positions: jax.Array
    padding: jax.Array
    segments: jax.Array
    users: jax.Array
    targets: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["slot", "step", "slot_length", "user", "items", "first", "context"],
    meta_fields=["num_batches", "max_length"],
)
@dataclasses.dataclass(frozen=True)
class PackedSequences:
    """Sequences on the device, cut so that every batch has one shape.

    Attributes:
      slot: shape (num_batches * rows, row_length), int32, the slot of each token, -1 where a row is not filled.
      step: shape (num_batches * rows, row_length), int32, the token's place inside its slot.
      slot_length: shape (slots,), int32, ascending.
      user: shape (slots,), int32, the users in ascending order of their length: user ``user[s]`` fills slot ``s``.
      first: shape (slots,), int32, where the tokens of ``user[s]`` begin in ``items``.
      context: shape (slots,), int32, how many tokens at the beginning of a slot are no targets, because another window
        of the same user has them; None: there are no such slots.
      items: shape (interactions + 1,), int32, all items, user after user, then one 0.
      num_batches: batches in an epoch.
      max_length: the longest sequence of inputs a model takes.
    """

    slot: jax.Array
    step: jax.Array
    slot_length: jax.Array
    user: jax.Array
    first: jax.Array
    context: jax.Array | None
    items: jax.Array
    num_batches: int
    max_length: int

    @property
    def num_tokens(self) -> int:
        """Tokens in an epoch; places that are not filled do not count."""
        return int(np.asarray(self.slot_length).sum())

    @property
    def max_num_targets(self) -> int:
        """The most targets that a batch can have: every token may be one."""
        return self.rows * self.slot.shape[1]

    @property
    def rows(self) -> int:
        """Rows in a batch."""
        return self.slot.shape[0] // self.num_batches

    def dealt(self, rows: jax.Array) -> jax.Array:
        """All rows, dealt to the batches one by one: each batch has one of the first, and one of the last."""
        return rows.reshape(self.rows, self.num_batches).T.ravel()

    def shuffle(self, key: jax.Array) -> "PackedSequences":
        """Deals users to slots of their own length, and rows to batches, at random."""
        row_key, user_key = jax.random.split(key)
        rows = jax.random.permutation(row_key, self.slot.shape[0])
        if self.rows <= FEW_ROWS:
            rows = self.dealt(rows[jnp.argsort(self.slot[rows, 0] < 0, stable=True)])  # padding last
        noise = jax.random.bits(user_key, self.slot_length.shape)
        users = jnp.lexsort((noise, self.slot_length))
        return dataclasses.replace(
            self,
            slot=self.slot[rows],
            step=self.step[rows],
            user=self.user[users],
            first=self.first[users],
            context=None if self.context is None else self.context[users],
        )

    def batch(self, index: jax.typing.ArrayLike) -> Batch:
        """Gathers batch ``index``, possibly traced."""
        slot = jax.lax.dynamic_slice_in_dim(self.slot, index * self.rows, self.rows)
        step = jax.lax.dynamic_slice_in_dim(self.step, index * self.rows, self.rows)
        filled = slot >= 0
        place = self.first[slot] + step
        padding = self.max_length - self.slot_length[slot]

        def fill(values: jax.Array) -> jax.Array:
            return jnp.where(filled, values, 0)

        targets = take(self.items, place + 1)
        if self.context is not None:
            targets = jnp.where(step >= self.context[slot], targets, 0)
        return Batch(
            inputs=fill(take(self.items, place)),
            positions=fill(padding + step),
            padding=fill(padding),
            segments=fill(slot + 1),
            users=fill(self.user[slot]),
            targets=fill(targets),
        )


def _cut_rows(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts rows into slots of the given lengths, the longest that still fits first.

    Args:
      lengths: shape (slots,), ascending, each between 1 and ``row_length``.
      row_length: tokens in a row.

    Returns:
      ``(slot, step)``, both of shape (rows, row_length).
    """
    starts = np.searchsorted(lengths, np.arange(row_length + 2))  # slots of length n: starts[n] … starts[n + 1]
    left = np.diff(starts).tolist()
    row_of, column_of = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    placed, row = 0, 0
    while placed < len(lengths):
        column = 0
        for length in range(row_length, 0, -1):
            take = min(left[length], (row_length - column) // length)
            for _ in range(take):
                left[length] -= 1
                slot = starts[length] + left[length]
                row_of[slot], column_of[slot] = row, column
                column += length
            placed += take
        row += 1
    step = np.concatenate([np.arange(length) for length in lengths])
    slot = np.repeat(np.arange(len(lengths)), lengths)
    slots = np.full((row, row_length), -1, np.int32)
    steps = np.zeros((row, row_length), np.int32)
    slots[row_of[slot], column_of[slot] + step] = slot
    steps[row_of[slot], column_of[slot] + step] = step
    return slots, steps


def pack(
    interactions: Interactions,
    *,
    max_length: int,
    batch_size: int,
    with_targets: bool = True,
    count_targets: bool = False,
    windows: bool = False,
) -> PackedSequences:
    """Packs the newest ``max_length`` inputs of every user, or all of them.

    Args:
      interactions: the sequences.
      max_length: the longest sequence of inputs a model takes.
      batch_size: users in a batch, on average: an epoch has ``ceil(users / batch_size)`` batches, or as many as rows
        if these are fewer, and rows are spread evenly.
      with_targets: whether every token needs a following item. If so, a user's newest item is a target only, and users
        with one item are left out; otherwise it is the last input, and its target is meaningless.
      count_targets: whether ``batch_size`` counts targets instead of users.
      windows: whether a longer history is cut into windows of ``max_length`` inputs, so that every item but the first
        is a target once, after ``max_length // 2`` of the items before it at least; otherwise its oldest items are left
        out.

    Raises:
      ValueError: if nothing is left to pack, or a number is smaller than 1.
    """
    for name, value in {"max_length": max_length, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    inputs = interactions.lengths - int(with_targets)
    users = np.flatnonzero(inputs > 0)
    if not users.size:
        raise ValueError(NOTHING_TO_TRAIN_ON)
    if windows:
        users, stops, contexts = _windows(users, inputs, max_length)
    else:
        stops, contexts = inputs[users], np.zeros(len(users), np.int64)
    starts = np.maximum(stops - max_length, 0)
    lengths = stops - starts
    order = np.argsort(lengths, kind="stable")
    users, starts, lengths, contexts = users[order], starts[order], lengths[order], contexts[order]
    slot, step = _cut_rows(lengths, int(lengths[-1]))
    counted = int((lengths - contexts).sum()) if count_targets else len(users)
    num_batches = min(-(-counted // batch_size), len(slot))
    missing = -len(slot) % num_batches
    return PackedSequences(
        slot=jnp.asarray(np.pad(slot, ((0, missing), (0, 0)), constant_values=-1)),
        step=jnp.asarray(np.pad(step, ((0, missing), (0, 0)))),
        slot_length=jnp.asarray(lengths, jnp.int32),
        user=jnp.asarray(users, jnp.int32),
        first=jnp.asarray(interactions.offsets[users] + starts, jnp.int32),
        context=jnp.asarray(contexts, jnp.int32) if contexts.any() else None,
        items=jnp.asarray(np.append(interactions.items, 0), jnp.int32),
        num_batches=num_batches,
        max_length=max_length,
    )


def _windows(users: np.ndarray, inputs: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts long histories into overlapping windows.

    Args:
      users: shape (users,), those that have inputs.
      inputs: shape (all users,), how many inputs each has.
      max_length: the longest window.

    Returns:
      For each window its user, where it stops, and how many of its tokens are no targets.
    """
    stride = max(1, max_length // 2)
    stops = [np.append(np.arange(min(max_length, n), n, stride), n) for n in inputs[users].tolist()]
    counts = [len(mine) for mine in stops]
    covered = [np.append(0, mine[:-1]) for mine in stops]
    stop, before = np.concatenate(stops), np.concatenate(covered)
    return np.repeat(users, counts), stop, before - np.maximum(stop - max_length, 0)
