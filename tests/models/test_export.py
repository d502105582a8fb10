import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from models.__main__ import main
from models.data import read_item_vectors
from models.data.ids import text_ids
from models.serving.export import PLATFORMS, export_scores, usage, write_export
from models.serving.trained import TrainedModel
from models.training.beside import KnownUsers
from models.training.checkpoints import load_run
from tests.models.saved_runs import save_run, small_data

IDS = np.array(["", *(f"item {i}" for i in range(1, 41))])
# Runs in a process that has JAX and NumPy, but not this code.
ELSEWHERE = """
import sys
sys.modules.update(dict.fromkeys(["models", "sevo_optax", "flax", "optax", "orbax"]))  # None: not to be imported
{usage}
table = np.load("histories.npz")
np.savez("scores.npz", **{{name: scores(table[name]) for name in table}})
"""


@pytest.fixture(scope="module", params=["sasrec", "bert4rec"])
def exported(request, tmp_path_factory):
    """A run's folder, its export, and what the export's lines of usage print and compute in a process of their own."""
    directory = save_run(tmp_path_factory.mktemp(request.param), small_data(IDS), model=request.param)
    run = load_run(directory)
    path = directory / "new" / "model.jaxexport"
    path.parent.mkdir()
    items = write_export(run, path)

    elsewhere = tmp_path_factory.mktemp("elsewhere")
    histories = small_histories(run.info.config.max_length)
    np.savez(elsewhere / "histories.npz", left=histories, right=right_padded(histories), one=histories[:1])
    script = ELSEWHERE.format(usage=usage(run, path, items))
    done = subprocess.run([sys.executable, "-c", script], cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(elsewhere / "scores.npz") as scores:
        return run, path, histories, done.stdout, dict(scores)


def small_histories(max_length):
    """The newest items of every user, 0 in front."""
    histories = np.zeros((60, max_length), np.int32)
    for row, items in zip(histories, small_data(), strict=True):
        newest = items[-max_length:]
        row[max_length - len(newest) :] = newest
    return histories


def right_padded(histories):
    moved = np.zeros_like(histories)
    for row, history in zip(moved, histories, strict=True):
        row[: np.sum(history > 0)] = history[history > 0]
    return moved


def test_scores_as_the_recommender_does(exported):
    run, _, histories, _, scores = exported
    recommender = TrainedModel(run.model, IDS, run.info.config)
    found = recommender.recommend([IDS[row[row > 0]] for row in histories], k=40, exclude_seen=False)
    expected = np.full((60, 41), -np.inf, np.float32)
    for row, one in zip(expected, found, strict=True):
        row[[IDS.tolist().index(item) for item in one.items]] = one.scores
    assert scores["left"].dtype == np.float32
    np.testing.assert_allclose(scores["left"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(scores["right"], scores["left"])
    np.testing.assert_allclose(scores["one"], expected[:1], rtol=1e-4, atol=1e-5)


def test_usage_recommends(exported):
    run, _, _, printed, _ = exported
    recommender = TrainedModel(run.model, IDS, run.info.config)
    (expected,) = recommender.recommend([["item 1", "item 2", "item 3"]], exclude_seen=False)
    assert printed.replace("\n", " ").split("'")[1::2] == expected.items


def test_any_batch_on_any_platform(exported):
    exported = export_scores(exported[0])
    assert exported.platforms == PLATFORMS == ("cpu", "cuda", "tpu")
    assert str(exported.in_avals[0].shape) == "(batch, 12)"
    assert str(exported.out_avals[0].shape) == "(batch, 41)"


def test_exports_side_by_side_keep_their_own_ids(tmp_path):
    run = load_run(save_run(tmp_path / "run", small_data(IDS)))
    names = ("shop-1.0", "shop-1.1", "shop.jaxexport")
    found = [write_export(run, tmp_path / name).name for name in names]
    assert found == ["shop-1.0.items.npz", "shop-1.1.items.npz", "shop.items.npz"]


def test_usage_of_a_model_of_users_with_one_long_id(tmp_path):
    ids = text_ids([*(f"u{i}" for i in range(20_000)), "u" * 300])
    assert isinstance(ids.dtype, np.dtypes.StringDType)
    run = load_run(save_run(tmp_path / "run", small_data(IDS)))
    users = KnownUsers(ids, np.zeros(len(ids) + 1, np.int64), np.zeros(0, np.int32))
    assert "user_ids.tolist().index('u0')" in usage(dataclasses.replace(run, users=users), tmp_path, tmp_path)


def test_command(exported, capsys):
    _, path, *_ = exported
    directory = path.parent.parent
    before = set(directory.iterdir())
    assert main(["export", "--checkpoint", str(directory)]) == 0
    own, items = directory / "model.jaxexport", directory / "model.items.npz"
    assert set(directory.iterdir()) - before == {own, items}
    printed = capsys.readouterr().out
    assert f"epoch 1: wrote {own}" in printed
    assert usage(load_run(directory), own, items) in printed

    vectors = directory.parent / "vectors.npz"
    before = set(directory.iterdir())
    assert main(["export", "--checkpoint", str(directory), "--embeddings", str(vectors)]) == 0
    assert set(directory.iterdir()) == before
    assert "wrote 40 vectors of " in capsys.readouterr().out
    table, known = read_item_vectors(vectors, IDS)
    model = load_run(directory).model
    np.testing.assert_array_equal(table[1:], model.items()[0][1:41])
    assert known.tolist() == [False] + [True] * 40
    assert main(["export", "--checkpoint", str(directory), "--embeddings", str(directory / "items.npz")]) == 2
    assert "is a file of the run in" in capsys.readouterr().err
    clash = ["--output", str(vectors.with_name("m")), "--embeddings", str(vectors.with_name("m.items.npz"))]
    assert main(["export", "--checkpoint", str(directory), *clash]) == 2
    assert "is the file of its ids as well" in capsys.readouterr().err

    assert main(["export", "--checkpoint", str(directory), "--which", "last", "--output", str(path)]) == 0
    assert f"epoch 2: wrote {path}" in capsys.readouterr().out
    assert main(["export", "--checkpoint", str(directory), "--output", str(directory)]) == 2
    assert f"error: output: {directory} is a folder" in capsys.readouterr().err
