"""LightGCN: MF-BPR on tables that are averaged over the neighbours in the graph of users and items."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.architectures.base import Queries, look_up
from models.architectures.mf_bpr import MFBPR, MFBPRConfig, Tables
from models.config import Optimizer
from models.data import Interactions
from models.feeds import PairBatch
from sevo_optax import graph, propagate


@dataclasses.dataclass(frozen=True)
class LightGCNConfig(MFBPRConfig):
    """LightGCN's options, with the settings for Amazon Beauty of the SEvo paper's comparison."""

    model: str = "lightgcn"
    propagation_layers: int = 3
    """Products with the graph of users and items; 0: plain matrix factorisation."""
    l2_weight: float = 5e-4
    """Weight of the halved squares of the embeddings, before propagation, of each pair's user and items."""
    init_std: float = 1e-4
    """Standard deviation of the initial embeddings; the original code takes 0.1."""
    optimizer: Optimizer = "adam"
    """adam, sgd: weight decay in the gradient; sevo-: Algorithms 3 and 2. adamw: plain. sevo-adamw: smooths Adam's
    direction (Algorithm 1). sevo-gradient: smooths the gradient instead; -uncorrected: in front of plain AdamW."""
    weight_decay: float = 0.0
    """The optimizer's own weight decay, besides l2_weight; adam, sgd: added to the gradient times the parameter."""

    def _at_least_zero(self) -> tuple[str, ...]:
        return ("propagation_layers", "l2_weight", *super()._at_least_zero())


class LightGCN(MFBPR):
    r"""Graph convolution without weights and nonlinearities.

    .. math::

      E^{(l+1)} = \tilde{A} E^{(l)}, \qquad \bar{E} = \frac{1}{L + 1} \sum_{l=0}^{L} E^{(l)}, \qquad
      s_{ui} = \langle \bar{e}_u, \bar{e}_i \rangle

    with the users' and the items' embeddings stacked in :math:`E^{(0)}`, and
    :math:`\tilde{A} = D^{-1/2} A D^{-1/2}` of the binary graph of users and their training items. The loss gets

    .. math::

      \frac{\lambda}{2 |B|} \sum_{(u, i, j) \in B} \| e^{(0)}_u \|^2 + \| e^{(0)}_i \|^2 + \| e^{(0)}_j \|^2

    over the batch's pairs and their negatives (where a loss has none of its own for each pair: over the pairs).

    Args:
      num_users: users 0 … num_users - 1.
      num_items: size of the catalogue. Items are 1 … num_items; row 0 of the item table is no item.
      embedding_dim: width of both tables.
      propagation_layers: L, the number of products with the graph.
      l2_weight: :math:`\lambda`.
      init_std: standard deviation of the normal distribution that both tables start from: 1e-4 as in the SEvo paper's
        comparison, 0.1 in the original code.
      dtype: what propagated vectors are rounded to before they are multiplied; propagation and sums are float32 anyway.
      rngs: random state for the initialisation.

    References:
      He et al., `LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation
      <https://arxiv.org/abs/2002.02126>`_, 2020
    """

    config_class = LightGCNConfig

    def __init__(
        self,
        num_users: int,
        num_items: int,
        *,
        embedding_dim: int = 64,
        propagation_layers: int = 3,
        l2_weight: float = 5e-4,
        init_std: float = 1e-4,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(num_users, num_items, embedding_dim=embedding_dim, init_std=init_std, dtype=dtype, rngs=rngs)
        self.propagation_layers = propagation_layers
        self.l2_weight = l2_weight

    @classmethod
    def make_context(cls, train: Interactions, config: Any) -> dict[str, Any]:
        """The normalised ``adjacency`` over users and rows of the item table, (num_users + num_items + 1) squared."""
        del config
        weights = graph.user_item(train.users, train.items, train.num_users, train.num_items + 1)
        return {"adjacency": graph.normalize(weights)}

    def represent(self, context: Mapping[str, Any], key: jax.Array | None = None) -> Tables:
        """The two tables after propagation: once a step, and once an evaluation."""
        users, items = super().represent(context, key)
        if not self.propagation_layers:
            return users, items
        layer = jnp.concatenate([users, items])
        total = layer
        for _ in range(self.propagation_layers):
            layer = propagate(context["adjacency"], layer)
            total += layer
        mean = total / (self.propagation_layers + 1)
        return mean[: len(users)], mean[len(users) :]

    def penalty(
        self, batch: PairBatch, queries: Queries, represented: Any, loss: jax.Array, key: jax.Array | None = None
    ) -> jax.Array | float:
        """The squares of the embeddings, before propagation, of the batch's users and items."""
        del batch, represented, loss, key
        if not self.l2_weight:
            return 0.0
        items = queries.targets[None] if queries.candidates is None else queries.candidates
        (user_rows,) = look_up(self.user_embedding.embedding[...], queries.users)
        (item_rows,) = look_up(self.item_embedding.embedding[...], items)
        squares = jnp.sum(user_rows**2, axis=-1) + jnp.sum(item_rows**2, axis=(0, -1))
        return self.l2_weight / 2 * (queries.weights @ squares)
