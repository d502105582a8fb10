"""What a run does with its folder, and what it refuses: nothing of a user's is lost or taken for something else."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from models.__main__ import main
from models.architectures.registry import make_config
from models.config import SourceConfig
from models.data import Interactions, drifting_interests, load_interactions, split_interactions
from models.files import LOCK, claim
from models.training import checkpoints, compare, loop, run
from models.training.checkpoints import CheckpointError, Checkpoints, RunInfo, fingerprint, load_run
from models.training.files import read_history
from models.training.interrupts import stop_gently
from models.training.overlap import overlap_note
from models.training.training_data import make_training_data
from tests.models.saved_runs import ToyProgram, save_run, small_data
from tests.models.test_files import small_files

ROOT = Path(__file__).parents[2]
CONFIG = make_config(max_length=8, epochs=6, batch_size=20, eval_every=2, learning_rate=1e-2, seed=1)


@pytest.fixture(scope="module")
def prepared():
    return make_training_data(drifting_interests(num_users=60, num_items=40, num_groups=5, seed=3), CONFIG)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(loop, "Program", ToyProgram)


@pytest.fixture
def trained(prepared, tmp_path, toy):
    """The folder of a finished run."""
    loop.train(prepared, CONFIG, "adamw", tmp_path / "run")
    return tmp_path / "run"


def test_processes_must_agree_on_when_to_stop(prepared, tmp_path, toy, monkeypatch):
    told = []
    monkeypatch.setattr("models.training.run.check_same", lambda what, digest: told.append((what, digest)))
    for number, options in enumerate([{}, {}, {"epochs": 4}, {"patience": 1}, {"cache_dir": tmp_path}]):
        train(prepared, tmp_path / str(number), **options)
    digests = [digest for what, digest in told if what == "options"]
    assert [digest == digests[0] for digest in digests] == [True, True, False, False, True]


def contents(folder):
    """Every file with what it holds and when it was written."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def train(prepared, folder, **options):
    settings = {name: options.pop(name) for name in list(options) if name not in ("resume", "overwrite")}
    return loop.train(prepared, dataclasses.replace(CONFIG, **settings), "adamw", folder, **options)


