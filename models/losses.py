"""Training losses over packed batches: each corrupts, encodes and scores a batch, and averages over its targets."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from models.data.negatives import UnseenItems
from models.data.packing import Batch
from models.layers import BLOCKED
from models.recommender import Recommender

LossFn = Callable[[Recommender, Batch, UnseenItems, jax.Array], jax.Array]

# Scores of tokens × items that may exist at once: 64 MiB in float32.
SCORES_AT_ONCE = 2**24


def binary_cross_entropy(
    model: Recommender, batch: Batch, unseen: UnseenItems, key: jax.Array, *, deterministic: bool = False
) -> jax.Array:
    r"""Binary cross-entropy of the target against one random unseen item (SASRec's loss).

    .. math::

      \frac{1}{|T|} \sum_{t \in T} \Big[ -\log \sigma(s_t^+) - \log\big(1 - \sigma(s_t^-)\big) \Big]

    over the tokens :math:`T` that have a target; :math:`2 \log 2` for a model that knows nothing.

    Args:
      model: the model.
      batch: packed sequences.
      unseen: where negatives are drawn from.
      key: random key for masking, negatives and dropout.
      deterministic: whether dropout is off.

    Returns:
      A scalar.
    """
    negative_key, dropout_key = jax.random.split(key)
    batch = model.corrupt(batch, jax.random.fold_in(key, 2))
    with jax.named_scope("negatives"):
        negatives = unseen.sample(negative_key, batch.users)
    with jax.named_scope("lookup"):
        embedded, rows, biases = model.embed(batch.inputs, jnp.stack([batch.targets, negatives]))
    hidden = model.encode(embedded, batch, None if deterministic else dropout_key)
    positive, negative = (jnp.sum(hidden * row, axis=-1) + bias for row, bias in zip(rows, biases, strict=True))
    losses = jax.nn.softplus(-positive) + jax.nn.softplus(negative)
    return _mean(losses, batch.targets > 0)


def cross_entropy(
    model: Recommender,
    batch: Batch,
    unseen: UnseenItems,
    key: jax.Array,
    *,
    deterministic: bool = False,
    scores_at_once: int = SCORES_AT_ONCE,
) -> jax.Array:
    r"""Cross-entropy of the softmax over the whole catalogue.

    .. math::

      \frac{1}{|T|} \sum_{t \in T} \Big[ \log \sum_{i=1}^{n} e^{s_{ti}} - s_{t, t^+} \Big]

    Scores of tokens × items never exist whole: the catalogue is worked through in parts of at most ``scores_at_once``
    scores, and the backward pass computes each part anew.

    Args:
      model: the model.
      batch: packed sequences.
      unseen: not used: every item is a negative.
      key: random key for masking and dropout.
      deterministic: whether dropout is off.
      scores_at_once: the bound on the number of scores in memory, 4 bytes each.

    Returns:
      A scalar.
    """
    num_items = unseen.num_items
    _, dropout_key = jax.random.split(key)
    batch = model.corrupt(batch, jax.random.fold_in(key, 2))
    hidden = model(batch, None if deterministic else dropout_key)
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), batch.targets.reshape(-1)
    room = model.targets_at_most(targets.size)
    if room < targets.size:
        # Where few tokens have a target, only those are scored.
        (chosen,) = jnp.nonzero(targets, size=room, fill_value=targets.size)
        hidden = hidden.at[chosen].get(mode="fill", fill_value=0)
        targets = targets.at[chosen].get(mode="fill", fill_value=0)
    table, bias = model.output_layer()
    item = jnp.arange(len(table))
    catalogue = jnp.where((item >= 1) & (item <= num_items), bias, BLOCKED)
    normalizer = _log_sum_exp(hidden, table, catalogue, max(1, scores_at_once // len(targets)))
    scores = jnp.sum(hidden * table[targets], axis=-1) + bias[targets]
    return _mean(normalizer - scores, targets > 0)


def _mean(losses: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), 1)


def _log_sum_exp(hidden: jax.Array, table: jax.Array, bias: jax.Array, rows_at_once: int) -> jax.Array:
    """``logsumexp(hidden @ table.T + bias)`` over the rows of ``table``, a part of them at a time."""
    if len(table) <= rows_at_once:
        return jax.nn.logsumexp(hidden @ table.T + bias, axis=-1)
    parts = -(-len(table) // rows_at_once)
    missing = parts * rows_at_once - len(table)
    tables = jnp.pad(table, ((0, missing), (0, 0))).reshape(parts, rows_at_once, -1)
    biases = jnp.pad(bias, (0, missing), constant_values=BLOCKED).reshape(parts, rows_at_once)

    @jax.checkpoint
    def add(carry: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]) -> tuple:
        largest, total = carry
        scores = hidden @ part[0].T + part[1]
        # A shift changes nothing but the size of the numbers, hence needs no derivative.
        shift = jax.lax.stop_gradient(jnp.maximum(largest, jnp.max(scores, axis=-1)))
        total = total * jnp.exp(largest - shift) + jnp.sum(jnp.exp(scores - shift[:, None]), axis=-1)
        return (shift, total), None

    start = jnp.full(len(hidden), -jnp.inf, hidden.dtype), jnp.zeros(len(hidden), hidden.dtype)
    (largest, total), _ = jax.lax.scan(add, start, (tables, biases))
    return largest + jnp.log(total)


LOSSES: dict[str, LossFn] = {"bce": binary_cross_entropy, "ce": cross_entropy}
