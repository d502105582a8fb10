import csv
import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats

from models import plots
from models.__main__ import main
from models.data import load_interactions
from models.files import write_text
from models.reproduce import Reproduce, costs, maps, runner, tables
from models.reproduce.cells import Cell, Cells, cell_path, identity_of, portable
from models.reproduce.claims import CLAIMS, Verdict, claim_lines
from models.reproduce.costs import ArmCosts, Costs, find_costs
from models.reproduce.pictures import draw_table
from models.reproduce.report import write_report
from models.reproduce.status import seconds_of
from models.reproduce.summaries import RowCells, TableCells, average_gains, comparable_rows
from models.reproduce.tables import METRICS, load_table, table_names
from models.training import compare, loop, training_data
from models.training.files import read_history
from models.training.training_data import make_training_data
from tests.models import stopped_workers

DRAWING = ("training_curves", "panels", "bars", "maps", "clusters")
REFERENCE = Path(__file__).resolve().parents[2].parent / "shared" / "reference"
PRESET = """
model: sasrec
embedding_dim: 8
num_blocks: 1
max_length: 6
batch_size: 8
epochs: 2
eval_every: 1
"""
TABLE = """
title: A tiny table
description: Nothing to see.
label: paper
datasets:
  tiny: {file: tiny.txt, public: {data: ml-100k}}
arms: [adamw, sevo-adamw]
rows:
  - title: SASRec on tiny
    dataset: tiny
    preset: preset.yaml
    published:
      - arm: adamw
        metrics: {HR@10: 0.5, NDCG@10: 0.3}
      - arm: sevo-adamw
        metrics: {NDCG@10: 0.33}
        runs: [0.32, 0.34, 0.33]
        losses: {1: [0.9, 1.0, 1.1], 2: [0.4, 0.5, 0.6]}
  - title: SASRec with cross-entropy on tiny
    dataset: tiny
    preset: preset.yaml
    settings: {loss: ce}
    vary: {beta: [0.5, 0.9]}
    published:
      - label: someone else
        metrics: {NDCG@10: 0.4}
        deviation: 0.01
        num_runs: 5
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a table, its preset and its data, to work in."""
    lines = [f"{u} {' '.join(str(1 + (3 * u + i) % 20) for i in range(6))}\n" for u in range(1, 21)]
    (tmp_path / "tiny.txt").write_text("".join(lines))
    (tmp_path / "preset.yaml").write_text(PRESET)
    (tmp_path / "tiny.yaml").write_text(TABLE)
    monkeypatch.chdir(tmp_path)
    for name in DRAWING:
        monkeypatch.setattr(
            plots, name, lambda what, *more, **_: next(x for x in more if isinstance(x, Path)).write_text("drawn")
        )
    return tmp_path


@pytest.fixture
def trained(monkeypatch):
    """Replaces training by invention; a list of what was 'trained'."""
    calls = []

    def train_seeds(prepared, config, optimizer, seeds, folders, *, resume):
        assert resume
        results = []
        for seed, run in zip(seeds, folders, strict=True):
            run.mkdir(parents=True, exist_ok=True)
            results.append(invented(config, optimizer, seed, together=len(seeds)))
            history = [
                {"epoch": i, "loss": 1 / i, "seconds": 1, "validation": results[-1].validation}
                for i in range(1, config.epochs + 1)
            ]
            write_text(run / "history.jsonl", "".join(json.dumps(record) + "\n" for record in history))
        calls.append((config.loss, config.beta, optimizer, *seeds))
        return results

    monkeypatch.setattr(loop, "train_seeds", train_seeds)
    monkeypatch.setattr(training_data, "make_training_data", lambda interactions, config: None)
    return calls


def invented(config, optimizer, seed, together=1):
    rng = np.random.default_rng([seed, len(optimizer), round(100 * config.beta)])
    metrics = dict(zip(METRICS, rng.random(len(METRICS)), strict=True))
    fields = {field.name: 0 for field in dataclasses.fields(loop.Result)}
    fields |= {"optimizer": optimizer, "protocol": "guessed", "best_epoch": 2, "device": "cpu", "epoch_seconds": 3.0}
    fields |= {"total_seconds": 90.0, "seeds_together": together, "format": 1, "epoch_steps": 7}
    fields |= {"groups": {"popularity": {"never seen": {"users": 0}, "1-4": {"users": 9, "MRR@10": 1.0} | metrics}}}
    return loop.Result(**fields | {"validation": metrics, "test": metrics})


def complete_cell(experiment, group, seed, **fields):
    """A cell of all epochs, with some fields of its result."""
    config = group.config(data=Path("x.txt"), seed=seed)
    result = dataclasses.asdict(invented(config, group.arm, seed)) | {"best_epoch": config.epochs} | fields
    history = [{"epoch": i, "loss": 1.0} for i in range(1, config.epochs + 1)]
    return Cell.from_result(experiment, group, config, result, history, versions={})


def write_cells(experiment, group, scores):
    """A cell a score, which all of its test metrics have; the first is that of seed 0."""
    for seed, score in enumerate(scores):
        cell = complete_cell(experiment, group, seed, test=dict.fromkeys(METRICS, score))
        cell.write(cell_path(Path("results"), experiment, group, seed))


def reproduce(**options):
    usual = {"data_dir": Path(), "seeds": 2, "workers": 1}
    if options.get("report") or options.get("list"):
        usual = {"seeds": 2} if options.get("list") else {}
    Reproduce(**{"table": "tiny.yaml"} | usual | options).run()


DRAW = plots.training_curves
CELLS = [
    *(f"tiny-sasrec-bce-{arm}-seed{seed}" for seed in (0, 1) for arm in ("adamw", "sevo-adamw")),
    *(
        f"tiny-sasrec-ce-{arm}-seed{seed}"
        for seed in (0, 1)
        for arm in ("adamw", "sevo-adamw-beta0.5", "sevo-adamw-beta0.9")
    ),
]


def plan(**options):
    everything = {"datasets": (), "models": (), "arms": (), "seeds": 1, "epochs": None}
    folders = {"results_dir": Path("results"), "work_dir": Path("runs")}
    return runner.plan(load_table("tiny.yaml"), **everything | folders | options)


def cells():
    return sorted(path.stem for path in Path("results/tiny").glob("*.json"))


class TestRunner:
    def test_fills_the_table_then_skips(self, folder, trained, capsys):
        reproduce()
        assert cells() == sorted(CELLS)
        # Whole comparisons early: both arms of the first seed, then of the second.
        assert trained[:4] == [("bce", 0.99, arm, seed) for seed in (0, 1) for arm in ("adamw", "sevo-adamw")]
        assert "0 cells are done, 10 to train" in capsys.readouterr().out
        reproduce()
        assert len(trained) == 10
        assert "10 cells are done, 0 to train" in capsys.readouterr().out
        reproduce(seeds=3)
        assert len(trained) == 15

    def test_selections(self, folder, trained):
        reproduce(datasets=("tiny",), models=("sasrec",), arms=("sevo-adamw",), seeds=1)
        assert cells() == [
            "tiny-sasrec-bce-sevo-adamw-seed0",
            *sorted(x for x in CELLS if "-beta" in x and x[-1] == "0"),
        ]

    def test_selects_cells_by_name(self, folder, trained):
        reproduce(cells=("*-beta0.9", "tiny-sasrec-bce-adamw"), seeds=1)
        assert cells() == ["tiny-sasrec-bce-adamw-seed0", "tiny-sasrec-ce-sevo-adamw-beta0.9-seed0"]

    def test_goes_on_after_it_was_killed(self, folder, trained, monkeypatch):
        working = loop.train_seeds

        def killed(*arguments, **options):
            if len(trained) == 3:
                raise KeyboardInterrupt
            return working(*arguments, **options)

        monkeypatch.setattr(loop, "train_seeds", killed)
        with pytest.raises(KeyboardInterrupt):
            reproduce()
        assert cells() == sorted(CELLS[:3])
        monkeypatch.setattr(loop, "train_seeds", working)
        reproduce()
        assert cells() == sorted(CELLS)
        assert len(set(trained)) == len(trained) == 10

    def test_refuses_cells_of_another_configuration(self, folder, trained):
        reproduce()
        (folder / "preset.yaml").write_text(PRESET + "learning_rate: 0.1\n")
        with pytest.raises(
            ValueError, match=r"adamw-seed0.json was made with learning_rate=0.001, not 0.1; .*delete it"
        ):
            reproduce()
        reproduce(results_dir=Path("other"))
        assert len(trained) == 20
        assert len(list(Path("runs/reproduce/tiny").glob(f"{CELLS[0]}-*/"))) == 2  # neither goes on from the other

    def test_fewer_epochs_are_trained_on_and_more_are_enough(self, folder, trained):
        reproduce(epochs=1)
        assert Cell.read(Path("results/tiny/tiny-sasrec-bce-adamw-seed0.json")).epochs == 1
        reproduce()
        assert Cell.read(Path("results/tiny/tiny-sasrec-bce-adamw-seed0.json")).epochs == 2
        reproduce(epochs=1)
        assert len(trained) == 20

    def test_a_schedule_ends_with_the_epochs(self, folder, trained):
        (folder / "preset.yaml").write_text(PRESET + "schedule: cosine\n")
        reproduce(epochs=1)
        with pytest.raises(ValueError, match="was made with epochs=1, not 2"):
            reproduce()

    def test_leaves_alone_what_another_process_trains(self, folder, trained):
        (job, *_), _ = plan(data_dir=Path(), work_dir=Path("runs/reproduce"))
        with runner._claim(job.folder) as mine:
            assert mine
            reproduce()
        assert cells() == sorted(CELLS[1:])
        reproduce()
        assert cells() == sorted(CELLS)
        assert len(trained) == 10

    def test_takes_what_another_process_has_finished(self, folder, trained, monkeypatch):
        reproduce(results_dir=Path("theirs"), arms=("adamw",))
        working = loop.train_seeds

        def overtaken(*arguments, **options):
            done = working(*arguments, **options)
            Path("results").mkdir(exist_ok=True)
            if not Path("results/tiny").exists():
                Path("theirs/tiny").rename("results/tiny")
            return done

        monkeypatch.setattr(loop, "train_seeds", overtaken)
        reproduce(arms=("adamw",))
        assert len(trained) == 4 + 1

    def test_an_accelerator_trains_the_seeds_together(self, folder, trained, monkeypatch):
        monkeypatch.setattr(compare, "seeds_at_once", lambda count: count)
        reproduce()
        assert cells() == sorted(CELLS)
        assert trained[0] == ("bce", 0.99, "adamw", 0, 1)
        assert len(trained) == 5
        cell = Cell.read(Path("results/tiny") / f"{CELLS[0]}.json")
        assert (cell.epoch_seconds, cell.total_seconds) == (1.5, 45.0)

    def test_a_diverged_run_does_not_stop_the_others(self, folder, trained, monkeypatch, capsys):
        working = loop.train_seeds

        def diverging(prepared, config, optimizer, seeds, *arguments, **options):
            results = working(prepared, config, optimizer, seeds, *arguments, **options)
            if (config.loss, optimizer) == ("ce", "adamw") and seeds[0] == 0:
                raise loop.DivergedError({0: "the loss is nan"}, [None, *results[1:]])
            return results

        monkeypatch.setattr(loop, "train_seeds", diverging)
        with pytest.raises(ValueError, match="tiny-sasrec-ce-adamw failed, see above; the other cells are there"):
            reproduce(seeds=2)
        assert cells() == sorted(set(CELLS) - {"tiny-sasrec-ce-adamw-seed0"})
        assert "the loss is nan" in capsys.readouterr().err

    def test_a_diverged_seed_does_not_stop_those_in_its_program(self, folder, trained, monkeypatch):
        working = loop.train_seeds

        def diverging(prepared, config, optimizer, seeds, *arguments, **options):
            results = working(prepared, config, optimizer, seeds, *arguments, **options)
            raise loop.DivergedError({1: "the loss is nan"}, [results[0], None])

        monkeypatch.setattr(compare, "seeds_at_once", lambda count: count)
        monkeypatch.setattr(loop, "train_seeds", diverging)
        with pytest.raises(ValueError, match="failed, see above"):
            reproduce(seeds=2)
        assert cells() == sorted(x for x in CELLS if x.endswith("seed0"))

    def test_a_run_with_damaged_files_does_not_stop_the_others(self, folder, trained, monkeypatch, capsys):
        working = loop.train_seeds

        def damaged(prepared, config, optimizer, seeds, folders, **options):
            if optimizer == "adamw":
                raise ValueError(f"{folders[0] / 'result.json'} is damaged (it is empty)")
            return working(prepared, config, optimizer, seeds, folders, **options)

        monkeypatch.setattr(loop, "train_seeds", damaged)
        with pytest.raises(ValueError, match="tiny-sasrec-bce-adamw, tiny-sasrec-ce-adamw failed"):
            reproduce(seeds=1)
        assert len(cells()) == 3
        assert "result.json is damaged" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"data_dir": Path("none")}, "data_dir: none/tiny.txt does not exist"),
            ({"datasets": ("beauty",)}, "datasets must be among tiny in tiny, got beauty"),
            ({"models": ("bert4rec",)}, "models must be among sasrec in tiny, got bert4rec"),
            (
                {"cells": ("tiny-sasrec-bce-adamw",), "arms": ("sevo-adamw",)},
                "cells: tiny has none like tiny-sasrec-bce-adamw",
            ),
            ({"cells": ("tiny-sasrec-adam",)}, "cells: tiny has none like tiny-sasrec-adam; did you mean tiny-sasrec"),
            ({"arms": ("sevo-gradient",)}, "arms must be among adamw, sevo-adamw in tiny, got sevo-gradient"),
            ({"seeds": 0}, "seeds must be at least 1, got 0"),
            ({"epochs": 0}, "epochs must be at least 1, got 0"),
            ({"workers": 0}, "workers must be at least 1, got 0"),
            ({"table": "9"}, "table: 'table-9' does not exist; give one of cold-start, cross-entropy, "),
            ({"report": True}, "results_dir: results holds no cells"),
        ],
    )
    def test_bad_options(self, folder, options, message):
        with pytest.raises(ValueError) as caught:
            reproduce(**options)
        assert message in str(caught.value)

    def test_a_broken_cell(self, folder, trained):
        reproduce(seeds=1)
        Path("results/tiny/tiny-sasrec-bce-adamw-seed0.json").write_text('{"seed": 0')
        for report in (True, False):
            with pytest.raises(ValueError, match=r"adamw-seed0.json holds no cell; delete it"):
                reproduce(report=report)

    def test_without_a_folder_public_data_are_fetched(self, folder):
        jobs, done = plan(data_dir=None)
        assert (len(jobs), done) == (5, 0)
        assert jobs[0].config.data == Path("ml-100k")


