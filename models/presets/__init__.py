"""Published settings by name: one YAML file each, next to this one, of fields of a model's configuration."""

from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, get_origin, get_type_hints

from models.architectures.registry import DEFAULT, model_class
from models.checks import near
from models.config import TrainConfig
from models.validation import check, partial, read_yaml

FOLDER = Path(__file__).parent
LISTED = 20  # of more names, one that is alike says more than all


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
      Values by the name of the field, of the fields' types.

    Raises:
      ValueError: if there is no such preset, or it is no mapping from fields to values of their types.
    """
    path = find(name_or_path, FOLDER, kind="preset")
    return checked_fields(read_yaml(path), where=str(path))


def find(name_or_path: str | PathLike[str], folder: Path, *, kind: str) -> Path:
    """The file that is meant by a name in ``folder``, or by a path with a suffix of YAML.

    Raises:
      ValueError: if there is none; it lists the names, or says which of many is alike.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{name_or_path}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in folder.glob("*.yaml"))
        alike = near(str(name_or_path), known, most=4) if len(known) > LISTED else ""
        advice = alike or f"; give one of {', '.join(known)}, or a .yaml file"
        raise ValueError(f"{kind}: {str(name_or_path)!r} does not exist{advice}")
    return path


def checked_fields(values: Any, *, where: str, model: str | None = None) -> dict[str, Any]:
    """Values of fields of a model's configuration, turned into the fields' types where nothing is lost.

    Args:
      values: as read from a file: a mapping.
      where: what the error calls that file.
      model: whose fields they are; None: those of the model that they name, or that all models share.

    Raises:
      ValueError: if a field is unknown or a value is of another type.
    """
    if model is None and isinstance(values, dict):
        model = values.get("model", DEFAULT)
    try:
        config_class = model_class(model).config_class if isinstance(model, str) else TrainConfig
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    hints = {name: hint for name, hint in get_type_hints(config_class).items() if get_origin(hint) is not ClassVar}
    kind = partial("Settings", tuple(hints.items()))
    return check(values, kind, where=where, known="the fields are the options of 'python -m models train --help'")
