"""Several seeds in one program: each is a run of its own, whatever happens to the others."""

import dataclasses
import errno
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import files
from models.__main__ import main
from models.architectures.registry import make_config
from models.data import drifting_interests
from models.training import compare, loop, run
from models.training.checkpoints import CheckpointError, Checkpoints
from models.training.files import read_history
from models.training.run import Result
from models.training.training_data import make_training_data
from tests.models.saved_runs import ToyProgram

CONFIG = make_config(
    max_length=8, embedding_dim=8, num_blocks=0, epochs=6, batch_size=20, eval_every=2, learning_rate=1e-2, seed=1
)


@pytest.fixture(scope="module")
def prepared():
    return make_training_data(drifting_interests(num_users=60, num_items=40, num_groups=5, seed=3), CONFIG)


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    monkeypatch.setattr(loop, "Program", ToyProgram)


@pytest.fixture
def trained(monkeypatch):
    """What was trained: the seeds of each program, by epoch."""
    calls = []
    epoch = loop.Program.epoch

    def noting(self, number):
        calls.append((number, *self.seeds))
        return epoch(self, number)

    monkeypatch.setattr(loop.Program, "epoch", noting)
    return calls


def folders(tmp_path, *seeds):
    return [tmp_path / f"seed-{seed}" for seed in seeds]


def spoil(monkeypatch, seed, epoch, step=1):
    """Makes the loss of a seed NaN in an epoch."""
    train = loop.Program.epoch

    def spoiled(self, number):
        losses = train(self, number).copy()
        if number == epoch and seed in self.seeds:
            losses[list(self.seeds).index(seed), step] = np.nan
        return losses

    monkeypatch.setattr(loop.Program, "epoch", spoiled)


def score(monkeypatch, **scores):
    """Replaces validation: NDCG@10 of each seed, evaluation after evaluation; the last one stays."""
    validate = loop._Group._validate
    given = {seed: iter(values) for seed, values in scores.items()}

    def invented(self):
        found = validate(self)
        for i in found:
            found[i] = found[i] | {"NDCG@10": next(given[f"seed{self.runs[i].config.seed}"])}
        return found

    monkeypatch.setattr(loop._Group, "_validate", invented)


def test_every_seed_goes_on_from_its_own_newest_checkpoint(prepared, tmp_path, trained):
    """Checkpoints of epochs {2} and {2, 4}, then of {1, 2} and {7, 8}: no epoch in common is needed."""
    alone = [loop.train(prepared, dataclasses.replace(CONFIG, seed=seed), "adamw") for seed in (1, 2)]
    for seed, epochs in ((1, 2), (2, 4)):
        config = dataclasses.replace(CONFIG, seed=seed, epochs=epochs)
        loop.train(prepared, config, "adamw", tmp_path / f"seed-{seed}")
    shutil.rmtree(tmp_path / "seed-2" / "checkpoints" / "2")
    trained.clear()
    together = loop.train_seeds(prepared, CONFIG, "adamw", [1, 2], folders(tmp_path, 1, 2), resume=True)
    assert trained == [(3, 1), (4, 1), (5, 1), (6, 1), (5, 2), (6, 2)]
    assert [result.losses for result in together] == [result.losses for result in alone]
    assert [result.test for result in together] == [result.test for result in alone]


def test_seeds_that_have_come_equally_far_share_a_program(prepared, tmp_path, trained):
    config = dataclasses.replace(CONFIG, epochs=2)
    loop.train_seeds(prepared, config, "adamw", [1, 2], folders(tmp_path, 1, 2))
    trained.clear()
    longer = dataclasses.replace(CONFIG, epochs=3)
    results = loop.train_seeds(prepared, longer, "adamw", [1, 2, 3], folders(tmp_path, 1, 2, 3), resume=True)
    assert trained == [(1, 3), (2, 3), (3, 3), (3, 1, 2)]
    assert [result.seeds_together for result in results] == [2, 2, 1]


