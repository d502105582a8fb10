"""The report: tables and pictures, made from the cells alone."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

from tabulate import tabulate

from models.config import SELECTION, SELECTION_K, Grouping, Optimizer
from models.evaluation.groups import COUNTED
from models.files import write_text
from models.reproduce.cells import Cell, Cells
from models.reproduce.claims import claim_lines
from models.reproduce.pictures import draw_curves, draw_table, draw_who_gains, smoothness_lines
from models.reproduce.status import rough_duration, seconds_of
from models.reproduce.summaries import RowCells, TableCells, average_gains, comparable_rows, with_seeds_in_common
from models.reproduce.tables import METRICS, PLAIN, Measured, Published, Table, table_names
from models.training.time_to_quality import MEASURES, time_to_quality

NONE = "–"
# The kinds of pictures below which every row has its own figures.
DETAILED = ("curves", "loss", "lines", "bars")
MILESTONES = (10, 20, 40, 60, 100, 150, 200, 300, 400, 500, 700, 1000)

READING = """## How to read the tables

Made from the cells in this folder, one JSON file a training run with its configuration, seed, history and times, by

```
python -m models reproduce --report
```

`python -m models reproduce --list` names the tables and figures and says how many of their cells are here;
`python -m models reproduce --table 3 --data-dir DIR` trains what is missing and skips what is here (`--dry-run`: says
what, and roughly how long it takes). What is written by hand stands in the notes.md of a table's folder.

* protocol: {protocol};
* ± is the standard deviation over the seeds; gains and p (two-sided paired t-test) compare NDCG@10, over the seeds that
  both were trained with. Gain over adam: over Adam with settings of its own, as the paper's are. Gain over adamw: over
  AdamW with the very settings that SEvo has, which were not chosen for AdamW: what smoothing and the correction of the
  moments of idle rows do together (Figure 6 takes them apart). Published gains are over the paper's plain row;
* difference: our mean less the published one. Its standard error (s.e.) combines that of our mean and, where its runs
  are known, that of the published mean; for a single run of ours the published runs' deviation stands in;
* trained until adamw's best: until validation NDCG@10, as often as it is evaluated, is first as high as that of plain
  AdamW with the same seed at its best epoch; mean ± deviation over the seeds that get there (triangles in pictures).
  "adamw": its own epochs with these seeds. Seconds are of training alone, epochs times seconds an epoch, and of runs
  that had other work beside them: what an epoch costs, Figure 3 measures. Steps are given where the cells have them;
* of common seeds: the mean test NDCG@10 over the seeds that all lines of a row have, and the gain over adamw with
  these, where some have more: what compares lines with each other;
* by training interactions of the item to find, by items in the user's history: the test users in groups, in cells that
  have them; in brackets the gain over plain AdamW with the same seeds. Coverage is the share of the catalogue that is
  among anybody's first ten;
* † fewer epochs than the published settings have: no final result; fewer without †: early stopping ended the run;
* how long takes what was not run is told from runs of the same model and loss here, on other data by the interactions
  that training sees (cross-entropy: times the items);
* seconds and minutes are those of one seed; trained with {versions} on {devices}.
"""


def write_report(results_dir: Path, tables: Sequence[Table]) -> list[Path]:
    """Writes ``README.md`` and the pictures.

    Args:
      results_dir: the folder of the cells.
      tables: the tables, in the order in which they are shown.

    Returns:
      The files.

    Raises:
      ValueError: if there are no cells, or one cannot be read.
    """
    store = Cells(results_dir)
    found = [TableCells.of(table, store) for table in tables]
    cells = store.all()
    if not cells and not any(row.costs for table in found for row in table.rows):
        raise ValueError(f"results_dir: {results_dir} holds no cells; train some first, without --report")
    protocols = _distinct([cell.protocol for cell in cells])
    versions = _distinct([", ".join(f"{name} {x}" for name, x in cell.versions.items()) for cell in cells])
    parts = ["# Results", *_claims_parts(found)]
    if cells:
        devices = "; ".join(_distinct([cell.device for cell in cells]))
        parts.append(
            READING.format(
                protocol=";\n  or ".join(protocols), versions="; or ".join(versions), devices=devices
            ).rstrip()
        )
    files = []
    for table in found:
        section, pictures = _section(table, results_dir, cells)
        parts.append(section)
        files += pictures
    write_text(results_dir / "README.md", "\n\n".join(parts) + "\n")
    return [results_dir / "README.md", *files]


def _claims_parts(found: Sequence[TableCells]) -> list[str]:
    """What of the paper's claims holds, as far as it was run."""
    lines = claim_lines({table.table.name: table for table in found})
    if not lines:
        return []
    header = ["the paper's claim", "verdict", "evidence", "not run"]
    return [
        "What the cells here say about the paper's claims. A verdict counts complete runs alone, and is computed from "
        "them; how many seeds stand behind a figure, its table below says. What was not run, or not to its end, is "
        "counted without seeds.",
        markdown(header, lines, left=4),
    ]


