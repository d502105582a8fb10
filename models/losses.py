"""Training losses over packed batches."""

import jax
import jax.numpy as jnp

from models.data.negatives import UnseenItems
from models.data.packing import Batch
from models.sasrec import SASRec


def binary_cross_entropy(
    model: SASRec, batch: Batch, unseen: UnseenItems, key: jax.Array, *, deterministic: bool = False
) -> jax.Array:
    r"""Binary cross-entropy of the next item against one random unseen item (SASRec's loss).

    .. math::

      \frac{1}{|T|} \sum_{t \in T} \Big[ -\log \sigma(\langle h_t, e_{t}^{+} \rangle)
        - \log\big(1 - \sigma(\langle h_t, e_t^{-} \rangle)\big) \Big]

    over the tokens :math:`T` that have a target; :math:`2 \log 2` for a model that knows nothing.

    Args:
      model: the model.
      batch: packed sequences.
      unseen: where negatives are drawn from.
      key: random key for negatives and dropout.
      deterministic: whether dropout is off.

    Returns:
      A scalar.
    """
    negative_key, dropout_key = jax.random.split(key)
    negatives = unseen.sample(negative_key, batch.users)
    # One gather for all three lookups, so that the table's gradient is one scatter.
    embedded, positive, negative = model.item_embedding(jnp.stack([batch.inputs, batch.targets, negatives]))
    hidden = model.encode(embedded, batch, None if deterministic else dropout_key)
    losses = jax.nn.softplus(-jnp.sum(hidden * positive, -1)) + jax.nn.softplus(jnp.sum(hidden * negative, -1))
    weights = batch.targets > 0
    return jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), 1)
