import csv
import itertools
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
import yaml
from flax import nnx

from models import presets
from models.architectures.mf_bpr import MFBPR, MFBPRConfig
from models.architectures.registry import config_from_dict, make_config, make_model
from models.checks import SAMPLED_LOSSES
from models.config import Loss
from models.data import Interactions
from models.feeds import NegativeSampler, PairBatch, Pairs
from models.graphs import smoothed_nodes
from models.objectives.losses import make_loss
from models.objectives.objective import training_loss
from models.training.optimizers import make_stages
from sevo_optax import graph, sevo
from tests.models.architectures import pairs_reference
from tests.sevo_optax import reference

PUBLISHED = Path(__file__).resolve().parents[3].parent / "shared" / "reference" / "hyperparameters.csv"
# Item 7 is in nobody's training data, users 1 and 3 have something in common with nobody.
SEQUENCES = [[1, 2, 3], [5, 6], [3, 1, 4], [6, 5, 6], [2, 4]]
INTERACTIONS = Interactions.from_sequences(SEQUENCES, num_items=7)
# The last pair fills up the batch; user 0 comes twice.
USERS, POSITIVES, NEGATIVES = [0, 2, 0, 4, 1, 0], [1, 4, 3, 2, 6, 0], [7, 2, 4, 7, 3, 5]
BATCH = PairBatch(jnp.array(USERS), jnp.array(POSITIVES))
KEY = jax.random.key(3)


class Fixed:
    """Draws what it is told to draw, and no item for other users."""

    num_items = 7

    def sample(self, key, users):
        # No assertion: where the loss is compiled, users have no values yet.
        return jnp.where((users == jnp.array(USERS)).all(), jnp.array(NEGATIVES), 0)


def build(kind=MFBPR, **options):
    options = {"embedding_dim": 4, "init_std": 0.7} | options
    return kind(5, 7, **options, rngs=nnx.Rngs(0))


def loss_and_gradient(model, loss="bpr", context=None, sampler=None, batch=BATCH):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def value(params):
        model = nnx.merge(graphdef, params, rest)
        sampled = {"num_negatives": 3} if loss in SAMPLED_LOSSES else {}
        config = make_config("mf-bpr", loss=loss, **sampled)
        return training_loss(model, make_loss(config), batch, context or {}, sampler or Fixed(), KEY)

    return jax.jit(jax.value_and_grad(value))(params)


def tables(tree):
    return tree["user_embedding"]["embedding"][...], tree["item_embedding"]["embedding"][...]


def test_parameters():
    model = make_model(make_config("mf-bpr", embedding_dim=16), num_users=300, num_items=200, seed=1)
    leaves = jax.tree.leaves(nnx.state(model))
    assert sum(leaf.size for leaf in leaves) == (300 + 200 + 1) * 16
    for leaf in leaves:
        assert leaf.dtype == jnp.float32
        assert scipy.stats.kstest(np.ravel(leaf), scipy.stats.norm(0, 1e-4).cdf).pvalue > 0.01
    users, items = tables(nnx.state(model))
    assert not np.allclose(users[:200], items[:200])


def test_scores_are_inner_products():
    model = build()
    users, items = (np.asarray(table, np.float64) for table in tables(nnx.state(model)))
    represented = model.represent({})
    vectors = model.encode(PairBatch(jnp.array([4, 0]), jnp.zeros(2, jnp.int32)), represented).vectors
    expected = [[sum(users[u] * item) for item in items] for u in (4, 0)]
    np.testing.assert_allclose(model.scores(vectors, represented), expected, rtol=1e-5)


def test_loss_and_gradient_equal_the_equations():
    model = build()
    value, gradient = loss_and_gradient(model)
    expected, *gradients = pairs_reference.bpr(*tables(nnx.state(model)), USERS, POSITIVES, NEGATIVES)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for found, wanted in zip(tables(gradient), gradients, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)


def test_a_user_depends_on_nobody_else():
    model = build()
    before = model.encode(BATCH, model.represent({})).vectors
    users = model.user_embedding.embedding
    users[...] = jnp.where(jnp.arange(5)[:, None] == 2, users[...], 9.0)
    after = model.encode(BATCH, model.represent({})).vectors
    np.testing.assert_array_equal(before[1], after[1])
    assert (before[0] != after[0]).all()


