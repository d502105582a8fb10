"""What every run on the same data shares, made once and kept on the device."""

import dataclasses
from functools import partial
from typing import Any

from models.data import Interactions, Split, UnseenItems, pack
from models.graphs import item_cooccurrence
from models.memory import check_memory, training_needs
from models.registry import MODELS
from models.training.config import TrainConfig
from models.training.evaluation import FullRanking

# The losses that draw items a user has not interacted with.
DRAWS_UNSEEN = ("bce", "bpr")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What every run on the same data shares.

    Attributes:
      interactions: all of them.
      split: the training part, and what is predicted from which history.
      packed: the training sequences, packed, on the device.
      unseen: where negatives are drawn from.
      validation: evaluation set of the validation items.
      test: evaluation set of the test items.
      adjacency: raw co-occurrence weights over the rows of the item table, from the training part.
    """

    interactions: Interactions
    split: Split
    packed: Any
    unseen: UnseenItems
    validation: FullRanking
    test: FullRanking
    adjacency: Any


def prepare(interactions: Interactions, config: TrainConfig) -> Prepared:
    """Splits, packs and copies to the device; builds the graph from the training part alone.

    Raises:
      OutOfMemoryError: if training would need more memory than there is.
    """
    check_memory(training_needs(config, interactions), config)
    kind = MODELS[config.model]
    split = config.split_interactions(interactions)
    ranking = partial(FullRanking.prepare, model=kind, max_length=config.max_length, exclude_seen=config.exclude_seen)
    return Prepared(
        interactions=interactions,
        split=split,
        packed=pack(
            split.train,
            max_length=config.max_length,
            batch_size=config.batch_size,
            with_targets=kind.predicts_next,
        ),
        unseen=UnseenItems.from_interactions(split.train, config.negative_power, drawn=config.loss in DRAWS_UNSEEN),
        validation=ranking(split.validation_history, split.validation),
        test=ranking(split.test_history, split.test),
        adjacency=item_cooccurrence(
            split.train,
            num_nodes=interactions.num_items + kind.num_special,
            graph_max_length=config.graph_max_length,
            max_hops=config.max_hops,
        ),
    )
