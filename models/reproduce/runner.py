"""Trains the cells that are missing."""

import contextlib
import dataclasses
import fnmatch
import glob
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.checks import near
from models.config import GraphConfig, Optimizer, TrainConfig
from models.files import claim, read_json
from models.memory import memory_size, out_of_memory_told
from models.reproduce.cells import PORTABLE, REVISIONS, Cell, Cells, cell_path, defaults_of, identity_of, portable
from models.reproduce.maps import umap_class
from models.reproduce.tables import PLAIN, Dataset, Row, SeedGroup, Table
from models.training.files import read_history
from models.training.progress import POSITION

if TYPE_CHECKING:
    from models.data import Interactions
    from models.training.run import Result
    from models.training.training_data import NewestData, TrainingData

BYTES_A_WORKER = 2 * 2**30
# Seconds between two looks at whether another process has trained a teacher.
WAIT = 5.0


@dataclasses.dataclass(frozen=True)
class Job:
    """A cell to train.

    Attributes:
      experiment: name of the table that the cell belongs to.
      group: which cell, but for the seed.
      config: the run's configuration.
      path: where the cell will be kept.
      folder: where the run keeps its checkpoints.
      teacher: the run whose item vectors are to be in ``config.vectors``; None: there is none.
    """

    experiment: str
    group: SeedGroup
    config: TrainConfig
    path: Path
    folder: Path
    teacher: "Job | None" = None

    @property
    def done(self) -> bool:
        """Whether the cell is there. One of an earlier revision of its arm is not.

        Raises:
          ValueError: if it is, but comes from another configuration.
        """
        if not self.path.exists():
            return False
        cell = Cell.read(self.path)
        if cell.outdated:
            return False
        lacks = cell.lacks(self.config)
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
    cells: Sequence[str] = (),
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
      cells: only those whose name, without the seed, is like one of these patterns of ``fnmatch``.
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
    rows = select_rows(table, datasets, models, arms)
    chosen = select_groups(table.name, rows, arms, cells)
    jobs, done = [], 0
    there, planned = Cells(results_dir), set()
    for row in rows:
        dataset = table.datasets[row.dataset]
        fields = dataset.fields(data_dir)
        if epochs is not None and not row.closed_form:
            fields = fields | {"epochs": epochs}
        for seed in range(table.num_seeds(row, seeds)):
            for group in row.groups:
                if group.name not in chosen:
                    continue
                teacher, vectors = table.teacher(group), {}
                if teacher is not None:
                    config = teacher.config(**fields, **graph_fields(teacher, dataset, data_dir), seed=seed)
                    teacher = _job(table, teacher, config, there, results_dir, work_dir)
                    # Whatever differs in the teacher gives the file another name, which the student's cell keeps.
                    name = f"{teacher.group.name}-seed{seed}-{_digest(config)}-{config.epochs}-epochs.npz"
                    vectors = {"vectors": work_dir / table.name / name}
                config = group.config(**fields, **graph_fields(group, dataset, data_dir), **vectors, seed=seed)
                job = _job(table, group, config, there, results_dir, work_dir, teacher)
                if job.done or there.shared(group, config) is not None:
                    done += 1
                    continue
                if getattr(config, "keep_epochs", ()):
                    umap_class()  # it is needed at the end: better missed now
                check_source(row, dataset, data_dir)
                # Two groups of a table may be the same run, such as those of two methods at beta 0.
                run = (row.dataset, identity_of(config, group.arm), group.arm, seed)
                if run not in planned:
                    planned.add(run)
                    jobs.append(job)
    return jobs, done


def select_rows(table: Table, datasets: Sequence[str], models: Sequence[str], arms: Sequence[str] = ()) -> list[Row]:
    """The rows of a table that are asked for.

    Args:
      table: the table.
      datasets: of these alone; empty: of all, and so on.
      models: of these alone.
      arms: are checked alone.

    Raises:
      ValueError: if the table has none of what is asked for.
    """
    for name, asked, known in [
        ("datasets", datasets, {row.dataset for row in table.rows}),
        ("models", models, {row.config.model for row in table.rows}),
        ("arms", arms, {arm for row in table.rows for arm in row.arms}),
    ]:
        for value in asked:
            if value not in known:
                raise ValueError(f"{name} must be among {', '.join(sorted(known))} in {table.name}, got {value}")
    return [
        row
        for row in table.rows
        if (not datasets or row.dataset in datasets) and (not models or row.config.model in models)
    ]


