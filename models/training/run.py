"""One seed's run: its history, its best epoch, its folder."""

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np

from models.architectures.registry import model_class
from models.config import GRAPH_FILES, SELECTION, Optimizer, TrainConfig
from models.evaluation.groups import Groups, summarize_groups
from models.files import (
    LOCK,
    append_text,
    check_format,
    claim,
    read_json,
    remove_partial,
    write_bytes,
    write_json,
    write_text,
)
from models.processes import check_same, is_first, num_processes, on_first, program_digest, wait_for_all
from models.training import beside
from models.training.files import EMBEDDINGS, LOGGERS, TENSORBOARD, curve, read_history
from models.training.interrupts import StoppedError
from models.training.loggers import Loggers, Status
from models.training.program import Program
from models.training.training_data import TrainingData

if TYPE_CHECKING:
    from models.training.checkpoints import Checkpoint, Checkpoints, RunInfo

try:
    import resource
except ImportError:  # there is none on Windows
    resource = None

# Of result.json. Results that say nothing are of the first format, of seeds that were trained alone.
FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of one run.

    Attributes:
      optimizer: the optimizer's name.
      config: the whole configuration.
      protocol: how the metrics came about.
      best_epoch: the epoch with the best validation NDCG@10.
      validation: metrics of the validation items at that epoch.
      test: metrics of the test items at that epoch; empty: the run was not tested.
      losses: mean training loss of each epoch.
      epoch_seconds: median seconds of an epoch, compilation and evaluation not counted. Where several seeds share one
        program, of an epoch of all of them.
      total_seconds: seconds of the whole run, those before an interruption included.
      peak_memory: the most memory the process (on a GPU or TPU: the device) has used so far, in bytes; 0: not known.
      device: what it ran on.
      seeds_together: how many seeds shared the program, this one included.
      epoch_steps: how many steps an epoch has; None: not known, in results of the first format.
      groups: metrics of the test items by groups of users, see :func:`~models.evaluation.groups.summarize_groups`;
        empty in results of the first format, and where the run was not tested.
      format: of ``result.json``. A later one may have more fields.
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
    seeds_together: int = 1
    epoch_steps: int | None = None
    groups: Groups = dataclasses.field(default_factory=dict)
    format: int = FORMAT

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads a ``result.json``.

        Raises:
          FileNotFoundError: if there is no such file.
          ValueError: if it is damaged, or was written by a later version; it names the file and the way out.
        """
        try:
            values = read_json(path)
            later = check_format(values, FORMAT)
            if not later:
                return cls(**values)
        except (ValueError, TypeError) as error:
            reason = str(error).removeprefix("Result.__init__() ")
            raise ValueError(
                f"{path} is damaged ({reason}); delete it, and --resume makes it again from the newest checkpoint"
            ) from None
        raise ValueError(f"{path} {later}, or delete it")


class Run:
    """What is known of one seed's run, and its folder. It is a context that holds the folder.

    Args:
      prepared: the data.
      config: the run, resolved.
      optimizer: which optimizer.
      directory: the folder; None: nothing is read or written.
      tests: whether the run is tested at its end. If not, the folder holds a run that is still to be finished.
    """

    def __init__(
        self,
        prepared: TrainingData,
        config: TrainConfig,
        optimizer: Optimizer,
        directory: Path | None,
        *,
        tests: bool = True,
    ) -> None:
        self.prepared, self.config, self.optimizer, self.directory = prepared, config, optimizer, directory
        self.tests = tests
        self.history: list[dict[str, Any]] = []
        self.best: tuple[float, int, Any] | None = None
        self.stale = 0
        self.seconds = 0.0
        self.finished: Result | None = None
        self.diverged: str | None = None
        self.done = 0
        """How many epochs the checkpoint that it goes on from has; 0: it starts anew."""
        self._checkpoint: Checkpoint | None = None
        self.checkpoints: Checkpoints | None = None
        self.info: RunInfo | None = None
        self.continues = False
        self.saved = 0
        self.split_shapes: tuple[Any, Any] | None = None
        self._loggers: Loggers | None = None
        self._claims = contextlib.ExitStack()
        # Of several processes, the first one writes; checkpoints alone are written by all of them.
        self._writes = directory is not None and is_first()

    @property
    def stopped(self) -> bool:
        """Whether early stopping has ended this run."""
        return self.config.patience is not None and self.stale >= self.config.patience

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        interrupted = kind is not None and issubclass(kind, (KeyboardInterrupt, StoppedError))
        self._close_loggers("interrupted" if interrupted else "failed")  # those of a finished run are closed
        self._claims.close()

    def open(self, *, resume: bool, overwrite: bool) -> None:
        """Looks at the folder, keeps others out of it, and reads what is there. Nothing of a run is written yet.

        Raises:
          CheckpointError: if the folder holds something else than a run, or a run already that is not to be resumed or
            overwritten, or not the same run, or one that another process trains.
          ValueError: if the result of a finished run cannot be read.
        """
        if self.directory is None:
            return
        from models.training.checkpoints import Checkpoints

        self._holds_run(resume=resume, overwrite=overwrite)
        on_first(self._claim)
        self.info = self._info()
        check_same("data", self.info.data)
        check_same("options", _options_digest(self.config, self.optimizer))
        check_same("versions of the program", program_digest() if num_processes() > 1 else "")
        found = self._found(resume=resume, overwrite=overwrite)  # now that nobody else changes it
        if found is not None:
            self.info, self.finished = found
        self.continues = found is not None
        self.checkpoints = Checkpoints(self.directory, self.info.run)
        if self.continues and self.finished is None:
            self._checkpoint = next(self.checkpoints.readable(), None)
            self.done = 0 if self._checkpoint is None else self._checkpoint.epoch

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Looks at the folder and changes nothing: what ``open`` would refuse is refused hours earlier.

        Raises:
          CheckpointError: as ``open`` does, unless no checkpoint can be read, or a run that goes on is another
            process's at the moment.
          ValueError: as ``open`` does.
        """
        if self.directory is not None:
            self._found(resume=resume, overwrite=overwrite)
            if overwrite and (self.directory / LOCK).exists():
                with self._claims:
                    on_first(self._claim)

    def _found(self, *, resume: bool, overwrite: bool) -> "tuple[RunInfo, Result | None] | None":
        """What the run is that goes on from the one here, and its result, if that is finished; None: it starts anew.

        Raises:
          CheckpointError: if the folder holds something else, or a run that this one cannot go on from.
          ValueError: if the result of a finished run cannot be read.
        """
        from models.training.checkpoints import CheckpointError, Checkpoints, RunInfo, read_item_ids

        if not self._holds_run(resume=resume, overwrite=overwrite) or overwrite:
            return None
        found = RunInfo.read(self.directory)
        info = self._info().continuing(found, self.prepared.interactions, self.directory)
        if found.items and (self.directory / "items.npz").exists():
            read_item_ids(self.directory, found)
        trained = max(Checkpoints(self.directory).epochs(), default=0)
        if trained > self.config.epochs:
            raise CheckpointError(
                f"{self.directory} was trained for {trained} epochs already, more than epochs={self.config.epochs}; "
                f"give --epochs {trained} or more, or another --output-dir"
            )
        try:
            result = Result.read(self.directory / "result.json")
        except FileNotFoundError:
            return info, None
        is_done = len(result.losses) == self.config.epochs or all(
            getattr(found.config, x) == getattr(self.config, x) for x in ("epochs", "patience")
        )
        return info, result if is_done else None

    def _info(self) -> "RunInfo":
        from models.training.checkpoints import RunInfo

        num_users = self.prepared.split.train.num_users
        return RunInfo.of(self.optimizer, self.config, self.prepared.interactions, num_users=num_users)

    def _holds_run(self, *, resume: bool, overwrite: bool) -> bool:
        """Whether the folder holds a run.

        Raises:
          CheckpointError: if it holds one that is not to be resumed or overwritten, or something else.
        """
        from models.training.checkpoints import CheckpointError

        holds_run = self._check_folder()
        if holds_run and not (resume or overwrite):
            raise CheckpointError(
                f"{self.directory} holds a run already; go on with --resume, replace it with --overwrite, "
                "or give another --output-dir"
            )
        return holds_run

    def _claim(self) -> None:
        """Makes the folder, and keeps others out of it.

        Raises:
          CheckpointError: if another process trains in it.
        """
        from models.training.checkpoints import CheckpointError

        self.directory.mkdir(parents=True, exist_ok=True)
        if not self._claims.enter_context(claim(self.directory / LOCK)):
            raise CheckpointError(
                f"another process trains in {self.directory}; wait for it, or give another --output-dir"
            )

    def _check_folder(self) -> bool:
        """Whether the folder holds a run; if not, nothing may be in it that a run could replace.

        Raises:
          CheckpointError: if there is something.
        """
        from models.training.checkpoints import CheckpointError, is_run

        if not self.directory.is_dir():
            return False
        names = sorted(path.name for path in self.directory.iterdir() if not path.name.startswith("."))
        with contextlib.suppress(OSError, ValueError):
            if is_run(read_json(self.directory / "run.json")):
                return True
        if not names:
            return False
        what = "run.json, which no training run has written" if "run.json" in names else f"{names[0]}, but no run"
        raise CheckpointError(f"{self.directory} holds {what}; give another --output-dir, or empty it yourself")

    def restore(self, params: Any, opt_state: Any, place: Callable[[Any], Any]) -> tuple[Any, Any]:
        """Goes back to the checkpoint.

        Args:
          params: what the parameters are to be like, or their shapes.
          opt_state: the optimizer state, likewise; the graphs are taken from it.
          place: puts a tree of arrays on devices.

        Returns:
          Parameters and optimizer state.
        """
        from models.training.checkpoints import CheckpointError, unflatten

        epoch, leaves, progress = self._checkpoint.epoch, self._checkpoint.leaves, self._checkpoint.progress
        self._checkpoint = None  # its arrays are as large as the run itself
        try:
            restored = unflatten(leaves, params, "last", place), unflatten(leaves, opt_state, "opt_state", place)
            self.best = (progress["best"], progress["best_epoch"], unflatten(leaves, params, "best", place))
        except CheckpointError as error:
            raise CheckpointError(
                f"the checkpoint of epoch {epoch} in {self.directory} does not fit: {error}"
            ) from None
        self.stale, self.seconds, self.saved = progress["stale"], progress["seconds"], epoch
        history = self.directory / "history.jsonl"
        with contextlib.suppress(FileNotFoundError):
            self.history = read_history(history, epoch)
        if "validation" in progress and len(self.history) == epoch:  # see consider_late
            self.history[-1]["validation"] = progress["validation"]
        if len(self.history) < epoch or (self.best[1] and "validation" not in self.history[self.best[1] - 1]):
            raise CheckpointError(
                f"{history} lacks what the checkpoint of epoch {epoch} builds on; train again with --overwrite"
            )
        return restored

    def start(self) -> None:
        """Takes possession of the folder: removes what is there, unless the run continues, and writes what it is.

        Raises:
          ValueError: if a logger cannot be used.
        """
        if self.directory is None:
            return
        wait_for_all()  # others may still read what is removed here
        if is_first():
            self._take_possession()

    def _take_possession(self) -> None:
        for folder in (self.directory, self.directory / EMBEDDINGS):
            remove_partial(folder)
        # run.json is replaced: a folder without it holds no run. What another model has left beside it need not be.
        others = () if self.continues else ("items.npz", beside.CONTEXT, beside.USERS)
        for name in ("result.json", "curve.png", "per_user.csv", *others):
            (self.directory / name).unlink(missing_ok=True)
        self.checkpoints.remove_after(self.saved)
        for path in (self.directory / EMBEDDINGS).glob("*.npz"):
            if not self.saved or not path.stem.isdecimal() or int(path.stem) > self.saved:
                path.unlink()
        if not self.continues:
            _remove_scalars(self.directory / TENSORBOARD)
            (self.directory / LOGGERS).unlink(missing_ok=True)
        self.info.write(self.directory, self.prepared.interactions.item_ids)
        beside.write_context(self.directory, self.prepared.context)
        if model_class(self.config.model).query == "user":
            beside.write_users(self.directory, self.prepared.interactions, self.prepared.split.train.user_ids)
        self._write_history()
        self._loggers = Loggers(self.config.logger, self.directory, epochs=len(self.history))
        self._loggers.start(self.config.to_dict())

    def record(self, record: dict[str, Any]) -> None:
        """Adds an epoch to the history."""
        self.history.append(record)
        if self._writes:
            append_text(self.directory / "history.jsonl", json.dumps(record) + "\n")
        if self._loggers is not None:
            scalars = {"loss": record["loss"], "tokens per second": record["tokens_per_second"]}
            scalars |= _validation_scalars(record)
            self._loggers.scalars(record["epoch"], scalars | record.get("diagnostics", {}))

    def consider(self, score: float, epoch: int, params: Any) -> None:
        """Keeps the parameters after an epoch if their score is the best so far."""
        if self.best is None or score > self.best[0]:
            self.best, self.stale = (score, epoch, params), 0
        else:
            self.stale += 1

    def consider_late(self, validation: dict[str, float], params: Any) -> None:
        """Counts an evaluation of the newest epoch, whose checkpoint was saved without one."""
        epoch = self.history[-1]["epoch"]
        self.consider(validation[SELECTION], epoch, params)
        if self.checkpoints is not None:
            self.checkpoints.amend(epoch, self._progress() | {"validation": validation})
        self.history[-1] = self.history[-1] | {"validation": validation}
        if self._writes:
            self._write_history()
        if self._loggers is not None:
            self._loggers.scalars(epoch, _validation_scalars(self.history[-1]))

    def keep(self, epoch: int, table: np.ndarray) -> None:
        """Writes the table that items are scored by."""
        if self._writes:
            folder = self.directory / EMBEDDINGS
            folder.mkdir(exist_ok=True)
            write_bytes(folder / f"{epoch}.npz", lambda file: np.savez_compressed(file, items=table))

    def save(self, epoch: int, params: Any, opt_state: Any) -> None:
        """Writes a checkpoint, unless it is there already."""
        if self.checkpoints is None or self.saved == epoch:
            return
        from models.training.checkpoints import Checkpoint, flatten

        def leaves_of(trees: Mapping[str, Any], *read: Callable[[Any], Any]) -> dict[str, Any]:
            return {name: leaf for prefix, tree in trees.items() for name, leaf in flatten(tree, prefix, *read).items()}

        trees = {"last": params, "best": params if self.best is None else self.best[2], "opt_state": opt_state}
        # What is split over devices is written by each of them; no process may have all of it.
        leaves, shapes = leaves_of(trees, *(() if self.split_shapes is None else (lambda leaf: leaf,))), {}
        if self.split_shapes is not None:
            params, opt_state = self.split_shapes
            like = leaves_of({"last": params, "best": params, "opt_state": opt_state}, lambda leaf: leaf.shape)
            shapes = {name: shape for name, shape in like.items() if shape != leaves[name].shape}
        self.checkpoints.save(Checkpoint(epoch, leaves, self._progress(), shapes))
        self.saved = epoch

    def _progress(self) -> dict[str, Any]:
        score, epoch = (float("-inf"), 0) if self.best is None else self.best[:2]
        return {"best": score, "best_epoch": epoch, "stale": self.stale, "seconds": self.seconds}

    def finish(self, program: Program) -> None:
        """Tests the best parameters, if the run is one that tests, and writes what there is to write."""
        begin = time.perf_counter()
        _, best_epoch, params = self.best
        ranks, test = program.test(params) if self.tests else (None, {})
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
            seeds_together=len(program.seeds),
            epoch_steps=self.prepared.epoch_steps,
            groups=summarize_groups(ranks, self.prepared.split, self.config.ks) if self.tests else {},
        )
        if self._loggers is not None and test:
            self._loggers.scalars(len(self.history), {f"test/{name}": value for name, value in test.items()})
        self._close_loggers("finished")
        if self._writes and self.tests:
            from models import plots  # matplotlib is slow to import and not needed to train

            if self.config.per_user:
                self._write_ranks(ranks)
            plots.validation_curves({self.optimizer: [curve(self.history)]}, self.directory / "curve.png")
            write_json(self.directory / "result.json", dataclasses.asdict(result))
        self.finished = result

    def _close_loggers(self, status: Status) -> None:
        if self._loggers is not None:
            self._loggers.close(status)
            self._loggers = None

    def _write_history(self) -> None:
        write_text(self.directory / "history.jsonl", "".join(json.dumps(record) + "\n" for record in self.history))

    def _write_ranks(self, ranks: np.ndarray) -> None:
        import polars

        split = self.prepared.split
        users, items = split.test_history.user_ids, self.prepared.interactions.item_ids[split.test]
        frame = polars.DataFrame({"user": users, "item": items, "rank": ranks + 1})
        write_text(self.directory / "per_user.csv", frame.write_csv())


def _validation_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    return {f"validation/{name}": value for name, value in record.get("validation", {}).items()}


def _remove_scalars(folder: Path) -> None:
    """Removes what TensorBoard's writer wrote, and the folder, if that was all."""
    for path in folder.glob("events.out.tfevents.*"):
        path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def protocol(prepared: TrainingData) -> str:
    """How a result on these data comes about, in one line."""
    return (
        f"{prepared.split.protocol}, {prepared.test.protocol}; tested at the epoch with the best validation {SELECTION}"
    )


def peak_memory() -> int:
    """The most bytes used so far: on the device, if it says so, else by the process; 0 where neither is known."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    on_device = statistics.get("peak_bytes_in_use")
    if on_device or resource is None:
        return on_device or 0
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _options_digest(config: TrainConfig, optimizer: Optimizer) -> str:
    """A digest of all that processes must agree on: unlike a run that goes on, they must stop after the same epoch."""
    aside = ("data", "cache_dir", *GRAPH_FILES, "logger")
    values = {name: value for name, value in config.to_dict().items() if name not in aside} | {"optimizer": optimizer}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
