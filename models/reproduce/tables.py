"""What to reproduce: tables and figures declared in YAML, in ``models/reproduce/tables``.

A table has datasets, arms and rows; a row is a preset (or a model) on a dataset, trained with every arm, for every
value of what it varies, and holds the published figures to compare with. A figure is a table that says how it is drawn.
See ``table-4.yaml`` for an example.
"""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, with_config
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from models.architectures.registry import config_from_dict, model_class
from models.config import SELECTION, SMOOTHING, Optimizer, TrainConfig
from models.presets import checked_fields, find, load_preset
from models.validation import STRICT, check, read_yaml

FOLDER = Path(__file__).parent / "tables"
METRICS = ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10")
# The arms without smoothing.
PLAIN: tuple[Optimizer, ...] = ("adam", "adamw", "sgd")
# The plain arms that a smoothed one is compared with. The paper's plain rows are Adam's, with settings of its own.
BASELINES: dict[Optimizer, tuple[Optimizer, ...]] = {
    "adamw": ("adam",),
    "sevo-adamw": ("adam", "adamw"),
    "sevo-gradient": ("adam", "adamw"),
    "sevo-gradient-uncorrected": ("adam", "adamw"),
    "sevo-adam": ("adam",),
    "sevo-sgd": ("sgd",),
}


# Fields that no row may set.
DECIDED = {
    "seed": "every row is trained with seeds 0, 1, …",
    "data": "the dataset says where they are",
    "attributes": "the dataset says where they are",
    "vectors": "the row's teacher has them",
}

AtLeastOne = Annotated[int, Field(ge=1)]
PictureKind = Literal["curves", "loss", "lines", "bars", "smoothness", "gains", "times", "maps"]
Measured = Literal["raw update", "smoothed update", "embedding"]


@with_config(STRICT)
class PublishedFile(TypedDict):
    """Published figures, as a file gives them.

    ``runs`` are single NDCG@10 instead of their number and deviation; ``readings`` losses of which only one is known.
    """

    label: NotRequired[str]
    arm: NotRequired[Optimizer]
    settings: NotRequired[dict[str, Any]]
    metrics: NotRequired[dict[Literal[METRICS], float]]  # type: ignore[valid-type]  # a tuple, which pydantic takes
    runs: NotRequired[Annotated[list[float], Field(min_length=2)]]
    num_runs: NotRequired[AtLeastOne]
    deviation: NotRequired[Annotated[float, Field(ge=0)]]
    losses: NotRequired[dict[AtLeastOne, tuple[float, float, float]]]
    readings: NotRequired[dict[AtLeastOne, float]]
    smoothness: NotRequired[dict[Measured, float]]


@with_config(STRICT)
class RowFile(TypedDict):
    """A row, as a file gives it."""

    title: str
    dataset: str
    preset: NotRequired[str]
    model: NotRequired[str]
    name: NotRequired[Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]]
    arms: NotRequired[Annotated[list[Optimizer], Field(min_length=1)]]
    presets: NotRequired[dict[Optimizer, str]]
    settings: NotRequired[dict[str, Any]]
    vary: NotRequired[dict[str, Annotated[list[Any], Field(min_length=1)]]]
    published: NotRequired[list[PublishedFile]]
    teacher: NotRequired[str]
    seeds: NotRequired[AtLeastOne]


@with_config(STRICT)
class DatasetFile(TypedDict):
    """A dataset, as a file gives it."""

    file: str
    attributes: NotRequired[str]
    public: dict[str, Any]


@with_config(STRICT)
class PictureFile(TypedDict):
    """How a table is drawn, as a file gives it."""

    kind: PictureKind
    over: NotRequired[list[str]]
    groups: NotRequired[dict[str, list[str]]]


@with_config(STRICT)
class GainFile(TypedDict):
    """A published average gain, as a file gives it."""

    subject: str
    arm: Optimizer
    settings: NotRequired[dict[str, Any]]
    gain: float


@with_config(STRICT)
class TimesFile(TypedDict):
    """Published seconds, as a file gives them."""

    training: NotRequired[float]
    inference: NotRequired[float]


@with_config(STRICT)
class TableFile(TypedDict):
    """A table, as a file gives it."""

    title: str
    description: str
    label: str
    datasets: Annotated[dict[str, DatasetFile], Field(min_length=1)]
    arms: Annotated[list[Optimizer], Field(min_length=1)]
    picture: NotRequired[PictureFile]
    gains: NotRequired[list[GainFile]]
    times: NotRequired[dict[str, dict[Optimizer, TimesFile]]]
    seeds: NotRequired[AtLeastOne]
    rows: NotRequired[Annotated[list[RowFile], Field(min_length=1)]]
    include: NotRequired[Annotated[list[str], Field(min_length=1)]]


