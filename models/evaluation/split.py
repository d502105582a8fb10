"""Ranking where users are split over ``data`` and items over ``model``: no device sees a whole row of scores.

Each function takes a chunk: vectors (users, dim), targets (users,), the table (rows, dim) and the bias (rows,), minus
infinity where a row is no item, and ``seen``: user (inside the chunk), item, and whether the pair counts, each of shape
(pairs,).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from models.mesh import DATA, MODEL, on_each_part

Seen = tuple[jax.Array, jax.Array, jax.Array]
IN_SPECS = (P(DATA), P(DATA), P(MODEL), P(MODEL), P())


def split_ranks(vectors: jax.Array, targets: jax.Array, table: jax.Array, bias: jax.Array, seen: Seen) -> jax.Array:
    """The ranks of :meth:`FullRanking.ranks`, shape (users,), int32. Devices exchange three numbers a user."""
    return _on_each_part(_ranks)(vectors, targets, table, bias, seen)


def split_top_items(
    vectors: jax.Array, targets: jax.Array, table: jax.Array, bias: jax.Array, seen: Seen, *, k: int
) -> jax.Array:
    """The items of :meth:`FullRanking.top_items`, shape (users, k). Devices exchange ``k`` items and scores a user."""
    return _on_each_part(partial(_top_items, k=k))(vectors, targets, table, bias, seen)


def _on_each_part(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return on_each_part(function, IN_SPECS, P(DATA))


def _ranks(vectors: jax.Array, targets: jax.Array, table: jax.Array, bias: jax.Array, seen: Seen) -> jax.Array:
    scores = vectors @ table.T + bias
    number = _numbers(table)
    column = targets - number[0]
    mine = (column >= 0) & (column < len(number))
    score = jnp.take_along_axis(scores, jnp.where(mine, column, 0)[:, None], axis=1)[:, 0]
    score = jax.lax.psum(jnp.where(mine, score, 0), MODEL)
    user, column, inside = _own_pairs(seen, scores, number)
    # As in FullRanking.ranks: NaN is neither smaller nor larger. Rows that are no items count nothing.
    ahead = jnp.sum(~(scores < score[:, None]) & ~jnp.isneginf(bias), axis=1, dtype=jnp.int32)
    hidden = inside & (number[column] != targets[user]) & ~(scores[user, column] < score[user])
    ahead -= jax.ops.segment_sum(hidden.astype(jnp.int32), user, len(targets))
    return jax.lax.psum(ahead, MODEL) - 1


def _top_items(
    vectors: jax.Array, targets: jax.Array, table: jax.Array, bias: jax.Array, seen: Seen, *, k: int
) -> jax.Array:
    del targets
    scores = jnp.where(jnp.isneginf(bias), -jnp.inf, vectors @ table.T + bias)
    number = _numbers(table)
    user, column, inside = _own_pairs(seen, scores, number)
    # Pairs of others fall behind the last user, and are dropped.
    scores = scores.at[jnp.where(inside, user, len(scores)), column].set(-jnp.inf, mode="drop")
    best, found = jax.lax.top_k(scores, min(k, len(number)))
    # Parts come in the order of the items: of equal scores, the first is still the one with the smaller number.
    best, found = (jax.lax.all_gather(x, MODEL, axis=1, tiled=True) for x in (best, number[found]))
    best, place = jax.lax.top_k(best, k)
    return jnp.where(jnp.isneginf(best), 0, jnp.take_along_axis(found, place, axis=1))


def _numbers(table: jax.Array) -> jax.Array:
    """The numbers of the items in a device's rows of the table."""
    return jax.lax.axis_index(MODEL) * len(table) + jnp.arange(len(table))


def _own_pairs(seen: Seen, scores: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    """Row and column of each pair in a device's scores, and whether it has them; 0 where it has not."""
    user, item, inside = seen
    row, column = user - jax.lax.axis_index(DATA) * len(scores), item - number[0]
    inside &= (row >= 0) & (row < len(scores)) & (column >= 0) & (column < len(number))
    return jnp.where(inside, row, 0), jnp.where(inside, column, 0), inside
