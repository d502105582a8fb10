import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.architectures.base import Queries
from models.architectures.registry import make_config
from models.architectures.stosa import STOSA, STOSAConfig, WassersteinAttention, deviation
from models.data import drifting_interests
from models.feeds import pack
from models.training.optimizers import make_stages
from models.training.training_data import make_training_data
from tests.models.architectures import checks

NUM_ITEMS = checks.NUM_ITEMS
MAX_LENGTH, DIM, HEADS = 9, 8, 2
CONFIG = STOSAConfig(max_length=MAX_LENGTH, embedding_dim=DIM, num_heads=HEADS)
# What makes a new mean; without an effect unless encode_mean.
DEAD = ("attention/mean_value", "attention/mean_out", "mean_feed_forward")


@pytest.fixture(scope="module")
def interactions():
    return drifting_interests(num_users=30, num_items=NUM_ITEMS, num_groups=4, mean_length=7, seed=1)


@pytest.fixture(scope="module")
def packed(interactions):
    return pack(interactions, max_length=MAX_LENGTH, batch_size=100)


def make_model(seed=0, **options):
    options = {
        "max_length": MAX_LENGTH,
        "embedding_dim": DIM,
        "num_heads": HEADS,
        "dropout_rate": 0.3,
        "attention_dropout_rate": 0.5,
        "pvn_weight": 0.7,
    } | options
    return checks.perturb(STOSA(NUM_ITEMS, **options, rngs=nnx.Rngs(seed)))


