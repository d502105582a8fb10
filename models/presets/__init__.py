"""Published settings by name: one YAML file each, next to this one, of fields of ``TrainConfig``."""

import difflib
import types
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from models.config import TrainConfig

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The presets that exist.

    >>> "sasrec-beauty" in names()
    True
    """
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_preset(name_or_path: str | PathLike[str]) -> dict[str, Any]:
    """The settings of a preset.

    Args:
      name_or_path: a name among :func:`names`, or a YAML file, recognised by its suffix, of your own.

    Returns:
      Values by the name of the field of ``TrainConfig``, of the fields' types.

    Raises:
      ValueError: if there is no such preset, or it is no mapping from fields to values of their types.
    """
    path = find(name_or_path, FOLDER, kind="preset")
    return checked_fields(read_yaml(path), where=str(path))


def find(name_or_path: str | PathLike[str], folder: Path, *, kind: str) -> Path:
    """The file that is meant by a name in ``folder``, or by a path with a suffix of YAML.

    Raises:
      ValueError: if there is none; it lists the names.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise ValueError(f"{kind}: {str(name_or_path)!r} does not exist; give one of {known}, or a .yaml file")
    return path


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping.

    Raises:
      ValueError: if it is not YAML or not a mapping; it names the file and the line.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not text in UTF-8"
        raise ValueError(f"{path}{where} is not YAML: {problem}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold lines 'name: value', got {type(values).__name__}")
    return values


def checked_fields(values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Values of fields of ``TrainConfig``, turned into the fields' types where nothing is lost.

    Args:
      values: as read from a file.
      where: what the error calls that file.

    Raises:
      ValueError: if a field is unknown or a value is of another type.
    """
    hints = get_type_hints(TrainConfig)
    for name in values:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1)
            hint = (
                f"did you mean {near[0]!r}" if near else "the fields are the options of 'python -m models train --help'"
            )
            raise ValueError(f"{where}: unknown field {name!r}; {hint}")
    return {name: _checked(value, hints[name], f"{where}: {name}") for name, value in values.items()}


def _checked(value: Any, hint: Any, where: str) -> Any:
    """The value as what the hint says: a union of types, Literals, paths and tuples."""
    options = get_args(hint) if isinstance(hint, types.UnionType) or get_origin(hint) is Union else (hint,)
    for option in options:
        origin, arguments = get_origin(option), get_args(option)
        if origin is Literal:
            if value in arguments and isinstance(value, str):
                return value
        elif origin is tuple:
            item = arguments[0]
            if isinstance(value, list) and (arguments[-1] is ... or len(value) == len(arguments)):
                return tuple(_checked(x, item, where) for x in value)
        elif option is Path:
            if isinstance(value, str):
                return Path(value)
        elif option is float:
            # YAML takes 1e-3, without a point, for text.
            if not isinstance(value, bool) and isinstance(value, int | float | str):
                try:
                    return float(value)
                except ValueError:
                    pass
        elif type(value) is option:
            return value
    wanted = " or ".join(_wanted(option) for option in options)
    raise ValueError(f"{where} must be {wanted}, got {value!r}")


def _wanted(option: Any) -> str:
    origin, arguments = get_origin(option), get_args(option)
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        return f"a list, each {_wanted(arguments[0])}"
    known = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    return known.get(option, "null")
