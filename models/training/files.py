"""The files of a training run: which there are, and how they are read."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.config import SELECTION

# Where a run keeps the item tables that it was asked for.
EMBEDDINGS = "embeddings"
# What TensorBoard reads, what Weights & Biases keeps for itself, and what the loggers call the run.
TENSORBOARD, WANDB, LOGGERS = "tensorboard", "wandb", "loggers.json"
# All that a run writes. The first says what it is, the second what its items are called.
RUN_FILES = (
    "run.json",
    "items.npz",
    "history.jsonl",
    "result.json",
    "curve.png",
    "per_user.csv",
    "context.npz",
    "users.npz",
    LOGGERS,
)
RUN_FOLDERS = ("checkpoints", TENSORBOARD, WANDB, EMBEDDINGS)


def refuse_run_file(option: str, path: Path | None, directory: Path) -> None:
    """Refuses an output that would replace a file of the training run that is read.

    Args:
      option: what names the output.
      path: the output; None: there is none.
      directory: the run's folder.

    Raises:
      ValueError: if the output is such a file, under whatever name.
    """
    if path is None:
        return
    folders = [(directory / name).resolve() for name in RUN_FOLDERS]
    inside = any(path.resolve().is_relative_to(folder) for folder in folders)
    if inside or any(_is_same(path, directory / name) for name in RUN_FILES):
        raise ValueError(f"{option}: {path} is a file of the run in {directory}; give another file")


def refuse_same(option: str, path: Path | None, others: Mapping[str, Path | None]) -> None:
    """Refuses an output that would replace a file which is read, or another output.

    Args:
      option: what names the output.
      path: the output; None: there is none.
      others: the other files by the options that name them; None: there is none.

    Raises:
      ValueError: if two are the same file, under whatever names.
    """
    for name, other in others.items():
        if path is not None and other is not None and _is_same(path, other):
            raise ValueError(f"{option}: {path} is the file of {name} as well; give another file")


def _is_same(path: Path, other: Path) -> bool:
    """Whether two names mean the same file, also through links; where there is none yet, the same place."""
    if path.exists() and other.exists():
        return path.samefile(other)
    return path.resolve() == other.resolve()


def read_history(path: Path, count: int | None = None) -> list[dict[str, Any]]:
    """Reads the records of a ``history.jsonl``.

    Args:
      path: the file.
      count: how many records; what follows is not looked at. None: all that are whole: of a line that a full disk or a
        kill has cut, nothing is left.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged; it names the file and the line.
    """
    records = []
    lines = path.read_bytes().splitlines(keepends=True)
    if count is None and lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    for number, line in enumerate(lines[:count], start=1):
        try:
            record = json.loads(line)
            intact = record["epoch"] == number and isinstance(record["loss"], float | int)
        except (ValueError, TypeError, KeyError, RecursionError):
            intact = False
        if not intact:
            raise ValueError(f"{path} is damaged: its line {number} is no record of epoch {number}")
        records.append(record)
    return records


def curve(history: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """Points (epoch, validation NDCG@10) of a history."""
    return [(record["epoch"], record["validation"][SELECTION]) for record in history if "validation" in record]
