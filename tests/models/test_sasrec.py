import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from models import layers
from models.architectures.sasrec import SASRec
from models.data import drifting_interests
from models.feeds import Batch, pack
from models.layers import Attention, Dropout, attention, random_words

MAX_LENGTH = 9


@pytest.fixture
def interactions():
    return drifting_interests(num_users=30, num_items=25, num_groups=4, mean_length=7, seed=1)


def perturb(model):
    """Moves every parameter: biases and scales start at 0 and 1, where mistakes in them would not show."""
    for i, leaf in enumerate(jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=lambda x: isinstance(x, nnx.Param))):
        leaf[...] += 0.3 * jax.random.normal(jax.random.key(i), leaf.shape)
    return model


def make_model(num_items=25, **options):
    options = {"max_length": MAX_LENGTH, "embedding_dim": 8, "num_heads": 2, "dropout_rate": 0.5} | options
    return perturb(SASRec(num_items, **options, rngs=nnx.Rngs(0)))


def alone(sequence, max_length=MAX_LENGTH):
    """One user in a row of their own; the row has one length, so that the model is compiled once."""
    length = len(sequence)

    def row(values):
        return jnp.pad(jnp.asarray(values, jnp.int32), (0, max_length - length))[None]

    return Batch(
        inputs=row(sequence),
        positions=row(np.arange(max_length - length, max_length)),
        padding=row(np.full(length, max_length - length)),
        segments=row(np.ones(length)),
        users=row(np.zeros(length)),
        targets=row(np.zeros(length)),
    )


def padded_reference(model, sequence, attend_padding):
    """The published forward pass on one left-padded row of ``MAX_LENGTH``, in NumPy."""

    def linear(layer, x):
        return x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])

    def norm(layer, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-8)
        return x * np.asarray(layer.scale[...]) + np.asarray(layer.bias[...])

    row = np.zeros(MAX_LENGTH, int)
    row[MAX_LENGTH - len(sequence) :] = sequence
    blank = row == 0
    table = np.asarray(model.item_embedding.embedding[...])
    x = table[row] * np.sqrt(table.shape[1]) + np.asarray(model.position_embedding.embedding[...])
    x[blank] = 0
    allowed = np.tri(MAX_LENGTH, dtype=bool)
    if not attend_padding:
        allowed = allowed & ~blank[None, :]
        allowed[blank] = True  # a blank query's output is not used; it only must not divide by zero
    for block in model.blocks:
        heads = block.attention.num_heads
        q, k, v = (
            linear(layer, y).reshape(MAX_LENGTH, heads, -1)
            for layer, y in [
                (block.attention.query, norm(block.attention_norm, x)),
                (block.attention.key, x),
                (block.attention.value, x),
            ]
        )
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(allowed, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", weights, v).reshape(MAX_LENGTH, -1)
        x = x + linear(block.attention.out, mixed)
        x = norm(block.feed_forward_norm, x)
        x = x + linear(block.feed_forward_out, np.maximum(linear(block.feed_forward_in, x), 0))
        x[blank] = 0
    return norm(model.norm, x)[~blank]


@pytest.mark.parametrize("attend_padding", [True, False])
def test_packed_rows_equal_the_published_padded_model(interactions, attend_padding):
    model = make_model(attend_padding=attend_padding)
    packed = pack(interactions, max_length=MAX_LENGTH, batch_size=100, with_targets=False).shuffle(jax.random.key(5))
    batch = packed.batch(0)
    hidden = np.asarray(model(batch))
    for user, sequence in enumerate(interactions):
        here = (np.asarray(batch.users) == user) & (np.asarray(batch.segments) > 0)
        expected = padded_reference(model, sequence[-MAX_LENGTH:], attend_padding)
        np.testing.assert_allclose(hidden[here], expected, rtol=2e-4, atol=2e-5)


def test_packing_changes_no_gradient(interactions):
    model = make_model(dropout_rate=0.0)
    graphdef, params = nnx.split(model, nnx.Param)
    packed = pack(interactions, max_length=MAX_LENGTH, batch_size=100).shuffle(jax.random.key(2))

    def loss(params, batch):
        """Squares of everything the model returns, so that every parameter matters."""
        hidden = nnx.merge(graphdef, params)(batch)
        return jnp.sum(jnp.where(batch.segments[..., None] > 0, hidden, 0) ** 3)

    grad = jax.jit(jax.grad(loss))
    together = grad(params, packed.batch(0))
    separate = [grad(params, alone(s[:-1][-MAX_LENGTH:])) for s in interactions]
    summed = jax.tree.map(lambda *g: sum(g), *separate)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-2), together, summed)


def test_a_later_item_never_changes_an_earlier_output():
    model = make_model()
    first = np.asarray(model(alone([3, 1, 4, 1, 5])))
    second = np.asarray(model(alone([3, 1, 4, 9, 2])))
    np.testing.assert_array_equal(first[0, :3], second[0, :3])
    assert not np.allclose(first[0, 3], second[0, 3])


