"""The paper's claims, judged by the cells that are there. Only cells of the same seeds are compared."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from models.config import SELECTION, Optimizer
from models.reproduce.summaries import RowCells, Summary, TableCells, average_gains, with_common_seeds
from models.reproduce.tables import METRICS

SEVO: Optimizer = "sevo-adamw"
# Around L = 3.
PEAK = (2, 3, 4)
# Training that takes so much longer is not negligible.
NEGLIGIBLE = 0.25
# Training whose last loss is so much higher is slow.
SLOW = 0.25
# With more smoothing than this the iterative form does not converge, says the paper of its Figure 5b. From 1/2 on it
# need not keep the gradient's direction (Theorem 1).
FAILS_ABOVE = {"beauty": 0.7, "ml-1m": 0.9}

Found = Mapping[str, TableCells]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the cells say about a claim.

    Attributes:
      holds: of each comparison that could be made, whether it is as claimed; None: noise may have made the difference.
      evidence: the figures, for readers.
    """

    holds: list[bool | None]
    evidence: list[str]

    def text(self, complete: bool) -> str:
        """The verdict in words.

        >>> Verdict([True, True], []).text(complete=True), Verdict([True, None, False], []).text(complete=True)
        ('holds', 'holds in 1 of 3, 1 not decided')
        """
        total, holds, undecided = len(self.holds), self.holds.count(True), self.holds.count(None)
        if undecided == total:
            return "not decided"
        if holds == total:
            return "holds" if complete else "holds so far"
        rest = f", {undecided} not decided" if undecided else ""
        if holds:
            return f"holds in {holds} of {total}{rest}"
        return f"does not hold in {total - undecided} of {total}{rest}" if undecided else "does not hold"


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
        if gain.arm != SEVO:
            continue
        if gain.gain is None:
            evidence.append(f"{gain.subject}: no run to its end")
            continue
        # The averages have no spread of their own: that of NDCG@10 says whether any data set tells the arms apart.
        told = [
            _gain_told_apart(found, row)
            for row in found["table-3"].rows
            if row.row.subject == gain.subject and row.row.dataset in gain.datasets
        ]
        decided = any(apart and (lead > 0) == (gain.gain > 0) for lead, apart, _ in told)
        holds.append(gain.gain > 0 if decided else None)
        why = "" if decided else next((text for _, apart, text in told if not apart), "")
        adam = next(x for x in over["adam"] if (x.subject, x.arm) == (gain.subject, gain.arm))
        gains = ", ".join(
            f"{x.gain:+.1%} over {x.over} ({', '.join(x.datasets)})" for x in (gain, adam) if x.gain is not None
        )
        contrary = "" if decided or not any(apart for _, apart, _ in told) else "; what is told apart says the opposite"
        evidence.append(f"{gain.subject} {gains}{why}{contrary}")
    if any(gain.arm == SEVO and gain.gain is not None for gain in over["adamw"]):
        evidence[0] = f"averaged over {', '.join(METRICS)}: {evidence[0]}"
    return Verdict(holds, evidence)


def _rescaling(found: Found) -> Verdict:
    holds, evidence = [], []
    for row in found["figure-4a"].rows:
        compared = with_common_seeds({x: finished(row, rescale=x) for x in (True, False)})
        if compared:
            values = {x: statistics.fmean(cell.history[-1]["loss"] for cell in compared[x].cells) for x in compared}
            holds.append(values[False] > (1 + SLOW) * values[True])
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
            lead = neumann - iterative
            named = f"a difference of {lead:+.4f} that"
            decided, why = _told_apart(abs(lead), named, _deviation(found, row), len(compared["neumann"].cells))
            holds.append(lead > 0 if decided else None)
            evidence.append(f"{row.row.dataset}, beta {beta}: iterative {iterative:.4f}, Neumann {neumann:.4f}{why}")
    return Verdict(holds, evidence)


