"""What is there, what is missing, and roughly how long it takes."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tabulate import tabulate

from models.reproduce.cells import Cell, Cells
from models.reproduce.costs import ROUNDS, CostsJob, find_costs
from models.reproduce.runner import Job
from models.reproduce.tables import SeedGroup, Table


class Size(NamedTuple):
    """How large a data set is."""

    users: int
    items: int
    interactions: int


# Of the data sets of the bundled tables.
SIZES = {
    "beauty": Size(22_363, 12_101, 198_502),
    "toys": Size(19_412, 11_924, 167_597),
    "tools": Size(16_638, 10_217, 134_476),
    "ml-1m": Size(6_040, 3_416, 999_611),
    "ml-1m-cold": Size(6_040, 3_416, 999_611),
}


def listing(tables: Sequence[Table], cells: Cells, seeds: int) -> str:
    """The tables and figures, and how many of their cells are there.

    Args:
      tables: which.
      cells: where the cells are.
      seeds: how many seeds are wanted: 0, 1, ….
    """
    lines = []
    for table in tables:
        there = total = short = 0
        for row in table.rows:
            if table.measured:
                total += 1
                there += find_costs(cells.results_dir, table.name, row) is not None
                continue
            wanted = table.num_seeds(row, seeds)
            total += wanted * len(row.groups)
            for group in row.groups:
                found = [x for x in cells.of(table.name, group) if x.seed < wanted and not x.outdated]
                there += len(found)
                short += sum(cell.config["epochs"] < group.config().epochs for cell in found)
        lines.append([table.name, f"{there} of {total}", str(short or ""), table.title])
    header = ["name", "cells", "of fewer epochs", "title"]
    return tabulate(lines, header, tablefmt="plain", disable_numparse=True, colalign=["left", "right", "right", "left"])


def seconds_of(group: SeedGroup, epochs: int, cells: Iterable[Cell], device: str) -> float | None:
    """Roughly how long a run takes: as long an epoch as runs of the same model and loss on such a device.

    Runs on the same data set are asked first, then those on the one that is next in size, in proportion to the
    interactions that training sees, and with a loss over the whole catalogue to the items, too.

    Args:
      group: what is trained.
      epochs: for how long.
      cells: all that are there.
      device: what it runs on, such as ``CPU, 1 core``; what stands behind the comma does not matter.

    Returns:
      Seconds; None: there is no such run.
    """
    values = group.config().to_dict()
    by_dataset: dict[str, list[Cell]] = {}
    for cell in cells:
        same = (cell.model, cell.variant) == (values["model"], values.get("loss", ""))
        if same and cell.device.partition(",")[0].lower() == device.partition(",")[0].lower():
            by_dataset.setdefault(cell.dataset, []).append(cell)
    dataset = group.row.dataset
    work = _work(dataset, values)
    if dataset not in by_dataset:
        works = {other: _work(other, found[0].config) for other, found in by_dataset.items()}
        near = {other: abs(math.log(work / theirs)) for other, theirs in works.items() if work and theirs}
        if not near:
            return None
        dataset = min(near, key=near.__getitem__)
    similar = [cell for cell in by_dataset[dataset] if cell.arm == group.arm] or by_dataset[dataset]
    scales = [work / _work(dataset, cell.config) if work else 1.0 for cell in similar]
    if not any(cell.epoch_seconds for cell in similar):  # fitted in closed form
        return statistics.median(cell.total_seconds * scale for cell, scale in zip(similar, scales, strict=True))
    # What evaluation adds; the least, because pauses count as well.
    besides = min(cell.total_seconds / max(cell.epochs * cell.epoch_seconds, 1e-9) for cell in similar)
    epoch = statistics.median(cell.epoch_seconds * scale for cell, scale in zip(similar, scales, strict=True))
    return epoch * epochs * max(besides, 1)


def _work(dataset: str, config: Mapping[str, Any]) -> int:
    """What an epoch's time is in proportion to, roughly; 0: not known."""
    size = SIZES.get(dataset, Size(0, 0, 0))
    cut = not config.get("windows") and config.get("max_length")
    seen = min(size.interactions, size.users * cut) if cut else size.interactions
    return seen * (size.items if config.get("loss") == "ce" else 1)


def dry_run(jobs: Sequence[Job], cells: Cells, device: str, workers: int) -> str:
    """What is missing of a table, a line a group, and roughly how long it takes."""
    by_group: dict[str, list[Job]] = {}
    for job in jobs:
        by_group.setdefault(job.group.name, []).append(job)
    everything = cells.all()
    lines, known, unknown = [], 0.0, 0
    for name, missing in by_group.items():
        group, epochs = missing[0].group, missing[0].config.epochs
        seconds = seconds_of(group, epochs, everything, device)
        if seconds is None:
            unknown += len(missing)
        else:
            known += seconds * len(missing)
        seeds = ", ".join(str(job.config.seed) for job in missing)
        lines.append([name, seeds, str(epochs), "unknown" if seconds is None else rough_duration(seconds)])
    if not lines:
        return "nothing is missing"
    header = ["missing", "seeds", "epochs", "each about"]
    text = tabulate(lines, header, tablefmt="plain", disable_numparse=True, colalign=["left", "left", "right", "right"])
    side_by_side = f", {workers} side by side: {rough_duration(known / workers)}" if workers > 1 else ""
    rest = f"; and {unknown} of which the time is not known" if unknown else ""
    return f"{text}\n\n{len(jobs) - unknown} runs, about {rough_duration(known)}{side_by_side}{rest}"


def dry_run_costs(jobs: Sequence[CostsJob], cells: Cells, device: str) -> str:
    """What of a table is not measured, a line a row, and roughly how long measuring takes, apart from compiling."""
    if not jobs:
        return "nothing is missing"
    everything = cells.all()
    lines = []
    for job in jobs:
        seconds = [seconds_of(group, ROUNDS + 1, everything, device) for group in job.row.groups]
        known = [x for x in seconds if x is not None]
        about = rough_duration(sum(known)) if len(known) == len(seconds) else "unknown"
        lines.append([job.row.name, ", ".join(job.configs), about])
    header = ["to measure", "optimizers", "about"]
    return tabulate(lines, header, tablefmt="plain", disable_numparse=True, colalign=["left", "left", "right"])


def rough_duration(seconds: float) -> str:
    """Seconds in a unit that suits them.

    >>> rough_duration(42), rough_duration(500), rough_duration(9000)
    ('42 s', '8 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
