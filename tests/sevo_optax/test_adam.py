"""The corrected moments: what counts as idle, and that nothing else differs from optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sevo_optax import ScaleByAdamCorrectedState, adamw_corrected, scale_by_adam_corrected
from tests.sevo_optax import reference

HYPERPARAMETERS = [
    {},
    {"b1": 0.8, "b2": 0.95, "eps": 1e-6, "eps_root": 1e-9},
    {"mu_dtype": jnp.bfloat16},
    {"nesterov": True},
    {"nesterov": True, "b1": 0.8, "b2": 0.95, "mu_dtype": jnp.bfloat16},
]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random_tree(rng, dtype=np.float32):
    shapes = {"table": (6, 4), "bias": (5,), "scalar": (), "cube": (3, 2, 4)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def run(tx, params, grads, jit):
    """All updates and the last state."""
    update = jax.jit(tx.update) if jit else tx.update
    state = tx.init(params)
    out = []
    for grad in grads:
        updates, state = update(grad, state, params)
        out.append(updates)
    return out, state


@pytest.mark.parametrize(
    ("options", "dtype", "jit"),
    [(HYPERPARAMETERS[0], jnp.float32, False)]
    + [(HYPERPARAMETERS[0], dtype, True) for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)]
    + [(options, jnp.float32, True) for options in HYPERPARAMETERS[1:]],
)
def test_equals_optax_bit_for_bit_where_no_row_is_idle(rng, options, dtype, jit):
    params = random_tree(rng, dtype)
    grads = [random_tree(rng, dtype) for _ in range(5)]
    tables = ("table", "bias", "cube")
    for ours, theirs in (
        (scale_by_adam_corrected(**options, tables=tables), optax.scale_by_adam(**options)),
        (
            adamw_corrected(0.1, **options, weight_decay=0.2, tables=tables),
            optax.adamw(0.1, **options, weight_decay=0.2),
        ),
    ):
        actual, state = run(ours, params, grads, jit)
        expected, wanted = run(theirs, params, grads, jit)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
        assert jax.tree.map(lambda leaf: leaf.dtype, actual) == jax.tree.map(lambda leaf: leaf.dtype, expected)
        for name in ("count", "mu", "nu"):
            jax.tree.map(np.testing.assert_array_equal, optax.tree.get(state, name), optax.tree.get(wanted, name))


def test_one_nonzero_component_makes_a_row_active(rng):
    """Exact zeros of the whole row count, nothing weaker."""
    tx = scale_by_adam_corrected()
    params = jnp.zeros((5, 3))
    first = jnp.asarray(rng.normal(size=(5, 3)))
    second = jnp.zeros((5, 3)).at[1, 2].set(1e-30).at[2, 0].set(-0.0).at[3, 1].set(jnp.nan)
    (one, two), _ = run(tx, params, [first, second], jit=True)
    (_, plain), _ = run(optax.scale_by_adam(), params, [first, second], jit=True)
    two = np.asarray(two)
    for active in (1, 3):
        np.testing.assert_array_equal(two[active], plain[active])
    assert np.isnan(two[3]).any()
    for idle in (0, 2, 4):
        np.testing.assert_allclose(two[idle], one[idle], rtol=1e-5)
        assert not np.allclose(two[idle], plain[idle], rtol=1e-2)


def test_row_that_was_never_active_stays_where_it_is(rng):
    tx = scale_by_adam_corrected()
    grads = [jnp.zeros((3, 2)).at[0].set(1.0)] * 4
    updates, state = run(tx, jnp.zeros((3, 2)), grads, jit=True)
    np.testing.assert_array_equal(updates[-1][1:], 0)
    np.testing.assert_array_equal(state.nu[1:], 0)
    assert (np.asarray(updates[-1][0]) > 0).all()


def test_whatever_adds_to_the_gradient_switches_the_correction_off(rng):
    """The documented consequence of exact zeros: decay in front of the moments leaves no row idle."""
    params = jnp.ones((3, 2))
    grads = [jnp.ones((3, 2)), jnp.zeros((3, 2))]
    decay = optax.add_decayed_weights(0.1)
    corrected, _ = run(optax.chain(decay, scale_by_adam_corrected()), params, grads, jit=False)
    plain, _ = run(optax.chain(decay, optax.scale_by_adam()), params, grads, jit=False)
    jax.tree.map(np.testing.assert_array_equal, corrected, plain)


@pytest.mark.parametrize("make", [scale_by_adam_corrected, lambda **options: adamw_corrected(0.1, **options)])
def test_none_means_the_only_array(rng, make):
    """As in sevo: one array needs no name, of several none is taken by guess."""
    params = random_tree(rng)
    alone = {"table": params["table"]}
    grads = [{"table": random_tree(rng)["table"]}, {"table": jnp.zeros((6, 4))}]
    assumed, _ = run(make(), alone, grads, jit=False)
    named, _ = run(make(tables="table"), alone, grads, jit=False)
    jax.tree.map(np.testing.assert_array_equal, assumed, named)

    message = r"holds 4; name the embedding table, as in tables='table'; the tree holds:[\s\S]*cube: float32\[3, 2, 4\]"
    with pytest.raises(ValueError, match=message):
        make().init(params)
    state = make(tables="table").init(params)
    with pytest.raises(ValueError, match=message):
        make().update(params, state, params)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_dense_kernel_beside_the_table_follows_adamw_exactly(rng, nesterov):
    """A row with one gradient and thousands of idle steps: with a corrected direction it would never stop."""
    params = {"table": jnp.zeros((3, 2)), "dense": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    first = jax.tree.map(jnp.copy, zeros)
    first["dense"]["kernel"] = first["dense"]["kernel"].at[0].set(1e-3)
    first["table"] = first["table"].at[0].set(1e-3)

    def end(tx):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(zeros, state, params)
            return (optax.apply_updates(params, updates), state), None

        updates, state = tx.update(first, tx.init(params), params)
        return jax.lax.scan(step, (optax.apply_updates(params, updates), state), length=5000)[0][0]

    ours = jax.jit(lambda: end(adamw_corrected(1e-3, weight_decay=0, nesterov=nesterov, tables="table")))()
    plain = jax.jit(lambda: end(optax.adamw(1e-3, weight_decay=0, nesterov=nesterov)))()
    jax.tree.map(np.testing.assert_array_equal, ours["dense"], plain["dense"])
    assert -0.02 < plain["dense"]["kernel"][0, 0] < 0
    # The table's own row, which was sampled once, keeps its direction: 5,001 full steps.
    np.testing.assert_allclose(ours["table"][0], -5.0, rtol=0.01)


@pytest.mark.parametrize("axis", [1, -1])
def test_node_axis_says_which_slices_are_rows(rng, axis):
    grads = [jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)] * 2 + [jnp.zeros((5, 3)).at[:, 1].set(1.0)]
    grads[2] = grads[2].at[0].set(0.0).at[4, 2].set(1.0)
    along, _ = run(scale_by_adam_corrected(node_axis=axis), jnp.zeros((3, 5)), [g.T for g in grads], jit=True)
    expected, _ = run(scale_by_adam_corrected(), jnp.zeros((5, 3)), grads, jit=True)
    np.testing.assert_array_equal(along[-1].T, expected[-1])
    with pytest.raises(ValueError, match=r"node_axis=2 is no axis of .* with shape \[3, 5\]"):
        scale_by_adam_corrected(node_axis=2).init(jnp.zeros((3, 5)))


@pytest.mark.usefixtures("x64")
def test_nesterov_looks_ahead_with_the_estimate(rng):
    """Dozat's direction, where the gradient of an idle row is estimated from its first moment."""
    grads = rng.normal(size=(9, 6, 3)) * (rng.random((9, 6, 1)) < 0.5)
    b1, b2 = 0.8, 0.95
    actual, _ = run(scale_by_adam_corrected(b1, b2, nesterov=True), jnp.zeros((6, 3)), list(jnp.asarray(grads)), True)
    m, v = np.zeros((6, 3)), np.zeros((6, 3))
    for t, g in enumerate(grads, start=1):
        idle = (g == 0).all(axis=1, keepdims=True)
        last = max(t - 1, 1)
        g = np.where(idle, m / (1 - b1**last), g)
        square = np.where(idle, v / (1 - b2**last), g**2)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * square
        ahead = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        np.testing.assert_allclose(actual[t - 1], ahead / (np.sqrt(v / (1 - b2**t)) + 1e-8), rtol=1e-9, atol=1e-12)


