"""Loggers behind their one seam: real ones without a network, and ones that fail."""

import importlib.util
import json
import warnings
from typing import ClassVar

import pytest

from models.__main__ import main
from models.architectures.registry import config_from_dict, make_config
from models.data import drifting_interests
from models.training import loggers, loop
from models.training.checkpoints import RunInfo
from models.training.training_data import make_training_data
from tests.models.saved_runs import ToyProgram

CONFIG = make_config(max_length=8, epochs=4, batch_size=20, eval_every=2, learning_rate=1e-2, seed=1)


@pytest.fixture(scope="module")
def prepared():
    return make_training_data(drifting_interests(num_users=60, num_items=40, num_groups=5, seed=3), CONFIG)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(loop, "Program", ToyProgram)


def train(prepared, folder, *names, epochs=4, **options):
    config = config_from_dict(CONFIG.differing() | {"logger": names, "epochs": epochs})
    return loop.train(prepared, config, "adamw", folder, **options)


class Fake:
    """Writes down what it is told; some calls may fail."""

    calls: ClassVar = []
    failing = None

    def __init__(self, directory, epochs, known):
        self.id, self.epochs = known or "first", epochs

    def _call(self, *call):
        warnings.warn("of the package's own", UserWarning, stacklevel=1)
        Fake.calls.append(call)
        if Fake.failing == call[0]:
            raise ConnectionError("\x1b[31mno route.\x1b[0m\nto host")

    def start(self, config):
        self._call("start", self.id, self.epochs, config["learning_rate"])

    def scalars(self, step, values):
        self._call("scalars", step, values)

    def close(self, status):
        self._call("close", status)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(loggers.MAKE, "wandb", Fake)
    monkeypatch.setattr(Fake, "calls", [])
    monkeypatch.setattr(Fake, "failing", None)
    return Fake


def interrupt_at(monkeypatch, number):
    epoch = ToyProgram.epoch

    def interrupted(self, now):
        if now == number:
            raise KeyboardInterrupt
        return epoch(self, now)

    monkeypatch.setattr(ToyProgram, "epoch", interrupted)


def test_what_a_logger_is_told(prepared, tmp_path, fake):
    result = train(prepared, tmp_path, "wandb")
    start, *scalars, close = fake.calls
    assert start == ("start", "first", 0, 0.01)
    assert close == ("close", "finished")
    assert [step for _, step, _ in scalars] == [1, 2, 3, 4, 4]
    assert scalars[0][2]["loss"] == pytest.approx(result.losses[0])
    assert {"tokens_per_second", "validation/NDCG@10"} <= set(scalars[1][2])
    assert scalars[-1][2] == pytest.approx({f"test/{name}": value for name, value in result.test.items()})


