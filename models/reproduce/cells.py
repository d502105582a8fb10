"""A cell: one training run of a table, kept as a small JSON file."""

import dataclasses
import functools
import glob
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from models.architectures.registry import config_from_dict
from models.config import GRAPH_FILES, SMOOTHING, SourceConfig, TrainConfig
from models.evaluation.groups import Groups
from models.files import check_format, read_json, write_text
from models.reproduce.tables import METRICS, PLAIN, SeedGroup
from models.training.files import curve

# Of a cell's JSON. Cells that say nothing are of the first format.
FORMAT = 3
# How often the meaning of an arm has changed, counted from 1; and what its cells of an earlier revision did.
REVISIONS = {"sevo-gradient": 2}
EARLIER = {"sevo-gradient": "corrected the moments of all tables, not of the smoothed ones alone"}
# Files, of which only the name counts.
PORTABLE = ("data", *GRAPH_FILES)
# What a run records and writes besides, and what does not change it.
ASIDE = ("cache_dir", "diagnostics", "keep_epochs", "ks", "logger", "optimizer", "per_user")
# Where the data come from. Which items are cold is another matter: it changes what is trained and asked.
SOURCE = tuple(field.name for field in dataclasses.fields(SourceConfig) if field.name != "cold_items")


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
      inference_seconds: median seconds in which all validation users' lists were ranked, likewise; None: not known.
      epoch_steps: steps an epoch; None: not known.
      groups: metrics of the test items by groups of users, see :func:`~models.evaluation.groups.summarize_groups`;
        empty: not known.
      revision: of what the arm's name means, see ``REVISIONS``.
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
    inference_seconds: float | None = None
    epoch_steps: int | None = None
    groups: Groups = dataclasses.field(default_factory=dict)
    revision: int = 1
    format: int = 1

    @classmethod
    def from_result(
        cls,
        experiment: str,
        group: SeedGroup,
        config: TrainConfig,
        result: Mapping[str, Any],
        history: Sequence[Mapping[str, Any]],
        *,
        versions: dict[str, str],
    ) -> Self:
        """A cell from what a training run leaves.

        Args:
          experiment: the table's name.
          group: what was trained.
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
            if "diagnostics" in record:
                kept["diagnostics"] = {name: float(f"{value:.5g}") for name, value in record["diagnostics"].items()}
            records.append(kept)
        # The first compiles.
        passes = [record["evaluation_seconds"] for record in history if "evaluation_seconds" in record][1:]
        return cls(
            experiment=experiment,
            dataset=group.row.dataset,
            model=config.model,
            variant=portable(config).get("loss", ""),
            arm=group.arm,
            settings=group.settings,
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
            inference_seconds=round(statistics.median(passes) / seeds_together, 4) if passes else None,
            epoch_steps=result.get("epoch_steps"),
            groups={
                grouping: {
                    name: _rounded({x: found[x] for x in ("users", *METRICS) if x in found})
                    for name, found in groups.items()
                }
                for grouping, groups in (result.get("groups") or {}).items()
            },
            revision=REVISIONS.get(group.arm, 1),
            format=FORMAT,
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

    @property
    def outdated(self) -> str | None:
        """What an earlier version of the arm did, if the cell is of one."""
        return EARLIER[self.arm] if self.revision < REVISIONS.get(self.arm, 1) else None

    @property
    def pairing(self) -> tuple[int, int]:
        """Seed and epochs: what two cells must have in common to be compared."""
        return self.seed, self.config["epochs"]

    @functools.cached_property
    def identity(self) -> str:
        """What was trained, see :func:`identity_kept`."""
        return identity_kept(self.config, self.arm)

    def serves(self, group: SeedGroup, config: TrainConfig | None = None) -> bool:
        """Whether this cell, of whatever table, is one of a group.

        Args:
          group: the group.
          config: the whole configuration that is wanted; None: data sources and epochs do not matter.
        """
        wanted = group.config() if config is None else config
        if (self.arm, self.dataset) != (group.arm, group.row.dataset) or self.outdated:
            return False
        values = wanted.to_dict()
        if values.get("keep_epochs") or (values.get("diagnostics") and not self.config.get("diagnostics")):
            return False
        if self.identity != identity_of(wanted, group.arm):
            return False
        if config is None:
            return True
        found, sought = _completed(self.config), portable(config)
        if any(found[name] != sought[name] for name in SOURCE if name in sought):
            return False
        return self.config["epochs"] >= config.epochs

    def made_for(self, group: SeedGroup) -> bool:
        """Whether this is a cell of a group, be it of fewer epochs; the names of files do not count."""
        if (self.arm, self.dataset) != (group.arm, group.row.dataset):
            return False
        wanted, found = (
            {name: x for name, x in values.items() if name not in PORTABLE}
            for values in (portable(group.config()), _completed(self.config))
        )
        return _identity(wanted, self.arm) == _identity(found, self.arm)

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
    for name in PORTABLE:
        if values.get(name) is not None:
            values[name] = Path(values[name]).name
    return values


def defaults_of(config: TrainConfig) -> dict[str, Any]:
    """What the same model is trained with where nothing is said, see :func:`portable`."""
    return portable(type(config)())


def cell_path(results_dir: Path, experiment: str, group: SeedGroup, seed: int) -> Path:
    """Where a cell is kept."""
    return results_dir / experiment / f"{group.name}-seed{seed}.json"


def identity_of(config: TrainConfig, arm: str) -> str:
    """What is trained, apart from the data and the seed: two runs that agree in it differ in nothing that counts.

    Fields that the arm does not heed are left out, and so is what a smoothing that changes nothing is made of.
    """
    return _identity(portable(config), arm)


def identity_kept(values: Mapping[str, Any], arm: str) -> str:
    """The same of a configuration that was kept, maybe by an earlier version of this program, see :func:`portable`."""
    return _identity(_completed(values), arm)


def _identity(values: Mapping[str, Any], arm: str) -> str:
    kept = {name: x for name, x in values.items() if name not in (*ASIDE, *SOURCE, "seed")}
    if kept.get("schedule") == "constant":
        del kept["epochs"]
    if "beta" not in kept:  # fitted in closed form: what there is of a graph is what it is made of
        unheeded: tuple[str, ...] = ()
    elif arm in PLAIN:
        unheeded = SMOOTHING
    elif kept["beta"] == 0 or (kept["num_layers"] == 0 and kept["smoothing"] == "neumann" and kept["rescale"]):
        # The identity, over whatever graph. Whether moments are corrected still counts.
        unheeded = tuple(name for name in SMOOTHING if name != "moment_correction")
    elif kept["max_hops"] == 1:
        unheeded = ("graph_weighting",)  # there are no distances but 1
    else:
        unheeded = ()
    return json.dumps({name: x for name, x in kept.items() if name not in unheeded}, sort_keys=True)


def _completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A kept configuration with what is newer than it, and without what there is no longer."""
    usual = _defaults(values["model"])
    return usual | {name: x for name, x in values.items() if name in usual}


