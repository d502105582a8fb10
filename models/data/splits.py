"""Splitting interactions into training, validation and test."""

import dataclasses
import datetime
from collections.abc import Sequence
from typing import get_args

import numpy as np

from models.config import SplitMethod
from models.data.interactions import Interactions

# Of the draw of cold items: the same in every run, whatever its seed.
COLD_SEED = 0
A_MOMENT = "a number or a date such as 2001-12-31"


@dataclasses.dataclass(frozen=True)
class Split:
    """Interactions to train on, and users with one item each to predict.

    Every part shares the item numbers of the data it was cut from. A part holds only the users it needs, numbered on
    its own; their ``user_ids`` tell who is who.

    Attributes:
      protocol: how the parts came about, in words for a result's protocol line.
      train: what to train on.
      validation_history: what is known of each validation user when the item is predicted; nobody's is empty.
      validation: shape (validation users,), int32, the items to predict.
      test_history: what is known of each test user; nobody's is empty.
      test: shape (test users,), int32, the items to predict.
    """

    protocol: str
    train: Interactions
    validation_history: Interactions
    validation: np.ndarray
    test_history: Interactions
    test: np.ndarray


def make_split(
    interactions: Interactions,
    method: SplitMethod = "leave-one-out",
    *,
    quantiles: tuple[float, float] = (0.8, 0.9),
    times: Sequence[float | str] | None = None,
) -> Split:
    """Splits by the method of that name: :func:`leave_one_out` or :func:`global_time`.

    Args:
      interactions: the data.
      method: which split.
      quantiles: for ``global-time``, see there.
      times: for ``global-time``, see there.

    Raises:
      ValueError: if there is no such method, or the data or the cuts do not fit it.
    """
    if method == "leave-one-out":
        return leave_one_out(interactions)
    if method == "global-time":
        return global_time(interactions, quantiles=quantiles, times=times)
    raise ValueError(f"split must be one of {', '.join(get_args(SplitMethod))}, got {method!r}")


def leave_one_out(interactions: Interactions) -> Split:
    """Splits off each user's last item for test and the one before for validation.

    Training has all but the last two interactions of each user, which is also what is known at validation; at test, all
    but the last are known.

    Raises:
      ValueError: if a user has fewer than three interactions, the least that leaves one to train on.
    """
    short = np.flatnonzero(interactions.lengths < 3)
    if short.size:
        raise ValueError(
            f"user {short[0] + 1} of {interactions.num_users} has {interactions.lengths[short[0]]} interactions "
            f"(id {interactions.user_ids[short[0]]}), but leave-one-out needs at least 3 (train, validation, test); "
            f"{short.size} users are that short: remove them, for example with --min-user-interactions 3"
        )
    ends = interactions.offsets[1:]
    train = interactions.without_last(2)
    return Split(
        protocol="leave-one-out",
        train=train,
        validation_history=train,
        validation=interactions.items[ends - 2],
        test_history=interactions.without_last(1),
        test=interactions.items[ends - 1],
    )


def cold_start(split: Split, share: float) -> Split:
    """Takes some items out of a split's training part and histories, and predicts them alone.

    They are drawn by the size of the catalogue and a fixed seed, so that all runs on the same data agree on them.

    Args:
      split: the split.
      share: how many of the items, in (0, 1); at least one.

    Returns:
      The split without those items in training and histories, and without users whose item to predict is another, or
      who have nothing left in training or in their history.

    Raises:
      ValueError: if nothing is left to train on, or none of those items is to be predicted.
    """
    num_items = split.train.num_items
    count = max(1, round(share * num_items))
    cold = np.zeros(num_items + 1, bool)
    cold[1 + np.random.default_rng(COLD_SEED).permutation(num_items)[:count]] = True
    train = split.train.where(~cold[split.train.items])
    if not len(train):
        raise ValueError(f"cold_items: nothing is left to train on; give a smaller share than {share:g}")
    train = train.of_users(train.lengths > 0)
    parts = {}
    for name in ("validation", "test"):
        history, targets = getattr(split, f"{name}_history"), getattr(split, name)
        history = history.where(~cold[history.items])
        # Models with a table of users know those of the training part.
        kept = cold[targets] & (history.lengths > 0) & np.isin(history.user_ids, train.user_ids)
        if not kept.any():
            raise ValueError(
                f"cold_items: none of {count:,} cold items is anybody's {name} item; give a larger share than {share:g}"
            )
        parts |= {f"{name}_history": history.of_users(kept), name: targets[kept]}
    protocol = f"{split.protocol}; {count:,} cold items without training interactions, and only they are predicted"
    return Split(protocol=protocol, train=train, **parts)


