"""What is searched: options of a model, each in a range or among some values."""

import dataclasses
import itertools
import types
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from models.architectures.registry import model_class
from models.checks import GRAPH_OPTIONS, LOSS_OPTIONS, Heeded, check_heeded, shortened, unheeded
from models.config import SourceConfig, TrainConfig

FORMS = "NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B,C"
# The ranges of names that are given none. A decay in the gradient (adam, sgd) is felt at far smaller values.
USUAL = {
    "learning_rate": "1e-4:1e-2:log",
    "weight_decay": "1e-3:1:log",
    "dropout_rate": "0:0.7",
    "beta": "0.3:0.999",
    "num_layers": "1:4",
    "max_hops": "1:3",
}
DECAY_IN_GRADIENT = "1e-8:1e-2:log"
# What names and describes a run, or decides what it is measured by: not the search's to choose.
FIXED = (
    *(field.name for field in dataclasses.fields(SourceConfig)),
    *("model", "epochs", "eval_every", "patience", "ks", "exclude_seen", "seed"),
    *("per_user", "diagnostics", "keep_epochs", "logger"),
    *("graph_weights", "vectors", "attributes", "attribute_item_column", "attribute_column"),
)


class Trial(Protocol):
    """What is asked for values: a trial of optuna, which is not imported for it."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float:
        """A number of a range."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool) -> int:
        """A whole number of a range."""

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        """One of some texts."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included.

    Attributes:
      name: the field.
      low: the smallest; whole numbers are searched where it and ``high`` are of the type int.
      high: the largest.
      log: whether equal factors count alike, not equal differences.
    """

    name: str
    low: float
    high: float
    log: bool = False

    def suggest(self, trial: Trial) -> float:
        """A value for a trial."""
        ask = trial.suggest_int if isinstance(self.low, int) else trial.suggest_float
        return ask(self.name, self.low, self.high, log=self.log)

    def stored(self, value: Any) -> Any:
        """What the search calls a value of the field; None: it is outside."""
        return value if isinstance(value, int | float) and self.low <= value <= self.high else None

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that must be allowed for all to be."""
        return (self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Choices:
    """Some values.

    Attributes:
      name: the field.
      values: value by the text that stood on the command line.
    """

    name: str
    values: Mapping[str, Any]

    def suggest(self, trial: Trial) -> Any:
        """A value for a trial."""
        return self.values[trial.suggest_categorical(self.name, list(self.values))]

    def stored(self, value: Any) -> Any:
        """What the search calls a value of the field; None: it is not among them."""
        return next((text for text, mine in self.values.items() if mine == value), None)

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that must be allowed for all to be."""
        return tuple(self.values.values())


@dataclasses.dataclass(frozen=True)
class Space:
    """A configuration, and which of its options are searched.

    Attributes:
      base: the configuration of everything else.
      searched: the options, those that decide about others first.
      kept: where the graph or the loss is searched, values of what belongs to one of them, such as the table of
        attributes or the number of negatives: trials that have that graph or loss hold them, no others may.
    """

    base: TrainConfig
    searched: tuple[Range | Choices, ...]
    kept: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """Values for a trial, by field, of those options that count with the others' values."""
        values: dict[str, Any] = {}
        for option in self.searched:
            if heeds(self._with(values), option.name):
                values[option.name] = option.suggest(trial)
        return values

    def config(self, values: Mapping[str, Any]) -> TrainConfig:
        """The checked configuration with these values.

        Raises:
          ValueError: if they do not fit together.
        """
        return self._with(values).checked()

    def start(self) -> dict[str, Any] | None:
        """The configuration's own values as the search calls them; None: one is not in its range."""
        found = {
            option.name: option.stored(getattr(self.base, option.name))
            for option in self.searched
            if heeds(self.base, option.name)
        }
        return None if None in found.values() else found

    def describe(self) -> list[str]:
        """The options as :func:`parse_space` reads them."""
        return [_describe(option) for option in self.searched]

    @property
    def called(self) -> dict[str, str]:
        """What stands on the command line before a further value, by option: see ``check_heeded``."""
        return {option.name: f"search {text}," for option, text in zip(self.searched, self.describe(), strict=True)}

    def variants(self) -> list[TrainConfig]:
        """Configurations of which one heeds an option if any trial's does.

        They have every choice, and both ends of every range, of the searched options that others need.
        """
        names = [option.name for option in self.deciding]
        return [
            self._with(dict(zip(names, values, strict=True)))
            for values in itertools.product(*(option.ends for option in self.deciding))
        ]

    @property
    def deciding(self) -> list[Range | Choices]:
        """The searched options that others need, searched or not."""
        needed = set().union(*(_needs(name, self.base.heeded) for name in self.base.heeded))
        return [option for option in self.searched if option.name in needed]

    def _with(self, values: Mapping[str, Any]) -> TrainConfig:
        return _holding(
            {x: y for x, y in self.kept.items() if x not in values}, dataclasses.replace(self.base, **values)
        )


