"""Trials under cross-entropy that are no options of the product: what might gain more than SEvo as it is.

    python -m benchmarks.trials soft-labels-0.1 smooth-output --data beauty.txt --seed 0
    python -m benchmarks.trials --table

The first line trains SASRec with each trial and leaves one JSON a trial and seed in results/trials/DATA; the second
writes the table of all that are there, with the differences to the plain arm of the same seeds, into
results/trials/README.md. Each trial is a small function on top of the public pieces: what it returns is trained.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental.sparse import BCOO

from models.architectures.base import options_of
from models.architectures.registry import config_from_dict, make_model
from models.architectures.sasrec import SASRec
from models.compilation import jit
from models.config import SELECTION, SMOOTHING, GraphConfig, Optimizer, TrainConfig
from models.data import load_interactions
from models.evaluation import metrics
from models.evaluation.ranking import make_test
from models.files import read_json, write_json, write_text
from models.objectives.losses import Loss, cross_entropy, make_loss
from models.presets import load_preset
from models.training.optimizers import Stages, make_schedule, make_stages
from models.training.program import make_epoch
from models.training.progress import Progress
from models.training.training_data import Feed, TrainingData, make_feed, make_training_data
from sevo_optax import adamw_corrected, graph, sevo, smooth

NEIGHBOURS = 20
WEIGHTS = (0.05, 0.1, 0.2)
EMA_DECAY = 0.999
FOLDER = Path("results/trials")
# What trials do not heed that have a graph and smooth nothing.
UNSMOOTHED = tuple(name for name in SMOOTHING if not hasattr(GraphConfig, name))
# What not all trials heed, so that arms would differ in more than the trial.
FIXED = ("clip_norm", "patience", *(name for name in UNSMOOTHED if name not in ("beta", "num_layers")))
TABLE, OUTPUT = "item_embedding", "output_embedding"


@dataclasses.dataclass(frozen=True)
class Parts:
    """What is trained, and how.

    Attributes:
      config: the run.
      model: freshly initialised.
      loss: what is minimised.
      stages: the optimizer, to be chained.
      feed: what a step is fed.
      evaluated: ``evaluated(state, opt_state)``: the state that is ranked with.
    """

    config: TrainConfig
    model: nnx.Module
    loss: Loss
    stages: Stages
    feed: Feed
    evaluated: Callable[[Any, Any], Any] = lambda state, opt_state: state

    @property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer."""
        return optax.named_chain(*self.stages.items())


def parts(prepared: TrainingData, config: TrainConfig, seed: int, *, optimizer: Optimizer) -> Parts:
    """A run of the product, as ``python -m models train`` would make it."""
    train = prepared.split.train
    model = make_model(config, num_users=train.num_users, num_items=train.num_items, seed=seed)
    schedule = make_schedule(config, prepared.feed.num_batches)
    stages = make_stages(optimizer, config, prepared.nodes, schedule, config.clip_norm)
    return Parts(config, model, make_loss(config), stages, prepared.feed)


def soft_labels(prepared: TrainingData, config: TrainConfig, seed: int, *, weight: float) -> Parts:
    """AdamW on labels of which a part lies on the item's nearest items in the graph: another optimum, no other way."""
    found = parts(prepared, config, seed, optimizer="adamw")
    neighbours = neighbour_shares(prepared.nodes.adjacency, NEIGHBOURS)
    return dataclasses.replace(found, loss=Loss(partial(soft_cross_entropy, neighbours=neighbours, weight=weight)))


def neighbour_shares(adjacency: BCOO, k: int) -> tuple[jax.Array, jax.Array]:
    """Each item's at most ``k`` heaviest neighbours, and their shares, which sum to one; its own where it has none.

    Both have shape (nodes, k); places that are not filled hold the item itself, with a share of 0.
    """
    matrix = graph.to_scipy(graph.normalize(adjacency))
    items = np.repeat(np.arange(matrix.shape[0])[:, None], k, axis=1)
    shares = np.zeros(items.shape, np.float32)
    for row, (start, end) in enumerate(zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True)):
        others = start + np.flatnonzero(matrix.indices[start:end] != row)
        best = others[np.argsort(-matrix.data[others], kind="stable")[:k]]
        if best.size:
            items[row, : best.size] = matrix.indices[best]
            shares[row, : best.size] = matrix.data[best] / matrix.data[best].sum()
        else:
            shares[row, 0] = 1
    return jnp.asarray(items, jnp.int32), jnp.asarray(shares)


