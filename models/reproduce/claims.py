"""The paper's claims, judged by the cells that are there. Only cells of the same seeds are compared."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from models.config import SELECTION, Optimizer
from models.reproduce.summaries import RowCells, Summary, TableCells, average_gains, with_common_seeds
from models.reproduce.tables import METRICS

SEVO: Optimizer = "sevo-adamw"
# Training that takes so much longer is not negligible.
NEGLIGIBLE = 0.25
# With more smoothing than this the iterative form does not converge, says the paper of its Figure 5b. From 1/2 on it
# need not keep the gradient's direction (Theorem 1).
FAILS_ABOVE = {"beauty": 0.7, "ml-1m": 0.9}

Found = Mapping[str, TableCells]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the cells say about a claim.

    Attributes:
      holds: of each comparison that could be made, whether it is as claimed.
      evidence: the figures, for readers.
    """

    holds: Sequence[bool]
    evidence: Sequence[str]

    def text(self, complete: bool) -> str:
        """The verdict in words."""
        if not self.holds:
            return "not decided"
        if all(self.holds):
            return "holds" if complete else "holds so far"
        return f"holds in {sum(self.holds)} of {len(self.holds)}" if any(self.holds) else "does not hold"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
      text: what is claimed.
      tables: names of the tables and figures that it rests on.
      judge: makes the verdict of what was trained, by table.
    """

    text: str
    tables: tuple[str, ...]
    judge: Callable[[Found], Verdict]


def finished(row: RowCells, arm: Optimizer = SEVO, **settings: Any) -> Summary | None:
    """The group with an arm and settings, if its cells are complete and of the present meaning of the arm."""
    for summary in row.summaries:
        same = summary.group.arm == arm and settings.items() <= summary.group.settings.items()
        if same and not summary.short and not summary.outdated:
            return summary
    return None


def _gains(found: Found) -> Verdict:
    holds, evidence = [], []
    over = {base: average_gains(found["table-3"].rows, base, complete=True) for base in ("adam", "adamw")}
    for gain in over["adamw"]:
        if gain.arm != SEVO or gain.gain is None:
            continue
        holds.append(gain.gain > 0)
        adam = next(x for x in over["adam"] if (x.subject, x.arm) == (gain.subject, gain.arm))
        gains = ", ".join(
            f"{x.gain:+.1%} over {x.over} ({', '.join(x.datasets)})" for x in (gain, adam) if x.gain is not None
        )
        evidence.append(f"{gain.subject} {gains}")
    if evidence:
        evidence[0] = f"averaged over {', '.join(METRICS)}: {evidence[0]}"
    return Verdict(holds, evidence)


def _rescaling(found: Found) -> Verdict:
    holds, evidence = [], []
    for row in found["figure-4a"].rows:
        compared = with_common_seeds({x: finished(row, rescale=x) for x in (True, False)})
        if compared:
            values = {x: statistics.fmean(cell.history[-1]["loss"] for cell in compared[x].cells) for x in compared}
            holds.append(values[False] > values[True])
            evidence.append(
                f"{row.row.dataset}: last training loss {values[False]:.2f} without it, {values[True]:.2f} with it"
            )
    return Verdict(holds, evidence)


def _iterative(found: Found) -> Verdict:
    holds, evidence = [], []
    for row in found["figure-5b"].rows:
        for beta in row.row.vary["beta"]:
            compared = with_common_seeds({x: finished(row, smoothing=x, beta=beta) for x in ("neumann", "iterative")})
            if beta <= FAILS_ABOVE.get(row.row.dataset, math.inf) or not compared:
                continue
            neumann, iterative = (compared[x].mean() for x in ("neumann", "iterative"))
            holds.append(iterative < neumann)
            evidence.append(f"{row.row.dataset}, beta {beta}: iterative {iterative:.4f}, Neumann {neumann:.4f}")
    return Verdict(holds, evidence)


def _told_apart(difference: float, named: str, deviation: float | None, num_seeds: int) -> tuple[bool, str]:
    """Whether means over seeds differ by more than two standard errors, and if not, a text that says so."""
    if deviation is None:
        return False, "; of one seed, so how much is noise is not known"
    if difference > (noise := 2 * deviation * math.sqrt(2 / num_seeds)):
        return True, ""
    return False, f", {named} {noise:.4f} of noise (two standard errors) does not tell apart"


def _layers(found: Found) -> Verdict:
    holds, evidence = [], []
    for row in found["table-4"].rows:
        if row.row.closed_form:
            continue
        compared = with_common_seeds({n: finished(row, num_layers=n) for n in row.row.vary["num_layers"]})
        if not compared:
            continue
        values = {n: summary.mean() for n, summary in compared.items()}
        best = max(values, key=values.__getitem__)
        seeds = ", ".join(str(cell.seed) for cell in compared[3].cells)
        text = f"{row.row.dataset}, seed {seeds}: best at L = {best} ({values[best]:.4f}; L = 3: {values[3]:.4f})"
        lead = abs(values[3] - max(x for n, x in values.items() if n != 3))
        named = f"a lead of {lead:.4f} that" if best == 3 else "which"
        deviation = finished(row, num_layers=3).deviation()
        decided, why = _told_apart(lead, named, deviation, len(compared[3].cells))
        if decided:
            holds.append(best == 3)
        text += why
        evidence.append(text)
    return Verdict(holds, evidence)


def _correction(found: Found) -> Verdict:
    gains = {
        (gain.subject, gain.settings["moment_correction"]): gain
        for gain in average_gains(found["figure-6"].rows, "adamw", complete=True)
        if gain.arm == SEVO and gain.gain is not None
    }
    holds, evidence = [], []
    for subject in ("GRU4Rec", "STOSA"):
        with_it, without = gains.get((subject, True)), gains.get((subject, False))
        if with_it and without and with_it.datasets == without.datasets:
            holds.append(with_it.gain > without.gain)
            evidence.append(
                f"{subject}: {with_it.gain:+.1%} over adamw with it, {without.gain:+.1%} without "
                f"({', '.join(with_it.datasets)})"
            )
    return Verdict(holds, evidence)


def _variants(found: Found, over: str, choice: str) -> list[tuple[RowCells, dict[Any, dict[Any, float]]]]:
    """Of the rows of Figure 7 that vary ``over``: by ``choice``, the test NDCG@10 by ``over``, where all are there."""
    complete = []
    for row in found["figure-7"].rows:
        if over not in row.row.vary:
            continue
        compared = with_common_seeds(
            {
                (picked, value): finished(row, **{choice: picked, over: value})
                for picked in row.row.vary[choice]
                for value in row.row.vary[over]
            }
        )
        values: dict[Any, dict[Any, float]] = {}
        for (picked, value), summary in compared.items():
            values.setdefault(picked, {})[value] = summary.mean()
        if values:
            complete.append((row, values))
    return complete


def _last(found: Found) -> Verdict:
    holds, evidence = [], []
    for row, values in _variants(found, "graph_max_length", "graph_keep"):
        better = [values["last"][k] > values["first"][k] for k in values["last"]]
        holds += better
        evidence.append(f"{row.row.dataset}: the last K are better at {sum(better)} of {len(better)} K")
    return Verdict(holds, evidence)


def _distance(found: Found) -> Verdict:
    holds, evidence = [], []
    for row, values in _variants(found, "max_hops", "graph_weighting"):
        spread = {name: max(x.values()) - min(x.values()) for name, x in values.items()}
        holds.append(spread["distance"] < spread["frequency"])
        evidence.append(
            f"{row.row.dataset}: {SELECTION} moves by {spread['distance']:.4f} with distance, "
            f"by {spread['frequency']:.4f} with frequency"
        )
    return Verdict(holds, evidence)


def _genres(found: Found) -> Verdict:
    rows = {row.row.given_name: row for row in found["table-5"].rows}
    interactions, genres = rows["ml-1m-interactions"], rows["ml-1m-genres"]
    holds, evidence = [], []
    for beta in genres.row.vary["beta"]:
        compared = with_common_seeds(
            {
                "adamw": finished(interactions, "adamw"),
                "genres": finished(genres, beta=beta),
                "interactions": finished(interactions, beta=beta),
            }
        )
        if compared:
            values = {name: summary.mean() for name, summary in compared.items()}
            apart = abs(values["interactions"] - values["genres"])
            deviation = finished(interactions, beta=beta).deviation()
            named = f"the last two lie {apart:.4f} apart, which"
            decided, why = _told_apart(apart, named, deviation, len(compared["interactions"].cells))
            if decided:
                holds.append(values["adamw"] < values["genres"] < values["interactions"])
            figures = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            evidence.append(f"beta {beta}: {figures}{why}")
    return Verdict(holds, evidence)


def _overhead(found: Found) -> Verdict:
    holds, evidence, devices = [], [], []
    for row in found["figure-3"].rows:
        more = None if row.costs is None or SEVO not in row.costs.arms else row.costs.overhead(SEVO)
        if more is not None:
            holds.append(more <= NEGLIGIBLE)
            evidence.append(f"{row.row.subject} {more:+.0%} an epoch")
            devices.append(row.costs.device)
    if evidence:
        evidence.append(f"measured on {' and '.join(dict.fromkeys(devices))}")
    return Verdict(holds, evidence)


CLAIMS = (
    Claim("SEvo improves every backbone", ("table-3",), _gains),
    Claim("Without rescaling, learning is slow", ("figure-4a",), _rescaling),
    Claim("The iterative form fails above beta 0.7 (Beauty), 0.9 (ML-1M)", ("figure-5b",), _iterative),
    Claim("L = 3 is best", ("table-4",), _layers),
    Claim("Correcting the moments helps GRU4Rec and STOSA", ("figure-6",), _correction),
    Claim("The last K items make a better graph than the first", ("figure-7",), _last),
    Claim("Distance is steadier than frequency as hops grow", ("figure-7",), _distance),
    Claim("Genres help, but less than interactions", ("table-5",), _genres),
    Claim(f"The overhead is negligible (at most {NEGLIGIBLE:.0%} more an epoch)", ("figure-3",), _overhead),
)


def claim_lines(found: Found) -> list[list[str]]:
    """A line for each claim whose tables are there: the claim, the verdict, the evidence, what was not run."""
    lines = []
    for claim in CLAIMS:
        if not set(claim.tables) <= set(found):
            continue
        verdict = claim.judge(found)
        missing = []
        for name in claim.tables:
            rows = found[name].rows
            total = sum(len(row.row.groups) for row in rows)
            lacking = [x for row in rows for x in (*row.missing, *(y for y in row.summaries if y.short or y.outdated))]
            if lacking:
                missing.append(f"{len(lacking)} of {total} of {name}")
        text = verdict.text(complete=not missing)
        lines.append([claim.text, text, "; ".join(verdict.evidence) or "–", ", ".join(missing) or "–"])
    return lines
