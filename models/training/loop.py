"""Training, epoch after epoch."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.config import SELECTION, SELECTION_K, Optimizer, TrainConfig
from models.evaluation import metrics
from models.processes import any_of_all
from models.training.interrupts import StoppedError, stop_gently
from models.training.layout import Layout
from models.training.loggers import check_installed
from models.training.program import Program
from models.training.progress import Progress
from models.training.run import Result, Run
from models.training.split_program import SplitProgram
from models.training.training_data import TrainingData

# Told of each evaluation; returns whether to go on.
Watch = Callable[[int, float], bool]


class DivergedError(ValueError):
    """The loss or a parameter is no longer a finite number.

    Attributes:
      failures: what happened, by seed.
      results: one a seed, in the order in which they were asked for; None: it diverged.
    """

    def __init__(self, failures: Mapping[int, str], results: Sequence[Result | None]) -> None:
        self.failures, self.results = dict(failures), list(results)
        alone = len(self.results) == 1
        super().__init__("; ".join(text if alone else f"seed {seed}: {text}" for seed, text in failures.items()))


def train(
    prepared: TrainingData,
    config: TrainConfig,
    optimizer: Optimizer,
    output_dir: Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    test: bool = True,
    watch: Watch | None = None,
    layout: Layout | None = None,
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
      test: False: the test items are not looked at, and no result is written. A later call that resumes such a run with
        True tests it, without training it again.
      watch: called as ``watch(epoch, NDCG@10)`` after each evaluation, when the epoch is saved; it returns whether to
        go on. None: nobody watches.
      layout: the mesh of devices, and how tables are split over it; None: one device. A run may go on with another one.

    Returns:
      The result.

    Raises:
      StoppedError: if ``watch`` has stopped the run.
      DivergedError: if the loss of a step or a parameter is not finite. The last good checkpoint stays.
      CheckpointError: if ``output_dir`` holds another run, something else, or a run that another process trains, or a
        checkpoint cannot be read or written.
      KeyboardInterrupt: after Ctrl-C, when the epoch is over and saved; after Ctrl-C in the last epoch, when the run is
        finished, too.
    """
    run = Run(prepared, dataclasses.replace(config, optimizer=optimizer), optimizer, output_dir, tests=test)
    return _train([run], resume=resume, overwrite=overwrite, watch=watch, layout=layout)[0]


