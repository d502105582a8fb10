"""What users see: the names, their documentation and their types."""

import inspect
import pydoc
import re
from pathlib import Path

import pytest

import sevo_optax
from sevo_optax import graph

PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name) for module in (sevo_optax, graph) for name in module.__all__
}
FUNCTIONS = {name: thing for name, thing in PUBLIC.items() if inspect.isfunction(thing)}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def test_dir_lists_what_users_may_use_and_nothing_else():
    assert dir(graph) == sorted(graph.__all__)
    assert dir(sevo_optax) == sorted([*sevo_optax.__all__, "__version__"])
    namespace = {}
    exec("from sevo_optax import *\nfrom sevo_optax.graph import *", namespace)
    assert set(namespace) - {"__builtins__"} == {*sevo_optax.__all__, *graph.__all__}


@pytest.mark.parametrize("module", [sevo_optax, graph], ids=lambda module: module.__name__)
def test_help_lists_every_function(module):
    shown = pydoc.plain(pydoc.render_doc(module))
    listed = set(re.findall(r"^    (\w+)\(", shown, re.MULTILINE))
    functions = {name for name in module.__all__ if inspect.isfunction(getattr(module, name))}
    assert listed == functions


@every_function
def test_functions_are_documented_and_typed(name):
    function = FUNCTIONS[name]
    doc = inspect.getdoc(function)
    signature = inspect.signature(function)
    assert function.__module__.startswith("sevo_optax")
    assert doc.splitlines()[0].endswith(".")
    assert signature.return_annotation is not signature.empty
    for section in ("Args:", "Examples:") + (("Returns:",) if signature.return_annotation is not None else ()):
        assert section in doc, f"{name} lacks {section}"
    for parameter in signature.parameters.values():
        assert parameter.annotation is not parameter.empty
        assert re.search(rf"^  {parameter.name}: ", doc, re.MULTILINE), f"{name} does not explain {parameter.name}"
        if parameter.name == "adjacency":
            assert parameter.annotation is graph.Adjacency
    assert not re.search(r"^ *\{\w+\}$", doc, re.MULTILINE)  # nothing is left to fill in


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if callable(thing)])
def test_docstrings_speak_one_dialect(name):
    """Roles and double backticks, arguments and errors in lower case."""
    doc = inspect.getdoc(PUBLIC[name])
    assert "`" not in re.sub(r":\w+:`[^`]*`|``[^`]*``|`[^`]*`_", "", doc)
    for section in re.findall(r"^(?:Args|Raises|Attributes):\n((?:  .*\n?|\n)+)", doc, re.MULTILINE):
        assert not re.findall(r"^  \w+: [A-Z][a-z]+ ", section, re.MULTILINE)


def test_smoothness_says_first_what_is_smoother():
    first = inspect.getdoc(sevo_optax.smoothness).splitlines()[0]
    assert "Dirichlet energy" in first
    assert "smaller is smoother" in first


def test_files_of_the_graph_package_are_short():
    for file in Path(graph.__file__).parent.glob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) < 400, file.name
