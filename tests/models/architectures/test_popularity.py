import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.architectures.popularity import Popularity, PopularityConfig
from models.architectures.registry import config_from_dict, make_config, make_model
from models.config import ClosedFormConfig, GraphConfig, LossConfig, OptimizerConfig
from models.data import Interactions
from models.feeds import pack

INTERACTIONS = Interactions.from_sequences([[1, 2, 3], [3, 3, 1], [3], [5, 1]], num_items=6)


@pytest.fixture
def model():
    config = make_config("popularity")
    model = make_model(config, num_users=INTERACTIONS.num_users, num_items=6, seed=0)
    model.fit(INTERACTIONS, config)
    return model


def test_scores_are_counts(model):
    batch = pack(INTERACTIONS, max_length=1, batch_size=9, with_targets=False).batch(0)
    vectors = model.encode(batch, model.represent({})).vectors
    assert vectors.shape == (*batch.inputs.shape, 1)
    scores = model.scores(vectors.reshape(-1, 1), None)
    expected = [0.0, 3.0, 1.0, 4.0, 0.0, 1.0, 0.0]
    np.testing.assert_array_equal(scores, [expected] * batch.inputs.size)


def test_candidates_have_the_scores_of_the_items(model):
    batch = pack(INTERACTIONS, max_length=1, batch_size=9, with_targets=False).batch(0)
    candidates = jnp.array([[3] * batch.inputs.size, [4] * batch.inputs.size]).reshape(2, *batch.inputs.shape)
    encoded = model.encode(batch, None, candidates=candidates)
    scores = jnp.sum(encoded.vectors * encoded.rows, axis=-1) + encoded.biases
    np.testing.assert_array_equal(scores[0], jnp.full(batch.inputs.shape, 4.0))
    np.testing.assert_array_equal(scores[1], jnp.zeros(batch.inputs.shape))


def test_the_state_is_no_parameter(model):
    assert not jax.tree.leaves(nnx.state(model, nnx.Param))
    assert [leaf.shape for leaf in jax.tree.leaves(nnx.state(model))] == [(7,)]
    assert not model.node_sets


def test_there_are_no_options_of_training():
    fields = {field.name for field in dataclasses.fields(PopularityConfig)}
    for base in (OptimizerConfig, GraphConfig, LossConfig):
        assert {field.name for field in dataclasses.fields(base)} & fields <= {"optimizer"}
    assert not fields & {"embedding_dim", "batch_size", "patience", "max_length"}
    assert {"data", "split", "ks", "exclude_seen"} <= fields
    with pytest.raises(ValueError, match="unknown option learning_rate; popularity has"):
        make_config("popularity", learning_rate=0.1)
    with pytest.raises(TypeError, match="beta"):
        PopularityConfig(beta=0.5)


def test_the_configuration_survives_json():
    config = make_config("popularity", ks=(3,), seed=2)
    assert config_from_dict(config.to_dict()) == config
    assert config.differing() == {"model": "popularity", "ks": [3], "seed": 2}
    assert config_from_dict({"model": "popularity", "optimizer": "closed-form"}) == PopularityConfig()
    # What other parts read of any run is there.
    assert (config.epochs, config.graph, config.loss, config.max_length) == (1, ("item-item",), "bce", 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamw"}, "optimizer must be one of closed-form with popularity, got 'adamw'"),
        ({"epochs": 3}, "epochs must be 1 with popularity, which is computed in one pass, got 3"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_config("popularity", **options)


def test_everybody_gets_the_same(model):
    assert isinstance(PopularityConfig(), ClosedFormConfig)
    first, second = (
        model.encode(pack(some, max_length=1, batch_size=9, with_targets=False).batch(0), None).vectors
        for some in (INTERACTIONS, Interactions.from_sequences([[6], [2]], num_items=6))
    )
    assert (first == 1).all()
    assert (second == 1).all()
    assert isinstance(model, Popularity)
