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
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, with_config
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from models.architectures.registry import config_from_dict
from models.config import SELECTION, Optimizer, TrainConfig
from models.presets import checked_fields, find, load_preset
from models.validation import STRICT, check, read_yaml

FOLDER = Path(__file__).parent / "tables"
METRICS = ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10")
# What plain AdamW does not depend on.
SMOOTHING = (
    "beta",
    "num_layers",
    "smoothing",
    "rescale",
    "moment_correction",
    "graph",
    "graph_weights",
    "graph_max_length",
    "graph_keep",
    "graph_weighting",
    "max_hops",
)


# Fields that no row may set.
DECIDED = {"seed": "every row is trained with seeds 0, 1, …", "data": "the dataset says where they are"}

AtLeastOne = Annotated[int, Field(ge=1)]


@with_config(STRICT)
class PublishedFile(TypedDict):
    """Published figures, as a file gives them; ``runs`` are single NDCG@10 instead of their number and deviation."""

    label: NotRequired[str]
    arm: NotRequired[Optimizer]
    metrics: dict[Literal[METRICS], float]  # type: ignore[valid-type]  # a tuple, which pydantic takes
    runs: NotRequired[Annotated[list[float], Field(min_length=2)]]
    num_runs: NotRequired[AtLeastOne]
    deviation: NotRequired[Annotated[float, Field(ge=0)]]
    losses: NotRequired[dict[AtLeastOne, tuple[float, float, float]]]


@with_config(STRICT)
class RowFile(TypedDict):
    """A row, as a file gives it."""

    title: str
    dataset: str
    preset: str
    name: NotRequired[Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]]
    arms: NotRequired[Annotated[list[Optimizer], Field(min_length=1)]]
    presets: NotRequired[dict[Optimizer, str]]
    settings: NotRequired[dict[str, Any]]
    vary: NotRequired[dict[str, Annotated[list[Any], Field(min_length=1)]]]
    published: NotRequired[list[PublishedFile]]


@with_config(STRICT)
class DatasetFile(TypedDict):
    """A dataset, as a file gives it."""

    file: str
    public: dict[str, Any]


@with_config(STRICT)
class TableFile(TypedDict):
    """A table, as a file gives it."""

    title: str
    description: str
    label: str
    datasets: Annotated[dict[str, DatasetFile], Field(min_length=1)]
    arms: Annotated[list[Optimizer], Field(min_length=1)]
    rows: Annotated[list[RowFile], Field(min_length=1)]


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
        """The checked configuration, with some more fields."""
        own = self.row.own_fields.get(self.arm, self.row.fields)
        return config_from_dict(own | self.settings | fields | {"optimizer": self.arm})


@dataclasses.dataclass(frozen=True)
class Row:
    """A model with a loss on a dataset.

    Attributes:
      title: for readers.
      dataset: name among the table's datasets.
      fields: fields of the model's configuration.
      own_fields: by arm, the fields of arms that have settings of their own.
      arms: the optimizers.
      vary: values to try, by field.
      published: what to compare with.
      given_name: what the table calls it; None: see :attr:`name`.
    """

    title: str
    dataset: str
    fields: dict[str, Any]
    own_fields: dict[Optimizer, dict[str, Any]]
    arms: tuple[Optimizer, ...]
    vary: dict[str, list[Any]]
    published: tuple[Published, ...]
    given_name: str | None = None

    @property
    def config(self) -> TrainConfig:
        """The checked configuration, apart from the data and the arm."""
        return config_from_dict(self.fields | {"optimizer": self.arms[0]})

    @property
    def name(self) -> str:
        """Of files: dataset, model and loss, or what the table calls it."""
        if self.given_name is not None:
            return self.given_name
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
    values = check(read_yaml(path), TableFile, where=str(path))
    datasets = {
        name: Dataset(source["file"], checked_fields(source["public"], where=f"{path}: datasets: {name}: public"))
        for name, source in values["datasets"].items()
    }
    arms = tuple(values["arms"])
    rows = []
    for i, row in enumerate(values["rows"], start=1):
        rows.append(_row(row, f"{path}: rows {i}", path.parent, datasets, arms, values["label"]))
    names = [row.name for row in rows]
    for row in rows:
        if names.count(row.name) > 1:
            raise ValueError(
                f"{path}: two rows are called {row.name}; a dataset, model and loss may stand there once, unless the "
                "rows have names"
            )
    return Table(path.stem, values["title"], values["description"].strip(), datasets, tuple(rows))


def _row(
    values: RowFile, where: str, folder: Path, datasets: Mapping[str, Any], arms: tuple[Optimizer, ...], label: str
) -> Row:
    if values["dataset"] not in datasets:
        raise ValueError(f"{where}: dataset must be one of {', '.join(datasets)}, got {values['dataset']!r}")
    arms = tuple(values.get("arms", arms))

    def fields_of(preset: str) -> dict[str, Any]:
        found = load_preset(folder / preset if preset.endswith((".yaml", ".yml")) else preset)
        found.pop("optimizer", None)  # the arms say which
        return found

    fields = fields_of(values["preset"])
    model = fields["model"]
    settings = _settings(values.get("settings", {}), f"{where}: settings", model)
    vary = {
        name: [_settings({name: value}, f"{where}: vary", model)[name] for value in tried]
        for name, tried in values.get("vary", {}).items()
    }
    own = {arm: fields_of(preset) | settings for arm, preset in values.get("presets", {}).items()}
    for arm in own:
        if arm not in arms:
            raise ValueError(f"{where}: presets: {arm} must be among the arms {', '.join(arms)}")
    row = Row(
        title=values["title"],
        dataset=values["dataset"],
        fields=fields | settings,
        own_fields=own,
        arms=arms,
        vary=vary,
        published=tuple(
            _published(x, f"{where}: published {i}", label) for i, x in enumerate(values.get("published", []), start=1)
        ),
        given_name=values.get("name"),
    )
    for arm in arms:
        if [x.arm for x in row.published].count(arm) > 1:
            raise ValueError(f"{where}: published: arm {arm} stands there twice; it may once")
    for family in row.families:
        try:
            family.config()
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return row


def _settings(values: Mapping[str, Any], where: str, model: str) -> dict[str, Any]:
    """Fields of a run, but for those that the command decides on."""
    for name in DECIDED:
        if name in values:
            raise ValueError(f"{where}: {name} must not stand there; {DECIDED[name]}")
    return checked_fields(values, where=where, model=model)


def _published(values: PublishedFile, where: str, label: str) -> Published:
    runs = values.pop("runs", None)
    if runs is not None:
        for name in ("num_runs", "deviation"):
            if name in values:
                raise ValueError(f"{where}: runs and {name} exclude each other; {name} follows from the runs")
        values |= {"num_runs": len(runs), "deviation": statistics.stdev(runs)}
    if "deviation" in values and "num_runs" not in values:
        raise ValueError(f"{where}: num_runs is missing; a deviation means nothing without it")
    if "arm" in values and SELECTION not in values["metrics"]:
        raise ValueError(f"{where}: metrics: {SELECTION} is missing; an arm is compared by it")
    return Published(**{"label": label} | values)