def train_seeds(
    prepared: TrainingData,
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
      resume: as for :func:`train`; each seed goes on from its own newest checkpoint, those that have come equally far
        in a program of their own.
      overwrite: as for :func:`train`.

    Returns:
      One result a seed. A seed that early stopping ends is finished at that moment, and the others go on.

    Raises:
      DivergedError: when all the others are finished, if a seed has diverged. It has their results.
      CheckpointError: as for :func:`train`.
    """
    runs = [
        Run(prepared, dataclasses.replace(config, seed=seed, optimizer=optimizer), optimizer, directory)
        for seed, directory in zip(seeds, output_dirs, strict=True)
    ]
    return _train(runs, resume=resume, overwrite=overwrite)


def _train(
    runs: Sequence[Run],
    *,
    resume: bool,
    overwrite: bool,
    watch: Watch | None = None,
    layout: Layout | None = None,
) -> list[Result]:
    """Trains runs that differ in their seed alone; with a layout, there is one."""
    check_installed(runs[0].config.logger)
    with contextlib.ExitStack() as folders:
        for run in runs:
            folders.enter_context(run).open(resume=resume, overwrite=overwrite)
        unfinished = [run for run in runs if run.finished is None]
        for done in sorted({run.done for run in unfinished}):
            _Group([run for run in unfinished if run.done == done], done, watch, layout).train()
    failures = {run.config.seed: run.diverged for run in runs if run.diverged is not None}
    if failures:
        raise DivergedError(failures, [run.finished for run in runs])
    return [run.finished for run in runs]


class _Group:
    """Runs that differ in their seed alone, side by side in one program.

    A run leaves when early stopping has ended it, or when it diverges; the program goes on computing it, and nobody
    looks. What a run that has left needs is on the disk by then.

    Args:
      runs: the runs.
      done: how many epochs each of them was trained for already.
      watch: who watches them, see :func:`train`.
      layout: the mesh that the only run is split over; None: one device.
    """

    def __init__(
        self, runs: Sequence[Run], done: int, watch: Watch | None = None, layout: Layout | None = None
    ) -> None:
        self.begin = time.perf_counter()
        self.runs, self.done, self.config, self.watch = runs, done, runs[0].config, watch
        self.active = dict(enumerate(runs))  # by place in the program
        what = runs[0].prepared, self.config, runs[0].optimizer
        if layout is None:
            self.program = Program(*what, [run.config.seed for run in runs])
        else:
            self.program = SplitProgram(*what, self.config.seed, layout)
            runs[0].split_shapes = self.program.like(0)
        if done:
            fresh = [self.program.like(i) for i in range(len(runs))]
            restored = [run.restore(*like, self.program.place) for run, like in zip(runs, fresh, strict=True)]
            self.program.put(*zip(*restored, strict=True))
        self.begin -= max(run.seconds for run in runs)
        for i, run in enumerate(runs):
            run.start()
            if not done and 0 in self.config.keep_epochs:
                run.keep(0, self.program.item_table(self.program.params_of(i)))

    def train(self) -> None:
        """Trains until every run is finished or has diverged.

        Raises:
          KeyboardInterrupt: after Ctrl-C, when the epoch is over and saved, or the runs are finished.
        """
        config = self.config
        title = self.runs[0].optimizer + (f", {len(self.runs)} seeds" if len(self.runs) > 1 else "")
        with stop_gently() as asked, Progress(title, epochs=config.epochs, done=self.done) as self.progress:
            if self.done == config.epochs:
                self._evaluate_late()
            self._part_with_stopped(self.done)
            for epoch in range(self.done + 1, config.epochs + 1):
                if not self.active:
                    break
                stop = self._epoch(epoch, asked)
                if stop and self.active and epoch < config.epochs:
                    raise KeyboardInterrupt(f"interrupted after epoch {epoch}, which is saved; go on with --resume")
        for run in self.active.values():
            run.finish(self.program)
        if any_of_all(asked.is_set()):  # too late for these runs: it is for what would come after them
            raise KeyboardInterrupt("interrupted; what was begun is finished, and --resume shows it or goes on")

    def _epoch(self, epoch: int, asked: threading.Event) -> bool:
        """Trains one epoch; returns whether a stop was asked for before it was saved."""
        config, program, prepared = self.config, self.program, self.runs[0].prepared
        start = time.perf_counter()
        losses = program.epoch(epoch)
        seconds = time.perf_counter() - start
        tokens = prepared.num_tokens * len(self.active)
        for i in list(self.active):
            self._part_with_diverged(i, _loss_failure(losses[i], epoch))
        evaluated = bool(self.active) and (epoch % config.eval_every == 0 or epoch == config.epochs)
        start = time.perf_counter()
        validation = self._validate() if evaluated else {}
        evaluation_seconds = time.perf_counter() - start
        diagnostics = program.diagnose(epoch) if config.diagnostics else None
        stop = any_of_all(asked.is_set())  # asked once: a signal between saving and stopping waits for the next epoch
        shown = {"loss": losses[list(self.active)].mean() if self.active else np.nan, "seconds": seconds}
        if validation:
            shown["validation"] = np.mean([mine[SELECTION] for mine in validation.values()])
        for i, run in list(self.active.items()):
            params = program.params_of(i) if evaluated or stop else None
            if params is not None and not _is_finite(params):
                # The step after the last loss, or a row that no batch has met since.
                self._part_with_diverged(i, f"a parameter is not finite after epoch {epoch}")
                continue
            record: dict[str, Any] = {
                "epoch": epoch,
                "loss": float(losses[i].mean()),
                "seconds": round(seconds, 4),
                "tokens_per_second": round(prepared.num_tokens / seconds),  # of this run alone
            }
            if epoch in config.keep_epochs:
                run.keep(epoch, program.item_table(program.params_of(i) if params is None else params))
            if evaluated:
                record["validation"] = validation[i]
                record["evaluation_seconds"] = round(evaluation_seconds, 4)
                run.consider(validation[i][SELECTION], epoch, params)
            if diagnostics is not None:
                record["diagnostics"] = diagnostics[i]
            run.record(record)
            run.seconds = time.perf_counter() - self.begin
            if params is not None:
                run.save(epoch, params, program.state_of(i))
        best = [run.best[0] for run in self.runs if run.best is not None and run.best[1] and run.diverged is None]
        self.progress.epoch(epoch, **shown, tokens=tokens, best=np.mean(best) if best else None)
        if self.watch is not None and not stop:  # who asks for both stops, and looks again when the run goes on
            for i in self.active:
                if evaluated and not self.watch(epoch, validation[i][SELECTION]):
                    raise StoppedError(f"stopped after epoch {epoch}, which is saved")
        self._part_with_stopped(epoch)
        return stop

    def _validate(self) -> dict[int, dict[str, float]]:
        """Metrics of the validation items, by place in the program."""
        ranks = self.program.ranks(self.runs[0].prepared.validation)
        return {i: metrics.summarize(ranks[i], tuple(sorted({*self.config.ks, SELECTION_K}))) for i in self.active}

    def _evaluate_late(self) -> None:
        """Evaluates runs that were interrupted behind the epoch that is now to be the last."""
        late = {i: run for i, run in self.active.items() if "validation" not in run.history[-1]}
        validation = self._validate() if late else {}
        for i, run in late.items():
            run.consider_late(validation[i], self.program.params_of(i))

    def _part_with_stopped(self, epoch: int) -> None:
        for i, run in list(self.active.items()):
            if run.stopped and epoch < self.config.epochs:
                found = f"no better validation {SELECTION} in {self.config.patience} evaluations"
                self.progress.note(f"{self._name(run)}{found}: stopped early")
                run.finish(self.program)
                del self.active[i]

    def _part_with_diverged(self, i: int, failure: str | None) -> None:
        if failure is None:
            return
        run = self.active.pop(i)
        kept = f"; the checkpoint of epoch {run.saved} is kept" if run.saved else ""
        advice = f"lower learning_rate={self.config.learning_rate:g}, or give --clip-norm 1"
        run.diverged = f"{failure}{kept}; {advice}"
        if len(self.runs) > 1:
            self.progress.note(f"{self._name(run)}{run.diverged}; the others go on", warning=True)

    def _name(self, run: Run) -> str:
        return f"seed {run.config.seed}: " if len(self.runs) > 1 else ""


def _loss_failure(losses: np.ndarray, epoch: int) -> str | None:
    """What is wrong with the losses of an epoch; None: nothing."""
    if np.isfinite(losses).all():
        return None
    step = int(np.flatnonzero(~np.isfinite(losses))[0])
    return f"the loss of epoch {epoch}, step {step + 1}, is {losses[step]}"


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in leaves]))


def _is_finite(params: Any) -> bool:
    """Whether every number of a tree is finite; whole numbers and keys are."""
    return bool(_all_finite([x for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.inexact)]))