class TestFolders:
    """A run's folder is found by what the run is."""

    NAME = "tiny-sasrec-bce-sevo-adamw-seed0"

    @pytest.fixture
    def config(self, folder):
        return load_table("tiny.yaml").rows[0].groups[1].config(data=Path("tiny.txt"))

    @staticmethod
    def write_run(place, config, *, optimizer="sevo-adamw", epochs=1, without=(), **settings):
        """A ``run.json`` as the first format had it, with every setting, or without some that came later."""
        values = {name: x for name, x in (config.to_dict() | settings).items() if name not in without}
        run = {"format": 1, "optimizer": optimizer, "config": values, "num_items": 20, "data": "0123456789abcdef"}
        place.mkdir(parents=True)
        (place / "run.json").write_text(json.dumps(run))
        (place / "history.jsonl").write_text('{"epoch": 1}\n' * epochs)
        return place

    def find(self, config, arm="sevo-adamw"):
        return runner.find_folder(Path("runs"), self.NAME, arm, config)

    def test_a_new_option_changes_nothing(self, config):
        @dataclasses.dataclass(frozen=True)
        class Later(type(config)):
            wings: int = 0
            engines: int | None = None

        later = Later(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
        assert self.find(later) == self.find(config)
        assert self.find(dataclasses.replace(later, wings=2)) != self.find(config)
        assert self.find(dataclasses.replace(config, beta=0.5)) != self.find(config)
        assert self.find(dataclasses.replace(config, epochs=7)) == self.find(config)

    def test_what_was_begun_under_another_name_goes_on(self, config):
        usual = self.find(config)
        begun = self.write_run(Path("runs") / f"{self.NAME}-deadbeef", config, epochs=5)
        assert self.find(config) == begun
        assert self.find(dataclasses.replace(config, epochs=9)) == begun
        Path("else").mkdir()
        begun.parent.rename("else/tiny")
        (job, *_), _ = plan(arms=("sevo-adamw",), data_dir=Path(), work_dir=Path("else"))
        assert job.folder == Path("else/tiny") / begun.name
        assert usual.name != begun.name

    def test_a_run_without_the_newest_options_goes_on(self, config):
        begun = self.write_run(Path("runs") / f"{self.NAME}-deadbeef", config, without=("gbce_t", "num_heads"))
        assert self.find(config) == begun
        assert self.find(dataclasses.replace(config, gbce_t=0.5)) != begun

    @pytest.mark.parametrize(
        "other",
        [{"optimizer": "adamw"}, {"learning_rate": 0.5}, {"seed": 1}, {"data": "other/big.txt"}, {"num_heads": 2}],
    )
    def test_other_runs_are_left_alone(self, config, other):
        begun = self.write_run(Path("runs") / f"{self.NAME}-deadbeef", config, **other)
        assert self.find(config) != begun

    def test_of_several_the_longest(self, config):
        self.write_run(self.find(config), config, epochs=2)
        begun = self.write_run(Path("runs") / f"{self.NAME}-deadbeef", config, epochs=5)
        self.write_run(Path("runs") / f"{self.NAME}-feedbeef", config, epochs=3)
        assert self.find(config) == begun

    def test_a_name_that_another_run_has(self, config):
        usual = self.find(config)
        self.write_run(usual, config, beta=0.25)
        assert self.find(config) == usual.with_name(usual.name + "-2")
        (usual / "run.json").write_text("{")  # whatever it was
        assert self.find(config) == usual.with_name(usual.name + "-2")


class TestFormats:
    CELLS = sorted((Path(__file__).parents[2] / "results").glob("*/*-seed*.json"))

    def test_cells_without_a_format_are_of_the_first(self, folder, trained):
        assert len(self.CELLS) >= 20
        assert {Cell.read(path).format for path in self.CELLS} <= {1, 2, 3}
        reproduce(seeds=1)
        path = Path("results/tiny/tiny-sasrec-bce-adamw-seed0.json")
        written = json.loads(path.read_text())
        assert written.pop("format") == 3
        before = Cell.read(path)
        later = ("revision", "inference_seconds", "epoch_steps", "groups")
        path.write_text(json.dumps({name: x for name, x in written.items() if name not in later}))
        assert Cell.read(path) == dataclasses.replace(before, format=1, epoch_steps=None, groups={})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": 4, "wings": 2}, "later version of this program (format 4; known are those up to 3): update it"),
            ({"wings": 2}, "holds no cell; delete it, and it will be trained again (got an unexpected keyword"),
            ({"format": "new"}, "holds no cell; delete it, and it will be trained again (its format is 'new'"),
        ],
    )
    def test_cells_of_later_versions_are_refused(self, folder, trained, change, message):
        reproduce(seeds=1)
        path = Path("results/tiny/tiny-sasrec-bce-adamw-seed0.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError) as caught:
            Cell.read(path)
        assert message in str(caught.value)
        assert str(path) in str(caught.value)

    def test_a_cell_without_the_newest_options_is_the_run(self, folder, trained):
        reproduce(seeds=1)
        path = Path("results/tiny/tiny-sasrec-bce-adamw-seed0.json")
        cell = Cell.read(path)
        config = {name: x for name, x in cell.config.items() if name not in ("gbce_t", "num_heads")}
        dataclasses.replace(cell, config=config | {"an_option_of_old": 3}).write(path)
        reproduce(seeds=1)
        assert len(trained) == 5

    def test_the_committed_report_is_made_from_the_committed_cells(self, folder, monkeypatch):
        results = folder / "results"
        shutil.copytree(self.CELLS[0].parents[1], results)
        before = (results / "README.md").read_bytes()
        reproduce(table="3", report=True)
        assert (results / "README.md").read_bytes() == before


@pytest.fixture
def one_row(folder):
    """The table without its second row."""
    (folder / "tiny.yaml").write_text(TABLE[: TABLE.rindex("  - title")])


def test_real_training(folder, one_row):
    """A cell holds what training alone gives, also after it was trained in two parts."""
    reproduce(seeds=1, epochs=1, arms=("sevo-adamw",))
    (parts,) = Path("runs").rglob("history.jsonl")
    kept = read_history(parts)
    reproduce(seeds=1, arms=("sevo-adamw",))
    # A run that started anew would end in the same way, but how long epochs took is never the same twice.
    assert read_history(parts)[:1] == kept
    group = load_table("tiny.yaml").rows[0].groups[1]
    config = group.config(data="tiny.txt")
    direct = loop.train(make_training_data(load_interactions(config), config), config, "sevo-adamw", folder / "direct")
    cell = Cell.read(cell_path(Path("results"), "tiny", group, 0))
    assert (cell.variant, cell.arm, cell.settings) == ("bce", "sevo-adamw", {})
    assert cell.test == pytest.approx(direct.test, abs=1e-6)
    assert cell.best_epoch == direct.best_epoch
    assert cell.epoch_steps == direct.epoch_steps == 3
    for grouping, groups in direct.groups.items():
        for name, found in groups.items():
            kept = {metric: found[metric] for metric in ("users", *METRICS) if metric in found}
            assert cell.groups[grouping][name] == pytest.approx(kept, abs=1e-6)
    assert [record["loss"] for record in cell.history] == pytest.approx(direct.losses, abs=1e-5)
    history = read_history(folder / "direct" / "history.jsonl")
    assert cell.history[1]["validation"]["NDCG@10"] == pytest.approx(history[1]["validation"]["NDCG@10"], abs=1e-6)
    assert cell.config == portable(config)
    assert cell.protocol == direct.protocol
    assert set(cell.versions) == {"jax", "flax", "optax", "sevo_optax"}


def test_workers_share_the_cells(one_row, capfd):
    reproduce(workers=2, arms=("sevo-adamw",))
    begun = [line for line in capfd.readouterr().out.splitlines() if line.startswith("tiny: ")]
    assert sorted(begun) == [f"tiny: tiny-sasrec-bce-sevo-adamw, seed {seed}" for seed in (0, 1)]
    assert cells() == ["tiny-sasrec-bce-sevo-adamw-seed0", "tiny-sasrec-bce-sevo-adamw-seed1"]


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs signals as of Unix")
def test_workers_stop_politely_and_once(tmp_path, monkeypatch):
    """A terminal sends Ctrl-C to workers too: a second word from here would end them before they have saved."""
    monkeypatch.setattr(runner, "_worker", stopped_workers.work)

    def stop():
        while len(list(tmp_path.glob("begun-*"))) < 2:
            time.sleep(0.05)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGINT)
        time.sleep(0.5)
        assert not list(tmp_path.glob("saved-*"))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        runner.train_side_by_side(tmp_path, 2)
    thread.join()
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]


