import itertools
import re
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.architectures.base import Encoded, Recommender
from models.architectures.bert4rec import BERT4Rec
from models.architectures.sasrec import SASRec
from models.config import Loss, LossConfig
from models.data import Interactions, drifting_interests
from models.feeds import Batch, NegativeSampler, pack
from models.objectives import losses
from models.objectives.losses import Loss as TrainingLoss
from models.objectives.losses import binary_cross_entropy, bpr, cross_entropy, gbce, make_loss, sampled_softmax
from models.objectives.objective import training_loss
from tests.models.test_sasrec import MAX_LENGTH, perturb

NUM_ITEMS = 25
NUM_NEGATIVES = 12
KEY = jax.random.key(3)
KINDS = {"sasrec": (SASRec, {}), "bert4rec": (BERT4Rec, {}), "tied": (BERT4Rec, {"tie_output": True})}


@pytest.fixture(scope="module")
def interactions():
    return drifting_interests(num_users=30, num_items=NUM_ITEMS, num_groups=4, mean_length=7, seed=1)


@pytest.fixture(scope="module")
def unseen(interactions):
    return NegativeSampler.from_interactions(interactions, negative_power=0.75)


def make_model(kind, **options):
    options = {"max_length": MAX_LENGTH, "embedding_dim": 8, "num_blocks": 0, "num_heads": 2} | options
    cls, more = KINDS[kind]
    return perturb(cls(NUM_ITEMS, **options, **more, rngs=nnx.Rngs(0)))


def first_batch(model, interactions):
    return pack(interactions, max_length=MAX_LENGTH, batch_size=100, with_targets=model.predicts_next).batch(0)


def softplus(x):
    return np.log1p(np.exp(x)) if isinstance(x, np.ndarray) else jnp.log1p(jnp.exp(x))


def apply(loss, model, batch, sampler, key, *, deterministic=False, **options):
    """A loss of a model's queries on a batch."""
    loss = TrainingLoss(partial(loss, **options), against_unseen=loss in (binary_cross_entropy, bpr))
    return training_loss(model, loss, batch, {}, sampler, key, deterministic=deterministic)


class Formula:
    """Every loss written down over a whole matrix of scores, which NumPy and JAX both understand."""

    def __init__(self, model, batch, unseen):
        self.unseen = unseen
        self.negative_key = jax.random.split(KEY)[0]
        self.seen = model.training_batch(batch, jax.random.fold_in(KEY, 2))
        targets = np.asarray(self.seen.targets).ravel()
        (self.places,) = np.nonzero(targets)
        self.targets = targets[self.places]
        # Where the model says that targets are few, tokens are counted among those that have one.
        self.room = model.max_num_targets(targets.size)
        few = self.room < targets.size
        self.numbers = np.arange(len(self.places)) if few else self.places
        self.token = np.arange(len(self.places))
        self.probabilities = np.exp(np.asarray(unseen.proposal.log_probability(jnp.arange(NUM_ITEMS + 1)), np.float64))

    def scores(self, model, xp):
        hidden = model(self.seen)
        table, bias = model.items()
        if xp is np:
            hidden, table, bias = (np.asarray(x, np.float64) for x in (hidden, table, bias))
        return hidden.reshape(-1, hidden.shape[-1])[self.places] @ table.T + bias

    @jax.ensure_compile_time_eval()
    def unseen_item(self):
        users = np.asarray(self.seen.users).ravel()
        few = len(self.numbers) and (self.numbers == np.arange(len(self.places))).all()
        sample = jax.jit(self.unseen.sample)
        if not few:
            return np.asarray(sample(self.negative_key, jnp.asarray(users)))[self.places]
        # Queries without a target stand behind the others, and are user 0's.
        chosen = np.pad(users[self.places], (0, self.room - len(self.places)))
        return np.asarray(sample(self.negative_key, jnp.asarray(chosen)))[: len(self.places)]

    @jax.ensure_compile_time_eval()
    def drawn(self, per_position):
        sample = jax.jit(partial(self.unseen.proposal.sample, shape=(NUM_NEGATIVES,)))
        if not per_position:
            return np.broadcast_to(sample(self.negative_key), (len(self.places), NUM_NEGATIVES))
        return np.stack([sample(jax.random.fold_in(self.negative_key, number)) for number in self.numbers])

    def bce(self, scores, xp):
        other = scores[self.token, self.unseen_item()]
        return xp.mean(softplus(-scores[self.token, self.targets]) + softplus(other))

    def bpr(self, scores, xp):
        return xp.mean(softplus(scores[self.token, self.unseen_item()] - scores[self.token, self.targets]))

    def ce(self, scores, xp):
        normalizer = xp.log(xp.sum(xp.exp(scores[:, 1 : NUM_ITEMS + 1]), axis=1))
        return xp.mean(normalizer - scores[self.token, self.targets])

    def sampled_softmax(self, scores, xp, per_position=False, logq_correction=True):
        drawn = self.drawn(per_position)
        other = scores[self.token[:, None], drawn]
        if logq_correction:
            other = other - np.log(NUM_NEGATIVES * self.probabilities[drawn])
        hit = drawn == self.targets[:, None]
        assert hit.any()
        assert not hit.all(axis=1).any()
        target = scores[self.token, self.targets]
        return xp.mean(xp.log(xp.exp(target) + xp.sum(xp.exp(other) * ~hit, axis=1)) - target)

    def gbce(self, scores, xp, per_position=False, t=0.75):
        drawn = self.drawn(per_position)
        alpha = NUM_NEGATIVES / (NUM_ITEMS - 1)
        beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
        right = 1 / (1 + xp.exp(-scores[self.token, self.targets]))
        wrong = 1 - 1 / (1 + xp.exp(-scores[self.token[:, None], drawn]))
        counted = drawn != self.targets[:, None]
        return -xp.mean(xp.log(right**beta) + xp.sum(xp.log(wrong) * counted, axis=1)) / (NUM_NEGATIVES + 1)