def test_a_resumed_run_is_the_same_one(prepared, tmp_path, fake, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(prepared, tmp_path, "wandb")
    assert fake.calls[-1] == ("close", "interrupted")
    (tmp_path / "loggers.json").write_text(json.dumps({"wandb": "kept", "mlflow": "as well"}))
    fake.calls.clear()
    train(prepared, tmp_path, "wandb", resume=True)
    assert fake.calls[0] == ("start", "kept", 2, 0.01)
    assert json.loads((tmp_path / "loggers.json").read_text()) == {"wandb": "kept", "mlflow": "as well"}
    train(prepared, tmp_path, "wandb", overwrite=True)
    assert fake.calls[-7] == ("start", "first", 0, 0.01)


def test_a_failure_later_ends_the_logger_alone(prepared, tmp_path, fake, capsys):
    plain = train(prepared, tmp_path / "plain")
    fake.failing = "scalars"
    assert train(prepared, tmp_path / "run", "wandb", "tensorboard").losses == plain.losses
    assert [call[0] for call in fake.calls] == ["start", "scalars"]
    assert capsys.readouterr().err.count("logger wandb is given up: no route; the run's folder has all") == 1
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    fake.failing = "close"
    train(prepared, tmp_path / "other", "wandb")


def test_a_failure_at_the_start_is_refused(prepared, tmp_path, fake, capsys):
    fake.failing = "start"
    with pytest.raises(ValueError, match=r"^logger wandb cannot be used: no route; leave it out, or mend it$"):
        train(prepared, tmp_path, "tensorboard", "wandb")
    with pytest.raises(ValueError, match=r"^logger wandb cannot be used: no route"):
        train(prepared, tmp_path, "wandb", "tensorboard", resume=True)
    assert "given up" not in capsys.readouterr().err  # tensorboard was not started
    fake.failing = None
    assert len(train(prepared, tmp_path, "wandb", resume=True).losses) == 4


def test_a_diverged_run_has_failed(prepared, tmp_path, fake, monkeypatch):
    monkeypatch.setattr(loop, "_loss_failure", lambda losses, epoch: "too much" if epoch == 3 else None)
    with pytest.raises(loop.DivergedError):
        train(prepared, tmp_path, "wandb")
    assert fake.calls[-1] == ("close", "failed")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_refused_before_anything_is_read(name, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module, *rest: None if module == name else find(module))
    assert main(["train", "--logger", "tensorboard", name, "--output-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error == f"error: logger {name} needs {name}; install it with pip install -e '.[{name}]'\n"
    assert not (tmp_path / "out").exists()


def test_each_once():
    with pytest.raises(ValueError, match="logger must name each once, got wandb wandb"):
        make_config(logger=("wandb", "wandb"))


def test_runs_of_earlier_versions_are_read(prepared, tmp_path):
    train(prepared, tmp_path)
    values = json.loads((tmp_path / "run.json").read_text())
    del values["config"]["logger"]
    (tmp_path / "run.json").write_text(json.dumps(values | {"config": values["config"] | {"tensorboard": True}}))
    assert RunInfo.read(tmp_path).config.logger == ()
    assert len(train(prepared, tmp_path, epochs=6, resume=True).losses) == 6


class TestWithoutNetwork:
    @pytest.fixture(autouse=True)
    def _offline(self, tmp_path, monkeypatch):
        for name, value in {
            "WANDB_MODE": "offline",
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_SILENT": "true",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            "MLFLOW_ALLOW_FILE_STORE": "true",  # making a database takes seconds
            "MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(),
        }.items():
            monkeypatch.setenv(name, value)
        for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
            monkeypatch.delenv(name, raising=False)

    def interrupted(self, prepared, folder, name, monkeypatch):
        """Trains until the fourth epoch; returns what the logger calls the run."""
        pytest.importorskip(name)
        with monkeypatch.context() as patch:
            interrupt_at(patch, 4)
            with pytest.raises(KeyboardInterrupt):
                train(prepared, folder, name)
        return self.known(folder, name)

    def known(self, folder, name):
        return json.loads((folder / "loggers.json").read_text())[name]

    def test_wandb(self, prepared, tmp_path, monkeypatch):
        known = self.interrupted(prepared, tmp_path / "run", "wandb", monkeypatch)
        train(prepared, tmp_path / "run", "wandb", resume=True)
        import wandb

        wandb.teardown()
        folders = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
        assert folders
        assert all((folder / f"run-{known}.wandb").stat().st_size for folder in folders)
        assert self.known(tmp_path / "run", "wandb") == known

    def test_mlflow(self, prepared, tmp_path, monkeypatch):
        known = self.interrupted(prepared, tmp_path / "run", "mlflow", monkeypatch)
        from mlflow import MlflowClient

        client = MlflowClient()
        assert client.get_run(known).info.status == "KILLED"
        result = train(prepared, tmp_path / "run", "mlflow", resume=True)
        run = client.get_run(known)
        assert run.info.status == "FINISHED"
        assert run.info.run_name == f"{tmp_path.name}/run"
        assert run.data.params["learning_rate"] == "0.01"
        assert run.data.metrics["test/NDCG_at_10"] == pytest.approx(result.test["NDCG@10"])
        losses = {metric.step: metric.value for metric in client.get_metric_history(known, "loss")}
        assert losses == pytest.approx(dict(enumerate(result.losses, 1)))
        assert len(client.search_runs([run.info.experiment_id])) == 1
        (tmp_path / "run" / "loggers.json").write_text('{"mlflow": "of another store"}')
        train(prepared, tmp_path / "run", "mlflow", epochs=6, resume=True)
        assert client.get_run(self.known(tmp_path / "run", "mlflow")).data.metrics["loss"] > 0
        logger = loggers.MAKE["mlflow"](tmp_path / "run", 1, known)
        logger.start({})
        logger.scalars(9, {"users+items/raw update": 0.5})  # a name of diagnostics, with a sign that MLflow refuses
        assert client.get_run(known).data.metrics["users_items/raw update"] == 0.5