def test_pairs_are_a_user_and_then_one_of_its_items():
    """Users without regard to how many items they have; an epoch has as many pairs as there are interactions."""
    lengths = (1, 4, 0, 30, 2)
    data = Interactions.from_sequences([range(u * 40 + 1, u * 40 + 1 + n) for u, n in enumerate(lengths)])
    pairs = Pairs.from_interactions(data, batch_size=5)
    draws = []
    for seed in range(400):
        drawn = pairs.shuffle(jax.random.key(seed))
        batches = [drawn.batch(i) for i in range(drawn.num_batches)]
        users, targets = (np.concatenate([getattr(x, name) for x in batches]) for name in ("users", "targets"))
        counted = targets > 0
        assert counted.sum() == sum(lengths) == pairs.num_tokens
        assert len(targets) == 40
        draws.append(np.stack([users[counted], targets[counted]]))
    users, targets = np.concatenate(draws, axis=1)
    assert (users == (targets - 1) // 40).all()
    owners = [u for u, n in enumerate(lengths) if n]
    assert sorted(set(users.tolist())) == owners
    assert scipy.stats.chisquare(np.bincount(users)[owners]).pvalue > 1e-3
    for user in owners:
        mine = targets[users == user] - (user * 40 + 1)
        assert scipy.stats.chisquare(np.bincount(mine, minlength=lengths[user])).pvalue > 1e-3 or lengths[user] == 1
        assert set(mine.tolist()) == set(range(lengths[user]))


@pytest.mark.parametrize("loss", get_args(Loss))
def test_every_loss_trains_both_tables(loss):
    sampler = NegativeSampler.from_interactions(INTERACTIONS)
    batch = Pairs.from_interactions(INTERACTIONS, batch_size=13).shuffle(KEY).batch(0)
    value, gradient = loss_and_gradient(build(), loss, sampler=sampler, batch=batch)
    assert np.isfinite(value)
    for found in tables(gradient):
        assert np.isfinite(found).all()
        assert (found != 0).any()


def test_half_precision():
    model, wide = build(dtype="bfloat16"), build()
    encoded = model.encode(BATCH, model.represent({}), candidates=BATCH.targets)
    assert encoded.vectors.dtype == encoded.rows.dtype == jnp.bfloat16
    (value, gradient), (expected, exact) = loss_and_gradient(model), loss_and_gradient(wide)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-2)
    for found, wanted in zip(tables(gradient), tables(exact), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, wanted, atol=1e-2)


def test_two_seeds_side_by_side():
    models = [make_model(make_config("mf-bpr", embedding_dim=4), num_users=5, num_items=7, seed=s) for s in (0, 1)]
    graphdef, _ = nnx.split(models[0])
    states = [nnx.state(model) for model in models]

    def value(state):
        config = make_config("mf-bpr")
        return training_loss(nnx.merge(graphdef, state), make_loss(config), BATCH, {}, Fixed(), KEY)

    grad = jax.value_and_grad(value)
    together = jax.jit(jax.vmap(grad))(jax.tree.map(lambda *x: jnp.stack(x), *states))
    for seed, state in enumerate(states):
        alone = jax.jit(grad)(state)
        jax.tree.map(lambda a, b, s=seed: np.testing.assert_allclose(a[s], b, rtol=1e-5), together, alone)


def test_tables_are_smoothed_over_users_and_items_in_this_order():
    model = build()
    (group,) = model.node_sets["users+items"]
    weights = graph.user_item(INTERACTIONS.users, INTERACTIONS.items, 5, 8)
    params = nnx.state(model, nnx.Param)
    tx = sevo(weights, group, beta=0.6, num_layers=2)
    smoothed, _ = tx.update(params, tx.init(params), params)
    matrix = 0.6 * pairs_reference.adjacency(INTERACTIONS)
    series = (np.eye(13) + matrix + matrix @ matrix) / (1 + 0.6 + 0.6**2)
    expected = series @ np.concatenate(tables(params))
    np.testing.assert_allclose(np.concatenate(tables(smoothed)), expected, rtol=1e-4, atol=1e-6)
    assert model.node_sets["items"] == (("item_embedding",),)


