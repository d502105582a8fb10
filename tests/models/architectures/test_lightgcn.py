import csv
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from models.architectures.lightgcn import LightGCN, LightGCNConfig
from models.architectures.registry import make_config, make_model
from models.config import Loss
from models.feeds import NegativeSampler, PairBatch, Pairs
from models.objectives.losses import make_loss
from models.objectives.objective import training_loss
from tests.models.architectures import pairs_reference
from tests.models.architectures.test_mf_bpr import (
    BATCH,
    INTERACTIONS,
    KEY,
    NEGATIVES,
    POSITIVES,
    PUBLISHED,
    USERS,
    Fixed,
    build,
    loss_and_gradient,
    read,
    tables,
)

CONTEXT = LightGCN.make_context(INTERACTIONS, LightGCNConfig())
EVERYBODY = PairBatch(jnp.arange(5), jnp.zeros(5, jnp.int32))


@pytest.mark.parametrize("init_std", [1e-4, 0.1])
def test_parameters(init_std):
    config = make_config("lightgcn", embedding_dim=16, init_std=init_std)
    model = make_model(config, num_users=300, num_items=200, seed=1)
    leaves = jax.tree.leaves(nnx.state(model))
    assert sum(leaf.size for leaf in leaves) == (300 + 200 + 1) * 16
    for leaf in leaves:
        assert scipy.stats.kstest(np.ravel(leaf), scipy.stats.norm(0, init_std).cdf).pvalue > 0.01


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_scores_are_inner_products_of_mean_propagated_rows(num_layers):
    model = build(LightGCN, propagation_layers=num_layers)
    mean = pairs_reference.propagation(pairs_reference.adjacency(INTERACTIONS), num_layers)
    final = mean @ np.concatenate(tables(nnx.state(model))).astype(np.float64)
    represented = model.represent(CONTEXT)
    scores = model.scores(model.encode(EVERYBODY, represented).vectors, represented)
    np.testing.assert_allclose(scores, final[:5] @ final[5:].T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("l2_weight", [0.0, 0.3])
def test_loss_and_gradient_equal_the_equations(l2_weight):
    model = build(LightGCN, l2_weight=l2_weight)
    value, gradient = loss_and_gradient(model, context=CONTEXT)
    mean = pairs_reference.propagation(pairs_reference.adjacency(INTERACTIONS), 3)
    expected, *gradients = pairs_reference.bpr(
        *tables(nnx.state(model)), USERS, POSITIVES, NEGATIVES, mean=mean, l2_weight=l2_weight
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, wanted in zip(tables(gradient), gradients, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def products(jaxpr):
    """How often the library's sparse product is called."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "sevo_propagate"
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            count += products(inner) if hasattr(inner, "eqns") else 0
    return count


def test_a_step_takes_two_products_a_layer_and_scoring_one():
    model = build(LightGCN, propagation_layers=3)
    graphdef, state = nnx.split(model)

    def value(state, context):
        return training_loss(
            nnx.merge(graphdef, state), make_loss(make_config("lightgcn")), BATCH, context, Fixed(), KEY
        )

    def scores(state, context):
        model = nnx.merge(graphdef, state)
        represented = model.represent(context)
        return [model.scores(model.encode(EVERYBODY, represented).vectors, represented) for _ in range(4)]

    step = jax.make_jaxpr(jax.grad(value))(state, CONTEXT)
    assert products(step.jaxpr) == 6
    assert products(jax.make_jaxpr(scores)(state, CONTEXT).jaxpr) == 3
    # The graph is an argument: no constant is of its size.
    assert all(np.size(constant) < CONTEXT["adjacency"].nse for constant in step.consts)


def test_users_without_a_path_between_them_do_not_matter():
    """Users 1 and 3 with items 5 and 6 are a component of their own."""
    model = build(LightGCN)
    before = model.encode(EVERYBODY, model.represent(CONTEXT)).vectors
    rows = model.item_embedding.embedding
    rows[...] = rows[...].at[jnp.array([5, 6])].set(9.0)
    after = model.encode(EVERYBODY, model.represent(CONTEXT)).vectors
    apart = np.array([1, 3])
    np.testing.assert_array_equal(np.delete(before, apart, axis=0), np.delete(after, apart, axis=0))
    assert (before[apart] != after[apart]).all()


@pytest.mark.parametrize("loss", get_args(Loss))
def test_every_loss_trains_both_tables(loss):
    sampler = NegativeSampler.from_interactions(INTERACTIONS)
    batch = Pairs.from_interactions(INTERACTIONS, batch_size=13).shuffle(KEY).batch(0)
    value, gradient = loss_and_gradient(build(LightGCN), loss, CONTEXT, sampler, batch)
    assert np.isfinite(value)
    for found in tables(gradient):
        assert np.isfinite(found).all()
        assert (found != 0).any()


def test_losses_without_a_negative_of_each_pair_are_penalised_for_the_pair():
    model, free = build(LightGCN, l2_weight=0.3), build(LightGCN, l2_weight=0.0)
    sampler = NegativeSampler.from_interactions(INTERACTIONS)
    (value, _), (unpenalised, _) = (loss_and_gradient(m, "ce", CONTEXT, sampler) for m in (model, free))
    users, items = (np.asarray(table, np.float64) for table in tables(nnx.state(model)))
    counted = [k for k, item in enumerate(POSITIVES) if item]
    squares = sum((users[USERS[k]] ** 2).sum() + (items[POSITIVES[k]] ** 2).sum() for k in counted)
    np.testing.assert_allclose(value - unpenalised, 0.3 / 2 * squares / len(counted), rtol=1e-4)


def test_half_precision():
    model, wide = build(LightGCN, dtype="bfloat16"), build(LightGCN)
    assert all(table.dtype == jnp.float32 for table in model.represent(CONTEXT))
    assert model.encode(EVERYBODY, model.represent(CONTEXT)).vectors.dtype == jnp.bfloat16
    (value, gradient), (expected, exact) = (loss_and_gradient(m, context=CONTEXT) for m in (model, wide))
    np.testing.assert_allclose(value, expected, rtol=1e-2)
    for found, wanted in zip(tables(gradient), tables(exact), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-2)


def test_two_seeds_side_by_side():
    config = make_config("lightgcn", embedding_dim=4, init_std=0.1)
    models = [make_model(config, num_users=5, num_items=7, seed=seed) for seed in (0, 1)]
    graphdef, _ = nnx.split(models[0])
    states = [nnx.state(model) for model in models]

    def value(state, context):
        return training_loss(nnx.merge(graphdef, state), make_loss(config), BATCH, context, Fixed(), KEY)

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    grad = jax.value_and_grad(value)
    together = jax.jit(jax.vmap(grad, in_axes=(0, None)))(stacked, CONTEXT)
    for seed, state in enumerate(states):
        alone = jax.jit(grad)(state, CONTEXT)
        jax.tree.map(lambda a, b, s=seed: np.testing.assert_allclose(a[s], b, rtol=1e-5, atol=1e-9), together, alone)


def test_the_defaults_are_the_preset_for_beauty():
    assert read("lightgcn-beauty") == LightGCNConfig()


@pytest.mark.parametrize("dataset", ["beauty", "toys", "tools", "ml-1m"])
def test_presets_are_the_published_settings(dataset):
    if not PUBLISHED.exists():
        pytest.skip(f"the published settings are not beside this clone: {PUBLISHED.name}")
    with PUBLISHED.open() as file:
        (row,) = [
            row
            for row in csv.DictReader(file)
            if (row["model"], row["dataset"], row["role"]) == ("LightGCN", dataset, "plain-table3-inferred")
        ]
    config = read(f"lightgcn-{dataset}")
    names = {
        "lr": "learning_rate",
        "beta1": "b1",
        "beta2": "b2",
        "weight_decay": "l2_weight",
        "num_layers": "propagation_layers",
        "epochs": "epochs",
        "batch_size": "batch_size",
        "embedding_dim": "embedding_dim",
    }
    assert {ours: getattr(config, ours) for ours in names.values()} == {
        ours: float(row[theirs]) for theirs, ours in names.items()
    }
    assert (config.optimizer, config.weight_decay, config.loss, config.init_std) == ("adam", 0.0, "bpr", 1e-4)


@pytest.mark.parametrize("name", ["propagation_layers", "l2_weight"])
def test_bad_options(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
        make_config("lightgcn", **{name: -1})
