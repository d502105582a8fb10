"""MAERec against a float64 NumPy model that was written from its description."""

import csv
import dataclasses
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import yaml
from flax import nnx

from models import presets
from models.architectures import maerec
from models.architectures.maerec import MAERec, MAERecConfig, item_graph
from models.architectures.registry import make_config, make_model
from models.config import LossConfig
from models.data import Interactions, drifting_interests
from models.feeds import NegativeSampler, pack
from models.objectives.losses import make_loss
from models.objectives.objective import encode_queries, training_loss
from models.serving.export import export_scores
from models.serving.trained import TrainedModel
from models.training import loop
from models.training.checkpoints import Checkpoints, load_run
from models.training.training_data import make_training_data
from tests.models.architectures import checks
from tests.models.saved_runs import small_data

PUBLISHED = Path(__file__).resolve().parents[3].parent / "shared" / "reference" / "hyperparameters.csv"
NUM_ITEMS, MAX_LENGTH, DIM = 25, 9, 8
SMALL = {
    "max_length": MAX_LENGTH,
    "embedding_dim": DIM,
    "num_heads": 2,
    "num_mask_seeds": 3,
    "num_reconstructed": 20,
    "num_edge_negatives": 6,
}
KEY = jax.random.key(11)
BCE = make_loss(LossConfig())


@pytest.fixture(scope="module")
def interactions():
    return drifting_interests(num_users=30, num_items=NUM_ITEMS, num_groups=4, mean_length=7, seed=1)


@pytest.fixture(scope="module")
def context(interactions):
    return MAERec.make_context(interactions, MAERecConfig(item_graph_hops=1))


@pytest.fixture(scope="module")
def dense(context):
    return np.asarray(context["item_graph"].todense(), np.float64)


@pytest.fixture(scope="module")
def unseen(interactions):
    return NegativeSampler.from_interactions(interactions)


@pytest.fixture(scope="module")
def batch(interactions):
    return pack(interactions, max_length=MAX_LENGTH, batch_size=100).shuffle(jax.random.key(5)).batch(0)


def make(params_dtype=None, **options):
    """A small model, every parameter moved: biases and scales start at 0 and 1, where mistakes would not show."""
    model = MAERec(NUM_ITEMS, **SMALL | {"dtype": params_dtype or jnp.float32} | options, rngs=nnx.Rngs(0))
    for i, leaf in enumerate(jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=lambda x: isinstance(x, nnx.Param))):
        moved = leaf[...] + 0.3 * jax.random.normal(jax.random.key(i), leaf.shape)
        leaf.set_value(moved.astype(params_dtype or moved.dtype))
    return model


def functional(model):
    """The parameters, the rest of the state, and ``apply(function, params, rest, *args) -> value, rest``."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def apply(function, params, rest, *args):
        model = nnx.merge(graphdef, params, rest, copy=True)  # or the variables belong to another trace
        value = function(model, *args)
        return value, nnx.split(model, nnx.Param, ...)[2]

    return params, rest, apply


def make_step(model, batch, context, unseen):
    """The parameters, the rest, and ``step(params, rest, key) -> (loss, rest), gradient``."""
    params, rest, apply = functional(model)

    def step(params, rest, key):
        def value(params):
            return apply(lambda model: training_loss(model, BCE, batch, context, unseen, key), params, rest)

        return jax.value_and_grad(value, has_aux=True)(params)

    return params, rest, step


WEIGHTS = {"reconstruction_weight": 0.3, "l2_weight": 0.01, "mask_steps": 3, "num_blocks": 1}


@pytest.fixture(scope="module")
def trainer(context, batch, unseen):
    """One program that several tests use: to compile it takes most of their time."""
    params, rest, step = make_step(make(**WEIGHTS), batch, context, unseen)
    return params, rest, step, jax.jit(step)


def at(nodes, num_nodes=NUM_ITEMS + 1):
    """Where there are some nodes, as bool."""
    return jnp.asarray(np.isin(np.arange(num_nodes), list(nodes)))


def wide(params):
    """Parameters as nested dicts of float64 NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(params))


# The reference ------------------------------------------------------------------------------------------------------


def propagated(dense, table, num_layers, seeds=()):
    """All layers, over a dense graph that has really lost the edges of its seeds."""
    left = dense.copy()
    left[list(seeds)] = 0
    left[:, list(seeds)] = 0
    scale = (left.sum(1) + 1e-12) ** -0.5
    left = scale[:, None] * left * scale
    layers = [table]
    for _ in range(num_layers):
        layers.append(left @ layers[-1])
    return layers


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def gelu(x):
    return x * 0.5 * (1 + scipy.special.erf(x / np.sqrt(2)))


