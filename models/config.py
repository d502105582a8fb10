"""Choices and configuration: the layer below everything else, so that every part may use the same names.

The options of a model, and its published defaults, live with the model: see :mod:`models.architectures`. What they all
share is here.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

from models.checks import (
    LOSS_OPTIONS,
    OF_GRAPH,
    QUANTILES,
    Condition,
    Heeded,
    check_graph,
    check_loss,
    check_numbers,
    check_split,
    check_types,
)

Loss = Literal["bce", "ce", "sampled-softmax", "gbce", "bpr"]
Negatives = Literal["shared", "per-position"]
Schedule = Literal["constant", "linear", "cosine"]
Logger = Literal["tensorboard", "wandb", "mlflow"]
ComputeDtype = Literal["float32", "bfloat16"]
Optimizer = Literal[
    "adamw",
    "sevo-adamw",
    "sevo-gradient",
    "sevo-gradient-uncorrected",
    "adam",
    "sevo-adam",
    "sgd",
    "sevo-sgd",
    "closed-form",
]
Smoothing = Literal["neumann", "iterative", "exact"]
DataFormat = Literal["auto", "csv", "tsv", "parquet", "inter", "dat", "json", "s3rec"]
Duplicates = Literal["all", "exact", "first", "last"]
SplitMethod = Literal["leave-one-out", "global-time"]
Keep = Literal["last", "first"]
Weighting = Literal["distance", "frequency"]
TableSharding = Literal["columns", "rows"]
# What test users are grouped by, to see who gains.
Grouping = Literal["popularity", "length"]
Metric = Literal["cosine", "dot", "euclidean"]
Search = Literal["exact", "approximate"]
# The metric of the validation items by which the best epoch is chosen.
SELECTION_K = 10
SELECTION = f"NDCG@{SELECTION_K}"
# The arms of a comparison.
OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "sevo-adamw", "sevo-gradient")


@dataclasses.dataclass(frozen=True)
class ReadingConfig:
    """How a file of interactions is read."""

    data_format: DataFormat = "auto"
    """inter: RecBole. dat: MovieLens. json: an object a line. s3rec: 'user item item …' a line. auto: by the suffix."""
    user_column: str | None = None
    """Column of the users' ids (left out: one with a usual name; without a header 1)."""
    item_column: str | None = None
    """Column of the items' ids (left out: one with a usual name; without a header 2)."""
    time_column: str | None = None
    """Column of the times; none: order of the file (left out: a usual name, if there is one; without a header 4)."""
    header: bool = True
    """Whether the first line of a csv or tsv names the columns; if not, they are called 1, 2, 3 …."""
    min_rating: float | None = None
    """Rows with a smaller rating are left out."""
    rating_column: str | None = None
    """Column of the ratings that min_rating looks at (left out: one with a usual name; without a header 3)."""
    where: tuple[str, ...] = ()
    """column=value: rows with another value are left out; several values of one column are alternatives."""


@dataclasses.dataclass(frozen=True)
class SourceConfig(ReadingConfig):
    """Which interactions to read, how to filter and how to split them."""

    data: Path | None = None
    """A file, or ml-100k, ml-1m, amazon-beauty, amazon-toys or amazon-tools; left out: an embedded generator."""
    duplicates: Duplicates = "all"
    """Which interactions of the same user and item stay; exact: one of those at the very same time."""
    min_user_interactions: int = 0
    """Users with fewer interactions are left out; both limits are applied until all that remain have enough."""
    min_item_interactions: int = 0
    """Items with fewer interactions are left out, likewise."""
    split: SplitMethod = "leave-one-out"
    """leave-one-out: test on each user's last item. global-time: on each user's first item behind a moment."""
    split_quantiles: tuple[float, float] = QUANTILES
    """global-time: shares of all interactions before the moments of validation and test; training is before both."""
    split_times: tuple[str, str] | None = None
    """global-time: the two moments themselves; dates too, if the data's times are seconds since 1970."""
    cold_items: float = 0.0
    """Share of the items, the same in every run, without interactions in training and alone predicted; 0: none."""
    cache_dir: Path | None = None
    """Where public data sets are kept (left out: what SEVO_OPTAX_CACHE says, or the user's cache folder)."""


