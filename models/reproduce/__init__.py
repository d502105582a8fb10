"""Reproducing published results: tables declared in YAML, filled cell by cell, and a report made from the cells."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from models.checks import check_numbers
from models.config import Optimizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from models.reproduce.tables import Table

# JAX, scipy and matplotlib are imported by run(), so that --help answers at once.


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Train what is missing of a table or figure, and write the report. May be killed and started again at any time."""

    table: str | None = None
    """3, 4, 5: the paper's tables. distillation: an experiment of it. cross-entropy, cross-entropy-graphs, cold-start,
    one-line: our own questions. Or a YAML file like these. (Left out: 3, unless a figure is asked for.)"""
    figure: str | None = None
    """3, 4a, 4b, 5a, 5b, 6, 7, 8: the paper's figures. Of 3, which is about seconds, a few epochs are measured, and
    nothing is trained to its end."""
    list: bool = False
    """Name the tables and figures, say how many of their cells are there, and do nothing else."""
    dry_run: bool = False
    """Say which cells are missing, and roughly how long they take on this machine, and do nothing else."""
    data_dir: Path | None = None
    """Folder of beauty.txt, toys.txt, tools.txt and ml-1m.txt (left out: public builds of them, fetched once)."""
    datasets: tuple[str, ...] = ()
    """Only these: beauty, toys, tools, ml-1m, ml-1m-cold (left out: all)."""
    models: tuple[str, ...] = ()
    """Only these (left out: all)."""
    arms: tuple[Optimizer, ...] = ()
    """Only these optimizers (left out: all)."""
    cells: tuple[str, ...] = ()
    """Only cells with such names, as --dry-run has them; * stands for anything: 'beauty-distance-*' (left out: all)."""
    seeds: int = 3
    """How many seeds: 0, 1, …."""
    epochs: int | None = None
    """Stop so early; asked for more, a run goes on later (left out: as published). Best a multiple of eval_every: the
    last epoch is evaluated in any case, and a run that goes on keeps that."""
    workers: int | None = None
    """Processes that train side by side, each on its share of the cores (left out: on a CPU one a core, if there are
    2 GiB of memory for each; on an accelerator one)."""
    report: bool = False
    """Write tables and pictures from the cells that are there, and train nothing."""
    quiet: bool = False
    """Show no progress of the runs, only which are trained and what came out."""
    results_dir: Path = Path("results")
    """Folder for the cells, README.md and the pictures."""
    work_dir: Path = Path("runs/reproduce")
    """Folder for the runs themselves, with their checkpoints."""

    def run(self) -> None:
        """Trains what is missing, unless only the report is asked for, and writes the report."""
        check_numbers(self)
        self._check_heeded()
        from models.reproduce.tables import bundled_tables, load_table

        if self.table is not None and self.figure is not None:
            raise ValueError(
                f"table and figure exclude each other, got {self.table} and {self.figure}; give one of them"
            )
        table = load_table(self.table or "3" if self.figure is None else f"figure-{self.figure}")
        known = {other.name: other for other in bundled_tables()}
        if known.setdefault(table.name, table) != table:
            raise ValueError(
                f"table: {self.table} has the name of a table that comes along, {table.name}, and other contents; give "
                "the file a name of its own"
            )
        tables = list(known.values())
        if self.list:
            self._list(tables)
            return
        if not self.report and table.measured:
            self._measure(table)
        elif not self.report:
            self._train(table)
        if self.dry_run:
            return
        from models.reproduce.report import write_report

        for path in write_report(self.results_dir, tables):
            print(path)

    def _check_heeded(self) -> None:
        """Refuses options that ``--list`` and ``--report`` do not heed, which train nothing and plan nothing."""
        modes = [name for name in ("list", "dry_run", "report") if getattr(self, name)]
        if len(modes) > 1:
            raise ValueError(f"{' and '.join(modes)} exclude each other; give one of them")
        if not self.list and not self.report:
            return
        heeded = {*modes, "table", "figure", "results_dir", "quiet"} | ({"seeds"} if self.list else set())
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in heeded and value != field.default:
                raise ValueError(f"{field.name} is not heeded with {modes[0]}, got {value}; leave it out")

    def _list(self, tables: "Sequence[Table]") -> None:
        from models.reproduce.cells import Cells
        from models.reproduce.status import listing

        print(listing(tables, Cells(self.results_dir), self.seeds))

    def _measure(self, table: "Table") -> None:
        from models.reproduce import costs
        from models.reproduce.status import dry_run_costs

        for name in ("arms", "cells", "epochs", "workers"):
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"{name}: the seconds of {table.name} are measured, with all arms side by side in one process, got "
                    f"{getattr(self, name)}; leave out --{name}"
                )
        jobs, done = costs.plan_costs(
            table, datasets=self.datasets, models=self.models, data_dir=self.data_dir, results_dir=self.results_dir
        )
        print(f"{table.title}: {done} rows are done, {len(jobs)} to measure", flush=True)
        if self.dry_run:
            from models.reproduce.cells import Cells
            from models.reproduce.runner import device_name

            print(dry_run_costs(jobs, Cells(self.results_dir), device_name()))
        else:
            costs.measure_all(jobs)

    def _train(self, table: "Table") -> None:
        from models.reproduce import runner

        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        jobs, done = runner.plan(
            table,
            datasets=self.datasets,
            models=self.models,
            arms=self.arms,
            cells=self.cells,
            seeds=self.seeds,
            epochs=self.epochs,
            data_dir=self.data_dir,
            results_dir=self.results_dir,
            work_dir=self.work_dir,
        )
        print(f"{table.title}: {done} cells are done, {len(jobs)} to train", flush=True)
        workers = min(runner.usual_workers() if self.workers is None else self.workers, len(jobs))
        if self.dry_run:
            from models.reproduce.cells import Cells
            from models.reproduce.status import dry_run

            print(dry_run(jobs, Cells(self.results_dir), runner.device_name(), max(workers, 1)))
        elif workers > 1:
            runner.train_side_by_side(jobs, workers)
        elif jobs:
            runner.train(jobs)
