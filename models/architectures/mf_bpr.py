"""MF-BPR: a vector a user and a vector an item, nothing else."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from models.architectures.base import Encoded, Group, NodeSet, Recommender, look_up, options_of
from models.config import ComputeDtype, Loss, TrainConfig
from models.feeds import PairBatch

# The table of users and the table of items that a step or an evaluation works with.
Tables = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class MFBPRConfig(TrainConfig):
    """MF-BPR's options, with the paper's settings for Amazon Beauty and the item-item graph."""

    model: str = "mf-bpr"
    init_std: float = 1e-4
    """Standard deviation of the initial embeddings."""
    compute_dtype: ComputeDtype = "float32"
    """bfloat16: compute in half precision; parameters, moments, propagation and losses stay float32."""
    loss: Loss = "bpr"
    """bpr, bce: against one random unseen item. ce: softmax over the catalogue. sampled-softmax, gbce: against
    num_negatives items."""
    epochs: int = 1000
    """Epochs; each draws as many pairs as there are training interactions."""
    batch_size: int = 2048
    """Pairs of a user and an item in a batch."""
    beta: float = 0.9
    """Strength of the smoothing, in [0, 1)."""

    def _check(self) -> None:
        super()._check()
        if not self.init_std > 0:
            raise ValueError(f"init_std must be larger than 0, got {self.init_std}: equal scores have no gradient")


class MFBPR(Recommender):
    r"""Matrix factorisation, trained to rank a user's items before others.

    .. math::

      s_{ui} = \langle p_u, q_i \rangle

    A query is a user of the training data: for others there is no vector.

    Args:
      num_users: users 0 … num_users - 1.
      num_items: size of the catalogue. Items are 1 … num_items; row 0 of the item table is no item.
      embedding_dim: width of both tables.
      init_std: standard deviation of the normal distribution that both tables start from.
      dtype: what vectors are rounded to before they are multiplied; parameters and sums are float32 anyway.
      rngs: random state for the initialisation.

    Examples:
      >>> model = MFBPR(num_users=2, num_items=3, embedding_dim=4, rngs=nnx.Rngs(0))
      >>> represented = model.represent({})
      >>> query = PairBatch(users=jnp.array([1]), targets=jnp.array([0]))
      >>> model.scores(model.encode(query, represented).vectors, represented).shape
      (1, 4)

    References:
      Rendle et al., `BPR: Bayesian Personalized Ranking from Implicit Feedback <https://arxiv.org/abs/1205.2618>`_,
      2009
    """

    config_class = MFBPRConfig
    feed = "pairs"
    query = "user"

    def __init__(
        self,
        num_users: int,
        num_items: int,
        *,
        embedding_dim: int = 64,
        init_std: float = 1e-4,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.dtype = jnp.dtype(dtype)
        embed = partial(nnx.Embed, features=embedding_dim, embedding_init=nnx.initializers.normal(init_std), rngs=rngs)
        self.user_embedding = embed(num_users)
        self.item_embedding = embed(num_items + 1)

    @classmethod
    def from_config(cls, config: MFBPRConfig, *, num_users: int, num_items: int, rngs: nnx.Rngs) -> Self:
        """A freshly initialised model, see :meth:`Recommender.from_config`."""
        return cls(num_users, num_items, **options_of(cls, config), rngs=rngs)

    @property
    def node_sets(self) -> Mapping[NodeSet, tuple[Group, ...]]:
        """The item table over items; both tables together over users and items."""
        return {"items": (("item_embedding",),), "users+items": (("user_embedding", "item_embedding"),)}

    def represent(self, context: Mapping[str, Any], key: jax.Array | None = None) -> Tables:
        """The two tables, (num_users, embedding_dim) and (num_items + 1, embedding_dim)."""
        del context, key
        return self.user_embedding.embedding[...], self.item_embedding.embedding[...]

    def encode(
        self,
        batch: PairBatch,
        represented: Tables,
        key: jax.Array | None = None,
        candidates: jax.Array | None = None,
    ) -> Encoded:
        """The vectors of the batch's users."""
        del key
        users, items = represented
        (vectors,) = look_up(users, batch.users)
        if candidates is None:
            return Encoded(vectors.astype(self.dtype))
        (rows,) = look_up(items, candidates)
        return Encoded(vectors.astype(self.dtype), rows.astype(self.dtype), jnp.zeros((), self.dtype))

    def items(self, represented: Tables) -> tuple[jax.Array, jax.Array]:
        """The item table and no bias."""
        _, items = represented
        return items, jnp.zeros(len(items), items.dtype)
