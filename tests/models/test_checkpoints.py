import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from models.architectures.registry import make_config
from models.data import drifting_interests
from models.training import checkpoints, loop
from models.training.checkpoints import CheckpointError, Checkpoints, flatten, load_run
from models.training.compare import compare
from models.training.files import read_history
from models.training.training_data import make_training_data
from tests.models.saved_runs import ToyProgram, assert_same, leaves, save_run

ROOT = Path(__file__).parents[2]
CONFIG = make_config(
    max_length=8, embedding_dim=8, num_blocks=1, epochs=6, batch_size=20, eval_every=2, learning_rate=1e-2, seed=1
)


@pytest.fixture(scope="module")
def interactions():
    return drifting_interests(num_users=60, num_items=40, num_groups=5, seed=3)


@pytest.fixture(scope="module")
def prepared(interactions):
    return make_training_data(interactions, CONFIG)


@pytest.fixture
def toy(monkeypatch):
    """No compiling, where it does not matter what is trained."""
    monkeypatch.setattr(loop, "Program", ToyProgram)


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory):
    """The folder of a finished run, to copy, and its result."""
    directory = tmp_path_factory.mktemp("finished")
    return directory, loop.train(prepared, CONFIG, "sevo-adamw", directory)


def stop_after(monkeypatch, epoch, error=RuntimeError):
    """Makes training break behind an epoch, as if the machine had failed."""
    record = loop.Run.record

    def breaking(self, entry):
        record(self, entry)
        if entry["epoch"] == epoch:
            raise error

    monkeypatch.setattr(loop.Run, "record", breaking)