def _told_apart(
    difference: float, named: str, deviation: float | None, num_seeds: int, *, results: int = 2
) -> tuple[bool, str]:
    """Whether a difference of some means over seeds is beyond two standard errors; if not, a text that says so."""
    if deviation is None:
        return False, "; of one seed, so how much is noise is not known"
    if difference > (noise := 2 * deviation * math.sqrt(results / num_seeds)):
        return True, ""
    return False, f", {named} {noise:.4f} of noise (two standard errors) does not tell apart"


def _gain_told_apart(found: Found, row: RowCells) -> tuple[float, bool, str]:
    """SEvo's lead over plain AdamW on the data of a row, and whether they are told apart, see :func:`_told_apart`."""
    compared = with_common_seeds({arm: finished(row, arm) for arm in (SEVO, "adamw")})
    sevo, plain = (compared[arm] for arm in (SEVO, "adamw"))
    lead = sevo.mean() - plain.mean()
    named = f"a difference of {lead:+.4f} in {SELECTION} that"
    return lead, *_told_apart(abs(lead), named, _deviation(found, row), len(sevo.cells))


def _deviation(found: Found, *rows: RowCells) -> float | None:
    """How far runs of a model on a data set deviate by their seeds; None: nothing has several.

    The largest that is known, of some rows' arms, those of Table 3 and the published runs: few seeds know little of it.
    """
    known = [*rows, *(found["table-3"].rows if "table-3" in found else ())]
    same = [x for x in known if _model_and_data(x) == _model_and_data(rows[0])]
    ours = [x.deviation() for row in same for x in row.summaries if not x.short and not x.outdated and len(x.cells) > 1]
    published = [x.deviation for row in same for x in row.row.published if x.arm == SEVO]
    return max([x for x in ours + published if x is not None], default=None)


def _model_and_data(row: RowCells) -> tuple[str, str]:
    return row.row.config.model, row.row.dataset


def _layers(found: Found) -> Verdict:
    holds, evidence = [], []
    for row in found["table-4"].rows:
        if row.row.closed_form:
            continue
        compared = with_common_seeds({n: finished(row, num_layers=n) for n in row.row.vary["num_layers"]})
        if not compared:
            continue
        values = {n: summary.mean() for n, summary in compared.items()}
        seeds = ", ".join(str(cell.seed) for cell in compared[3].cells)
        near, far = (
            max((n for n in values if (n in PEAK) is inside), key=values.__getitem__) for inside in (True, False)
        )
        lead = values[near] - values[far]
        named = f"a difference of {lead:+.4f} that"
        decided, why = _told_apart(abs(lead), named, _deviation(found, row), len(compared[3].cells))
        holds.append(lead > 0 if decided else None)
        figures = ", ".join(f"L = {n} {values[n]:.4f}" for n in dict.fromkeys((near, far, 0)))
        evidence.append(f"{row.row.dataset}, seed {seeds}: {figures}{why}")
    return Verdict(holds, evidence)


def _correction(found: Found) -> Verdict:
    holds, evidence = [], []
    for subject in ("GRU4Rec", "STOSA"):
        for row in found["figure-6"].rows:
            if row.row.subject != subject:
                continue
            compared = with_common_seeds(
                {"adamw": finished(row, "adamw"), **{x: finished(row, moment_correction=x) for x in (True, False)}}
            )
            if not compared:
                continue
            values = {x: summary.mean() for x, summary in compared.items()}
            lead = values[True] - values[False]
            named = f"a difference of {lead:+.4f} that"
            decided, why = _told_apart(abs(lead), named, _deviation(found, row), len(compared[True].cells))
            holds.append(lead > 0 if decided else None)
            evidence.append(
                f"{subject}, {row.row.dataset}: {values[True]:.4f} with it, {values[False]:.4f} without, adamw "
                f"{values['adamw']:.4f}{why}"
            )
    return Verdict(holds, evidence)


def _variants(found: Found, over: str, choice: str) -> list[tuple[RowCells, dict[Any, dict[Any, float]], int]]:
    """Of the rows of Figure 7 that vary ``over``: by ``choice``, the test NDCG@10 by ``over``, where all are there.

    Behind it the number of seeds, those that all have.
    """
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
            complete.append((row, values, len(summary.cells)))
    return complete


