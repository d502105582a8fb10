"""The cells of one group, or of several rows, taken together."""

import copy
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

from models.config import SELECTION, Grouping, Optimizer
from models.reproduce.cells import Cell, Cells, cell_path
from models.reproduce.costs import find_costs
from models.reproduce.tables import (
    BASELINES,
    METRICS,
    PLAIN,
    Measured,
    Published,
    Row,
    SeedGroup,
    Table,
    settings_in_words,
)
from models.training.compare import Gain, gain
from models.training.time_to_quality import Course, TimeToQuality, time_to_quality

Key = TypeVar("Key")


@dataclasses.dataclass(frozen=True)
class Summary:
    """The cells of a group, taken together.

    Attributes:
      group: what was trained.
      cells: the cells, by seed; at least one.
    """

    group: SeedGroup
    cells: Sequence[Cell]

    @property
    def label(self) -> str:
        """The group's, with marks: † if epochs are missing, ‡ if the arm has changed since."""
        return self.group.label + (" †" if self.short else "") + (" ‡" if self.outdated else "")

    @property
    def short(self) -> bool:
        """Whether epochs are missing."""
        return self.epochs < self.group.config().epochs

    @property
    def outdated(self) -> str | None:
        """What the arm did when a cell was made, if it does something else now."""
        return next((cell.outdated for cell in self.cells if cell.outdated), None)

    @property
    def epochs(self) -> int:
        """The epochs that every seed was asked for."""
        return min(cell.config["epochs"] for cell in self.cells)

    @cached_property
    def by_seed(self) -> dict[tuple[int, int], float]:
        """Test NDCG@10 by seed and epochs: what may be compared between arms."""
        return {cell.pairing: cell.test[SELECTION] for cell in self.cells}

    @property
    def validation(self) -> float:
        """Mean of the best validation NDCG@10."""
        return statistics.fmean(cell.validation[SELECTION] for cell in self.cells)

    @property
    def epoch_seconds(self) -> float:
        """Mean seconds of an epoch."""
        return statistics.fmean(cell.epoch_seconds for cell in self.cells)

    @property
    def courses(self) -> dict[int, Course]:
        """How the runs went, by seed."""
        return {cell.seed: Course(cell.curve, cell.epoch_seconds, cell.epoch_steps) for cell in self.cells}

    def energy(self, measured: Measured, epoch: int = -1) -> float | None:
        """Mean Dirichlet energy of the first smoothed table, or of its update, after an epoch; None: not recorded.

        Args:
          measured: of what.
          epoch: after which, counted from 1; -1: the last.
        """
        values = []
        for cell in self.cells:
            record = cell.history[epoch if epoch < 0 else epoch - 1] if cell.epochs >= epoch else {}
            found = [x for name, x in record.get("diagnostics", {}).items() if name.endswith(f"/{measured} energy")]
            values += found[:1]
        return statistics.fmean(values) if len(values) == len(self.cells) else None

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
        """Over a plain arm, over the seeds in common; None: there are none."""
        if baseline is None or self.group == baseline.group:
            return None
        common = [key for key in self.by_seed if key in baseline.by_seed]
        if not common:
            return None
        return gain([self.by_seed[key] for key in common], [baseline.by_seed[key] for key in common])


@dataclasses.dataclass(frozen=True)
class GroupGain:
    """How a group of cells does for one group of test users, and what it gains over plain AdamW with the same seeds.

    Attributes:
      users: how many test users there are.
      mean: mean test NDCG@10 of theirs; None: there are none.
      difference: mean difference to plain AdamW, over the seeds in common; None: there are none.
      deviation: standard deviation of the differences; None: there are less than two.
      relative: the difference divided by plain AdamW's mean; None: not known, or that is 0.
      seeds: how many seeds the mean is of.
      compared: how many of them are in common.
    """

    users: int
    mean: float | None
    difference: float | None = None
    deviation: float | None = None
    relative: float | None = None
    seeds: int = 0
    compared: int = 0

    @classmethod
    def of(
        cls, mine: Sequence[Cell], base: Mapping[tuple[int, int], Cell], grouping: Grouping, name: str
    ) -> "GroupGain":
        """From cells that know their groups.

        Args:
          mine: of one group of cells, at least one.
          base: plain AdamW's, by seed and epochs; empty: nothing is compared.
          grouping: what users are grouped by.
          name: which of them.
        """

        def ndcg(cell: Cell) -> float:
            return cell.groups[grouping][name][SELECTION]

        users = int(mine[0].groups[grouping][name]["users"])
        if not users:
            return cls(0, None, seeds=len(mine))
        mean = statistics.fmean(map(ndcg, mine))
        pairs = [(ndcg(cell), ndcg(base[cell.pairing])) for cell in mine if cell.pairing in base]
        if not pairs:
            return cls(users, mean, seeds=len(mine))
        differences = [one - other for one, other in pairs]
        difference, before = statistics.fmean(differences), statistics.fmean(other for _, other in pairs)
        deviation = statistics.stdev(differences) if len(pairs) > 1 else None
        relative = difference / before if before else None
        return cls(users, mean, difference, deviation, relative, len(mine), len(pairs))