def test_a_stopped_seed_is_finished_at_once_and_left_alone(prepared, tmp_path, monkeypatch):
    score(monkeypatch, seed1=[0.5, 0.4, 0.3], seed2=[0.1, 0.2, 0.3, 0.4, 0.5])
    config = dataclasses.replace(CONFIG, epochs=10, patience=2)
    first, second = folders(tmp_path, 1, 2)
    record = loop.Run.record

    def crash(self, entry):
        record(self, entry)
        if entry["epoch"] == 9:
            raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "record", crash)
        with pytest.raises(RuntimeError):
            loop.train_seeds(prepared, config, "adamw", [1, 2], [first, second])
    # The first stopped after epoch 6, the last one it was trained: that is what is kept of it.
    result = Result.read(first / "result.json")
    assert (result.best_epoch, len(result.losses)) == (2, 6)
    assert len(read_history(first / "history.jsonl")) == 6
    assert Checkpoints(first).epochs() == [4, 6]
    assert Checkpoints(second).epochs() == [6, 8]

    before = {path: path.stat().st_mtime_ns for path in first.rglob("*.*") if path.name != ".lock"}
    score(monkeypatch, seed1=[], seed2=[0.5])
    results = loop.train_seeds(prepared, config, "adamw", [1, 2], [first, second], resume=True)
    assert results[0] == result
    assert len(results[1].losses) == 10
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_last_parameters_are_the_last_also_after_early_stopping(prepared, tmp_path, monkeypatch):
    whole = dataclasses.replace(CONFIG, epochs=6)
    loop.train(prepared, whole, "adamw", tmp_path / "whole")
    score(monkeypatch, seed1=[0.5, 0.4, 0.3])
    stopped = loop.train(prepared, dataclasses.replace(CONFIG, epochs=50, patience=2), "adamw", tmp_path / "stopped")
    assert len(stopped.losses) == 6
    found, wanted = (Checkpoints(tmp_path / name).load(6).leaves for name in ("stopped", "whole"))
    for name in found:
        if name.startswith("last."):
            np.testing.assert_array_equal(found[name], wanted[name])


def test_killed_between_stopping_and_its_result(prepared, tmp_path, monkeypatch, trained):
    score(monkeypatch, seed1=[0.5, 0.4, 0.3])
    config = dataclasses.replace(CONFIG, epochs=50, patience=2)
    result = loop.train(prepared, config, "adamw", tmp_path)
    (tmp_path / "result.json").unlink()
    trained.clear()
    again = loop.train(prepared, config, "adamw", tmp_path, resume=True)
    assert trained == []
    assert (again.losses, again.test, again.best_epoch) == (result.losses, result.test, result.best_epoch)


def test_a_diverged_seed_is_set_aside(prepared, tmp_path, monkeypatch, capsys):
    wanted = loop.train_seeds(prepared, CONFIG, "adamw", [1, 2, 3], [None] * 3)
    spoil(monkeypatch, seed=2, epoch=5)
    with pytest.raises(
        loop.DivergedError, match=r"^seed 2: the loss of epoch 5, step 2, is nan; the checkpoint"
    ) as stop:
        loop.train_seeds(prepared, CONFIG, "adamw", [1, 2, 3], folders(tmp_path, 1, 2, 3))
    assert list(stop.value.failures) == [2]
    first, none, third = stop.value.results
    assert none is None
    assert (first.losses, third.losses) == (wanted[0].losses, wanted[2].losses)
    assert (first.test, third.test) == (wanted[0].test, wanted[2].test)
    assert Result.read(tmp_path / "seed-3" / "result.json") == third
    assert not (tmp_path / "seed-2" / "result.json").exists()
    assert len(read_history(tmp_path / "seed-2" / "history.jsonl")) == 4
    assert Checkpoints(tmp_path / "seed-2").epochs() == [2, 4]
    assert "seed 2: the loss of epoch 5, step 2, is nan" in capsys.readouterr().err


def test_a_diverged_seed_hides_nothing_of_the_same_epoch(prepared, tmp_path, monkeypatch):
    """Not even where the epoch is evaluated, and not where it is the last that there is to train."""
    spoil(monkeypatch, seed=1, epoch=2)
    with pytest.raises(loop.DivergedError, match="seed 1: the loss of epoch 2"):
        loop.train_seeds(prepared, dataclasses.replace(CONFIG, epochs=2), "adamw", [1, 2], folders(tmp_path, 1, 2))
    assert "validation" in read_history(tmp_path / "seed-2" / "history.jsonl")[1]
    assert Checkpoints(tmp_path / "seed-2").epochs() == [2]
    assert not (tmp_path / "seed-1" / "checkpoints").exists()


