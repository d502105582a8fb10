"""The search for settings: trial after trial, by the validation items alone.

A search's folder holds

* ``search.journal``: optuna's own record, which its other tools read too;
* ``trials/NUMBER/``: each trial's run, see :mod:`models.training.checkpoints`; the best keeps its checkpoints;
* ``trials.json``: all trials, written again after each; ``best.yaml``: the best one's settings; ``search.png``.

The trial's number and the seed decide what is sampled, and a trial that was interrupted goes on from its checkpoint. So
a search that is killed and started again tries what it would have tried.
"""

import contextlib
import dataclasses
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.config import SELECTION, TrainConfig
from models.files import LOCK, claim, drop_half_line, read_json, write_json, write_text
from models.graphs import files_digest, graph_files
from models.memory import OutOfMemoryError, out_of_memory_told
from models.training import loop
from models.training.checkpoints import MAY_DIFFER, fingerprint, is_run
from models.training.files import curve, read_history
from models.training.interrupts import StoppedError
from models.training.training_data import NewestData
from models.tuning.space import Space
from models.validation import dump_yaml

if TYPE_CHECKING:
    import optuna

    from models.data import Interactions
    from models.training.run import Result
    from models.training.training_data import TrainingData

Pruner = Literal["median", "successive-halving", "none"]
State = Literal["finished", "pruned", "diverged", "refused"]
JOURNAL, TRIALS, BEST, PICTURE = "search.journal", "trials.json", "best.yaml", "search.png"
# Of trials.json.
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes:
      number: of the trial, counted from 0.
      state: pruned: stopped as its early results were worse than those of others. diverged: the loss or a parameter was
        no longer finite. refused: the values do not fit together, or need more memory than there is.
      settings: the values, by field.
      value: the best validation NDCG@10; None: there is none, or it is of a part of the epochs.
      curve: points (epoch, validation NDCG@10).
      reason: why a trial diverged or was refused.
    """

    number: int
    state: State
    settings: dict[str, Any]
    value: float | None
    curve: list[tuple[int, float]]
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
      best: the best trial.
      config: its configuration.
      result: its test, the only one.
      trials: all trials, in their order.
    """

    best: Outcome
    config: TrainConfig
    result: "Result"
    trials: list[Outcome]


def require_optuna() -> None:
    """Makes sure that optuna is there.

    Raises:
      ValueError: if it is not; it names the command that installs it.
    """
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise ValueError("tune needs optuna; install it with pip install -e '.[tune]'") from None


