import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models.architectures.lessr import LESSR
from models.architectures.registry import make_config, make_model
from models.data import Interactions
from models.feeds import NegativeSampler, Prefixes, pack
from models.layers import BatchNorm
from models.layers.sessions import SessionGraph
from models.objectives.losses import make_loss
from models.objectives.objective import training_loss
from models.training.optimizers import make_stages
from tests.models.architectures.sessions import (
    DISTINCT,
    NUM_ITEMS,
    REPEATING,
    check_gradient,
    check_presets,
    encode,
    every_prefix,
    gradient,
    in_double,
    interactions,
    packed_rows,
    parameters,
    weighed,
)

DIM = 4


def make(num_items=NUM_ITEMS, **options):
    return LESSR(
        num_items, **{"embedding_dim": DIM, "num_blocks": 2, "dropout_rate": 0.0, "rngs": nnx.Rngs(0)} | options
    )


def moved(**options):
    """A model in double precision with running statistics that are not those at the start."""
    model = in_double(make(dtype=jnp.float64, **options))
    rng = np.random.default_rng(5)
    for norm in norms(model).values():
        norm.mean[...] = jnp.asarray(rng.normal(size=norm.mean.shape))
        norm.var[...] = jnp.asarray(rng.uniform(0.5, 2, size=norm.var.shape))
    return model


def norms(model):
    return {f"blocks/{i}/norm": block.norm for i, block in enumerate(model.blocks)} | {
        "readout/norm": model.readout.norm,
        "norm": model.norm,
    }


def statistics(model):
    return {name: (np.asarray(norm.mean[...]), np.asarray(norm.var[...])) for name, norm in norms(model).items()}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def reference(values, sessions, running=None):
    """Queries of sessions, node by node, from the equations. Without ``running`` statistics, those of the batch count.

    Also returns the batch's statistics: mean, unbiased variance.
    """
    seen = {}
    num_blocks = sum(name.endswith("activation/slope") and name.startswith("blocks") for name in values)

    def normalize(name, groups):
        together = np.concatenate(groups)
        if running is None:
            mean, var = together.mean(0), together.var(0)
            seen[name] = (mean, together.var(0, ddof=1))
        else:
            mean, var = running[name]
        scale, bias = values[f"{name}/scale"], values[f"{name}/bias"]
        return [(x - mean) / np.sqrt(var + 1e-5) * scale + bias for x in groups]

    def prelu(name, x):
        return np.where(x > 0, x, values[f"{name}/slope"] * x)

    def edge_order(name, x, session, nodes):
        dim = x.shape[1]
        last = np.zeros_like(x)
        for source, target in itertools.pairwise(session):
            message, state = x[nodes.index(source)], last[nodes.index(target)]
            given = message @ values[f"{name}/gru/in_kernel"] + values[f"{name}/gru/in_bias"]
            own = state @ values[f"{name}/gru/state_kernel"] + values[f"{name}/gru/state_bias"]
            reset, update = sigmoid(given[:dim] + own[:dim]), sigmoid(given[dim : 2 * dim] + own[dim : 2 * dim])
            new = np.tanh(given[2 * dim :] + reset * own[2 * dim :])
            last[nodes.index(target)] = (1 - update) * new + update * state
        y = x @ values[f"{name}/own/kernel"] + last @ values[f"{name}/neighbour/kernel"]
        return prelu(f"{name}/activation", y)

    def shortcut(name, x, session, nodes):
        pairs = {(a, b) for i, a in enumerate(session) for b in session[i:]}
        q = x @ values[f"{name}/query/kernel"] + values[f"{name}/query/bias"]
        k, v = x @ values[f"{name}/key/kernel"], x @ values[f"{name}/value/kernel"]
        mixed = []
        for j, target in enumerate(nodes):
            sources = [i for i, source in enumerate(nodes) if (source, target) in pairs]
            weights = softmax(np.array([sigmoid(q[i] + k[j]) @ values[f"{name}/weight"] for i in sources]))
            mixed.append(weights @ v[sources])
        return prelu(f"{name}/activation", np.array(mixed))

    nodes = [list(dict.fromkeys(session)) for session in sessions]
    features = [values["item_embedding/embedding"][mine] for mine in nodes]
    for i in range(num_blocks):
        layer, name = (shortcut if i % 2 else edge_order), f"blocks/{i}"
        inputs = normalize(f"{name}/norm", features)
        outputs = [layer(name, x, *more) for x, *more in zip(inputs, sessions, nodes, strict=True)]
        features = [np.concatenate(both, axis=1) for both in zip(outputs, features, strict=True)]
    joined = []
    for x, raw, session, mine in zip(normalize("readout/norm", features), features, sessions, nodes, strict=True):
        newest = mine.index(session[-1])
        query = x[newest] @ values["readout/query/kernel"] + values["readout/query/bias"]
        weights = softmax(sigmoid(x @ values["readout/key/kernel"] + query) @ values["readout/weight"])
        pooled = prelu("readout/activation", weights @ x @ values["readout/out/kernel"])
        joined.append(np.concatenate([raw[newest], pooled])[None])
    (queries,) = [np.concatenate(normalize("norm", joined)) @ values["transform/kernel"]]
    return queries, seen


