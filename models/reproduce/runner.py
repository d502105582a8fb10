"""Trains the cells that are missing."""

import contextlib
import dataclasses
import glob
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.config import Optimizer, TrainConfig
from models.files import claim, read_json
from models.memory import out_of_memory_told
from models.reproduce.cells import Cell, cell_path, defaults_of, portable
from models.reproduce.tables import Family, Table
from models.training.files import read_history

if TYPE_CHECKING:
    from models.training.prepare import Prepared
    from models.training.run import Result

BYTES_A_WORKER = 2 * 2**30


@dataclasses.dataclass(frozen=True)
class Job:
    """A cell to train.

    Attributes:
      experiment: the table's name.
      family: which cell, but for the seed.
      config: the run's configuration.
      path: where the cell will be kept.
      folder: where the run keeps its checkpoints.
    """

    experiment: str
    family: Family
    config: TrainConfig
    path: Path
    folder: Path

    @property
    def done(self) -> bool:
        """Whether the cell is there.

        Raises:
          ValueError: if it is, but comes from another configuration.
        """
        if not self.path.exists():
            return False
        lacks = Cell.read(self.path).lacks(self.config)
        if lacks:
            raise ValueError(
                f"{self.path} was made with {lacks}; "
                "ask for the same, give another --results-dir, or delete it to train it again"
            )
        return lacks is None


def plan(
    table: Table,
    *,
    datasets: Sequence[str],
    models: Sequence[str],
    arms: Sequence[str],
    seeds: int,
    epochs: int | None,
    data_dir: Path | None,
    results_dir: Path,
    work_dir: Path,
) -> tuple[list[Job], int]:
    """What is to be trained, the most useful comparisons first, and how many cells are there already.

    Args:
      table: the table.
      datasets: only these; empty: all, and so on.
      models: only these.
      arms: only these.
      seeds: how many: 0, 1, ….
      epochs: instead of the preset's; None: the preset's.
      data_dir: the folder of the data; None: public builds of the data sets.
      results_dir: where cells are kept.
      work_dir: where unfinished runs are kept.

    Raises:
      ValueError: if a selection is empty, a file is missing, or a cell comes from another configuration.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    for name, asked, known in [
        ("datasets", datasets, {row.dataset for row in table.rows}),
        ("models", models, {row.config.model for row in table.rows}),
        ("arms", arms, {arm for row in table.rows for arm in row.arms}),
    ]:
        for value in asked:
            if value not in known:
                raise ValueError(f"{name} must be among {', '.join(sorted(known))} in {table.name}, got {value}")
    jobs, done = [], 0
    for row in table.rows:
        if (datasets and row.dataset not in datasets) or (models and row.config.model not in models):
            continue
        dataset = table.datasets[row.dataset]
        fields = dataset.public if data_dir is None else {"data": data_dir / dataset.file}
        if epochs is not None:
            fields = fields | {"epochs": epochs}
        for seed in range(seeds):
            for family in row.families:
                if arms and family.arm not in arms:
                    continue
                path = cell_path(results_dir, table.name, family, seed)
                config = family.config(**fields, seed=seed)
                folder = find_folder(work_dir / table.name, path.stem, family.arm, config)
                job = Job(table.name, family, config, path, folder)
                if job.done:
                    done += 1
                    continue
                if data_dir is not None and not config.data.is_file():
                    raise ValueError(
                        f"data_dir: {config.data} does not exist; it holds a line 'user item item …' a user, oldest "
                        f"first. Put it there, leave {row.dataset} out of --datasets, or leave out --data-dir "
                        f"to fetch the public {dataset.public.get('data')}"
                    )
                jobs.append(job)
    return jobs, done


def train(jobs: Sequence[Job]) -> None:
    """Trains what no other process trains, cell by cell; on an accelerator the seeds of a family together.

    A run that diverges or cannot go on is reported and left out, and keeps no other from being trained.

    Raises:
      ValueError: when all is done, if there was such a run.
    """
    from models.training import loop
    from models.training.compare import seeds_at_once

    groups = [[job] for job in jobs]
    if seeds_at_once(len(jobs)) > 1:
        families: dict[str, list[Job]] = {}
        for job in jobs:
            families.setdefault(job.family.name, []).append(job)
        groups = list(families.values())
    data = _Data()
    failed = []
    for group in groups:
        with contextlib.ExitStack() as stack:
            claimed = [job for job in group if stack.enter_context(_claim(job.folder))]
            claimed = [job for job in claimed if not job.done]  # by another process, in the meantime
            if not claimed:
                continue
            config, family = claimed[0].config, claimed[0].family
            prepared = data.prepared(config)
            seeds, folders = [job.config.seed for job in claimed], [job.folder for job in claimed]
            print(f"{claimed[0].experiment}: {family.name}, seed {', '.join(map(str, seeds))}", flush=True)
            try:
                results = loop.train_seeds(prepared, config, family.arm, seeds, folders, resume=True)
            except ValueError as error:  # of this run alone: it diverged, or its files do not fit or are damaged
                failed.append(family.name)
                print(f"{family.name}: {error}", file=sys.stderr, flush=True)
                results = error.results if isinstance(error, loop.DivergedError) else [None] * len(claimed)
            for job, result in zip(claimed, results, strict=True):
                if result is not None:
                    _write_cell(job, result)
    if failed:
        raise ValueError(f"{', '.join(failed)} failed, see above; the other cells are there")


class _Data:
    """The data of the newest run, kept for the next one."""

    def __init__(self) -> None:
        self._key: TrainConfig | None = None
        self._prepared: Prepared | None = None

    def prepared(self, config: TrainConfig) -> "Prepared":
        from models.data import load_interactions
        from models.training.prepare import prepare

        # Whatever else differs may make a difference.
        key = dataclasses.replace(config, seed=0, beta=0.0, num_layers=1, optimizer="adamw")
        if key != self._key:
            self._key = self._prepared = None  # two data sets at once may be too many
            interactions = load_interactions(config)
            print(f"{config.data}: {interactions}", flush=True)
            self._key, self._prepared = key, prepare(interactions, config)
        return self._prepared


def _write_cell(job: Job, result: "Result") -> None:
    import flax
    import jax
    import optax

    import sevo_optax

    cell = Cell.from_result(
        job.experiment,
        job.family,
        job.config,
        dataclasses.asdict(result) | {"device": _device(result.device)},
        read_history(job.folder / "history.jsonl"),
        versions={package.__name__: package.__version__ for package in (jax, flax, optax, sevo_optax)},
    )
    cell.write(job.path)
    print(f"{job.path}: NDCG@10 {cell.test['NDCG@10']:.4f} at epoch {cell.best_epoch}", flush=True)


def usual_workers() -> int:
    """How many processes make the best use of this machine.

    Models of this size do not fill several cores: an epoch of SASRec with cross-entropy on Beauty took 5.5 s on two,
    and 7.5 s on one of them with another run on the other.
    """
    import jax

    if jax.default_backend() != "cpu" or not hasattr(os, "sysconf"):  # Windows does not tell its memory that way
        return 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(_num_cores(), memory // BYTES_A_WORKER))


def train_side_by_side(jobs: Sequence[Job], workers: int) -> None:
    """Trains in several processes, each on its share of the cores.

    Raises:
      ValueError: if one of them failed; it has said why.
    """
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_worker, args=(jobs, i, workers)) for i in range(workers)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()
    failed = sum(process.exitcode != 0 for process in processes)
    if failed:
        raise ValueError(f"{failed} of {workers} workers failed, see above; the same command goes on from here")


def _worker(jobs: Sequence[Job], index: int, workers: int) -> None:
    if hasattr(os, "sched_setaffinity"):  # Linux
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[index::workers] or cores)
    os.environ["TQDM_POSITION"] = str(index)
    try:
        with out_of_memory_told():
            train(jobs)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def _claim(folder: Path) -> Iterator[bool]:
    """Whether this process may train a run. The claim ends with it, however it ends: the system keeps it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with claim(folder.with_name(folder.name + ".lock")) as mine:
        yield mine


