"""What training, evaluation and the losses ask of a model."""

from typing import Protocol

import jax

from models.data.interactions import Interactions
from models.data.packing import Batch


class SequenceModel(Protocol):
    """A sequential recommender over packed batches. Items are 1 … num_items in every model."""

    predicts_next: bool
    """Whether every training token predicts the item behind it; otherwise :meth:`corrupt` makes the targets."""

    num_special: int
    """Rows of the item table that are no items: row 0, and any behind the last item."""

    @property
    def item_tables(self) -> tuple[str, ...]:
        """Paths of the tables over items, each to be smoothed on its own."""

    @staticmethod
    def queries(history: Interactions) -> Interactions:
        """The sequences whose newest token's encoding scores the item that follows ``history``."""

    def targets_at_most(self, num_tokens: int) -> int:
        """How many of ``num_tokens`` training tokens can be targets at once."""

    def corrupt(self, batch: Batch, key: jax.Array) -> Batch:
        """What the model is trained on: inputs as it shall see them, and targets."""

    def embed(self, inputs: jax.Array, candidates: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Looks up inputs (rows, row_length), and the output layer for candidates (count, rows, row_length).

        Returns:
          Embedded inputs (rows, row_length, dim), weights (count, rows, row_length, dim), and biases, ``count`` of
          them, each of which broadcasts to (rows, row_length).
        """

    def encode(self, embedded: jax.Array, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """Encodes sequences whose items are embedded already, to (rows, row_length, dim); ``key`` None: evaluation."""

    def __call__(self, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """Embeds and encodes."""

    def output_layer(self) -> tuple[jax.Array, jax.Array]:
        """Weight (rows, dim) and bias (rows,) of the scores, row ``i`` for item ``i``."""