class TestOthersFiles:
    @pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
    @pytest.mark.parametrize("with_json", [True, False])
    def test_a_folder_with_files_but_no_run_is_refused(self, prepared, tmp_path, toy, options, with_json):
        mine = tmp_path / "mine"
        for name in ("checkpoints/100/state/weights", "tensorboard/thesis.txt", "per_user.csv", "result.json"):
            (mine / name).parent.mkdir(parents=True, exist_ok=True)
            (mine / name).write_text("years of work")
        if with_json:
            (mine / "run.json").write_text('{"name": "of something else"}')
        before = contents(mine)
        with pytest.raises(
            CheckpointError, match=r"mine holds (checkpoints, but no run|run\.json, which no training run)"
        ):
            train(prepared, mine, **options)
        assert contents(mine) == before
        assert not (mine / LOCK).exists()

    def test_hidden_files_and_empty_folders_are_no_reason(self, prepared, tmp_path, toy):
        (tmp_path / ".gitignore").write_text("*")
        train(prepared, tmp_path)
        assert (tmp_path / ".gitignore").read_text() == "*"

    def test_overwriting_removes_what_a_run_writes_and_no_more(self, prepared, trained):
        train(prepared, trained, overwrite=True, logger=("tensorboard",), per_user=True)
        mine = [
            "notes.txt",
            "model.jaxexport",
            "tensorboard/thesis.txt",
            "checkpoints/best.npz",
            "checkpoints/8/of mine",
        ]
        for name in mine:
            (trained / name).parent.mkdir(exist_ok=True)
            (trained / name).write_text("years of work")
        train(prepared, trained, overwrite=True, epochs=2)
        assert all((trained / name).read_text() == "years of work" for name in mine)
        assert not (trained / "per_user.csv").exists()
        assert not list(trained.glob("tensorboard/events*"))
        assert Checkpoints(trained).epochs() == [2]

    def test_overwriting_removes_what_another_model_computed_with(self, tmp_path):
        data = drifting_interests(num_users=60, num_items=40, num_groups=5, seed=3)
        options = {"embedding_dim": 4, "epochs": 1, "eval_every": 1}
        for model, beside in (("lightgcn", {"context.npz", "users.npz"}), ("popularity", set())):
            config = make_config(model, **(options if beside else {}))
            optimizer = "adam" if beside else "closed-form"
            loop.train(make_training_data(data, config), config, optimizer, tmp_path / "run", overwrite=True)
            found = {path.name for path in (tmp_path / "run").iterdir()}
            assert found & {"context.npz", "users.npz"} == beside

    def test_a_comparison_is_refused_before_it_trains(self, prepared, trained, monkeypatch):
        folder = trained.parent
        trained.rename(folder / "sevo-adamw-1")
        monkeypatch.setattr(compare, "train_seeds", lambda *_, **__: pytest.fail("trained first"))
        arms = {"optimizers": ("adamw", "sevo-adamw")}
        with pytest.raises(CheckpointError, match="sevo-adamw-1 holds a run already"):
            compare.compare(prepared, CONFIG, folder, **arms)
        with pytest.raises(CheckpointError, match="was trained with adamw, not sevo-adamw"):
            compare.compare(prepared, CONFIG, folder, **arms, resume=True)
        assert not (folder / "adamw-1").exists()

    def test_a_comparison_that_cannot_go_on_is_refused_before_it_trains(self, prepared, tmp_path, toy, monkeypatch):
        config = dataclasses.replace(CONFIG, optimizer="sevo-adamw")
        loop.train(prepared, config, "sevo-adamw", tmp_path / "sevo-adamw-1")
        monkeypatch.setattr(compare, "train_seeds", lambda *_, **__: pytest.fail("trained first"))
        arms = {"optimizers": ("adamw", "sevo-adamw"), "resume": True}
        shorter = dataclasses.replace(CONFIG, epochs=CONFIG.epochs - 1)
        with pytest.raises(CheckpointError, match=f"trained for {CONFIG.epochs} epochs already, more than epochs="):
            compare.compare(prepared, shorter, tmp_path, **arms)
        (tmp_path / "sevo-adamw-1" / "result.json").write_text("{")
        with pytest.raises(ValueError, match=r"result\.json is damaged"):
            compare.compare(prepared, CONFIG, tmp_path, **arms)

    def test_what_was_removed_by_halves_stands_in_no_way(self, prepared, trained, monkeypatch):
        """A process that was killed while it removed the oldest checkpoint."""
        rmtree = shutil.rmtree

        def killed(folder, **_):
            rmtree(folder / "state")
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", killed)
            with pytest.raises(KeyboardInterrupt):
                train(prepared, trained, resume=True, epochs=8)
        result = train(prepared, trained, overwrite=True, epochs=8)
        assert len(result.losses) == 8
        assert not [*trained.rglob("*-tmp*")]

    def test_a_reader_of_a_run_that_goes_on_finds_what_is_there_now(self, trained, monkeypatch, capsys):
        load, listed = Checkpoints.load, Checkpoints(trained).epochs()

        def load_late(self, epoch):
            if epoch in listed:  # what was listed is gone when it is read
                for old in listed[:]:
                    (self.directory / str(old)).rename(self.directory / str(old + 100))
                    listed.remove(old)
                raise CheckpointError(f"{epoch} cannot be read")
            return load(self, epoch)

        monkeypatch.setattr(Checkpoints, "load", load_late)
        assert [checkpoint.epoch for checkpoint in Checkpoints(trained).readable()] == [106, 104]
        assert capsys.readouterr() == ("", "")

    def test_what_a_killed_process_left_unfinished_goes(self, prepared, trained):
        (trained / ".partial-999999999-abc").write_bytes(b"half")
        (trained / "embeddings").mkdir()
        (trained / "embeddings" / ".partial-999999999-abc").write_bytes(b"half")
        (trained / f".partial-{os.getpid()}-abc").write_bytes(
            b"half"
        )  # of another container, which began to count anew
        written = trained / f".partial-{os.getppid()}-abc"  # by a process that lives, such as evaluate --per-user
        written.write_bytes(b"half")
        (trained / "checkpoints" / "8.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
        train(prepared, trained, resume=True, epochs=8)
        assert [*trained.rglob(".partial*"), *trained.rglob("*-tmp*")] == [written]

    def test_killed_while_it_replaced_a_run_of_other_data(self, prepared, trained, monkeypatch):
        """Between run.json and the ids of its items: those of the other run are gone by then."""
        other = make_training_data(Interactions.from_sequences([[1, 2, 3, 4], [2, 3, 4, 1]] * 8), CONFIG)

        def killed(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "write_bytes", killed)
            with pytest.raises(KeyboardInterrupt):
                loop.train(other, CONFIG, "adamw", trained, overwrite=True)
        assert len(loop.train(other, CONFIG, "adamw", trained, resume=True).losses) == CONFIG.epochs


class TestOneAtATime:
    def test_a_second_process_is_refused(self, prepared, trained):
        before = contents(trained)
        with claim(trained / LOCK):
            for options in ({"resume": True}, {"overwrite": True}):
                with pytest.raises(
                    CheckpointError, match=r"another process trains in .*run; wait for it, or give another"
                ):
                    train(prepared, trained, epochs=8, **options)
        assert contents(trained) == before
        assert len(train(prepared, trained, epochs=8, resume=True).losses) == 8

    def test_a_comparison_over_one_of_whose_runs_is_trained_destroys_nothing(
        self, prepared, tmp_path, toy, monkeypatch
    ):
        arms = {"optimizers": ("adamw", "sevo-adamw")}
        compare.compare(prepared, CONFIG, tmp_path, **arms)
        before = contents(tmp_path)
        monkeypatch.setattr(compare, "train_seeds", lambda *_, **__: pytest.fail("trained first"))
        with claim(tmp_path / "sevo-adamw-1" / LOCK), pytest.raises(CheckpointError, match="another process trains in"):
            compare.compare(prepared, CONFIG, tmp_path, **arms, overwrite=True)
        assert contents(tmp_path) == before

    def test_while_it_trains(self, prepared, tmp_path, toy, monkeypatch):
        epoch, refused = ToyProgram.epoch, []

        def intrude(self, number):
            with pytest.raises(CheckpointError, match="another process trains") as caught:
                train(prepared, tmp_path, resume=True)
            refused.append(caught)
            return epoch(self, number)

        monkeypatch.setattr(ToyProgram, "epoch", intrude)
        assert len(train(prepared, tmp_path, epochs=2).losses) == len(refused) == 2
        with claim(tmp_path / LOCK) as free:
            assert free


class TestResuming:
    @pytest.mark.parametrize("how", ["the same", "tensorboard", "patience"])
    def test_a_finished_run_stays_as_it_is(self, prepared, trained, how):
        before = contents(trained)
        options = {"the same": {}, "tensorboard": {"logger": ("tensorboard",)}, "patience": {"patience": 2}}[how]
        result = train(prepared, trained, resume=True, **options)
        assert len(result.losses) == 6
        assert contents(trained) == before

    def test_fewer_epochs_than_trained_are_refused(self, prepared, trained):
        before = contents(trained)
        with pytest.raises(
            CheckpointError, match=r"was trained for 6 epochs already, more than epochs=4; give --epochs 6 or more"
        ):
            train(prepared, trained, resume=True, epochs=4)
        assert contents(trained) == before

    def test_the_ids_of_another_run_are_refused(self, prepared, trained, tmp_path):
        ids = prepared.interactions.item_ids
        other = make_training_data(dataclasses.replace(prepared.interactions, item_ids=ids[::-1]), CONFIG)
        train(other, tmp_path / "other")
        shutil.copy(tmp_path / "other" / "items.npz", trained / "items.npz")
        for attempt in (lambda: load_run(trained), lambda: train(prepared, trained, resume=True, epochs=8)):
            with pytest.raises(CheckpointError, match=r"items\.npz belongs to another run than .*run\.json"):
                attempt()

    @pytest.mark.parametrize("other", [{"seed": 2}, {"learning_rate": 0.5}])
    def test_checkpoints_of_another_run_are_refused(self, prepared, trained, tmp_path, other):
        train(prepared, tmp_path / "other", **other)
        shutil.rmtree(trained / "checkpoints" / "6")
        shutil.copytree(tmp_path / "other" / "checkpoints" / "6", trained / "checkpoints" / "6")
        before = contents(trained)
        for attempt in (lambda: load_run(trained), lambda: train(prepared, trained, resume=True, epochs=8)):
            with pytest.raises(
                CheckpointError, match=r"checkpoints/6 belongs to another run than .*run\.json; move it away"
            ):
                attempt()
        assert contents(trained) == before

    def test_a_copy_of_a_run_goes_on(self, prepared, trained, tmp_path):
        kept = read_history(trained / "history.jsonl")
        folders = [trained, shutil.copytree(trained, tmp_path / "copy")]
        one, other = (train(prepared, folder, resume=True, epochs=8) for folder in folders)
        assert one.losses == other.losses
        # Runs that started anew would end in the same way, but how long epochs took is never the same twice.
        assert [read_history(folder / "history.jsonl", 6) for folder in folders] == [kept, kept]


class TestFingerprint:
    def test_times_count_where_the_split_uses_them(self):
        sequences, times = [[1, 2, 3], [2, 3]], [[1, 2, 3], [4, 5]]
        data = Interactions.from_sequences(sequences, times=times)
        later = Interactions.from_sequences(sequences, times=[[1, 2, 30], [4, 5]])
        assert fingerprint(data) == fingerprint(later) == fingerprint(Interactions.from_sequences(sequences))
        assert fingerprint(data, "leave-one-out") == fingerprint(data)
        assert fingerprint(data, "global-time") not in (fingerprint(later, "global-time"), fingerprint(data))

    def test_other_times_are_other_data(self, tmp_path, toy):
        rng = np.random.default_rng(0)
        data = drifting_interests(num_users=60, num_items=40, num_groups=5, seed=3)
        times = np.concatenate([np.sort(rng.integers(0, 1000, n)) for n in data.lengths])
        data = dataclasses.replace(data, times=times)
        config = dataclasses.replace(CONFIG, split="global-time", split_times=("400", "700"))
        loop.train(make_training_data(data, config), config, "adamw", tmp_path)
        more = dataclasses.replace(config, epochs=8)
        moved = dataclasses.replace(data, times=times + (times > 800))
        with pytest.raises(CheckpointError, match="was trained on other data"):
            loop.train(make_training_data(moved, config), more, "adamw", tmp_path, resume=True)
        assert len(loop.train(make_training_data(data, config), more, "adamw", tmp_path, resume=True).losses) == 8

    def test_runs_of_the_first_format_go_on(self, tmp_path, toy):
        """Their fingerprint left times out, and they had neither identity nor a digest of the items' ids."""
        data = drifting_interests(num_users=60, num_items=40, num_groups=5, seed=3)
        data = dataclasses.replace(data, times=np.concatenate([np.arange(n) for n in data.lengths]))
        config = dataclasses.replace(CONFIG, split="global-time", split_times=("4", "8"))
        prepared = make_training_data(data, config)
        whole = loop.train(prepared, dataclasses.replace(config, epochs=8), "adamw", tmp_path / "whole")
        loop.train(prepared, config, "adamw", tmp_path / "old")
        as_of_old(tmp_path / "old", data=fingerprint(data))
        kept = read_history(tmp_path / "old" / "history.jsonl")
        resumed = loop.train(prepared, dataclasses.replace(config, epochs=8), "adamw", tmp_path / "old", resume=True)
        assert resumed.losses == whole.losses
        assert read_history(tmp_path / "old" / "history.jsonl", 6) == kept
        assert RunInfo.read(tmp_path / "old") == RunInfo.read(tmp_path / "whole")


def as_of_old(folder, **fields):
    """Turns a run into one as the first version left it: no run in progress, less in ``run.json``."""
    import orbax.checkpoint as ocp

    values = json.loads((folder / "run.json").read_text())
    kept = {name: values[name] for name in ("optimizer", "config", "num_items", "data")}
    (folder / "run.json").write_text(json.dumps({"format": 1} | kept | fields))
    result = json.loads((folder / "result.json").read_text())
    later = ("format", "seeds_together", "epoch_steps", "groups")
    (folder / "result.json").write_text(json.dumps({name: x for name, x in result.items() if name not in later}))
    for epoch in Checkpoints(folder).epochs():
        checkpoint = Checkpoints(folder).load(epoch)
        shutil.rmtree(folder / "checkpoints" / str(epoch))
        progress = {name: x for name, x in checkpoint.progress.items() if name != "run"}
        note = {"digest": checkpoints._digest(checkpoint.leaves), "progress": progress}
        parts = ocp.args.Composite(state=ocp.args.StandardSave(checkpoint.leaves), note=ocp.args.JsonSave(note))
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        with ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options) as manager:
            manager.save(epoch, args=parts, force=True)


