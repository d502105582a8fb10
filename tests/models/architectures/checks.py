"""What the tests of several architectures share."""

import csv
import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import presets
from models.architectures.registry import config_from_dict, make_config
from models.checks import SAMPLED_LOSSES
from models.data import drifting_interests, leave_one_out
from models.evaluation.ranking import FullRanking
from models.feeds import Batch, NegativeSampler
from models.objectives.losses import make_loss
from models.objectives.objective import training_loss
from models.serving.export import PLATFORMS, export_scores
from models.serving.trained import TrainedModel
from models.training import loop
from models.training.checkpoints import Checkpoints, load_run
from models.training.files import read_history
from models.training.training_data import make_training_data
from tests.models.saved_runs import assert_same, leaves

# In these tests the negative of a query depends on its user alone, so that it is the same however users are batched.
NEGATIVE_STRIDE = 7
NUM_ITEMS = 25

PUBLISHED = Path(__file__).resolve().parents[3].parent / "shared" / "reference" / "hyperparameters.csv"
# Columns of the published settings that mean the same for every model, and the fields of a configuration.
COLUMNS = {
    "maxlen": "max_length",
    "K_maxlen4graph": "graph_max_length",
    "embedding_dim": "embedding_dim",
    "epochs": "epochs",
    "batch_size": "batch_size",
    "beta1": "b1",
    "beta2": "b2",
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "beta": "beta",
    "L": "num_layers",
    "H": "max_hops",
}


@dataclasses.dataclass(frozen=True)
class OneNegative:
    """Stands for :class:`NegativeSampler`: draws the same item for every query of a user."""

    num_items: int

    def sample(self, key, users):
        del key
        return negative_of(users, self.num_items)


def negative_of(users, num_items):
    """The item that each user's targets are compared with."""
    return 1 + NEGATIVE_STRIDE * users % num_items


def perturb(model, scale=0.3):
    """Moves every parameter: biases and scales start at 0 and 1, where mistakes in them would not show."""
    rng = np.random.default_rng(0)
    for leaf in jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=lambda x: isinstance(x, nnx.Param)):
        leaf[...] = jnp.asarray(np.asarray(leaf[...]) + scale * rng.normal(size=leaf.shape), leaf.dtype)
    return model


def count_parameters(model):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def by_path(tree):
    """The arrays of a model's state, or of its gradient, in NumPy and by their paths."""
    return {"/".join(str(part) for part in path): np.asarray(value) for path, value in nnx.to_flat_state(tree)}


@nnx.jit
def encode(model, batch, key=None):
    """The queries of a batch, compiled."""
    return model.encode(batch, None, key).vectors


def widen(model):
    """The model with parameters in double precision."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.float64), params), rest)


def alone(sequence, max_length):
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


def loss_and_gradient(model, config, batch, sampler, *, key=None, max_num_targets=None):
    """The training loss of a batch, without dropout unless there is a key, and its gradient by path."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    loss = make_loss(config)

    def value(params):
        return training_loss(
            nnx.merge(graphdef, params, rest),
            loss,
            batch,
            {},
            sampler,
            jax.random.key(0) if key is None else key,
            max_num_targets=max_num_targets,
            deterministic=key is None,
        )

    found, gradient = jax.jit(jax.value_and_grad(value))(params)
    return float(found), by_path(gradient)


def check_gradient(gradient, function, parameters, *, rtol=1e-6, dead=()):
    """Compares a gradient with central differences of a NumPy function, along one random direction a parameter."""
    assert set(gradient) == set(parameters)
    rng = np.random.default_rng(0)
    for path, value in parameters.items():
        direction, step = rng.normal(size=value.shape), 1e-6
        up, down = (function(parameters | {path: value + sign * step * direction}) for sign in (1, -1))
        slope = np.sum(gradient[path] * direction)
        np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=rtol, atol=1e-8, err_msg=path)
        assert (np.abs(gradient[path]).max() > 0) == (not any(name in path for name in dead)), path


def check_every_loss(make_model, config, packed, interactions, *, dead=()):
    """Every loss that the model offers gives finite gradients, and some on every parameter that has an effect."""
    sampler = NegativeSampler.from_interactions(interactions)
    for loss in config.losses:
        few = {"num_negatives": 5} if loss in SAMPLED_LOSSES else {}
        mine = dataclasses.replace(config, loss=loss, **few).checked()
        value, gradient = loss_and_gradient(make_model(), mine, packed.batch(0), sampler, key=jax.random.key(3))
        assert np.isfinite(value)
        for path, leaf in gradient.items():
            assert np.isfinite(leaf).all(), (loss, path)
            assert leaf.any() == (not any(name in path for name in dead)), (loss, path)


def check_vmap(make_model, batch):
    """Two seeds side by side give what they give alone."""
    models = [make_model(seed=seed) for seed in (0, 1)]
    graphdef = nnx.split(models[0])[0]
    states = jax.tree.map(lambda *x: jnp.stack(x), *(nnx.state(model) for model in models))

    def of_state(state):
        return nnx.merge(graphdef, state).encode(batch, None, jax.random.key(0)).vectors

    both = jax.jit(jax.vmap(of_state))(states)
    for model, vectors in zip(models, both, strict=True):
        np.testing.assert_allclose(vectors, encode(model, batch, jax.random.key(0)), rtol=1e-4, atol=1e-5)