def recommended(p, items, sequence, num_heads=2, residual=False):
    """The recommender on one left-padded row of ``MAX_LENGTH``; outputs of the places that hold items."""
    row = np.zeros(MAX_LENGTH, int)
    row[MAX_LENGTH - len(sequence) :] = sequence
    x = norm(p["norm"], items[row] + p["position_embedding"]["embedding"])
    total = x.copy()
    barrier = np.where(np.tri(MAX_LENGTH, dtype=bool) & (row > 0)[None], 0, -10000.0)
    for _, block in sorted(p["blocks"].items()):
        attention = block["attention"]
        q, k, v = (linear(attention[name], x).reshape(MAX_LENGTH, num_heads, -1) for name in ("query", "key", "value"))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1]) + barrier
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", weights, v).reshape(MAX_LENGTH, -1)
        h = norm(block["attention_norm"], linear(attention["out"], mixed) + x)
        out = linear(block["feed_forward_out"], gelu(linear(block["feed_forward_in"], h)))
        x = norm(block["feed_forward_norm"], out + h if residual else out)
        total += x
    return total[MAX_LENGTH - len(sequence) :]


def main_loss(p, dense, sequences, negatives, seeds=(), num_layers=2):
    """The mean over all targets of -log σ(positive) - log(1 - σ(negative))."""
    items = sum(propagated(dense, p["item_embedding"]["embedding"], num_layers, seeds))
    terms = []
    for sequence, negative in zip(sequences, negatives, strict=True):
        outputs = recommended(p, items, sequence[:-1])
        positive = (outputs * items[sequence[1:]]).sum(1)
        other = (outputs * items[negative]).sum(1)
        terms += list(np.log1p(np.exp(-positive)) + np.log1p(np.exp(other)))
    return np.mean(terms)


def restored(p, layers, sample, logarithm=False):
    """The reconstruction's loss, edge by edge and pair by pair."""

    def score(u, v):
        features = np.concatenate([a[u] * b[v] for a in layers[:-1] for b in layers[:-1]])
        hidden = np.maximum(linear(p["decoder"]["first"], features), 0)
        hidden = np.maximum(linear(p["decoder"]["second"], hidden), 0)
        return np.exp(1 / (1 + np.exp(-linear(p["decoder"]["last"], hidden)[0])))

    loss = 0.0
    for u, v, targets, sources, counted in zip(*map(np.asarray, sample), strict=True):
        if counted:
            positive = score(u, v)
            others = sum(score(u, w) for w in targets) + sum(score(w, v) for w in sources)
            share = positive / (positive + others + 1e-8)
            loss -= np.log(share) if logarithm else share + 1e-8
    return loss


def similarity(dense, table, thinned):
    """How much items are like their surroundings; ``thinned``: the random parts of the graph, each inside the last."""
    degree = dense.sum(1, keepdims=True)
    s, c = dense @ table - table, degree
    sums, counts = s.copy(), c.copy()
    for part in thinned:
        s, c = part @ s - s - degree * s, part @ c - c - degree
        degree = part.sum(1, keepdims=True)
        sums, counts = sums + s, counts + c
    mean = sums / (counts + 1e-8)

    def unit(x):
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    return (unit(mean) * unit(table)).sum(1)


def slope(function, p, direction, step=1e-6):
    """The derivative of a function of nested parameters along a direction, by central differences."""

    def at(t):
        return function(jax.tree.map(lambda x, d: x + t * d, p, direction))

    return (at(step) - at(-step)) / (2 * step)


def directions(p):
    """One random direction for each array of parameters, alone; and that array's path."""
    flat, tree = jax.tree.flatten_with_path(p)
    for i, (path, leaf) in enumerate(flat):
        zeros = [np.zeros_like(other) for _, other in flat]
        zeros[i] = np.random.default_rng(i).normal(size=leaf.shape)
        yield jax.tree_util.keystr(path), jax.tree.unflatten(tree, zeros)


# The item graph -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hops", [1, 3])
def test_neighbours_are_near_in_a_sequence(interactions, hops):
    expected = np.eye(NUM_ITEMS + 1)
    for sequence in interactions:
        for i, item in enumerate(sequence):
            for other in sequence[i + 1 : i + 1 + hops]:
                expected[item, other] = expected[other, item] = 1
    context = MAERec.make_context(interactions, MAERecConfig(item_graph_hops=hops))
    np.testing.assert_array_equal(context["item_graph"].todense(), expected)
    edges = np.asarray(context["item_graph"].indices)
    np.testing.assert_array_equal(edges[np.asarray(context["mirror"])], edges[:, ::-1])


def test_an_item_that_repeats_is_one_neighbour():
    train = Interactions.from_sequences([[1, 1, 2, 1]])
    np.testing.assert_array_equal(item_graph(train, 2).todense(), [[1, 0, 0], [0, 1, 1], [0, 1, 1]])


