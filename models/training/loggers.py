"""Where a run's numbers go besides its own folder: TensorBoard, Weights & Biases, MLflow.

Each of these is behind the same three calls, see :class:`RunLogger`. What stands in the folder does not depend on them:
a logger that fails while the run goes on is given up, and said to be.
"""

import contextlib
import importlib.util
import os
import re
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from tqdm import tqdm

from models.checks import first_line
from models.config import Logger
from models.files import read_json, write_json
from models.training.files import LOGGERS, TENSORBOARD
from models.training.progress import SILENCE

Status = Literal["finished", "interrupted", "failed"]

# What must be importable, and the extra that installs it.
MODULES: dict[Logger, tuple[str, str]] = {
    "tensorboard": ("tensorboardX", "models"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
}
# What runs belong to, unless the logger's own variables name something else.
PROJECT = "sevo-optax"


class RunLogger(Protocol):
    """What a run tells a logger.

    Attributes:
      id: what the logger calls the run, kept in the folder, so that a run that is resumed goes on as the same one
        there; None: it needs no name.
    """

    id: str | None

    def start(self, config: Mapping[str, Any]) -> None:
        """Begins, or goes on with, a run of these options.

        Args:
          config: the options as plain JSON.

        Raises:
          Exception: whatever the logger raises where it cannot be used.
        """

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs numbers by name.

        Args:
          step: the epoch, counted from 1.
          values: the numbers.
        """

    def close(self, status: Status) -> None:
        """Ends the run; what was logged is written when this returns."""


def check_installed(names: Sequence[Logger]) -> None:
    """Refuses loggers whose packages are not installed.

    Raises:
      ValueError: if one is not; it names the command that installs it.
    """
    for name in names:
        module, extra = MODULES[name]
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"logger {name} needs {module}; install it with pip install -e '.[{extra}]'")


class Loggers:
    """The loggers of one run, and the names that they know it by, in ``loggers.json``.

    Args:
      names: which.
      directory: the run's folder.
      epochs: how many epochs are there already.
    """

    def __init__(self, names: Sequence[Logger], directory: Path, *, epochs: int) -> None:
        self._path = directory / LOGGERS
        known = self._known() if names else {}
        self._ids = known
        self._all: dict[str, RunLogger] = {name: MAKE[name](directory, epochs, known.get(name)) for name in names}
        self._active: dict[str, RunLogger] = {}

    def start(self, config: Mapping[str, Any]) -> None:
        """Starts all of them.

        Raises:
          ValueError: if one cannot be used, in one line.
        """
        for name, logger in self._all.items():
            try:
                with _own_warnings():
                    logger.start(config)
                self._active[name] = logger
            except Exception as error:  # each has errors of its own
                self.close("failed")
                raise ValueError(
                    f"logger {name} cannot be used: {first_line(error)}; leave it out, or mend it"
                ) from error
        named = {name: logger.id for name, logger in self._active.items() if logger.id is not None}
        if named:
            # Names of loggers that are not asked for this time are kept for the next.
            write_json(self._path, self._ids | named)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs numbers by name, see :meth:`RunLogger.scalars`."""
        plain = {name.replace(" ", "_"): float(value) for name, value in values.items()}
        self._each(lambda logger: logger.scalars(step, plain))

    def close(self, status: Status) -> None:
        """Ends the run in all of them; once."""
        self._each(lambda logger: logger.close(status))
        self._active.clear()

    def _each(self, call: Callable[[RunLogger], None]) -> None:
        for name, logger in list(self._active.items()):
            try:
                with _own_warnings():
                    call(logger)
            except Exception as error:  # of a network or a disk: hours of training do not end for that
                del self._active[name]
                text = f"logger {name} is given up: {first_line(error)}; the run's folder has all that it does not"
                tqdm.write(text, file=sys.stderr)

    def _known(self) -> dict[str, str]:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return {name: value for name, value in read_json(self._path).items() if isinstance(value, str)}
        return {}


@contextlib.contextmanager
def _own_warnings() -> Iterator[None]:
    """Keeps what loggers' packages warn of from becoming errors: it is not about the run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _title(directory: Path) -> str:
    """What a run is called among others: the end of its folder's path."""
    return "/".join(directory.absolute().parts[-2:])


class _TensorBoard:
    """Event files in the run's folder, one each time that it starts; what was behind a checkpoint is replaced."""

    id = None

    def __init__(self, directory: Path, epochs: int, known: str | None) -> None:
        del known
        self._folder, self._epochs = directory / TENSORBOARD, epochs

    def start(self, config: Mapping[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        del config
        self._writer = SummaryWriter(str(self._folder), purge_step=self._epochs + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, status: Status) -> None:
        del status
        self._writer.close()


class _WeightsAndBiases:
    """A run of Weights & Biases; its own variables (``WANDB_MODE``, ``WANDB_PROJECT`` …) hold."""

    def __init__(self, directory: Path, epochs: int, known: str | None) -> None:
        del epochs
        self.id, self._directory = known, directory

    def start(self, config: Mapping[str, Any]) -> None:
        import wandb

        self.id = self.id or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=_title(self._directory),
            id=self.id,
            resume="allow",
            dir=self._directory,
            config=dict(config),
            reinit="create_new",  # seeds that share a program are runs side by side
            settings=wandb.Settings(console="off", silent=bool(os.environ.get(SILENCE))),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, status: Status) -> None:
        self._run.finish(exit_code={"finished": 0, "failed": 1, "interrupted": 255}[status])


class _MLflow:
    """A run of MLflow, wherever its own variables (``MLFLOW_TRACKING_URI`` …) or its default say."""

    def __init__(self, directory: Path, epochs: int, known: str | None) -> None:
        del epochs
        self.id, self._directory = known, directory

    def start(self, config: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        self._client = MlflowClient()
        if self.id is not None:
            try:
                self._client.update_run(self.id, status="RUNNING")
                return
            except MlflowException:  # of another store, or deleted there
                self.id = None
        run = self._client.create_run(self._experiment(), run_name=_title(self._directory))
        self.id = run.info.run_id
        params = [Param(name, str(value)[:500]) for name, value in config.items()]
        for i in range(0, len(params), 100):  # no more are taken at once
            self._client.log_batch(self.id, params=params[i : i + 100])

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        return os.environ.get("MLFLOW_EXPERIMENT_ID") or (
            self._client.create_experiment(name) if found is None else found.experiment_id
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        # A name may hold no other signs, and of diagnostics holds a + for tables that are smoothed together.
        metrics = [
            Metric(re.sub(r"[^\w.\- :/]", "_", name.replace("@", "_at_")), value, now, step)
            for name, value in values.items()
        ]
        self._client.log_batch(self.id, metrics=metrics)

    def close(self, status: Status) -> None:
        names = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
        self._client.set_terminated(self.id, names[status])


MAKE: dict[Logger, Callable[[Path, int, str | None], RunLogger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "mlflow": _MLflow,
}
