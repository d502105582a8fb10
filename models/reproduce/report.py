"""Tables and pictures, made from the cells alone."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tabulate import tabulate

from models import plots
from models.config import SELECTION
from models.files import write_text
from models.reproduce.cells import Cell, read_family
from models.reproduce.tables import METRICS, Family, Published, Row, Table
from models.training.compare import Gain, gain

NONE = "–"
MILESTONES = (10, 20, 40, 60, 100, 150, 200, 300, 400, 500)

INTRODUCTION = """# Results

Made from the cells in this folder, one JSON file a training run with its configuration, seed, history and times, by

```
python -m models reproduce --report
```

`python -m models reproduce --table 3 --data-dir DIR` trains what is missing and skips what is here. What is written by
hand stands in the notes.md of a table's folder.

How to read the tables:

* protocol: {protocol};
* ± is the standard deviation over the seeds; gain and p (two-sided paired t-test) compare NDCG@10 with that of plain
  AdamW, over the seeds that both were trained with;
* difference: our mean less the published one. Its standard error (s.e.) combines that of our mean and, where its runs
  are known, that of the published mean; for a single run of ours the published runs' deviation stands in;
* † fewer epochs than the published settings have: no final result;
* seconds and minutes are those of one seed; trained with {versions} on {devices}.
"""


@dataclasses.dataclass(frozen=True)
class Summary:
    """The cells of a family, taken together.

    Attributes:
      family: what was trained.
      cells: the cells, by seed; at least one.
    """

    family: Family
    cells: Sequence[Cell]

    @property
    def label(self) -> str:
        """The family's, with a mark if epochs are missing."""
        return self.family.label + (" †" if self.short else "")

    @property
    def short(self) -> bool:
        """Whether epochs are missing."""
        return self.epochs < self.family.row.config.epochs

    @property
    def epochs(self) -> int:
        """The epochs that every seed was asked for."""
        return min(cell.config["epochs"] for cell in self.cells)

    @cached_property
    def by_seed(self) -> dict[tuple[int, int], float]:
        """Test NDCG@10 by seed and epochs: what may be compared between arms."""
        return {(cell.seed, cell.config["epochs"]): cell.test[SELECTION] for cell in self.cells}

    @property
    def validation(self) -> float:
        """Mean of the best validation NDCG@10."""
        return statistics.fmean(cell.validation[SELECTION] for cell in self.cells)

    def best_within(self, epochs: int) -> float:
        """Mean of the best validation NDCG@10 of the first epochs; -inf: they were not evaluated."""
        return statistics.fmean(
            max((value for epoch, value in cell.curve if epoch <= epochs), default=-math.inf) for cell in self.cells
        )

    def validation_after(self, epoch: int) -> float | None:
        """Mean validation NDCG@10 after an epoch; None: a seed was not evaluated then."""
        values = [dict(cell.curve).get(epoch) for cell in self.cells]
        return None if None in values else statistics.fmean(values)

    def mean(self, metric: str = SELECTION) -> float:
        """Mean of a test metric."""
        return statistics.fmean(cell.test[metric] for cell in self.cells)

    def deviation(self, metric: str = SELECTION) -> float | None:
        """Standard deviation of a test metric; None: of one seed there is none."""
        return statistics.stdev(cell.test[metric] for cell in self.cells) if len(self.cells) > 1 else None

    def standard_error(self, published: Published) -> float | None:
        """Of the difference between our mean and a published one; None: not known."""
        deviation = self.deviation() if len(self.cells) > 1 else published.deviation
        if deviation is None:
            return None
        ours = deviation**2 / len(self.cells)
        theirs = published.deviation**2 / published.num_runs if published.deviation is not None else 0.0
        return math.sqrt(ours + theirs)

    def gain(self, baseline: "Summary | None") -> Gain | None:
        """Over plain AdamW, over the seeds in common; None: there are none."""
        if baseline is None:
            return None
        common = [key for key in self.by_seed if key in baseline.by_seed]
        if not common:
            return None
        return gain([self.by_seed[key] for key in common], [baseline.by_seed[key] for key in common])


