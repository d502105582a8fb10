"""The compiled parts of training.

A model's *state* is all that it holds, one ``nnx.State``: parameters, which the optimizer updates, and the rest
(running statistics, masks), which the model updates itself.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from models.architectures.base import Group, Recommender
from models.architectures.registry import make_model
from models.compilation import jit
from models.config import Optimizer, TrainConfig
from models.evaluation.ranking import FullRanking, make_test
from models.feeds import NegativeSampler, PackedSequences
from models.mesh import split_batch
from models.objectives.losses import Loss, make_loss
from models.objectives.objective import training_loss
from models.training.layout import Layout
from models.training.optimizers import Stages, make_schedule, make_stages
from models.training.training_data import Feed, TrainingData
from sevo_optax import smoothness, state_axes


def make_epoch(
    graphdef: nnx.GraphDef, tx: optax.GradientTransformation, loss: Loss, layout: Layout | None = None
) -> Callable[..., Any]:
    """Builds one epoch: ``epoch(state, opt_state, feed, sampler, context, key) -> state, opt_state, losses``.

    The losses have shape (batches,). It is a pure function, to be jitted, or vmapped over seeds and then jitted. With a
    layout, tables stay split from step to step.
    """
    keep: Callable[[Any], Any] = (lambda tree: tree) if layout is None else layout.keep

    def epoch(
        state: nnx.State,
        opt_state: Any,
        feed: Any,
        sampler: NegativeSampler,
        context: Mapping[str, Any],
        key: jax.Array,
    ) -> Any:
        shuffle_key, step_key = jax.random.split(key)
        feed = feed.shuffle(shuffle_key)
        params, rest = nnx.split_state(state, nnx.Param, ...)

        def step(carry: tuple[Any, Any, Any], index: jax.Array) -> tuple[tuple[Any, Any, Any], jax.Array]:
            params, rest, opt_state = carry

            def loss_fn(params: Any) -> tuple[jax.Array, Any]:
                key = jax.random.fold_in(step_key, index)
                # Copied: what belongs to the trace outside may not change in this one.
                model = nnx.merge(graphdef, params, rest, copy=True)
                batch = split_batch(feed.batch(index))
                value = training_loss(
                    model, loss, batch, context, sampler, key, max_num_targets=room_for_targets(feed, batch)
                )
                return value, nnx.state(model, nnx.Not(nnx.Param))

            (value, rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
            with jax.named_scope("optimizer"):
                updates, opt_state = tx.update(grads, opt_state, params)
                model = nnx.merge(graphdef, optax.apply_updates(params, updates), rest)
                model.constrain()
            return (keep(nnx.state(model, nnx.Param)), rest, keep(opt_state)), value

        carry, losses = jax.lax.scan(step, (params, rest, opt_state), jnp.arange(feed.num_batches))
        params, rest, opt_state = carry
        return nnx.merge_state(params, rest), opt_state, losses

    return epoch


def room_for_targets(feed: Feed, batch: Any) -> int:
    """The most targets that a batch can have, the rows included that fill it up on a mesh."""
    if isinstance(feed, PackedSequences):
        return feed.max_num_targets // feed.rows * len(batch.targets)
    return feed.max_num_targets


def make_diagnose(
    graphdef: nnx.GraphDef, stages: Stages, loss: Loss, groups: Sequence[Group], axes: Mapping[str, int]
) -> Callable[..., Any]:
    """Builds ``diagnose(state, opt_state, feed, sampler, context, adjacency, key)``: what a step would be like.

    It takes the gradient of one batch through the stages of the optimizer, and changes nothing. For each group of
    tables it reports the smoothness of the raw update (as it reaches the smoothing), of the smoothed update and of the
    table, each as it is (energy) and divided by the squared norm, so that it lies in [0, 2]; and the alignment: the
    cosine between raw and smoothed update, positive where smoothing keeps the direction (Section 2.2 of the paper).
    Without smoothing both updates are the same.
    """
    smoothers = [name for name in stages if name.startswith("sevo ")]

    def diagnose(
        state: nnx.State,
        opt_state: Any,
        feed: Any,
        sampler: NegativeSampler,
        context: Mapping[str, Any],
        adjacency: Any,
        key: jax.Array,
    ) -> Any:
        shuffle_key, step_key = jax.random.split(key)
        batch = split_batch(feed.shuffle(shuffle_key).batch(0))
        params, rest = nnx.split_state(state, nnx.Param, ...)

        def loss_fn(params: Any) -> jax.Array:
            model = nnx.merge(graphdef, params, rest, copy=True)
            return training_loss(
                model, loss, batch, context, sampler, step_key, max_num_targets=room_for_targets(feed, batch)
            )

        updates = jax.grad(loss_fn)(params)
        for name, stage in stages.items():
            if name in smoothers[:1]:
                raw = updates
            updates, _ = stage.update(updates, opt_state[name], params)
            if name in smoothers:
                smoothed = updates
            elif name == "moments" and not smoothers:  # where smoothing would stand, as in Algorithm 1
                raw = smoothed = updates

        def nodes(tree: Any, group: Group) -> jax.Array:
            """The values of a group's tables, one row a node."""
            leaves = [(axes.get(table, 0), leaf) for table in group for leaf in jax.tree.leaves(_part(tree, table))]
            return jnp.concatenate([jnp.moveaxis(leaf, axis, 0) for axis, leaf in leaves])

        def energies(name: str, x: jax.Array) -> dict[str, jax.Array]:
            energy = smoothness(x, adjacency)
            relative = energy / jnp.maximum(jnp.sum(x * x), jnp.finfo(x.dtype).tiny)
            return {name: relative, f"{name} energy": energy}

        report = {}
        for group in groups:
            before, after = nodes(raw, group), nodes(smoothed, group)
            size = jnp.linalg.norm(before) * jnp.linalg.norm(after)
            name = "+".join(group)
            report |= energies(f"{name}/raw update", before)
            report |= energies(f"{name}/smoothed update", after)
            report |= energies(f"{name}/embedding", nodes(params, group))
            report[f"{name}/alignment"] = jnp.sum(before * after) / jnp.maximum(size, jnp.finfo(before.dtype).tiny)
        return report

    return diagnose