@pytest.mark.parametrize("optimizer", ["adamw", "sevo-adamw", "sevo-gradient"])
def test_a_resumed_run_ends_bit_by_bit_as_an_uninterrupted_one(prepared, tmp_path, monkeypatch, optimizer):
    whole = loop.train(prepared, CONFIG, optimizer, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(RuntimeError):
            loop.train(prepared, CONFIG, optimizer, tmp_path / "broken")
    assert Checkpoints(tmp_path / "broken").epochs() == [2, 4]
    kept = read_history(tmp_path / "broken" / "history.jsonl", 4)
    resumed = loop.train(prepared, CONFIG, optimizer, tmp_path / "broken", resume=True)
    assert_same(leaves(tmp_path / "whole", 6), leaves(tmp_path / "broken", 6))
    assert resumed.losses == whole.losses
    assert (resumed.best_epoch, resumed.test) == (whole.best_epoch, whole.test)
    history = read_history(tmp_path / "broken" / "history.jsonl")
    assert [record["epoch"] for record in history] == [1, 2, 3, 4, 5, 6]
    # A run that started anew would end in the same way, but how long epochs took is never the same twice.
    assert history[:4] == kept


def test_the_graph_is_not_saved(prepared, tmp_path):
    loop.train(prepared, dataclasses.replace(CONFIG, epochs=2), "sevo-adamw", tmp_path)
    saved = leaves(tmp_path, 2)
    assert any("moments" in name for name in saved)
    assert not any("graph" in name for name in saved)
    edges = prepared.nodes.adjacency.nse
    assert all(edges not in array.shape for array in saved.values())


def test_a_finished_run_is_not_trained_again(prepared, tmp_path, toy, monkeypatch):
    result = loop.train(prepared, CONFIG, "adamw", tmp_path)
    monkeypatch.setattr(loop, "Program", None)
    assert loop.train(prepared, CONFIG, "adamw", tmp_path, resume=True) == result


def test_more_epochs_go_on_from_a_finished_run(prepared, tmp_path, toy):
    loop.train(prepared, dataclasses.replace(CONFIG, epochs=4), "sevo-adamw", tmp_path / "longer")
    kept = read_history(tmp_path / "longer" / "history.jsonl")
    longer = loop.train(prepared, CONFIG, "sevo-adamw", tmp_path / "longer", resume=True)
    whole = loop.train(prepared, CONFIG, "sevo-adamw", tmp_path / "whole")
    assert longer.losses == whole.losses
    assert longer.test == whole.test
    assert read_history(tmp_path / "longer" / "history.jsonl", 4) == kept


def test_a_run_is_neither_replaced_nor_mixed_up(prepared, tmp_path, toy):
    loop.train(prepared, dataclasses.replace(CONFIG, epochs=2), "adamw", tmp_path)
    before = leaves(tmp_path, 2)

    def again(config=CONFIG, optimizer="adamw", data=prepared, **options):
        return loop.train(data, config, optimizer, tmp_path, **options)

    with pytest.raises(CheckpointError, match=r"holds a run already; go on with --resume"):
        again()
    with pytest.raises(CheckpointError, match="was trained with adamw, not sevo-adamw"):
        again(optimizer="sevo-adamw", resume=True)
    with pytest.raises(CheckpointError, match=r"learning_rate=0\.01, not 0\.5; resume with the same options"):
        again(dataclasses.replace(CONFIG, learning_rate=0.5), resume=True)
    other = make_training_data(drifting_interests(num_users=60, num_items=40, num_groups=5, seed=4), CONFIG)
    with pytest.raises(CheckpointError, match="was trained on other data"):
        again(data=other, resume=True)
    with pytest.raises(CheckpointError, match="schedule=constant, not cosine"):
        again(dataclasses.replace(CONFIG, schedule="cosine", epochs=2), resume=True)
    assert_same(before, leaves(tmp_path, 2))
    assert len(again(dataclasses.replace(CONFIG, epochs=3), overwrite=True).losses) == 3
    assert Checkpoints(tmp_path).epochs() == [2, 3]


def test_a_schedule_does_not_change_its_end(prepared, tmp_path, toy):
    config = dataclasses.replace(CONFIG, schedule="linear", epochs=2)
    loop.train(prepared, config, "adamw", tmp_path)
    with pytest.raises(CheckpointError, match="epochs=2, not 6"):
        loop.train(prepared, dataclasses.replace(config, epochs=6), "adamw", tmp_path, resume=True)


def damage(folder, how):
    """Spoils the arrays of a checkpoint, or takes files away."""
    if how == "no description":
        (folder / "state" / "_METADATA").unlink()
    for file in (folder / "state").rglob("d/*"):
        content = bytearray(file.read_bytes())
        if how == "missing":
            file.unlink()
        elif how == "truncated":
            file.write_bytes(content[: len(content) // 2])
        elif how == "flipped":
            content[len(content) // 2] ^= 0xFF
            file.write_bytes(content)
        elif how == "empty":
            file.write_bytes(b"")


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "empty", "no description"])
def test_a_damaged_checkpoint_is_refused_and_the_older_one_taken(prepared, finished, tmp_path, capsys, how):
    folder, whole = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    expected = leaves(tmp_path, 6)
    older = leaves(tmp_path, 4)
    damage(tmp_path / "checkpoints" / "6", how)
    with pytest.raises(CheckpointError, match=r"checkpoints/6 (cannot be read|is damaged)"):
        Checkpoints(tmp_path).load(6)
    loaded = load_run(tmp_path, "last")
    assert loaded.epoch == 4
    assert "checkpoints/6" in capsys.readouterr().err
    for name, array in flatten(nnx.state(loaded.model, nnx.Param), "last").items():
        np.testing.assert_array_equal(array, older[name], err_msg=name)
    if how == "flipped":
        (tmp_path / "result.json").unlink()
        assert loop.train(prepared, CONFIG, "sevo-adamw", tmp_path, resume=True).losses == whole.losses
        assert_same(expected, leaves(tmp_path, 6))
        kept, history = (read_history(path / "history.jsonl") for path in (folder, tmp_path))
        assert history[:4] == kept[:4]
        assert history[4:] != kept[4:]

    for epoch in (4, 6):
        (tmp_path / "checkpoints" / str(epoch) / "note" / "metadata").write_bytes(b"{")
    with pytest.raises(CheckpointError, match="there is no other; train again with --overwrite"):
        load_run(tmp_path)


def test_a_checkpoint_of_a_later_version_is_kept(prepared, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "result.json").unlink()
    note = tmp_path / "checkpoints" / "6" / "note" / "metadata"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match=r"checkpoints/6 was written by a later version .* update it$"):
        load_run(tmp_path)
    with pytest.raises(CheckpointError, match="later version"):
        loop.train(prepared, CONFIG, "sevo-adamw", tmp_path, resume=True)
    assert Checkpoints(tmp_path).epochs() == [4, 6]


def test_a_checkpoint_that_cannot_be_read_now_is_kept(prepared, finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "result.json").unlink()

    def fails():
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "_checkpointer", fails)
        with pytest.raises(CheckpointError, match=r"checkpoints/6 cannot be read .Input/output error.; nothing was"):
            loop.train(prepared, CONFIG, "sevo-adamw", tmp_path, resume=True)
    assert Checkpoints(tmp_path).epochs() == [4, 6]
    assert loop.train(prepared, CONFIG, "sevo-adamw", tmp_path, resume=True).losses == finished[1].losses


