"""What to reproduce: tables declared in YAML, in ``models/reproduce/tables``.

A table has datasets, arms and rows; a row is a preset on a dataset, trained with every arm, for every value of what it
varies, and holds the published figures to compare with. See ``table-3.yaml`` for an example.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, get_args

from models.config import Optimizer, TrainConfig
from models.presets import checked_fields, find, load_preset, read_yaml

FOLDER = Path(__file__).parent / "tables"
METRICS = ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10")
# What plain AdamW does not depend on.
SMOOTHING = ("beta", "num_layers", "graph_max_length", "max_hops")


@dataclasses.dataclass(frozen=True)
class Published:
    """Published test figures.

    Attributes:
      label: whose they are.
      metrics: means by name.
      arm: the optimizer they are to be compared with; None: none of ours.
      num_runs: how many runs the means are of.
      deviation: standard deviation of NDCG@10 over these runs; None: not known.
      losses: least, mean and largest training loss of the runs, by epoch.
    """

    label: str
    metrics: dict[str, float]
    arm: Optimizer | None = None
    num_runs: int | None = None
    deviation: float | None = None
    losses: dict[int, tuple[float, float, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Family:
    """Cells that differ in the seed alone.

    Attributes:
      row: the row they belong to.
      arm: the optimizer.
      settings: the values of what the row varies.
    """

    row: "Row"
    arm: Optimizer
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """Of files: the row, the arm and what is varied."""
        return "-".join([self.row.name, self.arm, *(f"{name}{value}" for name, value in self.settings.items())])

    @property
    def label(self) -> str:
        """For readers: the arm and what is varied."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return f"{self.arm} ({settings})" if settings else self.arm

    @property
    def baseline(self) -> "Family":
        """The family of plain AdamW that this one is compared with."""
        settings = {name: value for name, value in self.settings.items() if name not in SMOOTHING}
        return Family(self.row, "adamw", settings)

    def config(self, **fields: Any) -> TrainConfig:
        """The resolved configuration, with some more fields."""
        return TrainConfig.from_dict(self.row.fields | self.settings | fields).resolved()