def test_what_one_run_lacks_keeps_no_other_from_being_trained(one_row, monkeypatch, capsys):
    class Partly(training_data.NewestData):
        def prepared(self, config):
            if config.seed == 0:
                raise FileNotFoundError("cannot download it")
            return super().prepared(config)

    monkeypatch.setattr(training_data, "NewestData", Partly)
    with pytest.raises(ValueError, match="tiny-sasrec-bce-sevo-adamw failed, see above; the other cells are there"):
        reproduce(arms=("sevo-adamw",))
    assert "tiny-sasrec-bce-sevo-adamw: cannot download it\n" in capsys.readouterr().err
    assert cells() == ["tiny-sasrec-bce-sevo-adamw-seed1"]


def test_as_many_workers_as_the_machine_has_room_for(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(runner, "train_side_by_side", lambda jobs, workers: asked.append((len(jobs), workers)))
    monkeypatch.setattr(runner, "train", lambda jobs: asked.append((len(jobs), 1)))
    monkeypatch.setattr("models.reproduce.report.write_report", lambda *_: [])
    for cores, gibibytes, backend, expected in [
        (4, 64, "cpu", 4),
        (4, 5, "cpu", 2),
        (4, 1, "cpu", 1),
        (64, 512, "cpu", 10),  # no more than there are cells
        (64, 512, "gpu", 1),
    ]:
        pages = {"SC_PHYS_PAGES": gibibytes * 2**18, "SC_PAGE_SIZE": 2**12}
        monkeypatch.setattr(os, "sysconf", pages.__getitem__)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        reproduce(workers=None)
        assert asked.pop() == (10, expected)
    assert not asked


def test_a_failing_worker(monkeypatch, capsys):
    def fails(jobs):
        raise ValueError("no such luck")

    monkeypatch.setattr(runner, "train", fails)
    monkeypatch.setenv("TQDM_POSITION", "0")
    with pytest.raises(SystemExit) as stop:
        runner._worker([], 0, 1)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: no such luck\n"


class TestReport:
    @pytest.fixture
    def results(self, folder, trained):
        reproduce(seeds=3)
        reproduce(seeds=4, arms=("adamw",))  # more seeds of one arm
        return folder / "results"

    @staticmethod
    def text(results):
        """The report without the blanks that align its tables."""
        return re.sub(" +", " ", (results / "README.md").read_text())

    def lines(self, results, start):
        text = self.text(results)
        return [[x.strip() for x in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith(start)]

    def test_numbers(self, results):
        adamw, sevo = (
            [invented(group.config(), group.arm, seed).test for seed in range(seeds)]
            for group, seeds in zip(load_table("tiny.yaml").rows[0].groups, (4, 3), strict=True)
        )
        ndcg = {name: [x["NDCG@10"] for x in tests] for name, tests in (("adamw", adamw), ("sevo", sevo))}
        mean, sd = np.mean(ndcg["sevo"]), np.std(ndcg["sevo"], ddof=1)
        theirs = [0.32, 0.34, 0.33]
        error = np.sqrt(sd**2 / 3 + statistics.stdev(theirs) ** 2 / 3)
        gain = mean / np.mean(ndcg["adamw"][:3]) - 1
        p_value = scipy.stats.ttest_rel(ndcg["sevo"], ndcg["adamw"][:3]).pvalue

        (base,) = self.lines(results, "| SASRec on tiny | adamw ")
        plain, plain_sd = np.mean(ndcg["adamw"]), np.std(ndcg["adamw"], ddof=1)
        common = f"{np.mean(ndcg['adamw'][:3]):.4f} (seeds 0, 1, 2)"
        assert base[2:7] == ["4", f"{plain:.4f} ± {plain_sd:.4f}", common, "0.3000", f"{plain - 0.3:+.4f}"]
        assert base[7:9] == [f"{plain_sd / 2:.4f}", "yes" if abs(plain - 0.3) < plain_sd else "no"]
        line = self.lines(results, "| | sevo-adamw |")[0]
        assert line[2:5] == ["3", f"{mean:.4f} ± {sd:.4f}", f"{mean:.4f}, {gain:+.1%} (seeds 0, 1, 2)"]
        assert line[5:7] == ["0.3300 ± 0.0100", f"{mean - 0.33:+.4f}"]
        assert line[7:9] == [f"{error:.4f}", "yes" if abs(mean - 0.33) < 2 * error else "no"]
        assert line[9:] == [f"{gain:+.1%}", f"{p_value:.2g}", "+10.0%"]

        (details,) = self.lines(results, "| sevo-adamw, ours |")
        assert details[1:5] == [
            f"{np.mean([x[m] for x in sevo]):.4f} ± {np.std([x[m] for x in sevo], ddof=1):.4f}" for m in METRICS[:4]
        ]
        assert details[6:] == [f"{mean:.4f}", "2", "2", "3.00", "1.5"]
        assert self.lines(results, "| sevo-adamw, paper")[0][5] == "0.3300 ± 0.0100"
        assert self.lines(results, "| sevo-adamw | 2 |") == [
            ["sevo-adamw", "2", "0.500", "0.500", "0.400 – 0.600", "+0.0%"]
        ]
        assert self.lines(results, "| someone else")[0][5] == "0.4000 ± 0.0100"

    def test_the_best_of_what_is_varied_is_chosen_on_validation(self, results):
        groups = load_table("tiny.yaml").rows[1].groups[1:]
        best = max(
            groups, key=lambda x: np.mean([invented(x.config(), x.arm, i).validation["NDCG@10"] for i in range(3)])
        )
        text = (results / "README.md").read_text()
        assert f"**sevo-adamw (beta {best.settings['beta']})**" in text
        assert text.count("**sevo-adamw") == 1

    def test_the_best_is_chosen_over_the_seeds_that_all_have(self, folder):
        """Beta 0.9 is better in the only seed that both have; the other seed of beta 0.5 is one of luck."""
        row = load_table("tiny.yaml").rows[1]
        for group in row.groups[1:]:
            scores = {0.5: [0.3, 0.9], 0.9: [0.4]}[group.settings["beta"]]
            for seed, score in enumerate(scores):
                history = [{"epoch": 1, "loss": 1.0, "validation": {"NDCG@10": score}}]
                cell = complete_cell("tiny", group, seed, validation=dict.fromkeys(METRICS, score))
                dataclasses.replace(cell, history=history).write(cell_path(Path("results"), "tiny", group, seed))
        found = RowCells(row, Cells(Path("results")), "tiny")
        chosen = [summary.group.settings["beta"] for summary in found.summaries if found.chosen(summary)]
        assert chosen == [0.9]

    def test_cells_of_other_settings_are_none(self, folder, trained, capsys):
        """The table was edited since: neither shown nor counted, and training says what differs."""
        reproduce(seeds=1)
        path = Path("results/tiny/tiny-sasrec-bce-adamw-seed0.json")
        cell = Cell.read(path)
        dataclasses.replace(cell, config=cell.config | {"embedding_dim": 17}).write(path)
        row = load_table("tiny.yaml").rows[0]
        assert [group.arm for group in RowCells(row, Cells(Path("results")), "tiny").missing] == ["adamw"]
        with pytest.raises(ValueError, match="was made with embedding_dim=17"):
            reproduce(seeds=1)

    def test_a_table_may_not_take_the_name_of_another(self, folder):
        text = (tables.FOLDER / "table-4.yaml").read_text(encoding="utf-8")
        Path("table-4.yaml").write_text(text.replace("Table 4:", "My own:"))
        with pytest.raises(ValueError, match=r"table: table-4\.yaml has the name of a table that comes along, table-4"):
            reproduce(table="table-4.yaml", report=True)

    def test_runs_of_different_length_are_compared_fairly(self, folder, trained):
        """The longer run is better in the end, but not where both can be compared."""
        reproduce(seeds=1)
        for beta, curve in ((0.5, {10: 0.3, 20: 0.4}), (0.9, {10: 0.2, 20: 0.3, 40: 0.6})):
            path = Path(f"results/tiny/tiny-sasrec-ce-sevo-adamw-beta{beta}-seed0.json")
            history = [{"epoch": x, "loss": 1.0, "validation": {"NDCG@10": y}} for x, y in curve.items()]
            config = Cell.read(path).config | {"epochs": max(curve)}
            best = {"NDCG@10": max(curve.values())}
            dataclasses.replace(Cell.read(path), history=history, config=config, validation=best).write(path)
        reproduce(report=True)
        text = self.text(Path("results"))
        assert text.count("**sevo-adamw") == text.count("**sevo-adamw (beta 0.5)**") == 1
        header, _, *lines = text[text.index("| validation NDCG@10 after epoch") :].splitlines()[:5]
        assert header == "| validation NDCG@10 after epoch | 10 | 20 | 40 |"
        assert lines == [
            "| adamw | – | – | – |",
            "| sevo-adamw (beta 0.5) | 0.3000 | 0.4000 | – |",
            "| sevo-adamw (beta 0.9) | 0.2000 | 0.3000 | 0.6000 |",
        ]

    def test_what_lacks_epochs_is_not_chosen(self, folder, trained):
        groups = load_table("tiny.yaml").rows[1].groups[1:]
        reproduce(seeds=1)
        for group, score in zip(groups, (0.9, 0.1), strict=True):
            cell = complete_cell("tiny", group, 0)
            history = [{"epoch": 1, "loss": 1.0, "validation": {"NDCG@10": score}}]
            config = cell.config | ({"epochs": 1} if score == 0.9 else {})
            dataclasses.replace(cell, history=history, config=config).write(
                cell_path(Path("results"), "tiny", group, 0)
            )
        reproduce(report=True)
        text = self.text(Path("results"))
        assert f"**sevo-adamw (beta {groups[1].settings['beta']})**" in text
        assert f"| sevo-adamw (beta {groups[0].settings['beta']}) †" in text

    def test_time_to_quality(self, folder, trained, monkeypatch):
        reproduce(seeds=2)
        curves = {
            "adamw": [0.1, 0.3, 0.2],
            "sevo-adamw-beta0.5": [0.4, 0.5, 0.5],
            "sevo-adamw-beta0.9": [0.1, 0.1, 0.29],
        }
        for name, values in curves.items():
            for seed in (0, 1):
                path = Path(f"results/tiny/tiny-sasrec-ce-{name}-seed{seed}.json")
                history = [
                    {"epoch": 5 * i, "loss": 1.0, "validation": {"NDCG@10": value - seed / 10}}
                    for i, value in enumerate(values, 1)
                ]
                dataclasses.replace(Cell.read(path), history=history, epoch_steps=7 if seed else 8).write(path)
        drawn = []
        monkeypatch.setattr(
            plots, "training_curves", lambda runs, path, **options: drawn.append((runs, options["goal"]))
        )
        reproduce(report=True)
        start = "| trained until adamw's best validation NDCG@10 |"
        text = self.text(Path("results"))
        header, _, *lines = text[text.rindex(start) :].splitlines()[:5]
        assert header == f"{start} seeds that reach it | epochs | adamw | steps | seconds |"
        assert lines == [
            "| adamw | 2 of 2 | 10 ± 0 | – | 75 ± 7 | 30.0 ± 0.0 |",
            "| sevo-adamw (beta 0.5) | 2 of 2 | 5 ± 0 | 10 ± 0 | 38 ± 4 | 15.0 ± 0.0 |",
            "| sevo-adamw (beta 0.9) | 0 of 2 | not reached | 10 ± 0 | – | – |",
        ]
        runs, goal = drawn[1]
        assert goal == plots.Goal("best of adamw", pytest.approx(0.25))
        assert [run.arrival for run in runs] == [
            plots.Arrival(10, 0.0, 0),
            plots.Arrival(5, 0.0, 0),
            plots.Arrival(None, None, 2),
        ]

        # Of the seed that gets there alone, plain AdamW's own epochs.
        path = Path("results/tiny/tiny-sasrec-ce-sevo-adamw-beta0.9-seed1.json")
        late, plain = Cell.read(path), Path("results/tiny/tiny-sasrec-ce-adamw-seed1.json")
        slow = Cell.read(plain)
        for cell, values, where in ((late, [0.0, 0.0, 0.5], path), (slow, [0.1, 0.2, 0.3], plain)):
            history = [record | {"validation": {"NDCG@10": x}} for record, x in zip(cell.history, values, strict=True)]
            dataclasses.replace(cell, history=history).write(where)
        reproduce(report=True)
        text = self.text(Path("results"))
        assert "| sevo-adamw (beta 0.9) | 1 of 2 | 15 | 15 |" in text
        late.write(path)
        slow.write(plain)

        # What plain AdamW reaches in fewer epochs is no level for longer runs, and no gain of theirs is over it.
        before = {path: Cell.read(path) for path in Path("results/tiny").glob("*sevo-adamw*.json")}
        for path, cell in before.items():
            dataclasses.replace(cell, config=cell.config | {"epochs": 99}).write(path)
        found = RowCells(load_table("tiny.yaml").rows[1], Cells(Path("results")), "tiny")
        assert found.times_to_quality() == []
        gains = {summary.group.arm: gain["1-4"].difference for summary, gain in found.group_gains("popularity")}
        assert gains == {"adamw": None, "sevo-adamw": None}
        for path, cell in before.items():
            cell.write(path)

        for path in Path("results/tiny").glob("*.json"):  # as earlier versions wrote them
            dataclasses.replace(Cell.read(path), epoch_steps=None, groups={}).write(path)
        reproduce(report=True)
        text = self.text(Path("results"))
        assert text[text.rindex(start) :].startswith(f"{start} seeds that reach it | epochs | adamw | seconds |")

        Path("results/tiny/tiny-sasrec-bce-sevo-adamw-seed0.json").unlink()
        Path("results/tiny/tiny-sasrec-bce-sevo-adamw-seed1.json").unlink()
        reproduce(report=True)
        assert self.text(Path("results")).count("| trained until") == 1  # of the row that has more than plain AdamW

    def test_who_gains(self, folder, trained, monkeypatch):
        """The second seed of plain AdamW is of an earlier version, and knows no groups."""
        reproduce(seeds=2)
        found = {
            "adamw": (0.02, 0.0, 0.4),
            "sevo-adamw-beta0.5": (0.03, 0.1, 0.2),
            "sevo-adamw-beta0.9": (0.01, 0.0, 0.0),
        }
        for name, (rare, short, coverage) in found.items():
            for seed in (0, 1):
                path = Path(f"results/tiny/tiny-sasrec-ce-{name}-seed{seed}.json")
                cell = Cell.read(path)
                values = {"NDCG@10": rare + seed / 100}, {"NDCG@10": short}
                groups = {
                    "popularity": {"never seen": {"users": 0}, "1-4": {"users": 1234} | values[0]},
                    "length": {"1-4": {"users": 1234} | values[1]},
                }
                groups = {} if (name, seed) == ("adamw", 1) else groups
                test = cell.test | ({"coverage@10": coverage} if groups else {})
                dataclasses.replace(cell, groups=groups, test=test).write(path)
        drawn = []
        monkeypatch.setattr(plots, "clusters", lambda panels, path, **options: drawn.append((panels, path.name)))
        reproduce(report=True)
        text = self.text(Path("results"))
        text = text[text.index("### SASRec with cross-entropy on tiny") :]
        start = "| NDCG@10 by training interactions of the item to find |"
        header, _, *lines = text[text.index(start) :].splitlines()[:5]
        assert header == f"{start} seeds | never seen (0 users) | 1-4 (1,234 users) | coverage@10 |"
        assert lines == [
            "| adamw | 1 | – | 0.0200 | 0.400 |",
            "| sevo-adamw (beta 0.5) | 2, 1 of them compared | – | 0.0350 (+50.0%) | 0.200 |",
            "| sevo-adamw (beta 0.9) | 2, 1 of them compared | – | 0.0150 (-50.0%) | 0.000 |",
        ]
        assert (
            "| sevo-adamw (beta 0.5) | 2, 1 of them compared | 0.1000 |" in text
        )  # what has no gain: plain AdamW finds nothing
        assert "![Gain of groups of users over adamw](tiny-tiny-sasrec-ce-who-gains.png)" in text
        (panels, name) = drawn[-1]
        assert name == "tiny-tiny-sasrec-ce-who-gains.png"
        assert [panel.groups for panel in panels] == [["never seen\n0 users", "1-4\n1,234 users"], ["1-4\n1,234 users"]]
        (series,) = panels[0].series  # of the two the one that was chosen on the validation items
        best = max((0.5, 0.9), key=lambda beta: self.validation(beta))
        assert series.label == f"sevo-adamw (beta {best})"  # one seed is compared
        assert series.values == [None, pytest.approx(0.01 if best == 0.5 else -0.01)]
        assert series.notes == ["", "+50%" if best == 0.5 else "-50%"]

    @staticmethod
    def validation(beta):
        cells = [Cell.read(path) for path in Path("results/tiny").glob(f"*-ce-*beta{beta}-seed?.json")]
        return np.mean([cell.validation["NDCG@10"] for cell in cells])

    def test_gains_over_several_seeds(self, folder, trained):
        reproduce(seeds=3)
        (row, _) = TableCells.of(load_table("tiny.yaml"), Cells(Path("results"))).rows
        base, mine = (
            [invented(group.config(), group.arm, seed).test["NDCG@10"] for seed in range(3)] for group in row.row.groups
        )
        (_, plain), (_, sevo) = row.group_gains("popularity")
        assert plain["1-4"].difference is None
        assert sevo["never seen"].mean is None
        assert sevo["1-4"].users == 9
        assert sevo["1-4"].mean == pytest.approx(np.mean(mine), abs=1e-5)
        assert sevo["1-4"].difference == pytest.approx(np.mean(mine) - np.mean(base), abs=1e-5)
        assert sevo["1-4"].deviation == pytest.approx(np.std(np.subtract(mine, base), ddof=1), abs=1e-5)
        assert sevo["1-4"].relative == pytest.approx(np.mean(mine) / np.mean(base) - 1, abs=1e-4)
        assert row.group_gains("length") == []

    def test_comes_from_the_cells_alone_and_stays_the_same(self, results, monkeypatch):
        before = (results / "README.md").read_bytes()
        pictures = sorted(path.name for path in results.glob("*.png"))
        assert pictures == [
            f"tiny-tiny-sasrec-{loss}{what}.png" for loss in ("bce", "ce") for what in ("-who-gains", "")
        ]
        for path in [results / "README.md", *results.glob("*.png")]:
            path.unlink()
        reproduce(report=True, data_dir=None)
        assert (results / "README.md").read_bytes() == before
        assert sorted(path.name for path in results.glob("*.png")) == pictures
        assert str(results).encode() not in before

    def test_what_is_missing_or_short_is_said(self, folder, trained):
        reproduce(seeds=1, epochs=1)
        for name in ["bce-sevo-adamw", "ce-sevo-adamw-beta0.5"]:
            Path(f"results/tiny/tiny-sasrec-{name}-seed0.json").unlink()
        reproduce(seeds=1, arms=("adamw",))
        reproduce(report=True)
        text = self.text(Path("results"))
        missing = [line.partition(" (about")[0] for line in text.splitlines() if line.startswith("* SASRec")]
        assert missing[:1] == ["* SASRec on Beauty"]
        assert "* SASRec on tiny: sevo-adamw" in missing
        assert "* SASRec with cross-entropy on tiny: sevo-adamw (beta 0.5)" in missing
        (line,) = self.lines(folder / "results", "| | sevo-adamw (beta 0.9) † |")
        assert line[-3:] == ["–", "–", "–"]  # one epoch is not compared with two
        assert "| sevo-adamw (beta 0.9) †, ours |" in text

    def test_pictures(self, results, monkeypatch):
        for path in results.glob("*.png"):
            path.unlink()
        monkeypatch.setattr(plots, "training_curves", DRAW)
        reproduce(report=True)
        for name in ["bce", "ce"]:
            assert (results / f"tiny-tiny-sasrec-{name}.png").read_bytes().startswith(b"\x89PNG")

    def test_notes(self, results):
        (results / "tiny" / "notes.md").write_text("Smoothing is *good*.\n")
        reproduce(report=True)
        assert "Nothing to see.\n\nSmoothing is *good*.\n\n|" in (results / "README.md").read_text()

    def test_one_published_run_lends_its_deviation(self, folder, trained):
        reproduce(seeds=1)
        line = self.lines(folder / "results", "| | sevo-adamw |")[0]
        assert line[6] == f"{np.sqrt(0.01**2 + 0.01**2 / 3):.4f}"
        (base,) = self.lines(folder / "results", "| SASRec on tiny | adamw ")
        assert base[6:] == ["–"] * 5


@pytest.mark.parametrize("name", table_names())
def test_tables_can_be_trained(name):
    table = load_table(name)
    paths = [cell_path(Path(), table.name, group, 0) for row in table.rows for group in row.groups]
    assert len(set(paths)) == len(paths) >= 3


def test_the_published_figures():
    if not REFERENCE.exists():
        pytest.skip("the published figures are not beside this clone: table3.csv, sevo_runs.csv")
    values: dict[tuple[str, str], dict[str, float]] = {}
    with (REFERENCE / "table3.csv").open() as file:
        for x in csv.DictReader(file):
            if x["model"] not in ("best-relative-improvement", "p-value"):
                values.setdefault((x["dataset"], x["model"]), {})[x["metric"]] = float(x["value"])
    with (REFERENCE / "sevo_runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    seen = set()
    for row in load_table("3").rows:
        model = row.subject.partition(" ")[0]
        graph = row.subject.partition("(")[2].rstrip(")")
        assert row.title.lower() == f"{row.subject} on {row.dataset}".lower()
        if row.closed_form:
            assert (row.arms, row.published) == (("closed-form",), ())
            continue
        if not row.published:  # a variant of ours
            assert row.given_name
            continue
        plain, *rest = row.published
        assert plain.metrics == values[row.dataset, model]
        assert plain.deviation is None
        seen |= {(row.dataset, model)}
        if not rest:  # a baseline has one optimizer, its own
            assert row.arms == (plain.arm,)
            continue
        (sevo,) = rest
        assert row.arms == ("adam", "adamw", "sevo-adamw", "sevo-gradient")
        assert (plain.arm, sevo.arm, sevo.num_runs) == ("adam", "sevo-adamw", 5)
        published = f"{model}+SEvo" + (f"({graph})" if graph else "")
        seen |= {(row.dataset, published)}
        assert sevo.metrics == values[row.dataset, published]
        theirs = [
            x for x in runs if (x["model"], x["dataset"], x["graph"]) == (model, row.dataset, graph or "item-item")
        ]
        assert sevo.deviation == pytest.approx(np.std([float(run["NDCG@10"]) for run in theirs], ddof=1))
        assert row.config.epochs == int(theirs[0]["epochs"])
        for epoch, losses in sevo.losses.items():
            found = [float(run[f"loss@{epoch}"]) for run in theirs]
            assert losses == pytest.approx((min(found), statistics.fmean(found), max(found)), abs=1e-5)
        assert list(sevo.losses)[:5] == [1, 10, 50, 100, 150]
    assert seen == set(values)


def test_the_settings_of_plain_adam_are_those_behind_the_table():
    if not REFERENCE.exists():
        pytest.skip("the published settings are not beside this clone: hyperparameters.csv")
    with (REFERENCE / "hyperparameters.csv").open() as file:
        rows = [x for x in csv.DictReader(file) if x["role"] == "plain-table3-inferred"]
    settings = {(x["dataset"], x["model"]): x for x in rows}
    for row in load_table("3").rows:
        if not row.published:  # closed forms, and variants of ours
            continue
        x = settings[row.dataset, row.subject.partition(" ")[0]]
        arm = row.arms[0]
        config = next(group for group in row.groups if group.arm == arm).config()
        assert (arm, config.learning_rate, config.epochs, config.batch_size, config.b1, config.b2) == (
            x["optimizer"],
            *(kind(x[name]) for name, kind in [("lr", float), ("epochs", int), ("batch_size", int)]),
            *(float(x[name]) for name in ("beta1", "beta2")),
        )
        if x["decay_kind"].startswith(("L2 added", "decoupled")):
            assert config.weight_decay == float(x["weight_decay"])
        if x["maxlen"]:
            assert config.max_length == int(x["maxlen"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: A tiny table", "titel: A tiny table", "tiny.yaml: unknown field 'titel'; did you mean 'title'?"),
        (
            "title: A tiny table",
            "name: A tiny table",
            "unknown field 'name'; the fields are arms, datasets, description",
        ),
        ("description: Nothing to see.", "", "tiny.yaml: description is missing"),
        (
            "arms: [adamw, sevo-adamw]",
            "arms: [adagrad]",
            "arms 1 should be 'adamw', 'sevo-adamw', ",
        ),
        ("arms: [adamw, sevo-adamw]", "arms: adamw", "arms should be a list, got 'adamw'"),
        ("arms: [adamw, sevo-adamw]", "arms: []", "arms: list should have at least 1 item, not 0, got []"),
        (
            "    dataset: tiny\n    preset",
            "    dataset: big\n    preset",
            "rows 1: dataset must be one of tiny, got 'big'",
        ),
        ("preset: preset.yaml", "preset: sasrec", "preset: 'sasrec' does not exist; did you mean sasrec-toys"),
        ("{loss: ce}", "{los: ce}", "rows 2: settings: unknown field 'los'; did you mean 'loss'?"),
        ("{loss: ce}", "{dropout_rate: 2}", "rows 2: dropout_rate must lie in [0, 1), got 2.0"),
        ("{loss: ce}", "{}", "two rows are called tiny-sasrec-bce"),
        ("{loss: ce}", "{seed: 3}", "rows 2: settings: seed must not stand there"),
        ("{loss: ce}", "3", "rows 2: settings should be a mapping, got 3"),
        ("[0.5, 0.9]", "0.5", "rows 2: vary: beta should be a list, got 0.5"),
        ("[0.5, 0.9]", "[]", "rows 2: vary: beta: list should have at least 1 item"),
        ("[0.5, 0.9]", "[0.5, x]", "rows 2: vary: beta should be a valid number, got 'x'"),
        ("- arm: sevo-adamw", "- arm: sevo", "rows 1: published 2: arm should be 'adamw'"),
        ("- arm: sevo-adamw", "- arm: adamw", "rows 1: published: arm adamw stands there twice"),
        ("metrics: {NDCG@10: 0.33}", "metrics: {HR@1: 0.3}", "published 2: metrics: NDCG@10 is missing"),
        ("metrics: {HR@10: 0.5,", "metrics: {HR@2: 0.5,", "published 1: metrics: HR@2 should be 'HR@1', "),
        ("[0.32, 0.34, 0.33]", "[0.32]", "published 2: runs: list should have at least 2 items, not 1"),
        ("runs: [", "deviation: 1\n        runs: [", "published 2: runs and deviation exclude each other"),
        ("1: [0.9, 1.0, 1.1]", "1: [0.9, 1.0]", "published 2: losses: 1 3 is missing"),
        ("1: [0.9, 1.0, 1.1]", "0: [0.9, 1.0, 1.1]", "published 2: losses: 0 should be greater than or equal to 1"),
        ("deviation: 0.01", "deviation: -1", "published 1: deviation should be greater than or equal to 0, got -1"),
        ("        num_runs: 5", "", "rows 2: published 1: num_runs is missing"),
        ("rows:\n", "rows:\n  - 3\n", "rows 1 should be a mapping, got 3"),
        (
            "{file: tiny.txt,",
            "{path: tiny.txt,",
            "datasets: tiny: unknown field 'path'; the fields are attributes, file, public",
        ),
        ("public: {data: ml-100k}", "public: ml-100k", "datasets: tiny: public should be a mapping, got 'ml-100k'"),
        ("  tiny: {file: tiny.txt, public: {data: ml-100k}}", "  - tiny", "datasets should be a mapping, got ['tiny']"),
        (TABLE, "rows: [", "is not YAML"),
        (TABLE, f"rows: {'[' * 2000}{']' * 2000}", "tiny.yaml is nested too deeply"),
    ],
)
def test_bad_tables(folder, old, new, message):
    (folder / "tiny.yaml").write_text(TABLE.replace(old, new))
    with pytest.raises(ValueError) as caught:
        load_table("tiny.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


class TestCommandLine:
    def test_trains_and_reports(self, folder, trained, capsys):
        arguments = [
            "--table",
            "tiny.yaml",
            "--data-dir",
            ".",
            "--datasets",
            "tiny",
            "--models",
            "sasrec",
            "--seeds",
            "1",
        ]
        assert main(["reproduce", *arguments, "--arms", "adamw", "sevo-adamw", "--workers", "1"]) == 0
        assert "results/README.md" in capsys.readouterr().out
        assert main(["reproduce", "--table", "tiny.yaml", "--report"]) == 0
        assert len(trained) == 5

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--table", "9"], "table: 'table-9' does not exist"),
            (["--data-dir", "none"], "data_dir: none/beauty.txt does not exist"),
            (["--models", "gru"], "gru"),
            (["--seeds", "few"], "few"),
            (["--report"], "holds no cells"),
        ],
    )
    def test_errors_are_one_line_and_status_2(self, folder, capsys, arguments, message):
        assert main(["reproduce", *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1

    def test_interrupt(self, folder, trained, monkeypatch, capsys):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(loop, "train_seeds", interrupted)
        assert main(["reproduce", "--table", "tiny.yaml", "--data-dir", ".", "--workers", "1"]) == 130


def test_write_report_needs_cells(tmp_path):
    with pytest.raises(ValueError, match="holds no cells"):
        write_report(tmp_path, [load_table("3")])


FIGURE = """
title: A tiny figure
description: Strengths.
label: paper
datasets:
  tiny: {file: tiny.txt, public: {data: ml-100k}}
arms: [adamw, sevo-adamw]
picture: {kind: lines, over: [beta]}
rows:
  - title: SASRec on tiny
    dataset: tiny
    preset: preset.yaml
    vary: {smoothing: [neumann, iterative], beta: [0.0, 0.99]}
    published:
      - {arm: sevo-adamw, settings: {smoothing: neumann, beta: 0.99}, metrics: {NDCG@10: 0.33}}
"""


class TestSharing:
    """A run that several tables want is trained once."""

    @pytest.fixture
    def figure(self, folder):
        (folder / "figure.yaml").write_text(FIGURE)

    def test_across_tables(self, figure, trained, capsys):
        reproduce(seeds=1, arms=("adamw", "sevo-adamw"))
        before = len(trained)
        reproduce(table="figure.yaml", seeds=1)
        # AdamW and Neumann at 0.99 are the other table's; at beta 0 both methods are the same run.
        assert trained[before:] == [("bce", 0.0, "sevo-adamw", 0), ("bce", 0.99, "sevo-adamw", 0)]
        assert sorted(path.stem for path in Path("results/figure").glob("*.json")) == [
            "tiny-sasrec-bce-sevo-adamw-smoothingiterative-beta0.99-seed0",
            "tiny-sasrec-bce-sevo-adamw-smoothingneumann-beta0.0-seed0",
        ]
        reproduce(table="figure.yaml", seeds=1)
        assert len(trained) == before + 2
        found = Cells(Path("results"))
        assert all(len(found.of("figure", x)) == 1 for x in load_table("figure.yaml").rows[0].groups)

    def test_a_run_without_diagnostics_first(self, figure, trained):
        reproduce(seeds=1, arms=("sevo-adamw",))
        group = load_table("figure.yaml").rows[0].groups[2]
        usual = Cell.read(Path("results/tiny/tiny-sasrec-bce-sevo-adamw-seed0.json"))
        diagnosed = dataclasses.replace(usual, config=usual.config | {"diagnostics": True}, test={"NDCG@10": 0.9})
        diagnosed.write(Path("results/before/tiny-seed0.json"))  # in front of the other by name
        assert Cells(Path("results")).of("figure", group) == [usual]

    def test_a_short_run_of_another_table_goes_on_there(self, figure, trained):
        reproduce(seeds=1, epochs=1, arms=("adamw",))
        reproduce(table="figure.yaml", seeds=1, arms=("adamw",))
        assert not Path("results/figure").exists()
        assert Cell.read(Path("results/tiny/tiny-sasrec-bce-adamw-seed0.json")).epochs == 2

    def test_what_counts(self, figure):
        neumann = load_table("figure.yaml").rows[0].groups[2]
        assert neumann.settings == {"smoothing": "neumann", "beta": 0.99}
        usual = neumann.config()

        def same(arm="sevo-adamw", **settings):
            return identity_of(dataclasses.replace(usual, **settings), arm) == identity_of(usual, arm)

        assert same(diagnostics=True, epochs=7, seed=3, graph_weighting="frequency")
        assert not same(graph_weighting="frequency", max_hops=2)
        assert not same(max_hops=2)
        assert not same(moment_correction=False, beta=0.0)
        assert not same(learning_rate=0.5)
        assert same("adamw", beta=0.1, max_hops=2, moment_correction=False)

    def test_other_data_and_missing_diagnostics_are_not_shared(self, figure, trained):
        reproduce(seeds=1, arms=("sevo-adamw",))
        group = load_table("figure.yaml").rows[0].groups[2]
        config, found = group.config(data=Path("tiny.txt")), Cells(Path("results"))
        assert found.shared(group, config) is not None
        for other in [
            {"data": Path("else.txt")},
            {"diagnostics": True},
            {"seed": 1},
            {"epochs": 9},
            {"keep_epochs": (1,)},
        ]:
            assert found.shared(group, dataclasses.replace(config, **other)) is None

    def test_published_figures_are_for_settings(self, figure):
        groups = load_table("figure.yaml").rows[0].groups
        assert [x.published.metrics if x.published else None for x in groups[1:]] == [
            None,
            {"NDCG@10": 0.33},
            None,
            None,
        ]

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            (
                "beta: 0.99}, metrics",
                "beta: 0.7}, metrics",
                "settings: beta must be a value that the row varies, got 0.7",
            ),
            ("over: [beta]", "over: [max_hops]", "over must name one setting that SASRec on tiny varies, got max_hops"),
            ("kind: lines", "kind: pies", "picture: kind should be 'curves'"),
            ("    preset: preset.yaml\n", "", "preset is missing; give a preset, or the model"),
            ("rows:", "include: [more.yaml]\nrows:", "include: more.yaml does not exist"),
        ],
    )
    def test_bad_figures(self, figure, old, new, message):
        Path("figure.yaml").write_text(FIGURE.replace(old, new))
        with pytest.raises(ValueError) as caught:
            load_table("figure.yaml")
        assert message in str(caught.value)


class TestRevisions:
    @pytest.fixture
    def outdated(self, folder, trained):
        Path("tiny.yaml").write_text(
            TABLE.replace("[adamw, sevo-adamw]", "[adamw, sevo-gradient]").replace(
                "arm: sevo-adamw", "arm: sevo-gradient"
            )
        )
        reproduce(seeds=2)
        path = Path("results/tiny/tiny-sasrec-bce-sevo-gradient-seed0.json")
        dataclasses.replace(Cell.read(path), revision=1).write(path)
        return path

    def test_cells_of_an_earlier_revision_are_trained_again(self, outdated, trained):
        before = len(trained)
        reproduce(seeds=2)
        assert trained[before:] == [("bce", 0.99, "sevo-gradient", 0)]
        assert Cell.read(outdated).outdated is None

    def test_their_runs_do_not_go_on(self, outdated):
        (job,), _ = plan(data_dir=Path(), seeds=2)
        assert "-revision2-" in job.folder.name

    def test_they_are_marked_and_not_mixed(self, outdated):
        reproduce(report=True)
        assert "‡" not in Path("results/README.md").read_text()  # the second seed alone
        outdated.with_name(outdated.name.replace("seed0", "seed1")).unlink()
        reproduce(report=True)
        text = Path("results/README.md").read_text()
        assert "sevo-gradient ‡" in text
        assert "in which sevo-gradient corrected the moments of all tables" in text


class TestStatus:
    def test_list(self, folder, trained, capsys):
        reproduce(seeds=1, arms=("adamw",))
        capsys.readouterr()
        reproduce(list=True, seeds=2)
        lines = capsys.readouterr().out.splitlines()
        assert [line.split() for line in lines if line.startswith("tiny ")] == [
            ["tiny", "2", "of", "10", "A", "tiny", "table"]
        ]
        assert {line.split()[0] for line in lines[1:]} == {*table_names(), "tiny"}
        assert len(trained) == 2

    def test_dry_run(self, folder, trained, capsys):
        reproduce(seeds=1, arms=("adamw",))
        before = sorted(Path("results").rglob("*"))
        capsys.readouterr()
        reproduce(dry_run=True, seeds=2)
        out = [line.split() for line in capsys.readouterr().out.splitlines()]
        # An epoch took 3 s, and the whole run of two epochs 90: 15 times as long.
        assert ["tiny-sasrec-bce-adamw", "1", "2", "90", "s"] in out
        assert ["tiny-sasrec-ce-sevo-adamw-beta0.5", "0,", "1", "2", "90", "s"] in out
        assert len(trained) == 2
        assert sorted(Path("results").rglob("*")) == before

    def test_on_other_data_in_proportion_to_the_interactions(self, folder):
        def cell(row, seconds):
            took = 2 * seconds * row.groups[0].config().epochs
            return complete_cell("table-3", row.groups[0], 0, epoch_seconds=seconds, total_seconds=took)

        rows = {row.title: row for row in load_table("3").rows}
        beauty, ml_1m = cell(rows["SASRec on Beauty"], 3.0), cell(rows["SASRec on ML-1M"], 50.0)
        group = rows["SASRec on Toys"].groups[0]
        about = seconds_of(group, 100, [beauty, ml_1m], "CPU, 2 cores")
        assert about == pytest.approx(100 * 2 * 3.0 * 167_597 / 198_502)  # Beauty is nearer in size
        assert seconds_of(group, 100, [beauty, ml_1m], "a GPU") is None
        assert seconds_of(rows["GRU4Rec on Toys"].groups[0], 100, [beauty, ml_1m], "CPU, 2 cores") is None

    def test_closed_forms_take_their_time_as_well(self, folder):
        rows = {row.title: row for row in load_table("3").rows}
        (group,) = rows["Item-kNN on Beauty"].groups
        cell = complete_cell("table-3", group, 0, epoch_seconds=0.0, total_seconds=12.0)
        (other,) = rows["Item-kNN on Toys"].groups
        assert seconds_of(other, 0, [cell], "CPU, 2 cores") == pytest.approx(12.0 * 167_597 / 198_502)

    def test_on_other_data_by_what_training_sees(self, folder):
        """The newest 50 items of a user, and with cross-entropy a score for each item of the catalogue."""
        rows = {row.given_name: row for row in load_table("cross-entropy-graphs").rows}

        def cell(row, seconds):
            took = 2 * seconds * row.groups[0].config().epochs
            return complete_cell("cross-entropy-graphs", row.groups[0], 0, epoch_seconds=seconds, total_seconds=took)

        beauty, short = cell(rows["beauty-consecutive"], 3.0), cell(rows["ml-1m-newest-50"], 5.0)
        of_short = rows["ml-1m-newest-50"].groups[0]
        about = seconds_of(of_short, 100, [beauty], "CPU, 2 cores")
        assert about == pytest.approx(100 * 2 * 3.0 * (6_040 * 50 * 3_416) / (198_502 * 12_101))
        of_long = rows["ml-1m-consecutive"].groups[0]  # whose users have fewer than 200 items on average
        about = seconds_of(of_long, 100, [beauty, short], "CPU, 2 cores")
        assert about == pytest.approx(100 * 2 * 5.0 * 999_611 / (6_040 * 50))

    def test_what_is_not_known(self, folder, capsys):
        reproduce(dry_run=True, seeds=1)
        assert "0 runs, about 0 s; and 5 of which the time is not known" in capsys.readouterr().out

    def test_table_or_figure(self):
        with pytest.raises(ValueError, match="table and figure exclude each other, got 3 and 4a"):
            Reproduce(table="3", figure="4a").run()
        with pytest.raises(ValueError, match="table: 'figure-9' does not exist"):
            Reproduce(figure="9").run()


CLOSED = """
title: Closed forms
description: Nothing is trained.
label: paper
datasets:
  tiny: {file: tiny.txt, attributes: genres.tsv, public: {data: ml-100k}}
arms: [closed-form]
rows:
  - {title: Popularity on tiny, dataset: tiny, model: popularity}
  - {title: Item-kNN on tiny, dataset: tiny, model: item-knn}
"""


def test_closed_forms_have_one_seed_and_no_epochs(folder):
    Path("closed.yaml").write_text(CLOSED)
    reproduce(table="closed.yaml", seeds=3, epochs=7)
    found = sorted(path.name for path in Path("results/closed").iterdir())
    assert found == ["tiny-item-knn-closed-form-seed0.json", "tiny-popularity-closed-form-seed0.json"]
    text = Path("results/README.md").read_text()
    assert "### Popularity on tiny" in text
    assert not list(Path("results").glob("closed*.png"))


MAPS = """
title: Maps
description: Where items are.
label: paper
datasets:
  tiny: {file: tiny.txt, attributes: genres.tsv, public: {data: ml-100k}}
arms: [sevo-adamw]
seeds: 1
picture: {kind: maps, over: [beta], groups: {loud: [Action, Crime], quiet: [Drama]}}
rows:
  - title: SASRec on tiny
    dataset: tiny
    preset: preset.yaml
    settings: {graph: [attributes], keep_epochs: [0, 2], diagnostics: true}
    vary: {beta: [0.9]}
"""


def test_maps_of_a_run(folder, monkeypatch):
    """Item tables are kept before and after training, projected when it is over, and drawn from the results alone."""
    Path("maps.yaml").write_text(MAPS)
    lines = [f"{i}\t{'Drama|Crime' if i % 2 else 'Action'}" for i in range(1, 20)]
    Path("genres.tsv").write_text("item_id\tgenres\n" + "\n".join(lines) + "\n")
    monkeypatch.setattr(maps, "project", lambda table: table[:, :2])
    monkeypatch.setattr(runner, "umap_class", lambda: None)
    reproduce(table="maps.yaml", seeds=2)
    (path,) = Path("results/maps").glob("*.npz")
    found = maps.Maps.read(path)
    assert found.attributes == ("Action", "Crime", "Drama")
    assert found.first.tolist() == [2, 0] * 9 + [2, -1]
    (run,) = Path("runs/reproduce/maps").glob("*-seed0-*/")
    assert sorted(x.name for x in (run / "embeddings").iterdir()) == ["0.npz", "2.npz"]
    best = load_params(run, "last")
    np.testing.assert_allclose(found.places[2], best["item_embedding"][1:21, :2], atol=1e-3)
    assert not np.allclose(found.places[0], found.places[2], atol=1e-3)
    assert Path("results/maps.png").read_text() == "drawn"
    cell = Cell.read(path.with_suffix(".json"))
    assert cell.config["attributes"] == "genres.tsv"
    assert cell.inference_seconds > 0
    assert {"item_embedding/embedding energy", "item_embedding/raw update energy"} <= set(
        cell.history[0]["diagnostics"]
    )


def load_params(run, which):
    from models.training.checkpoints import load_run

    model = load_run(run, which).model
    return {"item_embedding": np.asarray(model.item_embedding.embedding[...])}


COSTS_TABLE = """
title: What it costs
description: Seconds.
label: paper
datasets:
  tiny: {file: tiny.txt, public: {data: ml-100k}}
arms: [adamw, sevo-adamw]
picture: {kind: times}
times:
  SASRec: {adamw: {training: 500, inference: 2.0}}
rows:
  - {title: SASRec on tiny, dataset: tiny, preset: preset.yaml}
  - {title: MF-BPR on tiny, dataset: tiny, model: mf-bpr, settings: {embedding_dim: 8}, arms: [adamw]}
"""


class TestCosts:
    """Seconds of training and inference are measured, and nothing is trained to its end."""

    @pytest.fixture(autouse=True)
    def costs_table(self, folder):
        (folder / "costs.yaml").write_text(COSTS_TABLE)

    def test_measures_then_skips(self, capsys):
        reproduce(table="costs.yaml", models=("sasrec",), workers=None)
        assert "0 rows are done, 1 to measure" in capsys.readouterr().out
        path = Path("results/costs/tiny-sasrec-bce-costs.json")
        before = path.read_text()
        assert [x.name for x in path.parent.iterdir()] == [path.name]
        kept = Costs.read(path)
        assert set(kept.arms) == {"adamw", "sevo-adamw"}
        for arm in kept.arms.values():
            assert arm.epoch_seconds > 0 < arm.inference_seconds
            assert arm.training_seconds == 2 * arm.epoch_seconds  # of the preset's two epochs
        reproduce(table="costs.yaml", workers=None)
        assert "1 rows are done, 1 to measure" in capsys.readouterr().out
        assert path.read_text() == before
        reproduce(table="costs.yaml", workers=None, dry_run=True)
        assert "nothing is missing" in capsys.readouterr().out
        reproduce(table="costs.yaml", list=True)
        assert re.search(r"costs +2 of 2", capsys.readouterr().out)

    def test_of_other_settings_are_measured_anew(self, folder, monkeypatch):
        monkeypatch.setattr(costs, "measure", invented_costs)
        reproduce(table="costs.yaml", workers=None)
        row = load_table("costs.yaml").rows[0]
        assert find_costs(Path("results"), "costs", row) is not None
        (folder / "preset.yaml").write_text(PRESET.replace("epochs: 2", "epochs: 3"))
        assert find_costs(Path("results"), "costs", load_table("costs.yaml").rows[0]) is None
        reproduce(table="costs.yaml", workers=None)
        assert find_costs(Path("results"), "costs", load_table("costs.yaml").rows[0]).arms["adamw"].epochs == 3

    def test_the_report_and_the_verdict(self, monkeypatch):
        monkeypatch.setattr(costs, "measure", invented_costs)
        reproduce(table="costs.yaml", models=("sasrec",), workers=None)
        text = Path("results/README.md").read_text()
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
        assert ["SASRec", "adamw", "2", "1.00", "–", "2", "500", "0.50", "2"] in lines
        assert ["", "sevo-adamw", "2", "1.20", "+20%", "2", "–", "0.50", "–"] in lines
        assert (
            "(`python -m models reproduce --table costs.yaml --data-dir DIR` measures it):\n\n* MF-BPR on tiny" in text
        )
        found = TableCells.of(load_table("costs.yaml"), Cells(Path("results")))
        (overhead,) = [claim for claim in CLAIMS if claim.tables == ("figure-3",)]
        verdict = overhead.judge({"figure-3": found})
        assert (verdict.holds, verdict.evidence[0]) == ([True], "SASRec +20% an epoch")

    @pytest.mark.parametrize("options", [{"arms": ("adamw",)}, {"epochs": 3}, {"workers": 2}])
    def test_options_that_would_do_nothing(self, options):
        (name,) = options
        with pytest.raises(ValueError, match=f"^{name}: .* side by side .*; leave out --{name}"):
            reproduce(**{"table": "costs.yaml", "workers": None} | options)

    def test_a_broken_file(self, monkeypatch):
        monkeypatch.setattr(costs, "measure", invented_costs)
        reproduce(table="costs.yaml", workers=None)
        Path("results/costs/tiny-sasrec-bce-costs.json").write_text('{"format": 1, "arms": {"adamw": 3}}')
        with pytest.raises(ValueError, match=r"tiny-sasrec-bce-costs.json holds no costs; delete it"):
            reproduce(table="costs.yaml", report=True)
        Path("results/costs/tiny-sasrec-bce-costs.json").write_text('{"format": 99}')
        with pytest.raises(ValueError, match=r"costs.json .*99.*; .*or give another --results-dir"):
            reproduce(table="costs.yaml", report=True)

    def test_a_row_that_varies_something(self, folder):
        (folder / "costs.yaml").write_text(
            COSTS_TABLE.replace("preset.yaml}", "preset.yaml, vary: {beta: [0.5, 0.9]}}")
        )
        with pytest.raises(ValueError, match="times measures the arms of a row, so SASRec on tiny must not have vary"):
            load_table("costs.yaml")


def invented_costs(configs):
    """Costs in which smoothing makes an epoch 20% longer."""
    return {
        arm: ArmCosts(1.2 if arm.startswith("sevo") else 1.0, 0.5, portable(config)) for arm, config in configs.items()
    }


class TestClaims:
    def test_verdicts(self):
        assert Verdict([], []).text(complete=False) == "not decided"
        assert Verdict([True, True], []).text(complete=True) == "holds"
        assert Verdict([True], []).text(complete=False) == "holds so far"
        assert Verdict([False], []).text(complete=True) == "does not hold"
        assert Verdict([True, False], []).text(complete=True) == "holds in 1 of 2"
        assert Verdict([True, None], []).text(complete=True) == "holds in 1 of 2, 1 not decided"
        assert Verdict([False, None], []).text(complete=True) == "does not hold in 1 of 2, 1 not decided"
        assert Verdict([None], []).text(complete=True) == "not decided"

    def test_of_invented_cells(self, folder):
        """Cells in which L = 3 is best on Beauty and L = 5 on ML-1M, and a seed of L = 5 that nothing else has."""
        values = {("beauty", 3): 0.05, ("ml-1m", 5): 0.05}
        for row in load_table("4").rows:
            for group in row.groups:
                place = (row.dataset, group.settings.get("num_layers"))
                base = values.get(place, 0.03)
                lucky = [0.9] if place == ("beauty", 5) else []
                write_cells("table-4", group, [base - 0.0001, base, base + 0.0001, *lucky])
        found = Cells(Path("results"))
        tables = {name: TableCells.of(load_table(name), found) for name in table_names()}
        lines = {line[0]: line[1:] for line in claim_lines(tables)}
        peak = lines["Accuracy peaks around L = 3 (2 to 4)"]
        assert peak[0] == "does not hold in 1 of 2, 1 not decided"
        assert "beauty, seed 0, 1, 2: L = 3 0.0500, L = 0 0.0300, a difference of +0.0200 that 0.71" in peak[1]
        assert "; ml-1m, seed 0, 1, 2: L = 2 0.0300, L = 5 0.0500, L = 0 0.0300" in peak[1]
        assert lines["Genres help, but less than interactions"][0] == "not decided"

    def test_noise_decides_nothing(self, folder):
        """L = 5 is ahead of L = 3 in the one seed that all have, by less than published seeds of L = 3 lie apart."""
        (beauty,) = [row for row in load_table("4").rows if row.title == "SASRec on Beauty"]
        for group in beauty.groups:
            scores = {3: [0.040, 0.042, 0.041], 5: [0.0405]}.get(group.settings.get("num_layers"), [0.030])
            write_cells("table-4", group, scores)
        (layers,) = [claim for claim in CLAIMS if claim.tables == ("table-4",)]
        verdict = layers.judge({"table-4": TableCells.of(load_table("4"), Cells(Path("results")))})
        assert verdict.holds == [None]
        assert verdict.evidence == [
            "beauty, seed 0: L = 3 0.0400, L = 5 0.0405, L = 0 0.0300, "
            "a difference of -0.0005 that 0.0038 of noise (two standard errors) does not tell apart"
        ]

    @pytest.mark.parametrize(
        ("scores", "evidence"),
        [
            ({3: [0.032]}, ", a difference of +0.0020 that 0.0038 of noise (two standard errors) does"),
            (
                {3: [0.040, 0.042], 5: [0.0405, 0.0405]},
                ", a difference of +0.0005 that 0.0028 of noise (two standard errors) does",
            ),
        ],
    )
    def test_a_small_lead_of_the_claim_decides_nothing_either(self, folder, scores, evidence):
        (beauty,) = [row for row in load_table("4").rows if row.title == "SASRec on Beauty"]
        for group in beauty.groups:
            usual = [0.030] * len(scores[3])
            write_cells("table-4", group, scores.get(group.settings.get("num_layers"), usual))
        (layers,) = [claim for claim in CLAIMS if claim.tables == ("table-4",)]
        verdict = layers.judge({"table-4": TableCells.of(load_table("4"), Cells(Path("results")))})
        assert verdict.holds == [None]
        assert "L = 3 0.0" in verdict.evidence[0]
        assert evidence in verdict.evidence[0]

    @pytest.mark.parametrize(
        ("title", "scores", "holds", "evidence"),
        [
            (
                "BERT4Rec on Beauty",
                {"adamw": [0.0417], "sevo-adamw": [0.0429]},
                [None],
                "+0.0012 in NDCG@10 that 0.0015 of",
            ),
            (
                "BERT4Rec on Beauty",
                {"adamw": [0.0417], "sevo-adamw": [0.0450]},
                [True],
                "BERT4Rec +7.9% over adamw (beauty)",
            ),
            (
                "BERT4Rec on Beauty",
                {"adamw": [0.0450], "sevo-adamw": [0.0417]},
                [False],
                "BERT4Rec -7.3% over adamw (beauty)",
            ),
        ],
    )
    def test_gains(self, folder, title, scores, holds, evidence):
        """Of one seed, the deviation of the published runs says what is noise."""
        table = load_table("3")
        (row,) = [row for row in table.rows if row.title == title]
        for group in row.groups:
            if group.arm in scores:
                write_cells("table-3", group, scores[group.arm])
        (claim,) = [claim for claim in CLAIMS if claim.text.startswith("SEvo improves")]
        verdict = claim.judge({"table-3": TableCells.of(table, Cells(Path("results")))})
        assert verdict.holds == holds
        (text,) = [text for text in verdict.evidence if "BERT4Rec" in text]
        assert evidence in text
        assert ("does not tell apart" in text) is (holds == [None])

    def test_gains_of_opposite_signs(self, folder):
        """On average a gain, but what noise cannot explain is a loss."""
        table = load_table("3")
        scores = {"Beauty": {"adamw": 0.0380, "sevo-adamw": 0.0381}, "ML-1M": {"adamw": 0.120, "sevo-adamw": 0.110}}
        scores["Toys"] = {"adamw": 0.001, "sevo-adamw": 0.002}
        for row in table.rows:
            name, _, data = row.title.partition(" on ")
            if name == "SASRec" and data in scores:
                for group in row.groups:
                    if group.arm in scores[data]:
                        write_cells("table-3", group, [scores[data][group.arm]])
        (claim,) = [claim for claim in CLAIMS if claim.text.startswith("SEvo improves")]
        verdict = claim.judge({"table-3": TableCells.of(table, Cells(Path("results")))})
        assert verdict.holds == [None]
        (text,) = [text for text in verdict.evidence if "SASRec" in text]
        assert "SASRec +30.6% over adamw" in text
        assert text.endswith("does not tell apart; what is told apart says the opposite")

    @pytest.mark.parametrize(("last", "holds"), [(0.25, [False]), (0.24, [False]), (0.26, [True]), (0.1, [False])])
    def test_rescaling(self, folder, last, holds):
        table = load_table("figure-4a")
        for group in next(row for row in table.rows if row.dataset == "beauty").groups:
            if "rescale" in group.settings:
                cell = complete_cell("figure-4a", group, 0)
                loss = 0.2 if group.settings["rescale"] else last
                history = [*cell.history[:-1], {"epoch": cell.epochs, "loss": loss}]
                dataclasses.replace(cell, history=history).write(cell_path(Path("results"), "figure-4a", group, 0))
        (claim,) = [claim for claim in CLAIMS if claim.tables == ("figure-4a",)]
        verdict = claim.judge({"figure-4a": TableCells.of(table, Cells(Path("results")))})
        assert verdict.holds == holds
        assert verdict.evidence == [f"beauty: last training loss {last:.2f} without it, 0.20 with it"]

    @pytest.mark.parametrize(
        ("iterative", "holds"), [([0.0300, 0.0304], [True]), ([0.0399, 0.0403], [None]), ([0.0500, 0.0504], [False])]
    )
    def test_iterative(self, folder, iterative, holds):
        table = load_table("figure-5b")
        for group in next(row for row in table.rows if row.dataset == "beauty").groups:
            if group.settings.get("beta") in (0.5, 0.9):  # up to 0.7 nothing is claimed
                other = group.settings["smoothing"] == "iterative"
                write_cells("figure-5b", group, iterative if other else [0.0400, 0.0404])
        (claim,) = [claim for claim in CLAIMS if claim.tables == ("figure-5b",)]
        verdict = claim.judge({"figure-5b": TableCells.of(table, Cells(Path("results")))})
        assert verdict.holds == holds
        assert ("does not tell apart" in verdict.evidence[0]) is (holds == [None])

    @pytest.mark.parametrize(
        ("without", "holds"), [([0.0400, 0.0402], [True]), ([0.0455, 0.0459], [None]), ([0.0500, 0.0502], [False])]
    )
    def test_correction(self, folder, without, holds):
        table = load_table("figure-6")
        (row,) = [row for row in table.rows if row.subject == "STOSA" and row.dataset == "beauty"]
        for group in row.groups:
            if group.arm == "adamw":
                write_cells("figure-6", group, [0.04, 0.04])
            elif group.arm == "sevo-adamw":
                write_cells("figure-6", group, [0.0456, 0.0458] if group.settings["moment_correction"] else without)
        (claim,) = [claim for claim in CLAIMS if claim.tables == ("figure-6",)]
        assert claim.judge({"figure-6": TableCells.of(table, Cells(Path("results")))}).holds == holds

    @pytest.mark.parametrize(("fallen", "told_apart"), [(0.0200, True), (0.0385, False), (0.0400, False)])
    @pytest.mark.parametrize("steady", ["distance", "frequency"])
    def test_distance(self, folder, fallen, told_apart, steady):
        """One weighting stays where it is while the other falls with the hops; of four results, not of two."""
        table = load_table("figure-7")
        for row in table.rows:
            if row.dataset == "beauty" and "max_hops" in row.vary:
                for group in row.groups:
                    falls = group.settings.get("graph_weighting") != steady and group.settings.get("max_hops", 1) > 1
                    score = fallen if falls else 0.0400
                    write_cells("figure-7", group, [score, score + 0.001])
        (claim,) = [claim for claim in CLAIMS if claim.text.startswith("Distance is steadier")]
        verdict = claim.judge({"figure-7": TableCells.of(table, Cells(Path("results")))})
        assert verdict.holds == [steady == "distance" if told_apart else None]

    def test_falls_again_behind_the_best_k(self, folder):
        scores = {3: 0.030, 5: 0.045, 10: 0.044, 20: 0.042, 50: 0.037}
        for row in load_table("figure-7").rows:
            if row.title == "SASRec, the first or last K items, on Beauty":
                for group in row.groups:
                    score = scores.get(group.settings.get("graph_max_length"), 0.03)
                    write_cells("figure-7", group, [score, score + 0.001])
        (longer,) = [x for x in CLAIMS if x.text.startswith("On Beauty")]
        verdict = longer.judge({"figure-7": TableCells.of(load_table("figure-7"), Cells(Path("results")))})
        assert verdict.holds == [False]
        assert verdict.evidence[0].endswith(", 0.0080 less at the end than at best")

    def test_the_last_k(self, folder):
        """With three of the last items it is worst, with twenty best; at 5 and 10 noise decides."""
        last = {3: 0.030, 5: 0.035, 10: 0.0358, 20: 0.040, 50: 0.0395}
        (beauty,) = [
            row for row in load_table("figure-7").rows if row.title == "SASRec, the first or last K items, on Beauty"
        ]
        for group in beauty.groups:
            k = group.settings.get("graph_max_length")
            score = last[k] if group.settings.get("graph_keep") == "last" else 0.0351
            write_cells("figure-7", group, [score, score + 0.001] if k == 50 else [score])
        first, longer = [x for x in CLAIMS if x.text.startswith(("The last K", "On Beauty"))]
        found = {"figure-7": TableCells.of(load_table("figure-7"), Cells(Path("results")))}
        assert first.judge(found).holds == [False, None, None, True, True]
        assert first.judge(found).evidence[0].endswith("told apart from noise at K = 3, 20, 50")
        assert longer.judge(found).holds == [True]

    @pytest.mark.parametrize(
        ("genres", "holds", "evidence"),
        [
            ([0.0490], [None], "a step of +0.0010 that 0.0047 of noise (two standard errors)"),
            ([0.0480, 0.0500], [None], "a step of +0.0010 that 0.0033 of noise (two standard errors)"),
            ([0.0295, 0.0315], [None], "a step of +0.0005 that 0.0033 of noise (two standard errors)"),
            ([0.0410, 0.0430], [True], "adamw 0.0300, genres 0.0420, interactions 0.0500"),
            ([0.0590, 0.0610], [False], "adamw 0.0300, genres 0.0600, interactions 0.0500"),
            ([0.0210, 0.0230], [False], "adamw 0.0300, genres 0.0220, interactions 0.0500"),
        ],
    )
    def test_genres(self, folder, genres, holds, evidence):
        scores = {"ml-1m-genres": genres, "ml-1m-interactions": [0.0490, 0.0510] if len(genres) == 2 else [0.0500]}
        table = load_table("5")
        for row in table.rows:
            for group in row.groups:
                if group.arm == "adamw" and row.name == "ml-1m-interactions":
                    write_cells("table-5", group, [0.0300] * len(genres))
                elif group.settings.get("beta") == 0.99:
                    write_cells("table-5", group, scores[row.name])
        (claim,) = [claim for claim in CLAIMS if claim.tables == ("table-5",)]
        verdict = claim.judge({"table-5": TableCells.of(table, Cells(Path("results")))})
        assert verdict.holds == holds
        (text,) = verdict.evidence
        assert text.startswith("beta 0.99: adamw 0.0300, ")
        assert evidence in text

    def test_bars_beside_each_other_are_of_the_same_runs(self, folder):
        """With the correction there is another data set, and another seed."""
        table = load_table("figure-6")
        scores = {True: [0.04, 0.09], False: [0.05]}
        for row in table.rows:
            for group in row.groups:
                if row.subject != "SASRec" or group.arm == "adam":
                    continue
                if row.dataset == "beauty":
                    plain = group.arm == "adamw"
                    write_cells(
                        "figure-6", group, [0.02, 0.02] if plain else scores[group.settings["moment_correction"]]
                    )
                elif row.dataset == "toys" and group.settings.get("moment_correction") is not False:
                    write_cells("figure-6", group, [0.02])
        rows = TableCells.of(table, Cells(Path("results"))).rows
        found = average_gains(comparable_rows(rows, "adamw"), "adamw")
        gains = {x.settings["moment_correction"]: (x.gain, x.datasets) for x in found if x.subject == "SASRec"}
        assert gains == {
            True: (pytest.approx(1.0), ("beauty",)),
            False: (pytest.approx(1.5), ("beauty",)),
        }

    def test_a_row_of_borrowed_plain_runs(self, folder):
        """Each graph's row has the same AdamW beside it, which says nothing of the graph."""
        table = load_table("cross-entropy-graphs")
        rows = {row.name: row for row in table.rows}
        for group in rows["beauty-consecutive"].groups:
            if group.arm == "adamw":
                write_cells("cross-entropy-graphs", group, [0.02])
        of = lambda name: next(  # noqa: E731
            x for x in TableCells.of(table, Cells(Path("results"))).rows if x.row.name == name
        )
        assert of("beauty-distance").borrowed
        assert not of("beauty-consecutive").borrowed
        for group in rows["beauty-distance"].groups:
            if group.arm != "adamw":
                write_cells("cross-entropy-graphs", group, [0.03])
        assert not of("beauty-distance").borrowed

    def test_average_gains(self, folder, trained):
        reproduce(seeds=2)
        (row, _) = TableCells.of(load_table("tiny.yaml"), Cells(Path("results"))).rows
        (gain,) = average_gains([row], "adamw")
        tests = [[invented(x.config(), x.arm, seed).test for seed in (0, 1)] for x in row.row.groups]
        means = [{m: np.mean([test[m] for test in arm]) for m in METRICS} for arm in tests]
        assert gain.gain == pytest.approx(np.mean([means[1][m] / means[0][m] - 1 for m in METRICS]), abs=1e-4)
        assert (gain.subject, gain.datasets, gain.short) == ("SASRec", ("tiny",), False)

    def test_average_gains_of_complete_runs(self, folder, trained):
        reproduce(seeds=1, epochs=1)
        (row, _) = TableCells.of(load_table("tiny.yaml"), Cells(Path("results"))).rows
        (gain,) = average_gains([row], "adamw")
        assert (gain.datasets, gain.short) == (("tiny",), True)
        (gain,) = average_gains([row], "adamw", complete=True)
        assert (gain.datasets, gain.gain) == ((), None)


def test_a_line_has_a_gap_where_something_was_not_run(folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "panels", lambda panels, path, **_: drawn.extend(panels))
    (beauty,) = [row for row in load_table("4").rows if row.title == "SASRec on Beauty"]
    for group in beauty.groups:
        if group.settings.get("num_layers") in (0, 3):
            write_cells("table-4", group, [0.03])
    draw_table(TableCells.of(load_table("4"), Cells(Path("results"))), Path("results"))
    (line,) = drawn[0].lines
    assert line.x == [0, 1, 2, 3]
    assert np.isnan(line.y).tolist() == [False, True, True, False]
    assert drawn[0].ylabel == "test NDCG@10, seed 0"


def test_every_kind_of_picture(tmp_path):
    panel = plots.Panel("a", "beta", "y", [plots.Line("x", None, [0.5, 0.99], [1.0, 2.0], [0.1, 0.1])], categories=True)
    plots.panels(
        [panel._replace(published=[plots.Line("x", None, [0.5], [1.5])], levels=[("adamw", 1.0)])] * 3,
        tmp_path / "a.png",
    )
    plots.bars(
        {"one": [plots.Bar("b", None, 1.0, 0.1, 2.0), plots.Bar("c", None, None)]},
        tmp_path / "b.png",
        ylabel="y",
        log=True,
    )
    plots.maps({"r": {"c": np.zeros((3, 2), np.float16)}}, np.array([0, 1, -1]), ["g", "h"], tmp_path / "c.png")
    series = plots.Series("s", None, [0.1, None, -0.2], [0.05, None, None], ["+5%", "", "-9%"])
    plots.clusters(
        [plots.Clusters("x", ["a", "b", "c"], [series, series], [False, True, False])], tmp_path / "d.png", ylabel="y"
    )
    for name in "abcd":
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("losses", "scale"), [([1.0, 0.1], "log"), ([1.0, 0.9], "linear"), ([1.0, 0.1, -0.2], "linear")]
)
def test_the_axis_of_losses_is_logarithmic_where_it_can_be(losses, scale, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda fig, path: drawn.append(fig))
    plots.training_curves([plots.Seeds("adam", "adam", 0, [losses], [[(1, 0.1), (2, 0.2)]])], tmp_path / "a.png")
    assert drawn[0].axes[1].get_yscale() == scale
    plots.plt.close(drawn[0])