def soft_cross_entropy(
    queries: Any,
    items: Any,
    sampler: Any,
    key: jax.Array | None = None,
    *,
    neighbours: tuple[jax.Array, jax.Array],
    weight: float,
) -> jax.Array:
    r"""Cross-entropy against :math:`(1 - w) e_t + w \sum_j P_{tj} e_j` instead of :math:`e_t`.

    The softmax's normaliser is the same, so that only the target's score changes: it is mixed with its neighbours'.
    """
    table, bias = items
    near, shares = (values[queries.targets] for values in neighbours)
    rows = table[queries.targets] - jnp.einsum("qk,qkd->qd", shares, table[near])
    biases = bias[queries.targets] - jnp.sum(shares * bias[near], axis=1)
    margin = jnp.sum(queries.vectors.astype(jnp.float32) * rows.astype(jnp.float32), axis=-1) + biases
    return cross_entropy(queries, items, sampler, key) + weight * queries.weights @ margin


class TwoTables(SASRec):
    """SASRec that reads one copy of its table and scores with another, so that each has a gradient of its own."""

    @classmethod
    def from_config(cls, config: Any, *, num_users: int, num_items: int, rngs: nnx.Rngs) -> "TwoTables":
        """Two equal copies of the table that SASRec starts with."""
        del num_users
        model = cls(num_items, **options_of(SASRec, config), rngs=rngs)
        model.output_embedding = nnx.Embed(num_items + 1, config.embedding_dim, rngs=rngs)
        # A copy: an epoch is given both to write over.
        model.output_embedding.embedding[...] = jnp.copy(model.item_embedding.embedding[...])
        return model

    def items(self, represented: Any = None) -> tuple[jax.Array, jax.Array]:
        """The other copy, and no bias."""
        table = self.output_embedding.embedding[...]
        return table, jnp.zeros(len(table), table.dtype)


def one_side(
    prepared: TrainingData, config: TrainConfig, seed: int, *, lookup: bool = True, output: bool = True
) -> Parts:
    """The gradient side for the lookup's part of a tied table's gradient alone, or for the output's alone."""
    found = parts(prepared, config, seed, optimizer="sevo-gradient")
    train = prepared.split.train
    model = TwoTables.from_config(config, num_users=0, num_items=train.num_items, rngs=nnx.Rngs(seed))
    ours, theirs = (nnx.state(x, nnx.Param)[TABLE]["embedding"][...] for x in (model, found.model))
    assert (ours == theirs).all(), "both start from the same table"
    joined = tied(prepared.nodes.adjacency, config, lookup=lookup, output=output)
    adamw = adamw_corrected(
        make_schedule(config, prepared.feed.num_batches),
        config.b1,
        config.b2,
        weight_decay=config.weight_decay,
        tables=(TABLE, OUTPUT),
    )
    return dataclasses.replace(found, model=model, stages={"tied": joined, "adamw": adamw})


def tied(adjacency: BCOO, config: TrainConfig, *, lookup: bool, output: bool) -> optax.GradientTransformation:
    """Gives both copies of a table the sum of their gradients, each smoothed or as it is, so that they stay equal."""
    own = partial(smooth, adjacency=adjacency, beta=config.beta, num_layers=config.num_layers)

    def join(updates: Any, params: Any = None) -> Any:
        del params
        leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
        names = [jax.tree_util.keystr(path, simple=True, separator="/").partition("/")[0] for path, _ in leaves]
        found = dict(zip(names, (leaf for _, leaf in leaves), strict=False))
        found = {name: leaf for name, leaf in found.items() if name in (TABLE, OUTPUT)}
        total = (own(found[TABLE]) if lookup else found[TABLE]) + (own(found[OUTPUT]) if output else found[OUTPUT])
        return jax.tree.unflatten(
            treedef, [total if name in found else leaf for name, (_, leaf) in zip(names, leaves, strict=True)]
        )

    return optax.stateless(join)


def falling_beta(prepared: TrainingData, config: TrainConfig, seed: int) -> Parts:
    """The gradient side, with a beta that falls to 0 over the epochs: first fast, then as AdamW."""
    found = parts(prepared, config, seed, optimizer="sevo-gradient")
    beta = optax.linear_schedule(config.beta, 0.0, config.epochs * prepared.feed.num_batches)
    name = f"sevo {TABLE}"
    falling = sevo(prepared.nodes.adjacency, TABLE, beta=beta, num_layers=config.num_layers)
    return dataclasses.replace(found, stages=found.stages | {name: falling})