def test_a_model_of_the_first_format_is_loaded(tmp_path):
    new, old = (save_run(tmp_path / name, small_data()) for name in ("new", "old"))
    (old / "result.json").write_text("{}")
    as_of_old(old)
    found, wanted = load_run(old), load_run(new)
    assert found.epoch == wanted.epoch
    assert found.info.run == found.info.items == ""
    for one, two in zip(flat(found.model), flat(wanted.model), strict=True):
        np.testing.assert_array_equal(one, two)
    shutil.rmtree(old / "checkpoints" / "2" / "state" / "d")
    with pytest.raises(CheckpointError, match=r"checkpoints/2 cannot be read \(files of it are missing\)"):
        load_run(old)


def flat(model):
    import jax
    from flax import nnx

    return jax.tree.leaves(nnx.state(model, nnx.Param))


def test_half_precision_survives(tmp_path):
    import jax.numpy as jnp

    leaves = {"a": np.asarray(jnp.arange(3, dtype=jnp.bfloat16)), "b": np.ones((), np.int32), "c": np.arange(2.0)}
    Checkpoints(tmp_path).save(checkpoints.Checkpoint(3, leaves, {"best": 0.5}))
    found = Checkpoints(tmp_path).load(3)
    assert found.progress == {"best": 0.5}
    for name, array in leaves.items():
        assert found.leaves[name].dtype == array.dtype
        np.testing.assert_array_equal(found.leaves[name], array)