def test_neighbours_in_a_row_do_not_matter(interactions):
    """Changing one user's items leaves everybody else's outputs bit-identical."""
    model = make_model()
    batch = pack(interactions, max_length=MAX_LENGTH, batch_size=100).batch(0)
    mine = batch.segments == 7
    changed = batch._replace(inputs=jnp.where(mine, 1 + batch.inputs % 25, batch.inputs))
    before, after = np.asarray(model(batch)), np.asarray(model(changed))
    np.testing.assert_array_equal(before[~np.asarray(mine)], after[~np.asarray(mine)])
    assert (before[np.asarray(mine)] != after[np.asarray(mine)]).any()


def test_more_padding_is_seen():
    """Blank places take part in attention, unless told otherwise."""
    for attend_padding, differs in [(True, True), (False, False)]:
        model = make_model(attend_padding=attend_padding)
        batch = alone([3, 1, 4])
        more = batch._replace(padding=batch.padding - 5)
        assert np.allclose(model(batch), model(more)) != differs


@pytest.mark.parametrize(("num_blocks", "num_heads"), [(1, 1), (3, 2)])
def test_number_of_parameters(num_blocks, num_heads):
    n, length, d = 25, 9, 8
    model = make_model(n, embedding_dim=d, num_blocks=num_blocks, num_heads=num_heads)
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    block = 6 * (d * d + d) + 2 * 2 * d  # four projections and two feed-forward layers, two norms
    assert count == (n + 1) * d + length * d + num_blocks * block + 2 * d


def test_initialisation_is_the_published_one():
    d, n = 64, 2000
    model = SASRec(n, embedding_dim=d, rngs=nnx.Rngs(0))
    block = model.blocks[0]

    def check(array, std, bound=None):
        assert np.std(array) == pytest.approx(std, rel=0.05)
        if bound:
            assert 0.98 * bound < np.abs(array).max() <= bound

    check(model.item_embedding.embedding[...], np.sqrt(2 / (n + 1 + d)))
    check(model.position_embedding.embedding[...], np.sqrt(2 / (50 + d)))
    check(block.attention.query.kernel[...], np.sqrt(2 / (4 * d)), np.sqrt(6 / (4 * d)))
    check(block.attention.out.kernel[...], np.sqrt(2 / (2 * d)))
    check(block.feed_forward_in.kernel[...], d**-0.5 / np.sqrt(3), d**-0.5)
    assert not np.any(block.attention.key.bias[...])
    assert np.abs(block.feed_forward_out.bias[...]).max() > 0.1


def test_dropout():
    x = jnp.ones((400, 500))
    y = np.asarray(Dropout(0.3)(x, jax.random.key(0)))
    assert (y == 0).mean() == pytest.approx(0.3, abs=5e-3)
    np.testing.assert_allclose(y[y > 0], 1 / 0.7, rtol=1e-6)
    assert Dropout(0.3)(x, None) is x
    assert Dropout(0.0)(x, jax.random.key(0)) is x
    with pytest.raises(ValueError, match=r"dropout_rate must lie in \[0, 1\), got 1"):
        Dropout(1)


def test_random_words_are_uniform_and_independent():
    words = np.asarray(random_words(jax.random.key(0), (256, 1024)))
    other = np.asarray(random_words(jax.random.key(1), (256, 1024)))
    for sample in (words >> 24, words & 255, (words[:, 1:] ^ words[:, :-1]) >> 24, (words ^ other) >> 24):
        counts = np.bincount(sample.ravel(), minlength=256)
        assert scipy.stats.chisquare(counts).pvalue > 1e-4
    # Every bit of every word is a fair coin, and so is its agreement with the next word's.
    for shift in range(32):
        bit = words.ravel() >> shift & 1
        assert abs(bit.mean() - 0.5) < 5e-3
        assert abs((bit[1:] == bit[:-1]).mean() - 0.5) < 5e-3
    assert (words != other).mean() > 0.999


@pytest.mark.parametrize("kind", ["Linear", "LayerNorm"])
def test_layers_have_the_derivatives_of_nnx(kind):
    sizes = {"Linear": (5, 3), "LayerNorm": (5,)}[kind]
    ours, theirs = (perturb(getattr(module, kind)(*sizes, rngs=nnx.Rngs(0))) for module in (layers, nnx))
    x = 1 + jax.random.normal(jax.random.key(0), (2, 4, 5))

    def loss(layer, x):
        return jnp.sum(jnp.sin(layer(x)))

    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    got, wanted = (nnx.grad(loss, argnums=(0, 1))(layer, x) for layer in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, wanted)


def test_long_rows_are_scored_in_parts(monkeypatch):
    model = make_model()
    batch = alone([3, 1, 4, 1, 5, 9, 2])
    whole = np.asarray(model(batch))
    monkeypatch.setattr(attention, "QUERIES_AT_ONCE", 4)
    np.testing.assert_allclose(model(batch), whole, rtol=1e-5, atol=1e-6)


def test_dropout_is_used_in_training(interactions):
    model = make_model()
    batch = pack(interactions, max_length=MAX_LENGTH, batch_size=100).batch(0)
    assert not np.allclose(model(batch), model(batch, jax.random.key(0)))
    np.testing.assert_array_equal(model(batch), model(batch))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads must divide embedding_dim, got 3 and 8"):
        Attention(8, 3, 0.0, in_init=nnx.initializers.zeros, out_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
