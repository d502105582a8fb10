"""Leaving interactions out: repetitions, and users and items with too few."""

import dataclasses
from typing import get_args

import numpy as np

from models.config import Duplicates
from models.data.interactions import Interactions


def drop_duplicates(interactions: Interactions, keep: Duplicates = "all") -> Interactions:
    """Leaves out interactions of a user with an item the user has interacted with already.

    Args:
      interactions: the data.
      keep: which interactions of the same user and item stay. ``all``: a repeated purchase is a purchase. ``exact``:
        one of those at the very same time, as a log written twice has them. ``first`` or ``last``: one in all.

    Returns:
      The interactions that stay; no user and no item is lost. A note tells how many went.

    Raises:
      ValueError: if ``keep`` is none of these, or ``exact`` and the data have no times.
    """
    if keep not in get_args(Duplicates):
        raise ValueError(f"duplicates must be one of {', '.join(get_args(Duplicates))}, got {keep!r}")
    if keep == "all":
        return interactions
    keys = [interactions.items, interactions.users]
    if keep == "exact":
        if interactions.times is None:
            raise ValueError("duplicates: exact compares times, and this data has only an order; use first or last")
        keys = [interactions.times, *keys]
    # lexsort is stable: what agrees in all keys stays in order of time.
    order = np.lexsort(keys)
    differs = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
    chosen = np.append(differs, True) if keep == "last" else np.insert(differs, 0, True)
    mask = np.zeros(len(interactions), bool)
    mask[order[chosen]] = True
    kept = interactions.where(mask)
    return kept.with_notes(f"duplicates, {keep} kept: {len(interactions) - len(kept):,} interactions removed")


def k_core(
    interactions: Interactions, *, min_user_interactions: int = 0, min_item_interactions: int = 0
) -> Interactions:
    """Leaves out users and items with too few interactions, again and again until all that remain have enough.

    What remains is the largest part of the data in which everybody has enough, whichever way one goes about it.

    Args:
      interactions: the data.
      min_user_interactions: the fewest interactions of a user; repetitions count.
      min_item_interactions: the fewest interactions of an item.

    Returns:
      What remains, with items numbered anew in the same order if some were removed. A note tells what went.

    Raises:
      ValueError: if a number is negative, or nothing remains.
    """
    for name, value in {
        "min_user_interactions": min_user_interactions,
        "min_item_interactions": min_item_interactions,
    }.items():
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    if max(min_user_interactions, min_item_interactions) <= 1:  # whoever has an interaction has one
        return _without_unused_items(interactions) if min_item_interactions else interactions
    users, items = interactions.users, interactions.items
    keep = np.ones(len(interactions), bool)
    rounds, left, before = 0, len(interactions), -1
    while left != before:
        keep &= np.bincount(users[keep], minlength=interactions.num_users)[users] >= min_user_interactions
        keep &= np.bincount(items[keep], minlength=interactions.num_items + 1)[items] >= min_item_interactions
        rounds, left, before = rounds + 1, int(keep.sum()), left
    wanted = f"at least {min_user_interactions} interactions a user and {min_item_interactions} an item"
    if not left:
        raise ValueError(
            f"with {wanted}, nothing of {interactions} remains; lower min_user_interactions or min_item_interactions"
        )
    if left == len(interactions):
        if min_item_interactions:
            interactions = _without_unused_items(interactions)
        return interactions.with_notes(f"{wanted}: nothing had to be removed")
    kept = interactions.where(keep)
    kept = _without_unused_items(kept.of_users(kept.lengths > 0))
    removed_users = interactions.num_users - kept.num_users
    removed_items = len(np.unique(items)) - kept.num_items
    return kept.with_notes(
        f"{wanted}: removed {removed_users:,} users, {removed_items:,} items and {len(interactions) - left:,} "
        f"interactions in {rounds - 1} {'rounds' if rounds > 2 else 'round'}"
    )


def _without_unused_items(interactions: Interactions) -> Interactions:
    """Numbers the items that occur anew, in the same order."""
    used = np.unique(interactions.items)
    number = np.zeros(interactions.num_items + 1, np.int32)
    number[used] = np.arange(1, len(used) + 1)
    return dataclasses.replace(
        interactions,
        items=number[interactions.items],
        num_items=len(used),
        item_ids=interactions.item_ids[np.insert(used, 0, 0)],
    )
