"""The house: what may import what, and the example of the page that describes it."""

import ast
import re
from pathlib import Path

import pytest

from models.__main__ import main
from models.architectures import registry

MODELS = Path(__file__).parents[2] / "models"
# From the ground up: a part may import its own floor and those above it in this list.
FLOORS = [
    ("config", "checks", "files", "compilation", "validation", "plots", "mesh", "processes"),
    ("data", "layers"),
    ("feeds",),
    ("architectures", "presets"),
    ("graphs", "objectives", "memory"),
    ("evaluation",),
    ("training",),
    ("serving",),
    ("reproduce", "tuning"),
    ("report",),
    ("cli",),
    ("__main__",),
]
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}


def imports(path):
    """The parts of ``models`` that a file imports, inside functions and for types too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        if names == ["models"]:
            names = [f"models.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.split(".")[1] for name in names if name and name.startswith("models."))


@pytest.mark.parametrize("path", sorted(MODELS.rglob("*.py")), ids=lambda path: str(path.relative_to(MODELS)))
def test_no_import_runs_up(path):
    part = path.relative_to(MODELS).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    above = {name for name in imports(path) if FLOOR_OF[name] > FLOOR_OF[part]}
    assert not above


def test_the_library_never_imports_the_models():
    for path in (MODELS.parent / "sevo_optax").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) models\b", path.read_text(encoding="utf-8"), re.MULTILINE), path


def test_the_example_of_a_new_model_runs(tmp_path, monkeypatch, capsys):
    page = (MODELS.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    model, registration = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "fading_mean.py").write_text(model)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))
    exec(registration, {})
    out = str(tmp_path / "run")
    small = ["--embedding-dim", "8", "--batch-size", "40", "--eval-every", "1", "--output-dir", out]
    train = ["train", "--model", "fading-mean", "--memory", "0.5", *small]
    assert main([*train, "--epochs", "1"]) == 0
    assert main([*train, "--epochs", "2", "--resume"]) == 0
    capsys.readouterr()
    assert main(["recommend", "--checkpoint", out, "--history", "3", "5", "--k", "2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["rank", "1", "2"]
    assert not {line[1] for line in lines} & {"3", "5"}
    assert main(["train", "--model", "fading-mean", "--num-blocks", "1"]) == 2
    assert "unknown option '--num-blocks'" in capsys.readouterr().err