def test_when_all_diverge_nothing_more_is_trained(prepared, monkeypatch, trained):
    spoil(monkeypatch, seed=1, epoch=3)
    spoil(monkeypatch, seed=2, epoch=3, step=0)
    with pytest.raises(loop.DivergedError, match=r"seed 1: .*step 2, is nan; .*; seed 2: .*step 1, is nan"):
        loop.train_seeds(prepared, CONFIG, "adamw", [1, 2], [None, None])
    assert [call[0] for call in trained] == [1, 2, 3]


@pytest.mark.parametrize("seeds", [[1], [1, 2]])
def test_diverging_in_the_very_last_step_is_noticed(prepared, tmp_path, monkeypatch, seeds):
    """The loss of a step is of the parameters before it: after the last one nothing shows but they themselves."""
    epoch = loop.Program.epoch

    def last_step(self, number):
        losses = epoch(self, number)
        if number == CONFIG.epochs:
            params = [self.params_of(i) for i in range(len(self.seeds))]
            leaves, tree = jax.tree.flatten(params[0])
            params[0] = jax.tree.unflatten(tree, [leaves[0].at[(0,) * leaves[0].ndim].set(jnp.nan), *leaves[1:]])
            self.put(params, [self.state_of(i) for i in range(len(self.seeds))])
        return losses

    monkeypatch.setattr(loop.Program, "epoch", last_step)
    with pytest.raises(loop.DivergedError, match="a parameter is not finite after epoch 6; the checkpoint of epoch 4"):
        loop.train_seeds(prepared, CONFIG, "adamw", seeds, folders(tmp_path, *seeds))
    assert not (tmp_path / "seed-1" / "result.json").exists()
    assert Checkpoints(tmp_path / "seed-1").epochs() == [2, 4]
    if len(seeds) > 1:
        assert len(Result.read(tmp_path / "seed-2" / "result.json").losses) == 6