def restored_step(prepared: TrainingData, config: TrainConfig, seed: int) -> Parts:
    """Algorithm 1, with the table's update divided by the weight that the smoothing leaves it: AdamW's step again."""
    found = parts(prepared, config, seed, optimizer="sevo-adamw")
    factor = 1 / self_weight(prepared.nodes.adjacency, config)

    def restore(updates: Any, params: Any = None) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x * factor if TABLE in jax.tree_util.keystr(path) else x, updates
        )

    stages: Stages = {}
    for name, stage in found.stages.items():
        stages[name] = stage
        if name.startswith("sevo "):
            stages["restore"] = optax.stateless(restore)
    return dataclasses.replace(found, stages=stages)


def self_weight(adjacency: BCOO, config: TrainConfig, probes: int = 64) -> float:
    """The mean of the smoothing's diagonal over items with neighbours, estimated with random signs."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (adjacency.shape[0], probes)).astype(np.float32)
    smoothed = np.asarray(smooth(signs, adjacency, beta=config.beta, num_layers=config.num_layers))
    linked = np.unique(np.asarray(adjacency.indices)[:, 0])
    return float((signs * smoothed)[linked].mean())


class EmaState(NamedTuple):
    """Averaged parameters, and how many steps they are of."""

    count: jax.Array
    params: Any


def averaged(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the parameters behind the step; a shorter one over the first steps."""

    def init(params: Any) -> EmaState:
        return EmaState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: EmaState, params: Any = None) -> tuple[Any, EmaState]:
        kept = jnp.minimum(decay, (1 + state.count) / (10 + state.count))
        new = optax.apply_updates(params, updates)
        ema = jax.tree.map(
            lambda old, x: kept.astype(x.dtype) * old + (1 - kept).astype(x.dtype) * x, state.params, new
        )
        return updates, EmaState(state.count + 1, ema)

    return optax.GradientTransformation(init, update)


def ema(prepared: TrainingData, config: TrainConfig, seed: int, *, optimizer: Optimizer) -> Parts:
    """An arm that is tested with the moving average of its weights."""
    found = parts(prepared, config, seed, optimizer=optimizer)

    def evaluated(state: Any, opt_state: Any) -> Any:
        _, rest = nnx.split_state(state, nnx.Param, ...)
        return nnx.merge_state(opt_state["ema"].params, rest)

    return dataclasses.replace(found, stages=found.stages | {"ema": averaged(EMA_DECAY)}, evaluated=evaluated)


def cosine(prepared: TrainingData, config: TrainConfig, seed: int, *, optimizer: Optimizer) -> Parts:
    """An arm whose learning rate falls to 0 along a cosine."""
    return parts(prepared, dataclasses.replace(config, schedule="cosine"), seed, optimizer=optimizer)


def windows(prepared: TrainingData, config: TrainConfig, seed: int, *, optimizer: Optimizer) -> Parts:
    """An arm that is trained on windows over the whole history, where it sees the newest ``max_length`` otherwise."""
    config = dataclasses.replace(config, windows=True)
    feed = make_feed(prepared.split.train, config)
    return parts(dataclasses.replace(prepared, feed=feed), config, seed, optimizer=optimizer)


Trial = Callable[[TrainingData, TrainConfig, int], Parts]
TRIALS: dict[str, Trial] = {
    "adamw": partial(parts, optimizer="adamw"),
    "sevo-gradient": partial(parts, optimizer="sevo-gradient"),
    **{f"soft-labels-{weight:g}": partial(soft_labels, weight=weight) for weight in WEIGHTS},
    "smooth-lookup": partial(one_side, output=False),
    "smooth-output": partial(one_side, lookup=False),
    "falling-beta": falling_beta,
    "restored-step": restored_step,
    "adamw-ema": partial(ema, optimizer="adamw"),
    "sevo-gradient-ema": partial(ema, optimizer="sevo-gradient"),
    "adamw-cosine": partial(cosine, optimizer="adamw"),
    "sevo-gradient-cosine": partial(cosine, optimizer="sevo-gradient"),
    "adamw-windows": partial(windows, optimizer="adamw"),
    "sevo-gradient-windows": partial(windows, optimizer="sevo-gradient"),
}


def compiled_epoch(found: Parts) -> tuple[nnx.GraphDef, Any, Any, Callable[..., Any]]:
    """The model's definition and state, the optimizer's state, and an epoch, not compiled yet."""
    graphdef, state = nnx.split(found.model)
    # A constant that a model starts with is weakly typed, what an epoch returns is not: it would compile twice.
    state = jax.tree.map(lambda x: x.astype(x.dtype), state)
    tx = found.tx
    return graphdef, state, tx.init(nnx.filter_state(state, nnx.Param)), make_epoch(graphdef, tx, found.loss)


