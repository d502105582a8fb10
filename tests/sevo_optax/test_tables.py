"""Which leaf is smoothed: paths, stacked tables, node axes, wrappers of optax and Flax, and the errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from sevo_optax import _tables, adamw_corrected, sevo, sevo_adamw, smooth, with_graphs, without_graphs
from tests.sevo_optax import reference

NODES, DIM = 9, 4


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def weights(rng):
    return reference.random_weights(rng, NODES)


@pytest.fixture
def table(rng):
    return rng.normal(size=(NODES, DIM)).astype(np.float32)


def update(tx, updates):
    return tx.update(updates, tx.init(updates))[0]


def assert_smoothed(actual, table, weights):
    np.testing.assert_array_equal(actual, smooth(table, weights))


# ---- paths ----


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        (lambda x: {"item": x, "item_bias": np.ones(3)}, "item"),
        (lambda x: {"item": {"embedding": x}, "head": np.ones(3)}, "item"),
        (lambda x: {"item": {"embedding": x}, "head": np.ones(3)}, "item/embedding"),
        (lambda x: {"params": {"item": {"embedding": x}, "head": np.ones(3)}}, "params/item"),
        (lambda x: {"params": {"item": {"embedding": x}, "head": np.ones(3)}}, "/params/item/embedding/"),
        (lambda x: [np.ones(3), {"w": x}], "1/w"),
        (lambda x: (x, np.ones(3)), "0"),
        (lambda x: {"item": x, "head": None}, None),
        (lambda x: x, None),
        (lambda x: {"linear/~/embed": x, "linear": np.ones(3)}, "linear/~/embed"),
        (lambda x: nnx.State({"item": nnx.State({"embedding": x}), "head": np.ones(3)}), "item"),
    ],
)
def test_path_names_a_leaf_or_a_part_with_one_array(tree, path, weights, table):
    updates = tree(table)
    out = update(sevo(weights, path), updates)
    assert jax.tree.structure(out) == jax.tree.structure(updates)
    touched = 0
    for new, old in zip(jax.tree.leaves(out), jax.tree.leaves(updates), strict=True):
        if old is table:
            assert_smoothed(new, table, weights)
            touched += 1
        else:
            assert new is old
    assert touched == 1


def test_several_tables_are_one_node_set_in_the_callers_order(weights, table):
    user, item = table[:4], table[4:]
    expected = smooth(table, weights)
    # Flattening would put the items first.
    out = update(sevo(weights, ("user", "item")), {"item": item, "user": user, "bias": np.ones(2)})
    np.testing.assert_array_equal(out["user"], expected[:4])
    np.testing.assert_array_equal(out["item"], expected[4:])
    swapped = update(sevo(weights, ["item", "user"]), {"item": item, "user": user})
    np.testing.assert_array_equal(
        np.concatenate([swapped["item"], swapped["user"]]), smooth(np.concatenate([item, user]), weights)
    )
    assert not np.allclose(swapped["item"], out["item"])


def test_tables_of_different_dtypes_are_stacked_in_the_wider_one(weights, table):
    updates = {"user": jnp.asarray(table[:4], jnp.bfloat16), "item": table[4:]}
    out = update(sevo(weights, ("user", "item")), updates)
    joined = np.concatenate([np.asarray(updates["user"], np.float32), table[4:]])
    assert out["user"].dtype == jnp.bfloat16
    assert out["item"].dtype == np.float32
    np.testing.assert_array_equal(out["item"], smooth(joined, weights)[4:])
    np.testing.assert_array_equal(out["user"], smooth(joined, weights)[:4].astype(jnp.bfloat16))


def test_two_graphs_in_one_chain(rng, table, weights):
    other = reference.random_weights(rng, 5)
    second = rng.normal(size=(5, 3)).astype(np.float32)
    tx = optax.chain(sevo(weights, "item"), sevo(other, "category", beta=0.5))
    out = update(tx, {"category": second, "item": table})
    assert_smoothed(out["item"], table, weights)
    np.testing.assert_array_equal(out["category"], smooth(second, other, beta=0.5))


@pytest.mark.parametrize("axis", [1, -1])
def test_node_axis_of_a_kernel(weights, table, axis):
    out = update(sevo(weights, "kernel", node_axis=axis), {"kernel": table.T, "bias": np.ones(NODES)})
    np.testing.assert_array_equal(out["kernel"], smooth(table, weights).T)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_leaf_with_three_axes(rng, weights, axis):
    leaf = rng.normal(size=(NODES, 2, 3)).astype(np.float32)
    expected = np.moveaxis(np.asarray(smooth(leaf.reshape(NODES, 6), weights)).reshape(leaf.shape), 0, axis)
    actual = update(sevo(weights, node_axis=axis), np.moveaxis(leaf, 0, axis))
    np.testing.assert_array_equal(actual, expected)


def test_leaf_with_one_axis(weights, table):
    out = update(sevo(weights, "bias"), {"bias": table[:, 0], "kernel": table})
    np.testing.assert_array_equal(out["bias"], smooth(table[:, 0], weights))
    assert out["kernel"] is table


def test_masked_needs_no_path(weights, table):
    updates = {"item": table, "kernel": np.ones((3, 3), np.float32)}
    mask = {"item": True, "kernel": False}
    for tables in (None, "item"):
        out = update(optax.masked(sevo(weights, tables), mask), updates)
        assert_smoothed(out["item"], table, weights)
        np.testing.assert_array_equal(out["kernel"], updates["kernel"])


def test_partition(weights, table):
    params = {"item": table, "kernel": np.ones((3, 3), np.float32)}
    labels = {"item": "graph", "kernel": "rest"}
    tx = optax.partition({"graph": sevo_adamw(0.1, weights), "rest": optax.adamw(0.1)}, labels)
    out, _ = jax.jit(tx.update)(params, tx.init(params), params)
    alone = sevo_adamw(0.1, weights)
    np.testing.assert_array_equal(out["item"], jax.jit(alone.update)(table, alone.init(table), table)[0])
    rest = optax.adamw(0.1)
    kernel = params["kernel"]
    np.testing.assert_array_equal(out["kernel"], jax.jit(rest.update)(kernel, rest.init(kernel), kernel)[0])


# ---- Flax ----


class Linen(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return nn.Dense(2, name="head")(nn.Embed(NODES, DIM, name="item_embedding")(ids))


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.item_embedding = nnx.Embed(NODES, DIM, rngs=rngs)
        self.head = nnx.Linear(DIM, 2, rngs=rngs)

    def __call__(self, ids):
        return self.head(self.item_embedding(ids))


@pytest.mark.parametrize("path", ["item_embedding", "item_embedding/embedding", "item_embedding/embedding/value"])
def test_dict_linen_and_nnx_give_the_same_numbers(weights, table, rng, path):
    kernel = rng.normal(size=(DIM, 2)).astype(np.float32)
    start = {"item_embedding": {"embedding": table}, "head": {"kernel": kernel, "bias": np.zeros(2, np.float32)}}
    start = jax.tree.map(jnp.asarray, start)
    ids, target = jnp.array([1, 2, 2]), jnp.ones((3, 2))

    def make(prefix=""):
        tx = optax.chain(sevo(weights, prefix + path, beta=0.5), sevo_adamw(0.1, weights, prefix + path))
        return optax.chain(tx, adamw_corrected(0.1, tables=prefix + path))

    # A plain dictionary.
    def loss(params):
        return jnp.mean((Linen().apply({"params": params}, ids) - target) ** 2)

    tx = make()
    params, state = start, tx.init(start)
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    expected = params
    assert not np.allclose(expected["item_embedding"]["embedding"], table)

    # Linen's TrainState, over the parameters and over a whole dictionary of collections.
    train = TrainState.create(apply_fn=Linen().apply, params=start, tx=make())
    for _ in range(3):
        train = train.apply_gradients(grads=jax.grad(loss)(train.params))
    jax.tree.map(np.testing.assert_array_equal, train.params, expected)

    nested = {"params": start}
    train = TrainState.create(apply_fn=Linen().apply, params=nested, tx=make("params/"))
    for _ in range(3):
        train = train.apply_gradients(grads=jax.grad(lambda p: loss(p["params"]))(train.params))
    jax.tree.map(np.testing.assert_array_equal, train.params["params"], expected)

    # NNX, whose Param wrappers are in the paths of init and not in those of update.
    model = NNX(nnx.Rngs(0))
    nnx.update(model, nnx.State(start))
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.mean((m(ids) - target) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(3):
        step(model, optimizer)
    actual = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)


def test_graphs_go_back_into_an_optimizer_of_nnx(weights):
    """Its leaves are wrapped, those of ``tx.init`` are not."""
    tx = sevo_adamw(0.1, weights, "item_embedding")
    model = NNX(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    slim = without_graphs(optimizer.opt_state)
    assert len(jax.tree.leaves(slim)) == len(jax.tree.leaves(optimizer.opt_state)) - 3
    restored = with_graphs(slim, tx.init(nnx.state(model, nnx.Param)))
    same = jax.tree.map(np.array_equal, jax.tree.leaves(restored), jax.tree.leaves(optimizer.opt_state))
    assert all(same)


def test_nnx_paths_end_in_value_at_init(weights):
    """The premise of the test above; if Flax changes it, the workaround can go."""
    params = nnx.state(NNX(nnx.Rngs(0)), nnx.Param)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)]
    assert "item_embedding/embedding/value" in names
    with pytest.raises(ValueError, match=r"item_embedding/embedding: float32\[9, 4\]"):
        sevo(weights, "items").init(params)


def test_a_leaf_called_value_beside_others_keeps_its_name(weights):
    memory = {"memory": {"key": np.ones((NODES, 2), np.float32), "value": np.ones((NODES, DIM), np.float32)}}
    with pytest.raises(ValueError, match=r"as in tables='memory/value'; (?s:.*)memory/value: float32"):
        sevo(weights).init(memory)
    sevo(weights, "memory/value").init(memory)


# ---- errors ----

PARAMS = {
    "item_embedding": {"embedding": np.ones((NODES, DIM), np.float32)},
    "head": {"kernel": np.ones((DIM, 2), np.float32), "bias": np.ones(2, jnp.bfloat16)},
}
LISTING = r"head/bias: bfloat16\[2\]\n  head/kernel: float32\[4, 2\]\n  item_embedding/embedding: float32\[9, 4\]"


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            "items",
            r"path 'items' matches no array, .*; name the embedding table, as in tables='item_embedding/embedding'; "
            r"the tree holds:\n  " + LISTING,
        ),
        ("item", r"path 'item' matches no array"),
        ("embedding", r"path 'embedding' matches no array"),
        ("head", r"path 'head' matches 2 arrays[\s\S]*" + LISTING),
        (None, r"tables=None needs a tree with exactly one array, but this one holds 3[\s\S]*" + LISTING),
        (("item_embedding", "item_embedding/embedding"), r"names the same array twice[\s\S]*" + LISTING),
        ("head/kernel", r"adjacency has 9 nodes, but the chosen tables have 4 rows along axis 0[\s\S]*" + LISTING),
        (("item_embedding", "head/kernel"), r"9 nodes, but the chosen tables have 9 \+ 4 rows[\s\S]*" + LISTING),
    ],
)
def test_wrong_path_lists_the_candidates(weights, tables, message):
    tx = sevo(weights, tables)
    with pytest.raises(ValueError, match=message):
        tx.init(PARAMS)
    state = sevo(weights, "item_embedding").init(PARAMS)
    with pytest.raises(ValueError, match=message):
        tx.update(PARAMS, state)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tx.init, PARAMS)


@pytest.mark.parametrize(
    ("tree", "options", "error", "message"),
    [
        (
            {"a": np.ones((4, 3)), "b": np.ones((5, 2))},
            {"tables": ("a", "b")},
            ValueError,
            r"one width, got \[\(2,\), \(3,\)\]",
        ),
        (
            np.ones((NODES, 2), np.int32),
            {},
            TypeError,
            r"real floating-point array, got int32[\s\S]*\(the tree itself\)",
        ),
        (
            {"a": np.ones((NODES, 2), np.complex64)},
            {"tables": "a"},
            TypeError,
            "'a' must be a real floating-point array",
        ),
        ({"a": 1.0}, {"tables": "a"}, TypeError, "got float"),
        (np.ones((NODES, 2)), {"node_axis": 2}, ValueError, r"node_axis=2 is no axis of .* with shape \[9, 2\]"),
        (np.ones((NODES, 2)), {"node_axis": -3}, ValueError, "node_axis=-3 is no axis"),
        (np.ones((NODES, 2)), {"node_axis": 1}, ValueError, "have 2 rows along axis 1"),
        (np.ones((2, NODES)), {}, ValueError, r"a \(dim, nodes\) table needs node_axis=1"),
        (np.ones((NODES, 2)), {"node_axis": "rows"}, TypeError, "node_axis must be an integer, got 'rows'"),
    ],
)
def test_table_that_does_not_fit(weights, tree, options, error, message):
    with pytest.raises(error, match=message):
        sevo(weights, **options).init(tree)


@pytest.mark.parametrize(
    ("tables", "error", "message"),
    [
        (3, TypeError, "tables must be a path such as 'item_embedding', a tuple of paths, or None, got 3"),
        (("a", 1), TypeError, r"got \('a', 1\)"),
        ({"a": 1}, TypeError, "a tuple of paths"),
        ((), ValueError, "at least one path"),
        ("", ValueError, "none may be empty, got ''"),
        (("a", "/"), ValueError, "None stands for the only array of the tree"),
        (("a", "a/"), ValueError, "name each path once"),
    ],
)
def test_malformed_paths(weights, tables, error, message):
    for make in (lambda: sevo(weights, tables), lambda: adamw_corrected(0.1, tables=tables)):
        with pytest.raises(error, match=message):
            make()


# ---- helpers ----


def test_find_keeps_the_callers_order():
    tree = {"a": {"x": 1, "y": 2}, "b": 3}
    positions, leaves, names, treedef = _tables.find(tree, ("b", "a/x"))
    assert positions == [2, 0]
    assert leaves == [1, 2, 3]
    assert names == ["a/x", "a/y", "b"]
    assert jax.tree.unflatten(treedef, leaves) == tree


def test_resolve_axis():
    assert _tables.resolve_axis(1, [(2, 3)]) == 1
    assert _tables.resolve_axis(np.int64(-1), [(2, 3)]) == -1
    assert _tables.resolve_axis(jnp.array(0), [(2, 3)]) == 0

    def traced(shapes, num_nodes):
        found = []
        jax.jit(lambda axis: found.append(_tables.resolve_axis(axis, shapes, num_nodes)))(0)
        return found[0]

    assert traced([(2, 3)], 3) == 1
    assert traced([(2, 5), (4, 5)], 6) == 0
    for shapes, num_nodes in ([(3, 3)], 3), ([(2, 3), (4, 3)], 6), ([(2, 3)], 4):
        with pytest.raises(TypeError, match=r"static_args=\('node_axis',\)"):
            traced(shapes, num_nodes)


def test_stack_and_split_are_inverse(rng):
    leaves = [jnp.asarray(rng.normal(size=(2, n, 3)), dtype) for n, dtype in ((4, jnp.bfloat16), (5, jnp.float32))]
    matrix = _tables.stack(leaves, 1, jnp.float32)
    assert matrix.shape == (9, 6)
    for back, leaf in zip(_tables.split(matrix, leaves, 1), leaves, strict=True):
        assert back.dtype == leaf.dtype
        np.testing.assert_array_equal(back, leaf)
