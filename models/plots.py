"""Pictures of runs and graphs."""

import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import scipy.sparse

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from models.files import write_bytes

# Colours that stay apart for colour-blind readers, one an optimizer everywhere.
COLORS = {
    "adam": "#b0a060",
    "adamw": "#7f7f7f",
    "sgd": "#9467bd",
    "sevo-adam": "#e69f00",
    "sevo-adamw": "#0072b2",
    "sevo-gradient": "#d55e00",
    "sevo-gradient-uncorrected": "#cc79a7",
    "sevo-sgd": "#009e73",
}
# For what is told apart by something else.
PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#9467bd"]
# For runs of the same optimizer.
STYLES = ["-", "--", ":", "-."]


class Arrival(NamedTuple):
    """When the runs of one optimizer first reach a level.

    Attributes:
      epochs: mean number of epochs; None: none of them does.
      spread: one standard deviation; None: there is none.
      missed: how many runs do not.
    """

    epochs: float | None
    spread: float | None = None
    missed: int = 0

    def label(self, name: str) -> str:
        """What the legend says of a line."""
        if self.epochs is None:
            return f"{name}: not reached"
        return f"{name} after {self.epochs:.0f} epochs" + (f", {self.missed} not" if self.missed else "")


class Goal(NamedTuple):
    """A level of quality, and when it is reached.

    Attributes:
      label: what it is.
      level: NDCG@10.
    """

    label: str
    level: float

    def draw_level(self, ax: Axes) -> None:
        """Draws the level into axes of NDCG@10 over epochs, before the curves, whose labels complete its own."""
        ax.axhline(self.level, color="black", linestyle=":", linewidth=1, label=f"{self.label}, reached by", zorder=1)

    def draw_arrival(self, ax: Axes, arrival: Arrival, color: Any) -> None:
        """Draws where a curve reaches it."""
        if arrival.epochs is not None:
            marks = {"color": color, "markeredgecolor": "black", "markersize": 8, "capsize": 3, "zorder": 6}
            ax.errorbar(arrival.epochs, self.level, xerr=arrival.spread, fmt="v", **marks)


def _common(seeds: Sequence[Sequence[tuple[int, float]]]) -> tuple[list[int], np.ndarray]:
    """The epochs that the curves of all seeds have, and their values there, shape (seeds, epochs)."""
    points = [dict(curve) for curve in seeds]
    epochs = [epoch for epoch in points[0] if all(epoch in curve for curve in points)]
    return epochs, np.array([[curve[epoch] for epoch in epochs] for curve in points])


def validation_curves(
    curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]],
    path: Path,
    *,
    title: str = "",
    goal: Goal | None = None,
    arrivals: Mapping[str, Arrival] | None = None,
) -> None:
    """Draws NDCG@10 on the validation items over epochs.

    With several seeds, a line is their mean, inside a band of one standard deviation to each side, at the epochs after
    which all of them were evaluated.

    Args:
      curves: by name, one curve a seed: points (epoch, NDCG@10).
      path: the PNG to write.
      title: what was trained on what.
      goal: a level to draw; None: none.
      arrivals: when it is reached, by name.
    """
    arrivals = arrivals or {}
    fig, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    if goal is not None:
        goal.draw_level(ax)
    for name, seeds in curves.items():
        epochs, values = _common(seeds)
        mean = values.mean(axis=0)
        best = int(mean.argmax())
        label = name if len(seeds) == 1 else f"{name} ({len(seeds)} seeds)"
        if name in arrivals:
            label = arrivals[name].label(label)
        (line,) = ax.plot(epochs, mean, label=label, color=COLORS.get(name), linewidth=2)
        ax.plot(epochs[best], mean[best], "o", color=line.get_color())
        if len(seeds) > 1:
            spread = values.std(axis=0, ddof=1)
            ax.fill_between(epochs, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, linewidth=0)
        if goal is not None and name in arrivals:
            goal.draw_arrival(ax, arrivals[name], line.get_color())
    ax.set(xlabel="epoch", ylabel="validation NDCG@10", title=title)
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="lower right")
    _save(fig, path)


