"""BERT4Rec: self-attention over a user's history in both directions, trained to restore masked items."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.architectures.base import Encoded, Group, NodeSet, SequenceRecommender, look_up
from models.checks import Condition, Heeded
from models.config import Loss, TransformerConfig
from models.data import Interactions
from models.feeds import Batch
from models.layers import Attention, Dropout, LayerNorm, Linear, split_keys, stacked_xavier_uniform

_xavier_normal = nnx.initializers.xavier_normal()


def clipped_xavier_normal(
    key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32, **_: object
) -> jax.Array:
    """Xavier-normal, clipped to ±0.02: the published initialisation of everything but query, key and value."""
    return jnp.clip(_xavier_normal(key, shape, dtype), -0.02, 0.02)


@dataclasses.dataclass(frozen=True)
class BERT4RecConfig(TransformerConfig):
    """BERT4Rec's options, with the paper's settings for Amazon Beauty."""

    heeded: ClassVar[Heeded] = {
        **TransformerConfig.heeded,
        "mask_probability": (Condition("mask_last_probability", lambda config: config.mask_last_probability < 1, "0"),),
    }

    model: str = "bert4rec"
    num_heads: int = 4
    """Attention heads a block; divides embedding_dim."""
    dropout_rate: float = 0.2
    """Dropout on embeddings, attention weights and feed-forward parts."""
    mask_probability: float = 0.5
    """Probability that a training token is masked."""
    mask_last_probability: float = 0.0
    """Probability that of a training sequence only the newest item is masked."""
    tie_output: bool = False
    """Whether the output layer shares the item table's weight."""
    loss: Loss = "ce"
    """ce: softmax over the catalogue. bce, bpr: against one random unseen item. sampled-softmax, gbce: against
    num_negatives items."""
    learning_rate: float = 5e-4
    """Step size."""
    b2: float = 0.95
    """Decay rate of the second moment."""
    epochs: int = 500
    """Passes over the training data."""
    batch_size: int = 256
    """Users in a batch, on average: sequences are packed, and batches hold equally many rows."""

    def _check(self) -> None:
        super()._check()
        _check_masking(self.mask_probability, self.mask_last_probability, self.max_length)


def _check_masking(mask_probability: float, mask_last_probability: float, max_length: int) -> None:
    """Refuses settings with which there is nothing to restore, or no room for the mask token."""
    probabilities = {"mask_probability": mask_probability, "mask_last_probability": mask_last_probability}
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {value}")
    if mask_probability == 0 and mask_last_probability < 1:
        raise ValueError("mask_probability must be larger than 0: without masked items there is nothing to learn from")
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, one item and the mask token, got {max_length}")


class EncoderLayer(nnx.Module):
    r"""One layer of the post-norm Transformer encoder, with GELU and a feed-forward part four times as wide.

    .. math::

      h = \mathrm{LN}(x + \mathrm{Attention}(x, x, x)), \qquad y = \mathrm{LN}(h + W_2 \, \mathrm{GELU}(W_1 h))
    """

    def __init__(self, embedding_dim: int, num_heads: int, dropout_rate: float, *, rngs: nnx.Rngs) -> None:
        linear = partial(Linear, kernel_init=clipped_xavier_normal, rngs=rngs)
        self.attention = Attention(
            embedding_dim,
            num_heads,
            dropout_rate,
            in_init=stacked_xavier_uniform,
            out_init=clipped_xavier_normal,
            rngs=rngs,
        )
        self.attention_norm = LayerNorm(embedding_dim, epsilon=1e-5, rngs=rngs)
        self.feed_forward_in = linear(embedding_dim, 4 * embedding_dim)
        self.feed_forward_out = linear(4 * embedding_dim, embedding_dim)
        self.feed_forward_norm = LayerNorm(embedding_dim, epsilon=1e-5, rngs=rngs)
        self.dropout = Dropout(dropout_rate)

    def __call__(self, x: jax.Array, segments: jax.Array, key: jax.Array | None) -> jax.Array:
        """Maps (rows, row_length, embedding_dim) to the same shape."""
        keys = split_keys(key, 4)
        x = self.attention_norm(x + self.dropout(self.attention(x, x, segments, keys[0], causal=False), keys[1]))
        hidden = self.dropout(jax.nn.gelu(self.feed_forward_in(x), approximate=False), keys[2])
        return self.feed_forward_norm(x + self.dropout(self.feed_forward_out(hidden), keys[3]))


