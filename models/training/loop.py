"""One training run: an epoch is one compiled program, and everything it reads stays on the device."""

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from models import metrics
from models.compilation import jit
from models.data import Interactions, Split, UnseenItems, pack
from models.graphs import item_cooccurrence
from models.losses import LOSSES, LossFn
from models.registry import MODELS, make_model
from models.training.config import Optimizer, TrainConfig
from models.training.evaluation import PROTOCOL, FullRanking
from models.training.files import write_json, write_text
from models.training.optimizers import make_optimizer

SELECTION = "NDCG@10"
DESCRIPTION = f"{PROTOCOL}; tested at the epoch with the best validation {SELECTION}"


class DivergedError(ValueError):
    """The loss is no longer a finite number."""


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


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of one run.

    Attributes:
      optimizer: the optimizer's name.
      config: the whole configuration.
      protocol: how the metrics came about.
      best_epoch: the epoch with the best validation NDCG@10.
      validation: metrics of the validation items at that epoch.
      test: metrics of the test items at that epoch.
      losses: mean training loss of each epoch.
      epoch_seconds: median seconds of an epoch, compilation and evaluation not counted.
      total_seconds: seconds of the whole run.
      device: what it ran on.
    """

    optimizer: str
    config: dict[str, Any]
    protocol: str
    best_epoch: int
    validation: dict[str, float]
    test: dict[str, float]
    losses: list[float]
    epoch_seconds: float
    total_seconds: float
    device: str


def prepare(interactions: Interactions, config: TrainConfig) -> Prepared:
    """Splits, packs and copies to the device; builds the graph from the training part alone."""
    kind = MODELS[config.model]
    split = config.split_interactions(interactions)
    ranking = partial(FullRanking.prepare, model=kind, max_length=config.max_length)
    return Prepared(
        interactions=interactions,
        split=split,
        packed=pack(
            split.train,
            max_length=config.max_length,
            batch_size=config.batch_size,
            with_targets=kind.predicts_next,
        ),
        unseen=UnseenItems.from_interactions(split.train),
        validation=ranking(split.validation_history, split.validation),
        test=ranking(split.test_history, split.test),
        adjacency=item_cooccurrence(
            split.train,
            num_nodes=interactions.num_items + kind.num_special,
            graph_max_length=config.graph_max_length,
            max_hops=config.max_hops,
        ),
    )


def make_epoch(graphdef: nnx.GraphDef, tx: optax.GradientTransformation, loss: LossFn) -> Callable[..., Any]:
    """Builds one epoch: ``epoch(params, opt_state, packed, unseen, key) -> params, opt_state, losses``.

    The losses have shape (batches,). It is a pure function, to be jitted, or vmapped over seeds and then jitted.
    """

    def epoch(params: Any, opt_state: Any, packed: Any, unseen: UnseenItems, key: jax.Array) -> Any:
        shuffle_key, step_key = jax.random.split(key)
        packed = packed.shuffle(shuffle_key)

        def step(carry: tuple[Any, Any], index: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
            params, opt_state = carry

            def loss_fn(params: Any) -> jax.Array:
                key = jax.random.fold_in(step_key, index)
                return loss(nnx.merge(graphdef, params), packed.batch(index), unseen, key)

            value, grads = jax.value_and_grad(loss_fn)(params)
            with jax.named_scope("optimizer"):
                updates, opt_state = tx.update(grads, opt_state, params)
                params = optax.apply_updates(params, updates)
            return (params, opt_state), value

        (params, opt_state), losses = jax.lax.scan(step, (params, opt_state), jnp.arange(packed.num_batches))
        return params, opt_state, losses

    return epoch


def train(prepared: Prepared, config: TrainConfig, optimizer: Optimizer, output_dir: Path | None = None) -> Result:
    """Trains one model and tests it at its best epoch.

    Args:
      prepared: the data.
      config: the run, resolved.
      optimizer: which optimizer.
      output_dir: where ``history.jsonl`` grows during the run and ``result.json`` and ``curve.png`` appear at its end;
        None: nothing is written.

    Returns:
      The result.

    Raises:
      DivergedError: if the loss of a step is not finite. What was written stays.
    """
    begin = time.perf_counter()
    model = make_model(
        config, num_items=prepared.interactions.num_items, max_length=config.max_length, seed=config.seed
    )
    graphdef, params = nnx.split(model, nnx.Param)
    tx = make_optimizer(optimizer, config, prepared.adjacency, model.item_tables)
    opt_state = tx.init(params)
    epoch_fn = jit(make_epoch(graphdef, tx, LOSSES[config.loss]), donate_argnums=(0, 1))
    rank_fn = jit(lambda params, ranking: ranking.ranks(nnx.merge(graphdef, params)))

    if output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_text(output_dir / "history.jsonl", "")
    key = jax.random.key(config.seed)
    best: tuple[float, int, Any, dict[str, float]] | None = None
    losses: list[float] = []
    seconds: list[float] = []
    curve: list[tuple[int, float]] = []
    with tqdm(total=config.epochs, desc=optimizer, unit="epoch", dynamic_ncols=True) as bar:
        bar.set_postfix_str("compiling")
        for epoch in range(1, config.epochs + 1):
            start = time.perf_counter()
            params, opt_state, step_losses = epoch_fn(
                params, opt_state, prepared.packed, prepared.unseen, jax.random.fold_in(key, epoch)
            )
            step_losses = np.asarray(step_losses)
            seconds.append(time.perf_counter() - start)
            if not np.isfinite(step_losses).all():
                step = int(np.flatnonzero(~np.isfinite(step_losses))[0]) + 1
                raise DivergedError(
                    f"the loss of epoch {epoch}, step {step}, is {step_losses[step - 1]}; "
                    f"lower learning_rate={config.learning_rate:g}"
                )
            losses.append(float(step_losses.mean()))
            record: dict[str, Any] = {"epoch": epoch, "loss": losses[-1], "seconds": round(seconds[-1], 4)}
            if epoch % config.eval_every == 0 or epoch == config.epochs:
                validation = metrics.summarize(rank_fn(params, prepared.validation))
                record["validation"] = validation
                curve.append((epoch, validation[SELECTION]))
                if best is None or validation[SELECTION] > best[0]:
                    # The next epoch donates these buffers, so the best ones are copied.
                    best = (validation[SELECTION], epoch, jax.tree.map(jnp.copy, params), validation)
            if output_dir is not None:
                with (output_dir / "history.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            speed = prepared.packed.num_tokens / seconds[-1]
            shown = f"loss {losses[-1]:.4f}, {speed:,.0f} tokens/s"
            bar.set_postfix_str(shown + (f", best {SELECTION} {best[0]:.4f}" if best else ""))
            bar.update()
    assert best is not None  # the last epoch is always evaluated
    result = Result(
        optimizer=optimizer,
        config=json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        protocol=f"{prepared.split.protocol}, {DESCRIPTION}",
        best_epoch=best[1],
        validation=best[3],
        test=metrics.summarize(rank_fn(best[2], prepared.test)),
        losses=losses,
        epoch_seconds=float(np.median(seconds[1:] or seconds)),
        total_seconds=time.perf_counter() - begin,
        device=str(jax.devices()[0].device_kind),
    )
    if output_dir is not None:
        from models import plots  # matplotlib is slow to import and not needed to train

        plots.validation_curves({optimizer: curve}, output_dir / "curve.png")
        write_json(output_dir / "result.json", dataclasses.asdict(result))
    return result
