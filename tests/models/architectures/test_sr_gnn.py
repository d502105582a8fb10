import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.architectures.registry import make_config, make_model
from models.architectures.sr_gnn import SRGNN
from models.data import Interactions
from models.feeds import NegativeSampler, Prefixes, pack
from models.layers.sessions import SessionGraph
from models.objectives.losses import make_loss
from models.objectives.objective import training_loss
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

VARIANTS = ["predecessors", "successors"]


def make(num_items=NUM_ITEMS, **options):
    return SRGNN(num_items, **{"embedding_dim": 6, "rngs": nnx.Rngs(0)} | options)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference(values, session, incoming):
    """The query of one session, node by node, from the equations."""

    def linear(name, x):
        return x @ values[f"{name}/kernel"] + values[f"{name}/bias"]

    nodes = sorted(set(session))
    pairs = set(itertools.pairwise(session))
    before = {v: [u for u in nodes if (u, v) in pairs] for v in nodes}
    behind = {v: [w for w in nodes if (v, w) in pairs] for v in nodes}
    table = values["item_embedding/embedding"]
    dim = table.shape[1]
    state = {}
    for v in nodes:
        incoming_half, outgoing_half = np.zeros(dim), np.zeros(dim)
        if incoming == "predecessors":
            for u in before[v]:
                incoming_half += linear("edge_in", table[u]) / len(before[v])
        else:
            for w in behind[v]:
                incoming_half += linear("edge_in", table[w]) / len(before[w])
        for w in behind[v]:
            outgoing_half += linear("edge_out", table[w]) / len(behind[v])
        gathered = linear("message_gates", np.concatenate([incoming_half, outgoing_half]) + values["message_bias"])
        own = linear("state_gates", table[v])
        reset, update = (sigmoid(gathered[part] + own[part]) for part in (slice(0, dim), slice(dim, 2 * dim)))
        new = np.tanh(gathered[2 * dim :] + reset * own[2 * dim :])
        state[v] = (1 - update) * new + update * table[v]
    newest = state[session[-1]]
    total = np.zeros(dim)
    for item in session:
        hidden = sigmoid(linear("attention_query", newest) + linear("attention_key", state[item]))
        total += (hidden @ values["attention_weight"]) * state[item]
    return linear("transform", np.concatenate([total, newest]))


@pytest.mark.parametrize("incoming", VARIANTS)
@pytest.mark.usefixtures("x64")
def test_sessions_with_repeats_equal_the_reference(incoming):
    model = in_double(make(incoming=incoming, separate_prefixes=True, dtype=jnp.float64))
    batch, ends = packed_rows(REPEATING)
    direction = np.random.default_rng(1).normal(size=(len(REPEATING), 6))

    def total(values):
        return sum(d @ reference(values, session, incoming) for d, session in zip(direction, REPEATING, strict=True))

    values = parameters(model)
    (_, vectors), grads = gradient(model, weighed(batch, ends, direction))
    expected = [reference(values, session, incoming) for session in REPEATING]
    np.testing.assert_allclose(vectors[ends], expected, rtol=1e-10)
    # Nowhere else is there a query.
    others = np.ones(vectors.shape[:2], bool)
    others[ends] = False
    assert not np.asarray(vectors)[others].any()
    check_gradient(grads, values, total)


@pytest.mark.parametrize("incoming", VARIANTS)
@pytest.mark.usefixtures("x64")
def test_all_prefixes_in_one_pass_equal_the_reference(incoming, monkeypatch):
    monkeypatch.setattr("models.layers.additive.QUERIES_AT_ONCE", 5)  # three blocks of queries a row
    model = in_double(make(incoming=incoming, dtype=jnp.float64))
    batch, _ = packed_rows(DISTINCT)
    filled = np.asarray(batch.segments) > 0
    prefixes = every_prefix(DISTINCT)
    direction = np.random.default_rng(1).normal(size=(len(prefixes), 6))
    values = parameters(model)
    (_, vectors), grads = gradient(model, weighed(batch, np.nonzero(filled), direction))
    np.testing.assert_allclose(vectors[filled], [reference(values, p, incoming) for p in prefixes], rtol=1e-10)

    def total(values):
        return sum(d @ reference(values, p, incoming) for d, p in zip(direction, prefixes, strict=True))

    check_gradient(grads, values, total)


def test_the_variants_differ_in_the_newest_node():
    """Hand-made: with successors only, a history of two items has a newest node without messages."""
    batch, ends = packed_rows([[1, 2], [3, 2]])
    state = {}
    for incoming in VARIANTS:
        model = make(incoming=incoming)
        seen = []
        step = model._step
        object.__setattr__(model, "_step", lambda *a, step=step, seen=seen: seen.append(step(*a)) or seen[-1])
        model.encode(batch)
        state[incoming] = np.asarray(seen[1])[ends]
    assert np.array_equal(state["successors"][0], state["successors"][1])
    assert not np.allclose(state["predecessors"][0], state["predecessors"][1])


def both_forms(**options):
    chain, graph = (make(15, separate_prefixes=separate, **options) for separate in (False, True))
    return chain, graph


