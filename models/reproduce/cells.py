"""A cell: one training run of a table, kept as a small JSON file."""

import dataclasses
import glob
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from models.config import TrainConfig
from models.files import check_format, read_json, write_text
from models.reproduce.tables import METRICS, Family
from models.training.files import curve

# Of a cell's JSON. Cells that say nothing are of the first format.
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run and what came of it.

    Attributes:
      experiment: the table's name.
      dataset: the dataset's name.
      model: the model's name.
      variant: the loss.
      arm: the optimizer.
      settings: values of what the row varies.
      seed: the seed.
      config: the resolved configuration, see :func:`portable`.
      protocol: how the metrics came about.
      best_epoch: the epoch with the best validation NDCG@10.
      validation: metrics of the validation items at that epoch.
      test: metrics of the test items at that epoch.
      epoch_seconds: median seconds of an epoch; where several seeds shared a program, their share.
      total_seconds: seconds of the whole run, likewise.
      device: what it ran on.
      versions: of the packages it ran with.
      history: of each epoch, its number, its mean training loss and, where evaluated, metrics of the validation items.
      format: of the file. A later one may have more fields; those of an earlier one have values that mean the same.
    """

    experiment: str
    dataset: str
    model: str
    variant: str
    arm: str
    settings: dict[str, Any]
    seed: int
    config: dict[str, Any]
    protocol: str
    best_epoch: int
    validation: dict[str, float]
    test: dict[str, float]
    epoch_seconds: float
    total_seconds: float
    device: str
    versions: dict[str, str]
    history: list[dict[str, Any]]
    format: int = FORMAT

    @classmethod
    def from_result(
        cls,
        experiment: str,
        family: Family,
        config: TrainConfig,
        result: Mapping[str, Any],
        history: Sequence[Mapping[str, Any]],
        *,
        versions: dict[str, str],
    ) -> Self:
        """A cell from what a training run leaves.

        Args:
          experiment: the table's name.
          family: what was trained.
          config: the run's configuration.
          result: the fields of its ``Result``.
          history: the records of its ``history.jsonl``.
          versions: of the packages it ran with.
        """
        seeds_together = result.get("seeds_together", 1)
        records = []
        for record in history:
            kept = {"epoch": record["epoch"], "loss": round(record["loss"], 5)}
            if "validation" in record:
                validation = record["validation"]
                kept["validation"] = _rounded({name: validation[name] for name in METRICS if name in validation})
            records.append(kept)
        return cls(
            experiment=experiment,
            dataset=family.row.dataset,
            model=config.model,
            variant=config.loss,
            arm=family.arm,
            settings=family.settings,
            seed=config.seed,
            config=portable(config),
            protocol=result["protocol"],
            best_epoch=result["best_epoch"],
            validation=_rounded(result["validation"]),
            test=_rounded(result["test"]),
            epoch_seconds=round(result["epoch_seconds"] / seeds_together, 3),
            total_seconds=round(result["total_seconds"] / seeds_together, 1),
            device=result["device"],
            versions=versions,
            history=records,
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads a cell.

        Raises:
          ValueError: if the file holds none, or one of a later version of this program.
        """
        try:
            values = read_json(path)
            later = check_format(values, FORMAT)
            if not later:
                return cls(**values)
        except (ValueError, TypeError) as error:
            reason = str(error).removeprefix("Cell.__init__() ")
            raise ValueError(f"{path} holds no cell; delete it, and it will be trained again ({reason})") from None
        raise ValueError(f"{path} {later}, or give another --results-dir")

    def write(self, path: Path) -> None:
        """Writes the cell as JSON, one line a field and an epoch."""
        path.parent.mkdir(parents=True, exist_ok=True)
        values = dataclasses.asdict(self)
        values = {"format": values.pop("format")} | values
        history = ",\n".join(f"    {json.dumps(record)}" for record in values.pop("history"))
        fields = "".join(f"  {json.dumps(name)}: {json.dumps(value)},\n" for name, value in values.items())
        write_text(path, f'{{\n{fields}  "history": [\n{history}\n  ]\n}}\n')

    @property
    def epochs(self) -> int:
        """How many epochs were trained."""
        return len(self.history)

    @property
    def curve(self) -> list[tuple[int, float]]:
        """Points (epoch, validation NDCG@10)."""
        return curve(self.history)

    def lacks(self, config: TrainConfig) -> str | None:
        """What keeps this cell from being the run of a configuration.

        Returns:
          None: it is. An empty text: nothing but epochs, which may be trained still. Else: which setting differs.
        """
        # What is newer than the cell had its default. What the cell has and this version has not does nothing any more.
        found, wanted = defaults_of(config) | {"optimizer": self.arm} | self.config, portable(config)
        for name in sorted(wanted):
            if name == "epochs" and config.schedule == "constant":
                continue
            if found.get(name) != wanted[name]:
                return f"{name}={found.get(name)}, not {wanted[name]}"
        return "" if self.config["epochs"] < config.epochs else None


def portable(config: TrainConfig) -> dict[str, Any]:
    """A configuration as it is kept in a cell: plain JSON, without paths of this machine."""
    values = config.to_dict()
    del values["cache_dir"]
    values["data"] = None if config.data is None else config.data.name
    return values


def defaults_of(config: TrainConfig) -> dict[str, Any]:
    """What the same model is trained with where nothing is said, see :func:`portable`."""
    return portable(type(config)())


def cell_path(results_dir: Path, experiment: str, family: Family, seed: int) -> Path:
    """Where a cell is kept."""
    return results_dir / experiment / f"{family.name}-seed{seed}.json"


def read_family(results_dir: Path, experiment: str, family: Family) -> list[Cell]:
    """The cells of a family that are there, by seed."""
    pattern = f"{glob.escape(family.name)}-seed*.json"
    return sorted(map(Cell.read, (results_dir / experiment).glob(pattern)), key=lambda cell: cell.seed)


def _rounded(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in metrics.items()}
