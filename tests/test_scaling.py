"""The page on scaling and the benchmark that its figures come from."""

import argparse
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_of_the_page_are_those_of_the_formulas(scaling, capsys):
    scaling.model(argparse.Namespace(dim=64, entries=10, layers=3))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 60
    missing = [line for line in lines if line not in page]
    assert not missing, missing[:3]


def test_collectives_are_read_from_compiled_text(scaling):
    text = """
      %a = f32[2,3]{1,0} all-reduce(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%add
      %b = (f32[5]{0}, pred[4]{0}) all-to-all(%y, %z), replica_groups={{0,1},{2,3}}
      %c = s32[8]{0} reduce-scatter(%w), replica_groups=[4,2]<=[8]
      %d = f32[100]{0} add(%a, %b)
    """
    kinds, sent = scaling.collectives(text)
    assert kinds == ["all-reduce", "all-to-all", "reduce-scatter"]
    assert sent == 2 * 3 / 4 * 24 + 1 / 2 * 24 + 32


def test_costs_of_a_small_problem_by_hand(scaling):
    problem = scaling.Problem(nodes=100, entries_per_node=1, dim=8, num_layers=2)
    assert problem.exchanged(4) == pytest.approx(
        25 / 4
    )  # each of 25 rows has one entry, a quarter of which lead to each
    assert problem.sent("columns", 1, 4) == 2 * 3 / 4 * 100
    assert problem.sent("rows", 1, 4) == 2 * 3 / 4 * 100 * 8 * 4 / 4
    assert problem.sent("graph rows", 4, 1) == pytest.approx(2 * 3 * 25 / 4 * 8 * 4)
    assert problem.held(1, 1) == 5 * 3200 + 8 * 100 + 400
    on = scaling.Accelerator("a", memory=1e9, bandwidth=1e9, line=32, domain=2, link=10.0, network=4.0)
    assert on.exchange(9.0, 2) == 0.9
    assert on.exchange(9.0, 4) == 6 * 2 / 4  # two thirds leave the domain, both devices through one port
    torus = scaling.Accelerator("t", memory=1e9, bandwidth=1e9, line=32, domain=64, link=10.0, torus=2)
    assert torus.exchange(80.0, 16) == 4.0
    assert torus.exchange(80.0, 128) is None
