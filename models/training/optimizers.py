"""The optimizers that are compared, by name."""

from collections.abc import Callable
from typing import Any, get_args

import optax

from models.config import Optimizer, OptimizerConfig
from models.graphs import Nodes
from sevo_optax import adamw_corrected, scale_by_adam_corrected, sevo

Stages = dict[str, optax.GradientTransformationExtraArgs]


def make_stages(
    name: Optimizer,
    config: OptimizerConfig,
    nodes: Nodes | None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    clip_norm: float | None = None,
    decay_mask: Callable[[Any], Any] | None = None,
) -> Stages:
    """Builds an optimizer as named stages, to be chained in their order.

    Args:
      name: ``adamw``: plain AdamW. ``sevo-adamw``: Algorithm 1, which smooths Adam's direction. ``sevo-gradient``:
        smooths the gradient, in front of AdamW with moments that are corrected for the tables' idle rows;
        ``sevo-gradient-uncorrected``: in front of plain AdamW. ``adam``, ``sgd``: decay in the gradient;
        ``sevo-adam``, ``sevo-sgd``: Algorithms 3 and 2. ``closed-form``: no updates at all.
      config: rates and strengths.
      nodes: the graph, and the tables over its nodes; None: the model has none, and nothing is smoothed.
      learning_rate: a schedule, or None: ``config.learning_rate``.
      clip_norm: gradients with a larger global norm are scaled down to it first; None: never.
      decay_mask: maps the parameters to a tree of where weight decay acts, see :func:`optax.adamw`; None: everywhere.

    Returns:
      Transformations by name. The stages called ``sevo TABLES`` smooth.

    Raises:
      ValueError: if there is no optimizer of that name, or it smooths and there is nothing to smooth.
    """
    if name not in get_args(Optimizer):
        raise ValueError(f"optimizer must be one of {', '.join(get_args(Optimizer))}, got {name!r}")
    smoothing: Stages = {}
    if name.startswith("sevo-"):
        if nodes is None:
            raise ValueError(
                f"optimizer {name} smooths tables over a graph, and this model has none; take adam or adamw"
            )
        options = {"beta": config.beta, "num_layers": config.num_layers, "method": config.smoothing}
        if config.smoothing == "neumann":
            options["rescale"] = config.rescale
        smoothing = {
            f"sevo {'+'.join(group)}": sevo(
                nodes.adjacency,
                group if len(group) > 1 else group[0],
                node_axis=nodes.axes.get(group[0], 0),
                **options,
            )
            for group in nodes.groups
        }
    rate = config.learning_rate if learning_rate is None else learning_rate
    adam, weight_decay = {"b1": config.b1, "b2": config.b2}, config.weight_decay
    clip: Stages = {} if clip_norm is None else {"clip": optax.clip_by_global_norm(clip_norm)}
    decayed = optax.add_decayed_weights(weight_decay, decay_mask) if weight_decay else optax.identity()
    decay: Stages = {"decay": decayed}
    step: Stages = {"rate": optax.scale_by_learning_rate(rate)}
    match name:
        case "adamw":
            return clip | {"moments": optax.scale_by_adam(**adam)} | decay | step
        case "sevo-adamw":
            # sevo_adamw, for any number of tables.
            corrects = config.moment_correction and nodes.rows
            moments = scale_by_adam_corrected(**adam, tables=nodes.rows) if corrects else optax.scale_by_adam(**adam)
            return clip | {"moments": moments} | smoothing | decay | step
        case "sevo-gradient":
            options = {**adam, "weight_decay": weight_decay, "mask": decay_mask}
            corrected = (
                adamw_corrected(rate, **options, tables=nodes.rows) if nodes.rows else optax.adamw(rate, **options)
            )
            return clip | smoothing | {"adamw": corrected}
        case "sevo-gradient-uncorrected":
            return clip | smoothing | {"adamw": optax.adamw(rate, **adam, weight_decay=weight_decay, mask=decay_mask)}
        case "adam" | "sevo-adam":
            return clip | decay | {"moments": optax.scale_by_adam(**adam)} | smoothing | step
        case "sgd" | "sevo-sgd":
            return clip | decay | {"moments": optax.trace(config.b1)} | smoothing | step
    return {"none": optax.set_to_zero()}


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