class TestDamage:
    @pytest.mark.parametrize("text", ["", "{", "[]", '{"wings": 2}', "[" * 100_000])
    def test_a_result(self, prepared, trained, text):
        (trained / "result.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"result\.json is damaged \(.*\); delete it, and --resume makes it"
        ) as caught:
            train(prepared, trained, resume=True)
        assert "\n" not in str(caught.value)
        (trained / "result.json").unlink()
        assert len(train(prepared, trained, resume=True).losses) == 6

    def test_a_result_of_a_later_version(self, prepared, trained):
        values = json.loads((trained / "result.json").read_text())
        (trained / "result.json").write_text(json.dumps(values | {"format": 3, "wings": 2}))
        with pytest.raises(ValueError, match=r"result\.json was written by a later version .*update it, or delete it"):
            train(prepared, trained, resume=True)

    @pytest.mark.parametrize("line", [0, 3, 5])
    def test_a_history(self, prepared, trained, line):
        lines = (trained / "history.jsonl").read_text().splitlines()
        lines[line] = lines[line][:20]
        (trained / "history.jsonl").write_text("\n".join(lines))
        with pytest.raises(ValueError, match=rf"history\.jsonl is damaged: its line {line + 1} is no record of epoch"):
            train(prepared, trained, resume=True, epochs=8)

    def test_a_history_without_the_best_epoch(self, prepared, trained):
        records = [json.loads(line) for line in (trained / "history.jsonl").read_text().splitlines()]
        text = "".join(json.dumps({"epoch": x["epoch"], "loss": x["loss"]}) + "\n" for x in records)
        for damaged in (text, "".join(text.splitlines(keepends=True)[:3])):
            (trained / "history.jsonl").write_text(damaged)
            with pytest.raises(CheckpointError, match=r"history\.jsonl lacks what the checkpoint of epoch 6 builds on"):
                train(prepared, trained, resume=True, epochs=8)

    def test_progress_counts_too(self, trained):
        path = trained / "checkpoints" / "6" / "note" / "metadata"
        note = json.loads(path.read_text())
        note["progress"]["best_epoch"] = 2 if note["progress"]["best_epoch"] != 2 else 4
        path.write_text(json.dumps(note))
        with pytest.raises(CheckpointError, match=r"checkpoints/6 is damaged: its contents do not match its digest"):
            Checkpoints(trained).load(6)

    def test_a_full_disk_while_a_checkpoint_is_written(self, prepared, tmp_path, toy, monkeypatch, capfd, caplog):
        save = Checkpoints.save

        def full(self, checkpoint):
            with small_files(100) if checkpoint.epoch == 4 else contextlib.nullcontext():
                save(self, checkpoint)

        monkeypatch.setattr(Checkpoints, "save", full)
        with pytest.raises(CheckpointError, match=r"epoch 4 cannot be written to .*File too large.*of epoch 2 is kept"):
            train(prepared, tmp_path)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
        assert not caplog.records
        assert "Traceback" not in "".join(capfd.readouterr())

    def test_a_picture_too_large_for_the_disk(self, prepared, tmp_path, toy, monkeypatch):
        finish = loop.Run.finish

        def full(self, program):
            with small_files(6000):
                finish(self, program)

        monkeypatch.setattr(loop.Run, "finish", full)
        with pytest.raises(OSError, match="File too large") as caught:
            train(prepared, tmp_path)
        assert caught.value.filename == str(tmp_path / "curve.png")
        monkeypatch.setattr(loop.Run, "finish", finish)
        assert len(train(prepared, tmp_path, resume=True).losses) == 6


