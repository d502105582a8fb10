"""Additive attention: scores from sums of a query and a key, not from their products."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from models.layers.attention import BLOCKED
from models.mesh import DATA, current_mesh, fill_up, on_each_part

# Most queries of a causal row that are scored together: fewer save work, more save calls.
QUERIES_AT_ONCE = 32

# Entries of query + key, a number for each query, key and channel, that may exist at once.
NUMBERS_AT_ONCE = 2**24

# On CPUs, more would leave the cache between two passes over them.
CPU_NUMBERS_AT_ONCE = 2**19


def additive_scores(query: jax.Array, key: jax.Array, weight: jax.Array) -> jax.Array:
    r"""Scores of every query and key of a row, some rows at a time.

    .. math::

      e_{qk} = \sum_c w_c \, \sigma(x_{qc} + y_{kc})

    A score takes as many numbers as there are channels. They are computed anew in the backward pass and never exist
    for more than :data:`NUMBERS_AT_ONCE` (but one row at least).

    Args:
      query: shape (rows, queries, channels).
      key: shape (rows, keys, channels).
      weight: shape (channels,).

    Returns:
      Shape (rows, queries, keys), float32 at least.

    Examples:
      >>> query, key = jnp.zeros((1, 2, 3)), jnp.zeros((1, 4, 3))
      >>> additive_scores(query, key, jnp.ones(3))[0].tolist()
      [[1.5, 1.5, 1.5, 1.5], [1.5, 1.5, 1.5, 1.5]]
    """
    if current_mesh() is None:
        return _some_rows_at_a_time(query, key, weight)
    # A loop over rows that are split would have each device go through those of all.
    on_part = on_each_part(_some_rows_at_a_time, (P(DATA), P(DATA), P()), P(DATA), differentiable=True)
    return on_part(fill_up(query, DATA), fill_up(key, DATA), weight)[: len(query)]


def _some_rows_at_a_time(query: jax.Array, key: jax.Array, weight: jax.Array) -> jax.Array:
    """The scores of one device's rows, which are all of them without a mesh."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    weight = weight.astype(query.dtype)

    @jax.checkpoint
    def row(both: tuple[jax.Array, jax.Array]) -> jax.Array:
        query, key = both
        return jnp.matmul(jax.nn.sigmoid(query[:, None] + key), weight, preferred_element_type=wide)

    limit = CPU_NUMBERS_AT_ONCE if jax.default_backend() == "cpu" else NUMBERS_AT_ONCE
    rows_at_once = max(1, limit // (query.shape[1] * key.shape[1] * query.shape[2]))
    # An exported model leaves the number of rows open.
    rows = query.shape[0]
    return jax.lax.map(row, (query, key), batch_size=min(rows_at_once, rows) if isinstance(rows, int) else None)


def additive_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    weight: jax.Array,
    seen: jax.Array,
    *,
    normalize: bool,
    causal: bool,
) -> jax.Array:
    """Mixes values by their additive scores.

    Args:
      query: shape (rows, row_length, channels).
      key: shape (rows, row_length, channels).
      value: shape (rows, row_length, dim).
      weight: shape (channels,), see :func:`additive_scores`.
      seen: shape (rows, row_length, row_length), bool: whether a query (second axis) sees a key (third axis).
      normalize: whether a softmax turns scores into weights; otherwise they are the weights.
      causal: whether no query sees a later key, so that less is computed.

    Returns:
      Shape (rows, row_length, dim), in the values' dtype. Zero where a query sees nothing, and with ``normalize`` the
      mean of all values that could be seen there.
    """
    length = query.shape[1]
    step = -(-length // -(-length // QUERIES_AT_ONCE)) if causal else length
    mixed = []
    for start in range(0, length, step):
        stop = min(start + step, length)
        keys = slice(0, stop if causal else length)
        scores = additive_scores(query[:, start:stop], key[:, keys], weight)
        weights = weights_of(scores, seen[:, start:stop, keys], normalize=normalize)
        mixed.append(jnp.einsum("bqk,bkd->bqd", weights.astype(value.dtype), value[:, keys]))
    return jnp.concatenate(mixed, axis=1)


def weights_of(scores: jax.Array, seen: jax.Array, *, normalize: bool) -> jax.Array:
    """Weights from scores (…, keys): themselves or their softmax, over the keys that are ``seen``."""
    if normalize:
        return jax.nn.softmax(jnp.where(seen, scores, BLOCKED), axis=-1)
    return jnp.where(seen, scores, 0)