def tune(
    interactions: "Interactions",
    space: Space,
    output_dir: Path,
    *,
    trials: int = 30,
    hours: float | None = None,
    pruner: Pruner = "median",
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Found:
    """Searches, and tests the best trial.

    Values come from optuna's tree-structured Parzen estimator; the first trial has the configuration's own values, if
    they lie in the ranges.

    Args:
      interactions: the data.
      space: the configuration, and what of it is searched.
      output_dir: the search's folder.
      trials: how many trials there are to be in all, those of earlier calls included.
      hours: no longer than about that; None: until all trials are done. A trial that is under way is left for another
        call.
      pruner: ``median``: a trial whose best result so far is below the median of the others' at the same epoch is
        stopped, after the first five trials and a tenth of the epochs. ``successive-halving``: a third goes on at each
        of some epochs, each three times the one before. ``none``: all are trained to their end.
      resume: whether to go on with the search in the folder, if there is one.
      overwrite: whether to remove it.
      say: told of each trial in one line.

    Returns:
      What was found. The files are written by then.

    Raises:
      ValueError: if the folder holds something else or another search, or no trial has come to its end.
      KeyboardInterrupt: after Ctrl-C, when the epoch is over and saved.
    """
    require_optuna()
    with _folder(output_dir, resume=resume, overwrite=overwrite), _quiet_optuna():
        search = _Search(interactions, space, output_dir, pruner, say)
        try:
            search.run(trials, None if hours is None else time.monotonic() + 3600 * hours)
        finally:
            search.write()
        return search.test_best()


class _Search:
    def __init__(
        self,
        interactions: "Interactions",
        space: Space,
        output_dir: Path,
        pruner: Pruner,
        say: Callable[[str], None],
    ) -> None:
        self.interactions, self.space, self.output_dir, self.say = interactions, space, output_dir, say
        self.pruner, self._data = pruner, NewestData(lambda _: interactions)
        self.study = _open_study(output_dir / JOURNAL, space.base, pruner)
        self._check_same()
        self.outcomes = sorted(map(_outcome, self._finished()), key=lambda outcome: outcome.number)

    def _finished(self) -> list["optuna.trial.FrozenTrial"]:
        return [trial for trial in self.study.get_trials(deepcopy=False) if "outcome" in trial.user_attrs]

    def _check_same(self) -> None:
        """Refuses to mix two searches."""
        base = dataclasses.replace(self.space.base, **({"attributes": None} | self.space.kept)).to_dict()
        described = {name: base[name] for name in base if name not in MAY_DIFFER or name in ("epochs", "patience")}
        described |= {"search": " ".join(self.space.describe()), "pruner": self.pruner}
        described |= {"fingerprint": fingerprint(self.interactions, self.space.base.split)}
        files = {graph_files(config): config for config in self.space.variants()}
        described |= {"files": sorted(filter(None, map(files_digest, files.values())))}
        before = self.study.user_attrs.get("described")
        if before is None:
            self.study.set_user_attr("described", described)
            return
        for name, wanted in described.items():
            if wanted != before.get(name, wanted):
                seen = {
                    "fingerprint": "is of other data",
                    "files": "smooths over files of graphs that held something else",
                }.get(name, f"has {name}={before[name]}, not {wanted}")
                raise ValueError(
                    f"the search in {self.output_dir} {seen}; resume it as it was, or give another --output-dir"
                )

    def run(self, trials: int, deadline: float | None) -> None:
        """Makes trials until there are so many, or the time is over."""
        self._take_up()
        while len(self.outcomes) < trials and (deadline is None or time.monotonic() < deadline):
            outcome = self._trial(len(self.outcomes), deadline)
            if outcome is None:
                return
            self.outcomes.append(outcome)
            self.say(self._line(outcome, trials))
            self._drop_checkpoints()
            self.write_trials()

    def _take_up(self) -> None:
        """Has the trial that was interrupted come next, with its values; before the first, the configuration's own."""
        from optuna.trial import TrialState

        number = len(self.outcomes)
        for trial in self._finished():
            if not trial.state.is_finished():  # killed right then
                self._tell(trial.number, _outcome(trial))
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.user_attrs.get("number") == number and not waiting:
                self.study.enqueue_trial(trial.params)
                waiting = [trial]
            self.study.tell(trial.number, state=TrialState.FAIL)
        if not number and not waiting and (own := self.space.start()):
            self.study.enqueue_trial(own)

    def _trial(self, number: int, deadline: float | None) -> Outcome | None:
        """Makes a trial; None: the time was over before its end."""
        self.study.sampler = _sampler(self.space.base.seed, number)
        trial = self.study.ask()
        settings = self.space.suggest(trial)
        trial.set_user_attr("number", number)
        reported: set[int] = set()
        pruned = False

        def follow(epoch: int, value: float) -> bool:
            nonlocal pruned
            if epoch not in reported:
                trial.report(value, epoch)
                reported.add(epoch)
            pruned = epoch < self.space.base.epochs and trial.should_prune()
            return not pruned

        def watch(epoch: int, value: float) -> bool:
            late = deadline is not None and time.monotonic() >= deadline and epoch < self.space.base.epochs
            return follow(epoch, value) and not late

        folder = self.folder(number)
        points = _points(folder)
        state: State = "finished"
        value, reason = None, ""
        of_data = False  # whether it is the data that are at fault
        try:
            if all(follow(*point) for point in points):
                config = self.space.config(settings)
                with out_of_memory_told():
                    of_data = True
                    prepared = self._data.prepared(config)
                    of_data = False
                    result = train(prepared, config, folder, watch)
                value = result.validation[SELECTION]
            else:
                state = "pruned"
        except StoppedError:
            if not pruned:
                return None
            state = "pruned"
        except loop.DivergedError as error:
            state, reason = "diverged", str(error)
        except OutOfMemoryError as error:
            state, reason = "refused", str(error)
        except ValueError as error:
            # Of values that do not fit together: of a run, something else is meant.
            if (folder / "run.json").exists():
                raise
            state, reason = "refused", str(error)
        outcome = Outcome(number, state, _plain(settings), value, _points(folder), reason)
        # First what came of it: a trial with an outcome is a finished one, whatever happens before optuna knows.
        trial.set_user_attr("outcome", dataclasses.asdict(outcome))
        self._tell(trial.number, outcome)
        if of_data and self.outcomes and all(x.reason == reason for x in self.outcomes):
            raise ValueError(f"every trial so far was refused: {reason}")
        return outcome

    def _tell(self, trial: int, outcome: Outcome) -> None:
        """Has optuna learn from a trial: what does not come to its end is worse than all that does."""
        from optuna.trial import TrialState

        if outcome.value is None:
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self.study.tell(trial, outcome.value)

    @property
    def best(self) -> Outcome | None:
        """The best finished trial, the first of equals."""
        finished = [outcome for outcome in self.outcomes if outcome.value is not None]
        return max(finished, key=lambda outcome: outcome.value, default=None)

    def folder(self, number: int) -> Path:
        """Where a trial's run is."""
        return self.output_dir / "trials" / f"{number:04}"

    def _drop_checkpoints(self) -> None:
        """Keeps the checkpoints of the best trial alone: those of all would fill a disk."""
        for outcome in self.outcomes:
            if outcome is not self.best:
                shutil.rmtree(self.folder(outcome.number) / "checkpoints", ignore_errors=True)

    def _line(self, outcome: Outcome, trials: int) -> str:
        words = ", ".join(f"{name} {_short(value)}" for name, value in outcome.settings.items())
        if outcome.value is not None:
            found = f"{SELECTION} {outcome.value:.4f}"
        else:
            found = outcome.state + (f" after epoch {outcome.curve[-1][0]}" if outcome.curve else "")
            found += f" ({outcome.reason})" if outcome.reason else ""
        best = self.best
        ahead = "" if best is None else f"; best {best.value:.4f}, of trial {best.number}"
        return f"trial {outcome.number} ({outcome.number + 1} of {trials}): {words}: {found}{ahead}"

    def write(self) -> None:
        """Writes what there is to write so far."""
        if not self.outcomes:
            return
        self.write_trials()
        from models import plots  # matplotlib is slow to import and not needed to search

        logarithmic = {option.name for option in self.space.searched if getattr(option, "log", False)}
        tried = [
            plots.Tried(x.number, x.settings, max(value for _, value in x.curve), x.state == "finished")
            for x in self.outcomes
            if x.curve
        ]
        if tried:
            data = self.space.base.data
            title = f"{self.space.base.model} on {'embedded data' if data is None else data.stem}"
            metric = f"validation {SELECTION}"
            plots.search(tried, self.output_dir / PICTURE, log=logarithmic, title=title, metric=metric)
        best = self.best
        if best is not None:
            config = self._config(best)
            settings = {name: value for name, value in config.differing().items() if name not in ("logger", "per_user")}
            settings = {"model": config.model} | settings | best.settings
            heading = (
                f"# Trial {best.number} of {len(self.outcomes)}: validation {SELECTION} {best.value:.4f}.\n"
                f"# Searched: {' '.join(self.space.describe())}\n"
            )
            write_text(self.output_dir / BEST, heading + dump_yaml(settings))

    def write_trials(self) -> None:
        """Writes ``trials.json``: what is searched, and all trials so far."""
        report = {
            "format": FORMAT,
            "metric": f"validation {SELECTION}",
            "search": self.space.describe(),
            "pruner": self.pruner,
            "config": self.space.base.to_dict(),
            "best": None if self.best is None else self.best.number,
            "trials": [dataclasses.asdict(outcome) for outcome in self.outcomes],
        }
        write_json(self.output_dir / TRIALS, report)

    def _config(self, outcome: Outcome) -> TrainConfig:
        values = {name: tuple(x) if isinstance(x, list) else x for name, x in outcome.settings.items()}
        return self.space.config(values)

    def test_best(self) -> Found:
        """Tests the best trial; it is trained already."""
        if self.best is None:
            count = len(self.outcomes)
            raise ValueError(
                f"none of {count} trials has come to its end; go on with --resume and more --trials or --hours"
            )
        config = self._config(self.best)
        result = train(self._data.prepared(config), config, self.folder(self.best.number), None)
        return Found(self.best, config, result, self.outcomes)


def train(prepared: "TrainingData", config: TrainConfig, folder: Path, watch: loop.Watch | None) -> "Result":
    """Trains a trial, or goes on with it; tests it if nobody watches."""
    return loop.train(prepared, config, config.optimizer, folder, resume=True, test=watch is None, watch=watch)


def _open_study(path: Path, base: TrainConfig, pruner: Pruner) -> "optuna.Study":
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    drop_half_line(path)
    return optuna.create_study(
        study_name="sevo-optax",
        # Its lock is a link to this path: a relative one would be looked up from the link's own folder.
        storage=JournalStorage(JournalFileBackend(str(path.absolute()))),
        direction="maximize",
        pruner=_pruner(pruner, base),
        load_if_exists=True,
    )


def _pruner(name: Pruner, base: TrainConfig) -> "optuna.pruners.BasePruner":
    import optuna

    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=base.epochs // 10)
    if name == "successive-halving":
        least = max(base.eval_every, base.epochs // 27)
        return _halving(least)
    return optuna.pruners.NopPruner()


def _halving(least: int) -> "optuna.pruners.BasePruner":
    """Successive halving that does not compare with trials that were broken off: others went on in their place."""
    import optuna
    from optuna.trial import TrialState

    class Unbroken:
        def __init__(self, study: "optuna.Study") -> None:
            self._study = study

        def __getattr__(self, name: str) -> Any:
            return getattr(self._study, name)

        def get_trials(self, **options: Any) -> list["optuna.trial.FrozenTrial"]:
            return [trial for trial in self._study.get_trials(**options) if trial.state != TrialState.FAIL]

    class Halving(optuna.pruners.SuccessiveHalvingPruner):
        def prune(self, study: "optuna.Study", trial: "optuna.trial.FrozenTrial") -> bool:
            return super().prune(Unbroken(study), trial)

    return Halving(min_resource=least, reduction_factor=3)


def _sampler(seed: int, number: int) -> "optuna.samplers.BaseSampler":
    """The sampler of one trial."""
    import numpy as np
    import optuna

    return optuna.samplers.TPESampler(seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))


def _outcome(trial: "optuna.trial.FrozenTrial") -> Outcome:
    values = trial.user_attrs["outcome"]
    return Outcome(**values | {"curve": [tuple(point) for point in values["curve"]]})


def _points(folder: Path) -> list[tuple[int, float]]:
    """What a trial's run has on its record."""
    with contextlib.suppress(FileNotFoundError):
        return curve(read_history(folder / "history.jsonl"))
    return []


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The values as plain JSON."""
    return json.loads(json.dumps(settings, default=str))


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def _folder(output_dir: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Holds the folder of a search.

    Raises:
      ValueError: if it holds something else, or a search that is neither to be resumed nor to be overwritten, or one
        that another process makes.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in output_dir.iterdir() if not path.name.startswith("."))
    if JOURNAL in names:
        if not (resume or overwrite):
            raise ValueError(
                f"{output_dir} holds a search already; go on with --resume, replace it with --overwrite, "
                "or give another --output-dir"
            )
    elif names:
        raise ValueError(
            f"{output_dir} holds {names[0]}, but no search; give another --output-dir, or empty it yourself"
        )
    with claim(output_dir / LOCK) as mine:
        if not mine:
            raise ValueError(f"another process searches in {output_dir}; wait for it, or give another --output-dir")
        if overwrite:
            _remove(output_dir)
        yield


def _remove(output_dir: Path) -> None:
    """Removes a search: its files, and those folders of trials that hold runs."""
    for folder in (output_dir / "trials").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if is_run(read_json(folder / "run.json")):
                shutil.rmtree(folder)
    for name in (TRIALS, BEST, PICTURE, JOURNAL):  # the journal last: until then it is a search
        (output_dir / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Has optuna say nothing of its own: each trial is told of in a line already."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