@pytest.mark.parametrize("seeds", [(), (0, 3, 7, 8)])
def test_propagation_does_without_the_edges_of_seeds(context, dense, seeds, x64):
    table = np.random.default_rng(0).normal(size=(NUM_ITEMS + 1, 3))
    chosen = at(seeds) if seeds else None
    layers = maerec.propagate_layers(context["item_graph"], jnp.asarray(table), 3, chosen)
    assert len(layers) == 4
    for ours, theirs in zip(layers, propagated(dense, table, 3, seeds), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)
    if seeds:
        assert not np.asarray(layers[1])[list(seeds)].any()
    everything = maerec.propagate_layers(context["item_graph"], jnp.asarray(table), 1, jnp.ones(NUM_ITEMS + 1, bool))
    assert not np.asarray(everything[1]).any()


# The forward pass and its gradient ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(interactions):
    """All histories, newest items included."""
    packed = pack(interactions, max_length=MAX_LENGTH, batch_size=100, with_targets=False)
    return packed.shuffle(jax.random.key(5)).batch(0)


@pytest.fixture(scope="module")
def encoder(context):
    """A model, and its compiled ``encode(batch) -> vectors``."""
    model = make()
    represented = model.represent(context)
    return model, represented, jax.jit(lambda batch: model.encode(batch, represented).vectors)


@pytest.mark.parametrize("residual", [False, True])
def test_packed_rows_equal_the_padded_model(interactions, context, dense, whole, encoder, residual):
    model, represented, encode = encoder
    if residual:
        model = make(num_blocks=1, residual_feed_forward=True)
        represented = model.represent(context)
        encode = jax.jit(lambda batch: model.encode(batch, represented).vectors)
    vectors = np.asarray(encode(whole))
    p = wide(nnx.state(model, nnx.Param))
    items = sum(propagated(dense, p["item_embedding"]["embedding"], 2))
    table, bias = model.items(represented)
    np.testing.assert_allclose(table, items, rtol=1e-5, atol=1e-6)
    assert not np.asarray(bias).any()
    for user, sequence in enumerate(interactions):
        here = (np.asarray(whole.users) == user) & (np.asarray(whole.segments) > 0)
        expected = recommended(p, items, sequence[-MAX_LENGTH:], residual=residual)
        np.testing.assert_allclose(vectors[here], expected, rtol=2e-4, atol=2e-4)


def test_the_main_loss_and_its_gradient_are_the_references(interactions, context, dense, x64):
    """In double precision, with masked edges, for every array of parameters."""
    model = make(jnp.float64, dropout_rate=0.0, attention_dropout_rate=0.0)
    sequences = [sequence[-6:] for sequence in list(interactions)[:6] if len(sequence) > 1]
    few = Interactions.from_sequences(sequences, NUM_ITEMS)
    batch = pack(few, max_length=MAX_LENGTH, batch_size=100).batch(0)
    unseen = NegativeSampler.from_interactions(few)
    seeds = (2, 5, 11)
    params, rest, apply = functional(model)

    def main(model):
        table = model.item_embedding.embedding[...]
        layers = maerec.propagate_layers(context["item_graph"], table, 2, at(seeds))
        represented = maerec.Represented(sum(layers), layers)
        queries = encode_queries(model, batch, represented, KEY, sampler=unseen, negative_key=KEY)
        return BCE.function(queries, model.items(represented), unseen, KEY)

    value, gradient = jax.jit(jax.value_and_grad(lambda params: apply(main, params, rest)[0]))(params)
    drawn = np.asarray(unseen.sample(KEY, batch.users.ravel())).reshape(batch.users.shape)
    negatives = [drawn[(np.asarray(batch.users) == u) & (np.asarray(batch.segments) > 0)] for u in range(few.num_users)]
    reference = partial(main_loss, dense=dense, sequences=sequences, negatives=negatives, seeds=seeds)
    p = wide(params)
    assert value == pytest.approx(reference(p), rel=1e-12)
    gradient = wide(gradient)
    for path, direction in directions(p):
        ours = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)))
        expected = 0.0 if "decoder" in path else slope(reference, p, direction)
        assert ours == pytest.approx(expected, rel=1e-5, abs=1e-8), path


def test_later_items_and_neighbours_in_a_row_do_not_matter(whole, encoder):
    _, _, encode = encoder
    mine = np.asarray(whole.segments) == np.asarray(whole.segments).max()  # the longest
    middle = mine & (np.asarray(whole.positions) == MAX_LENGTH - 3)
    assert mine.sum() > 4
    changed = whole._replace(inputs=jnp.where(middle, 1 + whole.inputs % NUM_ITEMS, whole.inputs))
    before, after = np.asarray(encode(whole)), np.asarray(encode(changed))
    later = mine & (np.asarray(whole.positions) >= MAX_LENGTH - 3)
    np.testing.assert_array_equal(before[~later], after[~later])
    assert (before[later] != after[later]).any(axis=1).all()


