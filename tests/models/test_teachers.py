"""Tables in which one model teaches another, by the graph of its item vectors, and in which items are cold."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from models.data import read_item_vectors
from models.reproduce import Reproduce, runner
from models.reproduce.cells import Cell, cell_path
from models.reproduce.tables import load_table
from models.training import loop

PRESET = """
model: sasrec
embedding_dim: 8
num_blocks: 0
max_length: 6
batch_size: 8
epochs: 1
eval_every: 1
"""
TABLE = """
title: Teachers
description: Of one another.
label: paper
datasets:
  tiny: {file: tiny.txt, public: {data: ml-100k}}
arms: [adamw, sevo-adamw]
rows:
  - title: A student on tiny
    name: student
    dataset: tiny
    preset: preset.yaml
    settings: {graph: [knn], knn_neighbors: 3, embedding_dim: 4}
    teacher: master
  - title: A teacher on tiny
    name: master
    dataset: tiny
    preset: preset.yaml
    arms: [adamw]
    seeds: 1
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    lines = [f"{u} {' '.join(str(1 + (3 * u + i) % 20) for i in range(6))}\n" for u in range(1, 21)]
    (tmp_path / "tiny.txt").write_text("".join(lines))
    (tmp_path / "preset.yaml").write_text(PRESET)
    (tmp_path / "teachers.yaml").write_text(TABLE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(seeds=1, **options):
    everything = {"datasets": (), "models": (), "arms": (), "epochs": None, "data_dir": Path()}
    folders = {"results_dir": Path("results"), "work_dir": Path("runs")}
    return runner.plan(load_table("teachers.yaml"), **everything | folders | {"seeds": seeds} | options)[0]


def test_a_teacher_of_each_seed(folder):
    jobs = plan(seeds=2)
    found = {(job.group.name, job.config.seed): job for job in jobs}
    assert len(jobs) == 5  # the teacher's own row has one seed
    teachers = [found["student-sevo-adamw", seed].teacher for seed in (0, 1)]
    assert [(teacher.group.name, teacher.config.seed) for teacher in teachers] == [
        ("master-adamw", 0),
        ("master-adamw", 1),
    ]
    assert teachers[0] == found["master-adamw", 0]
    assert found["student-sevo-adamw", 0].config.vectors != found["student-sevo-adamw", 1].config.vectors
    assert found["student-adamw", 0].teacher is found["master-adamw", 0].teacher is None
    other = plan(epochs=7)[1]
    assert (other.config.epochs, other.teacher.config.epochs) == (7, 7)
    assert other.config.vectors != found["student-sevo-adamw", 0].config.vectors


def test_the_teacher_is_trained_first(folder, monkeypatch, capsys):
    trained = []
    real = loop.train_seeds

    def counting(prepared, config, *arguments, **options):
        trained.append((config.optimizer, config.embedding_dim))
        return real(prepared, config, *arguments, **options)

    monkeypatch.setattr(loop, "train_seeds", counting)
    (job,) = plan(arms=["sevo-adamw"])
    runner.train([job])
    assert trained == [("adamw", 8), ("sevo-adamw", 4)]
    cell = Cell.read(job.path)
    assert cell.config["vectors"] == job.config.vectors.name
    vectors, known = read_item_vectors(job.config.vectors, np.arange(21))
    assert vectors.shape == (21, 8)
    assert known[1:].all()
    # The teacher's own cell came with it, and the same student is not trained twice.
    table = load_table("teachers.yaml")
    assert Cell.read(cell_path(Path("results"), "teachers", table.rows[1].groups[0], 0)).arm == "adamw"
    (plain,) = plan()
    assert (plain.group.name, plain.config.graph) == ("student-adamw", ("item-item",))  # it heeds none
    runner.train([plain])
    assert plan() == []
    # Without its vectors the teacher is asked for them again, and only read.
    job.path.unlink()
    job.config.vectors.unlink()
    runner.train([job])
    assert Cell.read(job.path).test == cell.test
    shutil.rmtree(folder / "results")
    Reproduce(table="teachers.yaml", data_dir=Path(), seeds=1, dry_run=True).run()
    assert "0 cells are done, 3 to train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    teacher: master\n", "", "A student on tiny: teacher is missing; graph knn is made of another row's"),
        (
            "teacher: master",
            "teacher: student",
            "must be one of master (the rows on tiny without a teacher), got 'student'",
        ),
        ("graph: [knn], knn_neighbors: 3, ", "", "A student on tiny: teacher is not heeded without graph knn"),
        ("knn_neighbors: 3", "vectors: items.npz", "vectors must not stand there; the row's teacher has them"),
        ("seeds: 1", "seeds: 0", "seeds should be greater than or equal to 1"),
    ],
)
def test_bad_tables(folder, old, new, message):
    (folder / "teachers.yaml").write_text(TABLE.replace(old, new))
    with pytest.raises(ValueError) as caught:
        load_table("teachers.yaml")
    assert message in str(caught.value)


def test_cold_items_are_another_run():
    table = load_table("cold-start")
    rows = {row.name: row for row in table.rows}
    group = rows["ml-1m-cold-sasrec-ce"].groups[0]
    assert group.config().cold_items == 0.1
    other = load_table("cross-entropy-graphs")
    same = next(x for row in other.rows if row.name == "ml-1m-consecutive" for x in row.groups if x.arm == "adamw")
    assert runner.identity_of(group.config(), "adamw") != runner.identity_of(same.config(), "adamw")


def test_graphs_share_the_plain_run():
    """AdamW does not heed the graph: one run stands in three rows."""
    rows = [row for row in load_table("cross-entropy-graphs").rows if row.dataset == "beauty"]
    assert len({runner.identity_of(row.groups[0].config(), "adamw") for row in rows}) == 1
    smoothed = [runner.identity_of(x.config(), x.arm) for row in rows for x in row.groups if x.arm != "adamw"]
    assert len(set(smoothed)) == 6
    ours = load_table("cross-entropy").rows[0].groups
    assert runner.identity_of(ours[0].config(), "adamw") == runner.identity_of(rows[0].groups[0].config(), "adamw")