def select_groups(table: str, rows: Sequence[Row], arms: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """The names of cells, without their seeds, that are asked for.

    Args:
      table: the name of the table.
      rows: of these rows alone.
      arms: of these arms alone; empty: of all.
      patterns: like one of these alone; empty: all.

    Raises:
      ValueError: if a pattern is like none of them.
    """
    names = [group.name for row in rows for group in row.groups if not arms or group.arm in arms]
    chosen = set() if patterns else set(names)
    for pattern in patterns:
        found = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(
                f"cells: {table} has none like {pattern}{near(pattern, names, most=3)}; --dry-run names those "
                "that are missing, and * stands for anything"
            )
        chosen |= found
    return chosen


def check_source(row: Row, dataset: Dataset, data_dir: Path | None) -> None:
    """Raises ValueError if a row's data are to be in a folder, and are not there."""
    if data_dir is not None and not (data_dir / dataset.file).is_file():
        raise ValueError(
            f"data_dir: {data_dir / dataset.file} does not exist; it holds a line 'user item item …' a user, oldest "
            f"first. Put it there, leave {row.dataset} out of --datasets, or leave out --data-dir to fetch the public "
            f"{dataset.public.get('data')}"
        )


def _job(
    table: Table,
    group: SeedGroup,
    config: TrainConfig,
    cells: Cells,
    results_dir: Path,
    work_dir: Path,
    teacher: Job | None = None,
) -> Job:
    path = cell_path(results_dir, table.name, group, config.seed)
    if not path.exists():
        path = cells.begun(group, config) or path  # of another table, whose run goes on
    experiment = path.parent.name
    folder = find_folder(work_dir / experiment, path.stem, group.arm, config)
    return Job(experiment, group, config, path, folder, teacher)


def graph_fields(group: SeedGroup, dataset: Dataset, data_dir: Path | None) -> dict[str, Any]:
    """The fields of ``TrainConfig`` that say where a group's graph comes from, if it needs more than interactions.

    An arm without smoothing heeds no graph, so it gets the usual one, which needs nothing else.

    Raises:
      ValueError: if the attributes are nowhere.
    """
    graph = getattr(group.config(), "graph", ())
    if group.arm in PLAIN:
        usual = {field.name: field.default for field in dataclasses.fields(GraphConfig)}
        return usual if {"attributes", "knn"} & set(graph) else {}
    if "attributes" not in graph:
        return {}
    if dataset.attributes is None or data_dir is None:
        name = dataset.attributes or "a file of attributes, which the table does not name"
        raise ValueError(f"data_dir: {group.name} needs {name}; give the folder that holds it with --data-dir")
    path = data_dir / dataset.attributes
    if not path.is_file():
        raise ValueError(f"data_dir: {path} does not exist; {group.name} needs it")
    return {"attributes": path}


def train(jobs: Sequence[Job]) -> None:
    """Trains what no other process trains, cell by cell; on an accelerator the seeds of a group together.

    A run that diverges or cannot go on is reported and left out, and keeps no other from being trained.

    Raises:
      ValueError: when all is done, if there was such a run.
    """
    from models.training import loop
    from models.training.compare import seeds_at_once
    from models.training.training_data import NewestData

    together = [[job] for job in jobs]
    if seeds_at_once(len(jobs)) > 1:
        by_group: dict[tuple[str, Path | None], list[Job]] = {}
        for job in jobs:
            # Students of several teachers have several graphs, and no program in common.
            by_group.setdefault((job.group.name, getattr(job.config, "vectors", None)), []).append(job)
        together = list(by_group.values())
    data = NewestData(read_and_describe)
    failed = []
    for mine in together:
        with contextlib.ExitStack() as stack:
            claimed = [job for job in mine if stack.enter_context(_claim(job.folder))]
            claimed = [job for job in claimed if not job.done]  # by another process, in the meantime
            if not claimed:
                continue
            config, group = claimed[0].config, claimed[0].group
            try:
                with out_of_memory_told():
                    _teach(claimed[0], data)
            except (ValueError, OSError) as error:
                failed.append(group.name)
                print(f"{group.name}: its teacher: {error}", file=sys.stderr, flush=True)
                continue
            seeds, folders = [job.config.seed for job in claimed], [job.folder for job in claimed]
            print(f"{claimed[0].experiment}: {group.name}, seed {', '.join(map(str, seeds))}", flush=True)
            try:
                with out_of_memory_told():
                    prepared = data.prepared(config)
                    results = loop.train_seeds(prepared, config, group.arm, seeds, folders, resume=True)
            except (ValueError, OSError) as error:  # of this run alone: data, files or memory, or it diverged
                failed.append(group.name)
                print(f"{group.name}: {error}", file=sys.stderr, flush=True)
                results = error.results if isinstance(error, loop.DivergedError) else [None] * len(claimed)
            for job, result in zip(claimed, results, strict=True):
                if result is not None:
                    _write_cell(job, result, prepared)
    if failed:
        raise ValueError(f"{', '.join(failed)} failed, see above; the other cells are there")


def _teach(job: Job, data: "NewestData") -> None:
    """Has a job's teacher trained and its item vectors written, unless they are there.

    Where another process trains the teacher, this waits for it.

    Raises:
      ValueError: if the teacher diverges, or its files are damaged.
    """
    from models.training import loop

    teacher = job.teacher
    while teacher is not None and not job.config.vectors.exists():
        with _claim(teacher.folder) as mine:
            if mine and not job.config.vectors.exists():
                print(f"{teacher.experiment}: {teacher.group.name}, seed {teacher.config.seed}, a teacher", flush=True)
                prepared = data.prepared(teacher.config)
                folders, seeds = [teacher.folder], [teacher.config.seed]
                # A finished run is only read.
                (result,) = loop.train_seeds(prepared, teacher.config, teacher.group.arm, seeds, folders, resume=True)
                if not teacher.done:
                    _write_cell(teacher, result, prepared)
                _write_vectors(teacher.folder, job.config.vectors)
        if not mine:
            time.sleep(WAIT)


def _write_vectors(folder: Path, path: Path) -> None:
    """Writes the item vectors of a finished run."""
    from models.serving.export import write_embeddings
    from models.training.checkpoints import load_run

    path.parent.mkdir(parents=True, exist_ok=True)
    write_embeddings(load_run(folder, "best"), path)


def read_and_describe(config: TrainConfig) -> "Interactions":
    """Reads the data of a run, and says what it is."""
    from models.data import load_interactions

    interactions = load_interactions(config)
    print(f"{config.data}: {interactions}", flush=True)
    return interactions


def _write_cell(job: Job, result: "Result", prepared: "TrainingData") -> None:
    cell = Cell.from_result(
        job.experiment,
        job.group,
        job.config,
        dataclasses.asdict(result) | {"device": _device(result.device)},
        read_history(job.folder / "history.jsonl"),
        versions=package_versions(),
    )
    if job.config.to_dict().get("keep_epochs"):
        from models.reproduce.maps import make_maps

        job.path.parent.mkdir(parents=True, exist_ok=True)
        make_maps(job.folder, job.config, prepared.interactions.item_ids).write(job.path.with_suffix(".npz"))
    cell.write(job.path)
    print(f"{job.path}: NDCG@10 {cell.test['NDCG@10']:.4f} at epoch {cell.best_epoch}", flush=True)


def package_versions() -> dict[str, str]:
    """The packages that results depend on, as files of results name them."""
    import flax
    import jax
    import optax

    import sevo_optax

    return {package.__name__: package.__version__ for package in (jax, flax, optax, sevo_optax)}


def usual_workers() -> int:
    """How many processes make the best use of this machine.

    Models of this size do not fill several cores: an epoch of SASRec with cross-entropy on Beauty took 5.5 s on two,
    and 7.5 s on one of them with another run on the other.
    """
    import jax

    if jax.default_backend() != "cpu" or not hasattr(os, "sysconf"):  # Windows does not tell its memory that way
        return 1
    return max(1, min(_num_cores(), memory_size() // BYTES_A_WORKER))


def train_side_by_side(jobs: Sequence[Job], workers: int) -> None:
    """Trains in several processes, each on its share of the cores.

    Ctrl-C or SIGTERM has each of them save after its epoch, a second one ends them at once.

    Raises:
      ValueError: if one of them failed; it has said why.
    """
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_worker, args=(jobs, i, workers)) for i in range(workers)]
    with _terminated_as_interrupted():
        with _unheard(signal.SIGINT):
            for process in processes:
                process.start()
        try:
            for process in processes:
                process.join()
        finally:
            while any(process.is_alive() for process in processes):
                for process in processes:
                    process.terminate()
                with contextlib.suppress(KeyboardInterrupt):
                    for process in processes:
                        process.join()
    failed = sum(process.exitcode != 0 for process in processes)
    if failed:
        raise ValueError(f"{failed} of {workers} workers failed, see above; the same command goes on from here")


@contextlib.contextmanager
def _unheard(number: int) -> Iterator[None]:
    """Keeps a signal from processes that are started here, for good: a terminal sends Ctrl-C to all of them at once.

    Those who tell them to stop would tell them a second time, which means at once.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # when the first process starts it, it lets the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Has SIGTERM raise ``KeyboardInterrupt``, as Ctrl-C does; outside the main thread signals are left alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        del number, frame
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _worker(jobs: Sequence[Job], index: int, workers: int) -> None:
    if hasattr(os, "sched_setaffinity"):  # Linux
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[index::workers] or cores)
    os.environ[POSITION] = str(index)
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
    if arm in REVISIONS:  # what an earlier revision has begun must not go on as this one
        name = f"{name}-revision{REVISIONS[arm]}"
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
        for name in PORTABLE:
            found[name] = found.get(name) and Path(found[name]).name
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


def device_name() -> str:
    """What this process would train on, as cells say it."""
    import jax

    return _device(str(jax.devices()[0].device_kind))


def _device(kind: str) -> str:
    """The device's name; for a CPU, with the number of cores that this process may use."""
    if kind != "cpu":
        return kind
    cores = _num_cores()
    return f"CPU, {cores} core{'s' if cores != 1 else ''}"


def _num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
