"""Metrics of groups of users, against counting by hand."""

import math
import statistics
from typing import get_args

import numpy as np
import pytest

from models.config import Grouping
from models.data import Interactions, drifting_interests, global_time, leave_one_out
from models.evaluation.groups import COUNTED, GROUPS, summarize_groups

RANGES = {
    "popularity": {"never seen": (0, 0), "1-4": (1, 4), "5-19": (5, 19), "20 and more": (20, 10**9)},
    "length": {
        "1-4": (1, 4),
        "5-9": (5, 9),
        "10-19": (10, 19),
        "20-49": (20, 49),
        "50-199": (50, 199),
        "200 and more": (200, 10**9),
    },
}


def worth(ranks, ks):
    values = {f"HR@{k}": [float(rank < k) for rank in ranks] for k in ks}
    values |= {f"NDCG@{k}": [(rank < k) / math.log2(rank + 2) for rank in ranks] for k in ks}
    values |= {f"MRR@{k}": [(rank < k) / (rank + 1) for rank in ranks] for k in ks}
    return {name: statistics.fmean(mine) for name, mine in values.items()}


def by_hand(ranks, split, ks):
    trained = [item for items in split.train for item in items.tolist()]
    counts = {
        "popularity": [trained.count(item) for item in split.test.tolist()],
        "length": [len(history) for history in split.test_history],
    }
    found = {}
    for grouping, ranges in RANGES.items():
        found[grouping] = {}
        for name, (least, most) in ranges.items():
            mine = [rank for rank, count in zip(ranks, counts[grouping], strict=True) if least <= count <= most]
            found[grouping][name] = {"users": len(mine)} | (worth(mine, ks) if mine else {})
    return found


def test_against_counting_by_hand():
    split = leave_one_out(drifting_interests(num_users=90, num_items=60, num_groups=6, seed=4))
    ranks = np.random.default_rng(0).integers(0, 15, 90)
    found = summarize_groups(ranks, split, (1, 10))
    expected = by_hand(ranks.tolist(), split, (1, 10))
    assert [list(groups) for groups in found.values()] == [list(groups) for groups in expected.values()]
    used = 0
    for grouping, groups in expected.items():
        for name, values in groups.items():
            assert found[grouping][name] == pytest.approx(values, rel=1e-6), (grouping, name)
            used += values["users"] > 0
    assert used >= 6
    overall = worth(ranks.tolist(), (1, 10))
    for groups in found.values():
        assert sum(values["users"] for values in groups.values()) == 90
        for name, value in overall.items():
            parts = sum(values["users"] * values.get(name, 0) for values in groups.values()) / 90
            assert parts == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("times", "name"),
    [(0, "never seen"), (1, "1-4"), (4, "1-4"), (5, "5-19"), (19, "5-19"), (20, "20 and more"), (300, "20 and more")],
)
def test_popularity_is_that_of_the_training_part(times, name):
    """Item 9 is in the first users' training part, in the next one's validation and in the last one's test part."""
    sequences = [[9, 1, 2]] * times + [[1, 9, 2], [1, 2, 9]]
    split = leave_one_out(Interactions.from_sequences(sequences))
    ranks = np.full(len(sequences), 100)
    ranks[-1] = 0
    groups = summarize_groups(ranks, split)["popularity"]
    assert [group for group, found in groups.items() if found.get("HR@1")] == [name]


@pytest.mark.parametrize(
    ("length", "name"),
    [(2, "1-4"), (4, "1-4"), (5, "5-9"), (10, "10-19"), (49, "20-49"), (50, "50-199"), (200, "200 and more")],
)
def test_a_history_is_what_is_known_at_the_test(length, name):
    split = leave_one_out(Interactions.from_sequences([np.arange(1, length + 2)]))
    groups = summarize_groups(np.array([3]), split)["length"]
    assert {group: found["users"] for group, found in groups.items() if found["users"]} == {name: 1}
    assert groups[name]["HR@5"] == 1
    assert all(found == {"users": 0} for group, found in groups.items() if group != name)


def test_of_a_split_in_time():
    """Its test users are some of all, and numbered on their own."""
    data = Interactions.from_sequences(
        [[1, 2, 3, 4], [1, 5], [2, 1, 4]], times=[[1, 2, 3, 20], [4, 5], [6, 12, 25]], num_items=5
    )
    split = global_time(data, quantiles=(0.8, 0.9), times=("10", "18"))
    assert split.test.tolist() == [4, 4]
    found = summarize_groups(np.array([0, 2]), split, (1,))
    assert found["popularity"]["never seen"] == {"users": 2, "HR@1": 0.5, "NDCG@1": 0.5, "MRR@1": 0.5}
    assert found["length"]["1-4"]["users"] == 2


def test_every_choice_is_there():
    assert list(GROUPS) == list(COUNTED) == list(get_args(Grouping))
