import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.architectures.gru4rec import GRU4Rec, GRU4RecConfig
from models.architectures.registry import make_config
from models.data import drifting_interests
from models.feeds import Prefixes, pack
from tests.models.architectures import checks

NUM_ITEMS = checks.NUM_ITEMS
MAX_LENGTH = 30
CONFIG = GRU4RecConfig(max_length=MAX_LENGTH, embedding_dim=6, hidden_dim=8)


@pytest.fixture(scope="module")
def interactions():
    data = drifting_interests(num_users=12, num_items=NUM_ITEMS, num_groups=4, mean_length=6, seed=1)
    assert data.lengths.max() <= MAX_LENGTH
    return data


@pytest.fixture(scope="module")
def packed(interactions):
    return pack(interactions, max_length=MAX_LENGTH, batch_size=10_000, count_targets=True, windows=True)


def make_model(seed=0, **options):
    options = {"embedding_dim": 6, "hidden_dim": 8, "dropout_rate": 0.5} | options
    return checks.perturb(GRU4Rec(NUM_ITEMS, **options, rngs=nnx.Rngs(seed)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference_query(parameters, sequence, num_gru_layers=1):
    """What the newest item of one history predicts with."""
    inputs = parameters["item_embedding/embedding"][sequence]
    for layer in range(num_gru_layers):
        w, u = parameters[f"gru/{layer}/in_kernel"], parameters[f"gru/{layer}/state_kernel"]
        size = len(u)
        h, states = np.zeros(size), []
        for x in inputs:
            gates = sigmoid((x @ w)[: 2 * size] + (h @ u)[: 2 * size])
            r, z = gates[:size], gates[size:]
            n = np.tanh((x @ w)[2 * size :] + r * (h @ u)[2 * size :])
            h = (1 - z) * n + z * h
            states.append(h)
        inputs = np.array(states)
    return inputs[-1] @ parameters["dense/kernel"] + parameters["dense/bias"]


def reference_loss(parameters, interactions, **options):
    """The mean over all prefixes of all users, one at a time."""
    table = parameters["item_embedding/embedding"]
    losses = []
    for user, sequence in enumerate(interactions):
        negative = checks.negative_of(user, NUM_ITEMS)
        for k in range(1, len(sequence)):
            query = reference_query(parameters, sequence[:k], **options)
            losses.append(np.log1p(np.exp(query @ table[negative] - query @ table[sequence[k]])))
    return np.mean(losses)


@pytest.mark.parametrize("num_gru_layers", [1, 2])
@pytest.mark.usefixtures("x64")
def test_one_pass_has_the_loss_and_gradient_of_the_equations(interactions, packed, num_gru_layers):
    model = checks.widen(make_model(num_gru_layers=num_gru_layers, dtype=jnp.float64))
    assert packed.num_batches == 1
    sampler = checks.OneNegative(NUM_ITEMS)
    loss, gradient = checks.loss_and_gradient(model, CONFIG, packed.batch(0), sampler)
    parameters = checks.by_path(nnx.state(model, nnx.Param))

    def function(parameters):
        return reference_loss(parameters, interactions, num_gru_layers=num_gru_layers)

    assert loss == pytest.approx(function(parameters), rel=1e-12)
    checks.check_gradient(gradient, function, parameters)


@pytest.mark.usefixtures("x64")
def test_separate_prefixes_have_the_same_loss_and_gradient(interactions, packed):
    model = checks.widen(make_model(dtype=jnp.float64))
    prefixes = Prefixes.from_interactions(interactions, max_length=MAX_LENGTH, batch_size=len(interactions))
    assert prefixes.num_batches == 1
    sampler = checks.OneNegative(NUM_ITEMS)
    together, together_gradient = checks.loss_and_gradient(model, CONFIG, packed.batch(0), sampler)
    shuffled = prefixes.shuffle(jax.random.key(1))
    separate, separate_gradient = checks.loss_and_gradient(
        model, CONFIG, shuffled.batch(0), sampler, max_num_targets=shuffled.max_num_targets
    )
    assert together == pytest.approx(separate, rel=1e-12)
    for path, value in together_gradient.items():
        np.testing.assert_allclose(value, separate_gradient[path], rtol=1e-9, atol=1e-14, err_msg=path)


def test_packed_rows_equal_rows_of_ones_own(interactions):
    model = make_model()
    batch = pack(interactions, max_length=9, batch_size=100, with_targets=False).shuffle(jax.random.key(5)).batch(0)
    vectors = np.asarray(checks.encode(model, batch))
    for user, sequence in enumerate(interactions):
        here = (np.asarray(batch.users) == user) & (np.asarray(batch.segments) > 0)
        newest = sequence[-9:]
        expected = checks.encode(model, checks.alone(newest, 9))[0, : len(newest)]
        np.testing.assert_allclose(vectors[here], expected, rtol=1e-5, atol=1e-6)


def test_queries_see_nothing_that_follows_and_no_neighbour(packed):
    model = make_model()
    checks.check_independence(model, 9)
    checks.check_neighbours(model, packed.batch(0), NUM_ITEMS)


@pytest.mark.parametrize("num_gru_layers", [1, 3])
def test_number_of_parameters(num_gru_layers):
    n, d, h = NUM_ITEMS, 6, 8
    count = checks.count_parameters(make_model(num_gru_layers=num_gru_layers))
    assert count == (n + 1) * d + 3 * h * (d + h) + (num_gru_layers - 1) * 6 * h * h + (h + 1) * d
    assert checks.count_parameters(GRU4Rec(n, rngs=nnx.Rngs(0))) == (n + 1) * 64 + 24_576 + 4_160


def test_initialisation_is_the_published_one():
    n = 2000
    model = GRU4Rec(n, rngs=nnx.Rngs(0))
    assert np.std(model.item_embedding.embedding[...]) == pytest.approx(np.sqrt(2 / (n + 1 + 64)), rel=0.02)
    for values in (model.dense.kernel[...], model.dense.bias[...]):
        assert 0.9 / 8 < np.abs(values).max() <= 1 / 8
        assert np.std(values) == pytest.approx(1 / 8 / np.sqrt(3), rel=0.15)
    assert 0.15 < np.abs(model.gru[0].in_kernel[...]).max() <= np.sqrt(6 / 256)


def test_only_the_embeddings_are_dropped_out(packed):
    batch = packed.batch(0)
    model = make_model()
    wet = checks.encode(model, batch, jax.random.key(0))
    assert not np.allclose(wet, checks.encode(model, batch))
    # The same mask on the inputs of a model without dropout.
    embedded = model.item_embedding.embedding[...][batch.inputs]
    x = model.dropout(embedded, jax.random.split(jax.random.key(0), 1)[0])
    np.testing.assert_allclose(model.dense(model.gru[0](x, batch.segments)), wet, rtol=1e-5, atol=1e-6)
    assert np.mean(np.asarray(x) == 0) == pytest.approx(0.5, abs=0.1)


def test_every_loss(interactions, packed):
    assert set(CONFIG.losses) == {"bpr", "bce", "ce", "sampled-softmax", "gbce"}
    checks.check_every_loss(make_model, CONFIG, packed, interactions)


def test_seeds_side_by_side(packed):
    checks.check_vmap(make_model, packed.batch(0))


def test_half_precision(packed):
    batch = packed.batch(0)
    vectors = checks.encode(make_model(dtype=jnp.bfloat16), batch)
    assert vectors.dtype == jnp.bfloat16
    filled = np.asarray(batch.segments) > 0
    expected = np.asarray(checks.encode(make_model(), batch))[filled]
    np.testing.assert_allclose(vectors.astype(np.float32)[filled], expected, atol=0.05 * np.abs(expected).max())
    narrow = make_model(dtype=jnp.bfloat16)
    loss, gradient = checks.loss_and_gradient(narrow, CONFIG, batch, checks.OneNegative(NUM_ITEMS))
    assert np.isfinite(loss)
    assert all(np.isfinite(value).all() and value.dtype == np.float32 for value in gradient.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dim": 0}, "hidden_dim must be at least 1, got 0"),
        ({"num_gru_layers": 0}, "num_gru_layers must be at least 1, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GRU4RecConfig(**options).checked()
    with pytest.raises(ValueError, match=message):
        GRU4Rec(5, **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("options", [{}, {"separate_prefixes": True, "optimizer": "adam", "weight_decay": 1e-6}])
def test_a_run(tmp_path, options):
    sizes = {"max_length": 8, "embedding_dim": 6, "hidden_dim": 8, "epochs": 2, "batch_size": 60, "eval_every": 1}
    checks.check_a_run(make_config("gru4rec", **sizes, **options), tmp_path)


def test_presets():
    fields = {
        "dropout_embedding_or_feature": "dropout_rate",
        "hidden_size": "hidden_dim",
        "num_layers": "num_gru_layers",
    }
    checks.check_presets("GRU4Rec", fields)
