"""The Python of README and documentation runs, top to bottom, as a reader would run it; their commands exist."""

import contextlib
import functools
import io
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

import sevo_optax
from models.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"
# What a build leaves there is none of ours; the model that architecture.md adds has a test of its own.
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.parent.name != "api" and path.stem != "architecture")
PAGES = [ROOT / "README.md", *PAGES]
PAIR = jnp.array([1, 2]), jnp.array([2, 3])


def pages(mark):
    """A test of every page in which ``mark`` occurs."""
    found = [path for path in PAGES if mark in path.read_text(encoding="utf-8")]
    return pytest.mark.parametrize("path", found, ids=lambda path: path.stem)


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def run(path):
    """Runs the Python of a page; returns what its names stand for in the end."""
    namespace = {"__name__": "page"}
    for snippet in blocks(path.read_text(encoding="utf-8"), "python"):
        exec(compile(snippet, path.name, "exec"), namespace)
    return namespace


@functools.cache
def options(command):
    """The options that a command's help lists."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main([command, "--help"])
    return set(re.findall(r"--[\w-]+", shown.getvalue()))


@pages("```python")
def test_python_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for what a page writes
    assert run(path)


def test_python_of_the_readme_does_what_it_says(capsys):
    assert len(blocks(README, "python")) >= 3
    assert run(ROOT / "README.md")["params"]["item_embedding"].shape == (5, 8)
    assert "nodes       5" in capsys.readouterr().out


def test_models_of_the_guide_learn_with_the_table_found():
    names = run(DOCS / "guides" / "your_model.md")
    assert float(names["step"](names["model"], names["optimizer"], *PAIR)) < float(names["first"])
    assert float(names["linen_step"](names["train_state"], *PAIR)[1]) < float(names["linen_first"])
    assert names["slim"] != names["restored"]


@pages("python -m models")
def test_options_exist(path):
    """Every option that a page gives to ``python -m models`` is one that its help lists."""
    text = path.read_text(encoding="utf-8")
    commands = re.findall(r"python -m models (\w+)((?:[^`\n]|\n(?!python|\n))*)", text)
    if path.name == "README.md":
        assert {command for command, _ in commands} >= {"train", "compare", "graph"}
    for command, rest in commands:
        assert set(re.findall(r"--[\w-]+", rest.split("#")[0])) <= options(command), (command, rest)


@pages("(")
def test_make_targets_and_files_exist(path):
    text = path.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
    for script in re.findall(r"python (benchmarks/\w+\.py)", text):
        assert (ROOT / script).exists(), script
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / link).exists(), link


def test_readme_stays_short():
    assert len(README.splitlines()) <= 200, "move what only some readers need to docs/"


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@[A-Z_]+@", README)


def test_every_public_name_has_a_page():
    lists = re.findall(r"currentmodule:: (\S+)\n(.*?)^```", (DOCS / "api.md").read_text(encoding="utf-8"), re.S | re.M)
    shown = [f"{module}.{name}" for module, names in lists for name in re.findall(r"^   (\w+)$", names, re.M)]
    public = [f"sevo_optax.{name}" for name in sevo_optax.__all__]
    public += [f"sevo_optax.graph.{name}" for name in sevo_optax.graph.__all__]
    assert sorted(shown) == sorted(public)


def test_tests_of_the_theory_exist():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (DOCS / "theory.md").read_text(encoding="utf-8"))
    assert len(named) > 15
    for file, test in named:
        source = (ROOT / "tests" / "sevo_optax" / file).read_text(encoding="utf-8")
        assert f"\ndef {test}(" in source, (file, test)