def _section(found: TableCells, results_dir: Path, cells: Sequence[Cell]) -> tuple[str, list[Path]]:
    """The text about a table, and its pictures, which are drawn.

    Args:
      found: the table.
      results_dir: the folder of the cells.
      cells: all that there are.
    """
    table = found.table
    parts = [f"## {table.title}", table.description]
    notes = results_dir / table.name / "notes.md"
    if notes.is_file():
        parts.append(notes.read_text(encoding="utf-8").strip())
    trained = found.trained
    match table.picture.kind:
        case "times":
            parts += _times_parts(found)
        case "smoothness":
            parts += _smoothness_parts(found)
        case "maps":
            pass
        case _ if trained:
            parts += _overview_parts(trained)
    parts += _gains_parts(found)
    missing = not_run(found, cells)
    if missing:
        command = f"python -m models reproduce --{table.name.replace('-', ' ', 1)}"
        if table.name not in table_names():  # one's own is given as a file
            command = f"python -m models reproduce --table {table.name}.yaml"
        elif not table.name.startswith(("table-", "figure-")):
            command = f"python -m models reproduce --table {table.name}"
        does = "measures" if table.measured else "trains"
        parts.append(
            f"Not run (`{command} --data-dir DIR` {does} it):\n\n" + "\n".join(f"* {line}" for line in missing)
        )
    curves = table.picture.kind == "curves"
    if curves:
        trained = [row for row in trained if not row.borrowed]
    files = [] if curves else draw_table(found, results_dir)
    parts += [f"![{table.title}]({file.name})" for file in files]
    for row in trained:
        picture = None
        if curves and not row.row.closed_form:
            picture = results_dir / f"{table.name}-{row.row.name}.png"
            draw_curves(row, picture)
            files.append(picture)
        who_gains = results_dir / f"{table.name}-{row.row.name}-who-gains.png"
        if not curves or not draw_who_gains(row, who_gains):
            who_gains = None
        else:
            files.append(who_gains)
        if table.picture.kind in DETAILED:
            parts.append(row_text(row, picture, who_gains))
    return "\n\n".join(parts), files


def _overview_parts(rows: Sequence[RowCells]) -> list[str]:
    """The table of NDCG@10 and gains, and what its marks mean."""
    bases = [arm for arm in PLAIN if any(row.baseline(summary, arm) for row in rows for summary in row.summaries)]
    header = ["", "optimizer", "seeds", f"{SELECTION}, ours", "published", "difference", "s.e.", "within 2 s.e."]
    for arm in bases:
        header += [f"gain over {arm}", "p"]
    header.append("published gain")
    lines = [line for row in rows for line in overview(row, bases)]
    common = [text for row in rows for text in of_common_seeds(row)]
    if any(text != NONE for text in common):
        header.insert(4, "of common seeds")
        lines = [[*line[:4], text, *line[4:]] for line, text in zip(lines, common, strict=True)]
    parts = [markdown(header, lines, left=2)]
    if any(row.chosen(summary) for row in rows for summary in row.summaries):
        parts.append(
            "**Bold**: the best of its optimizer on the validation items, in the epochs that all of them have; without "
            "those that lack epochs, unless all do."
        )
    outdated = _distinct(
        [f"{x.group.arm} {x.outdated}" for row in rows for x in row.summaries if x.outdated is not None]
    )
    if outdated:
        parts.append(f"‡ Made by an earlier version, in which {'; '.join(outdated)}. To be trained again.")
    return parts


