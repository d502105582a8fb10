"""Interaction data made on the spot: nothing to download, the same on every machine."""

import numpy as np

from models.data.interactions import Interactions


def drifting_interests(
    *,
    num_users: int = 2000,
    num_items: int = 1000,
    num_groups: int = 50,
    mean_length: float = 10.0,
    stay_probability: float = 0.7,
    noise_probability: float = 0.3,
    popularity_exponent: float = 0.8,
    seed: int = 0,
) -> Interactions:
    """Generates users whose interest drifts between latent groups of items.

    Every item belongs to one of ``num_groups`` groups, arranged on a ring by kinship. A user is interested in one group
    at a time, stays with it from one interaction to the next with ``stay_probability``, and otherwise moves on to a
    group nearby. Inside a group, popular items are chosen more often (a power law of their rank); some choices are
    noise and follow popularity alone. Nobody chooses an item twice. Lengths are 5 plus a geometric number, so that most
    histories are short.

    The generator knows of nothing but these choices: no graph, no model, no optimizer.

    Args:
      num_users: number of users.
      num_items: size of the catalogue; items are 1 … num_items, groups are mixed among the ids.
      num_groups: number of latent groups, at most ``num_items``.
      mean_length: mean number of interactions of a user, more than 5.
      stay_probability: probability that the interest does not move.
      noise_probability: probability that a choice ignores the interest.
      popularity_exponent: how skewed popularity is; 0: not at all.
      seed: seed of everything.

    Returns:
      The interactions. Every user has at least 5, or the whole catalogue if that is smaller.

    Raises:
      ValueError: if a number is out of range.
    """
    if not 1 <= num_groups <= num_items:
        raise ValueError(f"num_groups must lie between 1 and num_items={num_items}, got {num_groups}")
    if mean_length <= 5:
        raise ValueError(f"mean_length must be more than 5, the shortest history, got {mean_length}")
    for name, value in {"stay_probability": stay_probability, "noise_probability": noise_probability}.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")
    if stay_probability == 1 and noise_probability == 0 and num_groups > 1:
        raise ValueError(
            "noise_probability must be larger than 0 where stay_probability is 1: a user never leaves a group then, "
            "which may hold fewer items than a history"
        )
    if num_users < 1:
        raise ValueError(f"num_users must be at least 1, got {num_users}")
    rng = np.random.default_rng(seed)
    items = 1 + rng.permutation(num_items)
    group_of = np.sort(rng.integers(num_groups, size=num_items))
    group_of[:num_groups] = np.arange(num_groups)  # no group is empty
    popularity = np.empty(num_items)
    popularity[rng.permutation(num_items)] = (1 + np.arange(num_items)) ** -popularity_exponent
    everywhere = popularity / popularity.sum()
    members = [np.flatnonzero(group_of == group) for group in range(num_groups)]
    inside = [popularity[m] / popularity[m].sum() for m in members]
    group_popularity = np.array([popularity[m].sum() for m in members])
    group_popularity /= group_popularity.sum()
    lengths = np.minimum(4 + rng.geometric(1 / (mean_length - 4), size=num_users), num_items)

    sequences = []
    for length in lengths:
        group = rng.choice(num_groups, p=group_popularity)
        chosen: dict[int, None] = {}
        while len(chosen) < length:
            if rng.random() > stay_probability:
                group = (group + rng.choice([-2, -1, 1, 2])) % num_groups
            if rng.random() < noise_probability:
                item = rng.choice(num_items, p=everywhere)
            else:
                item = rng.choice(members[group], p=inside[group])
            chosen.setdefault(int(item))
        sequences.append(items[list(chosen)])
    return Interactions.from_sequences(sequences, num_items)