CASES = {
    "bce": (binary_cross_entropy, "bce", {}),
    "bpr": (bpr, "bpr", {}),
    "ce": (cross_entropy, "ce", {}),
    "softmax": (sampled_softmax, "sampled_softmax", {}),
    "softmax-uncorrected": (sampled_softmax, "sampled_softmax", {"logq_correction": False}),
    "softmax-per-position": (sampled_softmax, "sampled_softmax", {"per_position": True}),
    "gbce": (gbce, "gbce", {}),
    "gbce-per-position": (gbce, "gbce", {"per_position": True, "t": 0.3}),
}


@pytest.mark.parametrize(
    ("kind", "case"), [*itertools.product(("sasrec", "bert4rec"), CASES), ("tied", "bce"), ("tied", "ce")]
)
def test_value_and_gradient_are_the_formula(interactions, unseen, kind, case):
    _, name, options = CASES[case]
    loss, ours_options = case_options(case, deterministic=True)
    model = make_model(kind)
    batch = first_batch(model, interactions)
    formula = Formula(model, batch, unseen)
    graphdef, params = nnx.split(model, nnx.Param)

    def ours(params):
        return apply(loss, nnx.merge(graphdef, params), batch, unseen, KEY, **ours_options)

    def naive(params):
        return getattr(formula, name)(formula.scores(nnx.merge(graphdef, params), jnp), jnp, **options)

    value, gradient = jax.jit(jax.value_and_grad(ours))(params)
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(getattr(formula, name)(formula.scores(model, np), np, **options), rel=1e-5)
    expected = jax.jit(jax.grad(naive))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6), gradient, expected)


@pytest.mark.parametrize(
    ("kind", "loss", "expected"),
    [
        (SASRec, binary_cross_entropy, (1.4502853, 1.4893457)),
        (SASRec, cross_entropy, (3.5026340, 3.5472331)),
        (BERT4Rec, binary_cross_entropy, (1.3840523, 1.3889343)),
        (BERT4Rec, cross_entropy, (3.2224576, 3.2243214)),
    ],
)
def test_random_streams_stay(interactions, unseen, kind, loss, expected):
    """The published curves were drawn with these masks, negatives and dropout."""
    options = {"max_length": 9, "embedding_dim": 8, "num_blocks": 1, "num_heads": 2, "dropout_rate": 0.5}
    model = kind(NUM_ITEMS, **options, rngs=nnx.Rngs(0))
    batch = first_batch(model, interactions)
    graphdef, params = nnx.split(model)
    value = jax.jit(lambda key: apply(loss, nnx.merge(graphdef, params), batch, unseen, key))
    got = [float(value(jax.random.key(seed))) for seed in (0, 1)]
    assert got == pytest.approx(expected, rel=1e-6)