def find_folder(parent: Path, name: str, arm: Optimizer, config: TrainConfig) -> Path:
    """Where a cell's run is kept.

    An unfinished run is found by what its ``run.json`` says, whatever its folder is called behind the cell's name: what
    an earlier version of this program has begun is gone on with. Of several, the one that was trained longest.

    Args:
      parent: the folder of the table's runs.
      name: the cell's.
      arm: the optimizer.
      config: the run's configuration.

    Returns:
      The folder of that run or, if there is none, one that no other run has.
    """
    usual = parent / f"{name}-{_digest(config)}"
    candidates = [usual, *sorted(parent.glob(f"{glob.escape(name)}-*"))]
    found = [folder for folder in candidates if _is_run_of(folder, arm, config)]
    if found:
        return max(found, key=_epochs_trained)
    others = (usual.with_name(f"{usual.name}-{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([usual], others) if not (folder / "run.json").exists())


def _is_run_of(folder: Path, arm: Optimizer, config: TrainConfig) -> bool:
    """Whether a folder holds a run that may go on as this one."""
    try:
        values = read_json(folder / "run.json")
        # What is newer than the run had its default. What the run has and this version has not does nothing any more.
        found = defaults_of(config) | values["config"] | {"optimizer": values.get("optimizer")}
        found["data"] = found["data"] and Path(found["data"]).name
    except (OSError, ValueError, KeyError, TypeError):
        return False  # no run, or one that nobody can go on with
    wanted = _of_a_run(config) | {"optimizer": arm}
    return all(found.get(name) == value for name, value in wanted.items())


def _epochs_trained(folder: Path) -> int:
    try:
        return (folder / "history.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def _of_a_run(config: TrainConfig) -> dict[str, Any]:
    """The settings that a run cannot change on the way, see :func:`portable`."""
    values = portable(config)
    if config.schedule == "constant":
        del values["epochs"]
    return values


def _digest(config: TrainConfig) -> str:
    """Tells runs apart that must not continue each other. An option that has its default does not count."""
    defaults = defaults_of(config)
    values = {name: value for name, value in _of_a_run(config).items() if value != defaults.get(name)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def _device(kind: str) -> str:
    """The device's name; for a CPU, with the number of cores that this process may use."""
    if kind != "cpu":
        return kind
    cores = _num_cores()
    return f"CPU, {cores} core{'s' if cores != 1 else ''}"


def _num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