# Masking ------------------------------------------------------------------------------------------------------------


def test_similarity_and_its_gradient_are_the_references(context, dense, x64):
    edges, mirror = context["item_graph"], context["mirror"]
    table = np.random.default_rng(3).normal(size=(NUM_ITEMS + 1, 4))
    weights = np.random.default_rng(4).normal(size=NUM_ITEMS + 1)
    kept, thinned = np.ones(len(mirror), bool), []
    for k, key in enumerate(jax.random.split(KEY, 2), start=1):
        kept = kept & (np.asarray(jax.random.uniform(key, kept.shape)) < 0.8**k)
        part = np.zeros_like(dense)
        part[tuple(np.asarray(edges.indices)[kept].T)] = 1
        thinned.append(part)
    assert (thinned[0] != thinned[0].T).any()

    def ours(table):
        return maerec.similarity_to_surroundings(edges, mirror, table, KEY, depth=2, path_probability=0.8)

    np.testing.assert_allclose(jax.jit(ours)(jnp.asarray(table)), similarity(dense, table, thinned), atol=1e-10)
    gradient = np.asarray(jax.jit(jax.grad(lambda table: ours(table) @ weights))(jnp.asarray(table)))
    for seed in range(5):
        direction = np.random.default_rng(seed).normal(size=table.shape)
        expected = slope(lambda table: similarity(dense, table, thinned) @ weights, table, direction)
        assert (gradient * direction).sum() == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_a_lonely_item_has_a_gradient(context):
    """Padding has no surroundings but itself: a norm of zero, whose derivative must not be NaN."""
    table = jax.random.normal(KEY, (NUM_ITEMS + 1, 4))

    def total(table):
        found = maerec.similarity_to_surroundings(
            context["item_graph"], context["mirror"], table, KEY, depth=3, path_probability=0.5
        )
        return jnp.sum(found), found

    gradient, found = jax.jit(jax.grad(total, has_aux=True))(table)
    assert found[0] == 0
    assert np.abs(np.asarray(found)).max() <= 1 + 1e-5
    assert np.isfinite(np.asarray(gradient)).all()


@pytest.mark.parametrize("next_seeds", ["ends", "sums"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_paths_without_chance(context, next_seeds, depth):
    """If every path goes on, the seeds of all rounds are known."""
    edges = [tuple(edge) for edge in np.asarray(context["item_graph"].indices).tolist()]
    first = {4}
    seeds, everyone, left = set(first), set(first), set(edges)
    for _ in range(depth - 1):
        touched = {(u, v) for u, v in left if u in seeds or v in seeds}
        left -= touched
        numbers = {u + v for u, v in touched} if next_seeds == "sums" else {w for edge in touched for w in edge}
        seeds = {number for number in numbers if number <= NUM_ITEMS}
        everyone |= seeds
    found = maerec.spread_seeds(
        context["item_graph"].indices,
        at(first),
        KEY,
        depth=depth,
        path_probability=1.0,
        next_seeds=next_seeds,
    )
    assert set(np.flatnonzero(found)) == everyone


@pytest.mark.parametrize("depth", [2, 3])
def test_chance_takes_a_share_of_the_paths(depth):
    """A star with 8 ends and its centre: of 9 numbers, 4 are the next seeds, each as often as any other.

    The third round adds none: the edges that lead to other ends are masked already.
    """
    star = item_graph(Interactions.from_sequences([[1, item] for item in range(2, 10)]), 1)
    spread = partial(maerec.spread_seeds, star.indices, depth=depth, path_probability=0.5, next_seeds="ends")
    centre = jnp.arange(10) == 1
    draws = np.asarray(jax.jit(jax.vmap(lambda key: spread(centre, key)))(jax.random.split(KEY, 2000)))
    assert draws[:, 1].all()
    assert not draws[:, 0].any()
    # The centre is a seed already: it may be drawn again, and then one less is new.
    assert Counter(draws.sum(1).tolist()).keys() == {4, 5}
    np.testing.assert_allclose(draws[:, 2:].mean(0), 4 / 9, atol=0.05)


def test_masks_stay_for_some_steps_and_are_never_compiled_anew(trainer):
    """Step by step: seeds change every three steps, and one program does it all."""
    params, rest, _, step = trainer
    seeds, losses, compiled = [], [], None
    for number in range(10):
        (_, rest), _ = step(params, rest, jax.random.key(number))
        state = nnx.to_pure_dict(rest)
        seeds.append(np.asarray(state["seeds"]))
        losses.append(int(state["num_losses"]))
        assert int(state["step"]) == number + 1
        compiled = compiled or step._cache_size()
    assert step._cache_size() == compiled
    changed = [number for number in range(1, 10) if (seeds[number] != seeds[number - 1]).any()]
    assert changed == [3, 6, 9]
    assert all(draw.sum() >= 3 for draw in seeds)
    assert losses == [1, 2, 3, 1, 2, 3, 1, 2, 3, 1]


def test_evaluation_uses_the_whole_graph_and_changes_nothing(context, dense):
    model = make()
    model.seeds.set_value(at([1, 2, 3]))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, maerec.Masking)))
    represented = model.represent(context)
    assert represented.seeds is None
    table = np.asarray(model.item_embedding.embedding[...], np.float64)
    np.testing.assert_allclose(represented.items, sum(propagated(dense, table, 2)), rtol=1e-5, atol=1e-6)
    after = nnx.to_pure_dict(nnx.state(model, maerec.Masking))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_seeds_are_drawn_by_similarity_with_gumbel_noise(context):
    """The first seed is item i with probability softmax(similarity)_i: the Gumbel-max property."""
    model = make(num_mask_seeds=1, mask_depth=1, path_probability=1.0)
    table = 4 * model.item_embedding.embedding[...]

    def draw(key):
        return model._draw_seeds(context["item_graph"], context["mirror"], table, key)

    seeds, similarity = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 4000))
    found = maerec.similarity_to_surroundings(
        context["item_graph"], context["mirror"], table, KEY, depth=1, path_probability=1.0
    )
    np.testing.assert_allclose(similarity, jnp.mean(found), rtol=1e-5)
    assert (np.asarray(seeds).sum(1) == 1).all()
    np.testing.assert_allclose(np.asarray(seeds).mean(0), jax.nn.softmax(found), atol=0.012)


