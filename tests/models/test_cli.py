import dataclasses
import errno
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sevo_optax
from models.__main__ import main
from models.architectures.registry import DEFAULT, MODELS, make_config, model_class
from models.checks import unheeded
from models.cli import main as commands
from models.training import loop
from sevo_optax import graph

SMALL = ["--epochs", "2", "--eval-every", "1", "--batch-size", "8", "--embedding-dim", "8", "--num-blocks", "0"]
SMALL += ["--max-length", "6"]


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
        *("run.json", "items.npz", "checkpoints", "result.json", "history.jsonl", "curve.png", ".lock")
    }


def test_a_second_run_does_not_replace_the_first(data, tmp_path, capsys):
    arguments = ["train", "--data", data, "--output-dir", tmp_path / "out", *SMALL]
    assert run(capsys, *arguments)[0] == 0
    before = (tmp_path / "out" / "result.json").read_bytes()
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert "holds a run already; go on with --resume, replace it with --overwrite" in err
    status, out, _ = run(capsys, *arguments, "--resume")
    assert (status, "per_user" in out) == (0, False)
    status, out, _ = run(capsys, *arguments, "--resume", "--per-user")
    assert (status, "models evaluate --checkpoint" in out.splitlines()[-1]) == (0, True)
    assert (tmp_path / "out" / "result.json").read_bytes() == before
    assert run(capsys, *arguments, "--overwrite")[0] == 0
    assert (tmp_path / "out" / "result.json").read_bytes() != before  # its seconds
    status, _, err = run(capsys, *arguments, "--overwrite", "--resume")
    assert status == 2
    assert "exclude each other" in err


def test_a_preset_gives_way_to_options(data, tmp_path, capsys):
    preset = tmp_path / "mine.yaml"
    preset.write_text("beta: 0.5\nlearning_rate: 0.25\nepochs: 1\neval_every: 1\nembedding_dim: 8\nnum_blocks: 0\n")
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


@pytest.mark.parametrize(
    ("model", "text", "hits"),
    [
        ("sasrec", "1 1 2 3 4 5\n", None),  # one user
        ("bert4rec", "1 1 2 3 4 5\n", None),
        ("sasrec", "1 1 1 1 1\n2 1 1 1\n", 1.0),  # one item
        ("sasrec", "".join(f"{u} {' '.join(str(1 + (u + i) % 30) for i in range(90))}\n" for u in range(5)), None),
    ],
    ids=["one user", "one user, masked", "one item", "long histories"],
)
def test_small_worlds(tmp_path, capsys, model, text, hits):
    path = tmp_path / "data.txt"
    path.write_text(text)
    out = tmp_path / "out"
    small = ["1" if before == "--num-blocks" else word for before, word in itertools.pairwise(["", *SMALL])]
    options = ["--model", model, "--loss", "ce", *small, "--num-heads", "1"]
    status, _, err = run(capsys, "train", "--data", path, "--output-dir", out, *options)
    assert status == 0, err
    result = json.loads((out / "result.json").read_text())
    assert all(0 <= value <= 1 for value in result["test"].values())
    if hits is not None:
        assert result["test"]["HR@1"] == hits
    status, _, err = run(capsys, "recommend", "--checkpoint", out, "--history", *text.split()[1:], "--k", "3")
    assert status == 0, err


def test_new_users_are_left_out_of_a_test_on_other_data(data, tmp_path, capsys):
    out, more = tmp_path / "out", tmp_path / "more.txt"
    options = ["--epochs", "1", "--eval-every", "1", "--batch-size", "8", "--embedding-dim", "4"]
    status, _, err = run(capsys, "train", "--model", "mf-bpr", "--data", data, "--output-dir", out, *options)
    assert status == 0, err
    more.write_text(f"{data.read_text()}99 1 2 3 4\n")
    status, printed, err = run(capsys, "evaluate", "--checkpoint", out, "--data", more)
    assert status == 0, err
    assert "epoch 1: 20 users" in printed
    assert "; 1 test users that the model does not know left out" in printed