@dataclasses.dataclass(frozen=True)
class GraphConfig:
    """What the updates are smoothed over: graphs of the training part, by name or from a file."""

    graph: tuple[str, ...] = ("item-item",)
    """item-item: items that follow each other. shared-users: items of the same users. user-item: users and their items.
    attributes: items that share one. knn: items with similar vectors. Or a file that graph.save wrote. Several are
    combined."""
    graph_weights: tuple[float, ...] = ()
    """How much each graph counts (left out: all alike); each is normalised first."""
    graph_max_length: int = 50
    """item-item: how many of a user's training items the graph is built from."""
    graph_keep: Keep = "last"
    """item-item: which of them, if there are more."""
    max_hops: int = 1
    """item-item: how far apart in a history two items may be to be related."""
    graph_weighting: Weighting = "distance"
    """item-item: distance: a pair counts 1 / hops. frequency: every pair counts 1."""
    max_neighbors: int = 50
    """shared-users: edges an item keeps, those to the items with the most similar sets of users."""
    vectors: Path | None = None
    """knn: an .npz with the arrays item_ids and vectors, a row an item, such as export --embeddings writes."""
    knn_neighbors: int = 20
    """knn: nearest items that each item counts."""
    knn_metric: Metric = "cosine"
    """knn: what is near."""
    knn_method: Search = "exact"
    """knn: exact: all pairs are compared. approximate: an index of faiss, for catalogues beyond some 100,000 items."""
    attributes: Path | None = None
    """attributes: a .tsv or .csv with one line an item."""
    attribute_item_column: str = "item_id"
    """Its column of item ids, as they are in the data."""
    attribute_column: str = "genres"
    """Its column of attributes, several separated by '|'."""


# The options of graphs that name a file: what is in it counts, not where it lies.
GRAPH_FILES = ("attributes", "vectors")
# Options of smoothing, which plain optimizers do not heed.
SMOOTHING = (
    "beta",
    "num_layers",
    "smoothing",
    "rescale",
    "moment_correction",
    *(field.name for field in dataclasses.fields(GraphConfig)),
)


def among(option: str, *values: str) -> Condition:
    """What an option needs that only some values of another one heed; the first of them is proposed."""
    return Condition(option, lambda config: getattr(config, option) in values, values[0])


def above(option: str, least: float, instead: str) -> Condition:
    """What an option needs that makes a difference where a number is larger than ``least``."""
    return Condition(option, lambda config: getattr(config, option) > least, instead)


def _smooths(config: Any) -> bool:
    return config.optimizer.startswith("sevo-")


def needs_graph(config: Any) -> bool:
    """Whether the optimizer smooths over the graph, or diagnostics measure over it, whatever the optimizer."""
    return _smooths(config) or config.diagnostics


