"""Configuration of a training run. The defaults are the paper's settings for the model on Beauty."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

if TYPE_CHECKING:
    from models.data import Interactions, Split

Model = Literal["sasrec", "bert4rec"]
Loss = Literal["bce", "ce"]
Optimizer = Literal["adamw", "sevo-adamw", "sevo-gradient"]
DataFormat = Literal["auto", "csv", "tsv", "parquet", "inter", "dat", "json", "s3rec"]
Duplicates = Literal["all", "exact", "first", "last"]
SplitMethod = Literal["leave-one-out", "global-time"]
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
class SourceConfig:
    """Which interactions to read, how to filter and how to split them."""

    data: Path | None = None
    """A file, or ml-100k, ml-1m, amazon-beauty, amazon-toys or amazon-tools; left out: an embedded generator."""
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

        return load(
            self.data,
            data_format=self.data_format,
            user_column=self.user_column,
            item_column=self.item_column,
            time_column=self.time_column,
            header=self.header,
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
    """bce: one random unseen item a target. ce: softmax over the catalogue (left out: bce, ce)."""


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

    def _check(self) -> None:
        positive = ["max_length", "embedding_dim", "num_heads", "graph_max_length", "max_hops", "epochs", "batch_size"]
        for name in [*positive, "eval_every"]:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ["num_blocks", "seed", "weight_decay"]:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ["b1", "b2", "dropout_rate"]:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be larger than 0, got {self.learning_rate}")