def _last(found: Found) -> Verdict:
    holds, evidence = [], []
    for row, values, num_seeds in _variants(found, "graph_max_length", "graph_keep"):
        ahead = {k: values["last"][k] - values["first"][k] for k in values["last"]}
        decided = {k: x for k, x in ahead.items() if _told_apart(abs(x), "", _deviation(found, row), num_seeds)[0]}
        holds += [x > 0 if k in decided else None for k, x in ahead.items()]
        each = ", ".join(f"{x:+.4f} (K = {k})" for k, x in ahead.items())
        some = f" at K = {', '.join(map(str, decided))}" if decided else " nowhere"
        evidence.append(f"{row.row.dataset}: the last K less the first {each}, told apart from noise{some}")
    return Verdict(holds, evidence)


def _longer(found: Found) -> Verdict:
    holds, evidence = [], []
    for row, values, num_seeds in _variants(found, "graph_max_length", "graph_keep"):
        if row.row.dataset != "beauty":
            continue
        least, most = min(values["last"]), max(values["last"])
        rise = values["last"][most] - values["last"][least]
        deviation = _deviation(found, row)
        decided, why = _told_apart(abs(rise), f"a difference of {rise:+.4f} that", deviation, num_seeds)
        top = max(values["last"].values()) - values["last"][most]  # above zero: it falls again
        falls = rise > 0 and _told_apart(top, "", deviation, num_seeds)[0]
        if decided and falls:
            why = f", {top:.4f} less at the end than at best"
        holds.append(rise > 0 and not falls if decided else None)
        each = ", ".join(f"{x:.4f}" for x in values["last"].values())
        evidence.append(f"beauty, the last {', '.join(map(str, values['last']))}: {each}{why}")
    return Verdict(holds, evidence)


def _distance(found: Found) -> Verdict:
    holds, evidence = [], []
    for row, values, num_seeds in _variants(found, "max_hops", "graph_weighting"):
        spread = {name: max(x.values()) - min(x.values()) for name, x in values.items()}
        less = spread["frequency"] - spread["distance"]
        # Of four results, not of two: each range has a largest and a smallest.
        decided, why = _told_apart(abs(less), f"{less:+.4f} that", _deviation(found, row), num_seeds, results=4)
        holds.append(less > 0 if decided else None)
        evidence.append(
            f"{row.row.dataset}: {SELECTION} moves by {spread['distance']:.4f} with distance, "
            f"by {spread['frequency']:.4f} with frequency{why}"
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
            deviation, num_seeds = _deviation(found, interactions, genres), len(compared["interactions"].cells)
            steps = [values["genres"] - values["adamw"], values["interactions"] - values["genres"]]
            told = [_told_apart(abs(x), f"a step of {x:+.4f} that", deviation, num_seeds) for x in steps]
            contrary = any(decided and x < 0 for (decided, _), x in zip(told, steps, strict=True))
            holds.append(False if contrary else True if all(decided for decided, _ in told) else None)
            why = next((text for decided, text in told if not decided), "")
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
    Claim(
        f"Without rescaling, learning is slow (our bound: a last loss {SLOW:.0%} higher)", ("figure-4a",), _rescaling
    ),
    Claim("The iterative form fails above beta 0.7 (Beauty), 0.9 (ML-1M)", ("figure-5b",), _iterative),
    Claim("Accuracy peaks around L = 3 (2 to 4)", ("table-4",), _layers),
    Claim("Correcting the moments helps GRU4Rec and STOSA", ("figure-6",), _correction),
    Claim("The last K items make a better graph than the first", ("figure-7",), _last),
    Claim("On Beauty, accuracy rises with K", ("figure-7",), _longer),
    Claim("Distance is steadier than frequency as hops grow", ("figure-7",), _distance),
    Claim("Genres help, but less than interactions", ("table-5",), _genres),
    Claim(f"The overhead is negligible (our bound: at most {NEGLIGIBLE:.0%} more an epoch)", ("figure-3",), _overhead),
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