@pytest.mark.parametrize("kind", ["item-item", "user-item", "adam"])
def test_an_arm_updates_each_table_as_published(kind):
    """Items alone are smoothed and corrected over items; both together over users and items; nothing by Adam."""
    options = {"optimizer": "adam"} if kind == "adam" else {"graph": (kind,)}
    config = make_config("mf-bpr", learning_rate=0.1, weight_decay=0.2, beta=0.6, **options)
    model = build()
    params = nnx.state(model, nnx.Param)
    rng = np.random.default_rng(0)
    # Rows that are idle in every second step or so.
    gradients = [[rng.normal(size=(rows, 4)) * (rng.random((rows, 1)) < 0.5) for rows in (5, 8)] for _ in range(4)]
    tx = optax.named_chain(*make_stages(config.optimizer, config, smoothed_nodes(INTERACTIONS, config, model)).items())
    found, state = params, tx.init(params)
    for users, items in gradients:
        step = jax.tree.map(jnp.asarray, params)
        step["user_embedding"]["embedding"][...] = jnp.asarray(users, jnp.float32)
        step["item_embedding"]["embedding"][...] = jnp.asarray(items, jnp.float32)
        updates, state = tx.update(step, state, found)
        found = optax.apply_updates(found, updates)

    def smoothing(matrix):
        return lambda x: reference.smooth(x, matrix, 0.6, 3)

    def last(trajectory, table, of, psi):
        stacked = np.stack([np.asarray(of(gradient), np.float64) for gradient in gradients])
        return trajectory(np.asarray(table, np.float64), stacked, psi, 0.1, 0.9, 0.999, 0.2)[-1]

    users, items = tables(params)
    if kind == "user-item":
        psi = smoothing(pairs_reference.adjacency(INTERACTIONS))
        expected = last(reference.adamw_trajectory, np.concatenate([users, items]), np.concatenate, psi)
        expected = expected[:5], expected[5:]
    elif kind == "item-item":
        follow = np.zeros((8, 8))
        for sequence in SEQUENCES:
            for left, right in itertools.pairwise(sequence):
                follow[left, right] += 1
                follow[right, left] += 1
        expected = (
            last(plain_adamw, users, lambda gradient: gradient[0], None),
            last(
                reference.adamw_trajectory,
                items,
                lambda gradient: gradient[1],
                smoothing(reference.normalize(follow)),
            ),
        )
    else:
        expected = [
            last(reference.adam_trajectory, table, lambda gradient, i=i: gradient[i], lambda x: x)
            for i, table in enumerate((users, items))
        ]
    for ours, theirs in zip(tables(found), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def plain_adamw(params, grads, psi, lr, b1, b2, weight_decay):
    """AdamW without the correction for idle rows."""
    out = []
    for direction in reference.adam_directions(grads, b1, b2):
        params = params - lr * direction - lr * weight_decay * params
        out.append(params)
    return np.stack(out)


def read(preset):
    return config_from_dict(yaml.safe_load((presets.FOLDER / f"{preset}.yaml").read_text()))


def test_the_defaults_are_the_preset_for_beauty():
    assert read("mf-bpr-beauty") == MFBPRConfig()


@pytest.mark.parametrize("dataset", ["beauty", "toys", "tools", "ml-1m"])
@pytest.mark.parametrize("kind", ["item-item", "user-item", "adam"])
def test_presets_are_the_published_settings(kind, dataset):
    if not PUBLISHED.exists():
        pytest.skip(f"the published settings are not beside this clone: {PUBLISHED.name}")
    role = ("plain-table3-inferred", "") if kind == "adam" else ("sevo", kind)
    with PUBLISHED.open() as file:
        (row,) = [
            row
            for row in csv.DictReader(file)
            if (row["model"], row["dataset"], row["role"], row["graph"]) == ("MF-BPR", dataset, *role)
        ]
    config = read({"item-item": "mf-bpr", "user-item": "mf-bpr-user-item", "adam": "mf-bpr-adam"}[kind] + f"-{dataset}")
    names = {"lr": "learning_rate", "beta1": "b1", "beta2": "b2"} | {
        name: name for name in ("weight_decay", "epochs", "batch_size", "embedding_dim")
    }
    if kind != "adam":
        names |= {"beta": "beta", "L": "num_layers"}
        assert config.graph == (kind,)
    if kind == "item-item":
        names |= {"K_maxlen4graph": "graph_max_length", "H": "max_hops"}
    assert {ours: getattr(config, ours) for ours in names.values()} == {
        ours: float(row[theirs]) for theirs, ours in names.items()
    }
    assert config.optimizer == ("adam" if kind == "adam" else "sevo-adamw")
    assert config.loss == "bpr"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_std": 0.0}, "init_std must be larger than 0, got 0.0"),
        ({"optimizer": "closed-form"}, "optimizer must be one of adamw, .* with mf-bpr, got 'closed-form'"),
        ({"max_length": 50}, "unknown option max_length; mf-bpr has"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_config("mf-bpr", **options)
