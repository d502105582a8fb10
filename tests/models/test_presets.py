import csv
from pathlib import Path

import pytest

from models import presets
from models.__main__ import main
from models.architectures.registry import config_from_dict, make_config
from models.training import compare, loop

PUBLISHED = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "sevo_hyperparameters.csv"
NAMES = {
    "maxlen": "max_length",
    "maxlen4graph": "graph_max_length",
    "num_heads": "num_heads",
    "num_blocks": "num_blocks",
    "hidden_size": "embedding_dim",
    "dropout_rate": "dropout_rate",
    "mask_prob": "mask_probability",
    "epochs": "epochs",
    "batch_size": "batch_size",
    "beta1": "b1",
    "beta2": "b2",
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "beta3": "beta",
    "L": "num_layers",
    "H": "max_hops",
}


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_is_a_run(name):
    config = config_from_dict(presets.load_preset(name))
    assert name.startswith(config.model)


@pytest.mark.parametrize("dataset", ["beauty", "toys", "tools", "ml-1m"])
@pytest.mark.parametrize("model", ["SASRec", "BERT4Rec"])
def test_presets_are_the_published_settings(model, dataset):
    if not PUBLISHED.exists():
        pytest.skip(f"the published settings are not beside this clone: {PUBLISHED.name}")
    with PUBLISHED.open() as file:
        (row,) = [row for row in csv.DictReader(file) if (row["model"], row["dataset"]) == (model, dataset)]
    config = config_from_dict(presets.load_preset(f"{model.lower()}-{dataset}"))
    for theirs, ours in NAMES.items():
        if row[theirs]:
            assert getattr(config, ours) == float(row[theirs]), ours
    assert config.loss == {"SASRec": "bce", "BERT4Rec": "ce"}[model]


def test_the_defaults_are_the_presets_for_beauty():
    for model in ["sasrec", "bert4rec"]:
        assert config_from_dict(presets.load_preset(f"{model}-beauty")) == make_config(model)


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("learning_rate: 1e-3\ndata: beauty.txt\nks: [1, 20]\nsplit_quantiles: [0.7, 1]\npatience: null\n")
    expected = {"learning_rate": 0.001, "data": Path("beauty.txt"), "ks": (1, 20)}
    assert presets.load_preset(path) == expected | {"split_quantiles": (0.7, 1.0), "patience": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "bad.yaml: unknown field 'epoch'; did you mean 'epochs'?"),
        ("zzz: 3", "unknown field 'zzz'; the fields are the options of"),
        ("1: 3", "unknown field '1'"),
        ("epochs: many", "epochs should be a valid integer, got 'many'"),
        ("epochs: 2.5", "epochs should be a valid integer, got 2.5"),
        ("epochs: true", "epochs should be a valid integer, got True"),
        ("epochs: {a: 1}", "epochs should be a valid integer, got {'a': 1}"),
        ("epochs: !!int x", "is not YAML: invalid literal for int() with base 10: 'x'"),
        ("learning_rate: fast", "learning_rate should be a valid number, got 'fast'"),
        ("learning_rate: .inf", "learning_rate should be a finite number, got inf"),
        ("b1: .nan", "b1 should be a finite number, got nan"),
        ("model: gru", "bad.yaml: model must be one of sasrec, bert4rec"),
        ("optimizer: lion", "optimizer should be 'adamw', 'sevo-adamw', 'sevo-gradient'"),
        ("header: 1", "header should be a valid boolean, got 1"),
        ("data: 3", "data should be a valid string, got 3"),
        ("ks: 10", "ks should be a list, got 10"),
        ("ks: [1, x]", "ks 2 should be a valid integer, got 'x'"),
        ("split_quantiles: [0.5]", "split_quantiles 2 is missing"),
        (
            "split_quantiles: [0.5, 0.6, 0.7]",
            "split_quantiles: tuple should have at most 2 items, not 3, got [0.5, 0.6",
        ),
        ("seed: 010", "seed should be a valid integer, got '010'"),
        ("epochs: 3\nepochs: 4", "line 2 is not YAML: 'epochs' stands there twice"),
        ("split_times: !!timestamp 2020-13-01", "is not YAML: month must be in 1..12"),
        ('user_column: "a\\0b"', "a text must not hold a NUL character, got 'a\\x00b'"),
        ('user_column: "\\ud800"', "a text must be text in UTF-8, got '\\ud800'"),
        ("user_column: \x01", "is not YAML: special characters are not allowed"),
        ("ks: " + "[" * 2000 + "]" * 2000, "is nested too deeply"),
        ("ks: &a [*a]", "holds more than 1,000,000 values, aliases counted"),
        ("ks: !!python/object:os.system {}", "could not determine a constructor for the tag"),
        ("- 1\n- 2", "must hold lines 'name: value', got list"),
        ("", "must hold lines 'name: value', got NoneType"),
        ("epochs: 3\nmodel: [sasrec", "line 3 is not YAML"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text + "\n")
    with pytest.raises(ValueError) as caught:
        presets.load_preset(path)
    assert message in str(caught.value)
    assert "bad.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_dates_and_clocks_stay_text(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("split: global-time\nsplit_times: [2020-12-01, 10:30]\nexclude_seen: no\n")
    expected = {"split": "global-time", "split_times": ("2020-12-01", "10:30"), "exclude_seen": False}
    assert presets.load_preset(path) == expected


