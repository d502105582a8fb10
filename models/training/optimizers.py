"""The optimizers that are compared, by name."""

from collections.abc import Sequence
from typing import Any

import optax

from models.training.config import Optimizer, OptimizerConfig
from sevo_optax import adamw_corrected, scale_by_adam_corrected, sevo


def make_optimizer(
    name: Optimizer, config: OptimizerConfig, adjacency: Any, tables: Sequence[str]
) -> optax.GradientTransformation:
    """Builds one of the three arms.

    Args:
      name: ``adamw``: plain AdamW. ``sevo-adamw``: Algorithm 1, which smooths Adam's direction. ``sevo-gradient``:
        smooths the gradient, in front of Adam's corrected moments.
      config: rates and strengths.
      adjacency: raw weights over the rows of each table.
      tables: paths of the item tables, each smoothed over the graph on its own.
    """
    adam = {"b1": config.b1, "b2": config.b2}

    def smoothing() -> list[optax.GradientTransformation]:
        """One a table; built only where it is used, because it checks and normalises the graph."""
        return [sevo(adjacency, table, beta=config.beta, num_layers=config.num_layers) for table in tables]

    match name:
        case "adamw":
            return optax.adamw(config.learning_rate, **adam, weight_decay=config.weight_decay)
        case "sevo-adamw":
            # sevo_adamw, for any number of tables.
            return optax.chain(
                scale_by_adam_corrected(**adam, tables=tuple(tables)),
                *smoothing(),
                optax.add_decayed_weights(config.weight_decay),
                optax.scale_by_learning_rate(config.learning_rate),
            )
        case "sevo-gradient":
            return optax.chain(
                *smoothing(), adamw_corrected(config.learning_rate, **adam, weight_decay=config.weight_decay)
            )
    raise ValueError(f"optimizer must be one of adamw, sevo-adamw, sevo-gradient, got {name!r}")