_SMOOTHED = Condition("optimizer", _smooths, "sevo-adamw")
_OVER_GRAPH = Condition("optimizer", needs_graph, "sevo-adamw")
# What an option of training needs in order to make a difference, all of it; others always do. A model adds its own.
HEEDED: dict[str, tuple[Condition, ...]] = {
    "graph": (_OVER_GRAPH,),
    "graph_weights": (_OVER_GRAPH, Condition("graph", lambda config: len(config.graph) > 1, "item-item attributes")),
    **{
        name: (_OVER_GRAPH, Condition("graph", lambda config, graph=graph: graph in config.graph, graph))
        for graph, names in OF_GRAPH.items()
        for name in names
    },
    "beta": (_SMOOTHED,),
    "smoothing": (_SMOOTHED,),
    "num_layers": (_SMOOTHED, among("smoothing", "neumann", "iterative")),
    "rescale": (_SMOOTHED, among("smoothing", "neumann")),
    "moment_correction": (among("optimizer", "sevo-adamw"),),
    "b2": (Condition("optimizer", lambda config: config.optimizer not in ("sgd", "sevo-sgd"), "adamw"),),
    **{name: (among("loss", *losses),) for name, losses in LOSS_OPTIONS.items()},
    "split_quantiles": (among("split", "global-time"),),
    "split_times": (among("split", "global-time"),),
    **dict.fromkeys(
        ("data_format", "header", "cache_dir"), (Condition("data", lambda config: config.data is not None, "FILE"),)
    ),
}
HEEDED["graph_weighting"] += (above("max_hops", 1, "2"),)  # there are no distances but 1


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """Which devices a run is on. They change what it costs, and its numbers by no more than rounding."""

    mesh: str | None = None
    """Devices, such as data=4,model=2: batches are split over data, tables and their moments over model (left out: one
    device)."""
    table_sharding: TableSharding = "columns"
    """mesh: columns: tables are split along their width, and smoothing needs no exchange. rows: along their rows."""
    coordinator: str | None = None
    """Several processes train together: host and port of the first, such as 10.0.0.1:1234 (left out: what
    JAX_COORDINATOR_ADDRESS says, or one process)."""
    num_processes: int | None = None
    """coordinator: how many processes there are (left out: what JAX_NUM_PROCESSES says)."""
    process_id: int | None = None
    """coordinator: which of them this is, from 0; the first writes the results (left out: JAX_PROCESS_ID)."""
    join_timeout: int = 300
    """coordinator: seconds that the processes wait for each other at the start."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is minimised, for whichever model."""

    loss: Loss = "bce"
    """bce, bpr: against one random unseen item. ce: softmax over the catalogue. sampled-softmax, gbce: against
    num_negatives items."""
    num_negatives: int = 256
    """sampled-softmax, gbce: random items each target competes with."""
    negatives: Negatives = "shared"
    """sampled-softmax, gbce: shared: one draw serves a whole batch. per-position: each target has its own."""
    negative_power: float = 0.0
    """sampled-softmax, gbce: items are drawn with probability ∝ count ** negative_power; 0: uniformly."""
    logq_correction: bool = True
    """sampled-softmax: whether scores are corrected for the probability of being drawn."""
    gbce_t: float = 0.75
    """gbce: calibration, in [0, 1]; 0: plain binary cross-entropy, 1: as if all items were negatives."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How to update the parameters."""

    optimizer: Optimizer = "sevo-adamw"
    """adamw: plain. sevo-adamw: smooths Adam's direction (Algorithm 1). sevo-gradient: smooths the gradient instead;
    -uncorrected: in front of plain AdamW. adam, sgd: weight decay in the gradient; sevo-: Algorithms 3 and 2."""
    learning_rate: float = 1e-3
    """Step size."""
    b1: float = 0.9
    """Decay rate of the first moment; sgd: the momentum."""
    b2: float = 0.999
    """Decay rate of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate; adam, sgd: added to the gradient times the parameter."""
    beta: float = 0.99
    """Strength of the smoothing, in [0, 1)."""
    num_layers: int = 3
    """Terms of the smoothing series behind the first."""
    smoothing: Smoothing = "neumann"
    """How the smoothing is computed: the paper's series, its iterative form, or the exact solution."""
    rescale: bool = True
    """neumann: whether the series is rescaled, so that its weights sum to one."""
    moment_correction: bool = True
    """sevo-adamw: whether the moments of rows without a gradient are corrected."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(OptimizerConfig, GraphConfig, LossConfig, SourceConfig):
    """A training run: what all models share. A model's own class adds its options and published settings."""

    losses: ClassVar[tuple[Loss, ...]] = get_args(Loss)
    """The losses that make sense for the model."""
    optimizers: ClassVar[tuple[Optimizer, ...]] = tuple(name for name in get_args(Optimizer) if name != "closed-form")
    """The optimizers that make sense for the model."""
    heeded: ClassVar[Heeded] = HEEDED
    """What options need in order to make a difference."""

    model: str = ""
    """Architecture: sasrec, bert4rec, gru4rec, stosa, mf-bpr, lightgcn, sr-gnn, lessr, maerec, item-knn or popularity.
    Each has options of its own, see --model NAME --help."""
    embedding_dim: int = 64
    """Width of the embeddings."""
    epochs: int = 200
    """Passes over the training data."""
    batch_size: int = 512
    """Users in a batch, on average: sequences are packed, and batches hold equally many rows."""
    eval_every: int = 5
    """Epochs between two evaluations on the validation items."""
    ks: tuple[int, ...] = (1, 5, 10)
    """Lengths of the lists that HR@k, NDCG@k, MRR@k and coverage@k are given for. As there is one item to find, HR@k
    is recall@k, and MRR@k is MAP@k."""
    exclude_seen: bool = True
    """Whether items in a user's history are left out of the ranking."""
    per_user: bool = False
    """Whether to save the rank of every test user's item, in per_user.csv."""
    patience: int | None = None
    """Stop after so many evaluations in a row without a better validation NDCG@10 (left out: never)."""
    schedule: Schedule = "constant"
    """How the learning rate falls to zero over the epochs; constant: not at all."""
    warmup_epochs: int = 0
    """Epochs in which the learning rate rises from zero, before the schedule."""
    clip_norm: float | None = None
    """Gradients with a larger global norm are scaled down to it, before everything else (left out: never)."""
    diagnostics: bool = False
    """Whether each epoch records the smoothness of updates and tables, and the alignment of the two updates."""
    keep_epochs: tuple[int, ...] = ()
    """Epochs after which the table that items are scored by is kept, in embeddings/EPOCH.npz; 0: before the first."""
    logger: tuple[Logger, ...] = ()
    """Where else scalars go, one or several: to TensorBoard, Weights & Biases or MLflow (left out: nowhere)."""
    seed: int = 0
    """Seed of initialisation, shuffling, negatives and dropout."""

    def checked(self) -> Self:
        """The configuration itself.

        Raises:
          ValueError: if a number is out of range; it names the field, the value seen and the values wanted.
        """
        self._check()
        return self

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON, for :meth:`from_dict`."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration with the given fields, as read from JSON or YAML; others keep their defaults.

        Raises:
          ValueError: if a field is unknown.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown option {unknown[0]}; {cls().model} has {', '.join(sorted(known))}")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        for name, value in values.items():
            if value is not None and Path in (known[name].type, *get_args(known[name].type)):
                values[name] = Path(value)
        return cls(**values)

    def differing(self) -> dict[str, Any]:
        """The fields that differ from the model's defaults, as plain JSON, and the model."""
        values, usual = self.to_dict(), type(self)().to_dict()
        return {name: value for name, value in values.items() if name == "model" or value != usual[name]}

    def _check(self) -> None:
        if self.loss not in self.losses:
            raise ValueError(f"loss must be one of {', '.join(self.losses)} with {self.model}, got {self.loss!r}")
        if self.optimizer not in self.optimizers:
            raise ValueError(
                f"optimizer must be one of {', '.join(self.optimizers)} with {self.model}, got {self.optimizer!r}"
            )
        check_types(self)
        check_numbers(self)
        check_split(self)
        for name in self._at_least_one():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in self._at_least_zero():
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in self._below_one():
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.gbce_t <= 1:
            raise ValueError(f"gbce_t must lie in [0, 1], got {self.gbce_t}")
        for name in ["learning_rate", "clip_norm"]:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be larger than 0, got {value}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")
        if min(self.keep_epochs, default=0) < 0:
            raise ValueError(f"keep_epochs must be numbers of at least 0, got {self.keep_epochs}")
        if len(set(self.logger)) < len(self.logger):
            raise ValueError(f"logger must name each once, got {' '.join(self.logger)}")
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks must be one or more numbers of at least 1, got {self.ks}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs must be smaller than epochs, {self.epochs}, got {self.warmup_epochs}")
        check_loss(self)
        check_graph(self)

    def _at_least_one(self) -> tuple[str, ...]:
        """Names of the numbers that start at 1; a model's class adds its own."""
        return (
            "embedding_dim",
            "graph_max_length",
            "max_hops",
            "max_neighbors",
            "knn_neighbors",
            "epochs",
            "batch_size",
            "eval_every",
            "num_negatives",
        )

    def _at_least_zero(self) -> tuple[str, ...]:
        """Names of the numbers that start at 0."""
        return (
            "seed",
            "weight_decay",
            "negative_power",
            "warmup_epochs",
            "num_layers",
            "min_user_interactions",
            "min_item_interactions",
        )

    def _below_one(self) -> tuple[str, ...]:
        """Names of the numbers in [0, 1)."""
        return ("b1", "b2", "beta")


