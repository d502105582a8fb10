"""Checks that need four devices; test_sharding.py runs this file in a process of its own."""

import re
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import sparse
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sevo_optax import sevo, sevo_adamw, smooth, smoothness, state_axes
from tests.jax_names import set_mesh
from tests.sevo_optax import reference

NODES, DIM = 40, 8
RNG = np.random.default_rng(0)
WEIGHTS = reference.random_weights(RNG, NODES, 0.2)
X = RNG.normal(size=(NODES, DIM)).astype(np.float32)
FORMS = [{"method": "exact", "beta": 0.8}, {}]
COLUMNS, ROWS, WHOLE = P(None, "a"), P("a", None), P()


def mesh_of(kind):
    return jax.make_mesh((4,), ("a",), axis_types=(kind,))


def place(x, kind, spec):
    return jax.device_put(x, NamedSharding(mesh_of(kind), spec))


def communication(function, *args):
    text = jax.jit(function).lower(*args).compile().as_text()
    return re.findall(r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=3e-6)


def check_split_columns_need_no_communication():
    for kind in (AxisType.Auto, AxisType.Explicit):
        x = place(X, kind, COLUMNS)
        tx = sevo(WEIGHTS)
        assert communication(tx.update, x, tx.init(x)) == []
    # In explicit mode every device even solves for its own columns; the residual alone is a sum over all of them.
    tx = sevo(WEIGHTS, method="exact")
    x = place(X, AxisType.Explicit, COLUMNS)
    state = tx.init(x)
    assert set(communication(tx.update, x, state)) == {"all-reduce"}
    text = jax.jit(tx.update).lower(x, state).compile().as_text()
    exchanged = re.findall(r"= (.*) all-reduce(?:-start)?\(", text)
    assert exchanged
    assert not any(re.search(r"\[\d", shape) for shape in exchanged), exchanged  # numbers, no arrays


def check_split_rows_are_exchanged_once_before_and_once_after():
    tx = sevo(WEIGHTS)
    x = place(X, AxisType.Explicit, ROWS)
    assert communication(tx.update, x, tx.init(x)) == ["all-to-all"] * 2


def check_every_sharding_gives_the_same_numbers():
    for kind in (AxisType.Auto, AxisType.Explicit):
        for spec in (COLUMNS, ROWS, WHOLE):
            x = place(X, kind, spec)
            for options in FORMS:
                expected = smooth(X, WEIGHTS, **options)
                tx = sevo(WEIGHTS, **options)
                state = tx.init(x)
                updates, new = jax.jit(tx.update)(x, state)
                assert_close(updates, expected)
                assert updates.sharding.is_equivalent_to(x.sharding, 2)
                assert new.residual is None or new.residual < 1e-5
            updates, _ = tx.update(x, state)
            assert_close(updates, expected)
            assert updates.sharding.is_equivalent_to(x.sharding, 2)
            with set_mesh(mesh_of(kind)):
                assert_close(tx.update(x, state)[0], expected)
            assert_close(smoothness(x, WEIGHTS), smoothness(X, WEIGHTS))


def check_whole_optimizer():
    plain = sevo_adamw(0.1, WEIGHTS, weight_decay=0.1)
    grads = [X, X * (RNG.random((NODES, 1)) < 0.5).astype(np.float32)]
    state = plain.init(X)
    for grad in grads:
        expected, state = plain.update(grad, state, X)
    for kind in (AxisType.Auto, AxisType.Explicit):
        for spec in (COLUMNS, ROWS, WHOLE):
            params = place(X, kind, spec)
            state = plain.init(params)
            step = jax.jit(plain.update)
            for grad in grads:
                updates, state = step(place(grad, kind, spec), state, params)
            assert_close(updates, expected)
            mu = optax.tree.get(state, "mu")
            assert mu.sharding.is_equivalent_to(params.sharding, 2)
    # Which rows are idle is the only thing that devices with different columns tell each other.
    params = place(X, AxisType.Explicit, COLUMNS)
    assert communication(plain.update, params, plain.init(params), params) == ["all-reduce"]