def check_independence(model, max_length):
    """A query does not depend on what follows in its segment, and does on its newest item."""
    first = encode(model, alone([3, 1, 4, 1, 5], max_length))
    second = encode(model, alone([3, 1, 4, 9, 2], max_length))
    np.testing.assert_array_equal(first[0, :3], second[0, :3])
    assert not np.allclose(first[0, 3], second[0, 3])


def check_neighbours(model, batch, num_items):
    """Changing one user's items leaves everybody else's queries bit-identical."""
    mine = np.asarray(batch.segments) == 7
    assert mine.any()
    changed = batch._replace(inputs=jnp.where(mine, 1 + batch.inputs % num_items, batch.inputs))
    before, after = (np.asarray(encode(model, x)) for x in (batch, changed))
    np.testing.assert_array_equal(before[~mine], after[~mine])
    assert (before[mine] != after[mine]).any()


def check_presets(name, columns):
    """The presets of a model are the published settings, with SEvo and plain, and its defaults those for Beauty.

    ``columns`` has what the model alone has: columns of the published settings, and its fields.
    """
    model = name.lower()
    datasets = ("beauty", "toys", "tools", "ml-1m")
    expected = {f"{model}{arm}-{dataset}" for arm in ("", "-adam") for dataset in datasets}
    assert {preset for preset in presets.names() if preset.split("-")[0] == model} == expected
    configs = {preset: config_from_dict(presets.load_preset(preset)) for preset in expected}
    assert configs[f"{model}-beauty"] == make_config(model)
    assert {config.loss for config in configs.values()} == {"bpr"}
    if not PUBLISHED.exists():
        pytest.skip(f"the published settings are not beside this clone: {PUBLISHED.name}")
    arms = {"sevo": ("", "sevo-adamw"), "plain-table3-inferred": ("-adam", "adam")}
    found = set()
    with PUBLISHED.open() as file:
        for row in csv.DictReader(file):
            if row["model"] != name or row["role"] not in arms:
                continue
            arm, optimizer = arms[row["role"]]
            preset = f"{model}{arm}-{row['dataset']}"
            found.add(preset)
            assert configs[preset].optimizer == optimizer
            for theirs, ours in (COLUMNS | columns).items():
                if row[theirs]:
                    assert getattr(configs[preset], ours) == float(row[theirs]), (preset, ours)
    assert found == expected


def check_resuming(result, prepared, config, whole, epoch, directory):
    """A run that had saved no later epoch than this one when it was killed ends, resumed, as it did bit by bit.

    It goes on from there: one that started anew would end in the same way.

    Args:
      result: what the whole run gave.
      prepared: what it was trained on.
      config: its settings.
      whole: its folder.
      epoch: the last one that is saved.
      directory: where a copy of the folder goes on.
    """
    shutil.copytree(whole, directory)
    (directory / "result.json").unlink()
    checkpoints = Checkpoints(directory)
    for later in checkpoints.epochs():
        if later > epoch:
            shutil.rmtree(directory / "checkpoints" / str(later))
    assert checkpoints.epochs()[-1] == epoch
    kept = read_history(whole / "history.jsonl", epoch)
    resumed = loop.train(prepared, config, config.optimizer, directory, resume=True)
    assert (resumed.losses, resumed.test) == (result.losses, result.test)
    assert read_history(directory / "history.jsonl", epoch) == kept  # how long epochs took is never the same twice
    assert_same(leaves(whole, config.epochs), leaves(directory, config.epochs))


def check_a_run(config, directory):
    """Trains, goes on after an interruption, recommends and exports; returns the run's losses."""
    data = drifting_interests(num_users=40, num_items=NUM_ITEMS, num_groups=4, mean_length=6, seed=3)
    prepared = make_training_data(data, config)
    whole = loop.train(prepared, config, config.optimizer, directory / "whole")
    assert np.isfinite(whole.losses).all()
    check_resuming(whole, prepared, config, directory / "whole", 1, directory / "broken")

    run = load_run(directory / "whole")
    history = leave_one_out(data).test_history
    ranking = FullRanking.prepare(
        history, leave_one_out(data).test, model=type(run.model), config=config, exclude_seen=False
    )
    best = jax.jit(lambda ranking: ranking.top_items(run.model, {}, 9))(ranking)
    recommended = TrainedModel.load(directory / "whole").recommend(list(history), k=9, exclude_seen=False)
    assert [one.items for one in recommended] == best.tolist()
    exported = export_scores(run)
    assert exported.platforms == PLATFORMS
    rows = np.zeros((len(recommended), config.max_length), np.int32)
    for row, items in zip(rows, history, strict=True):
        row[: min(len(items), config.max_length)] = items[-config.max_length :]
    scores = np.asarray(exported.call(rows))
    for one, mine in zip(recommended, scores, strict=True):
        np.testing.assert_allclose(mine[one.items], one.scores, rtol=1e-4, atol=1e-5)
    return whole.losses
