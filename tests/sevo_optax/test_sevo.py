"""The transformation: where it may stand, its state, schedules, and what it promises about programs."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import sevo_optax
from sevo_optax import SEvoState, adamw_corrected, sevo, sevo_adamw, smooth, state_axes
from tests.sevo_optax import reference

NODES, DIM = 20, 4


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def weights(rng):
    return reference.random_weights(rng, NODES)


@pytest.fixture
def table(rng):
    return jnp.asarray(rng.normal(size=(NODES, DIM)), jnp.float32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.5, "num_layers": 1},
        {"rescale": False},
        {"method": "iterative", "beta": 0.3},
        {"method": "exact", "beta": 0.9},
        {"normalize": False},
        {"num_layers": 0},
    ],
)
def test_update_is_smooth_in_every_form(weights, table, options):
    if "normalize" in options:
        weights = reference.normalize(weights)
    tx = sevo(weights, "item", **options)
    updates = {"item": table, "bias": jnp.ones(3)}
    state = tx.init(updates)
    new, state = jax.jit(tx.update)(updates, state)
    np.testing.assert_allclose(new["item"], smooth(table, weights, **options), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(new["bias"], updates["bias"])
    assert state.count == 1


def test_beta_may_be_a_schedule_of_the_count(weights, table):
    schedule = optax.linear_schedule(0.0, 0.8, 4)
    tx = sevo(weights, beta=schedule)
    state = tx.init(table)
    for step in range(5):
        updates, state = jax.jit(tx.update)(table, state)
        np.testing.assert_allclose(updates, smooth(table, weights, beta=0.2 * step), rtol=1e-5, atol=1e-6)
        if step == 0:
            np.testing.assert_array_equal(updates, table)


def test_beta_and_layers_may_be_traced(weights, table):
    @jax.jit
    def run(beta, num_layers, state):
        return sevo(weights, beta=beta, num_layers=num_layers).update(table, state)[0]

    state = sevo(weights).init(table)
    for beta, num_layers in ((0.5, 2), (0.9, 4)):
        expected = smooth(table, weights, beta=beta, num_layers=num_layers)
        np.testing.assert_allclose(run(beta, num_layers, state), expected, rtol=1e-6, atol=1e-7)
    assert run._cache_size() == 1


def test_gradients_flow_through_a_whole_step(weights, table):
    """Tuning beta by differentiating through the step."""
    tx_of = lambda beta: optax.chain(sevo(weights, beta=beta), optax.scale(-0.1))  # noqa: E731
    state = tx_of(0.5).init(table)

    def loss(beta):
        return jnp.sum((table + tx_of(beta).update(table, state)[0]) ** 2)

    step = 1e-2
    expected = (loss(0.5 + step) - loss(0.5 - step)) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.5), expected, rtol=1e-2)


def test_two_places_in_a_chain_are_two_optimizers(rng, weights, table):
    before = optax.chain(sevo(weights), adamw_corrected(0.1))
    after = sevo_adamw(0.1, weights)
    grads = jnp.asarray(rng.normal(size=(NODES, DIM)), jnp.float32)
    one, _ = before.update(grads, before.init(table), table)
    two, _ = after.update(grads, after.init(table), table)
    assert not np.allclose(one, two, rtol=0.1)


def test_state_is_a_named_tuple_with_the_count_first(weights, table):
    state = sevo(weights).init(table)
    assert isinstance(state, SEvoState)
    assert state._fields == ("count", "graph", "residual")
    assert state.residual is None
    assert state.count.dtype == jnp.int32
    assert state.graph.indices.dtype == state.graph.indptr.dtype == jnp.int32
    assert optax.tree.get(sevo_adamw(0.1, weights).init(table), "graph").data.shape == state.graph.data.shape


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_state_says_whether_the_exact_form_has_converged(weights, table, dtype):
    table = table.astype(dtype)
    for beta, converged in ((0.9, True), (1 - 1e-6, False)):
        tx = optax.chain(sevo(weights, beta=beta, method="exact"), optax.scale(-0.1))
        state = tx.init(table)
        assert optax.tree.get(state, "residual") == 0
        _, new = jax.jit(tx.update)(table, state)
        assert (optax.tree.get(new, "residual") < 1e-4) == converged
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    # Of replicas, each has its own.
    tx = sevo(weights, method="exact")
    axes = state_axes(jax.eval_shape(tx.init, table))
    tables = jnp.stack([table, 0 * table])
    state = jax.vmap(tx.init, out_axes=axes)(tables)
    _, state = jax.vmap(tx.update, in_axes=(0, axes), out_axes=(0, axes))(tables, state)
    assert state.residual.shape == (2,)
    assert state.residual[0] > state.residual[1] == 0


def test_state_of_another_graph_is_refused(weights, table):
    tx = sevo(weights)
    message = "holds the graph of {} nodes and {} entries, but this transformation was made for one of 20 nodes"
    smaller = sevo(weights[:19, :19]).init(table[:19])
    entries = np.count_nonzero(weights[:19, :19])
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(ValueError, match=message.format(19, entries)):
            update(table, smaller)
    thinner = weights.copy()
    i, j = np.argwhere(weights)[0]
    thinner[i, j] = thinner[j, i] = 0
    with pytest.raises(ValueError, match=r"start with tx\.init\(params\), or exchange the graph alone: with_graphs"):
        tx.update(table, sevo(thinner).init(table))
    with pytest.raises(ValueError, match=r"like must be a state of the same .* it holds 0 states of sevo, and state 1"):
        sevo_optax.with_graphs(sevo_optax.without_graphs(tx.init(jnp.asarray(table))), jnp.asarray(table))
    with pytest.raises(ValueError, match=r"holds no graph; put it back: with_graphs\(state, tx\.init\(params\)\)"):
        tx.update(table, sevo_optax.without_graphs(tx.init(table)))
    with pytest.raises(ValueError, match="holds a graph whose indices are bfloat16; cast without_graphs"):
        tx.update(table, optax.tree.cast(tx.init(table), jnp.bfloat16))
    with pytest.raises(TypeError, match=r"the state of sevo.* is a ScaleByAdamState; wanted the SEvoState"):
        tx.update(table, optax.scale_by_adam().init(table))


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_tables_of_eight_bits_are_refused(weights, table, dtype):
    params = {"item": table.astype(dtype), "bias": jnp.ones(3)}
    for tx in (
        sevo(weights, "item"),
        sevo_adamw(0.1, weights, "item"),
        adamw_corrected(0.1, tables="item"),
    ):
        with pytest.raises(TypeError, match=r"tables: 'item' has dtype float8_\w+; wanted float16, bfloat16"):
            tx.init(params)


def test_count_saturates(weights, table):
    tx = sevo(weights)
    state = tx.init(table)._replace(count=jnp.array(2**31 - 1, jnp.int32))
    assert tx.update(table, state)[1].count == 2**31 - 1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_graph_is_kept_in_float32_at_least(weights, table, dtype):
    tx = sevo(weights)
    state = tx.init(table.astype(dtype))
    assert state.graph.data.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
    updates, new = tx.update(table.astype(dtype), state)
    assert updates.dtype == dtype
    assert new.graph.data.dtype == state.graph.data.dtype


def test_update_in_another_dtype_than_the_parameters(weights, table):
    """Mixed precision: gradients in bfloat16, parameters in float32, and the reverse."""
    tx = sevo(weights)
    half = table.astype(jnp.bfloat16)
    np.testing.assert_array_equal(tx.update(half, tx.init(table))[0], smooth(half, weights))
    np.testing.assert_array_equal(tx.update(table, tx.init(half))[0], smooth(table, weights))


def test_one_nan_reaches_its_neighbours_and_apply_if_finite_drops_the_step():
    path = np.zeros((6, 6))
    for i in range(5):
        path[i, i + 1] = path[i + 1, i] = 1
    updates = jnp.ones((6, 2)).at[0, 0].set(jnp.nan)
    tx = sevo(path, num_layers=2)
    out = np.asarray(tx.update(updates, tx.init(updates))[0])
    np.testing.assert_array_equal(np.isnan(out[:, 0]), [True, True, True, False, False, False])
    assert np.isfinite(out[:, 1]).all()
    safe = optax.apply_if_finite(tx, 3)
    out, state = jax.jit(safe.update)(updates, safe.init(updates))
    np.testing.assert_array_equal(out, 0)
    assert state.inner_state.count == 0


def test_graph_is_checked_when_the_transformation_is_made():
    with pytest.raises(ValueError, match="not symmetric"):
        sevo(np.triu(np.ones((3, 3)), 1))
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda a: sevo(a).init(jnp.ones((3, 1))))(jnp.ones((3, 3)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta": 2}, ValueError, r"beta must lie in \[0, 1\), got 2\.0"),
        ({"beta": None}, TypeError, "beta must be a number .* or a schedule, got None"),
        ({"num_layers": -2}, ValueError, "num_layers must be at least 0, got -2"),
        ({"num_layers": None}, TypeError, "num_layers must be an integer, got None"),
        ({"method": None}, ValueError, "method must be one of neumann, iterative, exact, got None"),
    ],
)
def test_errors_name_the_argument_and_the_value(weights, options, error, message):
    with pytest.raises(error, match=message):
        sevo(weights, **options)


# ---- programs ----


def big():
    """A table and a graph large enough that their buffers stand out."""
    nodes, dim = 4000, 32
    rng = np.random.default_rng(0)
    rows, columns = rng.integers(nodes, size=(2, 40_000))
    weights = sevo_optax.graph.from_edges(rows, columns, num_nodes=nodes)
    return weights, jnp.ones((nodes, dim))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_step_exports_for_other_platforms(platform, dtype):
    weights, table = big()
    table = table.astype(dtype)
    tx = sevo_adamw(1e-3, weights, "item", weight_decay=0.1)
    params = {"item": table, "head": jnp.ones((3, 3))}
    exported = export.export(jax.jit(tx.update), platforms=[platform])(params, tx.init(params), params)
    assert exported.platforms == (platform,)
    assert "scatter" in exported.mlir_module()


def test_step_exported_for_several_platforms_runs_here(weights, table):
    tx = sevo_adamw(1e-3, weights)
    state = tx.init(table)
    step = jax.jit(tx.update)
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in custom_calls(step.lower(table, state, table))]
    exported = export.export(step, platforms=["cpu", "cuda"], disabled_checks=checks)(table, state, table)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        exported.call(table, state, table),
        step(table, state, table),
    )


def custom_calls(lowered):
    return sorted(set(re.findall(r"custom_call @(\w+)", lowered.as_text())))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_graph_is_no_constant_of_the_program(platform):
    weights, table = big()
    tx = sevo_adamw(1e-3, weights)
    state = tx.init(table)
    text = jax.jit(tx.update).trace(table, state, table).lower(lowering_platforms=(platform,)).as_text()
    # Splat constants (zeros of the scatter) have one printed element, whatever their shape.
    dense = [line for line in text.splitlines() if "stablehlo.constant dense<" in line]
    assert dense
    assert all(len(line) < 200 for line in dense)
    assert len(text) < 60_000


def test_graph_in_a_closure_would_be_a_constant():
    """The negative control of the test above."""
    weights, table = big()
    tx = sevo_adamw(1e-3, weights)
    state = tx.init(table)
    text = jax.jit(lambda u: tx.update(u, state, u)[0]).lower(table).as_text()
    assert max(map(len, text.splitlines())) > 200_000


def test_peak_memory_is_three_tables():
    weights, table = big()
    tx = sevo(weights)
    state = tx.init(table)
    memory = jax.jit(tx.update).lower(table, state).compile().memory_analysis()
    graph = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    # Everything but the arguments; the graph's own buffers are passed on.
    extra = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes - graph
    assert extra <= 3 * table.nbytes + 4096


def test_peak_memory_of_a_batch_is_that_of_its_columns():
    """Nothing moves the axes of the batch between two products."""
    weights, table = big()
    tx = sevo(weights)
    state = tx.init(table)
    batch = jnp.stack([table] * 4)
    run = jax.jit(jax.vmap(lambda x, state: tx.update(x, state)[0], in_axes=(0, None)))
    memory = run.lower(batch, state).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes <= 2 * batch.nbytes + 4096


def test_donated_state_is_passed_on_without_a_copy():
    weights, table = big()
    tx = sevo_adamw(1e-3, weights)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    state = tx.init(table)
    lowered = step.lower(table, state, table)
    assert lowered.as_text().count("tf.aliasing_output") >= len(jax.tree.leaves(state))
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    before = [leaf.unsafe_buffer_pointer() for leaf in optax.tree.get(state, "graph")]
    for _ in range(3):
        _, state = step(jnp.ones_like(table), state, table)
    assert [leaf.unsafe_buffer_pointer() for leaf in optax.tree.get(state, "graph")] == before


def test_vmap_over_seeds_keeps_one_graph(rng, weights):
    params = {"item": jnp.asarray(rng.normal(size=(5, NODES, DIM)), jnp.float32), "bias": jnp.ones((5, 3))}
    one = jax.tree.map(lambda leaf: leaf[0], params)
    tx = optax.chain(sevo(weights, "item"), optax.masked(sevo_adamw(0.1, weights), {"item": True, "bias": False}))
    axes = state_axes(jax.eval_shape(tx.init, one))
    state = jax.vmap(tx.init, out_axes=axes)(params)
    edges = np.count_nonzero(weights)
    step = jax.jit(jax.vmap(tx.update, in_axes=(0, axes, 0), out_axes=(0, axes)))
    graphs = [
        s.graph for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, SEvoState)) if isinstance(s, SEvoState)
    ]
    assert [g.data.shape for g in graphs] == [(edges,)] * 2
    updates, state = step(params, state, params)
    updates, state = step(params, state, params)
    assert optax.tree.get_all_with_path(state, "count")[0][1].shape == (5,)
    for seed in range(5):
        alone = jax.tree.map(lambda leaf, seed=seed: leaf[seed], params)
        expected = tx.init(alone)
        for _ in range(2):
            wanted, expected = tx.update(alone, expected, alone)
        np.testing.assert_allclose(updates["item"][seed], wanted["item"], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_state_axes_of_any_axis(weights, table, axis):
    """Scalars, such as counts, have no axis but the first for their replicas."""
    tx = sevo_adamw(optax.constant_schedule(0.1), weights)
    axes = state_axes(jax.eval_shape(tx.init, table), axis=axis)
    scalar = 0 if axis >= 0 else -1
    assert axes[0] == (scalar, axis, axis)
    assert axes[1] == SEvoState(scalar, (None, None, None))
    grads = jnp.stack([table, 2 * table[::-1]], axis)
    params = jnp.ones_like(grads)
    state = jax.vmap(tx.init, in_axes=axis, out_axes=axes)(params)
    update = jax.vmap(tx.update, in_axes=(axis, axes, axis), out_axes=(axis, axes))
    found, state = update(grads, state, params)
    assert state[1].graph.data.ndim == 1
    for i in range(2):
        mine = jnp.take(params, i, axis)
        expected, _ = tx.update(jnp.take(grads, i, axis), tx.init(mine), mine)
        np.testing.assert_allclose(jnp.take(found, i, axis), expected, rtol=1e-5)


# ---- documentation ----


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        ("smooth", "x adjacency * beta num_layers method rescale normalize"),
        ("smoothness", "x adjacency * normalize"),
        ("propagate", "adjacency x"),
        ("residual", "smoothed x adjacency * beta normalize"),
        ("sevo", "adjacency tables * beta num_layers method rescale normalize node_axis graph_sharding"),
        ("scale_by_adam_corrected", "b1 b2 eps eps_root mu_dtype * nesterov tables node_axis"),
        (
            "adamw_corrected",
            "learning_rate b1 b2 eps eps_root mu_dtype weight_decay mask * nesterov tables node_axis",
        ),
        (
            "sevo_adamw",
            "learning_rate adjacency tables * b1 b2 eps eps_root mu_dtype weight_decay mask nesterov "
            "beta num_layers method rescale normalize node_axis graph_sharding",
        ),
        (
            "sevo_adam",
            "learning_rate adjacency tables * b1 b2 eps eps_root mu_dtype nesterov "
            "beta num_layers method rescale normalize node_axis graph_sharding",
        ),
        (
            "sevo_sgd",
            "learning_rate adjacency tables * momentum nesterov "
            "beta num_layers method rescale normalize node_axis graph_sharding",
        ),
    ],
)
def test_signatures(function, signature):
    parameters = inspect.signature(getattr(sevo_optax, function)).parameters.values()
    names = [p.name for p in parameters]
    kinds = [p.kind for p in parameters]
    if inspect.Parameter.KEYWORD_ONLY in kinds:
        names.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    assert " ".join(names) == signature
    defaults = {p.name: p.default for p in parameters}
    for name, value in {
        "beta": 0.99,
        "num_layers": 3,
        "method": "neumann",
        "rescale": True,
        "b1": 0.9,
        "b2": 0.999,
    }.items():
        assert defaults.get(name, value) == value


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        (
            lambda count: jnp.float32(1.0) + 0 * count,
            ValueError,
            r"beta must lie in \[0, 1\), got 1.0, which is 1 in float32",
        ),
        (lambda count: -0.1, ValueError, r"beta must lie in \[0, 1\), got -0.1$"),
        (lambda count: "strong", TypeError, r"beta must be one number in \[0, 1\), got 'strong'"),
        (lambda count: jnp.array([0.1, 0.2]), TypeError, r"beta must be one number in .*jax\.vmap"),
    ],
)
def test_what_a_schedule_must_not_return(weights, table, schedule, error, message):
    tx = sevo(weights, beta=schedule)
    with pytest.raises(error, match=message):
        tx.update(table, tx.init(table))


def test_a_tree_whose_arrays_are_all_of_others_says_so(weights, table):
    params = {"table": table, "kernel": jnp.ones((3, 3))}
    tx = optax.partition({"a": sevo(weights), "b": optax.adam(1e-3)}, {"table": "b", "kernel": "b"})
    with pytest.raises(ValueError, match=r"the tree holds no array; under optax\.masked or optax\.partition"):
        tx.update(params, tx.init(params), params)


def test_a_name_that_begins_with_a_slash(weights, table):
    params = {"/a": table, "b": jnp.ones(3)}
    tx = sevo(weights, "/a")
    np.testing.assert_allclose(tx.update(params, tx.init(params))[0]["/a"], smooth(table, weights), rtol=1e-6)