def check_stacked_tables_keep_their_own_shardings():
    expected = smooth(X, WEIGHTS)
    for kind in (AxisType.Auto, AxisType.Explicit):
        for user, item in ((ROWS, COLUMNS), (COLUMNS, ROWS), (WHOLE, ROWS), (None, COLUMNS)):
            tree = {
                "user": X[:16] if user is None else place(X[:16], kind, user),
                "item": place(X[16:], kind, item),
                "bias": jnp.ones(3),
            }
            tx = sevo(WEIGHTS, ("user", "item"))
            updates, _ = jax.jit(tx.update)(tree, tx.init(tree))
            assert_close(updates["user"], expected[:16])
            assert_close(updates["item"], expected[16:])
            if kind == AxisType.Explicit:
                for name in {"user", "item"} - ({"user"} if user is None else set()):
                    assert updates[name].sharding.is_equivalent_to(tree[name].sharding, 2)


def check_other_shapes():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit, AxisType.Explicit))
    expected = smooth(X, WEIGHTS)
    cube = X.reshape(NODES, 2, 4)
    odd = X[:, :3]
    cases = [
        (X, 0, P("a", "b")),
        (X, 0, P(("a", "b"), None)),
        (X.T, 1, P("a", "b")),
        (X.T, -1, P(None, ("b", "a"))),
        (cube, 0, P(None, "a", "b")),
        (cube, 0, P("a", None, "b")),
        (np.moveaxis(cube, 0, 1), 1, P("a", "b", None)),
        (odd, 0, P("a", None)),  # three columns cannot be split: every device gets all of them
        (X[:, 0], 0, P(("a", "b"))),
    ]
    for x, axis, spec in cases:
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        tx = sevo(WEIGHTS, node_axis=axis)
        updates, _ = jax.jit(tx.update)(placed, tx.init(placed))
        wanted = np.moveaxis(np.asarray(expected[:, : x.size // NODES]).reshape(np.moveaxis(x, axis, 0).shape), 0, axis)
        assert_close(updates, wanted)
        assert updates.sharding.is_equivalent_to(placed.sharding, x.ndim)


def check_traced_hyperparameters_and_gradients():
    for kind in (AxisType.Auto, AxisType.Explicit):
        x = place(X, kind, COLUMNS)
        injected = optax.inject_hyperparams(sevo)(sparse.BCOO.fromdense(WEIGHTS), beta=0.7, num_layers=2)
        updates, _ = jax.jit(injected.update)(x, injected.init(x), x)
        assert_close(updates, smooth(X, WEIGHTS, beta=0.7, num_layers=2))

        def loss(x, beta):
            return jnp.sum(jnp.sin(smooth(x, WEIGHTS, beta=beta)))

        actual = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, 0.7)
        expected = jax.grad(loss, argnums=(0, 1))(X, 0.7)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)


def check_seeds_on_their_own_devices():
    tx = sevo_adamw(0.1, WEIGHTS)
    params = np.stack([X, 2 * X, -X, X[::-1]])
    axes = state_axes(jax.eval_shape(tx.init, X))
    step = jax.jit(jax.vmap(tx.update, in_axes=(0, axes, 0), out_axes=(0, axes)))
    state = jax.vmap(tx.init, out_axes=axes)(params)
    for _ in range(2):
        expected, state = step(params, state, params)
    for kind in (AxisType.Auto, AxisType.Explicit):
        placed = place(params, kind, P("a"))
        # The counts know nothing of the parameters, so their place has to be said.
        state = jax.vmap(tx.init, out_axes=axes)(params)
        state = jax.tree.map(
            lambda axis, leaf, kind=kind: place(leaf, kind, P() if axis is None else P("a")),
            axes,
            state,
            is_leaf=lambda axis: axis is None,
        )
        for _ in range(2):
            updates, state = step(placed, state, placed)
        assert_close(updates, expected)


def check_inside_shard_map():
    mesh = mesh_of(AxisType.Explicit)
    tx = sevo(WEIGHTS)
    run = jax.shard_map(
        lambda x, state: tx.update(x, state)[0], mesh=mesh, in_specs=(COLUMNS, P()), out_specs=COLUMNS, check_vma=False
    )
    x = place(X, AxisType.Explicit, COLUMNS)
    state = jax.device_put(tx.init(X), NamedSharding(mesh, P()))
    assert_close(jax.jit(run)(x, state), smooth(X, WEIGHTS))


def main():
    assert jax.device_count() == 4, "run through test_sharding.py"
    failed = []
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                check()
            except Exception:  # report every check in one go
                failed.append(name)
                traceback.print_exc()
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
