"""Reproducing published results: tables declared in YAML, filled cell by cell, and a report made from the cells."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from models.checks import check_numbers
from models.config import Optimizer

if TYPE_CHECKING:
    from models.reproduce.tables import Table

# JAX, scipy and matplotlib are imported by run(), so that --help answers at once.


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Train what is missing of a published table, and write the report. May be killed and started again at any time."""

    table: str = "3"
    """3: the paper's Table 3. cross-entropy: SEvo with the softmax loss. Or a YAML file like these."""
    data_dir: Path | None = None
    """Folder of beauty.txt, toys.txt, tools.txt and ml-1m.txt (left out: public builds of them, fetched once)."""
    datasets: tuple[str, ...] = ()
    """Only these: beauty, toys, tools, ml-1m (left out: all)."""
    models: tuple[str, ...] = ()
    """Only these (left out: all)."""
    arms: tuple[Optimizer, ...] = ()
    """Only these optimizers (left out: all)."""
    seeds: int = 3
    """How many seeds: 0, 1, …."""
    epochs: int | None = None
    """Stop so early; asked for more, a run goes on later (left out: as published)."""
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
        from models.reproduce.tables import load_table, table_names

        table = load_table(self.table)
        if not self.report:
            self._train(table)
        from models.reproduce.report import write_report

        names = table_names()
        tables = [load_table(name) for name in names] + ([table] if table.name not in names else [])
        for path in write_report(self.results_dir, tables):
            print(path)

    def _train(self, table: "Table") -> None:
        from models.reproduce import runner

        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        jobs, done = runner.plan(
            table,
            datasets=self.datasets,
            models=self.models,
            arms=self.arms,
            seeds=self.seeds,
            epochs=self.epochs,
            data_dir=self.data_dir,
            results_dir=self.results_dir,
            work_dir=self.work_dir,
        )
        print(f"{table.title}: {done} cells are done, {len(jobs)} to train", flush=True)
        workers = min(runner.usual_workers() if self.workers is None else self.workers, len(jobs))
        if workers > 1:
            runner.train_side_by_side(jobs, workers)
        elif jobs:
            runner.train(jobs)
