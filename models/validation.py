"""Reading YAML files, and checking them against the types of Python."""

import difflib
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

import pydantic
import yaml
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from models.checks import check_text, shortened

# More values come of aliases of aliases of aliases only.
LARGEST_FILE = 10**6
# Numbers are numbers, nothing else turns into one, and nothing is passed over.
STRICT = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

# What YAML calls what the validator calls otherwise.
WORDS = {"a valid array": "a list", "an object": "a mapping", " after validation": ""}


class _Loader(yaml.SafeLoader):
    """YAML without its traps: 010 is not 8, 1:30 not 90, 1e-3 a number, a date text, and no name stands there twice."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # its own, without those of its parent

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands there twice", key.start_mark)
            names.add(str(key.value))
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", list("yYnNtTfFoO")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
]:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


class _Dumper(yaml.SafeDumper):
    """Quotes the text that :class:`_Loader` would take for something else."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = _Loader.yaml_implicit_resolvers


def dump_yaml(values: Mapping[str, Any]) -> str:
    """A mapping as YAML that :func:`read_yaml` reads as it was, in the same order.

    >>> print(dump_yaml({"split_times": ["1e9", "010"], "epochs": 5}), end="")
    split_times:
    - '1e9'
    - 010
    epochs: 5
    """
    return str(yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False))


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping.

    Raises:
      ValueError: if it is not YAML or not a mapping; it names the file and the line.
      OSError: if it cannot be read.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold lines 'name: value', got {type(values).__name__}")
        _check_contents(values, path)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not YAML: not text in UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read"
        raise ValueError(f"{path}{where} is not YAML: {problem}") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except ValueError as error:
        # Python's own, of a number with too many digits or a date that there is not.
        raise error if str(path) in str(error) else ValueError(f"{path} is not YAML: {error}") from None
    return values


def check(values: Any, kind: Any, *, where: str, known: str | None = None) -> Any:
    """Checks a value read from YAML against a type, strictly: no number is made of a text, and no name is unknown.

    Args:
      values: as :func:`read_yaml` gives them.
      kind: any type that pydantic knows, such as a ``TypedDict``.
      where: what the error calls the place of the values.
      known: what the error says of the names that there are; None: it lists them.

    Returns:
      The value, with lists as tuples and texts as paths where the type says so.

    Raises:
      ValueError: with one line that names the place, the value seen and the values wanted.
    """
    try:
        # JSON has lists and texts only, so that even strictly they become tuples and paths.
        return _adapter(kind).validate_json(json.dumps(values, default=str))
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None
    except pydantic.ValidationError as error:
        errors = error.errors(include_url=False)
        # A name that is misspelt explains why another is missing.
        first = next((x for x in errors if x["type"] == "extra_forbidden"), errors[0])
        raise ValueError(_one_line(first, kind, where, known)) from None


@functools.cache
def partial(name: str, hints: tuple[tuple[str, Any], ...]) -> Any:
    """A mapping that may hold each of some names, with values of their types, and no others."""
    fields = dict(hints)
    found = TypedDict(name, fields, total=False)
    found.__pydantic_config__ = STRICT
    return found


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(kind)


def _check_contents(values: Any, path: Path) -> None:
    """Refuses aliases without end, and text that nothing else could hold."""
    waiting, seen = [values], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if seen > LARGEST_FILE:
            raise ValueError(f"{path} holds more than {LARGEST_FILE:,} values, aliases counted; make it smaller")
        if isinstance(value, str):
            try:
                check_text([value])
            except ValueError as error:
                raise ValueError(f"{path}: a text{str(error).removeprefix('the command line')}") from None
        elif isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value


def _one_line(error: Any, kind: Any, where: str, known: str | None) -> str:
    """The validator's first complaint in one line."""
    *outer, last = error["loc"] or ("",)
    if last == "[key]":
        *outer, last = outer
    if error["type"] == "extra_forbidden":
        names = _names_at(kind, outer)
        near = difflib.get_close_matches(str(last), names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else (known or f"the fields are {', '.join(names)}")
        return f"{_place(where, outer)}: unknown field {str(last)!r}; {hint}"
    if error["type"] == "missing":
        return f"{_place(where, [*outer, last])} is missing"
    text = error["msg"]
    for theirs, ours in WORDS.items():
        text = text.replace(theirs, ours)
    place = _place(where, [*outer, last] if error["loc"] else [])
    place += text.removeprefix("Input") if text.startswith("Input ") else f": {text[0].lower()}{text[1:]}"
    return f"{place}, got {shortened(error['input'])}"


def _place(where: str, names: list[Any]) -> str:
    """A place in a file, entries of lists counted from 1."""
    text = where
    for name in names:
        text += f" {name + 1}" if isinstance(name, int) else f": {name}"
    return text


def _names_at(kind: Any, names: list[Any]) -> list[str]:
    """The names that the mapping at a place of a type may hold."""
    for name in names:
        kind = _inside(kind, name)
    return sorted(get_type_hints(kind))


def _inside(kind: Any, name: Any) -> Any:
    """The type of an entry."""
    if get_origin(kind) in (list, dict):
        return get_args(kind)[-1]
    return get_type_hints(kind)[name]
