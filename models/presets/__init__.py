"""Published settings by name: one YAML file each, next to this one, of fields of ``TrainConfig``."""

from os import PathLike
from pathlib import Path
from typing import Any, get_type_hints

from models.training.config import Optimizer, TrainConfig
from models.validation import check, partial, read_yaml

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
      Values by the name of the field of ``TrainConfig``, of the fields' types, and maybe ``optimizer``.

    Raises:
      ValueError: if there is no such preset, or it is no mapping from fields to values of their types.
    """
    path = find(name_or_path, FOLDER, kind="preset")
    return checked_fields(read_yaml(path), where=str(path), optimizer=True)


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


def checked_fields(values: Any, *, where: str, optimizer: bool = False) -> dict[str, Any]:
    """Values of fields of ``TrainConfig``, turned into the fields' types where nothing is lost.

    Args:
      values: as read from a file: a mapping.
      where: what the error calls that file.
      optimizer: whether ``optimizer`` may stand there, too.

    Raises:
      ValueError: if a field is unknown or a value is of another type.
    """
    hints = get_type_hints(TrainConfig) | ({"optimizer": Optimizer} if optimizer else {})
    kind = partial("Settings", tuple(hints.items()))
    return check(values, kind, where=where, known="the fields are the options of 'python -m models train --help'")