def with_common_seeds(summaries: Mapping[Key, Summary | None]) -> dict[Key, Summary]:
    """Groups of cells, each without the seeds that another of them lacks: what may be compared.

    Empty, if one of them is None or they have no seed in common.
    """
    known = {key: summary for key, summary in summaries.items() if summary is not None}
    if not known or len(known) < len(summaries):
        return {}
    seeds = set.intersection(*({cell.seed for cell in summary.cells} for summary in known.values()))
    if not seeds:
        return {}
    return {key: Summary(x.group, [cell for cell in x.cells if cell.seed in seeds]) for key, x in known.items()}


class RowCells:
    """A row of a table, as far as it was trained.

    Args:
      row: the row.
      cells: where the cells are.
      experiment: the table's name.
      measured: whether it is the costs of the row that are wanted, and no cells.
    """

    def __init__(self, row: Row, cells: Cells, experiment: str, *, measured: bool = False) -> None:
        self.row = row
        #: What was measured; None: nothing, or nothing is to be.
        self.costs = find_costs(cells.results_dir, experiment, row) if measured else None
        self._has_own = False
        if measured:
            self.summaries: list[Summary] = []
            self.missing = row.groups if self.costs is None else []
            return
        found = [Summary(group, cells.of(experiment, group)) for group in row.groups]
        self._has_own = any(
            cell_path(cells.results_dir, experiment, x.group, cell.seed).exists() for x in found for cell in x.cells
        )
        self.summaries = [summary for summary in found if summary.cells]
        self.missing = [summary.group for summary in found if not summary.cells]

    @property
    def borrowed(self) -> bool:
        """Whether all that is there is plain runs of other rows or tables, which say nothing of what this is about."""
        smoothed = [group for group in self.row.groups if group.arm in BASELINES and group.arm not in PLAIN]
        return bool(smoothed) and not self._has_own and not any(x.group in smoothed for x in self.summaries)

    def baseline(self, summary: Summary, arm: Optimizer) -> Summary | None:
        """The group of a plain arm that another is compared with; None: it was not trained, or is the same."""
        if arm not in BASELINES.get(summary.group.arm, ()):
            return None
        wanted = summary.group.baseline(arm)
        return next((x for x in self.summaries if x.group == wanted), None)

    def plain_adamw(self, summary: Summary) -> Summary | None:
        """The group of plain AdamW that a group is as good as or not, be it the group itself; None: not trained."""
        wanted = summary.group.baseline("adamw")
        return next((x for x in self.summaries if x.group == wanted), None)

    def times_to_quality(self) -> list[tuple[Summary, TimeToQuality]]:
        """When the runs of each group are as good as plain AdamW of the same seed gets at best.

        Nothing, if there is no group that plain AdamW could be compared with.
        """
        found = []
        for summary in self.summaries:
            base = self.plain_adamw(summary)
            if base is None:
                continue
            asked = {cell.seed: cell.config["epochs"] for cell in base.cells}
            # What plain AdamW gets in fewer epochs than the run has is no level to reach.
            mine = [cell for cell in summary.cells if asked.get(cell.seed, 0) >= cell.config["epochs"]]
            reached = time_to_quality(Summary(summary.group, mine).courses, base.courses)
            if reached is not None:
                found.append((summary, reached))
        return found if any(summary.group.arm != "adamw" for summary, _ in found) else []

    def group_gains(self, grouping: Grouping) -> list[tuple[Summary, dict[str, GroupGain]]]:
        """How each group of cells does for groups of test users, by their names; without cells that do not know."""
        found = []
        for summary in self.summaries:
            mine = [cell for cell in summary.cells if grouping in cell.groups]
            if not mine:
                continue
            base = self.plain_adamw(summary)
            others = base.cells if base is not None and base is not summary else []
            by_seed = {cell.pairing: cell for cell in others if grouping in cell.groups}
            names = mine[0].groups[grouping]
            found.append((summary, {name: GroupGain.of(mine, by_seed, grouping, name) for name in names}))
        return found

    def chosen(self, summary: Summary) -> bool:
        """Whether a group is the best of several of its arm, on the validation items, in what all have in common.

        That is their epochs, and their seeds if there is one that all have. Those that lack epochs count only where all
        do.
        """
        same = [x for x in self.summaries if x.group.arm == summary.group.arm]
        whole = [x for x in same if not x.short] or same
        epochs = min(x.epochs for x in whole)
        compared = with_common_seeds(dict(enumerate(whole))) or dict(enumerate(whole))
        best = max(compared, key=lambda i: compared[i].best_within(epochs))
        return len(same) > 1 and whole[best] is summary

    def published(self, summary: Summary) -> Published | None:
        """The published figures of a group. Of several that the same figures are for, the chosen one has them."""
        found = summary.group.published
        if found is None:
            return None
        same = [x for x in self.summaries if x.group.published is found]
        return found if len(same) == 1 or self.chosen(summary) else None