@functools.cache
def _defaults(model: str) -> dict[str, Any]:
    return portable(config_from_dict({"model": model}))


class Cells:
    """The cells in a folder of results. Each is read once.

    A cell belongs to the table whose folder it is in. Where another table wants the very same run, it takes that cell
    instead of training it again.

    Args:
      results_dir: the folder.
    """

    def __init__(self, results_dir: Path) -> None:
        self.results_dir = results_dir
        self._read: dict[Path, Cell] = {}

    def read(self, path: Path) -> Cell:
        """A cell, see :meth:`Cell.read`."""
        if path not in self._read:
            self._read[path] = Cell.read(path)
        return self._read[path]

    @functools.cached_property
    def _by_identity(self) -> dict[str, list[tuple[Path, Cell]]]:
        found: dict[str, list[tuple[Path, Cell]]] = {}
        for path in sorted(self.results_dir.glob("*/*-seed*.json")):
            cell = self.read(path)
            found.setdefault(cell.identity, []).append((path, cell))
        for cells in found.values():
            # Diagnostics change the program, and so the last digits: every other table takes the run without them.
            cells.sort(key=lambda x: bool(x[1].config.get("diagnostics")))
        return found

    def all(self) -> list[Cell]:
        """All cells of all tables."""
        return [cell for cells in self._by_identity.values() for _, cell in cells]

    def of(self, experiment: str, group: SeedGroup) -> list[Cell]:
        """The cells of a group that are there, by seed: the table's own, else those of other tables.

        A file with the group's name that was made with other settings, of an earlier table or preset, is none. Cells of
        an earlier revision of the arm are given only where there are no others: the two are not mixed.
        """
        pattern = f"{glob.escape(group.name)}-seed*.json"
        named = map(self.read, sorted((self.results_dir / experiment).glob(pattern)))
        own = {cell.seed: cell for cell in named if cell.made_for(group)}
        found = {seed: cell for seed, cell in own.items() if not cell.outdated}
        for _, cell in self._by_identity.get(identity_of(group.config(), group.arm), ()):
            if cell.seed not in found and cell.serves(group):
                found[cell.seed] = cell
        found = found or own
        return [found[seed] for seed in sorted(found)]

    def shared(self, group: SeedGroup, config: TrainConfig) -> Path | None:
        """Where some table has the cell of a configuration; None: nowhere."""
        for path, cell in self._by_identity.get(identity_of(config, group.arm), ()):
            if cell.seed == config.seed and cell.serves(group, config):
                return path
        return None

    def begun(self, group: SeedGroup, config: TrainConfig) -> Path | None:
        """Where some table has a cell of a configuration that only lacks epochs, to be trained on; None: nowhere."""
        for path, cell in self._by_identity.get(identity_of(config, group.arm), ()):
            mine = (cell.seed, cell.arm, cell.outdated) == (config.seed, group.arm, None)
            if mine and cell.dataset == group.row.dataset and cell.lacks(config) == "":
                return path
        return None


def _rounded(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in metrics.items()}
