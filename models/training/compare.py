"""Training the same model with several optimizers on the same data and seeds."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tabulate import tabulate

from models.config import OPTIMIZERS, SELECTION, Optimizer, TrainConfig
from models.files import write_json
from models.training.files import curve, read_history
from models.training.loop import DivergedError, train_seeds
from models.training.run import Result, Run
from models.training.time_to_quality import MEASURES, Course, TimeToQuality, time_to_quality
from models.training.training_data import TrainingData

# What a comparison writes beside its runs, the page by the command line.
WRITTEN = ("compare.json", "compare.png", "report.html")


@dataclasses.dataclass(frozen=True)
class Gain:
    """How one arm does against plain AdamW on one metric.

    Attributes:
      relative: difference of the means, divided by AdamW's mean; None where that is 0.
      p_value: of a two-sided paired t-test over the seeds (Section 4 of the paper); None with fewer than two seeds, or
        where all differences are the same.
    """

    relative: float | None
    p_value: float | None


def gain(values: Sequence[float], base: Sequence[float]) -> Gain:
    """Compares two arms, seed by seed.

    Args:
      values: one value a seed.
      base: those of plain AdamW, of the same seeds in the same order.

    Examples:
      >>> gain([0.41, 0.43, 0.42], [0.33, 0.34, 0.35])
      Gain(relative=0.235..., p_value=0.005...)
    """
    from scipy import stats  # slow to import

    mean = statistics.fmean(base)
    relative = statistics.fmean(values) / mean - 1 if mean else None
    # Rounded: figures are float32, and the same share of users gives differences that differ in the last bits.
    differences = {round(value - other, 8) for value, other in zip(values, base, strict=True)}
    if len(differences) < 2:
        return Gain(relative, None)
    return Gain(relative, float(stats.ttest_rel(values, base).pvalue))


def seeds_at_once(count: int) -> int:
    """How many seeds to train in one program: all of them on an accelerator, one on a CPU.

    Five seeds side by side took 6.6 times as long as one on two cores.
    """
    return 1 if jax.default_backend() == "cpu" else count


def compare(
    prepared: TrainingData,
    config: TrainConfig,
    output_dir: Path,
    *,
    optimizers: Sequence[Optimizer] = OPTIMIZERS,
    seeds: int = 1,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, list[Result]]:
    """Trains every optimizer with every seed.

    Args:
      prepared: the data.
      config: the run, resolved. Its seed is the first one; the others count on from it.
      output_dir: where each run gets a folder ``OPTIMIZER-SEED``, and ``compare.json`` and ``compare.png`` appear at
        the end.
      optimizers: which, plain AdamW first.
      seeds: how many.
      resume: whether finished runs are kept and broken ones continued.
      overwrite: whether runs that are there already are removed.

    Returns:
      Results by optimizer, one a seed.

    Raises:
      ComparisonDivergedError: when all is done, if a run has diverged. It has the results of the others, and the files
        are written from them.
      CheckpointError: if a folder holds something else than a run of this comparison, or one that is not to be resumed
        or overwritten: before anything is trained.
    """
    numbers = list(range(config.seed, config.seed + seeds))
    size = seeds_at_once(seeds)
    _check_folder(output_dir, [f"{optimizer}-{seed}" for optimizer in optimizers for seed in numbers])
    for optimizer in optimizers:
        for seed in numbers:
            run = dataclasses.replace(config, seed=seed, optimizer=optimizer)
            Run(prepared, run, optimizer, output_dir / f"{optimizer}-{seed}").check(resume=resume, overwrite=overwrite)
    for name in WRITTEN if overwrite else ():  # of the runs that are about to go
        (output_dir / name).unlink(missing_ok=True)
    results: dict[str, list[Result]] = {}
    failures: dict[str, str] = {}
    for optimizer in optimizers:
        results[optimizer] = []
        for start in range(0, seeds, size):
            group = numbers[start : start + size]
            folders = [output_dir / f"{optimizer}-{seed}" for seed in group]
            try:
                results[optimizer] += train_seeds(
                    prepared, config, optimizer, group, folders, resume=resume, overwrite=overwrite
                )
            except DivergedError as error:
                results[optimizer] += [result for result in error.results if result is not None]
                failures |= {f"{optimizer}-{seed}": text for seed, text in error.failures.items()}
    if any(results.values()):
        _write(results, config, output_dir)
    if failures:
        raise ComparisonDivergedError(failures, results)
    return results


class ComparisonDivergedError(ValueError):
    """Runs of a comparison have diverged.

    Attributes:
      failures: what happened, by run.
      results: of the other runs, by optimizer.
    """

    def __init__(self, failures: dict[str, str], results: dict[str, list[Result]]) -> None:
        self.failures, self.results = failures, results
        super().__init__("; ".join(f"{name}: {text}" for name, text in failures.items()))


def _check_folder(output_dir: Path, names: Sequence[str]) -> None:
    """Refuses to write a comparison over files that are none.

    Raises:
      CheckpointError: if there is such a file, and no run that it could come from.
    """
    from models.training.checkpoints import CheckpointError

    if any((output_dir / name / "run.json").exists() for name in names):
        return
    for name in WRITTEN:
        if (output_dir / name).exists():
            raise CheckpointError(
                f"{output_dir} holds {name}, but none of the runs {', '.join(names[:3])} …; give another --output-dir"
            )


def _write(results: dict[str, list[Result]], config: TrainConfig, output_dir: Path) -> None:
    """Draws the curves and writes the numbers."""
    courses = read_courses(results, output_dir)
    reached = times_to_quality(courses)
    curves = {optimizer: [run.curve for run in runs.values()] for optimizer, runs in courses.items() if runs}
    from models import plots  # matplotlib is slow to import and not needed to train

    source = "embedded data" if config.data is None else config.data.stem
    base = next(iter(courses))
    plots.validation_curves(
        curves,
        output_dir / "compare.png",
        title=f"{config.model} on {source}",
        goal=plots.Goal(f"best of {base}", reached[base].level) if reached else None,
        arrivals={optimizer: plots.Arrival(*found.arrival) for optimizer, found in reached.items()},
    )
    write_json(output_dir / "compare.json", summary(results, reached))


def read_courses(results: Mapping[str, Sequence[Result]], output_dir: Path) -> dict[str, dict[int, Course]]:
    """How the runs of a comparison went, by optimizer and seed, from their folders.

    Args:
      results: of :func:`compare`.
      output_dir: where it was told to write.
    """
    courses: dict[str, dict[int, Course]] = {}
    for optimizer, runs in results.items():
        courses[optimizer] = {}
        for run in runs:
            seed = run.config["seed"]
            history = read_history(output_dir / f"{optimizer}-{seed}" / "history.jsonl")
            courses[optimizer][seed] = Course(curve(history), run.epoch_seconds / run.seeds_together, run.epoch_steps)
    return courses


def times_to_quality(courses: Mapping[str, Mapping[int, Course]]) -> dict[str, TimeToQuality]:
    """When each optimizer first reaches the best validation results of the first, as far as there are seeds in common.

    Args:
      courses: by optimizer, plain AdamW first.

    Returns:
      By optimizer; nothing, if there is nothing that the first is compared with.
    """
    base = next(iter(courses))
    found = {optimizer: time_to_quality(runs, courses[base]) for optimizer, runs in courses.items()}
    reached = {optimizer: one for optimizer, one in found.items() if one is not None}
    return reached if len(reached) > 1 else {}


def summary(results: dict[str, list[Result]], reached: Mapping[str, TimeToQuality]) -> dict[str, Any]:
    """A comparison as plain JSON.

    Args:
      results: by optimizer.
      reached: of :func:`times_to_quality`.

    Returns:
      The protocol; by optimizer the runs and each metric's statistics; and by optimizer when each seed reaches the
      first one's best validation result, with mean and standard deviation.
    """
    base, first = next(iter(results)), next(run for runs in results.values() for run in runs)
    report: dict[str, Any] = {"protocol": first.protocol, "optimizers": {}, "time_to_quality": {}}
    for optimizer, found in reached.items():
        report["time_to_quality"][optimizer] = dataclasses.asdict(found) | {
            "mean": {measure: found.mean(measure) for measure in MEASURES},
            "sd": {measure: found.deviation(measure) for measure in MEASURES},
        }
    for optimizer, runs in results.items():
        metrics = {}
        for name in first.test if runs else ():
            values = [run.test[name] for run in runs]
            metrics[name] = {
                "mean": statistics.fmean(values),
                "sd": statistics.stdev(values) if len(values) > 1 else None,
            }
            if optimizer != base:
                metrics[name] |= dataclasses.asdict(paired_gain(runs, results[base], name))
        report["optimizers"][optimizer] = {"test": metrics, "runs": [dataclasses.asdict(run) for run in runs]}
    return report


def paired_gain(runs: Sequence[Result], base: Sequence[Result], metric: str) -> Gain:
    """Compares two arms over the seeds that both have: one of them may have diverged with some.

    Args:
      runs: of one arm, a seed each.
      base: of plain AdamW.
      metric: which test metric.
    """
    by_seed = {run.config["seed"]: run.test[metric] for run in base}
    pairs = [(run.test[metric], by_seed[run.config["seed"]]) for run in runs if run.config["seed"] in by_seed]
    return gain(*zip(*pairs, strict=True)) if pairs else Gain(None, None)


def table(results: dict[str, list[Result]]) -> str:
    """Test metrics, one optimizer a line, with the gain in NDCG@10 over the first.

    With several seeds, metrics are mean ± standard deviation, and ``p`` belongs to a paired t-test on NDCG@10. Where
    the test lists have other lengths, NDCG at the last of them stands in. An optimizer that has diverged with every
    seed has no figures.
    """
    base, seeds = next(iter(results)), max(map(len, results.values()))
    first = next(run for runs in results.values() for run in runs)
    names = [name for name in first.test if name.startswith(("HR", "NDCG"))]
    compared = SELECTION if SELECTION in names else [name for name in names if name.startswith("NDCG")][-1]
    gained = "gain" if compared == SELECTION else f"gain in {compared}"
    lines = [["optimizer", *names, gained, *(["p"] if seeds > 1 else []), "best epoch", "s/epoch"]]
    for optimizer, runs in results.items():
        if not runs:
            lines.append([optimizer, "diverged", *[""] * (len(lines[0]) - 2)])
            continue
        found = None if optimizer == base else paired_gain(runs, results[base], compared)
        line = [optimizer]
        for name in names:
            values = [run.test[name] for run in runs]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            line.append(f"{statistics.fmean(values):.4f}{spread}")
        line.append("" if found is None or found.relative is None else f"{found.relative:+.1%}")
        if seeds > 1:
            line.append("" if found is None or found.p_value is None else f"{found.p_value:.2g}")
        line.append(", ".join(str(run.best_epoch) for run in runs))
        seconds = statistics.median(run.epoch_seconds / run.seeds_together for run in runs)  # those of one seed
        lines.append([*line, f"{seconds:.2f}"])
    sides = ["left"] + ["right"] * (len(lines[0]) - 1)
    return tabulate(lines, tablefmt="plain", disable_numparse=True, colalign=sides)


def time_table(reached: Mapping[str, TimeToQuality]) -> str:
    """When each optimizer is as good as the first gets at best, one a line, with how many of the seeds get there.

    Args:
      reached: of :func:`times_to_quality`.
    """
    lines = [["optimizer", "seeds", *MEASURES]]
    for optimizer, found in reached.items():
        seeds = f"{found.reached} of {len(found.seeds)}"
        lines.append([optimizer, seeds, *(found.text(measure) for measure in MEASURES)])
    sides = ["left"] + ["right"] * (len(lines[0]) - 1)
    return tabulate(lines, tablefmt="plain", disable_numparse=True, colalign=sides)
