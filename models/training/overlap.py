"""Whether a model is tested on what it has learned from."""

import dataclasses

import numpy as np

from models.config import TrainConfig
from models.data import Interactions, Split, load_interactions, split_interactions
from models.training.checkpoints import LoadedRun

# What decides which interactions are trained on.
SPLITTING = ("split", "split_quantiles", "split_times", "cold_items")


def overlap_note(run: LoadedRun, config: TrainConfig, split: Split, interactions: Interactions | None) -> str:
    """What a protocol line must say about test items that the run was trained on.

    A user's item counts if the same user had the same item, by their ids, in the training part of the run's own split.

    Args:
      run: the trained model.
      config: how the test's data are read and split.
      split: the test's data, with items numbered as in the run.
      interactions: the run's data, if the test is on them; None: it is on others, and the run's are read again.

    Returns:
      A clause to follow others; empty if no item was trained on.
    """
    theirs = run.info.config
    if interactions is not None and all(getattr(config, name) == getattr(theirs, name) for name in SPLITTING):
        return ""
    if interactions is None:
        try:
            interactions = load_interactions(dataclasses.replace(theirs, cache_dir=config.cache_dir))
        except (OSError, ValueError):
            interactions = None
        if interactions is None or not run.info.trained_on(interactions):
            source = "embedded data" if theirs.data is None else theirs.data
            return f"; whether the run was trained on these items is not known: its data, {source}, are gone or changed"
    trained = split_interactions(interactions, theirs).train
    count = _count(split, trained)
    if not count:
        return ""
    return f"; {count:,} of the {len(split.test):,} test items are ones that the run was trained on"


def _count(split: Split, trained: Interactions) -> int:
    """How many test items stand in a user's training part."""
    number_of = {user: number for number, user in enumerate(map(str, trained.user_ids.tolist()))}
    users = np.array([number_of.get(user, -1) for user in map(str, split.test_history.user_ids.tolist())], np.int64)
    stride = trained.num_items + 1
    pairs = users * stride + split.test
    return int(np.sum((users >= 0) & np.isin(pairs, trained.users * stride + trained.items)))