def of_known_users(split: Split, user_ids: np.ndarray, *, trained_on: bool = True) -> Split:
    """Leaves out of a split's histories and predictions users that a model with a table of users does not know.

    Args:
      split: the split.
      user_ids: shape (users,), the raw ids of those that the model knows.
      trained_on: whether the model is of this split's training part. If not, it is only tested on the split: nobody
        need be left to validate with.

    Returns:
      The split, whose protocol says how many are left out; the same one, if none is.

    Raises:
      ValueError: if nobody is left to predict for.
    """
    parts, counts = {}, []
    for name in ("validation", "test"):
        history = getattr(split, f"{name}_history")
        known = np.isin(history.user_ids, user_ids)
        if not known.any() and trained_on:
            raise ValueError(
                f"split: no {name} user has an interaction to train on, as a model with a table of users needs; cut "
                "later, or take a model of histories, such as sasrec"
            )
        if not known.any() and name == "test":
            raise ValueError("data: the model, which has a table of users, knows none of the test users; give others")
        parts |= {f"{name}_history": history.of_users(known), name: getattr(split, name)[known]}
        counts.append(int((~known).sum()))
    if not any(counts):
        return split
    left_out = f"{counts[0]:,} validation and {counts[1]:,} test users without training interactions left out"
    if not trained_on:
        left_out = f"{counts[1]:,} test users that the model does not know left out"
    return dataclasses.replace(split, protocol=f"{split.protocol}; {left_out}", **parts)


def global_time(
    interactions: Interactions,
    *,
    quantiles: tuple[float, float] = (0.8, 0.9),
    times: Sequence[float | str] | None = None,
) -> Split:
    """Splits at two moments, the same for everybody, so that nothing of the future is learned from.

    With cuts v < t: training has the interactions before v. A user's validation item is the user's first with
    v ≤ time < t, and its history everything of the user before v. A user's test item is the first with time ≥ t, and
    its history everything of the user before t. Users without an item behind the cut, or without a history before it,
    are not evaluated there; users without an interaction before v are not trained on. An interaction exactly at a cut
    is behind it. An item to predict may be one that training never saw: it counts as any other.

    Args:
      interactions: the data, with times.
      quantiles: the shares of all interactions before v and t. Interactions of the same moment stay together, so the
        parts may be a little smaller.
      times: v and t themselves, in the unit of the data's times, or as dates where those are seconds since 1970; None:
        from the quantiles.

    Raises:
      ValueError: if the data have no times, the cuts do not ascend, or a part would be empty.
    """
    if interactions.times is None:
        raise ValueError("split: global-time needs the time of every interaction, and this data has only an order")
    cuts = _quantile_cuts(interactions.times, quantiles) if times is None else _given_cuts(times)
    protocol = f"global-time split at {cuts[0]:.15g} and {cuts[1]:.15g}, each user's first item behind the cut"
    first, last = interactions.times.min(), interactions.times.max()
    advice = f"the data reach from {first} to {last}; move the cuts with --split-times or --split-quantiles"
    if not cuts[0] < cuts[1]:
        raise ValueError(f"split: the cut for test must lie behind the one for validation, got {cuts}; {advice}")
    train = interactions.where(interactions.times < cuts[0])
    if not len(train):
        raise ValueError(f"split: nothing lies before {cuts[0]}, so there is nothing to train on; {advice}")
    parts = {}
    for name, begin, end in [("validation", cuts[0], cuts[1]), ("test", cuts[1], np.inf)]:
        history, targets = _first_between(interactions, begin, end)
        if not targets.size:
            raise ValueError(f"split: no user has an item between {begin} and {end} and another before; {advice}")
        parts |= {f"{name}_history": history, name: targets}
    return Split(protocol=protocol, train=train.of_users(train.lengths > 0), **parts)


def _first_between(interactions: Interactions, begin: float, end: float) -> tuple[Interactions, np.ndarray]:
    """The first item of each user in [begin, end), with what came before; users who lack either are left out."""
    before = interactions.where(interactions.times < begin)
    # Sequences are in order of time, so a user's first item at ``begin`` or later stands right behind the earlier ones.
    place = interactions.offsets[:-1] + before.lengths
    candidates = np.flatnonzero((before.lengths > 0) & (place < interactions.offsets[1:]))
    evaluated = np.zeros(interactions.num_users, bool)
    evaluated[candidates] = interactions.times[place[candidates]] < end
    return before.of_users(evaluated), interactions.items[place[evaluated]]


def _quantile_cuts(times: np.ndarray, quantiles: tuple[float, float]) -> tuple[float, float]:
    """The times at which these shares of all interactions are past."""
    if not 0 < quantiles[0] < quantiles[1] < 1:
        raise ValueError(f"split_quantiles must ascend between 0 and 1, got {quantiles[0]} and {quantiles[1]}")
    ordered = np.sort(times)
    return tuple(ordered[int(quantile * len(ordered))].item() for quantile in quantiles)


def _given_cuts(times: Sequence[float | str]) -> tuple[float, float]:
    if len(times) != 2:
        raise ValueError(f"split_times must be two moments, for validation and test, got {len(times)}")
    return _moment(times[0]), _moment(times[1])


def _moment(text: float | str) -> float:
    """A number as it is, or a date as seconds since 1970."""
    try:
        value = float(str(text).replace("_", "?"))  # Python takes 2001_12 for a number
    except ValueError:
        try:
            value = seconds_since_1970(str(text))
        except ValueError:
            raise ValueError(f"split_times must be {A_MOMENT}, got {text!r}") from None
    if not np.isfinite(value):
        raise ValueError(f"split_times must be {A_MOMENT}, got {text!r}")
    return value


def seconds_since_1970(text: str) -> float:
    """Reads an ISO 8601 date or time; one without a zone is in UTC.

    Raises:
      ValueError: if it is none.
    """
    moment = datetime.datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
