"""Popularity: the same list for everybody."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.architectures.base import Encoded, Group, NodeSet, Recommender
from models.config import ClosedFormConfig
from models.data import Interactions
from models.feeds import Batch


@dataclasses.dataclass(frozen=True)
class PopularityConfig(ClosedFormConfig):
    """There is nothing to choose."""

    model: str = "popularity"
    max_length: ClassVar[int] = 1
    """Histories do not matter: the shortest are the cheapest."""


class Popularity(Recommender):
    """Scores an item by how often it occurs in the training data: what every other model should beat.

    Args:
      num_items: size of the catalogue.

    Examples:
      >>> model = Popularity(num_items=3)
      >>> model.fit(Interactions.from_sequences([[1, 3], [3]]), PopularityConfig())
      >>> model.scores(jnp.ones((1, 1)), None).tolist()
      [[0.0, 1.0, 0.0, 2.0]]
    """

    config_class = PopularityConfig
    item_tables = 0
    feed = "none"

    def __init__(self, num_items: int) -> None:
        self.counts = nnx.Variable(jnp.zeros(num_items + 1))

    @classmethod
    def from_config(cls, config: Any, *, num_users: int, num_items: int, rngs: nnx.Rngs) -> Self:
        """A model that knows nothing yet, see :meth:`fit`."""
        del config, num_users, rngs
        return cls(num_items)

    @property
    def node_sets(self) -> Mapping[NodeSet, tuple[Group, ...]]:
        """Nothing is smoothed."""
        return {}

    def fit(self, train: Interactions, config: Any) -> None:
        """Counts the interactions of every item, repeated ones too."""
        del config
        counts = np.bincount(train.items, minlength=train.num_items + 1)
        self.counts[...] = jnp.asarray(counts, self.counts.dtype)

    def encode(
        self, batch: Batch, represented: Any = None, key: jax.Array | None = None, candidates: jax.Array | None = None
    ) -> Encoded:
        """A one for every token, whatever the history."""
        del represented, key
        counts = self.counts[...]
        vectors = jnp.ones((*batch.inputs.shape, 1), counts.dtype)
        if candidates is None:
            return Encoded(vectors)
        return Encoded(vectors, counts[candidates][..., None], jnp.zeros((), counts.dtype))

    def items(self, represented: Any = None) -> tuple[jax.Array, jax.Array]:
        """The counts, as a table of width 1, and no bias."""
        del represented
        counts = self.counts[...]
        return counts[:, None], jnp.zeros_like(counts)
