"""Folders as training runs leave them, without the training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.architectures.registry import config_from_dict, make_config, make_model
from models.data import drifting_interests
from models.evaluation import metrics
from models.training.checkpoints import Checkpoint, Checkpoints, RunInfo, flatten

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


class ToyProgram:
    """Stands in for the compiled program: as many numbers as it takes to tell runs apart, and no compiling.

    An epoch depends on the parameters, on the seed and on its number, as a real one does.
    """

    def __init__(self, prepared, config, optimizer, seeds):
        self.prepared, self.config, self.seeds = prepared, config, list(seeds)
        self.params = [{"w": jnp.asarray(self._random(seed, 0, (3, 2)), jnp.float32)} for seed in seeds]
        self.states = [{"moments": {"w": jnp.zeros((3, 2))}, "count": jnp.zeros((), jnp.int32)} for _ in seeds]

    def _random(self, seed, number, shape):
        return np.random.default_rng([seed, number]).normal(size=shape)

    def epoch(self, number):
        losses = []
        for i, seed in enumerate(self.seeds):
            moments = 0.9 * self.states[i]["moments"]["w"] + jnp.asarray(
                self._random(seed, number, (3, 2)), jnp.float32
            )
            self.states[i] = {"moments": {"w": moments}, "count": self.states[i]["count"] + 1}
            self.params[i] = {"w": 0.9 * self.params[i]["w"] + self.config.learning_rate * moments}
            losses.append(np.asarray(jnp.abs(self.params[i]["w"])).ravel()[:4])
        return np.stack(losses)

    def ranks(self, ranking):
        return np.stack([self._ranks(params, ranking.num_users) for params in self.params])

    def _ranks(self, params, num_users):
        users = np.arange(num_users)
        return np.argsort(np.sin(1e3 * np.asarray(params["w"]).ravel()[users % 6] * (1 + users)))

    def test(self, params):
        ranks = self._ranks(params, self.prepared.test.num_users)
        return ranks, metrics.summarize(ranks, self.config.ks)

    def params_of(self, i):
        return self.params[i]

    def state_of(self, i):
        return self.states[i]

    def like(self, i):
        return self.params_of(i), self.state_of(i)

    def place(self, tree):
        return jax.tree.map(jnp.asarray, tree)

    def put(self, params, states):
        self.params, self.states = list(params), list(states)


def save_run(directory, interactions, config=CONFIG, **options):
    """Saves a run whose best parameters are random, and whose newest are other ones.

    Returns:
      The run's folder.
    """
    config = config_from_dict(config.differing() | {"optimizer": "adamw"} | options)
    info = RunInfo.of("adamw", config, interactions, num_users=60)
    info.write(directory, interactions.item_ids)
    best, last = (params_of(config, interactions.num_items, seed) for seed in (1, 2))
    progress = {"best": 0.5, "best_epoch": 1, "stale": 0, "seconds": 1.0}
    Checkpoints(directory, info.run).save(Checkpoint(2, flatten(best, "best") | flatten(last, "last"), progress))
    return directory


def leaves(directory, epoch):
    return Checkpoints(directory).load(epoch).leaves


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
