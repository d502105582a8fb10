"""Who gains: metrics of groups of users, by how popular the item to find is, and by how much is known of the user."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from models.config import Grouping
from models.data import Split
from models.evaluation import metrics

# Names of the groups, and the least number that belongs to each: of the item's training interactions, of the items in
# the user's history.
GROUPS: dict[Grouping, dict[str, int]] = {
    "popularity": {"never seen": 0, "1-4": 1, "5-19": 5, "20 and more": 20},
    "length": {"1-4": 1, "5-9": 5, "10-19": 10, "20-49": 20, "50-199": 50, "200 and more": 200},
}
COUNTED: dict[Grouping, str] = {
    "popularity": "training interactions of the item to find",
    "length": "items in the user's history",
}
# Metrics by the grouping and the group's name, beside the number of its users; those of an empty group are missing.
Groups = dict[Grouping, dict[str, dict[str, Any]]]


def summarize_groups(ranks: np.ndarray, split: Split, ks: Sequence[int] = (1, 5, 10)) -> Groups:
    """The metrics of the test users' groups, all from the same ranks.

    Popularity is that of the training part: the item of a group ``never seen`` stands in the test part (and maybe the
    validation part) alone. A history is what is known at the test, the validation item included.

    Args:
      ranks: shape (test users,), 0 for the first place.
      split: where the ranks come from.
      ks: lengths of the lists that metrics are given for.

    Returns:
      By grouping and name of the group, ``users`` and all metrics of :func:`~models.evaluation.metrics.summarize`;
      of an empty group ``users`` alone, which is 0.

    Examples:
      >>> from models.data import Interactions, leave_one_out
      >>> split = leave_one_out(Interactions.from_sequences([[1, 2, 3, 4], [1, 3, 2]]))
      >>> found = summarize_groups(np.array([0, 3]), split, ks=[1])
      >>> found["popularity"]["1-4"]  # of item 2; item 4 is nowhere else
      {'users': 1, 'HR@1': 0.0, 'NDCG@1': 0.0, 'MRR@1': 0.0}
      >>> found["popularity"]["never seen"]["HR@1"], found["popularity"]["5-19"]
      (1.0, {'users': 0})
    """
    worth = metrics.by_user(np.asarray(ranks), ks)
    training_interactions = np.bincount(split.train.items, minlength=split.train.num_items + 1)
    counts = {"popularity": training_interactions[split.test], "length": split.test_history.lengths}
    return {grouping: _means(counts[grouping], names, worth) for grouping, names in GROUPS.items()}


def _means(counts: np.ndarray, names: dict[str, int], worth: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Metrics by the name of the group that a user's count belongs to."""
    group = np.searchsorted(list(names.values()), counts, side="right") - 1
    users = np.bincount(group, minlength=len(names))
    sums = {metric: np.bincount(group, mine, len(names)) for metric, mine in worth.items()}
    return {
        name: {"users": int(users[i])} | ({m: float(x[i] / users[i]) for m, x in sums.items()} if users[i] else {})
        for i, name in enumerate(names)
    }
