"""Configuration of a training run. The defaults are the paper's settings for SASRec on Beauty."""

import dataclasses
from pathlib import Path
from typing import Literal, get_args

Model = Literal["sasrec"]
Optimizer = Literal["adamw", "sevo-adamw", "sevo-gradient"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    data: Path | None = None
    """Interactions, one line 'user item item …' a user, oldest first; left out: an embedded generator."""
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
    num_heads: int = 1
    """Attention heads a block; divides embedding_dim."""
    dropout_rate: float = 0.3
    """Dropout on embeddings, attention weights and feed-forward parts."""
    attend_padding: bool = True
    """Whether attention also sees the blank places in front of a short history, as the published code's does."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How to update the parameters, whichever optimizer is chosen."""

    learning_rate: float = 1e-3
    """Step size."""
    b1: float = 0.9
    """Decay rate of the first moment."""
    b2: float = 0.98
    """Decay rate of the second moment."""
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

    epochs: int = 200
    """Passes over the training sequences."""
    batch_size: int = 512
    """Users in a batch, on average: sequences are packed, and batches hold equally many rows."""
    eval_every: int = 5
    """Epochs between two evaluations on the validation items."""
    seed: int = 0
    """Seed of initialisation, shuffling, negatives and dropout."""

    def check(self) -> None:
        """Checks the ranges that nothing further down checks.

        Raises:
          ValueError: naming the field, the value seen and the values wanted.
        """
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
