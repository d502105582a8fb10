import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from models.architectures.bert4rec import BERT4Rec
from models.architectures.registry import make_config
from models.data import Interactions, drifting_interests
from models.evaluation.ranking import FullRanking
from models.feeds import pack
from models.training import loop
from models.training.training_data import make_training_data
from tests.models.test_sasrec import MAX_LENGTH, alone, perturb

NUM_ITEMS = 25
MASK = NUM_ITEMS + 1
CONFIG = make_config("bert4rec", max_length=MAX_LENGTH, embedding_dim=8)


@pytest.fixture
def interactions():
    return drifting_interests(num_users=30, num_items=NUM_ITEMS, num_groups=4, mean_length=7, seed=1)


def make_model(**options):
    options = {"max_length": MAX_LENGTH, "embedding_dim": 8, "num_heads": 2, "dropout_rate": 0.5} | options
    return perturb(BERT4Rec(NUM_ITEMS, **options, rngs=nnx.Rngs(0)))


def padded_reference(model, sequence):
    """The published forward pass on one left-padded row, in NumPy: post-norm, padding not attended to."""

    def linear(layer, x):
        return x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])

    def norm(layer, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * np.asarray(layer.scale[...]) + np.asarray(layer.bias[...])

    row = np.zeros(MAX_LENGTH, int)
    row[MAX_LENGTH - len(sequence) :] = sequence
    blank = row == 0
    x = np.asarray(model.item_embedding.embedding[...])[row] + np.asarray(model.position_embedding.embedding[...])
    x = norm(model.norm, x)
    for layer in model.blocks:
        heads = layer.attention.num_heads
        projections = (layer.attention.query, layer.attention.key, layer.attention.value)
        q, k, v = (linear(projection, x).reshape(MAX_LENGTH, heads, -1) for projection in projections)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
        weights = scipy.special.softmax(np.where(blank, -np.inf, scores), axis=-1)
        x = norm(
            layer.attention_norm,
            x + linear(layer.attention.out, np.einsum("hqk,khd->qhd", weights, v).reshape(MAX_LENGTH, -1)),
        )
        hidden = linear(layer.feed_forward_in, x)
        hidden = hidden * scipy.special.ndtr(hidden)  # GELU
        x = norm(layer.feed_forward_norm, x + linear(layer.feed_forward_out, hidden))
    return x[~blank]


def test_packed_rows_equal_the_published_padded_model(interactions):
    model = make_model()
    packed = pack(interactions, max_length=MAX_LENGTH, batch_size=100, with_targets=False).shuffle(jax.random.key(5))
    batch = packed.batch(0)
    hidden = np.asarray(model(batch))
    for user, sequence in enumerate(interactions):
        here = (np.asarray(batch.users) == user) & (np.asarray(batch.segments) > 0)
        np.testing.assert_allclose(hidden[here], padded_reference(model, sequence[-MAX_LENGTH:]), rtol=2e-4, atol=2e-5)


def test_packing_changes_no_gradient(interactions):
    model = make_model(dropout_rate=0.0)
    graphdef, params = nnx.split(model, nnx.Param)
    packed = pack(interactions, max_length=MAX_LENGTH, batch_size=100, with_targets=False)

    def loss(params, batch):
        hidden = nnx.merge(graphdef, params)(batch)
        return jnp.sum(jnp.where(batch.segments[..., None] > 0, hidden, 0) ** 3)

    grad = jax.jit(jax.grad(loss))
    together = grad(params, packed.batch(0))
    separate = [grad(params, alone(s[-MAX_LENGTH:])) for s in interactions]
    summed = jax.tree.map(lambda *g: sum(g), *separate)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=5e-2), together, summed)


def test_both_sides_matter():
    model = make_model()
    first, second = np.asarray(model(alone([3, MASK, 4]))), np.asarray(model(alone([3, MASK, 9])))
    assert not np.allclose(first[0, 1], second[0, 1])