def elu(x):
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def reference(parameters, sequence, *, encode_mean, num_blocks=1):
    """The published forward pass on one left-padded row: mean and covariance at every item of the history."""

    def linear(path, x):
        return x @ parameters[f"{path}/kernel"] + parameters[f"{path}/bias"]

    def norm(path, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * parameters[f"{path}/scale"] + parameters[f"{path}/bias"]

    def feed_forward(path, x):
        return norm(f"{path}/norm", linear(f"{path}/linear_out", elu(linear(f"{path}/linear_in", x))) + x)

    row = np.zeros(MAX_LENGTH, int)
    row[MAX_LENGTH - len(sequence) :] = sequence
    blank = row == 0
    mask = np.where(np.tri(MAX_LENGTH, dtype=bool) & ~blank, 0, -(2.0**32) + 1)
    mean, covariance = (
        elu(norm("norm", parameters[f"item_{name}/embedding"][row] + parameters[f"position_{name}/embedding"]))
        for name in ("mean", "covariance")
    )
    covariance = covariance + 1
    width = DIM // HEADS
    for block in range(num_blocks):
        here = f"blocks/{block}"
        qm, km, vm = (linear(f"{here}/attention/mean_{name}", mean) for name in ("query", "key", "value"))
        qc, kc, vc = (
            elu(linear(f"{here}/attention/covariance_{name}", covariance)) + 1 for name in ("query", "key", "value")
        )
        mean_context, covariance_context = np.zeros_like(mean), np.zeros_like(mean)
        for head in range(HEADS):
            of = slice(head * width, (head + 1) * width)
            distance = np.square(qm[:, None, of] - km[None, :, of]).sum(-1)
            distance = distance + np.square(np.sqrt(qc[:, None, of]) - np.sqrt(kc[None, :, of])).sum(-1)
            scores = -distance / np.sqrt(width) + mask
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            mean_context[:, of] = weights @ vm[:, of]
            covariance_context[:, of] = weights**2 @ vc[:, of]
        if encode_mean:
            attended = norm(f"{here}/attention_norm", linear(f"{here}/attention/mean_out", mean_context) + mean)
            mean = feed_forward(f"{here}/mean_feed_forward", attended)
        attended = linear(f"{here}/attention/covariance_out", covariance_context) + covariance
        attended = norm(f"{here}/attention_norm", attended)
        covariance = elu(feed_forward(f"{here}/covariance_feed_forward", attended)) + 1
    return mean[~blank], covariance[~blank]


def distance(mean, covariance, other_mean, other_covariance):
    """The squared Wasserstein distance of two Gaussians with diagonal covariances."""
    return np.square(mean - other_mean).sum(-1) + np.square(np.sqrt(covariance) - np.sqrt(other_covariance)).sum(-1)


def item_gaussian(parameters, item):
    return parameters["item_mean/embedding"][item], elu(parameters["item_covariance/embedding"][item]) + 1


def reference_loss(parameters, interactions, pvn_weight, **options):
    """BPR on minus the distance and the penalty, averaged over all targets of all users."""
    losses = []
    for user, sequence in enumerate(interactions):
        sequence = sequence[-MAX_LENGTH - 1 :]
        negative = item_gaussian(parameters, checks.negative_of(user, NUM_ITEMS))
        means, covariances = reference(parameters, sequence[:-1], **options)
        for mean, covariance, target in zip(means, covariances, sequence[1:], strict=True):
            positive = item_gaussian(parameters, target)
            near, far = distance(mean, covariance, *positive), distance(mean, covariance, *negative)
            penalty = max(0, near - distance(*positive, *negative))
            losses.append(np.logaddexp(0, near - far) + pvn_weight * penalty)
    return np.mean(losses)


@pytest.mark.parametrize(("encode_mean", "num_blocks"), [(False, 1), (False, 2), (True, 2)])
def test_packed_rows_equal_the_published_padded_model(interactions, encode_mean, num_blocks):
    model = make_model(encode_mean=encode_mean, num_blocks=num_blocks)
    parameters = checks.by_path(nnx.state(model, nnx.Param))
    shuffled = pack(interactions, max_length=MAX_LENGTH, batch_size=100, with_targets=False).shuffle(jax.random.key(5))
    batch = shuffled.batch(0)
    vectors = np.asarray(checks.encode(model, batch))
    for user, sequence in enumerate(interactions):
        here = (np.asarray(batch.users) == user) & (np.asarray(batch.segments) > 0)
        mean, covariance = reference(parameters, sequence[-MAX_LENGTH:], encode_mean=encode_mean, num_blocks=num_blocks)
        expected = 2 * np.concatenate([mean, np.sqrt(covariance)], axis=-1)
        np.testing.assert_allclose(vectors[here], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("encode_mean", [False, True])
@pytest.mark.usefixtures("x64")
def test_the_loss_and_gradient_are_those_of_the_equations(interactions, packed, encode_mean):
    model = checks.widen(make_model(encode_mean=encode_mean, dtype=jnp.float64))
    assert packed.num_batches == 1
    loss, gradient = checks.loss_and_gradient(model, CONFIG, packed.batch(0), checks.OneNegative(NUM_ITEMS))
    parameters = checks.by_path(nnx.state(model, nnx.Param))

    def function(parameters):
        return reference_loss(parameters, interactions, 0.7, encode_mean=encode_mean)

    assert loss == pytest.approx(function(parameters), rel=1e-9)
    dead = () if encode_mean else DEAD
    checks.check_gradient(gradient, function, parameters, rtol=1e-5, dead=dead)


def test_scores_are_distances_but_for_a_term_of_the_query():
    model = make_model()
    parameters = checks.by_path(nnx.state(model, nnx.Param))
    sequence = np.array([3, 1, 4, 15, 9])
    vector = checks.encode(model, checks.alone(sequence, MAX_LENGTH))[0, 4]
    scores = np.asarray(model.scores(vector, None))
    mean, covariance = reference(parameters, sequence, encode_mean=False)
    expected = -distance(mean[-1], covariance[-1], *item_gaussian(parameters, np.arange(NUM_ITEMS + 1)))
    np.testing.assert_allclose(scores - np.sum(vector**2) / 4, expected, rtol=1e-4, atol=1e-4)
    assert scores.argsort().tolist() == expected.argsort().tolist()


def test_candidates_have_the_rows_and_biases_of_the_items(packed):
    model = make_model(num_blocks=0)
    table, bias = model.items()
    candidates = jnp.array([[1, 5, 7], [25, 2, 1]])
    encoded = model.encode(packed.batch(0), None, None, candidates)
    np.testing.assert_allclose(encoded.rows, table[candidates], rtol=1e-6)
    np.testing.assert_allclose(encoded.biases, bias[candidates], rtol=1e-6)


def test_penalty():
    rng = np.random.default_rng(0)
    targets = np.array([3, 0, 5, 7, 9, 0, 1])
    target, negative = rng.normal(size=(2, len(targets), 2 * DIM))
    # Some histories are much closer to the target than the negative is, others are not.
    points = target + np.linspace(0.1, 3, len(targets))[:, None] * rng.normal(size=target.shape)
    queries = Queries(
        vectors=jnp.asarray(2 * points, jnp.float32),
        targets=jnp.asarray(targets),
        users=jnp.zeros(len(targets), jnp.int32),
        rows=jnp.asarray([target, negative], jnp.float32),
    )
    hinge = np.maximum(0, np.square(points - target).sum(-1) - np.square(target - negative).sum(-1))[targets > 0]
    assert (hinge > 0).any()
    assert (hinge == 0).any()
    penalty = make_model().penalty(None, queries, None, jnp.zeros(()))
    assert float(penalty) == pytest.approx(0.7 * hinge.mean(), rel=1e-5)
    assert make_model(pvn_weight=0.0).penalty(None, queries, None, jnp.zeros(())) == 0
    # Without one negative a target there is nothing to compare with.
    assert make_model().penalty(None, queries._replace(rows=None), None, jnp.zeros(())) == 0


def test_queries_see_nothing_that_follows_and_no_neighbour(packed):
    for encode_mean in (False, True):
        model = make_model(encode_mean=encode_mean)
        checks.check_independence(model, MAX_LENGTH)
        checks.check_neighbours(model, packed.batch(0), NUM_ITEMS)


def test_the_published_mean_is_the_newest_item_alone():
    faithful, intended = make_model(), make_model(encode_mean=True)
    for model, alike in [(faithful, True), (intended, False)]:
        one, other = (checks.encode(model, checks.alone(s, MAX_LENGTH))[0, 2] for s in ([3, 1, 4], [9, 2, 4]))
        assert np.array_equal(one[:DIM], other[:DIM]) == alike
        assert not np.allclose(one[DIM:], other[DIM:])


def test_long_rows_are_scored_in_parts(monkeypatch):
    layer = checks.perturb(WassersteinAttention(DIM, HEADS, 0.0, True, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (2, 7, DIM))
    segments = jnp.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 2, 2]])
    whole = jax.jit(lambda x: layer(x, 1 + x**2, segments, None))(x)
    monkeypatch.setattr("models.architectures.stosa.QUERIES_AT_ONCE", 4)
    parts = jax.jit(lambda x: layer(x, 1 + x**2, segments, None))(x)
    for part, expected in zip(parts, whole, strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_number_of_parameters(num_blocks):
    n, d, length = NUM_ITEMS, DIM, MAX_LENGTH
    feed_forward = d * 4 * d + 4 * d + 4 * d * d + d + 2 * d
    block = 8 * (d * d + d) + 2 * d + 2 * feed_forward
    count = checks.count_parameters(make_model(num_blocks=num_blocks))
    assert count == 2 * (n + 1) * d + 2 * length * d + 2 * d + num_blocks * block
    if num_blocks == 1:
        assert checks.count_parameters(STOSA(n, rngs=nnx.Rngs(0))) == 2 * (n + 1) * 64 + 112_768


def test_initialisation_is_the_published_one():
    parameters = checks.by_path(nnx.state(STOSA(2000, rngs=nnx.Rngs(0)), nnx.Param))
    for path, value in parameters.items():
        if path.endswith(("kernel", "embedding")):
            error = 4 / np.sqrt(value.size)
            assert value.mean() == pytest.approx(0.01, abs=0.02 * error), path
            assert value.std() == pytest.approx(0.02, rel=error), path
        else:
            np.testing.assert_array_equal(value, float(path.endswith("scale")), err_msg=path)


def test_deviation_has_a_derivative_everywhere():
    x = jnp.array([-1e4, -30.0, -1.0, 0.0, 1.0, 1e6])
    expected = np.sqrt(elu(np.asarray(x, np.float64)) + 1)
    np.testing.assert_allclose(deviation(x), expected, rtol=1e-6, atol=1e-6)
    slope = jax.vmap(jax.grad(deviation))(x)
    assert np.isfinite(slope).all()
    np.testing.assert_allclose(
        slope[2:], [0.5 * np.exp(-0.5), 0.5, 0.5 / np.sqrt(2), 0.5 / np.sqrt(1e6 + 1)], rtol=1e-5
    )


def test_weights_are_squared_after_dropout():
    """Dropout keeps the mean of the weights, and so multiplies that of their squares by 1 / (1 - rate)."""
    rate = 0.5
    layer = checks.perturb(WassersteinAttention(DIM, HEADS, rate, True, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (1, 4, DIM))
    segments = jnp.ones((1, 4), jnp.int32)
    bias_mean, bias_covariance = (out.bias[...] for out in (layer.mean_out, layer.covariance_out))
    expected_mean, expected_covariance = layer(x, 1 + x**2, segments, None)

    def once(key):
        return layer(x, 1 + x**2, segments, key)

    mean, covariance = jax.jit(jax.vmap(once))(jax.random.split(jax.random.key(0), 20_000))
    np.testing.assert_allclose(mean.mean(0), expected_mean, atol=0.05)
    got, wanted = covariance.mean(0) - bias_covariance, (expected_covariance - bias_covariance) / (1 - rate)
    np.testing.assert_allclose(got, wanted, atol=0.05 * np.abs(wanted).max())
    assert np.abs(expected_mean - bias_mean).max() > 0.5


def test_dropout_is_used_in_training(packed):
    batch = packed.batch(0)
    for options in ({"attention_dropout_rate": 0.0}, {"dropout_rate": 0.0}):
        model = make_model(**options)
        dry, wet = (np.asarray(checks.encode(model, batch, key)) for key in (None, jax.random.key(0)))
        assert not np.allclose(dry[..., DIM:], wet[..., DIM:])
        # The mean comes straight from the embedding, which attention does not touch.
        assert np.allclose(dry[..., :DIM], wet[..., :DIM]) == ("dropout_rate" in options)


def test_every_loss(interactions, packed):
    assert set(CONFIG.losses) == {"bpr", "ce", "sampled-softmax"}
    checks.check_every_loss(make_model, CONFIG, packed, interactions, dead=DEAD)


def test_seeds_side_by_side(packed):
    checks.check_vmap(make_model, packed.batch(0))


def test_half_precision(packed):
    batch = packed.batch(0)
    filled = np.asarray(batch.segments) > 0
    vectors, expected = (
        np.asarray(checks.encode(make_model(encode_mean=True, dtype=dtype), batch))[filled]
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    assert vectors.dtype == np.float32
    assert (vectors != expected).any()
    np.testing.assert_allclose(vectors, expected, atol=0.05 * np.abs(expected).max())
    narrow = make_model(dtype=jnp.bfloat16)
    loss, gradient = checks.loss_and_gradient(narrow, CONFIG, batch, checks.OneNegative(NUM_ITEMS))
    assert np.isfinite(loss)
    assert all(np.isfinite(value).all() and value.dtype == np.float32 for value in gradient.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "bce"}, "loss must be one of bpr, ce, sampled-softmax with stosa, got 'bce'"),
        ({"pvn_weight": -0.1}, "pvn_weight must be at least 0, got -0.1"),
        ({"attention_dropout_rate": 1.0}, r"attention_dropout_rate must lie in \[0, 1\), got 1.0"),
        ({"num_heads": 3}, "num_heads must divide embedding_dim, got 3 and 8"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **options).checked()


def test_a_run(tmp_path):
    sizes = {"max_length": 8, "embedding_dim": 8, "num_heads": 2, "epochs": 2, "batch_size": 15, "eval_every": 1}
    checks.check_a_run(make_config("stosa", **sizes), tmp_path)


def test_both_tables_are_smoothed_each_by_itself(interactions):
    config = dataclasses.replace(CONFIG, batch_size=100)
    nodes = make_training_data(interactions, config).nodes
    assert nodes.groups == (("item_mean",), ("item_covariance",))
    assert list(make_stages("sevo-adamw", config, nodes))[1:3] == ["sevo item_mean", "sevo item_covariance"]


def test_presets():
    fields = {
        "dropout_hidden": "dropout_rate",
        "dropout_attention": "attention_dropout_rate",
        "num_layers": "num_blocks",
        "num_heads": "num_heads",
        "pvn_weight": "pvn_weight",
    }
    checks.check_presets("STOSA", fields)