@dataclasses.dataclass(frozen=True)
class AverageGain:
    """The relative gain over a plain arm, averaged over data sets and metrics.

    Attributes:
      subject: what the rows have in common, such as the model.
      arm: the arm.
      settings: the values of what the rows vary.
      over: the plain arm.
      gain: the average of what was trained; None: nothing was.
      datasets: those that were trained.
      short: whether a cell has fewer epochs than it should.
    """

    subject: str
    arm: Optimizer
    settings: dict[str, Any]
    over: Optimizer
    gain: float | None
    datasets: tuple[str, ...]
    short: bool

    @property
    def label(self) -> str:
        """For readers: the arm and what is varied."""
        settings = settings_in_words(self.settings)
        return f"{self.arm} ({settings})" if settings else self.arm


def average_gains(rows: Sequence[RowCells], over: Optimizer, *, complete: bool = False) -> list[AverageGain]:
    """The average gain of each subject, arm and setting over a plain arm: the last line of the paper's Table 3.

    Each data set counts alike, and in it each of ``METRICS``; only seeds that both arms were trained with count.

    Args:
      rows: the rows.
      over: the plain arm.
      complete: whether data sets on which either arm lacks epochs, or its cells are outdated, are left out.
    """
    groups: dict[tuple[str, str], list[tuple[RowCells, SeedGroup]]] = {}
    for row in rows:
        for group in row.row.groups:
            if over in BASELINES.get(group.arm, ()) and over in row.row.arms:
                groups.setdefault((row.row.subject, group.label), []).append((row, group))
    found = []
    for (subject, _), members in groups.items():
        gains, datasets, short = [], [], False
        for row, group in members:
            summary = next((x for x in row.summaries if x.group == group), None)
            base = None if summary is None else row.baseline(summary, over)
            relative = None if base is None else _relative(summary, base)
            if complete and relative is not None and (summary.short or base.short or summary.outdated):
                continue
            if relative is not None:
                gains.append(relative)
                datasets.append(row.row.dataset)
                short = short or summary.short or base.short
        _, group = members[0]
        gain = statistics.fmean(gains) if gains else None
        found.append(AverageGain(subject, group.arm, group.settings, over, gain, tuple(datasets), short))
    return found


def comparable_rows(rows: Sequence[RowCells], over: Optimizer) -> list[RowCells]:
    """Rows whose average gains compare: of each subject those on whose data sets it has all, with the seeds in common.

    A subject that has them nowhere keeps all its rows.

    Args:
      rows: the rows.
      over: the plain arm.
    """
    kept = []
    for subject in dict.fromkeys(row.row.subject for row in rows):
        mine = [row for row in rows if row.row.subject == subject]
        whole = [row for row in mine if all(x.gain is not None for x in average_gains([row], over, complete=True))]
        kept += [with_seeds_in_common(row) for row in whole] or mine
    return kept


def with_seeds_in_common(row: RowCells) -> RowCells:
    """A row whose groups of cells have the same seeds; the row itself, if there is none that all have."""
    found = copy.copy(row)
    found.summaries = list(with_common_seeds(dict(enumerate(row.summaries))).values()) or row.summaries
    return found


def _relative(summary: Summary, base: Summary) -> float | None:
    """The relative gain, averaged over the metrics, of the seeds in common; None: there are none."""
    mine, theirs = ({cell.pairing: cell for cell in x.cells} for x in (summary, base))
    common = [key for key in mine if key in theirs]
    if not common:
        return None
    gains = []
    for metric in METRICS:
        before = statistics.fmean(theirs[key].test[metric] for key in common)
        if before:
            gains.append(statistics.fmean(mine[key].test[metric] for key in common) / before - 1)
    return statistics.fmean(gains) if gains else None


@dataclasses.dataclass(frozen=True)
class TableCells:
    """A table, as far as it was trained.

    Attributes:
      table: the table.
      rows: its rows.
    """

    table: Table
    rows: Sequence[RowCells]

    @classmethod
    def of(cls, table: Table, cells: Cells) -> "TableCells":
        """Finds what was trained of a table."""
        return cls(table, [RowCells(row, cells, table.name, measured=table.measured) for row in table.rows])

    @property
    def trained(self) -> list[RowCells]:
        """The rows of which something was trained."""
        return [row for row in self.rows if row.summaries]