class RowReport:
    """One row of a table, as far as it was trained.

    Args:
      row: the row.
      results_dir: the folder of the cells.
      experiment: the table's name.
    """

    def __init__(self, row: Row, results_dir: Path, experiment: str) -> None:
        self.row = row
        found = [Summary(family, read_family(results_dir, experiment, family)) for family in row.families]
        self.summaries = [summary for summary in found if summary.cells]
        self.missing = [summary.family for summary in found if not summary.cells]
        self.picture = f"{experiment}-{row.name}.png"

    @property
    def cells(self) -> list[Cell]:
        """All of them."""
        return [cell for summary in self.summaries for cell in summary.cells]

    def baseline(self, summary: Summary) -> Summary | None:
        """The plain AdamW that a family is compared with; None: it was not trained, or it is the same."""
        wanted = summary.family.baseline
        return next((x for x in self.summaries if x.family == wanted and x is not summary), None)

    def chosen(self, summary: Summary) -> bool:
        """Whether a family is the best of several of its arm, on the validation items, in the epochs that all have."""
        same = [x for x in self.summaries if x.family.arm == summary.family.arm]
        common = min(x.epochs for x in same)
        return len(same) > 1 and summary is max(same, key=lambda x: x.best_within(common))

    def overview(self) -> list[list[str]]:
        """Lines of the table's overview."""
        lines = []
        base = self.row.published_for("adamw")
        for summary in self.summaries:
            published = self.row.published_for(summary.family.arm)
            ours = _with_deviation(summary.mean(), summary.deviation())
            comparison = [NONE] * 4
            if published is not None:
                difference = summary.mean() - published.metrics[SELECTION]
                error = summary.standard_error(published)
                comparison = [_with_deviation(published.metrics[SELECTION], published.deviation), f"{difference:+z.4f}"]
                comparison += [NONE if error is None else f"{error:.4f}"]
                comparison += [NONE if error is None or summary.short else _yes(abs(difference) <= 2 * error)]
            over = summary.gain(self.baseline(summary))
            theirs = NONE
            if base is not None and published is not None and published is not base:
                theirs = f"{published.metrics[SELECTION] / base.metrics[SELECTION] - 1:+.1%}"
            gains = [NONE, theirs, NONE]
            if over is not None:
                p_value = NONE if over.p_value is None else f"{over.p_value:.2g}"
                gains = [NONE if over.relative is None else f"{over.relative:+.1%}", theirs, p_value]
            label = f"**{summary.label}**" if self.chosen(summary) else summary.label
            title = "" if lines else self.row.title
            lines.append([title, label, str(len(summary.cells)), ours, *comparison, *gains])
        return lines

    def details(self) -> list[list[str]]:
        """All metrics, ours and published, and what they took."""
        lines = []
        published = list(self.row.published)
        for summary in self.summaries:
            cells = summary.cells
            best = sorted({cell.best_epoch for cell in cells})
            lines.append(
                [
                    f"{summary.label}, ours",
                    *(_with_deviation(summary.mean(name), summary.deviation(name)) for name in METRICS),
                    f"{summary.validation:.4f}",
                    f"{best[0]}–{best[-1]}" if len(best) > 1 else str(best[0]),
                    f"{summary.epochs} of {self.row.config.epochs}" if summary.short else str(summary.epochs),
                    f"{statistics.fmean(cell.epoch_seconds for cell in cells):.2f}",
                    f"{statistics.fmean(cell.total_seconds for cell in cells) / 60:.1f}",
                ]
            )
            ours = self.row.published_for(summary.family.arm)
            if ours in published:
                published.remove(ours)
                lines.append(_published_line(ours))
        return lines + [_published_line(x) for x in published if x.arm is None]

    def losses(self) -> list[list[str]]:
        """Training losses beside the published ones."""
        lines = []
        for summary in self.summaries:
            published = self.row.published_for(summary.family.arm)
            for epoch, (least, mean, largest) in (published.losses if published else {}).items():
                values = [cell.history[epoch - 1]["loss"] for cell in summary.cells if cell.epochs >= epoch]
                if values:
                    ours = statistics.fmean(values)
                    difference = f"{ours / mean - 1:+.1%}"
                    spread = f"{least:.3f} – {largest:.3f}"
                    lines.append([summary.label, str(epoch), f"{ours:.3f}", f"{mean:.3f}", spread, difference])
        return lines

    def learning(self) -> list[list[str]]:
        """Validation NDCG@10 on the way, a header line first: the curves in figures."""
        columns = [
            (str(epoch), [summary.validation_after(epoch) for summary in self.summaries]) for epoch in MILESTONES
        ]
        columns = [(epoch, values) for epoch, values in columns if any(value is not None for value in values)]
        header = [f"validation {SELECTION} after epoch", *(epoch for epoch, _ in columns)]
        lines = [
            [summary.family.label, *(NONE if values[i] is None else f"{values[i]:.4f}" for _, values in columns)]
            for i, summary in enumerate(self.summaries)
        ]
        return [header, *lines] if columns else []

    def draw(self, path: Path) -> None:
        """Draws the curves."""
        counts: dict[str, int] = {}
        runs = []
        for summary in self.summaries:
            arm = summary.family.arm
            counts[arm] = counts.get(arm, -1) + 1
            seeds = f" ({len(summary.cells)} seeds)" if len(summary.cells) > 1 else ""
            losses = [[record["loss"] for record in cell.history] for cell in summary.cells]
            validation = [cell.curve for cell in summary.cells]
            runs.append(plots.Seeds(summary.family.label + seeds, arm, counts[arm], losses, validation))
        published = {x.arm: x.losses for x in self.row.published if x.arm is not None and x.losses}
        plots.training_curves(runs, path, title=self.row.title, published=published)

    def text(self) -> str:
        """The section about this row."""
        header = ["optimizer", *METRICS, f"validation {SELECTION}", "best epoch", "epochs", "s/epoch", "minutes"]
        parts = [f"### {self.row.title}", f"![Validation NDCG@10 and training loss]({self.picture})"]
        parts.append(_markdown(header, self.details(), left=1))
        learning = self.learning()
        if learning:
            parts.append(_markdown(learning[0], learning[1:], left=1))
        losses = self.losses()
        if losses:
            header = ["training loss", "epoch", "ours", "published mean", "published runs", "difference"]
            parts.append(_markdown(header, losses, left=1))
        return "\n\n".join(parts)


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
    reports = {table.name: [RowReport(row, results_dir, table.name) for row in table.rows] for table in tables}
    cells = [cell for rows in reports.values() for row in rows for cell in row.cells]
    if not cells:
        raise ValueError(f"results_dir: {results_dir} holds no cells; train some first, without --report")
    protocols = _distinct(cell.protocol for cell in cells)
    versions = _distinct(", ".join(f"{name} {x}" for name, x in cell.versions.items()) for cell in cells)
    parts = [
        INTRODUCTION.format(
            protocol="; or ".join(protocols),
            versions="; or ".join(versions),
            devices="; ".join(_distinct(cell.device for cell in cells)),
        ).rstrip()
    ]
    files = []
    for table in tables:
        parts.append(_section(table, reports[table.name], results_dir))
        for row in reports[table.name]:
            if row.summaries:
                row.draw(results_dir / row.picture)
                files.append(results_dir / row.picture)
    write_text(results_dir / "README.md", "\n\n".join(parts) + "\n")
    return [results_dir / "README.md", *files]