def test_plain_optimizers_need_no_graph(data, tmp_path, capsys):
    """A preset's graph of vectors is not even read, and nothing is said of it."""
    preset = tmp_path / "best.yaml"
    preset.write_text(f"model: sasrec\ngraph: [attributes]\nattributes: {tmp_path}/items.tsv\noptimizer: sevo-adamw\n")
    (tmp_path / "items.tsv").write_text("item_id\tgenres\n" + "".join(f"{i}\tA\n" for i in range(1, 9)))
    arguments = ["train", "--preset", preset, "--data", data, *SMALL, "--output-dir"]
    for optimizer, shown in {"sevo-adamw": True, "adamw": False}.items():
        status, printed, err = run(capsys, *arguments, tmp_path / optimizer, "--optimizer", optimizer)
        assert status == 0, err
        assert ("graph: 56 entries" in printed) is shown
    status, printed, err = run(
        capsys, *arguments, tmp_path / "measured", "--optimizer", "adamw", "--diagnostics", "--overwrite"
    )
    assert status == 0, err
    assert "graph: 56 entries" in printed


def test_a_pipe_of_attributes_is_refused(data, tmp_path, capsys):
    """A run reads it again, to know it when it goes on."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    arguments = ["train", "--data", data, *SMALL, "--graph", "attributes", "--attributes", pipe]
    status, _, err = run(capsys, *arguments, "--output-dir", tmp_path / "out")
    assert (status, err) == (2, f"error: graph: {pipe} is a pipe, which can be read only once; write it to a file\n")


def test_users_who_come_after_the_first_cut(tmp_path, capsys):
    """A table of users has no row for them, so that they are not asked for; a model of histories is asked."""
    rows = [f"{u},{1 + (u + t) % 17},{t + 3 * u}" for u in range(12) for t in range(10)]
    path, out = tmp_path / "a.csv", tmp_path / "out"
    path.write_text("\n".join(["user,item,time", *rows]))
    options = ["--split", "global-time", "--epochs", "1", "--eval-every", "1"]
    options += ["--batch-size", "8", "--embedding-dim", "4"]
    status, printed, err = run(capsys, "train", "--model", "mf-bpr", "--data", path, "--output-dir", out, *options)
    assert status == 0, err
    left_out = "0 validation and 1 test users without training interactions left out"
    assert left_out in printed
    tested = json.loads((out / "result.json").read_text())["test"]
    status, printed, err = run(capsys, "evaluate", "--checkpoint", out, "--output", tmp_path / "again.json")
    assert status == 0, err
    assert left_out in printed
    assert json.loads((tmp_path / "again.json").read_text())["test"] == tested


def test_a_full_disk_is_one_line(data, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "history.jsonl"))

    monkeypatch.setattr("models.training.run.write_text", full)
    status, _, err = run(capsys, "train", "--data", data, "--output-dir", tmp_path / "out", *SMALL)
    assert status == 2
    assert f"{tmp_path / 'history.jsonl'}: No space left on device; make room" in err
    assert err.splitlines()[-1].startswith("error: ")


def test_compare(data, tmp_path, capsys):
    status, printed, _ = run(capsys, "compare", "--data", data, "--output-dir", tmp_path / "out", *SMALL)
    assert status == 0
    *_, pictures, report = printed.rstrip().splitlines()
    assert pictures.endswith("compare.json")
    assert report == f"report, to open in a browser: {tmp_path / 'out' / 'report.html'}"
    assert "sasrec on data, bce" in (tmp_path / "out" / "report.html").read_text()
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
        (["train", "--epoch", "3"], "unknown option '--epoch'; did you mean --epochs?; see"),
        (["train", "--zzz=3"], "unknown option '--zzz'; see python -m models train --help"),
        (["compare", "--optimizer", "adamw"], "unknown option '--optimizer'; see python -m models compare --help"),
        (["recommend", "--checkpoint", "runs", "--user-colum", "x"], "did you mean --user-column?"),
        (["recommend", "--kk", "3"], "unknown option '--kk'"),
        (["train", "extra"], "'extra' belongs to no option of train"),
        (["train", "--optimizer", "lion"], "--optimizer must be one of adamw, sevo-adamw, sevo-gradient"),
        (["train", "--loss", "mse"], "--loss must be one of bce, ce, sampled-softmax, gbce, bpr, got 'mse'"),
        (["train", "--epochs", "many"], "--epochs must be a whole number, got 'many'"),
        (["train", "--epochs=2.5"], "--epochs must be a whole number, got '2.5'"),
        (["train", "--seed", "2**63"], "--seed must be a whole number, got '2**63'"),
        (["train", "--epochs", "9" * 5000], "--epochs must be a whole number, got '9999"),
        (["train", "--epochs"], "--epochs must be a whole number, got nothing"),
        (["train", "--b1", "high"], "--b1 must be a number, got 'high'"),
        (["train", "--ks", "1", "x"], "--ks must be whole numbers, got '1' 'x'"),
        (["train", "--split-quantiles", "0.5"], "--split-quantiles must be 2 numbers, got '0.5'"),
        (["train", "--split_quantiles", "0.5", "y"], "--split-quantiles must be 2 numbers, got '0.5' 'y'"),
        (["train", "--split-times", "2020"], "--split-times must be 2 texts, got '2020'"),
        (["reproduce", "--seeds", str(2**31)], "seeds must be at most 2147483647"),
        (["reproduce", "--models", "x"], "models must be among bert4rec"),
        (
            ["train", "--where", "a=1", "--beta", "0.5", "--where=a=2"],
            "--where stands twice; give it once, with all of",
        ),
        (["train", "--preset", "sasrec-beauty", "--preset", "sasrec-ml-1m"], "--preset stands twice"),
        (["train", "--rescale", "--no-rescale"], "--rescale and --no-rescale exclude each other; give one of them"),
        (
            ["evaluate", "--include-seen", "--no-exclude-seen"],
            "--include-seen and --no-exclude-seen exclude each other",
        ),
        (["reproduce", "--report", "--dry-run"], "dry_run and report exclude each other; give one of them"),
        (["reproduce", "--report", "--epochs", "3"], "epochs is not heeded with report, got 3; leave it out"),
        (["reproduce", "--list", "--models", "x"], "models is not heeded with list, got ('x',); leave it out"),
        (
            ["graph", "--graph", "attributes", "--attributes", "a.csv", "--cold-items", "0.5"],
            "cold_items is not heeded with graph attributes, got 0.5; leave it out",
        ),
        (["evaluate"], "--checkpoint must be given; see python -m models evaluate --help"),
        (["train", "--user-column", "\udcff"], "--user-column must be text in UTF-8, got '\\udcff'"),
        (["train", "--data=a\0b"], "--data must not hold a NUL character, got '--data=a\\x00b'"),
        (["\udcff"], "the command line must be text in UTF-8"),
        (["train", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (["train", "--dropout-rate", "1"], "dropout_rate must lie in [0, 1), got 1.0"),
        (["train", "--weight-decay", "-1"], "weight_decay must be at least 0, got -1.0"),
        (["train", "--learning-rate", "0"], "learning_rate must be larger than 0"),
        (["train", "--beta", "1"], "beta must lie in [0, 1), got 1.0"),
        (["train", "--beta", "1", "--optimizer", "adamw"], "beta must lie in [0, 1), got 1.0"),
        (["compare", "--beta", "1"], "beta must lie in [0, 1), got 1.0"),
        (["compare", "--num-layers", "-1"], "num_layers must be at least 0, got -1"),
        (["train", "--optimizer", "adamw", "--num-layers", "-1"], "num_layers must be at least 0, got -1"),
        (["train", "--num-layers", "2147483648"], "num_layers must be at most 2147483647, got 2147483648"),
        (["train", "--seed", str(2**63)], "seed must be at most 2147483647, got 9223372036854775808"),
        (["train", "--seed", "-1"], "seed must be at least 0, got -1"),
        (["train", "--epochs", "9" * 4000], "epochs must be at most 2147483647, got a number of 13288 bits"),
        (["compare", "--seed", "2147483647", "--seeds", "2"], "seed must be at most 2147483647, got 2147483648"),
        (["train", "--learning-rate", "inf"], "learning_rate must be a finite number, got inf"),
        (["train", "--learning-rate", "nan"], "learning_rate must be a finite number, got nan"),
        (["train", "--learning-rate", "1e39"], "learning_rate must be a finite number of at most 3.40282e+38"),
        (["train", "--b1", "nan"], "b1 must be a finite number, got nan"),
        (["train", "--b2", "nan"], "b2 must be a finite number, got nan"),
        (["train", "--weight-decay", "inf"], "weight_decay must be a finite number, got inf"),
        (["train", "--dropout-rate", "nan"], "dropout_rate must be a finite number, got nan"),
        (["train", "--split-quantiles", "nan", "0.9"], "split_quantiles must be a finite number, got nan"),
        (["train", "--ks", str(2**40)], "ks must be at most 2147483647"),
        (["train", "--min-user-interactions", "-1"], "min_user_interactions must be at least 0, got -1"),
        (["train", "--split-times", "1", "2"], "split_times is not heeded by split leave-one-out, got 1 2; leave it"),
        (["compare", "--split-quantiles", "0.1", "0.2"], "split_quantiles is not heeded by split leave-one-out"),
        (["graph", "--split-times", "1", "2"], "split_times is not heeded by split leave-one-out"),
        (
            ["train", "--num-negatives", "9"],
            "num_negatives is not heeded by loss bce, got 9; leave it out",
        ),
        (["train", "--loss", "gbce", "--no-logq-correction"], "logq_correction is not heeded by loss gbce, got False"),
        (["graph", "--split", "global-time", "--part", "all"], "split is not heeded with part all"),
        (["graph", "--attributes", "x"], "attributes is not heeded by graph item-item, got x"),
        (
            ["train", "--vectors", "x"],
            "vectors is not heeded by graph item-item, got x; leave it out or give --graph knn",
        ),
        (
            ["train", "--max-neighbors", "3"],
            "max_neighbors is not heeded by graph item-item, got 3; leave it out or give",
        ),
        (["train", "--graph", "knn", "--knn-neighbors", "0"], "knn_neighbors must be at least 1, got 0"),
        (["train", "--graph", "knn"], "vectors: the graph knn needs --vectors"),
        (["train", "--cold-items", "1"], "cold_items must lie in [0, 1), got 1.0"),
        (["graph", "--part", "all", "--cold-items", "0.1"], "cold_items is not heeded with part all, got 0.1"),
        (["export", "--checkpoint", "x", "--embeddings", "items.csv"], "embeddings must end in .npz, got items.csv"),
        (
            ["graph", "--graph", "attributes", "--attributes", "x", "--max-hops", "3"],
            "max_hops is not heeded by graph attributes, got 3",
        ),
        (
            ["train", "--split", "global-time", "--split-times", "1", "2", "--split-quantiles", "0.1", "0.2"],
            "split_times and split_quantiles exclude each other",
        ),
        (["train", "--num-heads", "5"], "num_heads must divide embedding_dim, got 5 and 64"),
        (["train", "--ks", "0"], "ks must be one or more numbers of at least 1, got (0,)"),
        (["train", "--patience", "0"], "patience must be at least 1, got 0"),
        (["train", "--clip-norm", "-1"], "clip_norm must be larger than 0, got -1.0"),
        (["train", "--gbce-t", "2"], "gbce_t must lie in [0, 1], got 2.0"),
        (["train", "--num-negatives", "0"], "num_negatives must be at least 1, got 0"),
        (["train", "--warmup-epochs", "7", "--epochs", "7"], "warmup_epochs must be smaller than epochs, 7, got 7"),
        (["train", "--keep-epochs", "0", "8", "--epochs", "7"], "keep_epochs must be at most epochs, 7, got 8"),
        (["compare", "--seeds", "0"], "seeds must be at least 1, got 0"),
        (["fly"], "unknown command 'fly'; the commands are train, compare, "),
        (["--epochs", "3", "train"], "'--epochs' stands where a command must be: one of train, compare, "),
        ([], "a command must be given: one of train, compare, "),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert len(err) < 300


@pytest.fixture
def begun(monkeypatch):
    """The configurations that a command would go on to read data for."""
    made = []

    def note(config, *_, **__):
        made.append(config)
        raise ValueError("the data would be read")

    monkeypatch.setattr(commands, "_prepare", note)
    monkeypatch.setattr(commands, "load_and_describe", note)
    return made


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "train --optimizer adamw --beta 0.99",
            "beta is not heeded by optimizer adamw, got 0.99; leave it out or give",
        ),
        ("train --optimizer adam --beta=0.5", "or give --optimizer sevo-adamw"),
        ("train --optimizer adamw --graph shared-users", "graph is not heeded by optimizer adamw, got shared-users;"),
        ("train --optimizer adamw --diagnostics --smoothing exact", "smoothing is not heeded by optimizer adamw"),
        ("train --optimizer sgd --b2 0.9", "b2 is not heeded by optimizer sgd, got 0.9"),
        (
            "train --optimizer sevo-adam --no-moment-correction",
            "moment_correction is not heeded by optimizer sevo-adam",
        ),
        (
            "train --preset sasrec-beauty --optimizer adamw --num-layers 3",
            "num_layers is not heeded by optimizer adamw",
        ),
        ("train --smoothing exact --num_layers 2", "num_layers is not heeded by smoothing exact, got 2; leave it out"),
        ("train --smoothing iterative --no-rescale", "rescale is not heeded by smoothing iterative, got False"),
        (
            "train --graph shared-users --max-hops 1",
            "max_hops is not heeded by graph shared-users, got 1; leave it out",
        ),
        ("train --graph-weights 2", "graph_weights is not heeded by graph item-item, got 2.0"),
        ("train --graph-weighting frequency", "graph_weighting is not heeded by max_hops 1, got frequency; leave it"),
        ("train --knn-metric cosine", "knn_metric is not heeded by graph item-item, got cosine"),
        ("train --num-negatives 256", "num_negatives is not heeded by loss bce, got 256"),
        ("train --split-quantiles 0.8 0.9", "split_quantiles is not heeded by split leave-one-out, got 0.8 0.9"),
        ("train --cache-dir x", "cache_dir is not heeded without data, got x; leave it out or give --data FILE"),
        ("train --no-header", "header is not heeded without data, got False"),
        ("train --num-blocks 0 --num-heads 1", "num_heads is not heeded by num_blocks 0, got 1"),
        ("train --num-blocks 0 --no-attend-padding", "attend_padding is not heeded by num_blocks 0"),
        (
            "train --model bert4rec --mask-last-probability 1 --mask-probability 0.2",
            "mask_probability is not heeded by mask_last_probability 1.0, got 0.2",
        ),
        (
            "train --model stosa --loss ce --pvn-weight 0.1",
            "pvn_weight is not heeded by loss ce, got 0.1; leave it out",
        ),
        ("train --model stosa --num-blocks 0 --encode-mean", "encode_mean is not heeded by num_blocks 0"),
        (
            "train --model maerec --reconstruction-weight 0 --reject-edges",
            "reject_edges is not heeded by reconstruction_weight 0.0, got True",
        ),
        ("train --model maerec --mask-depth 1 --next-seeds ends", "next_seeds is not heeded by mask_depth 1, got ends"),
        ("train --model maerec --mask-steps 1 --low-reward 0", "low_reward is not heeded by mask_steps 1, got 0.0"),
        ("train --model item-knn --attributes x", "or give --similarity attributes"),
        ("train --model item-knn --attribute-column mood", "attribute_column is not heeded by similarity users"),
        (
            "compare --arms adamw sgd --beta 0.5",
            "beta is not heeded by optimizer adamw or sgd, got 0.5; leave it out or give --arms sevo-adamw",
        ),
        (
            "compare --arms adamw sevo-adamw --smoothing exact --num-layers 2",
            "num_layers is not heeded by smoothing exact",
        ),
        ("compare --model popularity --arms adamw sgd", "arms is not heeded by model popularity, got adamw sgd"),
        ("compare --arms adamw closed-form", "optimizer must be one of adamw, sevo-adamw"),
        ("tune --optimizer adamw --beta 0.5", "beta is not heeded by optimizer adamw, got 0.5; leave it out or give"),
        (
            "tune --search optimizer=adamw,sgd beta=0.1:0.5",
            "got 0.1:0.5; leave it out or give --search optimizer=adamw,sgd,sevo-adamw",
        ),
        ("tune --search optimizer=adamw,sgd --beta 0.5", "beta is not heeded by optimizer adamw or sgd, got 0.5"),
        (
            "tune --search rescale=true,false --smoothing exact",
            "rescale is not heeded by smoothing exact, got true,false",
        ),
        (
            "graph --graph shared-users --max-hops 1",
            "max_hops is not heeded by graph shared-users, got 1; leave it out",
        ),
        ("graph --graph-weighting frequency", "graph_weighting is not heeded by max_hops 1, got frequency"),
    ],
)
def test_given_options_that_are_not_heeded(begun, tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *command.split())
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not begun
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        "train --optimizer adamw --diagnostics --max-hops 2",
        "train --preset sasrec-beauty --optimizer adamw",
        "train --max-hops 2 --graph-weighting frequency",
        "train --model item-knn --similarity attributes --attributes x --attribute-column mood",
        "compare --arms adamw sevo-adamw --beta 0.5 --no-moment-correction",
        "compare --model popularity",
        "tune --optimizer adamw",
        "tune --search optimizer=adamw,sevo-adamw --beta 0.5",
        "tune --search max-hops=1:3 --graph-weighting frequency",
        "tune --search graph=item-item,shared-users --max-neighbors 50",
        "graph --max-hops 2 --graph-weighting frequency",
    ],
)
def test_given_options_that_are_heeded(begun, tmp_path, monkeypatch, capsys, command):
    if command.startswith("tune"):
        pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    assert "the data would be read" in run(capsys, *command.split())[2]


def test_what_of_a_preset_is_not_heeded_is_passed_over(begun, tmp_path, capsys):
    out = ["--output-dir", tmp_path / "out"]
    run(capsys, "train", "--preset", "stosa-ml-1m", "--loss", "ce", *out)
    path = tmp_path / "mine.yaml"
    path.write_text("loss: sampled-softmax\nnum_negatives: 9\ngraph: [knn]\nvectors: items.npz\nmax_hops: 2\n")
    for options in [[], ["--loss", "ce"], ["--loss", "ce", "--graph", "item-item"], ["--optimizer", "adamw"]]:
        run(capsys, "train", "--preset", path, *options, *out)
    assert [(x.loss, x.num_negatives, x.vectors and x.vectors.name) for x in begun[1:]] == [
        ("sampled-softmax", 9, "items.npz"),
        ("ce", 256, "items.npz"),
        ("ce", 256, None),
        ("sampled-softmax", 9, "items.npz"),
    ]
    assert {x.max_hops for x in begun[1:]} == {2}
    err = run(capsys, "train", "--preset", path, "--loss", "ce", "--num-negatives", "9", *out)[2]
    assert "num_negatives is not heeded by loss ce, got 9" in err
    path.write_text("loss: ce\nnum_negatives: 9\n")  # which nobody has chosen another loss for
    assert "num_negatives is not heeded by loss ce, got 9" in run(capsys, "train", "--preset", path, *out)[2]
    assert len(begun) == 5


@pytest.mark.parametrize(
    ("command", "kept"),
    [
        ("train --optimizer adamw --beta 0.5", "run.json"),
        ("compare --arms adamw sgd --beta 0.5", "adamw-0/run.json"),
        ("compare --model popularity --arms adamw", "closed-form-0/run.json"),
        ("tune --optimizer adamw --beta 0.5", "search.journal"),
    ],
)
def test_an_old_run_goes_on_with_what_it_was_given(begun, tmp_path, capsys, command, kept):
    if command.startswith("tune"):
        pytest.importorskip("optuna")
    (tmp_path / kept).parent.mkdir(exist_ok=True)
    resume = [*command.split(), "--output-dir", tmp_path, "--resume"]
    assert "is not heeded by" in run(capsys, *resume)[2]  # there is no run
    (tmp_path / kept).write_text("{}")
    assert "the data would be read" in run(capsys, *resume)[2]
    assert "is not heeded by" in run(capsys, *resume[:-1], "--overwrite")[2]
    assert len(begun) == 1


@pytest.mark.parametrize("model", MODELS)
def test_what_is_heeded_is_said_of_options(model):
    kind = model_class(model).config_class
    config = kind()
    for name, conditions in kind.heeded.items():
        assert hasattr(config, name)
        assert all(hasattr(config, condition.option) for condition in conditions)
        unheeded(config, name)  # which calls each


def test_an_output_folder_that_is_a_file(data, capsys):
    status, _, err = run(capsys, "train", "--data", data, "--output-dir", data)
    assert status == 2
    assert "output_dir" in err


def test_version(capsys):
    assert run(capsys, "--version")[:2] == (0, f"sevo-optax {sevo_optax.__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_in_an_encoding_that_lacks_characters(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "models", *arguments],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"usage: python -m models" in done.stdout


def test_nobody_reads_the_output():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "models", "--version"], stdout=writer, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_output_is_full(unbuffered):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "models", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output: No space left on device")
    assert done.stderr.count("\n") == 1


def test_progress_and_quiet(data, tmp_path, capsys):
    arguments = ["train", "--data", data, "--output-dir", tmp_path / "out", *SMALL]
    err = run(capsys, *arguments)[2]
    assert re.fullmatch(
        r"sevo-adamw: epoch 1 of 2, loss \d\.\d{4}, validation NDCG@10 \d\.\d{4}, \d+\.\d s with compiling\n"
        r"sevo-adamw: epoch 2 of 2, loss \d\.\d{4}, validation NDCG@10 \d\.\d{4}, \d+\.\d\d s an epoch, 0 s left\n",
        err,
    )
    status, printed, err = run(capsys, *arguments, "--overwrite", "--quiet")
    assert (status, err) == (0, "")
    assert "test: HR@1" in printed


def test_items_to_find_that_were_seen_before_are_told(data, tmp_path, capsys):
    lines = data.read_text().splitlines()
    data.write_text("\n".join([f"{lines[0]} {lines[0].split()[1]}", *lines[1:]]))
    arguments = ["train", "--model", "popularity", "--data", data, "--output-dir", tmp_path / "out", "--quiet"]
    status, printed, err = run(capsys, *arguments)
    assert (status, err.count("\n")) == (0, 1)
    assert err.startswith("warning: 1 of 20 test users had the item to find before; it is ranked while the rest")
    assert "history not ranked but for the item to find, which 1 of 20 users had before, ties" in printed
    for option in (["--duplicates", "first"], ["--no-exclude-seen"]):
        assert run(capsys, *arguments, *option, "--overwrite")[2] == ""


def test_a_comparison_tells_which_runs_of_an_earlier_one_stay(data, tmp_path, capsys):
    arguments = ["compare", "--data", data, "--output-dir", tmp_path / "out", *SMALL, "--overwrite", "--arms"]
    assert "of an earlier comparison" not in run(capsys, *arguments, "adamw", "sgd")[1]
    status, printed, _ = run(capsys, *arguments, "adamw")
    assert status == 0
    assert printed.splitlines()[-1].endswith("out has runs of an earlier comparison besides, sgd-0")


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
    assert all(name in printed for name in MODELS)
    kind = model_class(DEFAULT).config_class
    sources = "".join(inspect.getsource(inspect.getmodule(base)) for base in kind.__mro__[:-1])
    for field in dataclasses.fields(kind):
        name = field.name.replace("_", "-")
        assert re.search(rf"--{name}(?![\w-])", printed), name  # --b1 is no part of another option's name
        pattern = rf'    {field.name}: .*\n(    [^ ].*\n)*    """[A-Za-z]'
        assert re.search(pattern, sources), f"{field.name} is not explained"


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