# A call that takes long, lets other threads run and looks at no signal on the way, as a compiled epoch does.
STUCK = """
import hashlib, sys
from models.training.interrupts import stop_gently
with stop_gently() as asked:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", {rounds})
    print("asked" if asked.is_set() else "not asked", flush=True)
"""


class TestSignals:
    @staticmethod
    def start(rounds):
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", STUCK.format(rounds=rounds)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        return process

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_the_second_sigterm_acts_at_once(self, number):
        with self.start(10**9) as process:
            process.send_signal(number)
            assert f"{number.name}: saving after this epoch" in process.stdout.readline()  # it need not end for that
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 128 + signal.SIGTERM

    def test_the_first_one_waits(self):
        with self.start(10**6) as process:
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=60)[0].splitlines()[-1] == "asked"
            assert process.returncode == 0

    def test_the_second_ctrl_c_is_an_exception(self):
        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        with stop_gently() as asked:
            signal.raise_signal(signal.SIGINT)
            assert asked.is_set()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
        assert signal.set_wakeup_fd(-1) == -1

    def test_in_a_thread_signals_are_left_alone(self):
        found = []

        def look():
            with stop_gently():
                found.append(signal.getsignal(signal.SIGTERM))

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert found == [signal.getsignal(signal.SIGTERM)]