def test_tables_restrict_the_correction(rng):
    params = random_tree(rng)
    grads = [random_tree(rng), jax.tree.map(jnp.zeros_like, params)]
    plain, _ = run(optax.scale_by_adam(), params, grads, jit=False)
    for tables in ("table", ("cube", "table"), "bias"):
        corrected, _ = run(scale_by_adam_corrected(tables=tables), params, grads, jit=False)
        for name in params:
            if name in (tables if isinstance(tables, tuple) else (tables,)):
                np.testing.assert_allclose(corrected[1][name], corrected[0][name], rtol=1e-5)
            else:
                np.testing.assert_array_equal(corrected[1][name], plain[1][name])


def test_wrong_table_is_refused_at_init(rng):
    with pytest.raises(ValueError, match=r"path 'tabel' matches no array[\s\S]*table: float32\[6, 4\]"):
        scale_by_adam_corrected(tables="tabel").init(random_tree(rng))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", HYPERPARAMETERS[:2])
def test_matches_the_dense_reference(rng, options):
    grads = rng.normal(size=(12, 8, 3)) * (rng.random((12, 8, 1)) < 0.4)
    grads[0, :4] = 0  # idle from the start
    actual, _ = run(scale_by_adam_corrected(**options), jnp.zeros((8, 3)), list(jnp.asarray(grads)), jit=True)
    expected = reference.adam_directions(grads, **({"b1": 0.9, "b2": 0.999} | options), corrected=True)
    np.testing.assert_allclose(np.stack(actual), np.stack(list(expected)), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_idle_rows_of_half_precision_keep_their_direction(rng, dtype):
    grads = [jnp.asarray(rng.normal(size=(4, 3)), dtype)] + [jnp.zeros((4, 3), dtype)] * 20
    updates, state = run(scale_by_adam_corrected(0.9, 0.98), jnp.zeros((4, 3), dtype), grads, jit=True)
    assert updates[-1].dtype == state.mu.dtype == state.nu.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(updates[-1], np.float32), np.asarray(updates[0], np.float32), rtol=0.3, atol=0.1
    )


def test_state_is_laid_out_as_that_of_optax(rng):
    params = random_tree(rng)
    state = scale_by_adam_corrected(mu_dtype=jnp.bfloat16, tables="table").init(params)
    theirs = optax.scale_by_adam(mu_dtype=jnp.bfloat16).init(params)
    assert isinstance(state, ScaleByAdamCorrectedState)
    assert state._fields == theirs._fields == ("count", "mu", "nu")
    jax.tree.map(np.testing.assert_array_equal, tuple(state), tuple(theirs))
    assert jax.tree.map(lambda x: x.dtype, tuple(state)) == jax.tree.map(lambda x: x.dtype, tuple(theirs))


def test_a_number_for_a_table_is_refused():
    with pytest.raises(TypeError, match="tables: 't' must be an array, got float"):
        adamw_corrected(1e-3, tables="t").init({"t": 1.0})