def test_the_reward_depends_on_how_the_main_loss_falls():
    """Against a list of losses, as published."""
    losses = np.random.default_rng(0).normal(size=60).astype(np.float32)
    history, expected = [], []
    for number, loss in enumerate(losses.tolist()):
        history.append(loss)
        falls = -np.diff(history)
        expected.append(1.0 if len(history) < 3 or falls[-1] > falls[:-1].mean() else 0.25)
        if number % 4 == 0:
            history = history[-1:]
    model = make(low_reward=0.25)
    graphdef, state = nnx.split(model)

    def step(state, inputs):
        model = nnx.merge(graphdef, state, copy=True)
        reward = model._reward(*inputs)
        return nnx.split(model)[1], reward

    _, rewards = jax.lax.scan(step, state, (jnp.asarray(losses), jnp.arange(60) % 4 == 0))
    assert rewards.tolist() == expected
    assert {0.25, 1.0} == set(expected)


# Reconstruction -----------------------------------------------------------------------------------------------------


def draw_edges(model, context, seeds, key=KEY):
    edges = context["item_graph"].indices
    represented = maerec.Represented(None, (), edges, at(seeds, len(model.seeds[...])))
    return jax.tree.map(np.asarray, jax.jit(lambda: model._draw_edges(represented, key))())


@pytest.mark.parametrize("reject", [False, True])
def test_what_is_restored(context, dense, reject):
    """Masked edges, each once; random partners, which are no edges if so wished."""
    model = make(num_reconstructed=10_000, num_edge_negatives=60, reject_edges=reject)
    seeds = (2, 5, 11)
    sample = draw_edges(model, context, seeds)
    masked = {(u, v) for u, v in np.argwhere(dense).tolist() if u in seeds or v in seeds}
    drawn = list(zip(sample.sources[sample.counted].tolist(), sample.targets[sample.counted].tolist(), strict=True))
    assert 0 < len(masked) < dense.sum()
    assert len(drawn) == len(masked)
    assert set(drawn) == masked
    others = np.concatenate([sample.other_targets, sample.other_sources])
    assert sample.other_targets.shape == (len(sample.sources), 30)
    assert (others.min(), others.max()) == (1, NUM_ITEMS)
    nodes = sample.sources[:, None], sample.targets[:, None]
    hits = [dense[node, other] for node, other in zip(nodes, (sample.other_targets, sample.other_sources), strict=True)]
    assert any(hit[(node > 0)[:, 0]].any() for node, hit in zip(nodes, hits, strict=True)) != reject
    if reject:
        strangers = np.flatnonzero(dense[5] == 0)[1:]
        found = Counter(sample.other_targets[sample.sources == 5].ravel().tolist())
        assert set(found) == set(strangers.tolist())
        assert max(found.values()) < 2 * sum(found.values()) / len(found)


def test_a_node_with_nothing_but_edges_is_compared_with_anything():
    star = Interactions.from_sequences([[1, item] for item in range(2, 6)])
    model = MAERec(5, **SMALL, reject_edges=True, rngs=nnx.Rngs(0))
    sample = draw_edges(model, MAERec.make_context(star, MAERecConfig()), (1,))
    assert (sample.other_targets[sample.sources == 1] >= 1).all()
    assert set(sample.other_sources.ravel().tolist()) <= set(range(1, 6))