def _belonging(config: TrainConfig, deciding: Collection[str]) -> dict[str, Any]:
    """The values of the options that belong to one graph or one loss, if the graph or the loss is among the names."""
    names = {*(GRAPH_OPTIONS if "graph" in deciding else ()), *(LOSS_OPTIONS if "loss" in deciding else ())}
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name in names}


def _holding(kept: Mapping[str, Any], config: TrainConfig) -> TrainConfig:
    """The configuration with those of the values that its graph and loss may hold, and the usual ones of the others."""
    usual = {field.name: field.default for field in dataclasses.fields(config)}
    held = {name: GRAPH_OPTIONS.get(name) in config.graph or config.loss in LOSS_OPTIONS.get(name, ()) for name in kept}
    return dataclasses.replace(config, **{name: kept[name] if held[name] else usual[name] for name in kept})


def heeds(config: TrainConfig, name: str) -> bool:
    """Whether an option makes a difference to a configuration.

    >>> from models.architectures.registry import make_config
    >>> heeds(make_config(), "beta"), heeds(make_config(optimizer="adamw"), "beta")
    (True, False)
    >>> heeds(make_config(), "max_hops"), heeds(make_config(graph=("shared-users",)), "max_hops")
    (True, False)
    """
    return unheeded(config, name) is None


def parse_space(texts: Sequence[str], values: Mapping[str, Any]) -> Space:
    """Reads what is searched.

    Args:
      texts: ``name=low:high``, ``name=low:high:log``, ``name=a,b,c``, or a name that has a usual range; none: all
        names with a usual range that the model has and heeds.
      values: the fields of everything else's configuration; ``model`` says of which model.

    Raises:
      ValueError: if a name, a range or a value is not one, or the configuration is not; in one line.

    Examples:
      >>> parse_space(["beta=0.5:0.99", "num-layers=1,3"], {"model": "sasrec"}).describe()
      ['beta=0.5:0.99', 'num-layers=1,3']
    """
    kind = model_class(values["model"]).config_class
    attributes = values.get("attributes")
    given = kind.from_dict(values)
    # What is refused without its graph or loss is here for those trials that have it.
    base = _holding(_belonging(given, ("graph", "loss")), given).checked()
    if not texts:
        usual = {name: _usual(name, base) for name in USUAL if name in _hints(kind)}
        if attributes is not None or model_class(base.model).query == "user":
            usual["graph"] = _usual_graphs(base, attributes)
        texts = [f"{name}={value}" for name, value in usual.items() if heeds(base, name)]
        if not texts:
            raise ValueError(f"search must name options of {base.model}, which has none of {', '.join(USUAL)}")
    kept = _belonging(given, [field_of(text) for text in texts])
    base = _holding(kept, given).checked()
    if "graph" in map(field_of, texts) and base.graph_weights:
        raise ValueError("graph_weights belong to one choice of graphs; leave them out, or do not search for the graph")
    searched = [_parse(text, base, attributes) for text in texts]
    names = [option.name for option in searched]
    if len(set(names)) < len(names):
        raise ValueError(f"search must name each option once, got {' '.join(names)}")
    order = _deciders_first(names, base.heeded)
    searched.sort(key=lambda option: order.index(option.name))
    space = Space(base, tuple(searched), kept)
    asked = {option.name: _describe(option).partition("=")[2] for option in searched}
    check_heeded(space.variants(), asked, called=space.called)
    for option in searched:
        for value in option.ends:
            if option in space.deciding or heeds(base, option.name):
                space.config({option.name: value})
    return space


def _needs(name: str, heeded: Heeded) -> set[str]:
    """The options that decide whether one makes a difference."""
    return {condition.option for condition in heeded.get(name, ())} - {name}


