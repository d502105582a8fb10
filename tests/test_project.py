"""What the project says about itself agrees with itself: versions, targets, workflows, notebooks."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import sevo_optax
from tests import notebook_outputs
from tests.lowest import lowest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read_yaml(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_one_version():
    citation = read_yaml("CITATION.cff")
    assert PROJECT["version"] == sevo_optax.__version__ == citation["version"]
    assert citation["license"] == PROJECT["license"]
    bibtex = (ROOT / "README.md").read_text(encoding="utf-8")
    assert citation["preferred-citation"]["title"] in bibtex
    assert str(citation["preferred-citation"]["year"]) in bibtex


def test_pythons_are_those_that_workflows_test():
    tested = read_yaml(".github/workflows/tests.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    declared = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert tested == declared
    assert PROJECT["requires-python"] == f">={tested[0]}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_make_targets_alone(path):
    steps = [step for job in read_yaml(path)["jobs"].values() for step in job["steps"]]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands
    for command in commands:
        assert re.fullmatch(r"make [a-z-]+", command), command
        assert f"\n{command.removeprefix('make ')}:" in MAKEFILE


def test_contributing_names_targets_and_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = re.findall(r"\bmake ([a-z-]+) +#", text) + re.search(r"run `make ([a-z -]+)`", text)[1].split()
    assert len(targets) >= 8
    for target in targets:
        assert f"\n{target}:" in MAKEFILE
    for path in re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r"`((?:models|tests|sevo_optax)/[\w/.]*)`", text):
        assert (ROOT / path).exists(), path


def test_every_requirement_of_the_library_has_a_tested_floor():
    pins = dict(pin.split("==") for pin in lowest("library-tests"))
    assert {"jax", "optax", "numpy", "scipy", "flax"} <= set(pins)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_keep_their_outputs(path):
    assert list(notebook_outputs.problems(path)) == []


def test_notebooks_without_outputs_are_found(tmp_path, capsys):
    notebook = json.loads((ROOT / "notebooks" / "01_quickstart.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    path = tmp_path / "stripped.ipynb"
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert notebook_outputs.main([str(path)]) == 1
    assert "no outputs" in capsys.readouterr().out
    assert notebook_outputs.main([]) == 0


def test_results_link_to_no_page_that_the_site_does_not_have():
    """The site shows the results as one page, from another folder: pictures are found there, other pages are not."""
    text = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((?!https:|#)[^)]*\.md", text) == []