@pytest.mark.parametrize("tie_output", [False, True])
def test_number_of_parameters(tie_output):
    n, d, num_blocks = NUM_ITEMS + 2, 8, 2
    model = make_model(tie_output=tie_output)
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    layer = 4 * (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 2 * 2 * d
    tables = n * d if tie_output else 2 * n * d
    assert count == tables + n + MAX_LENGTH * d + num_blocks * layer + 2 * d
    tables = (("item_embedding",),) if tie_output else (("item_embedding",), ("output_embedding",))
    assert model.node_sets == {"items": tables}


def test_initialisation_is_the_published_one():
    model = BERT4Rec(3000, rngs=nnx.Rngs(0))
    layer = model.blocks[0]
    for weight in [
        model.item_embedding.embedding,
        model.output_embedding.embedding,
        model.position_embedding.embedding,
        layer.attention.out.kernel,
        layer.feed_forward_in.kernel,
    ]:
        assert np.abs(weight[...]).max() == pytest.approx(0.02)
        assert np.std(weight[...]) > 0.012
    assert np.abs(layer.attention.query.kernel[...]).max() == pytest.approx(np.sqrt(6 / (4 * 64)), rel=0.02)
    assert not np.any(model.output_bias[...])


class TestMasking:
    def corrupt(self, data, key=0, **options):
        batch = pack(data, max_length=MAX_LENGTH, batch_size=1000, with_targets=False).batch(0)
        return batch, make_model(**options).training_batch(batch, jax.random.key(key))

    def test_masked_items_are_the_targets(self):
        data = drifting_interests(num_users=300, num_items=NUM_ITEMS, num_groups=4, mean_length=7)
        batch, seen = self.corrupt(data, mask_probability=0.3)
        filled, masked = np.asarray(batch.segments) > 0, np.asarray(seen.targets) > 0
        np.testing.assert_array_equal(np.asarray(seen.inputs)[masked], MASK)
        np.testing.assert_array_equal(np.asarray(seen.targets)[masked], np.asarray(batch.inputs)[masked])
        np.testing.assert_array_equal(np.asarray(seen.inputs)[~masked], np.asarray(batch.inputs)[~masked])
        assert not masked[~filled].any()
        assert masked[filled].mean() == pytest.approx(0.3, abs=0.03)
        _, other = self.corrupt(data, key=1, mask_probability=0.3)
        assert (np.asarray(other.targets) != np.asarray(seen.targets)).any()

    def test_only_the_newest_item_on_request(self):
        data = drifting_interests(num_users=300, num_items=NUM_ITEMS, num_groups=4, mean_length=7)
        batch, seen = self.corrupt(data, mask_probability=0.5, mask_last_probability=0.4)
        masked, last = np.asarray(seen.targets) > 0, np.asarray(batch.positions) == MAX_LENGTH - 1
        segments = np.asarray(batch.segments)
        only_last = []
        for row, segment in {(r, s) for r, s in np.ndindex(segments.shape) if segments[r, s]}:
            here = (segments[row] == segments[row, segment]) & (np.arange(segments.shape[1]) >= 0)
            only_last.append(masked[row, here].sum() == 1 and masked[row, here & last[row]].all())
        everything = self.corrupt(data, mask_probability=0.5, mask_last_probability=1.0)[1]
        np.testing.assert_array_equal(np.asarray(everything.targets) > 0, last & (segments > 0))
        assert 0.35 < np.mean(only_last) < 0.6  # 0.4, and short sequences that happen to look so

    @pytest.mark.parametrize("probability", [0.01, 0.2, 0.5, 0.9, 1.0])
    def test_there_is_room_for_all_targets(self, probability):
        model = make_model(mask_probability=probability)
        masked = np.random.default_rng(0).binomial(2000, probability, size=10_000)
        assert masked.max() <= model.max_num_targets(2000) <= 2000

    def test_there_is_room_if_every_token_is_a_last_one(self):
        model = make_model(mask_probability=0.1, mask_last_probability=1.0)
        packed = pack(Interactions.from_sequences([[1]] * 50), max_length=MAX_LENGTH, batch_size=50, with_targets=False)
        masked = model.training_batch(packed.batch(0), jax.random.key(0))
        assert int((masked.targets > 0).sum()) == 50 <= model.max_num_targets(packed.max_num_targets)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mask_probability": 1.5}, "mask_probability must lie between 0 and 1, got 1.5"),
            ({"mask_probability": 0.0}, "nothing to learn from"),
            ({"max_length": 1}, "max_length must be at least 2"),
        ],
    )
    def test_refuses(self, options, message):
        with pytest.raises(ValueError, match=message):
            make_config("bert4rec", **options)
        with pytest.raises(ValueError, match=message):
            make_model(**options)


def test_the_mask_token_is_appended_to_recommend(interactions):
    model = make_model()
    targets = np.array([1 + (u % NUM_ITEMS) for u in range(30)])
    ranking = FullRanking.prepare(interactions, targets, model=BERT4Rec, config=CONFIG, chunk_size=7)
    ranks = np.asarray(jax.jit(lambda: ranking.ranks(model, {}))())
    weight, bias = (np.asarray(x) for x in model.items())
    for user, sequence in enumerate(interactions):
        query = padded_reference(model, [*sequence[-(MAX_LENGTH - 1) :], MASK])[-1]
        scores = weight @ query + bias
        candidates = sorted(set(range(1, NUM_ITEMS + 1)) - set(sequence.tolist()) - {targets[user]})
        assert ranks[user] == (scores[candidates] >= scores[targets[user]]).sum()
    assert [list(s) for s in BERT4Rec.history_inputs(Interactions.from_sequences([[1, 2], [3]]))] == [[1, 2, 4], [3, 4]]


@pytest.mark.parametrize(("optimizer", "options"), [("sevo-adamw", {}), ("sevo-gradient", {"tie_output": True})])
def test_training(optimizer, options, tmp_path):
    config = make_config(
        "bert4rec", max_length=8, embedding_dim=8, num_blocks=1, epochs=3, batch_size=20, eval_every=1, **options
    )
    assert (config.loss, config.num_heads, config.b2) == ("ce", 4, 0.95)
    prepared = make_training_data(drifting_interests(num_users=60, num_items=40, num_groups=5, seed=3), config)
    assert prepared.nodes.adjacency.shape == (42, 42)
    result = loop.train(prepared, dataclasses.replace(config, learning_rate=1e-2), optimizer, tmp_path)
    assert result.losses[0] == pytest.approx(np.log(40), rel=0.05)
    assert result.losses[-1] < result.losses[0]
    assert (tmp_path / "result.json").exists()
