"""The optimizers that are compared, by name."""

from typing import Any

import optax

from models.training.config import Optimizer, OptimizerConfig
from sevo_optax import adamw_corrected, sevo, sevo_adamw


def make_optimizer(
    name: Optimizer, config: OptimizerConfig, adjacency: Any, tables: str | tuple[str, ...]
) -> optax.GradientTransformation:
    """Builds one of the three arms.

    Args:
      name: ``adamw``: plain AdamW. ``sevo-adamw``: Algorithm 1, which smooths Adam's direction. ``sevo-gradient``:
        smooths the gradient, in front of Adam's corrected moments.
      config: rates and strengths.
      adjacency: raw weights over the rows of the table.
      tables: path of the item table.
    """
    adam = {"b1": config.b1, "b2": config.b2, "weight_decay": config.weight_decay}
    smoothing = {"beta": config.beta, "num_layers": config.num_layers}
    match name:
        case "adamw":
            return optax.adamw(config.learning_rate, **adam)
        case "sevo-adamw":
            return sevo_adamw(config.learning_rate, adjacency, tables, **adam, **smoothing)
        case "sevo-gradient":
            return optax.chain(
                sevo(adjacency, tables, **smoothing),
                adamw_corrected(config.learning_rate, **adam),
            )
    raise ValueError(f"optimizer must be one of adamw, sevo-adamw, sevo-gradient, got {name!r}")
