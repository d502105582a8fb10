"""The compiled parts of training."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from models.compilation import jit
from models.data import NegativeSampler
from models.losses import LossFn, make_loss
from models.registry import make_model
from models.training.config import Optimizer, TrainConfig
from models.training.evaluation import FullRanking, make_test
from models.training.optimizers import Stages, make_schedule, make_stages
from models.training.prepare import Prepared
from sevo_optax import smoothness, state_axes


def make_epoch(graphdef: nnx.GraphDef, tx: optax.GradientTransformation, loss: LossFn) -> Callable[..., Any]:
    """Builds one epoch: ``epoch(params, opt_state, packed, unseen, key) -> params, opt_state, losses``.

    The losses have shape (batches,). It is a pure function, to be jitted, or vmapped over seeds and then jitted.
    """

    def epoch(params: Any, opt_state: Any, packed: Any, unseen: NegativeSampler, key: jax.Array) -> Any:
        shuffle_key, step_key = jax.random.split(key)
        packed = packed.shuffle(shuffle_key)

        def step(carry: tuple[Any, Any], index: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
            params, opt_state = carry

            def loss_fn(params: Any) -> jax.Array:
                key = jax.random.fold_in(step_key, index)
                return loss(nnx.merge(graphdef, params), packed.batch(index), unseen, key)

            value, grads = jax.value_and_grad(loss_fn)(params)
            with jax.named_scope("optimizer"):
                updates, opt_state = tx.update(grads, opt_state, params)
                params = optax.apply_updates(params, updates)
            return (params, opt_state), value

        (params, opt_state), losses = jax.lax.scan(step, (params, opt_state), jnp.arange(packed.num_batches))
        return params, opt_state, losses

    return epoch


def make_diagnose(graphdef: nnx.GraphDef, stages: Stages, loss: LossFn, tables: Sequence[str]) -> Callable[..., Any]:
    """Builds ``diagnose(params, opt_state, packed, unseen, adjacency, key) -> dict``: what the next step would be like.

    It takes the gradient of one batch through the stages of the optimizer, and changes nothing. For each table it
    reports the smoothness of the raw update (as it reaches the smoothing), of the smoothed update and of the table,
    each divided by the squared norm, so that it lies in [0, 2]; and the alignment: the cosine between raw and smoothed
    update, positive where smoothing keeps the direction (Section 2.2 of the paper). Without smoothing both updates are
    the same.
    """
    smoothers = [name for name in stages if name.startswith("sevo ")]
    probe = smoothers[0] if smoothers else "decay"

    def diagnose(
        params: Any, opt_state: Any, packed: Any, unseen: NegativeSampler, adjacency: Any, key: jax.Array
    ) -> Any:
        shuffle_key, step_key = jax.random.split(key)
        batch = packed.shuffle(shuffle_key).batch(0)
        updates = jax.grad(lambda params: loss(nnx.merge(graphdef, params), batch, unseen, step_key))(params)
        for name, stage in stages.items():
            if name == probe:
                raw = smoothed = updates
            updates, _ = stage.update(updates, opt_state[name], params)
            if name in smoothers:
                smoothed = updates

        def leaf(tree: Any, table: str) -> jax.Array:
            (found,) = jax.tree.leaves(tree[table])
            return found

        def relative(x: jax.Array) -> jax.Array:
            return smoothness(x, adjacency) / jnp.maximum(jnp.sum(x * x), jnp.finfo(x.dtype).tiny)

        report = {}
        for table in tables:
            before, after = leaf(raw, table), leaf(smoothed, table)
            size = jnp.linalg.norm(before) * jnp.linalg.norm(after)
            report |= {
                f"{table}/raw update": relative(before),
                f"{table}/smoothed update": relative(after),
                f"{table}/embedding": relative(leaf(params, table)),
                f"{table}/alignment": jnp.sum(before * after) / jnp.maximum(size, jnp.finfo(before.dtype).tiny),
            }
        return report

    return diagnose


class Program:
    """The compiled parts of training, for one seed or for several side by side.

    With several seeds, parameters and optimizer state have a leading axis of seeds, and share one graph.
    """

    def __init__(self, prepared: Prepared, config: TrainConfig, optimizer: Optimizer, seeds: Sequence[int]) -> None:
        self.prepared, self.config, self.seeds = prepared, config, seeds
        models = [
            make_model(config, num_items=prepared.interactions.num_items, max_length=config.max_length, seed=seed)
            for seed in seeds
        ]
        self.graphdef, first = nnx.split(models[0], nnx.Param)
        tables = models[0].item_tables
        schedule = None
        if config.schedule != "constant" or config.warmup_epochs:
            schedule = make_schedule(config, prepared.packed.num_batches)
        stages = make_stages(optimizer, config, prepared.adjacency, tables, schedule)
        tx = optax.named_chain(*stages.items())
        loss = make_loss(config)
        epoch = make_epoch(self.graphdef, tx, loss)
        diagnose = make_diagnose(self.graphdef, stages, loss, tables)

        def ranks(params: Any, ranking: FullRanking) -> jax.Array:
            return ranking.ranks(nnx.merge(self.graphdef, params))

        keys = [jax.random.key(seed) for seed in seeds]
        if len(seeds) == 1:
            self.params, self.opt_state, self.key = first, tx.init(first), keys[0]
            self._fold = jax.random.fold_in
        else:
            self.axes = axes = state_axes(jax.eval_shape(tx.init, first))
            self.params = jax.tree.map(lambda *x: jnp.stack(x), *(nnx.state(model, nnx.Param) for model in models))
            self.opt_state = jax.vmap(tx.init, out_axes=axes)(self.params)
            self.key = jnp.stack(keys)
            self._fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
            epoch = jax.vmap(epoch, in_axes=(0, axes, None, None, 0), out_axes=(0, axes, 0))
            ranks = jax.vmap(ranks, in_axes=(0, None))
            diagnose = jax.vmap(diagnose, in_axes=(0, axes, None, None, None, 0))
        self._epoch = jit(epoch, donate_argnums=(0, 1))
        self._ranks = jit(ranks)
        self._diagnose = jit(diagnose)
        self._test = make_test(self.graphdef, config.ks)

    def epoch(self, number: int) -> np.ndarray:
        """Trains epoch ``number``, counted from 1, and returns the losses, shape (seeds, batches)."""
        key = self._fold(self.key, number)
        self.params, self.opt_state, losses = self._epoch(
            self.params, self.opt_state, self.prepared.packed, self.prepared.unseen, key
        )
        return np.asarray(losses).reshape(len(self.seeds), -1)

    def ranks(self, ranking: FullRanking) -> np.ndarray:
        """Shape (seeds, users), with the parameters as they are."""
        return np.asarray(self._ranks(self.params, ranking)).reshape(len(self.seeds), -1)

    def diagnose(self, number: int) -> list[dict[str, float]]:
        """The diagnostics after epoch ``number``, one dict a seed, see :func:`make_diagnose`."""
        prepared = self.prepared
        key = self._fold(self.key, number)
        found = self._diagnose(self.params, self.opt_state, prepared.packed, prepared.unseen, prepared.adjacency, key)
        found = {name: np.asarray(value).reshape(-1) for name, value in found.items()}
        return [{name: float(value[i]) for name, value in found.items()} for i in range(len(self.seeds))]

    def params_of(self, i: int) -> Any:
        """The parameters of the ``i``-th seed, copied: the next epoch donates those that are trained."""
        if len(self.seeds) == 1:
            return jax.tree.map(jnp.copy, self.params)
        return jax.tree.map(lambda x: x[i], self.params)

    def state_of(self, i: int) -> Any:
        """The optimizer state of the ``i``-th seed."""
        if len(self.seeds) == 1:
            return self.opt_state
        return jax.tree.map(
            lambda axis, x: x if axis is None else x[i], self.axes, self.opt_state, is_leaf=lambda axis: axis is None
        )

    def put(self, params: Sequence[Any], states: Sequence[Any]) -> None:
        """Replaces parameters and optimizer states, one of each a seed."""
        if len(self.seeds) == 1:
            self.params, self.opt_state = params[0], states[0]
            return
        self.params = jax.tree.map(lambda *x: jnp.stack(x), *params)
        self.opt_state = jax.tree.map(
            lambda axis, first, *x: first if axis is None else jnp.stack([first, *x]),
            self.axes,
            *states,
            is_leaf=lambda axis: axis is None,
        )

    def test(self, params: Any) -> tuple[np.ndarray, dict[str, float]]:
        """Ranks (users,) and metrics of the test items, for the parameters of one seed."""
        return self._test(params, self.prepared.test)