class BERT4Rec(SequenceRecommender):
    """Bidirectional sequential recommendation, as trained in the SEvo paper.

    Some items of a history are replaced by a mask token, and the model restores them from both sides. To recommend, a
    mask token is appended to the history. An item's score is a linear function of the encoded mask token: by default of
    a separate output layer, whose weight is smoothed over the same graph as the item table.

    Args:
      num_items: size of the catalogue. Items are 1 … num_items; row 0 of the table is padding, the last row the mask
        token.
      max_length: the longest sequence the model sees, the appended mask token included.
      embedding_dim: width of everything.
      num_blocks: number of encoder layers.
      num_heads: attention heads a layer; divides ``embedding_dim``.
      dropout_rate: dropout on embeddings, attention weights and feed-forward parts.
      mask_probability: probability that a training token is masked.
      mask_last_probability: probability that of a training sequence only the newest item is masked, as in recommending.
      tie_output: whether the output layer shares the item table's weight (it keeps a bias of its own).
      dtype: what the blocks compute in; parameters, norms, attention weights and sums of scores are float32 anyway.
      rngs: random state for the initialisation.

    References:
      Sun et al., `BERT4Rec: Sequential Recommendation with Bidirectional Encoder Representations from Transformer
      <https://arxiv.org/abs/1904.06690>`_, 2019
    """

    config_class = BERT4RecConfig
    predicts_next = False
    num_special = 2
    item_tables = 2

    def __init__(
        self,
        num_items: int,
        *,
        max_length: int = 50,
        embedding_dim: int = 64,
        num_blocks: int = 2,
        num_heads: int = 4,
        dropout_rate: float = 0.2,
        mask_probability: float = 0.5,
        mask_last_probability: float = 0.0,
        tie_output: bool = False,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        _check_masking(mask_probability, mask_last_probability, max_length)
        self.dtype = jnp.dtype(dtype)
        self.mask_token = num_items + 1
        self.mask_probability = mask_probability
        self.mask_last_probability = mask_last_probability
        embed = partial(nnx.Embed, features=embedding_dim, embedding_init=clipped_xavier_normal, rngs=rngs)
        self.item_embedding = embed(num_items + 2)
        self.position_embedding = embed(max_length)
        self.norm = LayerNorm(embedding_dim, epsilon=1e-5, rngs=rngs)
        self.blocks = nnx.List(
            [EncoderLayer(embedding_dim, num_heads, dropout_rate, rngs=rngs) for _ in range(num_blocks)]
        )
        self.output_embedding = None if tie_output else embed(num_items + 2)
        self.output_bias = nnx.Param(jnp.zeros(num_items + 2))
        self.dropout = Dropout(dropout_rate)

    @property
    def node_sets(self) -> Mapping[NodeSet, tuple[Group, ...]]:
        """The item table and, if it has a weight of its own, the output layer: each smoothed by itself."""
        tables = ("item_embedding",) if self.output_embedding is None else ("item_embedding", "output_embedding")
        return {"items": tuple((table,) for table in tables)}

    def max_num_targets(self, num_tokens: int) -> int:
        """How many of ``num_tokens`` training tokens to reserve room for: the mean and six standard deviations."""
        p = self.mask_probability
        likely = num_tokens * p + 6 * np.sqrt(num_tokens * p * (1 - p))
        if self.mask_last_probability > 0:
            return num_tokens  # sequences may be of one item, then all are masked
        return min(num_tokens, int(np.ceil(likely)) + 1)

    @staticmethod
    def history_inputs(history: Interactions) -> Interactions:
        """The histories with the mask token appended, whose encoding scores the next item."""
        ends = history.offsets[1:]
        return Interactions(
            items=np.insert(history.items, ends, history.num_items + 1),
            offsets=history.offsets + np.arange(history.num_users + 1),
            num_items=history.num_items,
        )

    def training_batch(self, batch: Batch, key: jax.Array) -> Batch:
        """Masks items at random; targets are the masked items."""
        token_key, last_key = jax.random.split(key)
        filled = batch.segments > 0
        masked = jax.random.uniform(token_key, batch.inputs.shape) < self.mask_probability
        if self.mask_last_probability > 0:
            max_length = self.position_embedding.num_embeddings
            # One draw a user: the tokens of a segment share a number, and no two segments of a batch do.
            draws = jax.random.uniform(last_key, batch.inputs.shape)
            row = jnp.arange(batch.inputs.shape[0])[:, None]
            first = jnp.argmax(batch.segments[:, :, None] == batch.segments[:, None, :], axis=1)
            only_last = draws[row, first] < self.mask_last_probability
            masked = jnp.where(only_last, batch.positions == max_length - 1, masked)
        masked &= filled
        return batch._replace(
            inputs=jnp.where(masked, self.mask_token, batch.inputs), targets=jnp.where(masked, batch.inputs, 0)
        )

    def encode(
        self, batch: Batch, represented: Any = None, key: jax.Array | None = None, candidates: jax.Array | None = None
    ) -> Encoded:
        """Encodes packed sequences: at each mask token, what restores the item behind it."""
        del represented
        table = self.item_embedding.embedding[...]
        if self.output_embedding is None:
            embedded, rows = look_up(table, batch.inputs, candidates)
        else:
            embedded, _ = look_up(table, batch.inputs, None)
            rows = None if candidates is None else self.output_embedding(candidates)
        keys = split_keys(key, len(self.blocks) + 1)
        x = self.norm((embedded + self.position_embedding(batch.positions)).astype(self.dtype))
        x = self.dropout(x, keys[0])
        for block, block_key in zip(self.blocks, keys[1:], strict=True):
            x = block(x, batch.segments, block_key)
        return Encoded(x, rows, None if candidates is None else self.output_bias[...][candidates])

    def items(self, represented: Any = None) -> tuple[jax.Array, jax.Array]:
        """Weight (rows, embedding_dim) and bias (rows,) of the output layer."""
        del represented
        table = self.item_embedding if self.output_embedding is None else self.output_embedding
        return table.embedding[...], self.output_bias[...]