class Fixed(Recommender):
    """Hidden vectors and an output layer as given, one row of tokens."""

    def __init__(self, hidden, table, bias):
        self.hidden, self.table, self.bias = (nnx.Param(jnp.asarray(x)) for x in (hidden, table, bias))

    def max_num_targets(self, num_tokens):
        return num_tokens

    def encode(self, batch, represented=None, key=None, candidates=None):
        vectors = self.hidden[...][None]
        if candidates is None:
            return Encoded(vectors)
        return Encoded(vectors, self.table[...][candidates], self.bias[...][candidates])

    def items(self, represented=None):
        return self.table[...], self.bias[...]


def fixed(targets, scale=1.0, dim=6, dtype=jnp.float32):
    """A model and a batch whose tokens are users 0, 1, … with the given targets."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(scale * rng.normal(size=(len(targets), dim)), dtype)
    table = np.asarray(rng.normal(size=(NUM_ITEMS + 1, dim)), np.float32)
    tokens = jnp.arange(len(targets))[None]
    batch = Batch(*[tokens] * 5, targets=jnp.asarray([targets], jnp.int32))
    return Fixed(hidden, table, np.zeros(NUM_ITEMS + 1, np.float32)), batch


def value_and_gradient(case, model, batch, unseen, **options):
    """The loss and its gradient by parameter; ``case`` is a loss, or the name of one and its options."""
    loss, options = case_options(case, **options) if isinstance(case, str) else (case, options)
    graphdef, params = nnx.split(model, nnx.Param)

    def f(params, batch, unseen):
        return apply(loss, nnx.merge(graphdef, params), batch, unseen, KEY, **options)

    value, gradient = jax.jit(jax.value_and_grad(f))(params, batch, unseen)
    return value, {name: leaf[...] for name, leaf in gradient.items()}


def case_options(case, **options):
    loss, _, more = CASES[case]
    sizes = {"num_negatives": NUM_NEGATIVES} if loss in (sampled_softmax, gbce) else {}
    return loss, sizes | more | options


@pytest.mark.parametrize("case", ["ce", "softmax", "softmax-per-position"])
def test_parts_change_nothing(unseen, case):
    model, batch = fixed([3, 7, 0, 11, 25, 1, 2])
    bound = "scores_at_once" if case == "ce" else "numbers_at_once"
    whole, *parts = (value_and_gradient(case, model, batch, unseen, **{bound: n}) for n in (2**24, 250, 1))
    for part in parts:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), part, whole)


@pytest.mark.parametrize("power", [0.0, 0.75])
def test_the_corrected_sample_estimates_the_whole_softmax(interactions, power):
    unseen = NegativeSampler.from_interactions(interactions, negative_power=power)
    model, batch = fixed([3, 7, 11, 25])
    whole = float(apply(cross_entropy, model, batch, unseen, KEY))
    sample = partial(apply, sampled_softmax, model, batch, unseen, KEY, num_negatives=100_000)
    assert float(sample()) == pytest.approx(whole, abs=0.01)
    assert float(sample(logq_correction=False)) > whole + 1


@pytest.mark.parametrize("loss", [sampled_softmax, gbce])
def test_one_item_has_nothing_to_compete_with(loss):
    model, batch = fixed([1, 1])
    unseen = NegativeSampler.from_interactions(Interactions.from_sequences([[1, 1]]), drawn=False)
    value, gradient = value_and_gradient(loss, model, batch, unseen, num_negatives=4)
    positive = np.asarray(model.hidden[...]) @ np.asarray(model.table[...])[1]
    # The softmax of one item is 1; what is left of gBCE is the target's part.
    expected = 0.0 if loss is sampled_softmax else np.mean(softplus(-positive)) / 5
    assert float(value) == pytest.approx(expected, abs=1e-6)
    assert all(np.isfinite(x).all() for x in gradient.values())


class TestGbce:
    def test_without_calibration_it_is_binary_cross_entropy(self, unseen):
        model, batch = fixed([3, 7])
        formula = Formula(model, batch, unseen)
        scores = formula.scores(model, np)
        got = apply(gbce, model, batch, unseen, KEY, num_negatives=NUM_NEGATIVES, t=0.0)
        drawn = formula.drawn(False)
        losses = np.where(drawn != formula.targets[:, None], softplus(scores[formula.token[:, None], drawn]), 0)
        losses = (softplus(-scores[formula.token, formula.targets]) + losses.sum(1)) / (NUM_NEGATIVES + 1)
        assert float(got) == pytest.approx(losses.mean(), rel=1e-6)

    def test_is_calibrated(self, unseen):
        """At its minimum, the sigmoid of a score is the probability of the item (Theorem 5.1 of the paper)."""
        wanted = np.random.default_rng(0).dirichlet(np.ones(NUM_ITEMS))
        alpha = NUM_NEGATIVES / (NUM_ITEMS - 1)
        model, batch = fixed([3])
        score = np.asarray(model.hidden[...])[0] @ np.asarray(model.table[...])[3]

        def measured_beta(t):
            # Draws of the target are passed over: what moves its bias is the positive part alone.
            _, gradient = value_and_gradient("gbce", model, batch, unseen, t=t)
            return float(gradient["bias"][3]) * (NUM_NEGATIVES + 1) / (jax.nn.sigmoid(score) - 1)

        def expected_loss(scores, beta):
            loss = beta * wanted * jax.nn.softplus(-scores) + alpha * (1 - wanted) * jax.nn.softplus(scores)
            return jnp.sum(loss)

        calibrated = jnp.log(wanted / (1 - wanted))
        assert np.abs(jax.grad(expected_loss)(calibrated, measured_beta(1.0))).max() < 1e-6
        assert np.abs(jax.grad(expected_loss)(calibrated, measured_beta(0.0))).max() > 1e-2

    def test_as_many_draws_as_items(self, unseen):
        model, batch = fixed([3, 7])
        none, full = (float(apply(gbce, model, batch, unseen, KEY, num_negatives=100, t=t)) for t in (0.0, 1.0))
        assert none == full

    @pytest.mark.parametrize("scale", [1e4, 1e18])
    def test_large_scores(self, unseen, scale):
        model, batch = fixed([3, 7, 0, 25], scale)
        value, gradient = value_and_gradient("gbce", model, batch, unseen)
        assert np.isfinite(value)
        assert all(np.isfinite(x).all() for x in gradient.values())


@pytest.mark.parametrize("case", CASES)
def test_tokens_without_a_target_do_not_count(unseen, case):
    model, batch = fixed([3, 7, 0, 0])
    value, gradient = value_and_gradient(case, model, batch, unseen)
    assert value > 0
    assert np.abs(gradient["hidden"][:2]).min() > 0
    assert not gradient["hidden"][2:].any()
    louder = Fixed(model.hidden[...].at[2:].multiply(9), model.table[...], model.bias[...])
    assert value_and_gradient(case, louder, batch, unseen)[0] == value
    none = batch._replace(targets=jnp.zeros_like(batch.targets))
    assert value_and_gradient(case, model, none, unseen)[0] == 0


@pytest.mark.parametrize("case", CASES)
def test_half_precision(unseen, case):
    """Hidden vectors may be bfloat16: the loss and the tables' gradients are float32, and close."""
    (exact, wanted), (rough, got) = (
        value_and_gradient(case, *fixed([3, 7, 11, 25], dtype=dtype), unseen) for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rough.dtype == got["table"].dtype == got["bias"].dtype == jnp.float32
    assert got["hidden"].dtype == jnp.bfloat16
    assert float(rough) == pytest.approx(float(exact), rel=0.01)
    for name in wanted:
        np.testing.assert_allclose(got[name].astype(jnp.float32), wanted[name], rtol=0.03, atol=0.01)


def arrays(loss, num_tokens, unseen, **options):
    """The shapes of float32 arrays in the program of a loss and its gradient, with their numbers of entries."""
    model, batch = fixed([1 + i % NUM_ITEMS for i in range(num_tokens)])
    graphdef, params = nnx.split(model, nnx.Param)

    def f(params):
        return apply(loss, nnx.merge(graphdef, params), batch, unseen, KEY, **options)

    text = jax.jit(jax.grad(f)).lower(params).as_text()
    shapes = {tuple(map(int, shape.split("x")[:-1])) for shape in re.findall(r"tensor<((?:\d+x)+)f32>", text)}
    return {shape: int(np.prod(shape)) for shape in shapes}


class TestMemory:
    def test_whole_softmax(self, unseen):
        whole = arrays(cross_entropy, 100, unseen)
        assert max(whole.values()) == 100 * NUM_ITEMS
        parts = arrays(cross_entropy, 100, unseen, scores_at_once=10 * NUM_ITEMS)
        assert (NUM_ITEMS, 10) in parts
        assert max(parts.values()) == 100 * 6  # hidden vectors, of 6 entries

    def test_sample(self, unseen):
        options = {"num_negatives": 50}
        assert arrays(gbce, 100, unseen, **options)[100, 50]
        parts = arrays(gbce, 100, unseen, **options, numbers_at_once=500)
        assert (10, 50) in parts
        assert max(parts.values()) == 100 * 6

    def test_sample_per_position(self, unseen):
        options = {"num_negatives": 50, "per_position": True}
        assert arrays(sampled_softmax, 100, unseen, **options)[100, 50, 6]
        parts = arrays(sampled_softmax, 100, unseen, **options, numbers_at_once=600)
        assert (2, 50, 6) in parts
        assert max(parts.values()) == 2 * 50 * 6


class TestLogSumExp:
    """The part of the whole softmax with a backward pass of its own, against the direct formula."""

    def arguments(self, scale=1.0, dtype=jnp.float32):
        rng = np.random.default_rng(0)
        shapes = [(50, 8), (33, 8), (33,)]
        hidden, table, bias = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
        return scale * hidden, table, bias, jnp.asarray(rng.random(50), dtype)

    @staticmethod
    def direct(hidden, table, bias, weights):
        return weights @ jax.nn.logsumexp(hidden @ table.T + bias, axis=-1)

    @pytest.mark.parametrize("scale", [0.0, 1.0, 1e4, 1e30])
    @pytest.mark.parametrize("tokens_at_once", [1, 7, 50, 100])
    def test_value_and_gradient(self, scale, tokens_at_once):
        arguments = self.arguments(scale)
        got = jax.value_and_grad(losses._log_sum_exp, range(4))(*arguments, tokens_at_once)
        expected = jax.value_and_grad(self.direct, range(4))(*arguments)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))

    def test_double_precision(self, x64):
        arguments = self.arguments(dtype=jnp.float64)
        got = jax.value_and_grad(losses._log_sum_exp, range(4))(*arguments, 9)
        expected = jax.value_and_grad(self.direct, range(4))(*arguments)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)

    def test_scaled_and_added_to(self):
        """The cotangent is not always one."""
        arguments = self.arguments()
        got = jax.grad(lambda *x: 3 * losses._log_sum_exp(*x, 9) ** 2)(*arguments)
        expected = jax.grad(lambda *x: 3 * self.direct(*x) ** 2)(*arguments)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["ce", "softmax-per-position"])
