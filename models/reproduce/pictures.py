"""The pictures of tables and figures: what is drawn, from cells. How it is drawn is in :mod:`models.plots`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models import plots
from models.config import SELECTION, Optimizer
from models.evaluation.groups import COUNTED
from models.reproduce.cells import cell_path
from models.reproduce.maps import Maps
from models.reproduce.summaries import RowCells, Summary, TableCells, average_gains, comparable_rows, with_common_seeds
from models.reproduce.tables import PLAIN, SeedGroup, settings_in_words

TEST = f"test {SELECTION}"
ENERGY = "Dirichlet energy J"
# In groups of test users that are smaller, a few lucky ones decide.
FEW_USERS = 200
# What the paper calls what its figures vary.
AXES = {"num_layers": "L (num_layers)", "graph_max_length": "K (graph_max_length)", "max_hops": "H (max_hops)"}


def draw_curves(row: RowCells, path: Path) -> None:
    """Draws validation NDCG@10 and training loss of a row over epochs."""
    counts: dict[str, int] = {}
    runs = []
    compared = row.times_to_quality()
    goals = {reached.level for summary, reached in compared if summary.group.arm == "adamw"}
    # Where settings vary that plain AdamW heeds too, there is no one level to draw.
    arrivals = {summary.group.label: plots.Arrival(*reached.arrival) for summary, reached in compared}
    goal = plots.Goal("best of adamw", goals.pop()) if len(goals) == 1 else None
    for summary in row.summaries:
        arm = summary.group.arm
        counts[arm] = counts.get(arm, -1) + 1
        runs.append(
            plots.Seeds(
                _with_seeds(summary),
                arm,
                counts[arm],
                [[record["loss"] for record in cell.history] for cell in summary.cells],
                [cell.curve for cell in summary.cells],
                None if goal is None else arrivals.get(summary.group.label),
            )
        )
    published = {x.arm: x.losses for x in row.row.published if x.arm is not None and x.losses}
    plots.training_curves(runs, path, title=row.row.title, published=published, goal=goal)


def draw_who_gains(row: RowCells, path: Path) -> bool:
    """Draws what smoothing changes for groups of users; returns whether any cells know of a change.

    Of several groups of cells with the same optimizer, the one that is best on the validation items is drawn.
    """
    panels = []
    for grouping, counted in COUNTED.items():
        series, users = [], {}
        for summary, gains in row.group_gains(grouping):
            same = [x for x in row.summaries if x.group.arm == summary.group.arm]
            if all(gain.difference is None for gain in gains.values()) or not (len(same) == 1 or row.chosen(summary)):
                continue
            users = {name: gain.users for name, gain in gains.items()}
            compared = max(gain.compared for gain in gains.values())
            series.append(
                plots.Series(
                    _with_seeds(summary, compared),
                    plots.COLORS.get(summary.group.arm),
                    [gain.difference for gain in gains.values()],
                    [gain.deviation for gain in gains.values()],
                    ["" if gain.relative is None else f"{gain.relative:+z.0%}" for gain in gains.values()],
                )
            )
        if series:
            groups = [f"{name}\n{count:,} {'user' if count == 1 else 'users'}" for name, count in users.items()]
            panels.append(plots.Clusters(counted, groups, series, [count < FEW_USERS for count in users.values()]))
    # Where no arm finds anybody's item, nothing changes anywhere.
    changed = any(value for panel in panels for series in panel.series for value in series.values)
    if changed:
        title, few = f"{row.row.title}: who gains", f"fewer than {FEW_USERS} users"
        plots.clusters(panels, path, ylabel=f"{TEST}: gain over adamw", title=title, few=few)
    return changed


def draw_table(found: TableCells, results_dir: Path) -> list[Path]:
    """Draws the picture of a whole table or figure, of what was trained of it; returns the files."""
    table = found.table
    path = results_dir / f"{table.name}.png"
    draw = {
        "loss": _draw_loss,
        "lines": _draw_lines,
        "bars": _draw_bars,
        "smoothness": _draw_smoothness,
        "gains": _draw_gains,
        "times": _draw_times,
    }
    if table.picture.kind == "maps":
        return [path] if _draw_maps(found, results_dir, path) else []
    return [path] if draw[table.picture.kind](found, path) else []


def _draw_loss(found: TableCells, path: Path) -> bool:
    panels = []
    for row in found.trained:
        lines, published = [], []
        arms: set[Optimizer] = set()
        for summary in row.summaries:
            color = None if summary.group.arm in arms else plots.COLORS.get(summary.group.arm)
            arms.add(summary.group.arm)
            length = min(cell.epochs for cell in summary.cells)
            losses = np.array([[record["loss"] for record in cell.history[:length]] for cell in summary.cells])
            spread = losses.std(axis=0, ddof=1) if len(losses) > 1 else None
            lines.append(plots.Line(summary.group.label, color, np.arange(1, length + 1), losses.mean(0), spread))
        for group in row.row.groups:
            if group.published is not None and group.published.losses:
                points = {epoch: mean for epoch, (_, mean, _) in group.published.losses.items()}
                published.append(plots.Line(group.label, None, list(points), list(points.values())))
        panels.append(plots.Panel(row.row.title, "epoch", "training loss", lines, published))
    if panels:
        plots.panels(panels, path, title=found.table.title)
    return bool(panels)


def _draw_lines(found: TableCells, path: Path) -> bool:
    panels = []
    for over in found.table.picture.over:
        for dataset in found.table.datasets:
            rows = [row for row in found.rows if row.row.dataset == dataset and over in row.row.vary]
            panel = _values_panel(rows, over, dataset)
            # A single value is no line; beside published ones it is worth a look.
            if panel.published or any(len(line.x) > 1 for line in panel.lines):
                panels.append(panel)
    if panels and found.trained:
        plots.panels(panels, path, title=found.table.title)
    return bool(panels and found.trained)


def _values_panel(rows: Sequence[RowCells], over: str, dataset: str) -> plots.Panel:
    """Test NDCG@10 over one of the settings that rows vary; the others, and the rows, tell lines apart.

    All that is drawn is of the same seeds, if they have some in common.
    """
    ours: dict[str, list[tuple[float, Summary | None]]] = {}
    theirs: dict[str, list[tuple[float, float]]] = {}
    levels: dict[str, float] = {}
    everything = {(i, x.group.label): x for i, row in enumerate(rows) for x in row.summaries}
    if not all(x.short for x in everything.values()):  # what lacks epochs does not compare with what has them
        everything = {key: x for key, x in everything.items() if not x.short}
    everything = with_common_seeds(everything) or everything
    seeds = {cell.seed for summary in everything.values() for cell in summary.cells}
    for i, row in enumerate(rows):
        for group in row.row.groups:
            summary = everything.get((i, group.label))
            if over not in group.settings:
                if summary is not None and group.arm in PLAIN:
                    levels[group.arm] = summary.mean()
                continue
            label, x = _line_label(row, rows, group, over), float(group.settings[over])
            if summary is not None or label in ours:
                ours.setdefault(label, []).append((x, summary))
            if group.published is not None and group.published.metrics:
                theirs.setdefault(label, []).append((x, group.published.metrics[SELECTION]))
    lines = []
    for label, points in ours.items():
        while points[-1][1] is None:
            points.pop()
        # A gap in the line where something between was not run.
        deviations = [math.nan if summary is None else summary.deviation() for _, summary in points]
        spread = None if None in deviations else deviations
        means = [math.nan if summary is None else summary.mean() for _, summary in points]
        lines.append(plots.Line(label, None, [x for x, _ in points], means, spread))
    published = [plots.Line(label, None, *zip(*points, strict=True)) for label, points in theirs.items()]
    title = rows[0].row.title if len(rows) == 1 else dataset
    ylabel = TEST if len(seeds) != 1 else f"{TEST}, seed {next(iter(seeds))}"
    return plots.Panel(title, AXES.get(over, over), ylabel, lines, published, list(levels.items()), categories=True)


def _line_label(row: RowCells, rows: Sequence[RowCells], group: SeedGroup, over: str) -> str:
    others = [str(value) for name, value in group.settings.items() if name != over]
    parts = ([row.row.subject] if len(rows) > 1 else []) + (others or [group.arm])
    return ", ".join(parts)


def _draw_bars(found: TableCells, path: Path) -> bool:
    panels: dict[str, list[plots.Bar]] = {}
    for row in found.trained:
        arms = list(dict.fromkeys(row.row.arms))
        for arm in arms:
            same = [x for x in row.summaries if x.group.arm == arm]
            best = next((x for x in same if len(same) == 1 or row.chosen(x)), None)
            published = row.row.published_for(arm)
            theirs = published.metrics.get(SELECTION) if published else None
            if best is not None or theirs is not None:
                bar = plots.Bar(
                    best.group.label if best else arm,
                    plots.COLORS.get(arm),
                    best.mean() if best else None,
                    best.deviation() if best else None,
                    theirs,
                )
                panels.setdefault(row.row.dataset, []).append(bar)
    if panels:
        plots.bars(panels, path, ylabel=TEST, title=found.table.title)
    return bool(panels)


def smoothness_lines(row: RowCells, over: str) -> list[tuple[Any, Summary | None, dict[str, float]]]:
    """Of each value that is varied, what was trained and what was published."""
    trained = {summary.group.label: summary for summary in row.summaries}
    found = []
    for group in row.row.groups:
        if over in group.settings:
            published = group.published.smoothness if group.published is not None else {}
            found.append((group.settings[over], trained.get(group.label), published))
    return found


def _draw_smoothness(found: TableCells, path: Path) -> bool:
    over = found.table.picture.over[0]
    panels = []
    for row in found.trained:
        values = smoothness_lines(row, over)
        for measured in ("raw update", "smoothed update"):
            lines = []
            for value, summary, _ in values:
                if summary is None:
                    continue
                epochs = range(1, min(cell.epochs for cell in summary.cells) + 1)
                points = [(epoch, summary.energy(measured, epoch)) for epoch in epochs]
                points = [(epoch, x) for epoch, x in points if x is not None]
                if points:
                    lines.append(plots.Line(f"{over} {value}", None, *zip(*points, strict=True)))
            first = measured == "raw update"  # the second has the same lines, and less room
            title = f"{row.row.title}: {measured}"
            panels.append(plots.Panel(title, "epoch", ENERGY, lines, log=True, legend=first))
        ours, theirs = [], []
        for measured in ("smoothed update", "embedding"):
            points = [(value, s.energy(measured)) for value, s, _ in values if s is not None]
            points = [(value, x) for value, x in points if x is not None]
            if points:
                ours.append(plots.Line(measured, None, *zip(*points, strict=True)))
            known = [(value, x[measured]) for value, _, x in values if measured in x]
            if known:
                theirs.append(plots.Line(measured, None, *zip(*known, strict=True)))
        title = f"{row.row.title}: at the end"
        panels.append(plots.Panel(title, over, ENERGY, ours, theirs, categories=True, log=True))
    if panels:
        plots.panels(panels, path, title=found.table.title, columns=3)
    return bool(panels)


def _draw_gains(found: TableCells, path: Path) -> bool:
    published = {(x.subject, x.arm, tuple(x.settings.items())): x.gain for x in found.table.gains}
    panels: dict[str, list[plots.Bar]] = {}
    for base in ("adam", "adamw"):
        rows = comparable_rows(found.rows, base)
        gains = {(x.subject, x.arm, tuple(x.settings.items())): x for x in average_gains(rows, base, complete=True)}
        panels[f"over {base}" + ("; published: of all data sets" if base == "adam" else "")] = [
            plots.Bar(
                ", ".join(filter(None, [key[0], settings_in_words(dict(key[2]))])),
                plots.PALETTE[i % 2],
                gains[key].gain if key in gains else None,
                published=value if base == "adam" else None,
            )
            for i, (key, value) in enumerate(published.items())
        ]
    if found.trained:
        plots.bars(panels, path, ylabel="average gain", title=found.table.title, percent=True)
    return bool(found.trained)


def _draw_times(found: TableCells, path: Path) -> bool:
    training, inference = [], []
    for row in found.rows:
        for arm in row.row.arms:
            theirs = found.table.times.get(row.row.subject, {}).get(arm, {})
            costs = None if row.costs is None else row.costs.arms[arm]
            label, color = f"{row.row.subject}, {arm}", plots.COLORS.get(arm)
            ours = None if costs is None else costs.training_seconds
            training.append(plots.Bar(label, color, ours, published=theirs.get("training")))
            ours = None if costs is None else costs.inference_seconds
            inference.append(plots.Bar(label, color, ours, published=theirs.get("inference")))
    measured = any(row.costs is not None for row in found.rows)
    if measured:
        panels = {"training": training, "inference": inference}
        plots.bars(panels, path, ylabel="seconds", title=found.table.title, log=True)
    return measured


def map_path(results_dir: Path, experiment: str, group: SeedGroup, seed: int) -> Path:
    """Where the maps of a cell are kept."""
    return cell_path(results_dir, experiment, group, seed).with_suffix(".npz")


def _draw_maps(found: TableCells, results_dir: Path, path: Path) -> bool:
    drawn: dict[str, dict[str, np.ndarray]] = {}
    maps = None
    for row in found.trained:
        for summary in row.summaries:
            file = map_path(results_dir, found.table.name, summary.group, summary.cells[0].seed)
            if file.is_file():
                maps = Maps.read(file)
                settings = settings_in_words(summary.group.settings)
                drawn[settings] = {f"epoch {epoch}": places for epoch, places in maps.places.items()}
    if maps is None:
        return False
    groups = list(found.table.picture.groups)
    group_of = {name: i for i, names in enumerate(found.table.picture.groups.values()) for name in names}
    colors = np.array([*(group_of.get(name, -1) for name in maps.attributes), -1])[maps.first]
    plots.maps(drawn, colors, groups, path, title=found.table.title)
    return True


def _with_seeds(summary: Summary, count: int | None = None) -> str:
    """What a group is called, with how many seeds are drawn (None: all), and how many epochs, if some are missing."""
    count = len(summary.cells) if count is None else count
    marks = [f"{count} seeds"] if count > 1 else []
    if summary.short:
        marks.append(f"{summary.epochs} of {summary.group.config().epochs} epochs")
    return summary.group.label + (f" ({', '.join(marks)})" if marks else "")