@dataclasses.dataclass(frozen=True)
class SequenceConfig(TrainConfig):
    """A model of histories."""

    max_length: int = 50
    """Longest history the model sees."""
    dropout_rate: float = 0.3
    """Dropout on embeddings and inside the layers."""
    compute_dtype: ComputeDtype = "float32"
    """bfloat16: compute in half precision; parameters, moments and losses stay float32."""

    def _at_least_one(self) -> tuple[str, ...]:
        return ("max_length", *super()._at_least_one())

    def _below_one(self) -> tuple[str, ...]:
        return ("dropout_rate", *super()._below_one())


@dataclasses.dataclass(frozen=True)
class TransformerConfig(SequenceConfig):
    """A model of histories with attention blocks."""

    heeded: ClassVar[Heeded] = {**HEEDED, "num_heads": (above("num_blocks", 0, "1"),)}

    num_blocks: int = 2
    """Number of attention blocks."""
    num_heads: int = 1
    """Attention heads a block; divides embedding_dim."""

    def _at_least_one(self) -> tuple[str, ...]:
        return ("num_heads", *super()._at_least_one())

    def _at_least_zero(self) -> tuple[str, ...]:
        return ("num_blocks", *super()._at_least_zero())

    def _check(self) -> None:
        super()._check()
        if self.embedding_dim % self.num_heads:
            raise ValueError(f"num_heads must divide embedding_dim, got {self.num_heads} and {self.embedding_dim}")