def train(name: str, found: Parts, prepared: TrainingData, seed: int) -> dict[str, Any]:
    """Trains a trial and tests it at its best epoch, as the product does; returns what its JSON holds.

    Raises:
      ValueError: if a loss is not finite.
    """
    config = found.config
    graphdef, state, opt_state, epoch = compiled_epoch(found)
    epoch = jit(epoch, donate_argnums=(0, 1))
    ranks = jit(lambda state, ranking, context: ranking.ranks(nnx.merge(graphdef, state), context))
    test = make_test(graphdef, config.ks)
    best, curve, seconds, key = (-1.0, 0, state, {}), [], [], jax.random.key(seed)
    with Progress(f"{name}, seed {seed}", epochs=config.epochs) as progress:
        for number in range(1, config.epochs + 1):
            start = time.perf_counter()
            state, opt_state, losses = epoch(
                state, opt_state, found.feed, prepared.sampler, prepared.context, jax.random.fold_in(key, number)
            )
            loss = float(np.asarray(losses).mean())
            seconds.append(time.perf_counter() - start)
            if not math.isfinite(loss):
                raise ValueError(f"{name}: the loss of epoch {number} is {loss}; lower --set learning_rate=…")
            shown: dict[str, Any] = {"loss": loss, "seconds": seconds[-1]}
            if number % config.eval_every == 0 or number == config.epochs:
                kept = jax.tree.map(jnp.copy, found.evaluated(state, opt_state))
                validation = metrics.summarize(np.asarray(ranks(kept, prepared.validation, prepared.context)), (10,))
                curve.append([number, round(validation[SELECTION], 6)])
                shown["validation"] = validation[SELECTION]
                if validation[SELECTION] > best[0]:
                    best = (validation[SELECTION], number, kept, validation)
            progress.epoch(number, **shown, tokens=found.feed.num_tokens, best=best[0] if curve else None)
    _, found_test = test(best[2], prepared.test, prepared.context)
    return {
        "trial": name,
        "data": data_name(config),
        "seed": seed,
        "epochs": config.epochs,
        "best_epoch": best[1],
        "validation": {metric: round(value, 6) for metric, value in best[3].items()},
        "test": {metric: round(value, 6) for metric, value in found_test.items()},
        "curve": curve,
        "epoch_seconds": round(statistics.median(seconds[1:] or seconds), 3),
        "device": str(jax.devices()[0].device_kind),
        "config": {x: y for x, y in config.differing().items() if x not in ("data", "cache_dir", "optimizer", "seed")},
    }


def settings_of(name: str, config: TrainConfig) -> dict[str, Any]:
    """Names for the settings that a trial is given, data and seed aside: what may be averaged and compared.

    Args:
      name: the trial; those of plain AdamW heed no setting of the smoothing.
      config: the settings, before the trial changes any.

    Returns:
      ``all``: the same where seeds are averaged. ``unsmoothed``: the ``all`` of the AdamW that it is compared with.
      ``beta``: the strength of the smoothing; None: there is none.
    """
    given = {x: y for x, y in config.to_dict().items() if x not in ("data", "cache_dir", "optimizer", "seed")}
    unheeded = SMOOTHING if name.startswith("adamw") else UNSMOOTHED if name.startswith("soft-labels") else ()

    def without(names: Sequence[str]) -> str:
        values = {x: y for x, y in given.items() if x not in names}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]

    return {
        "all": without(unheeded),
        "unsmoothed": without(SMOOTHING),
        "beta": None if unheeded else config.beta,
    }


def data_name(config: TrainConfig) -> str:
    """What the data are called in paths and tables."""
    return "embedded" if config.data is None else config.data.stem