def test_a_step_restores_some_masked_edges(context):
    model = make(num_reconstructed=7)
    first = draw_edges(model, context, (2, 5, 11))
    second = draw_edges(model, context, (2, 5, 11), jax.random.key(1))
    assert first.sources.shape == (7,)
    assert first.counted.all()
    assert len(set(zip(first.sources.tolist(), first.targets.tolist(), strict=True))) == 7
    assert (first.sources != second.sources).any()


@pytest.mark.parametrize("logarithm", [False, True])
def test_the_reconstruction_and_its_gradient_are_the_references(context, dense, logarithm, x64):
    model = make(jnp.float64, log_reconstruction=logarithm, num_reconstructed=6)
    seeds = (2, 5, 11)
    sample = draw_edges(model, context, seeds)
    params, rest, apply = functional(model)

    def reconstruct(model):
        layers = maerec.propagate_layers(context["item_graph"], model.item_embedding.embedding[...], 2, at(seeds))
        return model._reconstruction(layers, jax.tree.map(jnp.asarray, sample))

    def reference(p):
        return restored(p, propagated(dense, p["item_embedding"]["embedding"], 2, seeds), sample, logarithm)

    value, gradient = jax.jit(jax.value_and_grad(lambda params: apply(reconstruct, params, rest)[0]))(params)
    p, gradient = wide(params), wide(gradient)
    assert value == pytest.approx(reference(p), rel=1e-10)
    for path, direction in directions(p):
        if "decoder" in path or "item_embedding" in path:
            ours = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)))
            assert ours == pytest.approx(slope(reference, p, direction), rel=1e-5, abs=1e-8), path


# The whole objective ------------------------------------------------------------------------------------------------


def test_the_objective_is_the_sum_of_its_parts(trainer, context, batch, unseen):
    params, rest, _, step = trainer
    (value, _), _ = step(params, rest, KEY)

    @nnx.jit
    def parts(model):
        """With the keys of the objective."""
        negative_key, dropout_key = jax.random.split(KEY)
        represented = model.represent(context, jax.random.fold_in(KEY, 3))
        queries = encode_queries(model, batch, represented, dropout_key, sampler=unseen, negative_key=negative_key)
        main = BCE.function(queries, model.items(represented), unseen, negative_key)
        sample = model._draw_edges(represented, jax.random.fold_in(KEY, 4))
        without_chance = model.penalty(batch, queries, represented, main)
        return main, model._reconstruction(represented.layers, sample), represented.similarity, without_chance

    main, reconstruction, similarity, without_chance = map(float, parts(make(**WEIGHTS)))
    squares = sum((leaf**2).sum() for leaf in jax.tree.leaves(wide(params)))
    assert min(abs(main), abs(reconstruction), abs(similarity), squares) > 1e-3
    # At the first step, new paths are drawn and the reward is 1.
    assert float(value) == pytest.approx(main + 0.3 * reconstruction + 0.01 * squares - similarity, rel=1e-5)
    assert without_chance == pytest.approx(0.01 * squares, rel=1e-5)


def test_every_parameter_is_trained(trainer):
    params, rest, _, step = trainer
    _, gradient = step(params, rest, KEY)
    # The squares' share is known; something else must move every parameter.
    others = jax.tree.map(lambda g, x: g - 2 * 0.01 * x, wide(gradient), wide(params))
    for path, leaf in jax.tree.leaves_with_path(others):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), name
        # A key's bias moves all scores of a query alike: its gradient is zero but for rounding.
        assert (np.abs(leaf).max() > 1e-5) == ("['key']['bias']" not in name), name


def test_every_loss_has_a_gradient(context, batch, unseen):
    """All losses of one forward pass: they differ, and each reaches every parameter of encoder and recommender.

    In half precision, where parameters and their gradients stay float32.
    """
    params, rest, apply = functional(make(num_blocks=1, dtype="bfloat16"))
    losses = [make_loss(LossConfig(loss=loss, num_negatives=8)) for loss in MAERecConfig.losses]

    def values(model):
        represented = model.represent(context)
        queries = encode_queries(model, batch, represented, KEY, sampler=unseen, negative_key=KEY)
        return jnp.stack([loss.function(queries, model.items(represented), unseen, KEY) for loss in losses])

    gradients = jax.jit(jax.jacrev(lambda params: apply(values, params, rest)[0]))(params)
    sizes = [[float(jnp.linalg.norm(leaf[i])) for leaf in jax.tree.leaves(gradients)] for i in range(len(losses))]
    assert len({tuple(mine) for mine in sizes}) == len(losses)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    for path, leaf in jax.tree.leaves_with_path(wide(gradients)):
        name = jax.tree_util.keystr(path)
        largest = np.abs(leaf).reshape(len(losses), -1).max(1)
        assert np.isfinite(largest).all(), name
        if "decoder" not in name and "['key']['bias']" not in name:
            assert largest.min() > 1e-6, name
            assert len(np.unique(leaf.reshape(len(losses), -1), axis=0)) == len(losses), name


