"""Everything that an optax optimizer must put up with, for each of ours."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sevo_optax import (
    adamw_corrected,
    graph,
    scale_by_adam_corrected,
    sevo,
    sevo_adam,
    sevo_adamw,
    sevo_sgd,
    smooth,
)
from tests.jax_names import enable_x64
from tests.sevo_optax import reference

NODES, DIM = 7, 3
WEIGHTS = graph.from_edges([0, 1, 2, 5], [1, 2, 3, 6], [1.0, 2.0, 0.5, 1.0], num_nodes=NODES)
OPTIMIZERS = {
    "sevo": lambda tables="item", **options: sevo(WEIGHTS, tables, **options),
    "scale_by_adam_corrected": lambda tables="item", **options: scale_by_adam_corrected(tables=tables, **options),
    "adamw_corrected": lambda tables="item", **options: adamw_corrected(0.1, tables=tables, **options),
    "sevo_adamw": lambda tables="item", **options: sevo_adamw(0.1, WEIGHTS, tables, **options),
    "sevo_adam": lambda tables="item", **options: sevo_adam(0.1, WEIGHTS, tables, **options),
    "sevo_sgd": lambda tables="item", **options: sevo_sgd(0.1, WEIGHTS, tables, momentum=0.9, **options),
    "gradient_side": lambda tables="item", **options: optax.chain(
        sevo(WEIGHTS, tables, **options), adamw_corrected(0.1, tables=tables)
    ),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def random_params(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        "head": {
            "kernel": jnp.asarray(rng.normal(size=(DIM, 2)), dtype),
            "bias": jnp.asarray(rng.normal(size=2), dtype),
        },
        "item": jnp.asarray(rng.normal(size=(NODES, DIM)), dtype),
    }


def assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), actual, expected)


def shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


@every_optimizer
def test_ignores_unknown_extra_arguments(make):
    tx = make()
    params = random_params()
    state = tx.init(params)
    plain, _ = tx.update(params, state, params)
    extra, _ = tx.update(params, state, params, loss=1.0, value_fn=print, unknown=None)
    jax.tree.map(np.testing.assert_array_equal, plain, extra)
    # And as a part of a chain in which another part uses one.
    chained = optax.chain(tx, optax.contrib.reduce_on_plateau())
    chained.update(params, chained.init(params), params, value=1.0)


@every_optimizer
def test_does_not_compile_again(make):
    tx = make()
    traces = []

    @jax.jit
    def step(params, state, grads):
        traces.append(1)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = random_params()
    state = tx.init(params)
    for seed in range(3):
        params, state = step(params, state, random_params(seed))
    assert len(traces) == 1
    assert step._cache_size() == 1


@every_optimizer
def test_tree_map_params_finds_the_moments(make):
    tx = make()
    params = random_params()
    state = tx.init(params)
    marked = optax.tree.map_params(tx, lambda leaf: jnp.full_like(leaf, 7), state)
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    found = [moment for name in ("mu", "nu", "trace") for _, moment in optax.tree.get_all_with_path(marked, name)]
    assert bool(found) == (make is not OPTIMIZERS["sevo"])  # which alone keeps none
    assert all((leaf == 7).all() for leaf in jax.tree.leaves(found))
    # The graph and the counts are no parameters.
    for (_, before), (_, after) in zip(
        optax.tree.get_all_with_path(state, "graph"), optax.tree.get_all_with_path(marked, "graph"), strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, before, after)
    removed = optax.tree.map_params(tx, lambda leaf: None, state, transform_non_params=lambda leaf: 0)
    for name in ("mu", "nu", "trace"):
        assert not jax.tree.leaves([moment for _, moment in optax.tree.get_all_with_path(removed, name)])


@every_optimizer
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_preserves_dtypes(make, dtype):
    tx = make()
    params = random_params(dtype=dtype)
    state = tx.init(params)
    updates, new = jax.eval_shape(tx.update, params, state, params)
    assert shapes(updates) == shapes(params)
    assert shapes(new) == shapes(state)


@every_optimizer
def test_init_on_shapes_and_under_transformations(make):
    tx = make()
    params = random_params()
    expected = tx.init(params)
    assert jax.tree.structure(tx.init(shapes(params))) == jax.tree.structure(expected)
    assert shapes(tx.init(shapes(params))) == shapes(expected)
    assert shapes(jax.eval_shape(tx.init, shapes(params))) == shapes(expected)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(tx.init)(params), expected)
    # The state of one optimizer may be used with another of the same make, as after a restart.
    updates, _ = tx.update(params, jax.jit(make().init)(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, tx.update(params, expected, params)[0])


@every_optimizer
def test_state_is_stable_under_cond_and_scan(make):
    tx = make()
    params = random_params()
    state = tx.init(params)

    @jax.jit
    def maybe(flag, state):
        return jax.lax.cond(flag, lambda s: tx.update(params, s, params), lambda s: (params, s), state)

    updates, new = maybe(True, state)
    expected, wanted = jax.jit(tx.update)(params, state, params)
    assert_trees_close(updates, expected)
    assert_trees_close(new, wanted)
    jax.tree.map(np.testing.assert_array_equal, maybe(False, state), (params, state))

    final, _ = jax.lax.scan(lambda s, _: (tx.update(params, s, params)[1], None), state, length=3)
    assert jax.tree.structure(final) == jax.tree.structure(state)
    assert {int(count) for _, count in optax.tree.get_all_with_path(final, "count")} == {3}


@every_optimizer
def test_multi_steps_averages_the_gradients(make):
    tx = make()
    wrapped = optax.MultiSteps(tx, 2)
    params = random_params()
    grads = [random_params(1), random_params(2)]
    state = wrapped.init(params)
    step = jax.jit(wrapped.update)
    first, state = step(grads[0], state, params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(first))
    second, state = step(grads[1], state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    assert_trees_close(second, tx.update(mean, tx.init(params), params)[0])


@every_optimizer
def test_apply_if_finite_drops_a_step(make):
    tx = optax.apply_if_finite(make(), 5)
    params = random_params()
    state = tx.init(params)
    step = jax.jit(tx.update)
    broken = params | {"item": params["item"].at[0, 0].set(jnp.inf)}
    updates, state = step(broken, state, params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
    updates, state = step(params, state, params)
    tx = make()
    assert_trees_close(updates, tx.update(params, tx.init(params), params)[0])


@every_optimizer
def test_masked_and_chained(make):
    params = random_params()
    mask = {"head": False, "item": True}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(make(None), mask))
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    norm = optax.tree.norm(params)
    clipped = jax.tree.map(lambda leaf: leaf / norm, params)
    assert_trees_close(updates["head"], clipped["head"])
    alone = make(None)
    item = params["item"]
    assert_trees_close(updates["item"], alone.update(clipped["item"], alone.init(item), item)[0])


INJECTED = [
    (sevo, {"beta": 0.7}),
    (sevo_adamw, {"learning_rate": 0.1, "weight_decay": 0.2, "beta": 0.7, "b1": 0.8}),
    (sevo_adam, {"learning_rate": 0.1, "beta": 0.7}),
    (sevo_sgd, {"learning_rate": 0.1, "beta": 0.7, "momentum": 0.8}),
]


def test_inject_hyperparams_of_corrected_moments():
    """Behind which no graph tells the axis of the nodes."""
    params, grads = random_params(), random_params(1)
    injected = optax.inject_hyperparams(adamw_corrected, static_args=("node_axis",))(0.1, b1=0.8, tables="item")
    plain = adamw_corrected(0.1, b1=0.8, tables="item")
    updates, _ = jax.jit(injected.update)(grads, injected.init(params), params)
    assert_trees_close(updates, plain.update(grads, plain.init(params), params)[0])


@pytest.mark.parametrize(
    ("factory", "options", "jit", "static_args"),
    [(*case, True, ()) for case in INJECTED]
    + [(*case, False, ()) for case in INJECTED[:2]]
    + [(*INJECTED[1], True, static) for static in (("num_layers", "node_axis"), ("num_layers",))],
)
def test_inject_hyperparams_changes_nothing(factory, options, jit, static_args):
    arguments = options | {"adjacency": WEIGHTS, "tables": "item", "num_layers": 2}
    params = random_params()
    grads = random_params(1)
    injected = optax.inject_hyperparams(factory, static_args=static_args)(**arguments)
    plain = factory(**arguments)
    wrap = jax.jit if jit else (lambda f: f)
    state, expected = injected.init(params), plain.init(params)
    for _ in range(2):
        updates, state = wrap(injected.update)(grads, state, params)
        wanted, expected = wrap(plain.update)(grads, expected, params)
        assert_trees_close(updates, wanted)
    assert {"beta"} <= set(state.hyperparams)
    assert ("num_layers" in state.hyperparams) == ("num_layers" not in static_args)
    # The point of it all: to change one by hand.
    state.hyperparams["beta"] = jnp.array(0.0)
    updates, _ = wrap(injected.update)(grads, state, params)
    wanted, _ = wrap(factory(**arguments | {"beta": 0.0}).update)(grads, expected, params)
    assert_trees_close(updates, wanted)


def test_inject_hyperparams_of_a_dense_adjacency_needs_it_static():
    dense = np.asarray(WEIGHTS.todense())
    params = random_params()
    traced = optax.inject_hyperparams(sevo)(dense, "item")
    state = traced.init(params)
    with pytest.raises(TypeError, match=r"inject_hyperparams.*pass a BCOO.*static_args=\('adjacency',\)"):
        jax.jit(traced.update)(params, state, params)
    static = optax.inject_hyperparams(sevo, static_args=("adjacency",))(dense, "item")
    updates, _ = jax.jit(static.update)(params, static.init(params), params)
    assert_trees_close(updates["item"], smooth(params["item"], WEIGHTS))


def test_inject_hyperparams_of_half_precision_parameters():
    params = random_params(dtype=jnp.bfloat16)
    for wrap in (jax.jit, lambda f: f):
        tx = optax.inject_hyperparams(sevo)(WEIGHTS, "item", beta=0.75)
        updates, _ = wrap(tx.update)(params, tx.init(params), params)
        np.testing.assert_array_equal(updates["item"], smooth(params["item"], WEIGHTS, beta=0.75))


def test_inject_hyperparams_takes_schedules():
    schedules = {
        "learning_rate": optax.linear_schedule(0.1, 0.0, 4),
        "beta": optax.linear_schedule(0.0, 0.9, 4),
        "weight_decay": optax.linear_schedule(0.0, 0.1, 4),
    }
    params = random_params()
    injected = optax.inject_hyperparams(sevo_adamw)(adjacency=WEIGHTS, tables="item", **schedules)
    plain = sevo_adamw(adjacency=WEIGHTS, tables="item", **schedules)
    state, expected = injected.init(params), plain.init(params)
    one, other = jax.jit(injected.update), jax.jit(plain.update)
    for _ in range(4):
        updates, state = one(params, state, params)
        wanted, expected = other(params, expected, params)
        assert_trees_close(updates, wanted)


def test_traced_node_axis_is_told_from_the_shapes():
    kernel = random_params()["item"].T
    tx = optax.inject_hyperparams(sevo_adamw)(0.1, WEIGHTS, "kernel", node_axis=1)
    params = {"kernel": kernel}
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    plain = sevo_adamw(0.1, WEIGHTS)
    assert_trees_close(updates["kernel"], plain.update(kernel.T, plain.init(kernel.T), kernel.T)[0].T)


# ---- what each chain is made of ----


def test_weight_decay_is_not_smoothed_and_follows_the_mask():
    params = random_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = sevo_adamw(0.1, WEIGHTS, "item", weight_decay=0.5, mask={"head": False, "item": True})
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["item"], -0.05 * params["item"], rtol=1e-6)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates["head"]))
    with pytest.raises(ValueError, match="params"):
        tx.update(zeros, tx.init(params))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (partial(sevo_adamw, weight_decay=0.1), partial(optax.adamw, weight_decay=0.1)),
        (partial(sevo_adamw, nesterov=True), partial(optax.adamw, nesterov=True)),
        (sevo_adam, optax.adam),
        (partial(sevo_adam, nesterov=True), partial(optax.adam, nesterov=True)),
        (partial(sevo_sgd, momentum=0.9), partial(optax.sgd, momentum=0.9)),
        (partial(sevo_sgd, momentum=0.9, nesterov=True), partial(optax.sgd, momentum=0.9, nesterov=True)),
        (sevo_sgd, optax.sgd),
    ],
)
def test_other_leaves_get_the_plain_optimizer(ours, theirs):
    params = random_params()
    # Rows of other leaves without a gradient: the correction is for the tables alone.
    grads = random_params(1)
    grads["head"]["kernel"] = grads["head"]["kernel"].at[0].set(0.0)
    one, other = ours(0.1, adjacency=WEIGHTS, tables="item"), theirs(0.1)
    state, expected = one.init(params), other.init(params)
    for grad in (random_params(2), grads, grads):
        updates, state = jax.jit(one.update)(grad, state, params)
        wanted, expected = jax.jit(other.update)(grad, expected, params)
        jax.tree.map(np.testing.assert_array_equal, updates["head"], wanted["head"])
        assert not np.allclose(updates["item"], wanted["item"])
    # Without layers nothing is smoothed, and where every row is active the table gets the plain optimizer too.
    unsmoothed = ours(0.1, adjacency=WEIGHTS, tables="item", num_layers=0)
    updates, _ = unsmoothed.update(grads, unsmoothed.init(params), params)
    wanted, _ = other.update(grads, other.init(params), params)
    assert_trees_close(updates, wanted)


def test_sevo_adamw_corrects_along_the_node_axis():
    kernel = random_params()["item"].T
    grads = [random_params(1)["item"].T, random_params(2)["item"].T.at[:, 3].set(0.0)]

    def run(tx, transpose):
        params = {"w": kernel.T if transpose else kernel}
        state = tx.init(params)
        for grad in grads:
            updates, state = jax.jit(tx.update)({"w": grad.T if transpose else grad}, state, params)
        return updates["w"].T if transpose else updates["w"]

    expected = run(sevo_adamw(0.1, WEIGHTS, "w"), transpose=True)
    assert_trees_close(run(sevo_adamw(0.1, WEIGHTS, "w", node_axis=1), transpose=False), expected)
    # Without the correction of node 3 the numbers are others.
    assert not np.allclose(run(sevo_adam(0.1, WEIGHTS, "w", node_axis=1), transpose=False), expected, rtol=1e-3)


@pytest.mark.parametrize("make", [sevo_adamw, sevo_adam])
def test_the_first_moment_has_the_dtype_that_is_asked_for(make):
    state = make(0.1, WEIGHTS, "w", mu_dtype=jnp.bfloat16).init({"w": jnp.ones((NODES, DIM))})
    adam = next(x for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu"))
    assert adam.mu["w"].dtype == jnp.bfloat16
    assert adam.nu["w"].dtype == jnp.float32


def test_adam_has_its_small_numbers_in_their_places():
    rng = np.random.default_rng(0)
    adjacency = reference.normalize(np.asarray(WEIGHTS.todense(), np.float64))
    grads = rng.normal(size=(3, NODES, DIM)) * (rng.random((3, NODES, 1)) < 0.6)
    with enable_x64(True):
        tx = sevo_adam(0.1, adjacency, b1=0.7, b2=0.8, eps=1e-3, eps_root=1e-4, beta=0.6, num_layers=2, normalize=False)
        params = jnp.zeros((NODES, DIM))
        state = tx.init(params)
        directions = reference.adam_directions(grads, 0.7, 0.8, 1e-3, 1e-4, corrected=False)
        for grad, direction in zip(grads, directions, strict=True):
            updates, state = tx.update(jnp.asarray(grad), state, params)
            wanted = -0.1 * reference.smooth(direction, adjacency, 0.6, 2)
            np.testing.assert_allclose(updates, wanted, rtol=1e-10, atol=1e-12)


def test_hyperparameters_reach_their_places():
    """Every argument of the whole optimizer, away from its default, against the dense reference."""
    rng = np.random.default_rng(0)
    dense = np.asarray(WEIGHTS.todense(), np.float64)
    adjacency = reference.normalize(dense)
    params = rng.normal(size=(NODES, DIM))
    grads = rng.normal(size=(4, NODES, DIM)) * (rng.random((4, NODES, 1)) < 0.6)
    with enable_x64(True):
        tx = sevo_adamw(
            lambda step: 0.1 + 0.1 * step / 3,
            adjacency,
            b1=0.7,
            b2=0.8,
            eps=1e-3,
            eps_root=1e-4,
            mu_dtype=jnp.float64,
            weight_decay=0.3,
            beta=lambda step: 0.5 + 0.1 * step,
            num_layers=2,
            rescale=False,
            normalize=False,
        )
        state = tx.init(jnp.asarray(params))
        directions = reference.adam_directions(grads, 0.7, 0.8, 1e-3, 1e-4, corrected=True)
        for step, (grad, direction) in enumerate(zip(grads, directions, strict=True)):
            updates, state = tx.update(jnp.asarray(grad), state, jnp.asarray(params))
            smoothed = reference.smooth(direction, adjacency, 0.5 + 0.1 * step, 2, rescale=False)
            lr = 0.1 + 0.1 * step / 3
            np.testing.assert_allclose(updates, -lr * (smoothed + 0.3 * params), rtol=1e-10, atol=1e-12)
            params = params + updates
