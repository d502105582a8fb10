"""The optimizers that are compared, by name."""

from collections.abc import Sequence
from typing import Any

import optax

from models.config import Optimizer, OptimizerConfig
from sevo_optax import adamw_corrected, scale_by_adam_corrected, sevo

Stages = dict[str, optax.GradientTransformationExtraArgs]


def make_stages(
    name: Optimizer,
    config: OptimizerConfig,
    adjacency: Any,
    tables: Sequence[str],
    learning_rate: optax.ScalarOrSchedule | None = None,
) -> Stages:
    """Builds one of the three arms as named stages, to be chained in their order.

    Args:
      name: ``adamw``: plain AdamW. ``sevo-adamw``: Algorithm 1, which smooths Adam's direction. ``sevo-gradient``:
        smooths the gradient, in front of Adam's corrected moments.
      config: rates and strengths.
      adjacency: raw weights over the rows of each table.
      tables: paths of the item tables, each smoothed over the graph on its own.
      learning_rate: a schedule, or None: ``config.learning_rate``.

    Returns:
      Transformations by name. The stage ``sevo TABLE`` smooths a table; ``adamw`` has none.
    """
    rate = config.learning_rate if learning_rate is None else learning_rate
    adam = {"b1": config.b1, "b2": config.b2}
    decay = {"weight_decay": config.weight_decay}
    clip = {} if config.clip_norm is None else {"clip": optax.clip_by_global_norm(config.clip_norm)}
    match name:
        case "adamw":
            return clip | {
                "moments": optax.scale_by_adam(**adam),
                "decay": optax.add_decayed_weights(config.weight_decay),
                "rate": optax.scale_by_learning_rate(rate),
            }
        case "sevo-adamw":
            # sevo_adamw, for any number of tables.
            return clip | {
                "moments": scale_by_adam_corrected(**adam, tables=tuple(tables)),
                **smoothing(config, adjacency, tables),
                "decay": optax.add_decayed_weights(config.weight_decay),
                "rate": optax.scale_by_learning_rate(rate),
            }
        case "sevo-gradient":
            return clip | smoothing(config, adjacency, tables) | {"adamw": adamw_corrected(rate, **adam, **decay)}
    raise ValueError(f"optimizer must be one of adamw, sevo-adamw, sevo-gradient, got {name!r}")


def smoothing(config: OptimizerConfig, adjacency: Any, tables: Sequence[str]) -> Stages:
    """One stage ``sevo TABLE`` a table."""
    return {f"sevo {table}": sevo(adjacency, table, beta=config.beta, num_layers=config.num_layers) for table in tables}


def make_optimizer(
    name: Optimizer,
    config: OptimizerConfig,
    adjacency: Any,
    tables: Sequence[str],
    learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformation:
    """Chains the stages of :func:`make_stages`; the state is a dict by the stages' names."""
    return optax.named_chain(*make_stages(name, config, adjacency, tables, learning_rate).items())


def make_schedule(config: OptimizerConfig, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate at each step: a linear warm-up, then ``config.schedule`` down to zero.

    Args:
      config: ``schedule``, ``warmup_epochs``, ``epochs`` and ``learning_rate`` count.
      steps_per_epoch: batches in an epoch.
    """
    warmup = config.warmup_epochs * steps_per_epoch
    rest = config.epochs * steps_per_epoch - warmup
    match config.schedule:
        case "constant":
            main = optax.constant_schedule(config.learning_rate)
        case "linear":
            main = optax.linear_schedule(config.learning_rate, 0.0, rest)
        case "cosine":
            main = optax.cosine_decay_schedule(config.learning_rate, rest)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), main], [warmup])
