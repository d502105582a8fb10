"""The runs that a report is about: read from their folders or from cells, and grouped into what may be compared."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from models.architectures.registry import config_from_dict, model_class
from models.config import SELECTION, SMOOTHING, Optimizer, TrainConfig
from models.files import read_json
from models.reproduce.cells import ASIDE, SOURCE, Cell, identity_of
from models.reproduce.tables import BASELINES, PLAIN
from models.training.checkpoints import RunInfo
from models.training.compare import Gain, paired_gain
from models.training.files import read_history
from models.training.run import Result

# How deep below a folder that is named runs are looked for: runs/table/comparison/adamw-0.
DEPTH = 3
EMBEDDED = "embedded data"


@dataclasses.dataclass(frozen=True)
class ReportedRun:
    """One training run, from wherever it was read.

    Attributes:
      source: its folder, or its cell's file.
      directory: its folder; None: it was read from a cell, and nothing but numbers is left of it.
      dataset: what the data is called.
      data: what tells the data apart: a fingerprint, or its name.
      config: the configuration.
      optimizer: the optimizer.
      history: the records of its epochs.
      result: the outcome by the names of :class:`models.training.run.Result`; None: the run is not finished.
      remark: what an earlier version of the optimizer did, if the run is of one.
      files: a digest of the files that its graph was made of; empty: there were none, or it is not known.
    """

    source: Path
    directory: Path | None
    dataset: str
    data: str
    config: TrainConfig
    optimizer: Optimizer
    history: Sequence[Mapping[str, Any]]
    result: Mapping[str, Any] | None
    remark: str = ""
    files: str = ""

    @classmethod
    def from_folder(cls, directory: Path) -> Self:
        """Reads the folder of a training run, finished or not.

        Raises:
          ValueError: if the folder holds no run, or a file of it cannot be read.
        """
        info = RunInfo.read(directory)
        history: Sequence[Mapping[str, Any]] = ()
        if (directory / "history.jsonl").exists():
            history = read_history(directory / "history.jsonl")
        result = None
        if (directory / "result.json").exists():
            result = dataclasses.asdict(Result.read(directory / "result.json"))
        dataset = EMBEDDED if info.config.data is None else info.config.data.stem
        run = directory, directory, dataset, info.data, info.config, info.optimizer
        return cls(*run, history, result, files=info.graph)

    @classmethod
    def from_cell(cls, path: Path) -> Self:
        """Reads a cell of a table that was reproduced.

        Raises:
          ValueError: if the file holds none.
        """
        cell = Cell.read(path)
        known = {field.name for field in dataclasses.fields(model_class(cell.model).config_class)}
        values = {name: value for name, value in cell.config.items() if name in known}
        config = config_from_dict(values | {"optimizer": cell.arm, "model": cell.model})
        result = dataclasses.asdict(cell)
        return cls(path, None, cell.dataset, cell.dataset, config, cell.arm, cell.history, result, cell.outdated or "")

    @property
    def seed(self) -> int:
        """The seed."""
        return self.config.seed

    @property
    def loss(self) -> str:
        """The loss; empty: the model is fitted in closed form."""
        return "" if self.optimizer == "closed-form" else self.config.loss

    @property
    def subject(self) -> tuple[Any, ...]:
        """What runs have in common that may be compared: data, how they are split and ranked, model and loss."""
        config = self.config
        split = (config.split, config.split_quantiles, config.split_times, config.cold_items, config.exclude_seen)
        return self.data, *split, config.model, self.loss

    @functools.cached_property
    def identity(self) -> tuple[str, Optimizer, int, str, str]:
        """What runs that differ in the seed alone have in common."""
        return _identity(self.config, self.optimizer, self.remark, self.files)


def _identity(
    config: TrainConfig, optimizer: Optimizer, remark: str = "", files: str = ""
) -> tuple[str, Optimizer, int, str, str]:
    """What a run with this configuration, but for the optimizer, has in common with those with other seeds."""
    return identity_of(config, optimizer), optimizer, config.epochs, remark, "" if optimizer in PLAIN else files


Test = Callable[[ReportedRun], Mapping[str, float]]


def _all_users(run: ReportedRun) -> Mapping[str, float]:
    return run.result["test"]


@dataclasses.dataclass(frozen=True)
class Arm:
    """Runs that differ in the seed alone.

    Attributes:
      label: for readers: the optimizer, and the settings that tell it from others of the same optimizer.
      runs: at least one, by seed.
    """

    label: str
    runs: Sequence[ReportedRun]

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer."""
        return self.runs[0].optimizer

    @property
    def config(self) -> TrainConfig:
        """The configuration, with the seed of the first run."""
        return self.runs[0].config

    @property
    def plain(self) -> bool:
        """Whether nothing is smoothed."""
        return self.optimizer in PLAIN or self.optimizer == "closed-form"

    @functools.cached_property
    def finished(self) -> list[ReportedRun]:
        """The runs that have a result."""
        return [run for run in self.runs if run.result is not None]

    def values(self, metric: str, part: str = "test") -> list[float]:
        """A metric of the finished runs that have it."""
        return [run.result[part][metric] for run in self.finished if metric in run.result[part]]

    @property
    def validation(self) -> float:
        """Mean of the best validation NDCG@10; -inf: no run is finished."""
        values = self.values(SELECTION, "validation")
        return statistics.fmean(values) if values else float("-inf")

    def gain(self, base: "Arm", metric: str, test: Test = _all_users) -> Gain:
        """On a test metric, over the seeds that both were trained with to the same number of epochs.

        Args:
          base: the plain arm.
          metric: the metric.
          test: the metrics of a finished run, such as those of some users alone.
        """
        if self.config.epochs != base.config.epochs:
            return Gain(None, None)
        mine, theirs = (
            [_Tested({"seed": run.seed}, test(run)) for run in arm.finished if metric in test(run)]
            for arm in (self, base)
        )
        return paired_gain(mine, theirs, metric)