@pytest.mark.parametrize("eval_every", [2, 5])
@pytest.mark.parametrize("failing", ["late.json", "history.jsonl", None])
def test_an_interrupted_epoch_that_becomes_the_last_is_evaluated(
    prepared, tmp_path, monkeypatch, trained, eval_every, failing
):
    """Saved after epoch 3, between two evaluations, and asked for no more than these three; maybe on a full disk."""
    longer = dataclasses.replace(CONFIG, eval_every=eval_every)
    config = dataclasses.replace(longer, epochs=3)
    whole = loop.train(prepared, config, "adamw", tmp_path / "whole")

    class Interrupted(loop.Progress):
        def epoch(self, number, **shown):
            super().epoch(number, **shown)
            if number == 2:
                signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "Progress", Interrupted)
        with pytest.raises(KeyboardInterrupt, match="interrupted after epoch 3"):
            loop.train(prepared, longer, "adamw", tmp_path / "run")
    trained.clear()
    if failing is not None:
        write_text = files.write_text
        left = [1 if failing == "late.json" else 2]  # the history is written before, too: as it was

        def full(path, text):
            left[0] -= path.name == failing
            if not left[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            write_text(path, text)

        with monkeypatch.context() as patch:
            patch.setattr(files, "write_text", full)
            patch.setattr(run, "write_text", full)
            with pytest.raises((CheckpointError, OSError), match="No space left on device"):
                loop.train(prepared, config, "adamw", tmp_path / "run", resume=True)
        assert Checkpoints(tmp_path / "run").epochs()[-1] == 3
    resumed = loop.train(prepared, config, "adamw", tmp_path / "run", resume=True)
    assert trained == []
    assert (resumed.losses, resumed.test, resumed.best_epoch) == (whole.losses, whole.test, whole.best_epoch)
    assert resumed.validation == whole.validation
    assert "validation" in read_history(tmp_path / "run" / "history.jsonl")[2]
    found, wanted = (Checkpoints(tmp_path / name).load(3) for name in ("run", "whole"))
    for name in ("best", "best_epoch", "stale"):
        assert found.progress[name] == wanted.progress[name]
    for leaf in found.leaves:
        np.testing.assert_array_equal(found.leaves[leaf], wanted.leaves[leaf])


class TestCompare:
    @pytest.fixture
    def seeds_that_diverge(self, monkeypatch):
        """Replaces training by invention: what diverges is a set of (optimizer, seed)."""
        diverging = set()

        def train_seeds(prepared, config, optimizer, seeds, folders, *, resume, overwrite):
            results, failures = [], {}
            for seed, folder in zip(seeds, folders, strict=True):
                folder.mkdir(parents=True, exist_ok=True)
                if (optimizer, seed) in diverging:
                    failures[seed] = "the loss is nan"
                    results.append(None)
                    continue
                tests = {"HR@10": 0.5, "NDCG@10": 0.1 + len(optimizer) * seed**2 / 1000}
                record = {"epoch": 1, "loss": 1.0, "validation": tests}
                (folder / "history.jsonl").write_text(json.dumps(record) + "\n")
                settings = {"seed": seed}
                results.append(
                    Result(optimizer, settings, "invented", 1, tests, tests, [1.0], 1.0, 1.0, 1, "cpu", len(seeds))
                )
            if failures:
                raise loop.DivergedError(failures, results)
            return results

        monkeypatch.setattr(compare, "train_seeds", train_seeds)
        return diverging

    @pytest.mark.parametrize("together", [True, False])
    def test_the_others_are_trained_and_compared(self, tmp_path, monkeypatch, seeds_that_diverge, together):
        monkeypatch.setattr(compare, "seeds_at_once", lambda count: count if together else 1)
        seeds_that_diverge |= {("adamw", 2), ("sevo-adamw", 3)}
        with pytest.raises(compare.ComparisonDivergedError) as stop:
            compare.compare(None, CONFIG, tmp_path, seeds=4)
        assert str(stop.value) == "adamw-2: the loss is nan; sevo-adamw-3: the loss is nan"
        results = stop.value.results
        assert [run.config["seed"] for run in results["adamw"]] == [1, 3, 4]
        assert [run.config["seed"] for run in results["sevo-adamw"]] == [1, 2, 4]
        assert len(results["sevo-gradient"]) == 4
        written = json.loads((tmp_path / "compare.json").read_text())["optimizers"]
        # Over the seeds that both have: 1 and 4.
        found = written["sevo-adamw"]["test"]["NDCG@10"]["relative"]
        assert found == pytest.approx((0.11 + 0.26) / (0.105 + 0.18) - 1)
        assert (tmp_path / "compare.png").exists()

    def test_an_optimizer_that_always_diverges(self, tmp_path, seeds_that_diverge):
        seeds_that_diverge |= {("adamw", 1), ("adamw", 2)}
        with pytest.raises(compare.ComparisonDivergedError) as stop:
            compare.compare(None, CONFIG, tmp_path, seeds=2)
        lines = compare.table(stop.value.results).splitlines()
        assert lines[1].split() == ["adamw", "diverged"]
        assert lines[2].split()[:4] == ["sevo-adamw", "0.5000", "±", "0.0000"]
        assert json.loads((tmp_path / "compare.json").read_text())["optimizers"]["adamw"] == {"test": {}, "runs": []}

    def test_all_diverge(self, tmp_path, seeds_that_diverge):
        seeds_that_diverge |= {(name, 1) for name in ("adamw", "sevo-adamw", "sevo-gradient")}
        with pytest.raises(compare.ComparisonDivergedError, match="sevo-gradient-1"):
            compare.compare(None, CONFIG, tmp_path)
        assert not (tmp_path / "compare.json").exists()

    def test_the_command_shows_what_there_is_and_fails(self, tmp_path, capsys, seeds_that_diverge):
        seeds_that_diverge |= {("sevo-adamw", 1)}
        data = tmp_path / "data.txt"
        data.write_text("".join(f"{u} {' '.join(str(1 + (3 * u + i) % 20) for i in range(6))}\n" for u in range(1, 21)))
        arguments = ["compare", "--data", data, "--seed", 1, "--seeds", 2, "--output-dir", tmp_path / "out"]
        assert main([str(argument) for argument in arguments]) == 2
        printed = capsys.readouterr()
        assert [line.split()[0] for line in printed.out.splitlines() if "0.5000" in line] == [
            "adamw",
            "sevo-adamw",
            "sevo-gradient",
        ]
        assert printed.err.endswith("error: sevo-adamw-1: the loss is nan\n")

    def test_files_that_no_comparison_wrote_stay(self, tmp_path, seeds_that_diverge):
        (tmp_path / "compare.png").write_bytes(b"mine")
        with pytest.raises(ValueError, match=r"holds compare\.png, but none of the runs adamw-1, sevo-adamw-1"):
            compare.compare(None, CONFIG, tmp_path, overwrite=True)
        assert (tmp_path / "compare.png").read_bytes() == b"mine"