def test_several_seeds_at_once(unseen, case):
    loss, options = case_options(case)
    model, batch = fixed([3, 7, 11, 25])
    graphdef, params = nnx.split(model, nnx.Param)
    params = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    keys = jax.random.split(KEY, 2)

    @jax.value_and_grad
    def f(params, key):
        return apply(loss, nnx.merge(graphdef, params), batch, unseen, key, **options)

    together = jax.jit(jax.vmap(f))(params, keys)
    alone = jax.jit(lambda params, keys: jax.lax.map(lambda both: f(*both), (params, keys)))(params, keys)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), together, alone)


class TestMakeLoss:
    @pytest.mark.parametrize(
        ("name", "loss", "options"),
        [
            ("bce", binary_cross_entropy, {}),
            ("ce", cross_entropy, {}),
            ("bpr", bpr, {}),
            ("sampled-softmax", sampled_softmax, {"per_position": True, "logq_correction": False}),
            ("gbce", gbce, {"per_position": True, "t": 0.2}),
        ],
    )
    def test_options_arrive(self, name, loss, options):
        made = make_loss(
            LossConfig(loss=name, num_negatives=7, negatives="per-position", logq_correction=False, gbce_t=0.2)
        )
        if options:
            assert (made.function.func, made.function.keywords) == (loss, options | {"num_negatives": 7})
            default = make_loss(LossConfig(loss=name)).function.keywords
            assert (default["num_negatives"], default["per_position"]) == (256, False)
        else:
            assert made.function is loss

    def test_every_name(self):
        for name in get_args(Loss):
            assert callable(make_loss(LossConfig(loss=name)).function)

    @pytest.mark.parametrize("loss", ["hinge", None])
    def test_names_the_choices(self, loss):
        with pytest.raises(ValueError, match=f"loss must be one of bce, ce, sampled-softmax, gbce, bpr, got {loss!r}"):
            make_loss(LossConfig(loss=loss))

    def test_names_the_ways_to_draw(self):
        with pytest.raises(ValueError, match="negatives must be one of shared, per-position, got 'mine'"):
            make_loss(LossConfig(loss="gbce", negatives="mine"))
