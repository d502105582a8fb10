"""MF-BPR, LightGCN, popularity and item-kNN in whole runs: trained, broken off, resumed, asked and exported."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.architectures.registry import make_config
from models.data import drifting_interests, leave_one_out
from models.evaluation.ranking import FullRanking
from models.serving.export import export_scores
from models.serving.trained import TrainedModel, evaluate
from models.training import loop
from models.training.checkpoints import Checkpoints, load_run
from models.training.training_data import make_training_data
from tests.models.architectures import checks, pairs_reference

SMALL = {"embedding_dim": 8, "batch_size": 64, "epochs": 4, "eval_every": 2, "learning_rate": 1e-2, "init_std": 0.1}
CASES = {
    "items": ("mf-bpr", {"graph": ("item-item",), **SMALL}),
    "users and items": ("mf-bpr", {"graph": ("user-item",), **SMALL}),
    "lightgcn": ("lightgcn", SMALL),
    "popularity": ("popularity", {}),
    "item-knn": ("item-knn", {"num_neighbors": 5, "max_length": 6}),
}
IDS = np.array([f"item {i}" if i else "" for i in range(41)])


def data():
    made = drifting_interests(num_users=60, num_items=40, num_groups=5, seed=3)
    return dataclasses.replace(made, item_ids=IDS, user_ids=np.array([f"user {u}" for u in range(60)]))


@dataclasses.dataclass
class Trained:
    config: object
    prepared: object
    directory: object
    result: object


@pytest.fixture(scope="module", params=CASES)
def trained(request, tmp_path_factory):
    model, options = CASES[request.param]
    config = make_config(model, **options)
    prepared, directory = make_training_data(data(), config), tmp_path_factory.mktemp("run") / "whole"
    return Trained(config, prepared, directory, loop.train(prepared, config, config.optimizer, directory))


def test_a_resumed_run_ends_bit_by_bit_as_an_uninterrupted_one(trained, tmp_path):
    epoch = 2 if trained.config.epochs == 4 else 1  # closed forms have one: what is left is to test it
    checks.check_resuming(
        trained.result, trained.prepared, trained.config, trained.directory, epoch, tmp_path / "broken"
    )


def test_the_loaded_run_tests_as_the_run_did(trained):
    run = load_run(trained.directory)
    found = evaluate(run, leave_one_out(data()), ks=trained.config.ks)
    assert found.metrics == trained.result.test


def test_recommends_in_the_order_of_the_evaluation(trained):
    run, split = load_run(trained.directory), leave_one_out(data())
    ranking = FullRanking.prepare(
        split.test_history,
        split.test,
        model=type(run.model),
        config=trained.config,
        user_ids=split.train.user_ids,
        # A user's items are those of the whole data to one who recommends, and of the history to one who tests.
        exclude_seen=False,
    )
    best = jax.jit(lambda ranking: ranking.top_items(run.model, run.context, 9))(ranking)
    model = TrainedModel.load(trained.directory)
    if model.query == "user":
        found = model.recommend_to_users(split.train.user_ids, k=9, exclude_seen=False)
    else:
        histories = [IDS[items].tolist() for items in split.test_history]
        found = model.recommend(histories, k=9, exclude_seen=False)
    assert [one.items for one in found] == IDS[best].tolist()


def test_an_export_scores_like_the_model(trained):
    run = load_run(trained.directory)
    exported = export_scores(run)
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    represented = run.model.represent(run.context)
    if run.model.query == "user":
        users = np.array([5, 0, 59], np.int32)
        scores = exported.call(users)
        tables = (np.asarray(table) for table in represented)
        expected = np.take(next(tables), users, axis=0) @ next(tables).T
    else:
        histories = np.zeros((3, trained.config.max_length), np.int32)
        histories[:, 0] = [7, 1, 40]
        scores = exported.call(histories)
        vectors = np.ones((3, 1)) if trained.config.model == "popularity" else histories
        expected = run.model.scores(jnp.asarray(vectors), represented)
    assert scores.shape == (3, 41)
    np.testing.assert_allclose(scores[:, 1:], expected[:, 1:], rtol=1e-5, atol=1e-7)


def test_the_context_lies_beside_the_checkpoints(trained):
    run, split = load_run(trained.directory), leave_one_out(data())
    if trained.config.model != "lightgcn":
        assert run.context == {}
        return
    adjacency = run.context["adjacency"]
    np.testing.assert_allclose(adjacency.todense(), pairs_reference.adjacency(split.train), rtol=1e-6)
    saved = Checkpoints(trained.directory).load(4).leaves
    assert all(adjacency.nse not in leaf.shape for leaf in saved.values())


def test_the_whole_state_lies_in_the_checkpoint(trained):
    saved = Checkpoints(trained.directory).load(trained.config.epochs).leaves
    state = nnx.to_flat_state(nnx.state(load_run(trained.directory, "last").model))
    assert state
    for path, leaf in state:
        (found,) = [value for name, value in saved.items() if name.startswith("last") and str(path[0]) in name]
        np.testing.assert_array_equal(leaf[...], found)
        assert (found != 0).any()