def test_what_is_no_run_is_refused(interactions, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no run\.json; give the folder of a training run"):
        load_run(tmp_path)
    save_run(tmp_path, interactions)
    with pytest.raises(ValueError, match="which must be best or last, got 'first'"):
        load_run(tmp_path, "first")
    run = json.loads((tmp_path / "run.json").read_text())
    for changed, message in [
        ({"format": 99}, r"later version of this program \(format 99; known are those up to 2\): update it"),
        ({"format": "two"}, "its format is 'two', not a number"),
        ({"num_items": "many"}, "num_items must be a number of at least 1, got 'many'"),
        ({"config": run["config"] | {"model": "gru"}}, r"run\.json does not fit this version .*gru"),
        (
            {"config": run["config"] | {"num_heads": 0}},
            r"run\.json does not fit this version .*num_heads must be at least 1",
        ),
        ({"config": run["config"] | {"num_heads": 3}}, r"run\.json does not fit this version .*num_heads must divide"),
        ({"config": run["config"] | {"epochs": "x"}}, r"run\.json does not fit this version"),
        ({"config": []}, r"run\.json does not fit this version"),
        ({"config": run["config"] | {"wings": 2}}, "unknown option wings"),
        ({"num_items": 7}, r"items\.npz belongs to another run"),
        ({"config": run["config"] | {"num_blocks": 2}}, "belongs to another model"),
    ]:
        (tmp_path / "run.json").write_text(json.dumps(run | changed))
        with pytest.raises(CheckpointError, match=message):
            load_run(tmp_path)
    for text in ("", "[1]", '{"half":', "[" * 10**5, '{"name": "of something else"}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(CheckpointError, match="was not written by a training run"):
            load_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(run))
    items = (tmp_path / "items.npz").read_bytes()
    flipped = bytearray(items)
    flipped[len(items) // 2] ^= 0xFF
    for content in (b"", b"PK", items[: len(items) // 2], items[:-1], bytes(flipped)):
        (tmp_path / "items.npz").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"items\.npz (cannot be read|belongs to another)") as caught:
            load_run(tmp_path)
        assert "\n" not in str(caught.value)


def test_the_best_and_the_last_model(prepared, tmp_path, interactions):
    result = loop.train(prepared, dataclasses.replace(CONFIG, epochs=40), "sevo-adamw", tmp_path)
    assert result.best_epoch < 40
    best, last = load_run(tmp_path), load_run(tmp_path, "last")
    assert (best.epoch, last.epoch) == (result.best_epoch, 40)
    np.testing.assert_array_equal(best.item_ids, interactions.item_ids)
    from models.evaluation import metrics

    def tested(run):
        return metrics.summarize(jax.jit(lambda model: prepared.test.ranks(model, {}))(run.model))

    assert tested(best)["NDCG@10"] == pytest.approx(result.test["NDCG@10"], abs=1e-6)
    assert tested(last)["NDCG@10"] != pytest.approx(result.test["NDCG@10"], abs=1e-6)


def test_seeds_side_by_side_are_runs_of_their_own(prepared, tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, epochs=4)
    alone = [
        loop.train(prepared, dataclasses.replace(config, seed=seed), "sevo-adamw", tmp_path / f"alone-{seed}")
        for seed in (1, 2)
    ]
    folders = [tmp_path / "together-1", tmp_path / "together-2"]
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(RuntimeError):
            loop.train_seeds(prepared, config, "sevo-adamw", [1, 2], folders)
    kept = [read_history(folder / "history.jsonl", 2) for folder in folders]
    together = loop.train_seeds(prepared, config, "sevo-adamw", [1, 2], folders, resume=True)
    for one, two in zip(alone, together, strict=True):
        np.testing.assert_allclose(two.losses, one.losses, rtol=1e-3)
        assert two.config == one.config
    assert together[0].losses != together[1].losses
    assert [read_history(folder / "history.jsonl", 2) for folder in folders] == kept
    for seed in (1, 2):
        found, wanted = (leaves(tmp_path / f"{name}-{seed}", 4) for name in ("together", "alone"))
        assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in wanted.items()}
        assert load_run(tmp_path / f"together-{seed}").info.config.seed == seed


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_one(prepared, tmp_path, toy, monkeypatch):
    save = Checkpoints.save

    def full(self, checkpoint):
        if checkpoint.epoch < 4:
            return save(self, checkpoint)
        # The nearest thing to a full disk that needs no disk of its own: files may not grow.
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            return save(self, checkpoint)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", full)
        with pytest.raises(CheckpointError, match=r"epoch 4 cannot be written to .*the one of epoch 2 is kept"):
            loop.train(prepared, CONFIG, "adamw", tmp_path)
    assert Checkpoints(tmp_path).epochs() == [2]
    kept = read_history(tmp_path / "history.jsonl", 2)
    resumed = loop.train(prepared, CONFIG, "adamw", tmp_path, resume=True)
    assert resumed.losses == loop.train(prepared, CONFIG, "adamw").losses
    assert read_history(tmp_path / "history.jsonl", 2) == kept


def test_divergence_keeps_the_last_good_checkpoint(prepared, tmp_path, toy, monkeypatch):
    epoch = loop.Program.epoch

    def diverging(self, number):
        losses = epoch(self, number).copy()
        if number == 5:
            losses[0, 1] = np.nan
        return losses

    monkeypatch.setattr(loop.Program, "epoch", diverging)
    with pytest.raises(loop.DivergedError, match=r"epoch 5, step 2, is nan; the checkpoint of epoch 4 is kept"):
        loop.train(prepared, CONFIG, "adamw", tmp_path)
    assert Checkpoints(tmp_path).epochs() == [2, 4]
    assert not (tmp_path / "result.json").exists()


COMMAND = [
    *(sys.executable, "-m", "models", "train", "--optimizer", "sevo-gradient", "--eval-every", "2"),
    *("--batch-size", "32", "--embedding-dim", "8", "--num-blocks", "1", "--max-length", "10"),
]


@pytest.fixture
def data_file(tmp_path):
    """Epochs so short that a run spends much of its time on files."""
    rng = np.random.default_rng(0)
    rows = [f"{user} {' '.join(map(str, 1 + rng.permutation(50)[:8]))}" for user in range(200)]
    path = tmp_path / "data.txt"
    path.write_text("\n".join(rows))
    return path


def start_training(directory, data, epochs, *options):
    return subprocess.Popen(
        [*COMMAND, "--data", str(data), "--epochs", str(epochs), "--output-dir", str(directory), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error


def wait_for_epochs(process, directory, count):
    history = directory / "history.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if history.exists() and history.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {count} epochs: {process.communicate()[1][-2000:]}")


def test_killed_at_a_random_moment_and_resumed(tmp_path, data_file, monkeypatch):
    # Killed while writing a compiled program, it leaves the others' folder whole.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # pytest shows it with what failed
    moment = random.Random(seed)
    finish(start_training(tmp_path / "whole", data_file, 60))
    process = start_training(tmp_path / "killed", data_file, 60)
    wait_for_epochs(process, tmp_path / "killed", moment.randrange(1, 40))
    time.sleep(moment.random() * 0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it finished before it was killed"
    saved = max(Checkpoints(tmp_path / "killed").epochs(), default=0)
    kept = read_history(tmp_path / "killed" / "history.jsonl", saved)
    finish(start_training(tmp_path / "killed", data_file, 60, "--resume"))
    for epoch in (58, 60):
        assert_same(leaves(tmp_path / "whole", epoch), leaves(tmp_path / "killed", epoch))
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed")]
    assert results[0]["test"] == results[1]["test"]
    assert results[0]["losses"] == results[1]["losses"]
    assert read_history(tmp_path / "killed" / "history.jsonl", saved) == kept  # it went on from there


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_polite_stop_saves_and_exits(tmp_path, data_file, number):
    directory = tmp_path / "run"
    process = start_training(directory, data_file, 10_000)
    wait_for_epochs(process, directory, 3)
    process.send_signal(number)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "go on with --resume" in error
    assert "Traceback" not in error
    epochs = len(read_history(directory / "history.jsonl"))
    assert Checkpoints(directory).epochs()[-1] == epochs


def test_a_stop_asked_for_after_saving_waits_for_the_next_epoch(prepared, tmp_path, toy, monkeypatch):
    class Interrupted(loop.Progress):
        def epoch(self, number, **shown):
            super().epoch(number, **shown)
            if number == 3:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "Progress", Interrupted)
    with pytest.raises(KeyboardInterrupt, match="interrupted after epoch 4, which is saved"):
        loop.train(prepared, CONFIG, "adamw", tmp_path)
    assert Checkpoints(tmp_path).epochs()[-1] == len(read_history(tmp_path / "history.jsonl")) == 4


def test_a_stop_in_the_last_epoch_ends_what_would_come_next(prepared, tmp_path, toy, monkeypatch):
    class Interrupted(loop.Progress):
        def epoch(self, number, **shown):
            super().epoch(number, **shown)
            if number == CONFIG.epochs:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "Progress", Interrupted)
    with pytest.raises(KeyboardInterrupt, match="interrupted; what was begun is finished"):
        compare(prepared, CONFIG, tmp_path, optimizers=("adamw", "sevo-adamw"))
    assert (tmp_path / "adamw-1" / "result.json").exists()
    assert not (tmp_path / "sevo-adamw-1").exists()
    monkeypatch.undo()


def test_messages_of_a_failed_write_are_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="there is no older one") as caught:
        Checkpoints(tmp_path).save(checkpoints.Checkpoint(1, {"a": np.ones(2)}, {}))
    assert "\n" not in str(caught.value)
