"""Checks that need four devices; test_sharding.py runs this file in a process of its own."""

import re
import sys
import traceback
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import sparse
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sevo_optax import graph, propagate, sevo, sevo_adamw, smooth, smoothness, state_axes, with_graphs, without_graphs
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
    return collectives(jax.jit(function).lower(*args).compile().as_text())


def collectives(text):
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


def split_over(kind):
    return NamedSharding(mesh_of(kind), P("a"))


def check_split_graph_exchanges_once_a_layer():
    """Split rows: one all-to-all a layer of the rows that are needed, and nothing else."""
    for kind in (AxisType.Auto, AxisType.Explicit):
        for num_layers in (1, 3) if kind == AxisType.Explicit else (2,):
            tx = sevo(WEIGHTS, num_layers=num_layers, graph_sharding=split_over(kind))
            x = place(X, kind, ROWS)
            state = tx.init(x)
            compiled = jax.jit(tx.update).lower(x, state).compile()
            text = compiled.as_text()
            assert collectives(text) == ["all-to-all"] * num_layers
            summary = graph.shard(WEIGHTS, 4).summary()
            assert state.graph.send.shape == (4, 4, summary.exchanged)
            assert state.graph.data.shape == (4, summary.entries)
            exchanged = exchanged_bytes(text)
            # A device's own part of the exchange stays with it.
            assert exchanged == num_layers * summary.bytes_per_layer(DIM) * 4 // 3, (exchanged, summary)
            assert all(len(part.sharding.device_set) == 4 for part in state.graph)
            assert all(part.addressable_shards[0].data.shape[0] == 1 for part in state.graph)
            updates, new = compiled(x, state)
            assert_close(updates, smooth(X, WEIGHTS, num_layers=num_layers))
            assert updates.sharding.is_equivalent_to(x.sharding, 2)
            assert all(part.sharding.is_equivalent_to(state.graph.data.sharding, part.ndim) for part in new.graph)


def exchanged_bytes(text):
    """Bytes of all arrays that all-to-alls of a program return on one device."""
    total = 0
    for shapes in re.findall(r"= (.*?) all-to-all(?:-start)?\(", text):
        for dims in re.findall(r"f32\[([\d,]*)\]", shapes):
            total += 4 * int(np.prod([int(size) for size in dims.split(",")]))
    return total


def check_split_graph_gives_the_same_numbers():
    odd, weights = X[:-1], WEIGHTS[:-1, :-1]  # JAX has no arrays whose rows are split unevenly
    cases = [(AxisType.Auto, COLUMNS, X, WEIGHTS), (AxisType.Auto, None, odd, weights)]
    cases += [(AxisType.Explicit, COLUMNS, odd, weights), (AxisType.Explicit, None, X, WEIGHTS)]
    for kind, spec, table, edges in cases:
        x = table if spec is None else place(table, kind, spec)
        tx = sevo(edges, graph_sharding=split_over(kind), beta=0.9)
        updates, _ = jax.jit(tx.update)(x, tx.init(x))
        assert_close(updates, smooth(table, edges, beta=0.9))
        # Where sharding is left to the compiler, it decides.
        assert kind == AxisType.Auto or spec is None or updates.sharding.is_equivalent_to(x.sharding, 2)
    for kind in (AxisType.Auto, AxisType.Explicit):
        x = place(X, kind, ROWS)
        options = {"method": "iterative", "beta": 0.4, "num_layers": 1, "normalize": False}
        tx = sevo(graph.shard(WEIGHTS / 50, 4), graph_sharding=split_over(kind), **options)
        assert_close(tx.update(x, tx.init(x))[0], smooth(X, WEIGHTS / 50, **options))


def check_split_graph_on_two_axes():
    """Columns over one axis, rows over another; rows over both; kernels; stacked tables, each padded by itself."""
    expected = smooth(X, WEIGHTS)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind, kind))
        cases = [(("b",), P("b", "a")), (("b",), P("a", "b")), (("a", "b"), P(("a", "b"), None))]
        for rows, spec in cases if kind == AxisType.Explicit else cases[:1]:
            tx = sevo(WEIGHTS, graph_sharding=NamedSharding(mesh, P(rows)), node_axis=0)
            x = jax.device_put(X, NamedSharding(mesh, spec))
            updates, _ = jax.jit(tx.update)(x, tx.init(x))
            assert_close(updates, expected)
            assert kind == AxisType.Auto or updates.sharding.is_equivalent_to(x.sharding, 2)
        tx = sevo(WEIGHTS, graph_sharding=NamedSharding(mesh, P("a")), node_axis=1)
        x = jax.device_put(X.T, NamedSharding(mesh, P("b", "a")))
        assert_close(jax.jit(tx.update)(x, tx.init(x))[0], expected.T)
        tx = sevo(WEIGHTS, ("user", "item"), graph_sharding=NamedSharding(mesh, P(("a", "b"))))
        tree = {"user": X[:17], "item": X[17:], "bias": np.ones(3, np.float32)}
        state = tx.init(tree)
        assert state.graph.indptr.shape == (4, 5 + 6 + 1)
        updates, _ = jax.jit(tx.update)(tree, state)
        assert_close(np.concatenate([updates["user"], updates["item"]]), expected)
        tree = {"user": X[:16], "item": X[16:]}
        tree = {name: jax.device_put(x, NamedSharding(mesh, P(("a", "b")))) for name, x in tree.items()}
        assert communication(tx.update, tree, tx.init(tree)) == ["all-to-all"] * 3  # each device stacks its own rows