def table(folder: Path) -> str:
    """The table of all trials in a folder, in Markdown: differences to AdamW are of the same seeds and settings."""
    found: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/*.json")):
        values = read_json(path)
        found.setdefault((values["data"], values["trial"], values["settings"]["all"]), {})[values["seed"]] = values
    order = list(TRIALS)
    lines = [
        "# Trials under cross-entropy",
        "",
        f"Test {SELECTION} at the epoch with the best validation {SELECTION}. Differences are to AdamW of the same "
        "seeds and settings, with their standard error; what wins by more than two of them, over three seeds or more, "
        "is **bold**. A trial's partner is AdamW with the same average, rate or windows. "
        "`python -m benchmarks.trials` makes them; what each of them is: [benchmarks](../../benchmarks/README.md).",
        "",
        "| data | trial | β | seeds | epochs | best epoch | validation | test | test − AdamW | test − its partner |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = []
    for (data, trial, digest), runs in found.items():
        some = next(iter(runs.values()))  # its settings are those of all
        rows.append(((data, some["epochs"], order.index(trial), digest), runs, some["settings"]))
    for (data, epochs, number, _), runs, settings in sorted(rows, key=lambda row: row[0]):
        trial, beta = order[number], settings["beta"]
        partner = trial.replace("sevo-gradient", "adamw") if trial.startswith("sevo-gradient-") else trial
        differences = [
            "–" if trial == other else difference(runs, found.get((data, other, settings["unsmoothed"]), {}))
            for other in ("adamw", partner)
        ]
        means = [statistics.mean(run[part][SELECTION] for run in runs.values()) for part in ("validation", "test")]
        best = ", ".join(str(runs[seed]["best_epoch"]) for seed in sorted(runs))
        numbers = " | ".join(f"{mean:.4f}" for mean in means)
        first = f"{data} | {trial} | {'–' if beta is None else beta} | {len(runs)} | {epochs} | {best}"
        lines.append(f"| {first} | {numbers} | {' | '.join(differences)} |")
    return "\n".join(lines) + "\n"


def difference(runs: dict[int, dict[str, Any]], plain: dict[int, dict[str, Any]]) -> str:
    """How much better runs are than plain ones of the same seeds, in Markdown; a dash: they have none in common."""
    pairs = [runs[seed]["test"][SELECTION] - plain[seed]["test"][SELECTION] for seed in runs if seed in plain]
    if not pairs:
        return "–"
    text = f"{statistics.mean(pairs):+.4f}"
    if len(pairs) == 1:
        return text
    error = statistics.stdev(pairs) / len(pairs) ** 0.5
    text += f" ± {error:.4f}"
    return f"**{text}**" if len(pairs) > 2 and statistics.mean(pairs) > 2 * error else text


def main(arguments: list[str] | None = None) -> int:
    """Trains the trials that are asked for, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="*", metavar="TRIAL", help=f"of {', '.join(TRIALS)}, or all")
    parser.add_argument("--preset", default="sasrec-ce-beauty", help="a preset of SASRec with cross-entropy")
    parser.add_argument("--data", type=Path, help="a file 'user item item …', or a named set (none: embedded data)")
    parser.add_argument("--epochs", type=int, help="how many (left out: the preset's)")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one seed or several")
    parser.add_argument("--beta", type=float, default=0.9, help="strength of the smoothing")
    parser.add_argument("--results-dir", type=Path, default=FOLDER, help="folder of the JSON files and the table")
    parser.add_argument("--overwrite", action="store_true", help="train again what is there")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="other options of the model")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    names = list(TRIALS) if options.trials == ["all"] else options.trials
    for name in names:
        if name not in TRIALS:
            raise ValueError(f"trials must be among {', '.join(TRIALS)}, or all, got {name}")
    if not names and not options.table:
        raise ValueError(f"name one or more trials, or --table; there are {', '.join(TRIALS)}, and all")
    if not options.table:
        others = {name: json.loads(value) for name, _, value in (text.partition("=") for text in options.set)}
        for name in FIXED:
            if name in others:
                raise ValueError(f"--set {name} is not heeded by every trial, got {others[name]}; leave it out")
        given = {"data": options.data, "epochs": options.epochs, "beta": options.beta} | others
        config = config_from_dict(
            load_preset(options.preset) | {name: value for name, value in given.items() if value is not None}
        )
        if (config.model, config.loss) != ("sasrec", "ce"):
            raise ValueError(f"preset must be one of sasrec with loss ce, got {config.model} with {config.loss}")
        todo = []
        settings = {name: settings_of(name, config) for name in names}
        for seed in options.seed:
            for name in names:
                file = f"{name}-epochs{config.epochs}-{settings[name]['all']}-seed{seed}.json"
                path = options.results_dir / data_name(config) / file
                if path.exists() and not options.overwrite:
                    print(f"{path} is there; --overwrite trains it again", flush=True)
                else:
                    todo.append((name, seed, path))
        prepared = make_training_data(load_interactions(config), config) if todo else None
        for name, seed, path in todo:
            result = train(name, TRIALS[name](prepared, config, seed), prepared, seed) | {"settings": settings[name]}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, result)
            print(f"{path}: {SELECTION} {result['test'][SELECTION]:.4f} at epoch {result['best_epoch']}", flush=True)
    options.results_dir.mkdir(parents=True, exist_ok=True)
    page = options.results_dir / "README.md"
    write_text(page, table(options.results_dir))
    print(page)


if __name__ == "__main__":
    sys.exit(main())