@pytest.mark.usefixtures("x64")
def test_sessions_with_repeats_equal_the_reference():
    model = moved(separate_prefixes=True)
    batch, ends = packed_rows(REPEATING)
    running, values = statistics(model), parameters(model)
    vectors = np.asarray(encode(model, batch))
    np.testing.assert_allclose(vectors[ends], reference(values, REPEATING, running)[0], rtol=1e-9)
    others = np.ones(vectors.shape[:2], bool)
    others[ends] = False
    assert not vectors[others].any()
    for name, (mean, var) in statistics(model).items():
        np.testing.assert_array_equal(mean, running[name][0])
        np.testing.assert_array_equal(var, running[name][1])


@pytest.mark.usefixtures("x64")
def test_all_prefixes_in_one_pass_equal_the_reference():
    model = moved()
    batch, _ = packed_rows(DISTINCT)
    filled = np.asarray(batch.segments) > 0
    running, values, prefixes = statistics(model), parameters(model), every_prefix(DISTINCT)
    direction = np.random.default_rng(1).normal(size=(len(prefixes), DIM))
    (_, vectors), grads = gradient(model, weighed(batch, np.nonzero(filled), direction))
    np.testing.assert_allclose(vectors[filled], reference(values, prefixes, running)[0], rtol=1e-9)
    check_gradient(grads, values, lambda values: np.sum(direction * reference(values, prefixes, running)[0]))