def check_split_graph_in_an_optimizer():
    """Batches, derivatives, checkpoints and other numbers of devices."""
    kind = AxisType.Explicit
    sharding = split_over(kind)
    whole, split = (sevo_adamw(0.1, WEIGHTS, graph_sharding=s) for s in (None, sharding))
    params = place(X, kind, ROWS)
    expected, updates = X, params
    old, new = whole.init(X), split.init(params)
    step = jax.jit(split.update)
    for _ in range(2):
        expected, old = whole.update(expected, old, X)
        updates, new = step(updates, new, params)
        saved = jax.device_get(without_graphs(new))
        assert sum(leaf.size for leaf in jax.tree.leaves(saved)) == 2 * X.size + 2
        new = with_graphs(without_graphs(new), split.init(params))
    assert_close(updates, expected)
    assert communication(split.update, params, new, params) == ["all-to-all"] * 3
    half = NamedSharding(jax.make_mesh((2,), ("a",), axis_types=(kind,)), P("a"))
    fewer = sevo_adamw(0.1, WEIGHTS, graph_sharding=half)
    assert_close(fewer.update(X, with_graphs(saved, fewer.init(X)), X)[0], whole.update(X, old, X)[0])
    with pytest.raises(ValueError, match="holds 4 shards of 10 rows, but graph_sharding asks for 2 shards of 20"):
        fewer.update(X, new, X)

    tx = sevo(WEIGHTS, graph_sharding=sharding)
    seeds = place(np.stack([X, 2 * X, -X]), kind, P(None, "a"))
    state = tx.init(X)
    axes = state_axes(state)._replace(count=None)
    update = jax.vmap(tx.update, in_axes=(0, axes), out_axes=(0, axes))
    assert_close(jax.jit(update)(seeds, state)[0][2], -smooth(X, WEIGHTS))
    assert communication(update, seeds, state) == ["all-to-all"] * 3

    def loss(x, tx=tx, state=state):
        return jnp.sum(jnp.sin(tx.update(x, state)[0]))

    derivative = jax.jit(jax.grad(loss))(params)
    wanted = jax.grad(lambda x: jnp.sum(jnp.sin(smooth(x, WEIGHTS))))(X)
    assert_close(derivative, wanted)


def check_a_traced_init_splits_the_graph():
    for kind in (AxisType.Auto, AxisType.Explicit):
        tx = sevo(WEIGHTS, graph_sharding=split_over(kind))
        graph = tx.init(X).graph
        assert [x.shape for x in jax.eval_shape(tx.init, X).graph] == [x.shape for x in graph]
        with jax.set_mesh(split_over(kind).mesh):
            traced = jax.jit(tx.init)(X).graph
        for one, other in zip(traced, graph, strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.sharding.is_equivalent_to(other.sharding, one.ndim), (one.sharding, other.sharding)


def check_inside_shard_map():
    mesh = mesh_of(AxisType.Explicit)
    for method in ("neumann", "iterative", "exact"):
        for check_vma in (False, True):
            tx = sevo(WEIGHTS, method=method, beta=0.9)
            run = jax.shard_map(
                lambda x, state, tx=tx: tx.update(x, state)[0],
                mesh=mesh,
                in_specs=(COLUMNS, P()),
                out_specs=COLUMNS,
                check_vma=check_vma,
            )
            x = place(X, AxisType.Explicit, COLUMNS)
            state = jax.device_put(tx.init(X), NamedSharding(mesh, P()))
            assert_close(jax.jit(run)(x, state), smooth(X, WEIGHTS, method=method, beta=0.9))


def check_derivatives_inside_shard_map():
    """Each device has weights or columns of its own: what is the same on all gets the sum of all derivatives."""
    mesh = mesh_of(AxisType.Auto)

    weights = graph.from_scipy(WEIGHTS)

    def loss(data, x, scale=1.0):
        return jnp.sum(jnp.sin(propagate(sparse.BCOO((scale * data, weights.indices), shape=weights.shape), x)))

    def total(data, x, **specs):
        part = jax.shard_map(lambda d, x: jax.lax.psum(loss(d, x), "a"), mesh=mesh, out_specs=P(), **specs)
        return part(data, x)

    each = jnp.concatenate([(i + 1) * weights.data for i in range(4)])
    found = jax.jit(jax.grad(partial(total, in_specs=(P("a"), P())), argnums=1))(each, X)
    assert_close(found, sum(jax.grad(loss, 1)(weights.data, X, i + 1.0) for i in range(4)))
    found = jax.jit(jax.grad(partial(total, in_specs=(P(), COLUMNS))))(weights.data, X)
    assert_close(found, jax.grad(loss)(weights.data, X))
    # What differs between devices is not passed off as the same on all.
    differing = jax.shard_map(loss, mesh=mesh, in_specs=(P("a"), P()), out_specs=P())
    with pytest.raises(ValueError, match=r"out_specs|replicat"):
        jax.jit(differing)(each, X)


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