def _section(table: Table, rows: Sequence[RowReport], results_dir: Path) -> str:
    parts = [f"## {table.title}", table.description]
    notes = results_dir / table.name / "notes.md"
    if notes.is_file():
        parts.append(notes.read_text(encoding="utf-8").strip())
    trained = [row for row in rows if row.summaries]
    if trained:
        header = ["", "optimizer", "seeds", f"{SELECTION}, ours", "published", "difference", "s.e.", "within 2 s.e."]
        header += ["gain, ours", "gain, published", "p, ours"]
        parts.append(_markdown(header, [line for row in trained for line in row.overview()], left=2))
        if any(row.chosen(summary) for row in trained for summary in row.summaries):
            parts.append(
                "**Bold**: the best of its optimizer on the validation items, in the epochs that all of them have."
            )
    missing = []
    for row in rows:
        if row.missing:
            which = f": {', '.join(family.label for family in row.missing)}" if row.summaries else ""
            missing.append(f"* {row.row.title}{which}")
    if missing:
        parts.append("Not run:\n\n" + "\n".join(missing))
    return "\n\n".join([*parts, *(row.text() for row in trained)])


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


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]], *, left: int) -> str:
    """A table whose first ``left`` columns are text and whose others are figures."""
    sides = ["left"] * left + ["right"] * (len(header) - left)
    return tabulate(lines, header, tablefmt="pipe", disable_numparse=True, colalign=sides)