class Seeds(NamedTuple):
    """The runs of one optimizer that differ in the seed.

    Attributes:
      label: what the legend calls them.
      optimizer: decides the colour.
      style: which line style, counted from 0.
      losses: one list of training losses, an epoch each, a seed.
      validation: one list of points (epoch, NDCG@10) a seed.
      arrival: when they reach the goal; None: they are not compared with it.
    """

    label: str
    optimizer: str
    style: int
    losses: Sequence[Sequence[float]]
    validation: Sequence[Sequence[tuple[int, float]]]
    arrival: Arrival | None = None


def training_curves(
    runs: Sequence[Seeds],
    path: Path,
    *,
    title: str = "",
    published: Mapping[str, Mapping[int, tuple[float, float, float]]] | None = None,
    goal: Goal | None = None,
) -> None:
    """Draws NDCG@10 on the validation items and the training loss over epochs: means, and one standard deviation.

    Args:
      runs: the runs, by optimizer.
      path: the PNG to write.
      title: what was trained on what.
      published: least, mean and largest published loss by epoch, by optimizer.
      goal: a level of NDCG@10 to draw; None: none.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    if goal is not None:
        goal.draw_level(left)
    for label, optimizer, style, losses, validation, arrival in runs:
        style += optimizer == "sevo-gradient-uncorrected"  # dashed: it often lies on sevo-gradient
        line = {"color": COLORS.get(optimizer), "linestyle": STYLES[style % len(STYLES)], "linewidth": 1.8}
        epochs, values = _common(validation)
        length = min(map(len, losses))
        for ax, x, y in [
            (left, epochs, values),
            (right, np.arange(1, length + 1), np.array([seed[:length] for seed in losses])),
        ]:
            ax.plot(x, y.mean(0), label=label if arrival is None else arrival.label(label), **line)
            if len(y) > 1:
                spread = y.std(axis=0, ddof=1)
                ax.fill_between(x, y.mean(0) - spread, y.mean(0) + spread, color=line["color"], alpha=0.2, linewidth=0)
        if goal is not None and arrival is not None:
            goal.draw_arrival(left, arrival, line["color"])
    published = published or {}
    bars = []
    for points in published.values():
        least, mean, largest = np.array(list(points.values())).T
        marks = {"fmt": "o", "markersize": 5, "markerfacecolor": "white", "color": "black", "capsize": 3, "zorder": 5}
        bars.append(right.errorbar(list(points), mean, yerr=[mean - least, largest - mean], **marks))
    left.set(ylabel="validation NDCG@10")
    right.set(ylabel="training loss")
    left.legend(frameon=False, loc="lower right", fontsize="small" if len(runs) > 5 else None)
    if bars:
        right.legend(bars, [f"{optimizer}, published: mean and range" for optimizer in published], frameon=False)
    lowest, highest = right.get_ylim()
    if highest > 4 * lowest and right.dataLim.y0 > 0:  # MAERec's loss falls below zero
        right.set_yscale("log")
        right.yaxis.set_major_locator(LogLocator(subs=[1, 2, 3, 5, 7]))
        right.yaxis.set_major_formatter("{x:g}")
        right.yaxis.set_minor_formatter(NullFormatter())
    for ax in (left, right):
        ax.set(xlabel="epoch")
        ax.set_xlim(left=0)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    left.set_ylim(bottom=0)
    fig.suptitle(title)
    _save(fig, path)


class Line(NamedTuple):
    """A line of a panel.

    Attributes:
      label: what the legend calls it.
      color: None: the next of the palette.
      x: places.
      y: values.
      spread: one standard deviation to each side; None: there is none.
    """

    label: str
    color: str | None
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None


class Panel(NamedTuple):
    """One of several drawings side by side.

    Attributes:
      title: above it.
      xlabel: of the horizontal axis.
      ylabel: of the vertical axis.
      lines: ours.
      published: drawn behind ours, hollow, in the colour of our line of the same label; joined by dots if categories.
      levels: label and value of horizontal lines.
      categories: whether the places are told apart, not measured: all stand equally far apart.
      log: whether the vertical axis is logarithmic.
      legend: whether it says what the lines are.
    """

    title: str
    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    published: Sequence[Line] = ()
    levels: Sequence[tuple[str, float]] = ()
    categories: bool = False
    log: bool = False
    legend: bool = True


def panels(drawn: Sequence[Panel], path: Path, *, title: str = "", columns: int = 2) -> None:
    """Draws lines over what was varied or over epochs, ours over the published ones."""
    columns = min(columns, len(drawn))
    rows = -(-len(drawn) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(5.5 * columns, 4.2 * rows), layout="constrained", squeeze=False)
    for ax, panel in zip(axes.flat, drawn, strict=False):
        places = sorted({x for line in (*panel.lines, *panel.published) for x in line.x})

        def at(values: Sequence[float], panel: Panel = panel, places: list[float] = places) -> list[float]:
            return [places.index(x) for x in values] if panel.categories else list(values)

        colors: dict[str, str] = {}
        for i, line in enumerate(panel.lines):
            colors[line.label] = line.color or PALETTE[i % len(PALETTE)]
        for line in panel.published:
            color = colors.setdefault(line.label, line.color or PALETTE[len(colors) % len(PALETTE)])
            # Some epochs of a curve are no curve.
            style = ":" if panel.categories else ""
            marks = {"marker": "o", "markerfacecolor": "white", "markersize": 7, "linestyle": style, "linewidth": 1.2}
            ax.plot(at(line.x), line.y, color=color, label=f"{line.label}, published", **marks)
        for line in panel.lines:
            color, x, y = colors[line.label], at(line.x), np.asarray(line.y)
            marker = "o" if panel.categories else None
            ax.plot(x, y, color=color, label=line.label, linewidth=1.8, marker=marker, markersize=4)
            if line.spread is not None:
                spread = np.asarray(line.spread)
                ax.fill_between(x, y - spread, y + spread, color=color, alpha=0.2, linewidth=0)
        for label, value in panel.levels:
            ax.axhline(value, color=COLORS.get(label, "black"), linestyle="--", linewidth=1.2, label=label)
        if panel.categories:
            ax.set_xticks(range(len(places)), [f"{x:g}" for x in places])
        if panel.log:
            ax.set_yscale("log")
        ax.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        if panel.legend and ax.get_legend_handles_labels()[1]:
            ax.legend(frameon=False, fontsize="small")
    for ax in axes.flat[len(drawn) :]:
        ax.set_axis_off()
    fig.suptitle(title)
    _save(fig, path)


class Bar(NamedTuple):
    """A bar.

    Attributes:
      label: beneath it.
      color: of it.
      value: its height; None: ours is not known.
      spread: one standard deviation; None: there is none.
      published: a diamond there; None: not known.
    """

    label: str
    color: str | None
    value: float | None
    spread: float | None = None
    published: float | None = None


def bars(
    drawn: Mapping[str, Sequence[Bar]],
    path: Path,
    *,
    ylabel: str,
    title: str = "",
    log: bool = False,
    percent: bool = False,
) -> None:
    """Draws bars, ours, and diamonds, the published values; a panel each entry."""
    width = max(4.0, 0.55 * max(map(len, drawn.values())))
    fig, axes = plt.subplots(1, len(drawn), figsize=(width * len(drawn) + 1, 4.8), layout="constrained", squeeze=False)
    for ax, (heading, found) in zip(axes.flat, drawn.items(), strict=True):
        for i, bar in enumerate(found):
            if bar.value is not None:
                ax.bar(i, bar.value, color=bar.color or PALETTE[0], yerr=bar.spread, capsize=3, width=0.7)
            else:
                place = {"xy": (i, 0), "xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
                ax.annotate("not run", **place, rotation=90, fontsize="x-small", color="#7f7f7f")
            if bar.published is not None:
                ax.plot(i, bar.published, "D", color="black", markerfacecolor="white", zorder=5)
        if any(bar.published is not None for bar in found):
            ax.plot([], [], "D", color="black", markerfacecolor="white", label="published")
            ax.legend(frameon=False)
        ax.set_xticks(range(len(found)), [bar.label for bar in found], rotation=60, ha="right", fontsize="small")
        if log:
            ax.set_yscale("log")
        if percent:
            ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.set(ylabel=ylabel, title=heading)
        ax.grid(alpha=0.3, axis="y")
        ax.spines[["top", "right"]].set_visible(False)
    fig.suptitle(title)
    _save(fig, path)


class Series(NamedTuple):
    """The bars of one colour, one a cluster.

    Attributes:
      label: what the legend calls them.
      color: None: the next of the palette.
      values: heights; None: there is no bar.
      spreads: one standard deviation each; None: there is none.
      notes: above each bar.
    """

    label: str
    color: str | None
    values: Sequence[float | None]
    spreads: Sequence[float | None]
    notes: Sequence[str]


class Clusters(NamedTuple):
    """A drawing of bars that stand together by group.

    Attributes:
      xlabel: what the groups are.
      groups: their names.
      series: the bars.
      pale: which groups are so small that their bars say little.
    """

    xlabel: str
    groups: Sequence[str]
    series: Sequence[Series]
    pale: Sequence[bool]


def clusters(drawn: Sequence[Clusters], path: Path, *, ylabel: str, title: str = "", few: str = "") -> None:
    """Draws bars side by side, above and below 0; a panel each. ``few`` is what the legend says of pale ones."""
    widths = [len(one.groups) for one in drawn]
    fig, axes = plt.subplots(
        1,
        len(drawn),
        figsize=(1.3 * sum(widths) + 1, 4.6),
        width_ratios=widths,
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for ax, one in zip(axes.flat, drawn, strict=True):
        width = 0.8 / len(one.series)
        for i, series in enumerate(one.series):
            shown = [j for j, value in enumerate(series.values) if value is not None]
            places = [j + (i - (len(one.series) - 1) / 2) * width for j in shown]
            heights = np.array([series.values[j] for j in shown], float)
            spreads = np.array([series.spreads[j] or 0.0 for j in shown])
            color = series.color or PALETTE[i % len(PALETTE)]
            shades = [to_rgba(color, 0.35 if one.pale[j] else 1.0) for j in shown]
            ax.bar(places, heights, width, color=shades)
            seen = spreads > 0
            ax.errorbar(
                np.array(places)[seen], heights[seen], yerr=spreads[seen], fmt="none", ecolor="black", capsize=3
            )
            for place, height, spread, j in zip(places, heights, spreads, shown, strict=True):
                above = height >= 0
                ax.annotate(
                    series.notes[j],
                    (place, height + spread if above else height - spread),
                    xytext=(0, 3 if above else -3),
                    textcoords="offset points",
                    ha="center",
                    va="bottom" if above else "top",
                    fontsize="x-small",
                )
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xticks(range(len(one.groups)), one.groups, fontsize="small")
        ax.set_xlim(-0.6, len(one.groups) - 0.4)
        ax.margins(y=0.12)
        ax.set_axisbelow(True)
        ax.set(xlabel=one.xlabel)
        ax.grid(alpha=0.3, axis="y")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set(ylabel=ylabel)
    handles: list[Artist] = [
        Patch(color=series.color or PALETTE[i % len(PALETTE)], label=series.label)
        for i, series in enumerate(drawn[0].series)
    ]
    if any(any(one.pale) for one in drawn):
        handles.append(Patch(color=to_rgba("black", 0.2), label=few))
    if any(spread for one in drawn for series in one.series for spread in series.spreads):
        handles.append(plt.Line2D([], [], color="black", marker="_", label="one standard deviation of the gain"))
    fig.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    fig.suptitle(title)
    _save(fig, path)


def maps(
    drawn: Mapping[str, Mapping[str, np.ndarray]],
    colors: np.ndarray,
    groups: Sequence[str],
    path: Path,
    *,
    title: str = "",
) -> None:
    """Draws points in two dimensions, coloured by group.

    Args:
      drawn: shape (points, 2) by the label of the row and by the label of the column.
      colors: shape (points,), the place of each point's group in ``groups``; -1: it has none, and is grey.
      groups: names of the groups.
      path: the PNG to write.
      title: what is drawn.
    """
    columns = list(dict.fromkeys(column for row in drawn.values() for column in row))
    fig, axes = plt.subplots(
        len(drawn),
        len(columns),
        figsize=(2.6 * len(columns) + 1, 2.6 * len(drawn) + 1),
        layout="constrained",
        squeeze=False,
    )
    shades = np.array([plt.cm.tab10(i) for i in range(len(groups))] + [(0.8, 0.8, 0.8, 1.0)])
    for i, (row, found) in enumerate(drawn.items()):
        for j, column in enumerate(columns):
            ax = axes[i, j]
            ax.set_xticks([])
            ax.set_yticks([])
            if i == 0:
                ax.set_title(column)
            if j == 0:
                ax.set_ylabel(row)
            if column in found:
                places = found[column].astype(float)
                ax.scatter(places[:, 0], places[:, 1], c=shades[colors], s=2, linewidths=0, rasterized=True)
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=shades[i]) for i in range(len(groups))]
    fig.legend(handles, groups, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    fig.suptitle(title)
    _save(fig, path)


def graph_degrees(adjacency: scipy.sparse.csr_array, path: Path, *, title: str = "") -> None:
    """Draws how many nodes have at least so many neighbours, and how many edges at least such a weight.

    Both axes are logarithmic, so that a power law is a straight line.

    Args:
      adjacency: symmetric weights, shape (nodes, nodes); self-loops are left out.
      path: the PNG to write.
      title: what is drawn.
    """
    edges = scipy.sparse.triu(adjacency, k=1).tocoo()
    neighbours = np.bincount(np.concatenate([edges.row, edges.col]), minlength=adjacency.shape[0])
    fig, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for ax, values, xlabel, ylabel in [
        (axes[0], neighbours, "neighbours", "nodes with at least as many"),
        (axes[1], edges.data, "weight", "edges with at least as much"),
    ]:
        distinct, counts = np.unique(values[values > 0], return_counts=True)
        ax.loglog(distinct, counts[::-1].cumsum()[::-1], ".-", color=COLORS["sevo-adamw"], markersize=4)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    fig.suptitle(title)
    _save(fig, path)


def graph_drawing(adjacency: scipy.sparse.csr_array, path: Path, *, title: str = "") -> None:
    """Draws a small graph: related nodes close together, heavier edges darker, isolated nodes left out.

    Args:
      adjacency: symmetric weights, shape (nodes, nodes).
      path: the PNG to write.
      title: what is drawn.
    """
    import networkx

    network = networkx.from_scipy_sparse_array(scipy.sparse.triu(adjacency, k=1))
    network.remove_nodes_from(list(networkx.isolates(network)))
    places = networkx.spring_layout(network, seed=0)
    # The heavy edges last, so that they lie on top.
    edges = sorted(network.edges(data="weight"), key=lambda edge: edge[2])
    weights = np.array([weight for _, _, weight in edges])
    fig, ax = plt.subplots(figsize=(8, 8), layout="constrained")
    networkx.draw_networkx_edges(
        network,
        places,
        edges,
        ax=ax,
        edge_color=weights,
        edge_cmap=plt.cm.Greys,
        edge_vmin=-weights.max() / 8,
        width=0.8,
    )
    sizes = 10 + 6 * np.array([degree for _, degree in network.degree()])
    networkx.draw_networkx_nodes(network, places, ax=ax, node_size=sizes, node_color=COLORS["sevo-adamw"])
    if len(network) <= 100:
        networkx.draw_networkx_labels(network, places, ax=ax, font_size=6, font_color="white")
    ax.set_title(title)
    ax.set_axis_off()
    _save(fig, path)


class Tried(NamedTuple):
    """A trial of a search.

    Attributes:
      number: of the trial.
      settings: what was tried, by option.
      value: the best result on the validation items.
      finished: whether it was trained to its end.
    """

    number: int
    settings: Mapping[str, Any]
    value: float
    finished: bool


def search(tried: Sequence[Tried], path: Path, *, log: Collection[str] = (), title: str = "", metric: str = "") -> None:
    """Draws the value of each trial, over the trials and over each option that was searched.

    Trials that were stopped early are hollow, at the best that they had come to. The best of those that were not is
    marked in each drawing.

    Args:
      tried: the trials, in their order.
      path: the PNG to write.
      log: the options whose axis is logarithmic.
      title: what was searched.
      metric: what the values are.
    """
    names = list(dict.fromkeys(name for trial in tried for name in trial.settings))
    finished = [trial for trial in tried if trial.finished]
    best = max(finished, key=lambda trial: trial.value, default=None)
    columns = min(3, 1 + len(names))
    rows = -(-(1 + len(names)) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.4 * rows), layout="constrained", squeeze=False)
    for ax, name in zip(axes.flat, [None, *names], strict=False):
        mine = [trial for trial in tried if name is None or name in trial.settings]
        places = [trial.number if name is None else trial.settings[name] for trial in mine]
        words = not all(isinstance(x, int | float) and not isinstance(x, bool) for x in places)
        if words:
            places = ["+".join(x) if isinstance(x, list | tuple) else str(x) for x in places]
            labels = sorted(set(places))
            places = [labels.index(x) for x in places]
            ax.set_xticks(range(len(labels)), [label.replace("+", "+\n") for label in labels])
            ax.margins(x=0.3)
        elif name in log:
            ax.set_xscale("log")
        if words or all(isinstance(x, int) for x in places):
            ax.xaxis.set_major_locator(FixedLocator(range(len(labels))) if words else MaxNLocator(integer=True))
        for ends, face, label in [(True, PALETTE[0], "finished"), (False, "none", "stopped early")]:
            chosen = [(x, trial.value) for x, trial in zip(places, mine, strict=True) if trial.finished is ends]
            if chosen:
                ax.scatter(
                    *zip(*chosen, strict=True), s=28, facecolor=face, edgecolor=PALETTE[0], label=label, zorder=3
                )
        if best is not None and best in mine:
            ax.scatter(
                places[mine.index(best)], best.value, s=150, marker="*", color=PALETTE[1], label="best", zorder=4
            )
        if name is None and finished:
            values = np.array([trial.value if trial.finished else -np.inf for trial in tried])
            numbers, rising = [trial.number for trial in tried], np.maximum.accumulate(values)
            ax.step(numbers, np.where(np.isfinite(rising), rising, np.nan), where="post", color="#7f7f7f", linewidth=1)
        ax.set(xlabel="trial" if name is None else name.replace("_", " "), ylabel=metric)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes.flat[0].legend(frameon=False)
    for ax in list(axes.flat)[1 + len(names) :]:
        ax.set_axis_off()
    fig.suptitle(title)
    _save(fig, path)


def _save(fig: Figure, path: Path) -> None:
    """Writes the PNG whole or not at all, and frees the figure."""
    drawn = io.BytesIO()
    fig.savefig(drawn, format="png", dpi=150)
    plt.close(fig)
    write_bytes(path, lambda file: file.write(drawn.getbuffer()))
