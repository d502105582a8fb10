"""The page: everything that is shown, put into one file with the code that draws it."""

import base64
import dataclasses
import gzip
import importlib.util
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.config import SELECTION
from models.files import write_text
from models.plots import COLORS, PALETTE
from models.report import items as item_maps
from models.report import tables
from models.report.graphs import ReportedGraph, Source, known_source, source_of
from models.report.runs import Arm, Group, ReportedRun, read_groups
from models.training.training_data import TrainingData
from sevo_optax import __version__

FOLDER = Path(__file__).parent
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
# Of how many arms of a group items are shown: as many columns as can be read side by side.
MOST_ARMS = 6
DIGITS = 5


def write_page(
    groups: Sequence[Group],
    output: Path,
    *,
    titles: Mapping[str, str] | None = None,
    data: Path | None = None,
    sources: Sequence[Source] | None = None,
    with_umap: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Writes the page.

    Args:
      groups: what it is about, see :func:`models.report.runs.read_groups`.
      output: the file.
      titles: of items, by raw id as text; None: they are called by their ids.
      data: where the runs' data lies now; None: where it was in training.
      sources: the data of each group; None: they are read again.
      with_umap: whether maps are drawn by UMAP too, if umap-learn is installed. It takes seconds an arm.
      say: is told what takes a while.

    Raises:
      ValueError: if plotly or jinja2 is missing.
    """
    script, environment = plotly_script(), template_environment()
    sections, payload = [], []
    for number, group in enumerate(groups):
        if sources is None:
            say(f"{group.title}: reading the data")
        source = source_of(group, data) if sources is None else sources[number]
        catalogue = catalogue_of(group, source, titles=titles, with_umap=with_umap, say=say)
        sections.append(_section(number, group, source, catalogue))
        payload.append(
            {
                "title": group.title,
                "curves": curves(group),
                "groups": [_bars(group, table) for table in tables.by_group(group)],
                "degrees": [{"title": x.title, "counts": x.degrees.tolist()} for x in source.graphs],
                "items": None if catalogue is None else catalogue.payload,
            }
        )
    text = environment.get_template("page.html").render(
        sections=sections,
        version=__version__,
        style=(FOLDER / "page.css").read_text(encoding="utf-8"),
        script=(FOLDER / "page.js").read_text(encoding="utf-8"),
        plotly=packed(script),
        payload=packed(json.dumps(payload, separators=(",", ":"), allow_nan=False)),
    )
    write_text(output, text)


def write_comparison(folders: Sequence[Path], prepared: TrainingData, output: Path) -> None:
    """Writes the page about a comparison that was trained just now: its data need not be read again.

    Args:
      folders: of its runs.
      prepared: what they were trained on.
      output: the file.

    Raises:
      ValueError: as for :func:`write_page`, or if a run cannot be read.
    """
    groups = read_groups(folders)
    adjacency = None if prepared.nodes is None else prepared.nodes.adjacency
    sources = [known_source(group, prepared.interactions, prepared.split.train, adjacency) for group in groups]
    write_page(groups, output, sources=sources)


def packed(text: str) -> str:
    """Text as base64 of gzip: a third of plotly's 5 MB, and nothing in it that could end a script element."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def plotly_script() -> str:
    """The JavaScript of plotly.

    Raises:
      ValueError: if it is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ValueError("a report needs plotly; install it with pip install -e '.[report]'") from None
    return get_plotlyjs()


def template_environment() -> Any:
    """Templates in this folder; whatever is put into them is escaped.

    Raises:
      ValueError: if jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise ValueError("a report needs jinja2; install it with pip install -e '.[report]'") from None
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def styles(arms: Sequence[Arm]) -> list[dict[str, str]]:
    """Colour and dashes of each arm's lines: a colour an optimizer as in all pictures, and dashes for its settings.

    Where an optimizer has more settings than there are dashes, they begin again in a darker shade.
    """
    count: dict[str, int] = {}
    found = []
    for arm in arms:
        number = count.get(arm.optimizer, 0)
        count[arm.optimizer] = number + 1
        again, dash = divmod(number, len(DASHES))
        color = _darkened(COLORS.get(arm.optimizer, PALETTE[0]), again)
        found.append({"color": color, "dash": DASHES[dash]})
    return found


def _darkened(color: str, times: int) -> str:
    """A colour #rrggbb, darker with each time."""
    return "#" + "".join(f"{round(int(color[i : i + 2], 16) * 0.6**times):02x}" for i in (1, 3, 5))


def curves(group: Group) -> dict[str, Any] | None:
    """The curves of a group: of each arm's seeds the mean and the standard deviation, as far as all of them got.

    Returns:
      None: no run has more than one epoch.
    """
    if max(len(run.history) for arm in group.arms for run in arm.runs) < 2:
        return None
    arms, names = [], {}
    for arm, style in zip(group.arms, styles(group.arms), strict=True):
        histories = [run.history for run in arm.runs if run.history]
        evaluated = [[record for record in history if "validation" in record] for history in histories]
        metrics = list(
            dict.fromkeys(name for records in evaluated for record in records for name in record["validation"])
        )
        names |= dict.fromkeys(metrics)
        arms.append(
            {
                "label": arm.label,
                "seeds": len(histories),
                **style,
                "loss": _mean_curve([[(x["epoch"], x["loss"]) for x in history] for history in histories]),
                "validation": {
                    name: _mean_curve(
                        [[(x["epoch"], x["validation"].get(name)) for x in records] for records in evaluated]
                    )
                    for name in metrics
                },
            }
        )
    return {"metrics": list(names), "chosen": SELECTION, "arms": arms}


def _mean_curve(seeds: Sequence[Sequence[tuple[int, float | None]]]) -> dict[str, list[Any]]:
    """Mean and standard deviation of curves at the epochs at which all of them have a value."""
    points = [{epoch: value for epoch, value in seed if value is not None} for seed in seeds]
    epochs = sorted(set.intersection(*map(set, points))) if points else []
    columns = [[mine[epoch] for mine in points] for epoch in epochs]
    return {
        "epochs": epochs,
        "mean": [round(statistics.fmean(column), DIGITS) for column in columns],
        "sd": [round(statistics.stdev(column), DIGITS) for column in columns] if len(points) > 1 else [],
    }


def _bars(group: Group, table: tables.MetricTable) -> dict[str, Any]:
    """A table of groups of users as bars."""
    style_of = {arm.label: style for arm, style in zip(group.arms, styles(group.arms), strict=True)}
    return {
        "metric": f"test {SELECTION}",
        "columns": table.columns,
        "arms": [
            {"label": line.label, **style_of[line.label], "values": [_mean_of(figure) for figure in line.figures]}
            for line in table.lines
        ],
    }


def _mean_of(figure: tables.Figure) -> float | None:
    return None if figure.value == tables.NONE else float(figure.value.split()[0])


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """The items of a group.

    Attributes:
      payload: names, places and neighbours, for the page's code.
      notes: what readers must know about them.
    """

    payload: dict[str, Any] | None
    notes: Sequence[str]


def catalogue_of(
    group: Group,
    source: Source,
    *,
    titles: Mapping[str, str] | None,
    with_umap: bool,
    say: Callable[[str], None],
) -> Catalogue | None:
    """Maps and neighbours of the items in the tables of a group's arms; None: no run has left its folder.

    An arm is shown by its first finished run.
    """
    notes: list[str] = []
    shown = _shown(group, notes)
    if not shown:
        return None
    loaded, ids = _tables_of(shown, notes, lambda arm: say(f"{group.title}: reading the items of {arm.label}"))
    if not loaded:
        return Catalogue(None, notes)
    rows = item_maps.most_popular(source.counts, len(ids), item_maps.LARGEST_CATALOGUE)
    counts = None if source.counts is None else source.counts[rows]
    drawn = item_maps.most_popular(counts, len(rows), item_maps.LARGEST_MAP)
    which = "items with the most training interactions" if counts is not None else "first items"
    if len(rows) < len(ids):
        notes.append(f"Of {len(ids):,} items, the {len(rows):,} {which} are compared with each other.")
    if len(drawn) < len(rows):
        notes.append(f"The map shows the {len(drawn):,} {which}.")
    umap = with_umap and has_umap() and len(drawn) > 15  # its number of neighbours
    arms = []
    for arm, run, table in loaded:
        if umap:
            say(f"{group.title}: a map of {arm.label} by UMAP")
        mine = {"label": arm.label, "seed": run.seed, "maps": _maps(table[rows][drawn], umap)}
        near = item_maps.nearest(table[rows])
        mine["neighbours"] = near.items.tolist()
        mine["cosines"] = np.round(near.similarities.astype(np.float64), 2).tolist()
        own = source.graph_of(arm)
        if own is not None:
            mine["linked"] = item_maps.linked(near, own.items[rows][:, rows]).astype(int).tolist()
        arms.append(mine)
    payload = {
        "names": item_maps.names_of(ids[rows].tolist(), titles),
        "counts": None if counts is None else counts.tolist(),
        "drawn": drawn.tolist(),
        "first": 0 if counts is None else int(np.argmax(counts)),
        "arms": arms,
    }
    return Catalogue(payload, notes)


def _shown(group: Group, notes: list[str]) -> list[tuple[Arm, ReportedRun]]:
    """The arms whose items are shown, each with the run that they are of: at most ``MOST_ARMS``, a plain one first."""
    shown = [
        (arm, next(run for run in arm.finished if run.directory is not None))
        for arm in group.arms
        if arm.optimizer != "closed-form" and any(run.directory is not None for run in arm.finished)
    ]
    if len(shown) > MOST_ARMS:
        notes.append(
            f"Of {len(shown)} arms, the {MOST_ARMS} best on the validation items are shown, with the best plain one."
        )
        best = sorted(shown, key=lambda pair: -pair[0].validation)
        plain = [pair for pair in best if pair[0].plain][:1]
        shown = plain + [pair for pair in best if pair not in plain][: MOST_ARMS - len(plain)]
    return shown


def _tables_of(
    shown: Sequence[tuple[Arm, ReportedRun]], notes: list[str], say: Callable[[Arm], None]
) -> tuple[list[tuple[Arm, ReportedRun, np.ndarray]], np.ndarray]:
    """The item tables that can be shown, and the items' ids; a note says why others cannot."""
    loaded, ids = [], np.empty(0)
    for arm, run in shown:
        say(arm)
        try:
            table, found = item_maps.item_table(run.directory)
        except ValueError as error:
            notes.append(f"{arm.label} is not shown: {error}.")
            continue
        if not np.isfinite(table).all():
            notes.append(f"{arm.label} is not shown: its table has values that are not finite.")
            continue
        if not loaded:
            ids = found
        loaded.append((arm, run, table))
    return loaded, ids


def _maps(table: np.ndarray, umap: bool) -> dict[str, dict[str, Any]]:
    """Items in two dimensions, by the name of what places them."""
    places, shares = item_maps.principal_components(table)
    axes = [f"component {i + 1} ({share:.0%} of the variance)" for i, share in enumerate(shares)]
    maps = {"PCA": _map(places, axes)}
    if umap:
        from models.reproduce.maps import project

        maps["UMAP"] = _map(project(table), ["", ""])
    return maps


def has_umap() -> bool:
    """Whether umap-learn is installed; it is not imported for that, which takes seconds."""
    return importlib.util.find_spec("umap") is not None


def _map(places: np.ndarray, axes: Sequence[str]) -> dict[str, Any]:
    x, y = np.round(places.astype(np.float64), 4).T.tolist()
    return {"x": x, "y": y, "axes": list(axes)}


def _section(number: int, group: Group, source: Source, catalogue: Catalogue | None) -> dict[str, Any]:
    """What the template shows of a group."""
    return {
        "number": number,
        "title": group.title,
        "protocols": group.protocols,
        "runs": [str(run.source) for arm in group.arms for run in arm.runs],
        "summary": tables.summary(group),
        "metrics": tables.all_metrics(group),
        "groups": tables.by_group(group),
        "curves": any(len(run.history) > 1 for arm in group.arms for run in arm.runs),
        "several_seeds": any(len(arm.runs) > 1 for arm in group.arms),
        "source": source,
        "graphs": [(graph.title, _rows(graph)) for graph in source.graphs],
        "catalogue": catalogue,
    }


def _rows(graph: ReportedGraph) -> list[tuple[str, str]]:
    """The lines of a graph's summary: what each says, and its figures."""
    return [
        (name, value.strip().replace("  ", ", "))
        for name, _, value in (line.partition(" ") for line in str(graph.summary).splitlines())
    ]
