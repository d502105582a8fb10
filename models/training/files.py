"""Writing files whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path``; an interrupted write leaves what was there before."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, see :func:`write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_history(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a ``history.jsonl``."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
