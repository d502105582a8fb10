"""Folders as training runs leave them, without the training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.data import drifting_interests
from models.architectures.registry import make_model
from models.training.checkpoints import Checkpoint, Checkpoints, RunInfo, fingerprint, flatten
from models.config import TrainConfig

CONFIG = TrainConfig(max_length=12, embedding_dim=8, num_blocks=1, eval_every=1, epochs=2, batch_size=20)


def small_data(item_ids=None):
    """60 users with 5 to 15 or so of 40 items each."""
    data = drifting_interests(num_users=60, num_items=40, num_groups=5, seed=3)
    return data if item_ids is None else dataclasses.replace(data, item_ids=item_ids)


def params_of(config, num_items, seed):
    """Random parameters, which give no two items the same score."""
    model = nnx.eval_shape(lambda: make_model(config, num_items=num_items, max_length=config.max_length, seed=0))
    rng = np.random.default_rng(seed)
    shapes = nnx.state(model, nnx.Param)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.3, size=x.shape), x.dtype), shapes)


def save_run(directory, interactions, config=CONFIG, **options):
    """Saves a run whose best parameters are random, and whose newest are other ones.

    Returns:
      The run's folder.
    """
    config = dataclasses.replace(config, **options).resolved()
    info = RunInfo("adamw", config, interactions.num_items, fingerprint(interactions))
    info.write(directory, interactions.item_ids)
    best, last = (params_of(config, interactions.num_items, seed) for seed in (1, 2))
    progress = {"best": 0.5, "best_epoch": 1, "stale": 0, "seconds": 1.0}
    Checkpoints(directory).save(Checkpoint(2, flatten(best, "best") | flatten(last, "last"), progress))
    return directory