@pytest.mark.usefixtures("x64")
def test_training_with_repeats_equals_the_reference():
    """Batch statistics, and the derivative through them: of nodes, not of tokens or of empty places."""
    model = moved(separate_prefixes=True, num_blocks=3)
    batch, ends = packed_rows(REPEATING, targets=lambda inputs: np.ones_like(inputs))
    running, values = statistics(model), parameters(model)
    direction = np.random.default_rng(1).normal(size=(len(REPEATING), DIM))
    key = jax.random.key(0)
    (_, vectors), grads = gradient(model, weighed(batch, ends, direction, key), state=True)
    expected, seen = reference(values, REPEATING)
    np.testing.assert_allclose(vectors[ends], expected, rtol=1e-9)
    for name, (mean, var) in statistics(model).items():
        np.testing.assert_allclose(mean, 0.9 * running[name][0] + 0.1 * seen[name][0], rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(var, 0.9 * running[name][1] + 0.1 * seen[name][1], rtol=1e-9, err_msg=name)
    check_gradient(grads, values, lambda values: np.sum(direction * reference(values, REPEATING)[0]), rtol=1e-4)


@pytest.mark.usefixtures("x64")
def test_training_in_one_pass_counts_tokens_and_prefixes_with_a_target(monkeypatch):
    model = moved()

    def last_has_none(inputs):
        targets = np.ones_like(inputs)
        targets[packed_rows(DISTINCT)[1]] = 0
        return targets

    batch, _ = packed_rows(DISTINCT, targets=last_has_none)
    running, inputs = statistics(model), []
    normalize = BatchNorm.__call__

    def noting(norm, x, counted, *, training):
        inputs.append((x, counted))
        return normalize(norm, x, counted, training=training)

    @nnx.jit
    def last_inputs(model, batch, key):
        model.encode(batch, None, key)
        return inputs[-1]

    monkeypatch.setattr(BatchNorm, "__call__", noting)
    x, mask = map(np.asarray, last_inputs(model, batch, jax.random.key(0)))
    filled = np.asarray(batch.segments) > 0
    table = np.asarray(model.item_embedding.embedding[...])[np.asarray(batch.inputs)[filled]]
    now = statistics(model)
    expected = 0.9 * running["blocks/0/norm"][0] + 0.1 * table.mean(0)
    np.testing.assert_allclose(now["blocks/0/norm"][0], expected, rtol=1e-9)
    # The last one's statistics are those of the prefixes with a target.
    counted = (np.asarray(batch.targets) > 0) & filled
    np.testing.assert_array_equal(mask, counted)
    np.testing.assert_array_equal(counted.sum(), sum(len(session) - 1 for session in DISTINCT))
    mean, var = x[counted].mean(0), x[counted].var(0, ddof=1)
    np.testing.assert_allclose(now["norm"][0], 0.9 * running["norm"][0] + 0.1 * mean, rtol=1e-9)
    np.testing.assert_allclose(now["norm"][1], 0.9 * running["norm"][1] + 0.1 * var, rtol=1e-9)


def test_chain_and_graph_agree_only_where_nothing_repeats():
    sessions = DISTINCT + REPEATING
    batch, ends = packed_rows(sessions)
    one, other = (np.asarray(encode(make(separate_prefixes=separate), batch))[ends] for separate in (False, True))
    agree = np.isclose(one, other, rtol=1e-3, atol=1e-5).all(axis=1)
    np.testing.assert_array_equal(agree, [len(set(session)) == len(session) for session in sessions])


def test_one_pass_and_separate_prefixes_have_the_same_loss_and_gradient():
    train = interactions()
    prefixes = Prefixes.from_interactions(train, max_length=20, batch_size=100).shuffle(jax.random.key(1)).batch(0)
    packed = pack(train, max_length=20, batch_size=100, count_targets=True, windows=True).batch(0)
    sampler = NegativeSampler.from_interactions(train)
    loss = make_loss(make_config("lessr", loss="ce"))

    def value(model, batch):
        return training_loss(model, loss, batch, {}, sampler, jax.random.key(0), deterministic=True)

    chain, graph = (make(15, separate_prefixes=separate, num_blocks=2) for separate in (False, True))
    (one,), expected = gradient(chain, partial(value, batch=packed))
    (other,), found = gradient(graph, partial(value, batch=prefixes))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    for name in expected | found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("separate", [False, True])
def test_neighbours_in_a_row_do_not_matter(separate):
    model = make(separate_prefixes=separate)
    batch, _ = packed_rows(REPEATING)
    mine = np.asarray(batch.segments) == 2
    changed = batch._replace(inputs=jnp.where(mine, 1 + batch.inputs % NUM_ITEMS, batch.inputs))
    before, after = (np.asarray(encode(model, b)) for b in (batch, changed))
    np.testing.assert_array_equal(before[~mine], after[~mine])
    assert (before[mine] != after[mine]).any()


def test_a_later_item_never_changes_an_earlier_query():
    model = make()
    (first, _), (second, _) = packed_rows([[3, 1, 4, 6, 5]]), packed_rows([[3, 1, 4, 2, 7]])
    one, other = (np.asarray(encode(model, b)) for b in (first, second))
    np.testing.assert_array_equal(one[0, :3], other[0, :3])
    assert not np.allclose(one[0, 3], other[0, 3])


def test_number_of_parameters():
    model = LESSR(25, rngs=nnx.Rngs(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    d = 64
    edges = sum(2 * w + 6 * w * w + 6 * w + 2 * w * d + d for w in (d, 3 * d))
    shortcuts = sum(2 * w + 3 * w * d + d + 2 * d for w in (2 * d, 4 * d))
    w = 5 * d
    readout = 2 * w + 3 * w * d + d + 2 * d
    assert count - 26 * d == edges + shortcuts + readout + 2 * 6 * d + 6 * d * d == 443_200


def test_initialisation_is_the_published_one():
    model = LESSR(2000, rngs=nnx.Rngs(0))
    rows = np.linalg.norm(model.item_embedding.embedding[...], axis=1)
    np.testing.assert_allclose(rows, 1, rtol=1e-5)  # standard normal, and then scaled down
    for name, value in parameters(model).items():
        part = name.split("/")[-1]
        if part == "slope":
            assert (value == 0.25).all()
        elif part in ("kernel", "in_kernel", "state_kernel"):
            bound = value.shape[0] ** -0.5
            assert 0.98 * bound < np.abs(value).max() <= bound * (1 + 1e-6), name
            assert value.std() == pytest.approx(bound / np.sqrt(3), rel=0.05), name
    biases = parameters(model)
    assert 0.9 * 192**-0.5 < np.abs(biases["blocks/2/gru/state_bias"]).max() <= 192**-0.5
    assert 0.9 * 320**-0.5 < np.abs(biases["readout/query/bias"]).max() <= 320**-0.5


def test_rows_are_scaled_down_to_norm_one():
    model = make()
    table = np.random.default_rng(0).normal(size=(NUM_ITEMS + 1, DIM)).astype(np.float32)
    table[3] = 0
    table[4] /= 10
    model.item_embedding.embedding[...] = jnp.asarray(table)
    model.constrain()
    norm = np.linalg.norm(table, axis=1, keepdims=True)
    expected = np.where(norm > 1, table / np.maximum(norm, 1e-9), table)
    np.testing.assert_allclose(model.item_embedding.embedding[...], expected, rtol=1e-6)
    np.testing.assert_array_equal(model.item_embedding.embedding[...][4], table[4])


@pytest.mark.parametrize("loss", ["bpr", "ce"])
def test_every_loss_reaches_every_parameter(loss):
    train = interactions()
    config = make_config("lessr", loss=loss, embedding_dim=DIM, num_blocks=2, separate_prefixes=loss == "ce")
    model = make_model(config, num_users=12, num_items=15, seed=0)
    feed = partial(pack, count_targets=True) if loss == "bpr" else Prefixes.from_interactions
    batch = feed(train, max_length=20, batch_size=100).batch(0)
    sampler = NegativeSampler.from_interactions(train)
    _, grads = gradient(
        model, lambda model: training_loss(model, make_loss(config), batch, {}, sampler, jax.random.key(0))
    )
    for name, grad in grads.items():
        assert np.isfinite(grad).all(), name
        # Nothing repeats, so every recurrent state is the first.
        assert grad.any() == (not name.endswith("state_kernel")), name


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
def test_decay_spares_biases_slopes_and_scales(optimizer):
    model = make()
    params = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    config = make_config("lessr", weight_decay=0.5)
    tx = optax.named_chain(*make_stages(optimizer, config, None, decay_mask=model.decay_mask).items())
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    moved = {"/".join(map(str, path)): bool(jnp.any(leaf[...] != 0)) for path, leaf in nnx.to_flat_state(updates)}
    tensors = {
        "blocks/0/gru/in_kernel",
        "blocks/0/gru/state_kernel",
        "blocks/0/own/kernel",
        "blocks/0/neighbour/kernel",
    }
    tensors |= {f"blocks/1/{name}" for name in ("key/kernel", "query/kernel", "value/kernel", "weight")}
    tensors |= {f"readout/{name}" for name in ("key/kernel", "query/kernel", "out/kernel", "weight")}
    assert {path for path in moved if moved[path]} == tensors | {"transform/kernel", "item_embedding/embedding"}


def test_half_precision():
    batch, ends = packed_rows(DISTINCT)
    for separate in (False, True):
        model, half = (make(separate_prefixes=separate, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
        vectors = encode(half, batch)
        assert vectors.dtype == jnp.bfloat16
        np.testing.assert_allclose(vectors.astype(jnp.float32)[ends], encode(model, batch)[ends], atol=0.03)


def test_seeds_side_by_side():
    models = [make(rngs=nnx.Rngs(seed)) for seed in (0, 1)]
    graphdef, _ = nnx.split(models[0])
    states = jax.tree.map(lambda *x: jnp.stack(x), *(nnx.state(model) for model in models))
    batch, _ = packed_rows(DISTINCT, targets=np.ones_like)

    def train(state):
        model = nnx.merge(graphdef, state)
        return model.encode(batch, None, jax.random.key(0)).vectors, nnx.state(model, nnx.BatchStat)

    both, stats = jax.jit(jax.vmap(train))(states)
    for i, model in enumerate(models):
        np.testing.assert_allclose(both[i], encode(model, batch, jax.random.key(0)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stats["norm"]["mean"][i], model.norm.mean[...], rtol=1e-4, atol=1e-6)


def test_dropout_is_only_for_training():
    batch, _ = packed_rows(REPEATING, targets=np.ones_like)
    plain, model = (make(num_blocks=1, dropout_rate=rate) for rate in (0.0, 0.5))
    np.testing.assert_array_equal(encode(plain, batch), encode(model, batch))
    assert not np.allclose(encode(plain, batch, jax.random.key(0)), encode(model, batch, jax.random.key(0)))


def test_copies_of_a_node_share_dropout():
    """With an item that repeats, the tokens of one node go on as one."""
    batch, _ = packed_rows([[1, 1, 1, 1, 1, 1, 1, 1]], targets=np.ones_like)
    model = make(num_blocks=2, dropout_rate=0.5, separate_prefixes=True)
    graph = SessionGraph.build(batch.inputs, batch.segments)
    x = model.item_embedding(batch.inputs)
    for block in model.blocks:
        layer = nnx.jit(lambda block, x: block(x, batch.segments, graph, graph.nodes, jax.random.key(0)))
        x = jnp.concatenate([layer(block, x), x], axis=-1)
        np.testing.assert_allclose(x[0, :8], np.broadcast_to(x[0, 0], x[0, :8].shape), rtol=1e-5, atol=1e-6)


def test_training_data_with_repeats_need_separate_prefixes():
    train = Interactions.from_sequences([[1, 2, 3], [4, 5, 6, 4]])
    assert LESSR.make_context(train, make_config("lessr", separate_prefixes=True)) == {}
    with pytest.raises(ValueError, match="separate_prefixes must be on for these data: user 2 has item 4 twice"):
        LESSR.make_context(train, make_config("lessr"))


def test_a_batch_without_tokens_changes_no_statistics():
    norm = BatchNorm(3, rngs=nnx.Rngs(0))
    norm.mean[...] = jnp.array([1.0, 2.0, 3.0])
    y = norm(jnp.ones((4, 3)), jnp.zeros(4, bool), training=True)
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(norm.mean[...], [1, 2, 3])
    np.testing.assert_array_equal(norm.var[...], [1, 1, 1])


def test_presets_are_the_plain_settings():
    check_presets("LESSR", {"num_layers": "num_blocks", "dropout_hidden": "dropout_rate"})