def overview(row: RowCells, bases: Sequence[Optimizer]) -> list[list[str]]:
    """A row's lines of the table's overview."""
    lines = []
    plain = row.row.published_plain
    for summary in row.summaries:
        published = row.published(summary)
        comparison = [NONE] * 4
        theirs = NONE
        if published is not None and published.metrics:
            value = published.metrics[SELECTION]
            difference = summary.mean() - value
            error = summary.standard_error(published)
            comparison = [_with_deviation(value, published.deviation), f"{difference:+z.4f}"]
            comparison += [NONE if error is None else f"{error:.4f}"]
            # A published mean may deviate, too: where it is not known how far, a larger difference says nothing.
            near = error is not None and abs(difference) <= 2 * error
            known = error is not None and (near or published.deviation is not None)
            comparison += [_yes(near) if known and not summary.short else NONE]
            if plain is not None and published is not plain and len(row.row.arms) > 1:
                theirs = f"{value / plain.metrics[SELECTION] - 1:+.1%}"
        gains = []
        for arm in bases:
            base = row.baseline(summary, arm)
            over = summary.gain(base)
            if over is None:
                gains += [NONE, NONE]
                continue
            p_value = NONE if over.p_value is None else f"{over.p_value:.2g}"
            gains += [NONE if over.relative is None else f"{over.relative:+.1%}", p_value]
        label = f"**{summary.label}**" if row.chosen(summary) else summary.label
        title = "" if lines else row.row.title
        ours = _with_deviation(summary.mean(), summary.deviation())
        lines.append([title, label, str(len(summary.cells)), ours, *comparison, *gains, theirs])
    return lines


def of_common_seeds(row: RowCells) -> list[str]:
    """Of each line of a row, the mean NDCG@10 and the gain over adamw of the seeds that all have; – if they are all.

    Behind them the seeds.
    """
    common = with_seeds_in_common(row)
    if all(len(x.cells) == len(y.cells) for x, y in zip(row.summaries, common.summaries, strict=True)):
        return [NONE] * len(row.summaries)
    seeds = [cell.seed for cell in common.summaries[0].cells]
    which = f"(seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))})"
    lines = []
    for summary in common.summaries:
        over = summary.gain(common.baseline(summary, "adamw"))
        gain = "" if over is None or over.relative is None else f", {over.relative:+.1%}"
        lines.append(f"{summary.mean():.4f}{gain} {which}")
    return lines


def _gains_parts(found: TableCells) -> list[str]:
    """Average gains a subject, beside the published ones, if the table has any."""
    table = found.table
    if not table.gains:
        return []
    published = {(x.subject, x.arm, tuple(x.settings.items())): x.gain for x in table.gains}
    by_base = {}
    for base in ("adam", "adamw"):
        # Settings compare on the same data sets and seeds.
        rows = comparable_rows(found.rows, base) if any(x.settings for x in table.gains) else found.rows
        by_base[base] = {(x.subject, x.arm, tuple(x.settings.items())): x for x in average_gains(rows, base)}
    lines = []
    for key in dict.fromkeys([key for gains in by_base.values() for key in gains]):
        mine = [gains.get(key) for gains in by_base.values()]
        if key not in published and all(x is None or x.gain is None for x in mine):
            continue
        some = next(x for x in mine if x is not None)
        line = [some.subject, some.label]
        for x in mine:
            if x is None or x.gain is None:
                line += [NONE, NONE]
            else:
                line += [f"{x.gain:+.1%}" + (" †" if x.short else ""), ", ".join(x.datasets)]
        lines.append([*line, f"{published[key]:+.1%}" if key in published else NONE])
    header = ["average gain", "optimizer", "over adam", "on", "over adamw", "on", "published, over its plain rows"]
    return [
        f"Average gains over the data sets and over {', '.join(METRICS)}, all alike; the published ones are over all "
        "four data sets.",
        markdown(header, lines, left=2),
    ]


def not_run(found: TableCells, cells: Sequence[Cell]) -> list[str]:
    """What is missing of a table, a line a row, and roughly how long a seed of it takes.

    Args:
      found: the table.
      cells: all that there are, to tell how long it takes from.
    """
    lines = []
    devices = Counter(cell.device for cell in cells)
    device = devices.most_common(1)[0][0] if devices else ""
    for row in found.rows:
        if row.missing and found.table.measured:
            lines.append(row.row.title)
        elif row.missing:
            which = f": {', '.join(group.label for group in row.missing)}" if row.summaries else ""
            seconds = [seconds_of(group, group.config().epochs, cells, device) for group in row.missing]
            known = [x for x in seconds if x is not None]
            some = "" if len(known) == len(seconds) else f" for {len(known)} of {len(seconds)} runs"
            took = f" (about {rough_duration(sum(known))} a seed{some}, on {device})" if known else ""
            lines.append(f"{row.row.title}{which}{took}")
    return lines


