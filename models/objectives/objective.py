"""The training objective: from a batch to a number, for any model and any loss."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from models.architectures.base import Queries, Recommender
from models.feeds import NegativeSampler
from models.mesh import DATA, constrain
from models.objectives.losses import Loss


def training_loss(
    model: Recommender,
    loss: Loss,
    batch: Any,
    context: Mapping[str, Any],
    sampler: NegativeSampler,
    key: jax.Array,
    *,
    max_num_targets: int | None = None,
    deterministic: bool = False,
) -> jax.Array:
    """The loss of a model on a batch, with the model's penalty.

    Args:
      model: the model; its state that is not ``nnx.Param`` may change.
      loss: the loss.
      batch: of the model's feed.
      context: what the model computes with, see :meth:`Recommender.make_context`.
      sampler: where negatives are drawn from.
      key: random key for masking, negatives and dropout.
      max_num_targets: the most targets that the batch can have; None: as many as it has places.
      deterministic: whether dropout is off.

    Returns:
      A scalar, float32.
    """
    negative_key, dropout_key = jax.random.split(key)
    batch = model.training_batch(batch, jax.random.fold_in(key, 2))
    model_key = None if deterministic else dropout_key
    with jax.named_scope("represent"):
        represented = model.represent(context, None if deterministic else jax.random.fold_in(key, 3))
    queries = encode_queries(
        model,
        batch,
        represented,
        model_key,
        sampler=sampler if loss.against_unseen else None,
        negative_key=negative_key,
        max_num_targets=max_num_targets,
    )
    value = loss.function(queries, model.items(represented), sampler, negative_key)
    return value + model.penalty(
        batch, queries, represented, value, None if deterministic else jax.random.fold_in(key, 4)
    )


def encode_queries(
    model: Recommender,
    batch: Any,
    represented: Any,
    key: jax.Array | None,
    *,
    sampler: NegativeSampler | None = None,
    negative_key: jax.Array | None = None,
    max_num_targets: int | None = None,
) -> Queries:
    """Encodes the places of a batch that may have a target.

    Args:
      model: the model.
      batch: what :meth:`Recommender.training_batch` made.
      represented: what :meth:`Recommender.represent` returned.
      key: random key for dropout; None: evaluation.
      sampler: draws one unseen item a query, to stand beside the target as a candidate; None: no candidates.
      negative_key: random key for the draws.
      max_num_targets: the most targets that the batch can have; None: as many as it has places.

    Returns:
      The queries; with ``sampler``, candidates of shape (2, queries).
    """
    targets, users = batch.targets.ravel(), batch.users.ravel()
    room = min(model.max_num_targets(targets.size), max_num_targets or targets.size)
    chosen = None
    if room < targets.size:
        # Where few places have a target, only those are scored.
        (chosen,) = jnp.nonzero(targets, size=room, fill_value=targets.size)
        targets, users = (values.at[chosen].get(mode="fill", fill_value=0) for values in (targets, users))
    candidates = None
    if sampler is not None:
        with jax.named_scope("negatives"):
            candidates = jnp.stack([targets, sampler.sample(negative_key, users)])
    encoded = model.encode(batch, represented, key, candidates)
    vectors = constrain(encoded.vectors.reshape(-1, encoded.vectors.shape[-1]), DATA)
    if chosen is not None:
        vectors = vectors.at[chosen].get(mode="fill", fill_value=0)
    return Queries(vectors, targets, users, candidates, encoded.rows, encoded.biases)