@dataclasses.dataclass(frozen=True)
class NextItemConfig(TransformerConfig):
    """A model with attention blocks that predicts the next item at every place of a history."""

    windows: bool = False
    """Whether a longer history is cut into overlapping windows of max_length items, so that all of it is trained on;
    batch_size counts windows then. Otherwise its newest max_length items are."""


@dataclasses.dataclass(frozen=True)
class PrefixConfig(SequenceConfig):
    """A model of histories that is trained on every prefix of a training sequence."""

    batch_size: int = 512
    """Prefixes in a batch, on average."""
    separate_prefixes: bool = False
    """Whether each prefix is a row of its own, as published; otherwise all prefixes of a user take one pass."""


def _without_training(cls: type) -> type:
    """Turns the options of a training run that a closed form has no use for into constants of the class.

    A dataclass takes a ``ClassVar`` for what it says: it is no option and no argument, and nothing is saved of it. What
    the class itself declares stays.
    """
    unused = [field for base in (OptimizerConfig, GraphConfig, LossConfig) for field in dataclasses.fields(base)]
    ours = {field.name: field for field in dataclasses.fields(TrainConfig)}
    names = ("embedding_dim", "batch_size", "eval_every", "patience", "schedule", "warmup_epochs", "clip_norm")
    unused += [ours[name] for name in (*names, "diagnostics", "keep_epochs")]
    annotations = dict(cls.__annotations__)
    for field in unused:
        if field.name not in annotations:
            annotations[field.name] = ClassVar[field.type]
            setattr(cls, field.name, field.default)
    cls.__annotations__ = annotations
    return cls


@dataclasses.dataclass(frozen=True)
@_without_training
class ClosedFormConfig(TrainConfig):
    """A model that is computed at once from the training data, without gradients."""

    optimizers: ClassVar[tuple[Optimizer, ...]] = ("closed-form",)

    optimizer: Literal["closed-form"] = "closed-form"
    """closed-form: there is nothing to optimize."""
    epochs: int = 1
    """Passes over the training data: one is enough."""
    seed: int = 0
    """Names the run; the model is the same for every seed."""

    def _check(self) -> None:
        super()._check()
        if self.epochs != 1:
            raise ValueError(f"epochs must be 1 with {self.model}, which is computed in one pass, got {self.epochs}")
