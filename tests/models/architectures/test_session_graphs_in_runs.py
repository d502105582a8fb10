"""SR-GNN and LESSR in whole runs: trained, broken off, resumed, asked and exported."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from models.architectures.registry import make_config
from models.data import Interactions, leave_one_out
from models.evaluation.queries import history_scores
from models.serving.export import export_scores
from models.serving.trained import TrainedModel, evaluate
from models.training import loop
from models.training.checkpoints import Checkpoints, load_run
from models.training.training_data import make_training_data
from tests.models.architectures import checks

SMALL = {"embedding_dim": 4, "batch_size": 40, "epochs": 4, "eval_every": 2, "learning_rate": 1e-2, "max_length": 8}
CASES = {
    "sr-gnn": ("sr-gnn", {"separate_prefixes": True, **SMALL}),  # items repeat here
    "lessr": ("lessr", {"num_blocks": 2, "dropout_rate": 0.2, **SMALL}),
}
NUM_ITEMS = 20
IDS = np.array([f"item {i}" if i else "" for i in range(NUM_ITEMS + 1)])


def data(*, repeats):
    rng = np.random.default_rng(0)
    sequences = [rng.choice(NUM_ITEMS, rng.integers(4, 9), replace=repeats) + 1 for _ in range(30)]
    made = Interactions.from_sequences(sequences, NUM_ITEMS, user_ids=[f"user {u}" for u in range(30)])
    return dataclasses.replace(made, item_ids=IDS)


@dataclasses.dataclass
class Trained:
    config: object
    interactions: object
    prepared: object
    directory: object
    result: object


@pytest.fixture(scope="module", params=CASES)
def trained(request, tmp_path_factory):
    model, options = CASES[request.param]
    config = make_config(model, **options)
    interactions = data(repeats=config.separate_prefixes)
    prepared, directory = make_training_data(interactions, config), tmp_path_factory.mktemp("run") / "whole"
    result = loop.train(prepared, config, config.optimizer, directory)
    return Trained(config, interactions, prepared, directory, result)


def test_a_resumed_run_ends_bit_by_bit_as_an_uninterrupted_one(trained, tmp_path):
    checks.check_resuming(trained.result, trained.prepared, trained.config, trained.directory, 2, tmp_path / "broken")


def test_running_statistics_lie_in_the_checkpoint_and_rows_keep_their_norm(trained):
    model = load_run(trained.directory, "last").model
    saved = Checkpoints(trained.directory).load(4).leaves
    found = [name for name in saved if name.startswith("last") and ("norm.mean" in name or "norm.var" in name)]
    if trained.config.model == "sr-gnn":
        assert not found
        return
    assert len(found) == 2 * 4  # two layers, the readout, the last projection
    for norm in (*(block.norm for block in model.blocks), model.readout.norm, model.norm):
        assert norm.mean[...].any()
        assert (norm.var[...] != 1).all()
    norms = np.linalg.norm(model.item_embedding.embedding[...], axis=1)
    assert norms.max() <= 1 + 1e-6
    assert (norms < 1 - 1e-4).any()  # trained, and not only scaled


def test_the_loaded_run_tests_as_the_run_did(trained):
    run = load_run(trained.directory)
    assert evaluate(run, leave_one_out(trained.interactions), ks=trained.config.ks).metrics == trained.result.test


def test_recommendations_and_the_export_are_the_model_alone(trained):
    """One history a row, the newest token's query: whoever asks gets the same."""
    run = load_run(trained.directory)
    histories = np.zeros((3, 8), np.int32)
    for row, history in enumerate([[3, 1, 4, 5, 9, 2, 6, 7], [11, 12, 13], [20]]):
        histories[row, -len(history) :] = history
    score = nnx.jit(history_scores, static_argnames=("num_items", "max_length"))
    scores = np.asarray(score(run.model, None, histories, num_items=NUM_ITEMS, max_length=8))
    exported = export_scores(run).call(histories)
    np.testing.assert_allclose(exported[:, 1:], scores[:, 1:], rtol=1e-4, atol=1e-5)
    asked = [IDS[row[row > 0]].tolist() for row in histories]
    for found, row in zip(
        TrainedModel.load(trained.directory).recommend(asked, k=3, exclude_seen=False), scores, strict=True
    ):
        assert found.items == IDS[1:][np.argsort(-row[1:])[:3]].tolist()


def test_seeds_side_by_side_train_as_one_by_one():
    """Running statistics have an axis of seeds too."""
    config = make_config("lessr", **CASES["lessr"][1] | {"epochs": 2})
    prepared = make_training_data(data(repeats=False), config)
    one, other = loop.train_seeds(prepared, config, config.optimizer, [0, 1], [None, None])
    alone = loop.train(prepared, dataclasses.replace(config, seed=1), config.optimizer)
    np.testing.assert_allclose(other.losses, alone.losses, rtol=1e-4)
    assert one.losses != other.losses