def test_a_large_graph_is_not_drawn(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(capsys, "graph", "--data", data, "--output-dir", out)[0] == 0
    assert (out / "drawing.png").exists()
    status, printed, _ = run(capsys, "graph", "--output-dir", out)
    assert status == 0
    assert "no drawing: 1,001 nodes are more than 300" in printed
    assert not (out / "drawing.png").exists()


def test_a_graph_without_edges_is_not_drawn(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(capsys, "graph", "--data", data, "--output-dir", out)[0] == 0
    rows = [f"{user},{user}{time},{time}" for user in "abc" for time in (1, 2, 3)]  # one item each is trained on
    (tmp_path / "strangers.csv").write_text("\n".join(["user,item,time", *rows, ""]))
    status, printed, _ = run(capsys, "graph", "--data", tmp_path / "strangers.csv", "--output-dir", out)
    assert status == 0
    assert "no drawing: no two nodes are connected" in printed
    assert not (out / "drawing.png").exists()


@pytest.mark.parametrize("name", ["weights.npz", "degrees.png", "drawing.png"])
@pytest.mark.parametrize("content", [b"of mine", b"", b"PK\x05\x06 of mine", b"\x93NUMPY\x01\x00 of mine"])
def test_a_graph_does_not_replace_what_is_none(data, tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content)
    status, _, err = run(capsys, "graph", "--data", data, "--output-dir", tmp_path)
    assert status == 2
    assert f"output_dir: {tmp_path} holds {name}, " in err
    assert (tmp_path / name).read_bytes() == content
    assert {path.name for path in tmp_path.iterdir()} == {"data.txt", name}


def test_graph_of_attributes(data, tmp_path, capsys):
    table = tmp_path / "items.tsv"
    table.write_text("item_id\tgenres\n1\tDrama|War\n2\tWar\n3\t\n4\tComedy|Drama\n")
    out = tmp_path / "out"
    status, printed, _ = run(
        capsys, "graph", "--data", data, "--graph", "attributes", "--attributes", table, "--output-dir", out
    )
    assert status == 0
    assert "items that share genres" in printed
    weights = graph.load(out / "weights.npz").todense()
    assert weights[1, 2] == weights[1, 4] == 1
    assert weights.sum() == 4


def test_graph_of_vectors(data, tmp_path, capsys):
    vectors = tmp_path / "items.npz"
    np.savez(vectors, item_ids=np.array([1, 2, 4, 99]), vectors=np.array([[1.0, 0], [0, 1], [1, 0.1], [1, 1]]))
    out = tmp_path / "out"
    status, printed, _ = run(
        capsys,
        *("graph", "--data", data, "--graph", "knn", "--vectors", vectors, "--knn-neighbors", 1, "--output-dir", out),
    )
    assert status == 0
    assert "1 nearest items by cosine of items.npz" in printed
    assert f"17 of 20 items have no vector in {vectors}: they get no edges of graph knn" in printed
    weights = graph.load(out / "weights.npz").todense()
    assert {tuple(map(int, pair)) for pair in np.argwhere(weights)} == {(1, 4), (4, 1), (2, 4), (4, 2)}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("item_id\tgenres\n1\tDrama\n", ["--attribute-column", "mood"], "has no column 'mood'; it has item_id, genres"),
        ("item_id\tgenres\nx\tDrama\n", [], "is among the items of"),
        ("item_id\tgenres\n1\t\n", [], "no item of"),
        ("item_id\tgenres\n99\tDrama\n", [], "the first is 99, those look like"),
        ("", [], "items.tsv is empty"),
        (None, [], "does not exist"),
    ],
)
def test_bad_attributes(data, tmp_path, capsys, text, options, message):
    table = tmp_path / "items.tsv"
    if text is not None:
        table.write_text(text)
    status, _, err = run(
        capsys,
        *("graph", "--data", data, "--graph", "attributes", "--attributes", table, "--output-dir", tmp_path / "out"),
        *options,
    )
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_graph_without_entries_is_told(tmp_path, capsys):
    config = make_config(optimizer="sevo-adamw", graph_max_length=1)
    commands._prepare(config, tmp_path / "run", smooths=True)
    assert "warning: the graph has no entries: nothing is smoothed, only made smaller\n" in capsys.readouterr().err


def test_help_needs_no_jax():
    """A second, not ten: what a command imports, its --help does not."""
    code = "import sys; from models.__main__ import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += (
        "heavy = {'jax', 'flax', 'scipy', 'polars', 'matplotlib', 'orbax'} & set(sys.modules); assert not heavy, heavy"
    )
    for arguments in (["recommend", "--help"], ["evaluate", "--ks", "x"], ["--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_evaluate_reads_as_the_command_line_says(data, tmp_path, capsys):
    """Also where that is the usual way, and the run's was another."""
    table = tmp_path / "plain.csv"
    table.write_text("".join(f"{user},{(user + step) % 7}\n" for user in range(20) for step in range(5)))
    folder = tmp_path / "run"
    assert main(["train", "--data", str(table), "--no-header", "--epochs", "1", "--output-dir", str(folder)]) == 0
    assert main(["evaluate", "--checkpoint", str(folder)]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", str(folder), "--header"]) == 2
    assert "column" in capsys.readouterr().err