def test_memory_where_the_system_does_not_count_it(monkeypatch):
    assert run.peak_memory() > 10**7
    monkeypatch.setattr(run, "resource", None)  # as on Windows
    assert run.peak_memory() == 0


@pytest.fixture(scope="module")
def timed():
    data = small_data()
    rng = np.random.default_rng(1)
    return dataclasses.replace(data, times=np.concatenate([np.sort(rng.integers(0, 1000, n)) for n in data.lengths]))


@pytest.fixture(scope="module")
def file(timed, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "timed.csv"
    rows = zip(timed.users.tolist(), timed.items.tolist(), timed.times.tolist(), strict=True)
    path.write_text("user_id,item_id,timestamp\n" + "".join(f"u{u},{i},{t}\n" for u, i, t in rows))
    return path


@pytest.fixture(scope="module")
def saved(file, tmp_path_factory):
    """The folder of a run on that file."""
    return save_run(tmp_path_factory.mktemp("run"), load_interactions(SourceConfig(data=file)), data=file)


class TestOverlap:
    @staticmethod
    def expected(saved, config):
        """Counted one by one."""
        theirs = load_run(saved).info.config
        data = load_interactions(config)
        train = split_interactions(data, theirs).train
        split = split_interactions(data, config)
        trained = {
            (user, item) for user, items in zip(train.user_ids.tolist(), train, strict=True) for item in items.tolist()
        }
        tested = zip(split.test_history.user_ids.tolist(), split.test.tolist(), strict=True)
        return sum(pair in trained for pair in tested), len(split.test)

    def evaluate(self, capsys, saved, *options):
        assert main(["evaluate", "--checkpoint", str(saved), *map(str, options)]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    def test_another_split_of_the_same_data(self, saved, file, capsys):
        times = ("300", "500")
        config = dataclasses.replace(load_run(saved).info.config, split="global-time", split_times=times)
        count, total = self.expected(saved, config)
        assert 0 < count < total
        line = self.evaluate(capsys, saved, "--split", "global-time", "--split-times", *times)
        assert f"; {count} of the {total} test items are ones that the run was trained on; tested at" in line
        assert "are ones that the run was trained on" not in self.evaluate(capsys, saved)

    def test_other_data(self, saved, file, tmp_path, capsys):
        """The same interactions without each user's last two: what is tested was trained on."""
        lines = file.read_text().splitlines()
        users = [line.split(",")[0] for line in lines[1:]]
        kept = [line for i, line in enumerate(lines[1:]) if users[i + 1 : i + 3] == [users[i]] * 2]
        other = tmp_path / "shorter.csv"
        other.write_text("\n".join([lines[0], *kept]))
        line = self.evaluate(capsys, saved, "--data", other)
        assert "; 60 of the 60 test items are ones that the run was trained on; tested at" in line
        strangers = tmp_path / "strangers.csv"
        strangers.write_text("\n".join([lines[0], *(f"x{row}" for row in lines[1:])]))
        assert "trained on" not in self.evaluate(capsys, saved, "--data", strangers)

    def test_data_that_are_gone(self, saved, file, timed, tmp_path):
        loaded = load_run(saved)
        info = dataclasses.replace(
            loaded.info, config=dataclasses.replace(loaded.info.config, data=tmp_path / "gone.csv")
        )
        loaded = dataclasses.replace(loaded, info=info)
        config = loaded.info.config
        note = overlap_note(loaded, config, split_interactions(timed, config), None)
        assert note.startswith("; whether the run was trained on these items is not known: its data, ")
        assert "gone.csv" in note


class TestCommands:
    def refused(self, capsys, *arguments):
        assert main([str(x) for x in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    @pytest.mark.parametrize(
        ("arguments", "name"),
        [
            (("export", "--output"), "items.npz"),
            (("export", "--output"), "checkpoints/2/_CHECKPOINT_METADATA"),
            (("evaluate", "--output"), "run.json"),
            (("evaluate", "--per-user"), "history.jsonl"),
            (("recommend", "--history", "1", "--output"), "result.csv"),
        ],
    )
    def test_outputs_do_not_replace_the_run(self, saved, capsys, tmp_path, arguments, name):
        before = contents(saved)
        output = saved / name
        if name.endswith(".csv"):
            output = tmp_path / name
            output.symlink_to(saved / "items.npz")
        command, *options = arguments
        error = self.refused(capsys, command, "--checkpoint", saved, *options, output)
        assert "is a file of the run in" in error
        assert contents(saved) == before

    @pytest.mark.parametrize("arguments", [["--output-dir", ""], ["--output-dir="], ["--output_dir", ""]])
    @pytest.mark.parametrize("command", ["train", "compare", "graph"])
    def test_an_empty_output_folder(self, capsys, monkeypatch, tmp_path, command, arguments):
        monkeypatch.chdir(tmp_path)
        assert "output_dir must name a file or folder, got an empty text" in self.refused(capsys, command, *arguments)
        assert not list(tmp_path.iterdir())