@dataclasses.dataclass(frozen=True)
class _Tested:
    """What :func:`models.training.compare.paired_gain` looks at."""

    config: Mapping[str, Any]
    test: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Group:
    """Arms of one model with one loss on the same data.

    Attributes:
      title: for readers.
      arms: plain ones first.
    """

    title: str
    arms: Sequence[Arm]

    @property
    def protocols(self) -> list[str]:
        """How the metrics came about."""
        return sorted({run.result["protocol"] for arm in self.arms for run in arm.finished})

    @property
    def metrics(self) -> list[str]:
        """Names of the test metrics, in the order of the first run that has them."""
        return list(dict.fromkeys(name for arm in self.arms for run in arm.finished for name in run.result["test"]))

    def baseline(self, arm: Arm) -> Arm | None:
        """The plain arm that another is compared with, AdamW where there is one; None: there is none.

        Of several, the one with the same settings but for the smoothing; without such a one, the best of those with as
        many epochs on the validation items.
        """
        for optimizer in reversed(BASELINES.get(arm.optimizer, ())):
            found = [x for x in self.arms if x.optimizer == optimizer and x.finished]
            for other in found:
                if other.runs[0].identity == _identity(arm.config, optimizer):
                    return other
            found = [x for x in found if x.config.epochs == arm.config.epochs]
            if found:
                return max(found, key=lambda x: x.validation)
        return None


def read_groups(folders: Sequence[Path]) -> list[Group]:
    """Reads all runs below some folders, and groups them by data, model and loss.

    Args:
      folders: of a run, of a comparison, of several of these, or of results with cells.

    Raises:
      ValueError: if a folder holds no run and no cell, or one cannot be read; it names the folder or file.
    """
    runs: dict[Any, ReportedRun] = {}
    for folder in folders:
        found = list(_runs_below(folder))
        if not found:
            raise ValueError(
                f"runs: {folder} holds no training run (a folder with run.json) and no cell of a table; give what "
                "--output-dir or --results-dir was"
            )
        for run in found:
            # The same run may be asked for twice, and a cell may serve several tables.
            key = (*run.subject, *run.identity, run.seed)
            if key not in runs or runs[key].result is None:
                runs[key] = run
    by_subject: dict[Any, list[ReportedRun]] = {}
    for run in runs.values():
        by_subject.setdefault(run.subject, []).append(run)
    return [_group(runs) for runs in by_subject.values()]


def _runs_below(folder: Path) -> Iterable[ReportedRun]:
    if not folder.is_dir():
        raise ValueError(f"runs: {folder} is no folder; give what --output-dir or --results-dir was")
    found: list[Path] = []
    for depth in range(DEPTH + 1):
        paths = sorted(path.parent for path in folder.glob("*/" * depth + "run.json"))
        found += [path for path in paths if not any(above in found for above in path.parents)]  # a run's are its own
    cells = sorted([*folder.glob("*.json"), *folder.glob("*/*.json")])
    return [
        *map(ReportedRun.from_folder, found),
        *(ReportedRun.from_cell(path) for path in cells if path.parent not in found and _is_cell(path)),
    ]


def _is_cell(path: Path) -> bool:
    try:
        return {"experiment", "arm", "history"} <= read_json(path).keys()
    except ValueError as error:
        raise ValueError(
            f"runs: {path} cannot be read ({error}); move it out of that folder, or name the folders of the runs"
        ) from None


def _group(runs: Sequence[ReportedRun]) -> Group:
    by_arm: dict[Any, list[ReportedRun]] = {}
    for run in runs:
        by_arm.setdefault(run.identity, []).append(run)
    members = [sorted(mine, key=lambda run: run.seed) for mine in by_arm.values()]
    labels = _labels([mine[0] for mine in members])
    arms = [Arm(label, mine) for label, mine in zip(labels, members, strict=True)]
    first = runs[0]
    loss = f", {first.loss}" if first.loss else ""
    return Group(f"{first.config.model} on {first.dataset}{loss}", sorted(arms, key=lambda arm: not arm.plain))


def _labels(firsts: Sequence[ReportedRun]) -> list[str]:
    """What arms are called: the optimizer, and where it occurs more than once the settings in which they differ."""
    settings = [_settings(run) for run in firsts]
    labels = []
    for run, mine in zip(firsts, settings, strict=True):
        same = [other for x, other in zip(firsts, settings, strict=True) if x.optimizer == run.optimizer]
        differing = [name for name in mine if any(other.get(name) != mine[name] for other in same)]
        words = [f"{name} {_word(mine[name])}" for name in differing] + (["earlier version"] if run.remark else [])
        labels.append(f"{run.optimizer} ({', '.join(words)})" if words else run.optimizer)
    return labels


def _settings(run: ReportedRun) -> dict[str, Any]:
    left_out = {*ASIDE, *SOURCE, "seed", *(SMOOTHING if run.optimizer in PLAIN else ())}
    return {name: value for name, value in run.config.to_dict().items() if name not in left_out}


def _word(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
