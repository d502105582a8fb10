import dataclasses
import errno
import inspect
import json
import os
import re
import subprocess
import sys

import pytest

from models.__main__ import main
from models.config import TrainConfig
from models.training import loop
from sevo_optax import graph

SMALL = ["--epochs", "2", "--eval-every", "1", "--batch-size", "8", "--embedding-dim", "8", "--max-length", "6"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("".join(f"{u} {' '.join(str(1 + (3 * u + i) % 20) for i in range(6))}\n" for u in range(1, 21)))
    return path


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_train(data, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    status, printed, _ = run(capsys, "train", "--data", data, "--optimizer", "adamw", "--output-dir", out, *SMALL)
    assert status == 0
    assert "20 users, 20 items, 120 interactions" in printed
    assert "test: HR@1 0." in printed
    assert "leave-one-out, full ranking" in printed
    assert re.search(r"peak memory \d+\.\d\d GiB", printed)
    assert {path.name for path in out.iterdir()} == {
        *("run.json", "items.npz", "checkpoints", "result.json", "history.jsonl", "curve.png")
    }


def test_a_second_run_does_not_replace_the_first(data, tmp_path, capsys):
    arguments = ["train", "--data", data, "--output-dir", tmp_path / "out", *SMALL]
    assert run(capsys, *arguments)[0] == 0
    before = (tmp_path / "out" / "result.json").read_bytes()
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert "holds a run already; go on with --resume, replace it with --overwrite" in err
    assert run(capsys, *arguments, "--resume")[0] == 0
    assert (tmp_path / "out" / "result.json").read_bytes() == before
    assert run(capsys, *arguments, "--overwrite")[0] == 0
    assert (tmp_path / "out" / "result.json").read_bytes() != before  # its seconds
    status, _, err = run(capsys, *arguments, "--overwrite", "--resume")
    assert status == 2
    assert "exclude each other" in err


def test_a_preset_gives_way_to_options(data, tmp_path, capsys):
    preset = tmp_path / "mine.yaml"
    preset.write_text("beta: 0.5\nlearning_rate: 0.25\nepochs: 1\neval_every: 1\nembedding_dim: 8\n")
    out = tmp_path / "out"
    arguments = ["train", f"--preset={preset}", "--data", data, "--output-dir", out, "--learning-rate", "0.001"]
    assert run(capsys, *arguments)[0] == 0
    config = json.loads((out / "run.json").read_text())["config"]
    assert (config["beta"], config["learning_rate"], config["epochs"]) == (0.5, 0.001, 1)
    # An option counts even where it repeats the default that the preset changed.
    out = tmp_path / "again"
    assert run(capsys, *arguments[:4], "--output-dir", out, "--beta", "0.99")[0] == 0
    assert json.loads((out / "run.json").read_text())["config"]["beta"] == 0.99
    status, _, err = run(capsys, "train", "--preset", "nothing-like-it", "--data", data)
    assert status == 2
    assert "sasrec-beauty" in err


def test_more_items_asked_for_than_there_are(data, tmp_path, capsys):
    status, printed, _ = run(
        capsys, "train", "--data", data, "--output-dir", tmp_path / "out", *SMALL, "--ks", "5", "20", "1000"
    )
    assert status == 0
    assert "HR@1000 1.0000" in printed
    assert "coverage@1000 1.0000" in printed


@pytest.mark.parametrize("model", ["sasrec", "bert4rec"])
@pytest.mark.parametrize(
    ("text", "hits"),
    [
        ("1 1 2 3 4 5\n", None),  # one user
        ("1 1 1 1 1\n2 1 1 1\n", 1.0),  # one item
        ("".join(f"{u} {' '.join(str(1 + (u + i) % 30) for i in range(90))}\n" for u in range(5)), None),  # long
    ],
)
def test_small_worlds(tmp_path, capsys, model, text, hits):
    path = tmp_path / "data.txt"
    path.write_text(text)
    out = tmp_path / "out"
    options = ["--model", model, "--loss", "ce", "--num-heads", "1", *SMALL]
    status, _, err = run(capsys, "train", "--data", path, "--output-dir", out, *options)
    assert status == 0, err
    result = json.loads((out / "result.json").read_text())
    assert all(0 <= value <= 1 for value in result["test"].values())
    if hits is not None:
        assert result["test"]["HR@1"] == hits
    status, _, err = run(capsys, "recommend", "--checkpoint", out, "--history", *text.split()[1:], "--k", "3")
    assert status == 0, err


def test_a_full_disk_is_one_line(data, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "history.jsonl"))

    monkeypatch.setattr("models.training.run.write_text", full)
    status, _, err = run(capsys, "train", "--data", data, "--output-dir", tmp_path / "out", *SMALL)
    assert status == 2
    assert "No space left on device" in err
    assert err.splitlines()[-1].startswith("error: ")


def test_compare(data, tmp_path, capsys):
    status, printed, _ = run(capsys, "compare", "--data", data, "--output-dir", tmp_path / "out", *SMALL)
    assert status == 0
    assert printed.rstrip().endswith("compare.json")
    assert all(name in printed for name in ["adamw", "sevo-adamw", "sevo-gradient"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no interactions"),
        ("1 2 3 4\n2 3 four 5\n", "line 2: 'four' is no integer id"),
        ("1 2 3 4\n2 3 4\n", "user 2 of 2 has 2 interactions"),
        ("1 1 2 3\n", "no user has two interactions to train on"),
        ("1 1 2 1 3 1 2\n", "user 1 has interacted with all 3 items"),
    ],
)
def test_bad_data_is_one_line_and_status_2(tmp_path, capsys, text, message):
    path = tmp_path / "bad.txt"
    path.write_text(text)
    status, _, err = run(capsys, "train", "--data", path, "--output-dir", tmp_path / "out")
    assert status == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "no/such.txt"], "no/such.txt does not exist"),
        (["train", "--data", "/"], "/ is a folder"),
        (["train", "--epoch", "3"], "--epoch"),
        (["train", "--optimizer", "sgd"], "invalid choice 'sgd'"),
        (["train", "--epochs", "many"], "--epochs: invalid literal"),
        (["train", "--epochs"], "Missing value for argument '--epochs'"),
        (["train", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (["train", "--dropout-rate", "1"], "dropout_rate must lie in [0, 1), got 1.0"),
        (["train", "--weight-decay", "-1"], "weight_decay must be at least 0, got -1.0"),
        (["train", "--learning-rate", "0"], "learning_rate must be larger than 0"),
        (["train", "--beta", "1"], "beta must lie in [0, 1), got 1.0"),
        (["train", "--num-heads", "5"], "num_heads must divide embedding_dim, got 5 and 64"),
        (["train", "--ks", "0"], "ks must be one or more numbers of at least 1, got (0,)"),
        (["train", "--patience", "0"], "patience must be at least 1, got 0"),
        (["train", "--clip-norm", "-1"], "clip_norm must be larger than 0, got -1.0"),
        (["train", "--gbce-t", "2"], "gbce_t must lie in [0, 1], got 2.0"),
        (["train", "--num-negatives", "0"], "num_negatives must be at least 1, got 0"),
        (["train", "--warmup-epochs", "7", "--epochs", "7"], "warmup_epochs must be smaller than epochs, 7, got 7"),
        (["compare", "--seeds", "0"], "seeds must be at least 1, got 0"),
        (["fly"], "fly"),
        ([], "Expected one of {train, compare"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert message.replace(" ", "") in err.replace(" ", "")
    assert err.count("\n") == 1
    assert len(err) < 300


def test_an_output_folder_that_is_a_file(data, capsys):
    status, _, err = run(capsys, "train", "--data", data, "--output-dir", data)
    assert status == 2
    assert "output_dir" in err


def test_no_traceback_from_the_real_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "models", "train", "--data", str(tmp_path / "none")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: data:")
    assert "Traceback" not in done.stderr


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "Decoupled weight decay" in printed
    source = inspect.getsource(inspect.getmodule(TrainConfig))
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in printed
        assert re.search(rf'    {field.name}: .*\n    """[A-Za-z]', source), f"{field.name} is not explained"


def test_interrupt(data, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", interrupted)
    status, _, err = run(capsys, "train", "--data", data, "--output-dir", tmp_path / "out")
    assert status == 130
    assert "what was written so far is kept" in err


def test_graph(data, tmp_path, capsys):
    status, printed, _ = run(capsys, "graph", "--data", data, "--output-dir", tmp_path / "out", "--max-hops", 2)
    assert status == 0
    assert "nodes       21 (1 isolated)" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"weights.npz", "degrees.png", "drawing.png"}
    train = graph.load(tmp_path / "out" / "weights.npz")

    run(capsys, "graph", "--data", data, "--output-dir", tmp_path / "all", "--max-hops", 2, "--part", "all")
    assert graph.load(tmp_path / "all" / "weights.npz").sum() > train.sum()


def test_a_large_graph_is_not_drawn(tmp_path, capsys):
    (tmp_path / "drawing.png").write_bytes(b"of an earlier graph")
    status, printed, _ = run(capsys, "graph", "--output-dir", tmp_path)
    assert status == 0
    assert "no drawing: 1,001 nodes are more than 300" in printed
    assert not (tmp_path / "drawing.png").exists()


def test_graph_of_attributes(data, tmp_path, capsys):
    table = tmp_path / "items.tsv"
    table.write_text("item_id\tgenres\n1\tDrama|War\n2\tWar\n3\t\n4\tComedy|Drama\n")
    out = tmp_path / "out"
    status, printed, _ = run(capsys, "graph", "--data", data, "--attributes", table, "--output-dir", out)
    assert status == 0
    assert "items that share genres" in printed
    weights = graph.load(out / "weights.npz").todense()
    assert weights[1, 2] == weights[1, 4] == 1
    assert weights.sum() == 4


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("item_id\tgenres\n1\tDrama\n", ["--attribute-column", "mood"], "has no column 'mood'; it has item_id, genres"),
        ("item_id\tgenres\nx\tDrama\n", [], "is among the items of"),
        ("item_id\tgenres\n1\t\n", [], "no item of"),
        ("item_id\tgenres\n99\tDrama\n", [], "99"),
        ("", [], "items.tsv is empty"),
        (None, [], "does not exist"),
    ],
)
def test_bad_attributes(data, tmp_path, capsys, text, options, message):
    table = tmp_path / "items.tsv"
    if text is not None:
        table.write_text(text)
    status, _, err = run(
        capsys, "graph", "--data", data, "--attributes", table, "--output-dir", tmp_path / "out", *options
    )
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