def _part(tree: Any, path: str) -> Any:
    """The part of a tree that a path such as ``decoder/output`` names."""
    for name in path.split("/"):
        tree = tree[int(name)] if name.isdecimal() else tree[name]
    return tree


@dataclasses.dataclass(frozen=True)
class Parts:
    """Pure functions of one seed, to be compiled.

    Attributes:
      graphdef: of the model.
      stages: of the optimizer.
      init: ``init(state) -> opt_state``.
      epoch: see :func:`make_epoch`.
      ranks: ``ranks(state, ranking, context)``, shape (users,).
      diagnose: see :func:`make_diagnose`.
    """

    graphdef: nnx.GraphDef
    stages: Stages
    init: Callable[..., Any]
    epoch: Callable[..., Any]
    ranks: Callable[..., Any]
    diagnose: Callable[..., Any]


def make_parts(
    model: Recommender, prepared: TrainingData, config: TrainConfig, optimizer: Optimizer, layout: Layout | None = None
) -> Parts:
    """Builds what training is made of.

    Args:
      model: the model, or one whose arrays are shapes alone.
      prepared: the data.
      config: the run, resolved.
      optimizer: which optimizer.
      layout: how tables are split; None: they are not.
    """
    graphdef = nnx.graphdef(model)
    schedule = None
    if prepared.feed is not None and (config.schedule != "constant" or config.warmup_epochs):
        schedule = make_schedule(config, prepared.feed.num_batches)
    mask = model.decay_mask if model.undecayed else None
    stages = make_stages(optimizer, config, prepared.nodes, schedule, config.clip_norm, mask)
    if layout is not None:
        stages = layout.smooth_apart(stages, prepared.nodes)
    tx = optax.named_chain(*stages.items())
    loss = make_loss(config)
    groups = () if prepared.nodes is None else prepared.nodes.groups
    axes = {} if prepared.nodes is None else prepared.nodes.axes

    def init(state: nnx.State) -> Any:
        return tx.init(nnx.filter_state(state, nnx.Param))

    def ranks(state: nnx.State, ranking: FullRanking, context: Mapping[str, Any]) -> jax.Array:
        return ranking.ranks(nnx.merge(graphdef, state), context)

    epoch = make_epoch(graphdef, tx, loss, layout)
    return Parts(graphdef, stages, init, epoch, ranks, make_diagnose(graphdef, stages, loss, groups, axes))


def concrete(state: Any) -> Any:
    """The state with no weak types: a constant that a model starts with is weakly typed, what an epoch returns is not.

    It would compile twice.
    """
    return jax.tree.map(lambda x: x.astype(x.dtype), state)