def _times_parts(found: TableCells) -> list[str]:
    """Seconds of training and inference, beside the published ones."""
    lines, measured = [], []
    for row in found.rows:
        title = row.row.subject
        for arm in row.row.arms:
            theirs = found.table.times.get(row.row.subject, {}).get(arm, {})
            ours = [NONE] * 5
            if row.costs is not None:
                costs = row.costs.arms[arm]
                more = row.costs.overhead(arm)
                ours = [str(costs.epochs), f"{costs.epoch_seconds:.2f}", NONE if more is None else f"{more:+.0%}"]
                ours += [f"{costs.training_seconds:,.0f}", f"{costs.inference_seconds:.2f}"]
                measured.append(f"on {row.costs.device}, with jax {row.costs.versions['jax']}")
            published = [f"{theirs[name]:,g}" if name in theirs else NONE for name in ("training", "inference")]
            lines.append([title, arm, *ours[:4], published[0], ours[4], published[1]])
            title = ""
    header = [
        "",
        "optimizer",
        "epochs",
        "s/epoch",
        "over adamw",
        "training, s",
        "published",
        "inference, s",
        "published",
    ]
    return [f"Measured {'; '.join(_distinct(measured))}.", markdown(header, lines, left=2)] if measured else []


def _smoothness_parts(found: TableCells) -> list[str]:
    """Dirichlet energies at the end of training, beside the published ones."""
    over = found.table.picture.over[0]
    lines = []
    for row in found.trained:
        title = row.row.title
        for value, summary, published in smoothness_lines(row, over):
            line = [title, f"{value:g}"]
            for measured in get_args(Measured):
                energy = None if summary is None else summary.energy(measured)
                line.append(NONE if energy is None else f"{energy:,.0f}")
                if measured != "raw update":
                    line.append(f"{published[measured]:,.0f}" if measured in published else NONE)
            lines.append(line)
            title = ""
    header = ["", over, "J of the raw update", "of the smoothed update", "published", "of the embedding", "published"]
    return [markdown(header, lines, left=2)] if lines else []


def row_text(row: RowCells, picture: Path | None, who_gains: Path | None = None) -> str:
    """The section about a row.

    Args:
      row: the row.
      picture: of its curves; None: there is none.
      who_gains: of the gains of groups of users; None: there is none.
    """
    header = ["optimizer", *METRICS, f"validation {SELECTION}", "best epoch", "epochs", "s/epoch", "minutes"]
    parts = [f"### {row.row.title}"]
    if picture is not None:
        parts.append(f"![Validation NDCG@10 and training loss]({picture.name})")
    parts.append(markdown(header, details(row), left=1))
    reached = times_to_quality(row)
    if reached:
        parts.append(markdown(reached[0], reached[1:], left=1))
    curves = [] if row.row.closed_form else learning(row)
    if curves:
        parts.append(markdown(curves[0], curves[1:], left=1))
    parts += [markdown(lines[0], lines[1:], left=1) for lines in map(partial(by_group, row), COUNTED) if lines]
    if who_gains is not None:
        parts.append(f"![Gain of groups of users over adamw]({who_gains.name})")
    compared = losses(row)
    if compared:
        header = ["training loss", "epoch", "ours", "published mean", "published runs", "difference"]
        parts.append(markdown(header, compared, left=1))
    return "\n\n".join(parts)


def details(row: RowCells) -> list[list[str]]:
    """All metrics, ours and published, and what they took."""
    lines = []
    published = list(row.row.published)
    for summary in row.summaries:
        cells = summary.cells
        trained = _span(cell.epochs for cell in cells)
        epochs = str(summary.group.config().epochs)
        lines.append(
            [
                f"{summary.label}, ours",
                *(_with_deviation(summary.mean(name), summary.deviation(name)) for name in METRICS),
                f"{summary.validation:.4f}",
                _span(cell.best_epoch for cell in cells),
                trained if trained == epochs else f"{trained} of {epochs}",
                f"{statistics.fmean(cell.epoch_seconds for cell in cells):.2f}",
                f"{statistics.fmean(cell.total_seconds for cell in cells) / 60:.1f}",
            ]
        )
        ours = row.published(summary)
        if ours in published and ours.metrics:
            published.remove(ours)
            lines.append(_published_line(ours))
    trained = {summary.group.arm for summary in row.summaries}
    return lines + [_published_line(x) for x in published if x.metrics and x.arm not in trained]