def test_half_precision(context, batch, unseen):
    """Blocks and decoder compute in bfloat16; losses stay float32."""
    models = [make(num_blocks=1, dtype=dtype) for dtype in ("float32", "bfloat16")]
    represented = models[0].represent(context)
    sample = jax.tree.map(jnp.asarray, draw_edges(models[0], context, (2, 5, 11)))

    def losses(model):
        queries = encode_queries(model, batch, represented, None, sampler=unseen, negative_key=KEY)
        main = BCE.function(queries, model.items(represented), unseen, KEY)
        return main, model._reconstruction(represented.layers, sample)

    full, half = (jax.jit(partial(losses, model))() for model in models)
    assert {part.dtype for part in half} == {jnp.dtype("float32")}
    assert not np.isin(half, full).any()
    np.testing.assert_allclose(half, full, rtol=0.03)


def test_seeds_side_by_side(trainer):
    """Two models at once give what each gives alone: values, gradients and masks."""
    params, rest, step, apart = trainer
    others = jax.tree.map(lambda x: 0.5 * x, params)
    keys = jax.random.split(KEY, 2)
    both = jax.tree.map(lambda *x: jnp.stack(x), params, others)
    together = jax.jit(jax.vmap(step, in_axes=(0, None, 0)))(both, rest, keys)
    for i, mine in enumerate((params, others)):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-5),
            together,
            apart(mine, rest, keys[i]),
        )


def test_dropout_is_used_in_training(batch, encoder):
    model, represented, _ = encoder
    encode = jax.jit(lambda key: model.encode(batch, represented, key).vectors)
    filled = np.asarray(batch.segments) > 0
    first, again, other = (np.asarray(encode(key))[filled] for key in (KEY, KEY, jax.random.key(1)))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.9


