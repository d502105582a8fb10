"""Configuration of a training run. The defaults are the paper's settings for the model on Beauty."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from models.checks import check_loss, check_numbers, check_split

if TYPE_CHECKING:
    from models.data import Interactions, Split

Model = Literal["sasrec", "bert4rec"]
Loss = Literal["bce", "ce", "sampled-softmax", "gbce", "bpr"]
Negatives = Literal["shared", "per-position"]
Schedule = Literal["constant", "linear", "cosine"]
ComputeDtype = Literal["float32", "bfloat16"]
Optimizer = Literal["adamw", "sevo-adamw", "sevo-gradient"]
DataFormat = Literal["auto", "csv", "tsv", "parquet", "inter", "dat", "json", "s3rec"]
Duplicates = Literal["all", "exact", "first", "last"]
SplitMethod = Literal["leave-one-out", "global-time"]
# The metric of the validation items by which the best epoch is chosen.
SELECTION_K = 10
SELECTION = f"NDCG@{SELECTION_K}"
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)

# What differs between the models in the paper's settings for Beauty; a field that is None takes its value from here.
PUBLISHED: dict[Model, dict[str, Any]] = {
    "sasrec": {
        "num_heads": 1,
        "dropout_rate": 0.3,
        "loss": "bce",
        "learning_rate": 1e-3,
        "b2": 0.98,
        "epochs": 200,
        "batch_size": 512,
    },
    "bert4rec": {
        "num_heads": 4,
        "dropout_rate": 0.2,
        "loss": "ce",
        "learning_rate": 5e-4,
        "b2": 0.95,
        "epochs": 500,
        "batch_size": 256,
    },
}


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
    split_quantiles: tuple[float, float] = (0.8, 0.9)
    """global-time: shares of all interactions before the moments of validation and test; training is before both."""
    split_times: tuple[str, str] | None = None
    """global-time: the two moments themselves; dates too, if the data's times are seconds since 1970."""
    cache_dir: Path | None = None
    """Where public data sets are kept (left out: what SEVO_OPTAX_CACHE says, or the user's cache folder)."""

    def load_interactions(self) -> "Interactions":
        """Reads and filters the interactions, see :func:`models.data.load`."""
        from models.data import load

        reading = {field.name: getattr(self, field.name) for field in dataclasses.fields(ReadingConfig)}
        return load(
            self.data,
            **reading,
            duplicates=self.duplicates,
            min_user_interactions=self.min_user_interactions,
            min_item_interactions=self.min_item_interactions,
            cache_dir=self.cache_dir,
        )

    def split_interactions(self, interactions: "Interactions") -> "Split":
        """Splits the interactions, see :func:`models.data.make_split`."""
        from models.data import make_split

        return make_split(interactions, self.split, quantiles=self.split_quantiles, times=self.split_times)


@dataclasses.dataclass(frozen=True)
class DataConfig(SourceConfig):
    """What to train on."""

    max_length: int = 50
    """Longest history a model sees."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What to train."""

    model: Model = "sasrec"
    """Architecture."""
    embedding_dim: int = 64
    """Width of embeddings and layers."""
    num_blocks: int = 2
    """Number of attention blocks."""
    num_heads: int | None = None
    """Attention heads a block; divides embedding_dim (left out: 1 for sasrec, 4 for bert4rec)."""
    dropout_rate: float | None = None
    """Dropout on embeddings, attention weights and feed-forward parts (left out: 0.3, 0.2)."""
    attend_padding: bool = True
    """sasrec: whether attention also sees the blank places in front of a history, as the published code's does."""
    mask_probability: float = 0.5
    """bert4rec: probability that a training token is masked."""
    mask_last_probability: float = 0.0
    """bert4rec: probability that of a training sequence only the newest item is masked."""
    tie_output: bool = False
    """bert4rec: whether the output layer shares the item table's weight."""
    loss: Loss | None = None
    """bce, bpr: against one random unseen item. ce: softmax over the catalogue. sampled-softmax, gbce: against
    num_negatives items (left out: bce, ce)."""
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
    compute_dtype: ComputeDtype = "float32"
    """bfloat16: compute in half precision; parameters, moments and losses stay float32."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How to update the parameters, whichever optimizer is chosen."""

    learning_rate: float | None = None
    """Step size (left out: 0.001 for sasrec, 0.0005 for bert4rec)."""
    b1: float = 0.9
    """Decay rate of the first moment."""
    b2: float | None = None
    """Decay rate of the second moment (left out: 0.98, 0.95)."""
    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""
    beta: float = 0.99
    """Strength of the smoothing, in [0, 1)."""
    num_layers: int = 3
    """Terms of the smoothing series behind the first."""
    graph_max_length: int = 50
    """How many of a user's newest training items the graph is built from."""
    max_hops: int = 1
    """How far apart in a history two items may be to be related."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(OptimizerConfig, ModelConfig, DataConfig):
    """A training run."""

    epochs: int | None = None
    """Passes over the training sequences (left out: 200, 500)."""
    batch_size: int | None = None
    """Users in a batch, on average: sequences are packed, and batches hold equally many rows (left out: 512, 256)."""
    eval_every: int = 5
    """Epochs between two evaluations on the validation items."""
    ks: tuple[int, ...] = (1, 5, 10)
    """Lengths of the lists that HR@k, NDCG@k, MRR@k and coverage@k are given for."""
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
    tensorboard: bool = False
    """Whether to write scalars for TensorBoard."""
    seed: int = 0
    """Seed of initialisation, shuffling, negatives and dropout."""

    def resolved(self) -> Self:
        """The configuration with the model's published settings where nothing was given.

        Raises:
          ValueError: if a number is out of range; it names the field, the value seen and the values wanted.
        """
        published = {name: value for name, value in PUBLISHED[self.model].items() if getattr(self, name) is None}
        config = dataclasses.replace(self, **published)
        config._check()
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON, for :meth:`from_dict`."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration with the given fields, as read from JSON or YAML; others keep their defaults.

        Raises:
          ValueError: if a field is unknown.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown option {unknown[0]}; known are {', '.join(sorted(known))}")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        for name in ("data", "cache_dir"):
            if values.get(name) is not None:
                values[name] = Path(values[name])
        return cls(**values)

    def _check(self) -> None:
        check_numbers(self)
        check_split(self)
        positive = ["max_length", "embedding_dim", "num_heads", "graph_max_length", "max_hops", "epochs", "batch_size"]
        for name in [*positive, "eval_every", "num_negatives"]:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ["min_user_interactions", "min_item_interactions", "num_layers"]:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ["num_blocks", "seed", "weight_decay", "negative_power", "warmup_epochs"]:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ["b1", "b2", "beta", "dropout_rate"]:
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
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks must be one or more numbers of at least 1, got {self.ks}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs must be smaller than epochs, {self.epochs}, got {self.warmup_epochs}")
        check_loss(self)
