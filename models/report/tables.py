"""The tables of the page: lines of text, made from the arms of a group."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from models.config import SELECTION
from models.evaluation.groups import COUNTED
from models.report.runs import Arm, Group, ReportedRun

NONE = "–"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure in a table.

    Attributes:
      value: the mean and, of several seeds, ± their standard deviation.
      gain: over the plain arm, with p; empty: there is none.
      better: whether the gain is one.
    """

    value: str
    gain: str = ""
    better: bool = False


@dataclasses.dataclass(frozen=True)
class Line:
    """An arm in a table.

    Attributes:
      label: the arm.
      note: what is behind the label.
      figures: one a column.
    """

    label: str
    note: str
    figures: Sequence[Figure]


@dataclasses.dataclass(frozen=True)
class MetricTable:
    """A table of figures.

    Attributes:
      title: what it shows.
      columns: names of the figures.
      lines: one an arm.
    """

    title: str
    columns: Sequence[str]
    lines: Sequence[Line]


def spread(values: Sequence[float]) -> str:
    """Mean, and of several values ± standard deviation.

    >>> spread([0.25]), spread([0.25, 0.75]), spread([])
    ('0.2500', '0.5000 ± 0.3536', '–')
    """
    if not values:
        return NONE
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def gain_words(relative: float | None, p_value: float | None) -> str:
    """A gain and its p.

    >>> gain_words(0.0631, 0.0123), gain_words(0.0631, None), gain_words(None, None)
    ('+6.3%, p = 0.012', '+6.3%', '')
    """
    if relative is None:
        return ""
    return f"{relative:+.1%}" + ("" if p_value is None else f", p = {p_value:.2g}")


def summary(group: Group) -> MetricTable:
    """The metric that epochs are chosen by, and what it took, an arm a line."""
    lines = []
    for arm in group.arms:
        best = [run.result["best_epoch"] for run in arm.finished]
        seconds = [
            run.result["epoch_seconds"] / (run.result.get("seeds_together") or 1)
            for run in arm.finished
            if run.result.get("epoch_seconds") is not None
        ]
        figures = [
            Figure(str(len(arm.runs))),
            metric_figure(group, arm, SELECTION),
            Figure(spread(arm.values(SELECTION, "validation"))),
            Figure(", ".join(map(str, best)) or NONE),
            Figure(str(arm.config.epochs)),
            Figure(f"{statistics.median(seconds):.2f}" if seconds else NONE),
        ]
        lines.append(Line(arm.label, _note(group, arm), figures))
    columns = ["seeds", f"test {SELECTION}", f"validation {SELECTION}", "best epoch", "epochs", "s/epoch"]
    return MetricTable(f"Test {SELECTION}, and what it took", columns, lines)


def all_metrics(group: Group) -> MetricTable:
    """Every test metric, an arm a line."""
    lines = [
        Line(arm.label, "", [metric_figure(group, arm, name) for name in group.metrics])
        for arm in group.arms
        if arm.finished
    ]
    return MetricTable("All test metrics", group.metrics, lines)


def metric_figure(group: Group, arm: Arm, metric: str) -> Figure:
    """A test metric of an arm, and its gain over the plain arm."""
    values, base = arm.values(metric), group.baseline(arm)
    if not values or base is None or not base.values(metric):
        return Figure(spread(values))
    found = arm.gain(base, metric)
    better = found.relative is not None and found.relative > 0
    return Figure(spread(values), gain_words(found.relative, found.p_value), better)


def by_group(group: Group) -> list[MetricTable]:
    """The chosen metric of groups of users, an arm a line, for every grouping that all results have."""
    finished = [run for arm in group.arms for run in arm.finished]
    groupings = [_groups(run.result) for run in finished]
    tables = []
    for grouping in groupings[0] if groupings else ():
        if not all(grouping in found for found in groupings):
            continue
        names = [name for name, values in groupings[0][grouping].items() if SELECTION in values]
        users = [groupings[0][grouping][name]["users"] for name in names]
        columns = [f"{name} ({count:,} users)" for name, count in zip(names, users, strict=True)]
        lines = []
        for arm in group.arms:
            figures = []
            for name in names:
                mine = _values(arm, grouping, name)
                base = group.baseline(arm)
                if base is None:
                    figures.append(Figure(spread(mine)))
                    continue
                over = arm.gain(base, SELECTION, test=partial(_users, grouping, name))
                better = over.relative is not None and over.relative > 0
                figures.append(Figure(spread(mine), gain_words(over.relative, over.p_value), better))
            if arm.finished:
                lines.append(Line(arm.label, "", figures))
        if names:
            title = f"Test {SELECTION} by {grouping}: {COUNTED.get(grouping, grouping)}"
            tables.append(MetricTable(title, columns, lines))
    return tables


def _groups(result: Mapping[str, Any]) -> Mapping[str, Mapping[str, Mapping[str, float]]]:
    return result.get("groups") or {}  # results of earlier versions have none


def _users(grouping: str, name: str, run: ReportedRun) -> Mapping[str, float]:
    """The metrics of a group of users."""
    return _groups(run.result).get(grouping, {}).get(name, {})


def _values(arm: Arm, grouping: str, name: str) -> list[float]:
    found = [_users(grouping, name, run) for run in arm.finished]
    return [values[SELECTION] for values in found if SELECTION in values]


def _note(group: Group, arm: Arm) -> str:
    """What a reader must know of an arm: missing runs, and what its gain is over, if that is not plain to see."""
    notes = []
    missing = len(arm.runs) - len(arm.finished)
    if missing:
        epochs = max((len(run.history) for run in arm.runs if run.result is None), default=0)
        notes.append(f"{missing} not finished, {epochs} epochs so far")
    if arm.runs[0].remark:
        notes.append(f"made by an earlier version, which {arm.runs[0].remark}")
    base = group.baseline(arm)
    if base is not None and sum(x.optimizer == base.optimizer for x in group.arms) > 1:
        notes.append(f"gain over {base.label}")
    return "; ".join(notes)
