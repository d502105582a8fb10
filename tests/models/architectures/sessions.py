"""What the tests of models of session graphs share: rows of sessions, parameters by name, derivatives."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import presets
from models.architectures.registry import config_from_dict, make_config
from models.data import Interactions
from models.feeds import Batch
from tests.models.architectures.checks import COLUMNS, PUBLISHED

# Items that repeat: after a while, at once, at the end, and a session that is one item.
REPEATING = [[3, 1, 3, 2, 1, 3], [4, 4, 2], [5], [2, 6, 2, 6, 2], [1, 2, 3, 4], [7, 7]]
DISTINCT = [[3, 1, 4, 2, 6], [5], [2, 7], [1, 6, 3, 5, 2, 4, 7]]
NUM_ITEMS = 7

PLACES = ("beauty", "toys", "tools", "ml-1m")


def packed_rows(sessions, row_length=12, num_rows=5, targets=None):
    """Several sessions a row, some places left empty; always of one shape, so that a model is compiled once."""
    rows, row = [], []
    for number, session in enumerate(sessions):
        if sum(len(sessions[n]) for n in row) + len(session) > row_length - 1:
            rows.append(row)
            row = []
        row.append(number)
    rows.append(row)
    inputs, segments, positions = (np.zeros((num_rows, row_length), np.int32) for _ in range(3))
    ends = {}
    for r, row in enumerate(rows):
        start = 0
        for number in row:
            stop = start + len(sessions[number])
            inputs[r, start:stop] = sessions[number]
            segments[r, start:stop] = number + 1
            positions[r, start:stop] = np.arange(20 - stop + start, 20)
            ends[number] = (r, stop - 1)
            start = stop
    places = tuple(np.array([ends[n] for n in range(len(sessions))]).T)
    following = np.zeros_like(inputs) if targets is None else targets(inputs)
    arrays = (inputs, positions, np.zeros_like(inputs), segments, np.maximum(segments - 1, 0), following)
    return Batch(*map(jnp.asarray, arrays)), places


def every_prefix(sessions):
    return [session[:n] for session in sessions for n in range(1, len(session) + 1)]


@nnx.jit
def encode(model, batch, key=None):
    """The vectors of a batch; training changes the model's state."""
    return model.encode(batch, None, key).vectors


def parameters(model):
    """Values in double precision, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return {"/".join(str(k.key) for k in path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def in_double(model):
    """The model with all floats in double precision, every parameter moved away from where it starts."""
    rng = np.random.default_rng(3)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf) + 0.2 * rng.normal(size=leaf.shape)), params)
    rest = jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, rest)
    return nnx.merge(graphdef, params, rest)


def gradient(model, function, *, state=False):
    """Value and gradient, by path, of ``function(model)``, which may return more behind the value.

    With ``state``, the model keeps what has changed inside, such as running statistics.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def value(params):
        # A copy, which may change inside.
        inner = nnx.merge(graphdef, params, jax.tree.map(jnp.asarray, rest))
        found = function(inner)
        found = found if isinstance(found, tuple) else (found,)
        return found[0], (found, nnx.state(inner, nnx.Not(nnx.Param)))

    grads, (found, rest_after) = jax.jit(jax.grad(value, has_aux=True))(params)
    if state:
        nnx.update(model, rest_after)
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(grads))
    return found, {"/".join(str(k.key) for k in path): np.asarray(leaf) for path, leaf in leaves}


def weighed(batch, places, direction, key=None):
    """A function of a model: the vectors at some places, weighed and summed, and all vectors."""

    def function(model):
        vectors = model.encode(batch, None, key).vectors
        return jnp.sum(vectors[places] * direction), vectors

    return function


def check_gradient(found, values, function, step=1e-6, rtol=1e-5, atol=1e-7):
    """Compares with central differences of ``function(values)``, along a random direction in each parameter."""
    rng = np.random.default_rng(0)
    assert found.keys() == values.keys()
    for name, value in values.items():
        direction = rng.normal(size=value.shape)
        ahead, behind = (function(values | {name: value + sign * step * direction}) for sign in (1, -1))
        expected = (ahead - behind) / (2 * step)
        np.testing.assert_allclose(np.sum(found[name] * direction), expected, rtol=rtol, atol=atol, err_msg=name)


def interactions(seed=0, users=12, num_items=15, longest=9):
    """Histories without repeats, of two items at least."""
    rng = np.random.default_rng(seed)
    sequences = [1 + rng.permutation(num_items)[: rng.integers(2, longest + 1)] for _ in range(users)]
    return Interactions.from_sequences(sequences, num_items)


def check_presets(name, columns):
    """The presets are the plain settings; ``columns`` maps those of the table to fields of this model alone."""
    model = name.lower()
    configs = {place: config_from_dict(presets.load_preset(f"{model}-{place}")) for place in PLACES}
    assert configs["beauty"] == make_config(model)
    if not PUBLISHED.exists():
        pytest.skip(f"the published settings are not beside this clone: {PUBLISHED.name}")
    with PUBLISHED.open() as file:
        rows = [row for row in csv.DictReader(file) if (row["model"], row["role"]) == (name, "plain-table3-inferred")]
    assert {row["dataset"] for row in rows} == set(PLACES)
    for row in rows:
        config = configs[row["dataset"]]
        assert (config.optimizer, config.loss) == (row["optimizer"], "bpr")
        for theirs, ours in (COLUMNS | columns).items():
            if row[theirs]:
                assert getattr(config, ours) == float(row[theirs]), (row["dataset"], ours)