@with_config(STRICT)
class RowsFile(TypedDict):
    """More rows of a table, in a file of their own."""

    rows: Annotated[list[RowFile], Field(min_length=1)]


@dataclasses.dataclass(frozen=True)
class Published:
    """Published test figures.

    Attributes:
      label: whose they are.
      metrics: means by name.
      arm: the optimizer they are to be compared with; None: none of ours.
      settings: the values, of what the row varies, that they are for; those left out do not matter.
      num_runs: how many runs the means are of.
      deviation: standard deviation of NDCG@10 over these runs; None: not known.
      losses: least, mean and largest training loss of the runs, by epoch.
      smoothness: Dirichlet energies after the last epoch, by what was measured.
    """

    label: str
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    arm: Optimizer | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    num_runs: int | None = None
    deviation: float | None = None
    losses: dict[int, tuple[float, float, float]] = dataclasses.field(default_factory=dict)
    smoothness: dict[Measured, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SeedGroup:
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
        settings = settings_in_words(self.settings)
        return f"{self.arm} ({settings})" if settings else self.arm

    def baseline(self, arm: Optimizer) -> "SeedGroup":
        """The group of a plain arm that this one is compared with."""
        return SeedGroup(self.row, arm, {name: x for name, x in self.settings.items() if name not in SMOOTHING})

    @property
    def published(self) -> Published | None:
        """The published figures to compare with: those for this arm and these settings."""
        return next(
            (x for x in self.row.published if x.arm == self.arm and x.settings.items() <= self.settings.items()), None
        )

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
      teacher: the name of the row whose trained item vectors make its graph of nearest neighbours; None: it has none.
      seeds: no more are trained than these; None: as many as the table's.
    """

    title: str
    dataset: str
    fields: dict[str, Any]
    own_fields: dict[Optimizer, dict[str, Any]]
    arms: tuple[Optimizer, ...]
    vary: dict[str, list[Any]]
    published: tuple[Published, ...]
    given_name: str | None = None
    teacher: str | None = None
    seeds: int | None = None

    @property
    def config(self) -> TrainConfig:
        """The checked configuration, apart from the data and the arm."""
        return config_from_dict(self.fields | {"optimizer": self.arms[0]})

    @property
    def subject(self) -> str:
        """The title without the dataset: rows of several datasets that belong together share it."""
        return self.title.rpartition(" on ")[0] or self.title

    @property
    def closed_form(self) -> bool:
        """Whether there is nothing to train, so that one seed says everything."""
        return model_class(self.fields["model"]).feed == "none"

    @property
    def name(self) -> str:
        """Of files: dataset, model and loss, or what the table calls it."""
        if self.given_name is not None:
            return self.given_name
        loss = "" if self.closed_form else f"-{self.config.loss}"
        return f"{self.dataset}-{self.fields['model']}{loss}"

    @property
    def groups(self) -> list[SeedGroup]:
        """The cells but for their seeds; those that complete a comparison stand together."""
        found = []
        for values in itertools.product(*self.vary.values()):
            settings = dict(zip(self.vary, values, strict=True))
            for arm in self.arms:
                group = SeedGroup(self, arm, settings)
                if arm in PLAIN:
                    group = group.baseline(arm)
                if group not in found:
                    found.append(group)
        return found

    def published_for(self, arm: Optimizer) -> Published | None:
        """The published figures of an arm that do not depend on what is varied."""
        return next((x for x in self.published if x.arm == arm and not x.settings), None)

    @property
    def published_plain(self) -> Published | None:
        """What published gains are over: the paper's plain row is Adam's, and other sources name theirs AdamW."""
        return next((x for arm in PLAIN if (x := self.published_for(arm)) is not None and x.metrics), None)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Where the interactions are.

    Attributes:
      file: the file's name in the data folder, 'user item item …' a line.
      public: fields of ``TrainConfig`` that fetch a public build of it instead.
      attributes: the name of the file with the items' attributes in that folder; None: there is none.
    """

    file: str
    public: dict[str, Any]
    attributes: str | None = None

    def fields(self, data_dir: Path | None) -> dict[str, Any]:
        """The fields of ``TrainConfig`` that say where the data are: in a folder; None: in a public place."""
        return self.public if data_dir is None else {"data": data_dir / self.file}


@dataclasses.dataclass(frozen=True)
class Picture:
    """How a table is drawn.

    Attributes:
      kind: curves: validation NDCG@10 and training loss over epochs, of each row. loss: the training loss alone. lines:
        test NDCG@10 over what is varied, of each row. bars: test NDCG@10 of every arm, of each row. smoothness: the
        Dirichlet energies over what is varied. gains: average gains of each subject. times: seconds of an epoch and of
        an inference. maps: item tables in two dimensions, after the epochs that they were kept after.
      over: lines, smoothness, maps: the settings on the horizontal axis (maps: the vertical one), of which each row
        varies one.
      groups: maps: attributes of items by the name of their colour group.
    """

    kind: PictureKind = "curves"
    over: tuple[str, ...] = ()
    groups: dict[str, list[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PublishedGain:
    """A published gain, averaged over data sets and metrics.

    Attributes:
      subject: the :attr:`Row.subject` of the rows that are averaged.
      arm: the optimizer.
      settings: the values of what the rows vary.
      gain: relative, over the paper's plain rows.
    """

    subject: str
    arm: Optimizer
    gain: float
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Table:
    """A published table or figure, or a question of our own.

    Attributes:
      name: of its file and of the folder of its cells.
      title: for readers.
      description: for readers, what must be known to read it.
      label: whose the published figures are, where they do not say themselves.
      datasets: by name.
      rows: in the order in which they are trained and shown.
      picture: how it is drawn.
      gains: published average gains.
      times: published seconds, ``training`` and ``inference``, by the rows' subject and the arm.
      seeds: no more are trained than these; None: as many as are asked for.
    """

    name: str
    title: str
    description: str
    label: str
    datasets: dict[str, Dataset]
    rows: tuple[Row, ...]
    picture: Picture = dataclasses.field(default_factory=Picture)
    gains: tuple[PublishedGain, ...] = ()
    times: dict[str, dict[Optimizer, dict[str, float]]] = dataclasses.field(default_factory=dict)
    seeds: int | None = None

    @property
    def measured(self) -> bool:
        """Whether it is about what training costs, which a few epochs tell, so that nothing is trained to its end."""
        return self.picture.kind == "times"

    def num_seeds(self, row: Row, asked: int) -> int:
        """How many seeds a row is trained with, where some are asked for."""
        return 1 if row.closed_form else min(asked, self.seeds or asked, row.seeds or asked)

    def teacher(self, group: SeedGroup) -> SeedGroup | None:
        """The group whose item vectors make the graph of another; None: it has no such graph."""
        if group.row.teacher is None or group.arm in PLAIN:
            return None
        return next(row for row in self.rows if row.name == group.row.teacher).groups[0]


def settings_in_words(settings: Mapping[str, Any]) -> str:
    """What is varied, for readers.

    Examples:
      >>> settings_in_words({"beta": 0.9, "moment_correction": False})
      'beta 0.9, no moment correction'
    """

    def words(name: str, value: object) -> str:
        if isinstance(value, bool):
            return ("" if value else "no ") + name.replace("_", " ")
        return f"{name} {value}"

    return ", ".join(words(name, value) for name, value in settings.items())


def table_names() -> list[str]:
    """The tables and figures that exist, in the order of the report.

    >>> table_names()[:2]
    ['table-3', 'table-4']
    """

    def order(name: str) -> tuple[bool, bool, str]:
        return not name.startswith("table-"), not name.startswith("figure-"), name

    return sorted((path.stem for path in FOLDER.glob("*.yaml")), key=order)


@functools.cache
def bundled_tables() -> tuple[Table, ...]:
    """The tables and figures that exist, in the order of the report. They are read once."""
    return tuple(load_table(name) for name in table_names())


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
        name: Dataset(
            source["file"],
            checked_fields(source["public"], where=f"{path}: datasets: {name}: public"),
            source.get("attributes"),
        )
        for name, source in values["datasets"].items()
    }
    arms = tuple(values["arms"])
    if not {"rows", "include"} & set(values):
        raise ValueError(f"{path}: rows is missing; give rows, or include with files that hold them")
    parts = [(path, values.get("rows", []))]
    for other in values.get("include", []):
        file = path.parent / other
        if not file.is_file():
            raise ValueError(f"{path}: include: {file} does not exist")
        parts.append((file, check(read_yaml(file), RowsFile, where=str(file))["rows"]))
    rows = [
        _row(row, f"{file}: rows {i}", path.parent, datasets, arms, values["label"])
        for file, found in parts
        for i, row in enumerate(found, start=1)
    ]
    names = [row.name for row in rows]
    for row in rows:
        if names.count(row.name) > 1:
            raise ValueError(
                f"{path}: two rows are called {row.name}; a dataset, model and loss may stand there once, unless the "
                "rows have names"
            )
        _check_teacher(row, rows, str(path))
    picture = _picture(values.get("picture", {"kind": "curves"}), rows, str(path))
    return Table(
        name=path.stem,
        title=values["title"],
        description=values["description"].strip(),
        label=values["label"],
        datasets=datasets,
        rows=tuple(rows),
        picture=picture,
        gains=tuple(PublishedGain(**gain) for gain in values.get("gains", [])),
        times=values.get("times", {}),
        seeds=values.get("seeds"),
    )


def _picture(values: PictureFile, rows: Sequence[Row], where: str) -> Picture:
    picture = Picture(values["kind"], tuple(values.get("over", ())), values.get("groups", {}))
    if picture.kind == "times":
        for row in rows:
            if row.vary or row.teacher is not None:
                raise ValueError(
                    f"{where}: picture: times measures the arms of a row, so {row.title} must not have "
                    f"{'vary' if row.vary else 'teacher'}; take it out, or draw something else"
                )
    if picture.kind not in ("lines", "smoothness", "maps"):
        return picture
    for row in rows:
        if not row.closed_form and sum(name in row.vary for name in picture.over) != 1:
            raise ValueError(
                f"{where}: picture: over must name one setting that {row.title} varies, got "
                f"{', '.join(picture.over) or 'none'}"
            )
    return picture


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

    if ("preset" in values) == ("model" in values):
        raise ValueError(f"{where}: preset is missing; give a preset, or the model to take its defaults (not both)")
    if "preset" in values:
        fields = fields_of(values["preset"])
    else:
        fields = checked_fields({"model": values["model"]}, where=where)
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
        teacher=values.get("teacher"),
        seeds=values.get("seeds"),
    )
    _check_published(row, where)
    for group in row.groups:
        try:
            group.config()
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return row


def _check_teacher(row: Row, rows: Sequence[Row], where: str) -> None:
    """Checks that a row with a graph of nearest neighbours has a teacher on the same data, which itself has none."""
    wants = [group for group in row.groups if group.arm not in PLAIN and "knn" in getattr(group.config(), "graph", ())]
    if row.teacher is None:
        if wants:
            raise ValueError(
                f"{where}: {row.title}: teacher is missing; graph knn is made of another row's item vectors"
            )
        return
    known = [
        other for other in rows if other.teacher is None and not other.closed_form and other.dataset == row.dataset
    ]
    if row.teacher not in [other.name for other in known]:
        names = ", ".join(other.name for other in known) or "none"
        raise ValueError(
            f"{where}: {row.title}: teacher must be one of {names} (the rows on {row.dataset} without a teacher), got "
            f"{row.teacher!r}"
        )
    if not wants:
        raise ValueError(f"{where}: {row.title}: teacher is not heeded without graph knn, got {row.teacher!r}")


def _settings(values: Mapping[str, Any], where: str, model: str) -> dict[str, Any]:
    """Fields of a run, but for those that the command decides on."""
    for name in DECIDED:
        if name in values:
            raise ValueError(f"{where}: {name} must not stand there; {DECIDED[name]}")
    return checked_fields(values, where=where, model=model)


def _check_published(row: Row, where: str) -> None:
    """Checks that published figures are for something that is trained, and that there is one for each."""
    compared = [x for x in row.published if x.arm is not None]
    for i, published in enumerate(compared):
        for name, value in published.settings.items():
            if value not in row.vary.get(name, ()):
                raise ValueError(
                    f"{where}: published: settings: {name} must be a value that the row varies, got {value}"
                )
        for other in compared[:i]:
            if (other.arm, other.settings) == (published.arm, published.settings):
                with_settings = f" with {published.settings}" if published.settings else ""
                raise ValueError(
                    f"{where}: published: arm {published.arm} stands there twice{with_settings}; it may once"
                )


def _published(values: PublishedFile, where: str, label: str) -> Published:
    runs = values.pop("runs", None)
    if runs is not None:
        for name in ("num_runs", "deviation"):
            if name in values:
                raise ValueError(f"{where}: runs and {name} exclude each other; {name} follows from the runs")
        values |= {"num_runs": len(runs), "deviation": statistics.stdev(runs)}
    readings = values.pop("readings", {})
    if readings:
        values["losses"] = values.get("losses", {}) | {epoch: (x, x, x) for epoch, x in readings.items()}
    if "deviation" in values and "num_runs" not in values:
        raise ValueError(f"{where}: num_runs is missing; a deviation means nothing without it")
    if "metrics" in values and "arm" in values and SELECTION not in values["metrics"]:
        raise ValueError(f"{where}: metrics: {SELECTION} is missing; an arm is compared by it")
    return Published(**{"label": label} | values)