# Parameters, initialisation, options --------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_blocks", "num_gcn_layers"), [(2, 2), (1, 3)])
def test_number_of_parameters(num_blocks, num_gcn_layers):
    sizes = {"num_blocks": num_blocks, "num_gcn_layers": num_gcn_layers}
    model = nnx.eval_shape(lambda: MAERec(NUM_ITEMS, **SMALL, **sizes, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    d, g = DIM, num_gcn_layers
    block = 4 * (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 2 * 2 * d
    decoder = g * g * d * g * d + g * d + g * d * d + d + d + 1
    assert count == (NUM_ITEMS + 1) * d + MAX_LENGTH * d + 2 * d + num_blocks * block + decoder


def test_initialisation_is_the_published_one():
    d, n = 64, 2000
    model = MAERec(n, embedding_dim=d, num_blocks=1, rngs=nnx.Rngs(0))
    block = model.blocks[0]
    for layer, fans in {
        model.item_embedding: n + 1 + d,
        model.position_embedding: 50 + d,
        block.attention.query: 2 * d,
        block.attention.key: 2 * d,
        block.attention.value: 2 * d,
        block.attention.out: 2 * d,
        block.feed_forward_in: 5 * d,
        block.feed_forward_out: 5 * d,
        model.decoder.first: 6 * d,
        model.decoder.second: 3 * d,
    }.items():
        weight = np.asarray(layer.embedding[...] if isinstance(layer, nnx.Embed) else layer.kernel[...])
        bound = np.sqrt(6 / fans)
        assert 0.98 * bound < np.abs(weight).max() <= bound
        assert np.std(weight) == pytest.approx(bound / np.sqrt(3), rel=0.05)
        assert isinstance(layer, nnx.Embed) or not np.asarray(layer.bias[...]).any()


def test_options_reach_the_model(interactions):
    config = make_config("maerec", max_length=7, mask_steps=4, path_probability=0.3, next_seeds="ends", l2_weight=0.5)
    model = make_model(config, num_users=30, num_items=NUM_ITEMS, seed=0)
    assert (model.mask_steps, model.path_probability, model.next_seeds, model.l2_weight) == (4, 0.3, "ends", 0.5)
    assert model.position_embedding.num_embeddings == 7
    assert model.num_mask_seeds == NUM_ITEMS + 1  # there are no more


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path_probability": 0.0}, r"path_probability must lie in \(0, 1\], got 0.0"),
        ({"path_probability": 1.5}, r"path_probability must lie in \(0, 1\], got 1.5"),
        ({"next_seeds": "middles"}, "next_seeds must be one of sums, ends, got 'middles'"),
        ({"num_edge_negatives": 5}, "num_edge_negatives must be an even number of at least 2, .* got 5"),
        ({"num_gcn_layers": 0}, "num_gcn_layers must be at least 1, got 0"),
        ({"mask_steps": 0}, "mask_steps must be at least 1, got 0"),
        ({"reconstruction_weight": -1.0}, "reconstruction_weight must be at least 0, got -1.0"),
        ({"attention_dropout_rate": 1.0}, r"attention_dropout_rate must lie in \[0, 1\), got 1.0"),
        ({"num_heads": 3}, "num_heads must divide embedding_dim, got 3 and 64"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        make_config("maerec", **options)


@pytest.mark.parametrize("dataset", ["beauty", "toys", "tools", "ml-1m"])
def test_presets_are_the_published_settings(dataset):
    values = yaml.safe_load((presets.FOLDER / f"maerec-{dataset}.yaml").read_text())
    config = MAERecConfig.from_dict(values).checked()
    if dataset == "beauty":
        assert config == MAERecConfig()
    assert (config.optimizer, config.weight_decay, config.loss) == ("adam", 0.0, "bce")
    if not PUBLISHED.exists():
        pytest.skip(f"the published settings are not beside this clone: {PUBLISHED.name}")
    with PUBLISHED.open() as file:
        (row,) = [
            row
            for row in csv.DictReader(file)
            if (row["model"], row["dataset"], row["role"]) == ("MAERec", dataset, "plain-table3-inferred")
        ]
    row |= dict(pair.split("=") for pair in row["extra"].split("; "))
    names = {
        "lr": "learning_rate",
        "weight_decay": "l2_weight",
        "beta1": "b1",
        "beta2": "b2",
        "epochs": "epochs",
        "batch_size": "batch_size",
        "eval_every_epochs": "eval_every",
        "maxlen": "max_length",
        "embedding_dim": "embedding_dim",
        "num_layers": "num_blocks",
        "num_heads": "num_heads",
        "dropout_hidden": "dropout_rate",
        "dropout_attention": "attention_dropout_rate",
        "num_reco_neg": "num_edge_negatives",
        "mask_depth": "mask_depth",
        "path_prob": "path_probability",
        "num_gcn_layers": "num_gcn_layers",
        "mask_steps": "mask_steps",
        "num_mask_cand": "num_mask_seeds",
        "eps": "low_reward",
        "ii_dist": "item_graph_hops",
        "batch_size_con": "num_reconstructed",
        "weight4reco": "reconstruction_weight",
    }
    for theirs, ours in names.items():
        assert getattr(config, ours) == float(row[theirs]), ours
    assert set(dataclasses.asdict(config)) >= set(values)


# Training and serving -----------------------------------------------------------------------------------------------


def test_a_resumed_run_ends_bit_by_bit_and_serves(tmp_path):
    """Three steps an epoch and masks that stay for two: the break is amid a mask. Then recommend, and export."""
    config = make_config(
        "maerec",
        max_length=MAX_LENGTH,
        embedding_dim=DIM,
        num_heads=2,
        num_blocks=1,
        num_mask_seeds=2,
        item_graph_hops=1,
        mask_steps=2,
        num_reconstructed=20,
        num_edge_negatives=4,
        learning_rate=1e-2,
        epochs=2,
        eval_every=1,
        optimizer="adam",
        batch_size=20,
    )
    data = small_data()
    prepared = make_training_data(data, config)
    assert prepared.feed.num_batches == 3
    whole = loop.train(prepared, config, config.optimizer, tmp_path / "whole")
    checks.check_resuming(whole, prepared, config, tmp_path / "whole", 1, tmp_path / "broken")
    saved = Checkpoints(tmp_path / "broken").load(2).leaves
    assert any("seeds" in name for name in saved)
    steps = {int(value) for name, value in saved.items() if name.startswith("last") and "step" in name}
    assert steps == {6}

    run = load_run(tmp_path / "broken", "last")
    p = wide(nnx.state(run.model, nnx.Param))
    full = np.asarray(item_graph(prepared.split.train, 1).todense(), np.float64)
    items = sum(propagated(full, p["item_embedding"]["embedding"], 2))
    histories = [sequence[-MAX_LENGTH:] for sequence in list(data)[:4]]
    expected = np.stack([recommended(p, items, history)[-1] @ items.T for history in histories])
    trained = TrainedModel.load(tmp_path / "broken", "last")
    for found, scores in zip(
        trained.recommend([h.tolist() for h in histories], k=40, exclude_seen=False), expected, strict=True
    ):
        np.testing.assert_allclose(found.scores, scores[found.items], rtol=1e-4, atol=1e-5)
    rows = np.zeros((4, MAX_LENGTH), np.int32)
    for row, history in zip(rows, histories, strict=True):
        row[: len(history)] = history
    np.testing.assert_allclose(export_scores(run).call(rows)[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-5)
