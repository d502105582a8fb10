"""Training, epoch after epoch."""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from models.config import SELECTION, SELECTION_K, Optimizer, TrainConfig
from models.evaluation import metrics
from models.training.prepare import Prepared
from models.training.program import Program
from models.training.progress import Progress
from models.training.run import Result, Run


class DivergedError(ValueError):
    """The loss is no longer a finite number."""


@contextlib.contextmanager
def _stop_gently() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C (or SIGTERM) into an event: to stop when the epoch is over. The second acts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(number: int, frame: Any) -> None:
        del frame
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.write(f"{signal.Signals(number).name}: saving after this epoch; Ctrl-C again stops at once")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    prepared: Prepared,
    config: TrainConfig,
    optimizer: Optimizer,
    output_dir: Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Result:
    """Trains one model and tests it at its best epoch.

    Args:
      prepared: the data.
      config: the run, resolved.
      optimizer: which optimizer.
      output_dir: where checkpoints and ``history.jsonl`` grow during the run (see :mod:`models.training.checkpoints`)
        and ``result.json`` and ``curve.png`` appear at its end; None: nothing is written.
      resume: whether to go on from the newest checkpoint in ``output_dir``, if there is one. The result is the one of
        an uninterrupted run, bit by bit, on the same machine. A finished run is not trained again.
      overwrite: whether to remove a run that ``output_dir`` already holds.

    Returns:
      The result.

    Raises:
      DivergedError: if the loss of a step is not finite. The last good checkpoint stays.
      CheckpointError: if ``output_dir`` holds another run, or a checkpoint cannot be read or written.
      KeyboardInterrupt: after Ctrl-C, when the epoch is over and saved.
    """
    return train_seeds(prepared, config, optimizer, [config.seed], [output_dir], resume=resume, overwrite=overwrite)[0]


def train_seeds(
    prepared: Prepared,
    config: TrainConfig,
    optimizer: Optimizer,
    seeds: Sequence[int],
    output_dirs: Sequence[Path | None],
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> list[Result]:
    """Trains one model a seed, all of them in one program, see :func:`train`.

    On an accelerator that one model does not fill, several cost little more than one. A CPU is faster one by one.

    Args:
      prepared: the data.
      config: the run, resolved; ``seeds`` replace its seed.
      optimizer: which optimizer.
      seeds: the seeds.
      output_dirs: one folder (or None) a seed. Each will hold what a run of this seed alone would leave.
      resume: as for :func:`train`; all seeds go on from the newest epoch that every one has a checkpoint of.
      overwrite: as for :func:`train`.

    Returns:
      One result a seed.
    """
    begin = time.perf_counter()
    digest = ""
    if any(directory is not None for directory in output_dirs):
        from models.training.checkpoints import fingerprint

        digest = fingerprint(prepared.interactions)
    runs = [
        Run(prepared, dataclasses.replace(config, seed=seed), optimizer, directory, digest)
        for seed, directory in zip(seeds, output_dirs, strict=True)
    ]
    for run in runs:
        run.open(resume=resume, overwrite=overwrite)
    active = [run for run in runs if run.finished is None]
    if active:
        program = Program(prepared, config, optimizer, [run.config.seed for run in active])
        done = _restore(active, program) if resume else 0
        begin -= max(run.seconds for run in active)
        _train(active, program, done, begin)
    return [run.finished for run in runs]


def _restore(runs: Sequence[Run], program: Program) -> int:
    """Brings all runs back to the newest epoch they have in common, and returns it."""
    if any(run.checkpoints is None for run in runs):
        return 0
    found = [{checkpoint.epoch: checkpoint for checkpoint in run.checkpoints.readable()} for run in runs]
    common = set.intersection(*map(set, found))
    if not common:
        return 0
    epoch = max(common)
    fresh = [(program.params_of(i), program.state_of(i)) for i in range(len(runs))]
    restored = [run.restore(mine[epoch], *like) for run, mine, like in zip(runs, found, fresh, strict=True)]
    program.put(*zip(*restored, strict=True))
    return epoch


def _train(runs: Sequence[Run], program: Program, done: int, begin: float) -> None:
    """Trains from epoch ``done`` on until every run is finished."""
    config, prepared = program.config, program.prepared
    for run in runs:
        run.start()

    def save(epoch: int) -> None:
        for i, run in enumerate(runs):
            if not (run.stopped and run.saved):
                run.save(epoch, program.params_of(i), program.state_of(i))

    name = runs[0].optimizer + (f", {len(runs)} seeds" if len(runs) > 1 else "")
    with _stop_gently() as asked, Progress(name, epochs=config.epochs, done=done) as progress:
        for epoch in range(done + 1, config.epochs + 1):
            if all(run.stopped for run in runs):
                progress.note(f"no better validation {SELECTION} in {config.patience} evaluations: stopped early")
                break
            start = time.perf_counter()
            losses = program.epoch(epoch)
            seconds = time.perf_counter() - start
            evaluated = epoch % config.eval_every == 0 or epoch == config.epochs
            ranks = program.ranks(prepared.validation) if evaluated and np.isfinite(losses).all() else None
            diagnostics = program.diagnose(epoch) if config.diagnostics else None
            tokens = prepared.num_tokens * len(runs)
            for i, run in enumerate(runs):
                if run.stopped:
                    continue
                _check_finite(losses[i], epoch, run)
                record: dict[str, Any] = {
                    "epoch": epoch,
                    "loss": float(losses[i].mean()),
                    "seconds": round(seconds, 4),
                    "tokens_per_second": round(tokens / seconds),
                }
                if ranks is not None:
                    record["validation"] = metrics.summarize(ranks[i], tuple(sorted({*config.ks, SELECTION_K})))
                    run.consider(record["validation"][SELECTION], partial(program.params_of, i))
                if diagnostics is not None:
                    record["diagnostics"] = diagnostics[i]
                run.record(record)
                run.seconds = time.perf_counter() - begin
            stop = asked.is_set()  # asked once: a signal between saving and stopping waits for the next epoch
            if evaluated or stop:
                save(epoch)
            shown = {"loss": losses.mean(), "seconds": seconds, "tokens": tokens}
            if ranks is not None:
                shown["validation"] = np.mean([run.history[-1]["validation"][SELECTION] for run in runs])
                shown["best"] = np.mean([run.best[0] for run in runs])
            progress.epoch(epoch, **shown)
            if stop and epoch < config.epochs:
                raise KeyboardInterrupt(f"interrupted after epoch {epoch}, which is saved; go on with --resume")
    for run in runs:
        run.finished = run.finish(program)


def _check_finite(losses: np.ndarray, epoch: int, run: Run) -> None:
    if np.isfinite(losses).all():
        return
    step = int(np.flatnonzero(~np.isfinite(losses))[0]) + 1
    kept = f"; the checkpoint of epoch {run.saved} is kept" if run.saved else ""
    raise DivergedError(
        f"the loss of epoch {epoch}, step {step}, is {losses[step - 1]}{kept}; "
        f"lower learning_rate={run.config.learning_rate:g}, or give --clip-norm 1"
    )
