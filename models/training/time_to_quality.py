"""Time to quality: how long training takes until it is as good as another gets at best."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

Measure = Literal["epochs", "steps", "seconds"]
MEASURES: tuple[Measure, ...] = ("epochs", "steps", "seconds")
NOT_REACHED = "not reached"
# Seconds below this have a digit behind the point.
LONG = 100


class Course(NamedTuple):
    """How one run went.

    Attributes:
      curve: points (epoch, validation NDCG@10), one an evaluation.
      epoch_seconds: what an epoch took, without evaluation; of this seed alone.
      epoch_steps: steps an epoch; None: not known.
    """

    curve: Sequence[tuple[int, float]]
    epoch_seconds: float
    epoch_steps: int | None


@dataclasses.dataclass(frozen=True)
class TimeToQuality:
    """When the runs of an arm first reach the best validation results of another, seed by seed.

    Attributes:
      seeds: those that both were trained with; at least one.
      levels: the other's best validation NDCG@10, one a seed.
      epochs: after how many epochs each seed first reaches it, of those after which it is evaluated; None: never.
      steps: likewise, steps of the optimizer; None for all: not known.
      seconds: likewise, seconds of training: epochs times the run's median seconds of an epoch, without compiling and
        evaluating.
    """

    seeds: Sequence[int]
    levels: Sequence[float]
    epochs: Sequence[int | None]
    steps: Sequence[int | None] | None
    seconds: Sequence[float | None]

    @property
    def level(self) -> float:
        """The mean of the levels."""
        return statistics.fmean(self.levels)

    @property
    def reached(self) -> int:
        """How many seeds reach it."""
        return sum(epoch is not None for epoch in self.epochs)

    def mean(self, measure: Measure) -> float | None:
        """The mean over the seeds that reach it; None: none does, or it is not known."""
        values = self._known(measure)
        return statistics.fmean(values) if values else None

    def deviation(self, measure: Measure) -> float | None:
        """The standard deviation over the seeds that reach it; None: there are less than two."""
        values = self._known(measure)
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def arrival(self) -> tuple[float | None, float | None, int]:
        """Mean and deviation of the epochs, and how many seeds do not get there: what a picture shows."""
        return self.mean("epochs"), self.deviation("epochs"), len(self.seeds) - self.reached

    def text(self, measure: Measure, unknown: str = "") -> str:
        """The mean, and the deviation behind it, for tables.

        Args:
          measure: of what.
          unknown: what to say where nothing is known.
        """
        mean, deviation = self.mean(measure), self.deviation(measure)
        if mean is None:
            return unknown if self.reached or measure != "epochs" else NOT_REACHED
        digits = 1 if measure == "seconds" and mean < LONG else 0
        return f"{mean:,.{digits}f}" + ("" if deviation is None else f" ± {deviation:,.{digits}f}")

    def _known(self, measure: Measure) -> list[float]:
        return [value for value in getattr(self, measure) or () if value is not None]


def time_to_quality(runs: Mapping[int, Course], base: Mapping[int, Course]) -> TimeToQuality | None:
    """When runs first reach the best validation result of the base with the same seed.

    Args:
      runs: of one arm, by seed.
      base: of the arm that sets the level, plain AdamW, by seed. Against itself it takes as long as its best epoch.

    Returns:
      What was found; None: there is no seed in common with which the base has a result of more than 0.

    Examples:
      >>> adamw = {0: Course([(5, 0.1), (10, 0.3), (15, 0.4)], epoch_seconds=2.0, epoch_steps=7)}
      >>> sevo = {0: Course([(5, 0.2), (10, 0.5), (15, 0.4)], epoch_seconds=2.5, epoch_steps=7)}
      >>> time_to_quality(sevo, adamw)
      TimeToQuality(seeds=[0], levels=[0.4], epochs=[10], steps=[70], seconds=[25.0])
      >>> time_to_quality(adamw, sevo).text("epochs")
      'not reached'
    """
    best = {seed: max((value for _, value in course.curve), default=0.0) for seed, course in base.items()}
    seeds = [seed for seed in sorted(runs) if best.get(seed, 0) > 0 and runs[seed].curve]
    if not seeds:
        return None
    levels = [best[seed] for seed in seeds]
    epochs = [
        next((epoch for epoch, value in runs[seed].curve if value >= level), None)
        for seed, level in zip(seeds, levels, strict=True)
    ]

    times = [(epoch, runs[seed]) for seed, epoch in zip(seeds, epochs, strict=True)]
    known = all(run.epoch_steps is not None for _, run in times)
    steps = [None if epoch is None or run.epoch_steps is None else epoch * run.epoch_steps for epoch, run in times]
    seconds = [None if epoch is None else epoch * run.epoch_seconds for epoch, run in times]
    return TimeToQuality(seeds, levels, epochs, steps if known else None, seconds)
