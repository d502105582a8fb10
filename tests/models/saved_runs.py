"""Folders as training runs leave them, without the training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.architectures.registry import config_from_dict, make_config, make_model
from models.data import drifting_interests
from models.training.checkpoints import Checkpoint, Checkpoints, RunInfo, fingerprint, flatten

CONFIG = make_config(max_length=12, embedding_dim=8, num_blocks=1, eval_every=1, epochs=2, batch_size=20)


def small_data(item_ids=None):
    """60 users with 5 to 15 or so of 40 items each."""
    data = drifting_interests(num_users=60, num_items=40, num_groups=5, seed=3)
    return data if item_ids is None else dataclasses.replace(data, item_ids=item_ids)


def params_of(config, num_items, seed):
    """Random parameters, which give no two items the same score."""
    model = nnx.eval_shape(lambda: make_model(config, num_users=60, num_items=num_items, seed=0))
    rng = np.random.default_rng(seed)
    shapes = nnx.state(model)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.3, size=x.shape), x.dtype), shapes)


def save_run(directory, interactions, config=CONFIG, **options):
    """Saves a run whose best parameters are random, and whose newest are other ones.

    Returns:
      The run's folder.
    """
    model = options.get("model", config.model)
    changed = {} if model != config.model else config.differing()
    if model != config.model:
        changed = {name: value for name, value in config.differing().items() if name != "model"}
    config = config_from_dict(changed | {"model": model} | options)
    info = RunInfo("adamw", config, interactions.num_items, fingerprint(interactions))
    info.write(directory, interactions.item_ids)
    best, last = (params_of(config, interactions.num_items, seed) for seed in (1, 2))
    progress = {"best": 0.5, "best_epoch": 1, "stale": 0, "seconds": 1.0}
    Checkpoints(directory).save(Checkpoint(2, flatten(best, "best") | flatten(last, "last"), progress))
    return directory