def test_month_13_is_refused_by_its_field(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("split: global-time\nsplit_times: [2020-13-01, 2021-01-01]\n")
    (tmp_path / "data.csv").write_text("user,item,time\n1,1,1\n1,2,2\n1,3,3\n")
    options = ["--data", str(tmp_path / "data.csv"), "--output-dir", str(tmp_path / "out")]
    assert main(["train", "--preset", str(path), *options]) == 2
    assert "split_times must be a number or a date such as 2001-12-31, got '2020-13-01'" in capsys.readouterr().err
    path.write_text("split: global-time\nsplit_times: ['2020_12', 2021-01-01]\n")  # to Python a number
    assert main(["train", "--preset", str(path), *options]) == 2
    assert "split_times must be a number or a date such as 2001-12-31, got '2020_12'" in capsys.readouterr().err


def test_an_optimizer_may_stand_in_a_preset(tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("optimizer: sevo-gradient\nepochs: 3\n")
    trained = []
    monkeypatch.setattr(loop, "train", lambda prepared, config, optimizer, *_, **__: trained.append(optimizer) or 1 / 0)
    for given in [[], ["--optimizer", "adamw"]]:
        with pytest.raises(ZeroDivisionError):
            main(["train", "--preset", str(path), "--output-dir", str(tmp_path / "out"), *given])
    assert trained == ["sevo-gradient", "adamw"]
    monkeypatch.setattr(compare, "compare", lambda *_, **__: 1 / 0)
    capsys.readouterr()
    for arms, told in (([], False), (["--arms", "adamw", "sgd"], True)):
        with pytest.raises(ZeroDivisionError):
            main(["compare", "--preset", str(path), "--output-dir", str(tmp_path / "out"), *arms])
        note = "note: the preset's settings are those of sevo-gradient, which is not among the arms; adamw, sgd have"
        assert (note in capsys.readouterr().err) is told


def test_a_preset_that_is_not_there_is_told_with_the_one_that_is_like_it():
    with pytest.raises(ValueError, match=r"'sasrc-beauty' does not exist; did you mean sasrec-beauty,.* or .*\?$"):
        presets.load_preset("sasrc-beauty")


def test_bytes_are_no_yaml(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not YAML"):
        presets.load_preset(path)


@pytest.mark.parametrize("name", ["x", "no/such.yaml"])
def test_an_unknown_preset_lists_those_there_are(name):
    with pytest.raises(
        ValueError, match=rf"preset: '{name}' does not exist; give one of bert4rec-adam-beauty, .*sasrec-toys"
    ):
        presets.load_preset(name)
