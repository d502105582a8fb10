"""The trials under cross-entropy: each runs, and changes what it says it changes."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks import trials
from models.architectures.base import Queries
from models.architectures.registry import make_config
from models.data import drifting_interests
from models.objectives.losses import cross_entropy
from models.training.training_data import make_training_data
from sevo_optax import graph, smooth

CONFIG = make_config(
    "sasrec",
    loss="ce",
    max_length=50,
    embedding_dim=4,
    num_blocks=0,
    eval_every=1,
    epochs=2,
    batch_size=20,
    beta=0.9,
)


@pytest.fixture(scope="module")
def prepared():
    return make_training_data(drifting_interests(num_users=60, num_items=40, num_groups=5, seed=3), CONFIG)


@pytest.fixture
def made(prepared):
    return lambda name: trials.TRIALS[name](prepared, CONFIG, 0)


def item_updates(stages, gradient, params, names=None):
    """What the named stages make of a gradient."""
    for name, stage in stages.items():
        if names is None or name in names:
            gradient, _ = stage.update(gradient, stage.init(params), params)
    return gradient


def random_like(params, seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), params)


def leaf(tree, name):
    return np.asarray(tree[name]["embedding"][...])


@pytest.mark.parametrize("name", trials.TRIALS)
def test_each_runs(prepared, made, name):
    """An epoch can be traced, and ends with what it began with; nothing is compiled."""
    found = made(name)
    _, state, opt_state, epoch = trials.compiled_epoch(found)
    key = jax.random.key(0)
    after = jax.eval_shape(epoch, state, opt_state, found.feed, prepared.sampler, prepared.context, key)
    for one, other in zip(jax.tree.leaves(after[:2]), jax.tree.leaves((state, opt_state)), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert after[2].shape == (found.feed.num_batches,)


def test_soft_labels_are_a_cross_entropy():
    rng = np.random.default_rng(0)
    items = jnp.asarray(rng.normal(size=(7, 3)), jnp.float32), jnp.asarray(rng.normal(size=7), jnp.float32)
    weights = graph.from_edges([1, 1, 1, 2, 4], [2, 3, 6, 3, 5], [3.0, 2.0, 1.0, 1.0, 1.0], num_nodes=7)
    shares = trials.neighbour_shares(weights, 2)
    dense = np.zeros((7, 7))
    np.add.at(dense, (np.arange(7)[:, None], np.asarray(shares[0])), np.asarray(shares[1]))
    np.testing.assert_allclose(dense.sum(axis=1), 1, rtol=1e-6)
    assert (np.count_nonzero(dense, axis=1) <= 2).all()
    assert dense[0, 0] == dense[4, 5] == 1
    normalised = np.asarray(graph.normalize(weights).todense())
    best = np.sort(np.argsort(-normalised[1])[:2])
    np.testing.assert_array_equal(dense[1].nonzero()[0], best)
    np.testing.assert_allclose(dense[1, best], normalised[1, best] / normalised[1, best].sum(), rtol=1e-6)

    targets = jnp.array([1, 4, 2, 0])
    queries = Queries(jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), targets, jnp.zeros(4, jnp.int32))
    labels = 0.8 * np.eye(7)[targets] + 0.2 * dense[targets]
    catalogue = SimpleNamespace(num_items=6)
    scores = np.asarray(queries.vectors @ items[0].T + items[1])
    normaliser = np.log(np.exp(scores[:, 1:]).sum(axis=1))  # row 0 is no item
    expected = np.mean((normaliser - np.sum(labels * scores, axis=1))[:3])
    found = trials.soft_cross_entropy(queries, items, catalogue, neighbours=shares, weight=0.2)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    hard = trials.soft_cross_entropy(queries, items, catalogue, neighbours=shares, weight=0.0)
    np.testing.assert_allclose(hard, cross_entropy(queries, items, catalogue), rtol=1e-6)


@pytest.mark.parametrize(("lookup", "output"), [(True, False), (False, True), (True, True)])
def test_one_side_of_a_tied_table(prepared, lookup, output):
    found = trials.one_side(prepared, CONFIG, 0, lookup=lookup, output=output)
    params = nnx.state(found.model, nnx.Param)
    gradient = random_like(params)
    joined = item_updates(found.stages, gradient, params, ["tied"])
    own = lambda x: np.asarray(smooth(x, prepared.nodes.adjacency, beta=CONFIG.beta, num_layers=3))  # noqa: E731
    first, second = leaf(gradient, trials.TABLE), leaf(gradient, trials.OUTPUT)
    expected = (own(first) if lookup else first) + (own(second) if output else second)
    for name in (trials.TABLE, trials.OUTPUT):
        np.testing.assert_allclose(leaf(joined, name), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(leaf(joined, "position_embedding"), leaf(gradient, "position_embedding"))
    both = item_updates(found.stages, gradient, params)
    np.testing.assert_array_equal(leaf(both, trials.TABLE), leaf(both, trials.OUTPUT))


def test_both_sides_are_the_gradient_side(prepared, made):
    """Of a tied table: the smoothing is linear."""
    params = nnx.state(made("smooth-lookup").model, nnx.Param)
    gradient = random_like(params)
    (name,) = [name for name in made("sevo-gradient").stages if name.startswith("sevo ")]
    whole = jax.tree.map(jnp.copy, gradient)
    whole[trials.TABLE]["embedding"] = nnx.Param(leaf(gradient, trials.TABLE) + leaf(gradient, trials.OUTPUT))
    smoothed = item_updates({name: made("sevo-gradient").stages[name]}, whole, params)
    found = trials.one_side(prepared, CONFIG, 0)
    joined = item_updates(found.stages, gradient, params, ["tied"])
    np.testing.assert_allclose(leaf(joined, trials.TABLE), leaf(smoothed, trials.TABLE), rtol=1e-4, atol=1e-5)


def test_beta_falls_to_nothing(prepared, made):
    found = made("falling-beta")
    stage = found.stages[f"sevo {trials.TABLE}"]
    params = nnx.state(found.model, nnx.Param)
    gradient, state = random_like(params), stage.init(params)
    first, _ = stage.update(gradient, state, params)
    expected = smooth(leaf(gradient, trials.TABLE), prepared.nodes.adjacency, beta=CONFIG.beta, num_layers=3)
    np.testing.assert_allclose(leaf(first, trials.TABLE), expected, rtol=1e-4, atol=1e-5)
    for _ in range(CONFIG.epochs * found.feed.num_batches):
        _, state = stage.update(gradient, state, params)
    last, _ = stage.update(gradient, state, params)
    np.testing.assert_allclose(leaf(last, trials.TABLE), leaf(gradient, trials.TABLE), rtol=1e-5, atol=1e-6)


def test_the_step_is_restored(prepared, made):
    adjacency = prepared.nodes.adjacency
    diagonal = np.diag(smooth(np.eye(adjacency.shape[0], dtype=np.float32), adjacency, beta=0.9, num_layers=3))
    linked = np.asarray(adjacency.todense()).any(axis=1)
    weight = trials.self_weight(adjacency, CONFIG, probes=4096)
    assert weight == pytest.approx(diagonal[linked].mean(), rel=0.02)
    found = made("restored-step")
    assert list(found.stages) == ["moments", f"sevo {trials.TABLE}", "restore", "decay", "rate"]
    params = nnx.state(found.model, nnx.Param)
    gradient = random_like(params)
    restored = item_updates(found.stages, gradient, params, ["restore"])
    factor = 1 / trials.self_weight(adjacency, CONFIG)
    np.testing.assert_allclose(leaf(restored, trials.TABLE), factor * leaf(gradient, trials.TABLE), rtol=1e-6)
    np.testing.assert_array_equal(leaf(restored, "position_embedding"), leaf(gradient, "position_embedding"))


def test_the_average_of_the_weights(made):
    found = made("adamw-ema")
    ema = trials.averaged(0.5)
    params = {"x": jnp.array([1.0, 2.0])}
    state, expected = ema.init(params), np.array([1.0, 2.0])
    for step in range(4):
        updates, state = ema.update({"x": jnp.array([1.0, -1.0])}, state, params)
        params = optax.apply_updates(params, updates)
        kept = min(0.5, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * np.asarray(params["x"])
    np.testing.assert_allclose(state.params["x"], expected, rtol=1e-6)
    _, model, opt_state, _ = trials.compiled_epoch(found)
    moved = opt_state | {
        "ema": opt_state["ema"]._replace(params=jax.tree.map(lambda x: x + 1, opt_state["ema"].params))
    }
    evaluated = found.evaluated(model, moved)
    np.testing.assert_array_equal(leaf(evaluated, trials.TABLE), leaf(model, trials.TABLE) + 1)
    assert list(found.stages)[-1] == "ema"


def test_rates_and_windows(prepared, made):
    assert made("adamw-cosine").config.schedule == made("sevo-gradient-cosine").config.schedule == "cosine"
    short = dataclasses.replace(CONFIG, max_length=4)
    data = make_training_data(drifting_interests(num_users=60, num_items=40, num_groups=5, seed=3), short)
    assert trials.windows(data, short, 0, optimizer="adamw").feed.num_tokens > data.feed.num_tokens
    assert made("adamw-windows").config.windows


def test_from_the_command_line_to_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [f"{u} {' '.join(str(1 + (3 * u + i) % 20) for i in range(6))}\n" for u in range(1, 21)]
    Path("tiny.txt").write_text("".join(lines))
    options = ["--data", "tiny.txt", "--epochs", "2", "--set", "eval_every=1", "embedding_dim=4", "num_blocks=0"]
    assert trials.main(["adamw", "soft-labels-0.1", "smooth-output", "sevo-gradient-cosine", *options]) == 0
    assert "epoch 1 of 2" in capsys.readouterr().err
    found = {path.stem: json.loads(path.read_text()) for path in Path("results/trials/tiny").glob("*.json")}
    names = [re.fullmatch(r"(.+)-epochs2-[0-9a-f]{8}-seed0", name)[1] for name in found]
    assert sorted(names) == ["adamw", "sevo-gradient-cosine", "smooth-output", "soft-labels-0.1"]
    for values in found.values():
        assert [epoch for epoch, _ in values["curve"]] == [1, 2]
        assert values["config"]["beta"] == 0.9
        assert max(score for _, score in values["curve"]) == values["validation"]["NDCG@10"]
    text = Path("results/trials/README.md").read_text()
    assert re.search(
        r"^\| tiny \| soft-labels-0.1 \| – \| 1 \| 2 \| \d \| 0\.\d+ \| 0\.\d+ \| [+-]0\.\d+ \| – \|$", text, re.M
    )
    assert re.search(r"^\| tiny \| smooth-output \| 0.9 \|.* [+-]0\.\d+ \| – \|$", text, re.M)
    assert re.search(r"^\| tiny \| sevo-gradient-cosine \| 0.9 \|.* [+-]0\.\d+ \| – \|$", text, re.M)
    assert trials.main(["adamw-cosine", "soft-labels-0.1", *options, "--beta", "0.5"]) == 0
    assert capsys.readouterr().out.count("is there") == 1  # which smooths nothing
    text = Path("results/trials/README.md").read_text()
    assert re.search(r"^\| tiny \| sevo-gradient-cosine \| 0.9 \|.* [+-]0\.\d+ \| [+-]0\.\d+ \|$", text, re.M)
    assert trials.main(["adamw", *options]) == 0
    assert "is there; --overwrite trains it again" in capsys.readouterr().out
    # Another strength is another run of what smooths, and the same of what does not.
    assert trials.main(["adamw", "sevo-gradient", *options, "--beta", "0.5"]) == 0
    assert capsys.readouterr().out.count("is there") == 1
    text = Path("results/trials/README.md").read_text()
    assert re.findall(r"^\| tiny \| (\S+) \| 0\.5 \|.* [+-]0\.\d+ \| – \|$", text, re.M) == ["sevo-gradient"]
    assert trials.main(["soft", *options]) == 2
    assert trials.main(["adamw", "--preset", "sasrec-beauty"]) == 2
    assert trials.main(["adamw", *options, "patience=3"]) == 2
    assert [line[:5] for line in capsys.readouterr().err.splitlines()] == ["error"] * 3
