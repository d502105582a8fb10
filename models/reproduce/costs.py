"""What training and inference cost: the arms of a row take turns in one process, for a few epochs each."""

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from models.config import Optimizer, TrainConfig
from models.files import check_format, read_json, write_json
from models.reproduce.cells import identity_kept, identity_of, portable
from models.reproduce.runner import (
    check_source,
    device_name,
    graph_fields,
    package_versions,
    read_and_describe,
    select_rows,
)
from models.reproduce.tables import Row, Table
from models.training.progress import SILENCE

# Of the JSON.
FORMAT = 1
# Epochs of each arm that are timed. The one before them compiles.
ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class ArmCosts:
    """What an arm costs.

    Attributes:
      epoch_seconds: median seconds of an epoch, without evaluation.
      inference_seconds: median seconds in which the lists of all validation users were ranked.
      config: the resolved configuration, see :func:`~models.reproduce.cells.portable`.
    """

    epoch_seconds: float
    inference_seconds: float
    config: dict[str, Any]

    @property
    def epochs(self) -> int:
        """How many epochs the settings have."""
        return self.config["epochs"]

    @property
    def training_seconds(self) -> float:
        """Seconds of an epoch times the epochs of the settings, without evaluation."""
        return self.epoch_seconds * self.epochs


@dataclasses.dataclass(frozen=True)
class Costs:
    """What the arms of a row cost, measured side by side.

    Attributes:
      arms: by optimizer.
      rounds: how many epochs of each were timed.
      device: what they ran on.
      versions: of the packages they ran with.
      format: of the file.
    """

    arms: dict[Optimizer, ArmCosts]
    rounds: int
    device: str
    versions: dict[str, str]
    format: int = FORMAT

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads what was measured.

        Raises:
          ValueError: if the file does not hold it, or is of a later version of this program.
        """
        try:
            values = read_json(path)
            later = check_format(values, FORMAT)
            if not later:
                arms = {arm: ArmCosts(**costs) for arm, costs in values.pop("arms").items()}
                return cls(arms=arms, **values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} holds no costs; delete it, and they are measured again ({reason})") from None
        raise ValueError(f"{path} {later}, or give another --results-dir")

    def write(self, path: Path) -> None:
        """Writes the costs as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(self))

    def overhead(self, arm: Optimizer) -> float | None:
        """How much longer than an epoch of AdamW one of an arm takes, relative; None: there is nothing to compare."""
        if arm == "adamw" or "adamw" not in self.arms:
            return None
        return self.arms[arm].epoch_seconds / self.arms["adamw"].epoch_seconds - 1

    def fits(self, row: Row) -> bool:
        """Whether these are costs of a row's arms, as it has them now. Where the data come from does not matter."""
        wanted = {group.arm: group.config() for group in row.groups}
        return set(self.arms) == set(wanted) and all(
            identity_kept(costs.config, arm) == identity_of(wanted[arm], arm) and costs.epochs == wanted[arm].epochs
            for arm, costs in self.arms.items()
        )


def costs_path(results_dir: Path, experiment: str, row: Row) -> Path:
    """Where the costs of a row are kept."""
    return results_dir / experiment / f"{row.name}-costs.json"


def find_costs(results_dir: Path, experiment: str, row: Row) -> Costs | None:
    """The costs of a row; None: they were not measured, or with other settings."""
    path = costs_path(results_dir, experiment, row)
    if not path.is_file():
        return None
    costs = Costs.read(path)
    return costs if costs.fits(row) else None


@dataclasses.dataclass(frozen=True)
class CostsJob:
    """A row to measure.

    Attributes:
      row: the row.
      configs: the configurations of its arms.
      path: where its costs will be kept.
    """

    row: Row
    configs: dict[Optimizer, TrainConfig]
    path: Path


def plan_costs(
    table: Table, *, datasets: Sequence[str], models: Sequence[str], data_dir: Path | None, results_dir: Path
) -> tuple[list[CostsJob], int]:
    """What of a table is to be measured, and how many rows are measured already.

    Args:
      table: the table.
      datasets: only these; empty: all, and so on.
      models: only these.
      data_dir: the folder of the data; None: public builds of the data sets.
      results_dir: where costs are kept.

    Raises:
      ValueError: if a selection is empty, a file is missing, or one of costs cannot be read.
    """
    jobs, done = [], 0
    for row in select_rows(table, datasets, models):
        if find_costs(results_dir, table.name, row) is not None:
            done += 1
            continue
        dataset = table.datasets[row.dataset]
        check_source(row, dataset, data_dir)
        fields = dataset.fields(data_dir)
        configs = {group.arm: group.config(**fields, **graph_fields(group, dataset, data_dir)) for group in row.groups}
        jobs.append(CostsJob(row, configs, costs_path(results_dir, table.name, row)))
    return jobs, done


def measure_all(jobs: Sequence[CostsJob]) -> None:
    """Measures rows, one after the other, and writes each when it is done."""
    for job in jobs:
        costs = Costs(measure(job.configs), ROUNDS, device_name(), package_versions())
        costs.write(job.path)
        told = ", ".join(f"{arm} {x.epoch_seconds:.2f} s an epoch" for arm, x in costs.arms.items())
        print(f"{job.path}: {told}", flush=True)


def measure(configs: dict[Optimizer, TrainConfig]) -> dict[Optimizer, ArmCosts]:
    """Has arms train an epoch and rank all validation users in turn, and takes the medians of ``ROUNDS`` rounds.

    Args:
      configs: the arms' configurations.
    """
    from models.training.program import Program
    from models.training.training_data import NewestData

    data = NewestData(read_and_describe)
    programs = {arm: Program(data.prepared(config), config, arm, [0]) for arm, config in configs.items()}
    training: dict[Optimizer, list[float]] = {arm: [] for arm in configs}
    inference: dict[Optimizer, list[float]] = {arm: [] for arm in configs}
    silent = bool(os.environ.get(SILENCE)) or None  # None: where there is no terminal
    for number in tqdm(range(1, ROUNDS + 2), desc="rounds, the first compiles", leave=False, disable=silent):
        for arm, program in programs.items():
            with _timed(training[arm]):
                program.epoch(number)
            with _timed(inference[arm]):
                program.ranks(program.prepared.validation)
    return {
        arm: ArmCosts(_median(training[arm][1:]), _median(inference[arm][1:]), portable(config))
        for arm, config in configs.items()
    }


@contextlib.contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - start)


def _median(seconds: Sequence[float]) -> float:
    return round(statistics.median(seconds), 4)