def _deciders_first(names: Sequence[str], heeded: Heeded) -> list[str]:
    """The names with those first that others among them need; else as they come."""
    order: list[str] = []

    def add(name: str) -> None:
        for needed in (x for x in names if x in _needs(name, heeded)):
            add(needed)
        if name not in order:
            order.append(name)

    needed = [name for name in names if any(name in _needs(x, heeded) for x in names)]
    for name in (*needed, *names):
        add(name)
    return order


def field_of(text: str) -> str:
    """The name of the field that a text searches, whether or not there is one."""
    return text.partition("=")[0].strip().replace("-", "_")


def _hints(kind: type[TrainConfig]) -> dict[str, Any]:
    """The types of the options that may be searched."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.name not in FIXED}


def _usual(name: str, base: TrainConfig) -> str:
    in_gradient = base.optimizer in ("adam", "sgd", "sevo-adam", "sevo-sgd")
    return DECAY_IN_GRADIENT if name == "weight_decay" and in_gradient else USUAL[name]


def _usual_graphs(base: TrainConfig, attributes: Path | None) -> str:
    users = ["user-item"] if model_class(base.model).query == "user" else []
    theirs = ["attributes", "item-item+attributes"] if attributes is not None else []
    return ",".join(["item-item", *users, *theirs])


def _parse(text: str, base: TrainConfig, attributes: Path | None) -> Range | Choices:
    """One option."""
    name, (_, equals, wanted) = field_of(text), text.partition("=")
    hints = _hints(type(base))
    if name not in hints:
        known = ", ".join(sorted(name.replace("_", "-") for name in hints))
        raise ValueError(f"search: {shortened(text)} names no option that may be searched; those are {known}")
    if not equals:
        if name not in (*USUAL, "graph"):
            raise ValueError(f"search: {name} has no usual range; give {FORMS}, got {shortened(text)}")
        wanted = _usual_graphs(base, attributes) if name == "graph" else _usual(name, base)
    kind = _bare(hints[name])
    if kind in (int, float) and ":" in wanted:
        return _range(name, kind, wanted)
    values = {part.strip(): _value(name, kind, part.strip()) for part in wanted.split(",")}
    if name == "graph":
        named = {graph for value in values.values() for graph in value}
        if "attributes" in named and attributes is None:
            raise ValueError("search: the graph of attributes needs --attributes, a .tsv or .csv with one line an item")
        if "user-item" in named and model_class(base.model).query != "user":
            raise ValueError(f"search: the graph user-item needs a table of users, which {base.model} does not have")
    if len(values) < 2:
        raise ValueError(f"search: {name} must be {FORMS} with two values or more, got {shortened(text)}")
    return Choices(name, values)


def _range(name: str, kind: type, wanted: str) -> Range:
    low, high, *scale = wanted.split(":")
    if scale not in ([], ["log"]):
        raise ValueError(f"search: {name} must be {FORMS}, got {shortened(wanted)}")
    found = Range(name, _value(name, kind, low), _value(name, kind, high), bool(scale))
    if not found.low < found.high:
        raise ValueError(f"search: {name} must ascend from LOW to HIGH, got {shortened(wanted)}")
    if found.log and not found.low > 0:
        raise ValueError(f"search: {name} must begin above 0 to be searched by its logarithm, got {shortened(wanted)}")
    return found


def _bare(kind: Any) -> Any:
    """A type without None."""
    if isinstance(kind, types.UnionType) or get_origin(kind) is Union:
        return next(option for option in get_args(kind) if option is not type(None))
    return kind


def _value(name: str, kind: Any, text: str) -> Any:
    """A text as a value of a field's type."""
    if get_origin(kind) is tuple:
        return tuple(text.split("+"))
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(f"search: {name} must be among {', '.join(get_args(kind))}, got {shortened(text)}")
        return text
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"search: {name} must be among true, false, got {shortened(text)}")
        return text == "true"
    try:
        return kind(text)
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"search: {name} must be made of {what}, as {FORMS}, got {shortened(text)}") from None


def _describe(option: Range | Choices) -> str:
    name = option.name.replace("_", "-")
    if isinstance(option, Choices):
        return f"{name}={','.join(option.values)}"
    return f"{name}={option.low}:{option.high}" + (":log" if option.log else "")