def times_to_quality(row: RowCells) -> list[list[str]]:
    """When each arm is as good as plain AdamW gets at best, a header line first; empty: there is nothing to compare."""
    found = row.times_to_quality()
    measures = [x for x in MEASURES if any(getattr(reached, x) is not None for _, reached in found)]
    header = [f"trained until adamw's best validation {SELECTION}", "seeds that reach it", *measures]
    header.insert(3, "adamw")
    lines = []
    for summary, reached in found:
        seeds = f"{reached.reached} of {len(reached.seeds)}"
        line = [summary.label, seeds, *(reached.text(measure, NONE) for measure in measures)]
        base = row.plain_adamw(summary).courses
        arrived = [seed for seed, epoch in zip(reached.seeds, reached.epochs, strict=True) if epoch is not None]
        itself = time_to_quality({seed: base[seed] for seed in arrived or reached.seeds}, base)
        line.insert(3, NONE if summary.group.arm == "adamw" else itself.text("epochs"))
        lines.append(line)
    return [header, *lines] if lines else []


def by_group(row: RowCells, grouping: Grouping) -> list[list[str]]:
    """Test NDCG@10 of groups of users, with the gain over plain AdamW, a header line first; empty: nothing is known."""
    found = row.group_gains(grouping)
    if not found:
        return []
    coverage = f"coverage@{SELECTION_K}"
    known = any(coverage in cell.test for summary, _ in found for cell in summary.cells)
    header = [f"{SELECTION} by {COUNTED[grouping]}"]
    header += ["seeds"]
    header += [
        f"{name} ({gain.users:,} {'user' if gain.users == 1 else 'users'})" for name, gain in found[0][1].items()
    ]
    header += [coverage] if known else []
    lines = []
    for summary, gains in found:
        seeds, compared = (max(getattr(gain, x) for gain in gains.values()) for x in ("seeds", "compared"))
        line = [summary.label, str(seeds) if compared in (0, seeds) else f"{seeds}, {compared} of them compared"]
        for gain in gains.values():
            relative = "" if gain.relative is None else f" ({gain.relative:+.1%})"
            line.append(NONE if gain.mean is None else f"{gain.mean:.4f}{relative}")
        if known:
            values = [cell.test[coverage] for cell in summary.cells if coverage in cell.test]
            line.append(f"{statistics.fmean(values):.3f}" if values else NONE)
        lines.append(line)
    return [header, *lines]


def losses(row: RowCells) -> list[list[str]]:
    """Training losses beside the published ones."""
    lines = []
    for summary in row.summaries:
        published = row.published(summary)
        for epoch, (least, mean, largest) in (published.losses if published else {}).items():
            values = [cell.history[epoch - 1]["loss"] for cell in summary.cells if cell.epochs >= epoch]
            if values:
                ours = statistics.fmean(values)
                difference = f"{ours / mean - 1:+.1%}"
                spread = NONE if least == largest else f"{least:.3f} – {largest:.3f}"  # one value has none
                lines.append([summary.label, str(epoch), f"{ours:.3f}", f"{mean:.3f}", spread, difference])
    return lines


def learning(row: RowCells) -> list[list[str]]:
    """Validation NDCG@10 on the way, a header line first: the curves in figures."""
    columns = [(str(epoch), [summary.validation_after(epoch) for summary in row.summaries]) for epoch in MILESTONES]
    columns = [(epoch, values) for epoch, values in columns if any(value is not None for value in values)]
    header = [f"validation {SELECTION} after epoch", *(epoch for epoch, _ in columns)]
    lines = [
        [summary.group.label, *(NONE if values[i] is None else f"{values[i]:.4f}" for _, values in columns)]
        for i, summary in enumerate(row.summaries)
    ]
    return [header, *lines] if columns else []


def _span(numbers: Iterable[int]) -> str:
    """The smallest and the largest, or the only one."""
    found = sorted({*numbers})
    return str(found[0]) if len(found) == 1 else f"{found[0]}–{found[-1]}"


def _published_line(published: Published) -> list[str]:
    figures = []
    for name in METRICS:
        deviation = published.deviation if name == SELECTION else None
        figures.append(_with_deviation(published.metrics[name], deviation) if name in published.metrics else NONE)
    label = f"{published.arm}, {published.label}" if published.arm else published.label
    return [label, *figures, *[NONE] * 5]


def _with_deviation(mean: float, deviation: float | None) -> str:
    return f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _distinct(values: Sequence[str]) -> list[str]:
    return sorted(set(values))


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], *, left: int) -> str:
    """A table whose first ``left`` columns are text and whose others are figures."""
    sides = ["left"] * left + ["right"] * (len(header) - left)
    return tabulate(lines, header, tablefmt="pipe", disable_numparse=True, colalign=sides)