class Program:
    """The compiled parts of training, for one seed or for several side by side.

    With several seeds, state and optimizer state have a leading axis of seeds, and share one graph. A model without
    gradients has an epoch that does nothing: it is fitted when the program is made.
    """

    def __init__(self, prepared: TrainingData, config: TrainConfig, optimizer: Optimizer, seeds: Sequence[int]) -> None:
        self.prepared, self.config, self.seeds = prepared, config, seeds
        train = prepared.split.train
        models = [make_model(config, num_users=train.num_users, num_items=train.num_items, seed=seed) for seed in seeds]
        if prepared.feed is None:
            for model in models:
                model.fit(train, config)
        states = [concrete(nnx.state(model)) for model in models]
        first = states[0]
        parts = make_parts(models[0], prepared, config, optimizer)
        self.graphdef, epoch, ranks, diagnose = parts.graphdef, parts.epoch, parts.ranks, parts.diagnose
        keys = [jax.random.key(seed) for seed in seeds]
        if len(seeds) == 1:
            self.model_state, self.opt_state, self.key = first, parts.init(first), keys[0]
            self._fold = jax.random.fold_in
        else:
            self.axes = axes = state_axes(jax.eval_shape(parts.init, first))
            self.model_state = jax.tree.map(lambda *x: jnp.stack(x), *states)
            self.opt_state = jax.vmap(parts.init, out_axes=axes)(self.model_state)
            self.key = jnp.stack(keys)
            self._fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
            epoch = jax.vmap(epoch, in_axes=(0, axes, None, None, None, 0), out_axes=(0, axes, 0))
            ranks = jax.vmap(ranks, in_axes=(0, None, None))
            diagnose = jax.vmap(diagnose, in_axes=(0, axes, None, None, None, None, 0))
        self._epoch = jit(epoch, donate_argnums=(0, 1))
        self._ranks = jit(ranks)
        self._diagnose = jit(diagnose)
        self._test = make_test(self.graphdef, config.ks)

    def epoch(self, number: int) -> np.ndarray:
        """Trains epoch ``number``, counted from 1, and returns the losses, shape (seeds, batches)."""
        prepared = self.prepared
        if prepared.feed is None:
            return np.zeros((len(self.seeds), 1))
        key = self._fold(self.key, number)
        self.model_state, self.opt_state, losses = self._epoch(
            self.model_state, self.opt_state, prepared.feed, prepared.sampler, prepared.context, key
        )
        return np.asarray(losses).reshape(len(self.seeds), -1)

    def ranks(self, ranking: FullRanking) -> np.ndarray:
        """Shape (seeds, users), with the parameters as they are."""
        return np.asarray(self._ranks(self.model_state, ranking, self.prepared.context)).reshape(len(self.seeds), -1)

    def diagnose(self, number: int) -> list[dict[str, float]]:
        """The diagnostics after epoch ``number``, one dict a seed, see :func:`make_diagnose`."""
        prepared = self.prepared
        key = self._fold(self.key, number)
        adjacency = None if prepared.nodes is None else prepared.nodes.adjacency
        found = self._diagnose(
            self.model_state, self.opt_state, prepared.feed, prepared.sampler, prepared.context, adjacency, key
        )
        found = {name: np.asarray(value).reshape(-1) for name, value in found.items()}
        return [{name: float(value[i]) for name, value in found.items()} for i in range(len(self.seeds))]

    def params_of(self, i: int) -> Any:
        """The model's state of the ``i``-th seed, copied: the next epoch donates the one that is trained."""
        if len(self.seeds) == 1:
            return jax.tree.map(jnp.copy, self.model_state)
        return jax.tree.map(lambda x: x[i], self.model_state)

    def item_table(self, params: Any) -> np.ndarray:
        """The table that items are scored by, row ``i`` item ``i``, for the model's state of one seed."""
        model = nnx.merge(self.graphdef, params)
        table, _ = model.items(model.represent(self.prepared.context))
        return np.asarray(table, np.float32)

    def state_of(self, i: int) -> Any:
        """The optimizer state of the ``i``-th seed."""
        if len(self.seeds) == 1:
            return self.opt_state
        return jax.tree.map(
            lambda axis, x: x if axis is None else x[i], self.axes, self.opt_state, is_leaf=lambda axis: axis is None
        )

    def like(self, i: int) -> tuple[Any, Any]:
        """What a checkpoint of the ``i``-th seed is to fit: parameters and optimizer state, or their shapes."""
        return self.params_of(i), self.state_of(i)

    def place(self, tree: Any) -> Any:
        """Arrays on the host, shaped like the model's or the optimizer's state, on the device."""
        return jax.tree.map(jnp.asarray, tree)

    def put(self, params: Sequence[Any], states: Sequence[Any]) -> None:
        """Replaces the models' and the optimizers' states, one of each a seed."""
        if len(self.seeds) == 1:
            self.model_state, self.opt_state = params[0], states[0]
            return
        self.model_state = jax.tree.map(lambda *x: jnp.stack(x), *params)
        self.opt_state = jax.tree.map(
            lambda axis, first, *x: first if axis is None else jnp.stack([first, *x]),
            self.axes,
            *states,
            is_leaf=lambda axis: axis is None,
        )

    def test(self, params: Any) -> tuple[np.ndarray, dict[str, float]]:
        """Ranks (users,) and metrics of the test items, for the model's state of one seed."""
        return self._test(params, self.prepared.test, self.prepared.context)
