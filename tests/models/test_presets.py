import csv
from pathlib import Path

import pytest

from models import presets
from models.config import TrainConfig

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
    config = TrainConfig.from_dict(presets.load_preset(name)).resolved()
    assert name.startswith(config.model)


@pytest.mark.parametrize("dataset", ["beauty", "toys", "tools", "ml-1m"])
@pytest.mark.parametrize("model", ["SASRec", "BERT4Rec"])
def test_presets_are_the_published_settings(model, dataset):
    if not PUBLISHED.exists():
        pytest.skip(f"the published settings are not beside this clone: {PUBLISHED.name}")
    with PUBLISHED.open() as file:
        (row,) = [row for row in csv.DictReader(file) if (row["model"], row["dataset"]) == (model, dataset)]
    config = TrainConfig.from_dict(presets.load_preset(f"{model.lower()}-{dataset}")).resolved()
    for theirs, ours in NAMES.items():
        if row[theirs]:
            assert getattr(config, ours) == float(row[theirs]), ours
    assert config.loss == {"SASRec": "bce", "BERT4Rec": "ce"}[model]


def test_the_defaults_are_the_presets_for_beauty():
    for model in ["sasrec", "bert4rec"]:
        preset = TrainConfig.from_dict(presets.load_preset(f"{model}-beauty")).resolved()
        assert preset == TrainConfig(model=model).resolved()


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("learning_rate: 1e-3\ndata: beauty.txt\nks: [1, 20]\nsplit_quantiles: [0.7, 1]\npatience: null\n")
    expected = {"learning_rate": 0.001, "data": Path("beauty.txt"), "ks": (1, 20)}
    assert presets.load_preset(path) == expected | {"split_quantiles": (0.7, 1.0), "patience": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "unknown field 'epoch'; did you mean 'epochs'"),
        ("zzz: 3", "unknown field 'zzz'; the fields are the options of"),
        ("epochs: many", "epochs must be a whole number or null, got 'many'"),
        ("epochs: 2.5", "epochs must be a whole number or null, got 2.5"),
        ("epochs: true", "epochs must be a whole number or null, got True"),
        ("learning_rate: fast", "learning_rate must be a number or null, got 'fast'"),
        ("model: gru", "model must be one of sasrec, bert4rec, got 'gru'"),
        ("header: 1", "header must be true or false, got 1"),
        ("data: 3", "data must be a path or null, got 3"),
        ("ks: 10", "ks must be a list, each a whole number, got 10"),
        ("split_quantiles: [0.5]", "split_quantiles must be a list, each a number, got [0.5]"),
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


def test_bytes_are_no_yaml(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not YAML"):
        presets.load_preset(path)


@pytest.mark.parametrize("name", ["sasrec-bauty", "no/such.yaml"])
def test_an_unknown_preset_lists_those_there_are(name):
    with pytest.raises(
        ValueError, match=rf"preset: '{name}' does not exist; give one of bert4rec-beauty, .*sasrec-toys"
    ):
        presets.load_preset(name)