@pytest.mark.parametrize("incoming", VARIANTS)
def test_one_pass_and_separate_prefixes_have_the_same_loss_and_gradient(incoming):
    train = interactions()
    chain, graph = both_forms(incoming=incoming)
    prefixes = Prefixes.from_interactions(train, max_length=20, batch_size=100).shuffle(jax.random.key(1)).batch(0)
    packed = pack(train, max_length=20, batch_size=100, count_targets=True, windows=True).batch(0)
    sampler = NegativeSampler.from_interactions(train)
    loss = make_loss(make_config("sr-gnn", loss="ce"))

    def value(model, batch):
        return training_loss(model, loss, batch, {}, sampler, jax.random.key(0), deterministic=True)

    (one,), expected = gradient(chain, partial(value, batch=packed))
    (other,), found = gradient(graph, partial(value, batch=prefixes))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-6, err_msg=name)


def test_chain_and_graph_agree_only_where_nothing_repeats():
    sessions = DISTINCT + REPEATING
    batch, ends = packed_rows(sessions)
    one, other = (np.asarray(encode(model, batch))[ends] for model in both_forms())
    agree = np.isclose(one, other, rtol=1e-4, atol=1e-5).all(axis=1)
    np.testing.assert_array_equal(agree, [len(set(session)) == len(session) for session in sessions])


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
    model = SRGNN(25, rngs=nnx.Rngs(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    d = 64
    edges, gates, readout = 2 * (d * d + d) + 2 * d, 2 * d * 3 * d + d * 3 * d + 2 * 3 * d, 2 * (d * d + d) + d
    assert count == 26 * d + edges + gates + readout + 2 * d * d + d
    # The published code has one layer more, 64 x 64 with biases, which it does not use.
    assert count - 26 * d == 66_496 - 4_160


def test_initialisation_is_the_published_one():
    for name, value in parameters(SRGNN(2000, rngs=nnx.Rngs(0))).items():
        bound = 1 / 8
        assert np.abs(value).max() <= bound, name
        if value.size > 1000:
            assert value.std() == pytest.approx(bound / np.sqrt(3), rel=0.05), name


@pytest.mark.parametrize("loss", ["bpr", "ce"])
def test_every_loss_reaches_every_parameter(loss):
    train = interactions()
    config = make_config("sr-gnn", loss=loss, embedding_dim=6)
    model = make_model(config, num_users=12, num_items=15, seed=0)
    batch = pack(train, max_length=20, batch_size=100, count_targets=True).batch(0)
    sampler = NegativeSampler.from_interactions(train)
    _, grads = gradient(
        model, lambda model: training_loss(model, make_loss(config), batch, {}, sampler, jax.random.key(0))
    )
    for name, grad in grads.items():
        assert np.isfinite(grad).all(), name
        assert grad.any(), name


def test_half_precision():
    batch, ends = packed_rows(DISTINCT)
    for separate in (False, True):
        model, half = make(separate_prefixes=separate), make(separate_prefixes=separate, dtype=jnp.bfloat16)
        vectors = encode(half, batch)
        assert vectors.dtype == jnp.bfloat16
        np.testing.assert_allclose(vectors.astype(jnp.float32)[ends], encode(model, batch)[ends], atol=0.02)


def test_seeds_side_by_side():
    models = [make(rngs=nnx.Rngs(seed)) for seed in (0, 1)]
    graphdef, _ = nnx.split(models[0])
    states = jax.tree.map(lambda *x: jnp.stack(x), *(nnx.state(model) for model in models))
    batch, _ = packed_rows(DISTINCT)
    both = jax.jit(jax.vmap(lambda state: nnx.merge(graphdef, state).encode(batch).vectors))(states)
    for vectors, model in zip(both, models, strict=True):
        np.testing.assert_allclose(vectors, encode(model, batch), rtol=1e-5, atol=1e-6)


def test_dropout_is_optional_and_only_in_training():
    batch, _ = packed_rows(REPEATING)
    plain, model = make(), make(dropout_rate=0.5)
    vectors, key = np.asarray(encode(plain, batch)), jax.random.key(0)
    np.testing.assert_array_equal(vectors, encode(model, batch))
    np.testing.assert_array_equal(vectors, encode(plain, batch, key))
    assert not np.allclose(vectors, encode(model, batch, key))


def test_copies_of_a_node_share_dropout():
    """A session of one item again and again is a node with itself for a neighbour, however it is dropped."""
    batch, (rows, places) = packed_rows([[1], [1, 1, 1]])
    model = make(dropout_rate=0.5, separate_prefixes=True)
    graph = SessionGraph.build(batch.inputs, batch.segments)
    x = jnp.zeros((*batch.inputs.shape, 6)).at[rows[1], places[1]].set(9.0)  # a copy that is not the node
    changed = model._encode_sessions(x, graph)
    np.testing.assert_array_equal(changed, model._encode_sessions(jnp.zeros_like(x), graph))


def test_training_data_with_repeats_need_separate_prefixes():
    train = Interactions.from_sequences([[1, 2, 3], [4, 5, 6, 4]])
    options = partial(make_config, "sr-gnn")
    assert SRGNN.make_context(train, options(separate_prefixes=True)) == {}
    assert SRGNN.make_context(train, options(max_length=3)) == {}
    with pytest.raises(ValueError, match="separate_prefixes must be on for these data: user 2 has item 4 twice"):
        SRGNN.make_context(train, options(max_length=4))


def test_presets_are_the_plain_settings():
    check_presets("SR-GNN", {})
