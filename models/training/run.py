"""One seed's run: its history, its best epoch, its folder."""

import contextlib
import dataclasses
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from models.architectures.registry import model_class
from models.config import SELECTION, Optimizer, TrainConfig
from models.training import beside
from models.training.files import curve, write_json, write_text
from models.training.prepare import Prepared
from models.training.program import Program


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of one run.

    Attributes:
      optimizer: the optimizer's name.
      config: the whole configuration.
      protocol: how the metrics came about.
      best_epoch: the epoch with the best validation NDCG@10.
      validation: metrics of the validation items at that epoch.
      test: metrics of the test items at that epoch.
      losses: mean training loss of each epoch.
      epoch_seconds: median seconds of an epoch, compilation and evaluation not counted. Where several seeds share one
        program, of an epoch of all of them.
      total_seconds: seconds of the whole run, those before an interruption included.
      peak_memory: the most memory the process (on a GPU or TPU: the device) has used so far, in bytes.
      device: what it ran on.
    """

    optimizer: str
    config: dict[str, Any]
    protocol: str
    best_epoch: int
    validation: dict[str, float]
    test: dict[str, float]
    losses: list[float]
    epoch_seconds: float
    total_seconds: float
    peak_memory: int
    device: str


class Run:
    """What is known of one seed's run, and its folder."""

    def __init__(
        self, prepared: Prepared, config: TrainConfig, optimizer: Optimizer, directory: Path | None, digest: str
    ) -> None:
        self.prepared, self.config, self.optimizer, self.directory = prepared, config, optimizer, directory
        self.digest = digest
        self.history: list[dict[str, Any]] = []
        self.best: tuple[float, int, Any] | None = None
        self.stale = 0
        self.seconds = 0.0
        self.finished: Result | None = None
        self.checkpoints: Any = None
        self.info: Any = None
        self.continues = False
        self.saved = 0
        self._scalars: Any = None

    @property
    def stopped(self) -> bool:
        """Whether early stopping has ended this run."""
        return self.config.patience is not None and self.stale >= self.config.patience

    def open(self, *, resume: bool, overwrite: bool) -> None:
        """Looks at the folder, and reads the result of a run that is finished. Nothing is written yet.

        Raises:
          CheckpointError: if the folder holds a run already, and it is not to be resumed or overwritten, or not the
            same run.
        """
        if self.directory is None:
            return
        from models.training.checkpoints import CheckpointError, Checkpoints, RunInfo  # orbax takes a second to import

        self.checkpoints = Checkpoints(self.directory)
        self.info = RunInfo(
            self.optimizer,
            self.config,
            self.prepared.interactions.num_items,
            self.digest,
            self.prepared.split.train.num_users,
        )
        if overwrite or not (self.directory / "run.json").exists():
            return
        if not resume:
            raise CheckpointError(
                f"{self.directory} holds a run already; go on with --resume, replace it with --overwrite, "
                "or give another --output-dir"
            )
        found = RunInfo.read(self.directory)
        self.info.check_same(found, self.directory)
        self.continues = True
        finished = self.directory / "result.json"
        if finished.exists() and all(
            getattr(found.config, x) == getattr(self.config, x) for x in ("epochs", "patience")
        ):
            self.finished = Result(**json.loads(finished.read_text(encoding="utf-8")))

    def restore(self, checkpoint: Any, params: Any, opt_state: Any) -> tuple[Any, Any]:
        """Goes back to a checkpoint; returns parameters and optimizer state like those given."""
        from models.training.checkpoints import CheckpointError, unflatten

        epoch, progress = checkpoint.epoch, checkpoint.progress
        self.best = (progress["best"], progress["best_epoch"], unflatten(checkpoint.leaves, params, "best"))
        self.stale, self.seconds, self.saved = progress["stale"], progress["seconds"], epoch
        with contextlib.suppress(FileNotFoundError):
            lines = (self.directory / "history.jsonl").read_text(encoding="utf-8").splitlines()
            self.history = [json.loads(line) for line in lines[:epoch]]
        if len(self.history) < epoch:
            raise CheckpointError(
                f"{self.directory / 'history.jsonl'} lacks epochs of the checkpoint's {epoch}; train with --overwrite"
            )
        return unflatten(checkpoint.leaves, params, "last"), unflatten(checkpoint.leaves, opt_state, "opt_state")

    def start(self) -> None:
        """Takes possession of the folder: removes what is there, unless the run continues, and writes what it is."""
        if self.directory is None:
            return
        for name in ("result.json", "curve.png", "per_user.csv"):
            (self.directory / name).unlink(missing_ok=True)
        self.checkpoints.remove_after(self.saved)
        if not self.continues:
            shutil.rmtree(self.directory / "tensorboard", ignore_errors=True)
        self.info.write(self.directory, self.prepared.interactions.item_ids)
        beside.write_context(self.directory, self.prepared.context)
        if model_class(self.config.model).query == "user":
            beside.write_users(self.directory, self.prepared.interactions, self.prepared.split.train.user_ids)
        write_text(self.directory / "history.jsonl", "".join(json.dumps(record) + "\n" for record in self.history))
        if self.config.tensorboard:
            from tensorboardX import SummaryWriter

            self._scalars = SummaryWriter(str(self.directory / "tensorboard"), purge_step=len(self.history) + 1)

    def record(self, record: dict[str, Any]) -> None:
        """Adds an epoch to the history."""
        self.history.append(record)
        if self.directory is not None:
            with (self.directory / "history.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if self._scalars is not None:
            scalars = {"loss": record["loss"], "tokens per second": record["tokens_per_second"]}
            scalars |= {f"validation/{name}": value for name, value in record.get("validation", {}).items()}
            scalars |= record.get("diagnostics", {})
            for name, value in scalars.items():
                self._scalars.add_scalar(name.replace(" ", "_"), value, record["epoch"])

    def consider(self, score: float, params: Callable[[], Any]) -> None:
        """Keeps the parameters if the score is the best so far."""
        if self.best is None or score > self.best[0]:
            self.best, self.stale = (score, len(self.history) + 1, params()), 0
        else:
            self.stale += 1

    def save(self, epoch: int, params: Any, opt_state: Any) -> None:
        """Writes a checkpoint, unless it is there already."""
        if self.checkpoints is None or self.saved == epoch:
            return
        from models.training.checkpoints import Checkpoint, flatten

        best = (float("-inf"), 0, params) if self.best is None else self.best
        leaves = flatten(params, "last") | flatten(best[2], "best") | flatten(opt_state, "opt_state")
        progress = {"best": best[0], "best_epoch": best[1], "stale": self.stale, "seconds": self.seconds}
        if self._scalars is not None:
            self._scalars.flush()
        self.checkpoints.save(Checkpoint(epoch, leaves, progress))
        self.saved = epoch

    def finish(self, program: Program) -> Result:
        """Tests the best parameters and writes what there is to write."""
        begin = time.perf_counter()
        score, best_epoch, params = self.best
        del score
        ranks, test = program.test(params)
        seconds = [record["seconds"] for record in self.history]
        result = Result(
            optimizer=self.optimizer,
            config=self.config.to_dict(),
            protocol=protocol(self.prepared),
            best_epoch=best_epoch,
            validation=self.history[best_epoch - 1]["validation"],
            test=test,
            losses=[record["loss"] for record in self.history],
            epoch_seconds=float(np.median(seconds[1:] or seconds)),
            total_seconds=self.seconds + time.perf_counter() - begin,
            peak_memory=peak_memory(),
            device=str(jax.devices()[0].device_kind),
        )
        if self._scalars is not None:
            self._scalars.close()
        if self.directory is not None:
            from models import plots  # matplotlib is slow to import and not needed to train

            if self.config.per_user:
                self._write_ranks(ranks)
            plots.validation_curves({self.optimizer: [curve(self.history)]}, self.directory / "curve.png")
            write_json(self.directory / "result.json", dataclasses.asdict(result))
        return result

    def _write_ranks(self, ranks: np.ndarray) -> None:
        import polars

        split = self.prepared.split
        users, items = split.test_history.user_ids, self.prepared.interactions.item_ids[split.test]
        frame = polars.DataFrame({"user": users, "item": items, "rank": ranks + 1})
        write_text(self.directory / "per_user.csv", frame.write_csv())


def protocol(prepared: Prepared) -> str:
    """How a result on these data comes about, in one line."""
    return (
        f"{prepared.split.protocol}, {prepared.test.protocol}; tested at the epoch with the best validation {SELECTION}"
    )


def peak_memory() -> int:
    """The most bytes used so far: on the device, if it says so, else by the process."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return statistics.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
