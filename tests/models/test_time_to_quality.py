"""When an arm is as good as plain AdamW gets at best."""

import json

import numpy as np
import pytest

from models import plots
from models.training import compare
from models.training.run import Result
from models.training.time_to_quality import Course, time_to_quality

ADAMW = {0: [(5, 0.1), (10, 0.3), (15, 0.2)], 1: [(5, 0.2), (10, 0.3), (15, 0.4)], 2: [(5, 0.5)]}
SEVO = {0: [(5, 0.3), (10, 0.2)], 1: [(5, 0.1), (10, 0.39), (15, 0.41)], 3: [(5, 0.9)]}
NEVER = {0: [(5, 0.29)], 1: [(5, 0.3999)]}


def courses(curves, seconds=2.0, steps=7):
    return {seed: Course(points, seconds, steps) for seed, points in curves.items()}


class TestOfRuns:
    def test_each_seed_has_its_own_level(self):
        found = time_to_quality(courses(SEVO, 3.0), courses(ADAMW))
        assert (found.seeds, found.levels) == ([0, 1], [0.3, 0.4])
        assert (found.epochs, found.steps, found.seconds) == ([5, 15], [35, 105], [15.0, 45.0])
        assert found.reached == 2
        assert found.level == pytest.approx(0.35)
        assert (found.mean("epochs"), found.mean("steps"), found.mean("seconds")) == (10, 70, 30)
        assert found.deviation("seconds") == pytest.approx(30 / 2**0.5)
        assert [found.text(x) for x in ("epochs", "steps", "seconds")] == ["10 ± 7", "70 ± 49", "30.0 ± 21.2"]

    def test_itself_after_its_best_epoch(self):
        assert time_to_quality(courses(ADAMW), courses(ADAMW)).epochs == [10, 15, 5]

    def test_not_reached(self):
        found = time_to_quality(courses(NEVER), courses(ADAMW))
        assert (found.epochs, found.steps, found.seconds) == ([None, None],) * 3
        assert [found.text(x, "–") for x in ("epochs", "steps", "seconds")] == ["not reached", "–", "–"]
        assert found.arrival == (None, None, 2)

    def test_some_reach_it(self):
        found = time_to_quality(courses({0: [(5, 0.9)], 1: [(5, 0.1)]}), courses(ADAMW))
        assert (found.reached, found.epochs, found.text("epochs")) == (1, [5, None], "5")
        assert found.arrival == (5, None, 1)

    def test_steps_of_some_are_not_known(self):
        runs = courses(SEVO) | {1: Course(SEVO[1], 2.0, None)}
        found = time_to_quality(runs, courses(ADAMW))
        assert found.steps is None
        assert [found.text(x, "–") for x in ("epochs", "steps")] == ["10 ± 7", "–"]

    def test_nothing_in_common(self):
        assert time_to_quality(courses({7: [(5, 0.1)]}), courses(ADAMW)) is None
        nothing = courses({0: [(5, 0.0), (10, 0.0)]})
        assert time_to_quality(nothing, nothing) is None  # to find nothing is no level to reach
        assert time_to_quality(courses({0: []}), courses(ADAMW)) is None


class TestOfAComparison:
    @pytest.fixture
    def results(self, tmp_path):
        """Runs of three arms, two seeds in a program, without training."""
        found = {}
        for optimizer, curves in {"adamw": ADAMW, "sevo-adamw": NEVER, "sevo-gradient": SEVO}.items():
            found[optimizer] = []
            for seed, points in curves.items():
                folder = tmp_path / f"{optimizer}-{seed}"
                folder.mkdir()
                values = dict(points)
                lines = [{"epoch": x, "loss": 1.0} for x in range(1, max(values) + 1)]
                lines = [
                    x | ({"validation": {"NDCG@10": values[i]}} if (i := x["epoch"]) in values else {}) for x in lines
                ]
                (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
                fields = (1, {"NDCG@10": 0.2}, {"NDCG@10": 0.2}, [1.0], 4.0, 1.0, 1, "cpu", 2, 7)
                found[optimizer].append(Result(optimizer, {"seed": seed}, "invented", *fields))
        return found

    def test_from_the_folders(self, results, tmp_path):
        reached = compare.times_to_quality(compare.read_courses(results, tmp_path))
        assert reached["sevo-gradient"] == time_to_quality(courses(SEVO), courses(ADAMW))  # 4 s of two seeds: 2 s each
        lines = compare.time_table(reached).splitlines()
        assert [line.split("  ")[0].split()[0] for line in lines] == [
            "optimizer",
            "adamw",
            "sevo-adamw",
            "sevo-gradient",
        ]
        assert lines[0].split() == ["optimizer", "seeds", "epochs", "steps", "seconds"]
        assert "0 of 2" in lines[2]
        assert "not reached" in lines[2]
        assert lines[3].split()[1:] == ["2", "of", "2", "10", "±", "7", "70", "±", "49", "20.0", "±", "14.1"]

    def test_as_json(self, results, tmp_path):
        reached = compare.times_to_quality(compare.read_courses(results, tmp_path))
        report = json.loads(json.dumps(compare.summary(results, reached)))["time_to_quality"]
        assert report["sevo-gradient"]["epochs"] == [5, 15]
        assert report["sevo-gradient"]["mean"] == {"epochs": 10, "steps": 70, "seconds": 20}
        assert report["sevo-adamw"]["mean"] == {"epochs": None, "steps": None, "seconds": None}
        assert report["sevo-adamw"]["seeds"] == [0, 1]

    def test_one_arm_is_not_compared(self, results, tmp_path):
        alone = {"adamw": results["adamw"]}
        assert compare.times_to_quality(compare.read_courses(alone, tmp_path)) == {}
        assert compare.times_to_quality({"adamw": {}, "sevo-adamw": courses(SEVO)}) == {}


def test_seeds_are_averaged_by_epoch():
    """One was interrupted and went on: it was evaluated once more."""
    epochs, values = plots._common([[(5, 0.1), (10, 0.2), (12, 0.9), (15, 0.3)], [(5, 0.3), (10, 0.4), (15, 0.5)]])
    assert epochs == [5, 10, 15]
    np.testing.assert_array_equal(values, [[0.1, 0.2, 0.3], [0.3, 0.4, 0.5]])


def test_the_picture(tmp_path):
    curves = {"adamw": [ADAMW[0], ADAMW[1]], "sevo-gradient": [SEVO[1]]}
    plots.validation_curves(curves, tmp_path / "without.png")
    arrivals = {"adamw": plots.Arrival(12.5, 3.5, 1), "sevo-gradient": plots.Arrival(None)}
    plots.validation_curves(curves, tmp_path / "with.png", goal=plots.Goal("best of adamw", 0.35), arrivals=arrivals)
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()
    assert arrivals["adamw"].label("adamw (3 seeds)") == "adamw (3 seeds) after 12 epochs, 1 not"
    assert arrivals["sevo-gradient"].label("x") == "x: not reached"
