"""What every run on the same data shares, made once and kept on the device."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from flax import nnx

from models.architectures.base import Recommender
from models.architectures.registry import make_model, model_class
from models.config import TrainConfig
from models.data import Interactions, Split, of_known_users, split_interactions
from models.evaluation.ranking import FullRanking
from models.feeds import NegativeSampler, PackedSequences, Pairs, Prefixes, pack
from models.graphs import Nodes, refuse_pipes, smoothed_nodes
from models.memory import check_memory, training_needs
from models.objectives.losses import make_loss

Feed = PackedSequences | Prefixes | Pairs
# Options of the steps alone: runs that differ in nothing else share their data.
STEP_ONLY = ("seed", "optimizer", "learning_rate", "weight_decay", "b1", "b2", "moment_correction", "schedule")
STEP_ONLY += ("warmup_epochs", "clip_norm", "beta", "num_layers", "rescale", "smoothing", "dropout_rate")


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What every run on the same data shares.

    Attributes:
      interactions: all of them.
      split: the training part, and what is predicted from which history.
      feed: what a step is fed, on the device; None: the model is fitted in closed form.
      sampler: where negatives are drawn from.
      validation: evaluation set of the validation items.
      test: evaluation set of the test items.
      context: what the model computes with, such as a graph it propagates over.
      nodes: the graph of the training part that updates are smoothed over, and its tables; None: the model has none.
    """

    interactions: Interactions
    split: Split
    feed: Feed | None
    sampler: NegativeSampler
    validation: FullRanking
    test: FullRanking
    context: Mapping[str, Any]
    nodes: Nodes | None

    @property
    def num_tokens(self) -> int:
        """Inputs in an epoch that is trained on; places that are not filled do not count."""
        return 0 if self.feed is None else self.feed.num_tokens

    @property
    def epoch_steps(self) -> int:
        """Steps of the optimizer in an epoch."""
        return 0 if self.feed is None else self.feed.num_batches


def make_training_data(
    interactions: Interactions, config: TrainConfig, num_devices: int = 1, *, smooths: bool = True
) -> TrainingData:
    """Splits, packs and copies to the device; builds graphs from the training part alone.

    Args:
      interactions: the data.
      config: the run, resolved.
      num_devices: how many devices a step will be split over.
      smooths: whether a graph is needed: to be smoothed over, or measured over.

    Raises:
      ValueError: if a graph is to be read from a pipe, or the data have nothing to train on.
      OutOfMemoryError: if training would need more memory than there is.
    """
    refuse_pipes(config)
    check_memory(training_needs(config, interactions), config, num_devices=num_devices)
    kind = model_class(config.model)
    split = split_interactions(interactions, config)
    if kind.query == "user":
        split = of_known_users(split, split.train.user_ids)
    ranking = partial(
        FullRanking.prepare,
        model=kind,
        config=config,
        user_ids=split.train.user_ids,
        exclude_seen=config.exclude_seen,
    )
    shapes = nnx.eval_shape(
        lambda: make_model(config, num_users=split.train.num_users, num_items=interactions.num_items, seed=0)
    )
    return TrainingData(
        interactions=interactions,
        split=split,
        feed=make_feed(split.train, config),
        sampler=NegativeSampler.from_interactions(
            split.train, config.negative_power, drawn=kind.feed != "none" and make_loss(config).against_unseen
        ),
        validation=ranking(split.validation_history, split.validation),
        test=ranking(split.test_history, split.test),
        context=kind.make_context(split.train, config),
        nodes=smoothed_nodes(split.train, config, shapes) if smooths else None,
    )


class NewestData:
    """The data of the newest run, kept for the next one.

    Args:
      interactions_of: gives the interactions of a configuration.
    """

    def __init__(self, interactions_of: Callable[[TrainConfig], Interactions]) -> None:
        self._interactions_of = interactions_of
        self._key: dict[str, Any] | None = None
        self._prepared: TrainingData | None = None

    def prepared(self, config: TrainConfig) -> TrainingData:
        """What runs of a configuration are trained on.

        Raises:
          OutOfMemoryError: as :func:`make_training_data` does.
          ValueError: if the interactions cannot be read.
        """
        key = {name: value for name, value in config.to_dict().items() if name not in STEP_ONLY}
        if key != self._key:
            self._key = self._prepared = None  # two at once may be too many
            self._prepared = make_training_data(self._interactions_of(config), config)
            self._key = key
        return self._prepared


def make_feed(train: Interactions, config: TrainConfig) -> Feed | None:
    """What the configured model is fed: its feed over the training part, on the device; None: nothing.

    Raises:
      ValueError: if there is nothing to train on.
    """
    kind: type[Recommender] = model_class(config.model)
    match kind.feed:
        case "sequences":
            return pack(
                train,
                max_length=config.max_length,
                batch_size=config.batch_size,
                with_targets=kind.predicts_next,
                windows=getattr(config, "windows", False),
            )
        case "prefixes" if config.separate_prefixes:
            return Prefixes.from_interactions(train, max_length=config.max_length, batch_size=config.batch_size)
        case "prefixes":
            return pack(
                train, max_length=config.max_length, batch_size=config.batch_size, count_targets=True, windows=True
            )
        case "pairs":
            return Pairs.from_interactions(train, batch_size=config.batch_size)
    return None