@dataclasses.dataclass(frozen=True)
class Row:
    """A model with a loss on a dataset.

    Attributes:
      title: for readers.
      dataset: name among the table's datasets.
      fields: fields of ``TrainConfig``.
      arms: the optimizers.
      vary: values to try, by field.
      published: what to compare with.
    """

    title: str
    dataset: str
    fields: dict[str, Any]
    arms: tuple[Optimizer, ...]
    vary: dict[str, list[Any]]
    published: tuple[Published, ...]

    @property
    def config(self) -> TrainConfig:
        """The resolved configuration, apart from the data."""
        return TrainConfig.from_dict(self.fields).resolved()

    @property
    def name(self) -> str:
        """Of files: dataset, model and loss."""
        return f"{self.dataset}-{self.config.model}-{self.config.loss}"

    @property
    def families(self) -> list[Family]:
        """The cells but for their seeds; those that complete a comparison stand together."""
        found = []
        for values in itertools.product(*self.vary.values()):
            settings = dict(zip(self.vary, values, strict=True))
            for arm in self.arms:
                family = Family(self, arm, settings)
                if arm == "adamw":
                    family = family.baseline
                if family not in found:
                    found.append(family)
        return found

    def published_for(self, arm: Optimizer) -> Published | None:
        """The published figures of an arm."""
        return next((published for published in self.published if published.arm == arm), None)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Where the interactions are.

    Attributes:
      file: the file's name in the data folder, 'user item item …' a line.
      public: fields of ``TrainConfig`` that fetch a public build of it instead.
    """

    file: str
    public: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Table:
    """A published table, or a question of our own.

    Attributes:
      name: of its file and of the folder of its cells.
      title: for readers.
      description: for readers, what must be known to read it.
      datasets: by name.
      rows: in the order in which they are trained and shown.
    """

    name: str
    title: str
    description: str
    datasets: dict[str, Dataset]
    rows: tuple[Row, ...]


def table_names() -> list[str]:
    """The tables that exist, in the order of the report.

    >>> table_names()
    ['table-3', 'cross-entropy']
    """
    return sorted((path.stem for path in FOLDER.glob("*.yaml")), key=lambda name: (not name.startswith("table-"), name))


def load_table(name_or_path: str | PathLike[str]) -> Table:
    """Reads a table.

    Args:
      name_or_path: the number of one of the paper's tables, another name among :func:`table_names`, or a YAML file.

    Raises:
      ValueError: if there is none, or it does not hold what it should; it names the file, the place and what is wanted.
    """
    name = str(name_or_path)
    path = find(f"table-{name}" if name.isdecimal() else name_or_path, FOLDER, kind="table")
    values = _take(
        read_yaml(path), str(path), title=str, description=str, label=str, datasets=dict, arms=list, rows=list
    )
    datasets = {}
    for dataset, source in values["datasets"].items():
        where = f"{path}: datasets: {dataset}"
        source = _take(source, where, file=str, public=dict)
        datasets[dataset] = Dataset(source["file"], checked_fields(source["public"], where=where))
    arms = _arms(values["arms"], f"{path}: arms")
    rows = []
    for i, row in enumerate(values["rows"], start=1):
        rows.append(_row(row, f"{path}: row {i}", path.parent, datasets, arms, values["label"]))
    names = [row.name for row in rows]
    for row in rows:
        if names.count(row.name) > 1:
            raise ValueError(f"{path}: two rows are called {row.name}; a dataset, model and loss may stand there once")
    return Table(path.stem, values["title"], values["description"].strip(), datasets, tuple(rows))


def _row(
    values: Any, where: str, folder: Path, datasets: Mapping[str, Any], arms: tuple[Optimizer, ...], label: str
) -> Row:
    optional = {"settings": {}, "vary": {}, "published": []}
    kinds = {"title": str, "dataset": str, "preset": str, "settings": dict, "vary": dict, "published": list}
    values = _take(values, where, optional, **kinds)
    if values["dataset"] not in datasets:
        raise ValueError(f"{where}: dataset must be one of {', '.join(datasets)}, got {values['dataset']!r}")
    vary = {}
    for name, tried in values["vary"].items():
        if not isinstance(tried, list) or not tried:
            raise ValueError(f"{where}: vary: {name} must be a list of values, got {tried!r}")
        vary[name] = [checked_fields({name: value}, where=f"{where}: vary")[name] for value in tried]
    preset = values["preset"]
    if preset.endswith((".yaml", ".yml")):
        preset = folder / preset
    row = Row(
        title=values["title"],
        dataset=values["dataset"],
        fields=load_preset(preset) | checked_fields(values["settings"], where=where),
        arms=arms,
        vary=vary,
        published=tuple(_published(x, f"{where}: published", label) for x in values["published"]),
    )
    for family in row.families:
        try:
            family.config()
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return row


def _published(values: Any, where: str, label: str) -> Published:
    optional = {"label": label, "arm": None, "runs": [], "deviation": None, "num_runs": None, "losses": {}}
    kinds = {
        "label": str,
        "arm": str,
        "metrics": dict,
        "runs": list,
        "deviation": float,
        "num_runs": int,
        "losses": dict,
    }
    values = _take(values, where, optional, **kinds)
    if values["arm"] is not None:
        _arms([values["arm"]], f"{where}: arm")
    runs = values.pop("runs")
    if runs:
        values |= {"num_runs": len(runs), "deviation": statistics.stdev(runs)}
    values["losses"] = {epoch: tuple(losses) for epoch, losses in values["losses"].items()}
    return Published(**values)


def _arms(arms: list[Any], where: str) -> tuple[Optimizer, ...]:
    for arm in arms:
        if arm not in get_args(Optimizer):
            raise ValueError(f"{where} must be among {', '.join(get_args(Optimizer))}, got {arm!r}")
    return tuple(arms)


def _take(values: Any, where: str, optional: Mapping[str, Any] | None = None, **kinds: type) -> dict[str, Any]:
    """The entries of a mapping, all there and of their kinds, and no others."""
    optional = optional or {}
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold {', '.join(kinds)}, got {values!r}")
    for name in values:
        if name not in kinds:
            raise ValueError(f"{where}: unknown entry {name!r}; it may hold {', '.join(kinds)}")
    taken = {}
    for name, kind in kinds.items():
        if name not in values:
            if name not in optional:
                raise ValueError(f"{where}: {name} is missing")
            taken[name] = optional[name]
        elif not isinstance(values[name], kind):
            raise ValueError(f"{where}: {name} must be a {kind.__name__}, got {values[name]!r}")
        else:
            taken[name] = values[name]
    return taken
