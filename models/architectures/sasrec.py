"""SASRec: self-attention over a user's history, left to right."""

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.architectures.base import Encoded, SequenceRecommender, look_up
from models.checks import Heeded
from models.config import NextItemConfig, above
from models.feeds import Batch
from models.layers import Attention, Dropout, LayerNorm, Linear, split_keys, stacked_xavier_uniform, symmetric_uniform

# The published initialisation: embeddings and the attention's output projection are xavier-normal, the feed-forward
# part keeps the default of a PyTorch convolution. JAX leaves a normal's tails out, behind 2.3 standard deviations.
xavier_normal = nnx.initializers.xavier_normal()
fan_in_uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclasses.dataclass(frozen=True)
class SASRecConfig(NextItemConfig):
    """SASRec's options, with the paper's settings for Amazon Beauty."""

    heeded: ClassVar[Heeded] = {
        **NextItemConfig.heeded,
        "attend_padding": (above("num_blocks", 0, "1"),),
    }

    model: str = "sasrec"
    b2: float = 0.98
    """Decay rate of the second moment."""
    attend_padding: bool = True
    """Whether attention also sees the blank places in front of a history, as the published code's does."""


class Block(nnx.Module):
    r"""One SASRec block: attention with a normalised query, then a feed-forward part of the same width.

    .. math::

      h = x + \mathrm{Attention}(\mathrm{LN}(x), x, x), \qquad n = \mathrm{LN}(h), \qquad
      y = n + W_2 \max(0, W_1 n)
    """

    def __init__(self, embedding_dim: int, num_heads: int, dropout_rate: float, *, rngs: nnx.Rngs) -> None:
        feed_forward = partial(
            Linear,
            embedding_dim,
            embedding_dim,
            kernel_init=fan_in_uniform,
            bias_init=symmetric_uniform(embedding_dim**-0.5),
            rngs=rngs,
        )
        self.attention_norm = LayerNorm(embedding_dim, epsilon=1e-8, rngs=rngs)
        self.attention = Attention(
            embedding_dim,
            num_heads,
            dropout_rate,
            in_init=stacked_xavier_uniform,
            out_init=xavier_normal,
            rngs=rngs,
        )
        self.feed_forward_norm = LayerNorm(embedding_dim, epsilon=1e-8, rngs=rngs)
        self.feed_forward_in = feed_forward()
        self.feed_forward_out = feed_forward()
        self.dropout = Dropout(dropout_rate)

    def __call__(
        self, x: jax.Array, segments: jax.Array, padding: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:
        """Maps (rows, row_length, embedding_dim) to the same shape."""
        keys = split_keys(key, 3)
        x = x + self.attention(self.attention_norm(x), x, segments, keys[0], causal=True, padding=padding)
        x = self.feed_forward_norm(x)
        hidden = jax.nn.relu(self.dropout(self.feed_forward_in(x), keys[1]))
        return x + self.dropout(self.feed_forward_out(hidden), keys[2])


class SASRec(SequenceRecommender):
    """Self-attentive sequential recommendation, as trained in the SEvo paper.

    An item's score after a history is the inner product of its embedding and the encoded newest position.

    Args:
      num_items: size of the catalogue. Items are 1 … num_items; row 0 of the table is padding.
      max_length: the longest history the model sees.
      embedding_dim: width of everything.
      num_blocks: number of blocks.
      num_heads: attention heads a block; divides ``embedding_dim``.
      dropout_rate: dropout on embeddings, attention weights and feed-forward parts.
      attend_padding: whether attention also sees the blank places in front of a short history, as the published code's
        does: a place to look when no item matters, and a hint of the history's length.
      dtype: what the blocks compute in; parameters, norms, attention weights and sums of scores are float32 anyway.
      rngs: random state for the initialisation.

    References:
      Kang and McAuley, `Self-Attentive Sequential Recommendation <https://arxiv.org/abs/1808.09781>`_, 2018
    """

    config_class = SASRecConfig

    def __init__(
        self,
        num_items: int,
        *,
        max_length: int = 50,
        embedding_dim: int = 64,
        num_blocks: int = 2,
        num_heads: int = 1,
        dropout_rate: float = 0.3,
        attend_padding: bool = True,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.dtype = jnp.dtype(dtype)
        self.attend_padding = attend_padding
        self.item_embedding = nnx.Embed(num_items + 1, embedding_dim, embedding_init=xavier_normal, rngs=rngs)
        self.position_embedding = nnx.Embed(max_length, embedding_dim, embedding_init=xavier_normal, rngs=rngs)
        self.blocks = nnx.List([Block(embedding_dim, num_heads, dropout_rate, rngs=rngs) for _ in range(num_blocks)])
        self.norm = LayerNorm(embedding_dim, epsilon=1e-8, rngs=rngs)
        self.dropout = Dropout(dropout_rate)

    def encode(
        self, batch: Batch, represented: Any = None, key: jax.Array | None = None, candidates: jax.Array | None = None
    ) -> Encoded:
        """Encodes packed histories: at each token, what predicts the next one."""
        del represented
        embedded, rows = look_up(self.item_embedding.embedding[...], batch.inputs, candidates)
        keys = split_keys(key, len(self.blocks) + 1)
        x = embedded * jnp.sqrt(embedded.shape[-1]).astype(embedded.dtype) + self.position_embedding(batch.positions)
        x = self.dropout(x.astype(self.dtype), keys[0])
        padding = batch.padding if self.attend_padding else None
        for block, block_key in zip(self.blocks, keys[1:], strict=True):
            x = block(x, batch.segments, padding, block_key)
        return Encoded(self.norm(x), rows, None if rows is None else jnp.zeros((), rows.dtype))
