"""STOSA: items and histories are Gaussians, and self-attention compares them by their Wasserstein distance."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from models.architectures.base import Encoded, Group, NodeSet, Queries, Recommender, look_up, options_of
from models.checks import Heeded
from models.config import Loss, NextItemConfig, above, among
from models.feeds import Batch
from models.layers import BLOCKED, Dropout, LayerNorm, Linear, split_keys
from models.layers.attention import QUERIES_AT_ONCE


def published_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, **_: object) -> jax.Array:
    """Draws from N(0.01, 0.02²): the published initialisation of every table and kernel; its mean is not zero."""
    return 0.01 + 0.02 * jax.random.normal(key, shape, dtype)


def deviation(x: jax.Array) -> jax.Array:
    r"""The standard deviation :math:`\sqrt{\mathrm{ELU}(x) + 1}` that an unconstrained number stands for.

    Its variance is :math:`x + 1` for positive numbers and :math:`e^x` for others; both root and derivative exist even
    where the variance would round to zero.

    Examples:
      >>> deviation(jnp.array([3.0, 0.0, -40.0])).tolist()
      [2.0, 1.0, 2.06...e-09]
    """
    # Each branch is fed what it can take, so that neither's gradient is infinite.
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 0) + 1), jnp.exp(jnp.where(positive, 0, x) / 2))


@dataclasses.dataclass(frozen=True)
class STOSAConfig(NextItemConfig):
    """STOSA's options, with the paper's settings for Amazon Beauty."""

    losses: ClassVar[tuple[Loss, ...]] = ("bpr", "ce", "sampled-softmax")
    """Those that compare scores with each other: a score is a distance, which no sigmoid takes alone."""
    heeded: ClassVar[Heeded] = {
        **NextItemConfig.heeded,
        "attention_dropout_rate": (above("num_blocks", 0, "1"),),
        "encode_mean": (above("num_blocks", 0, "1"),),
        "pvn_weight": (among("loss", "bpr"),),  # the others have no single negative
    }

    model: str = "stosa"
    max_length: int = 100
    """Longest history the model sees."""
    num_blocks: int = 1
    """Number of attention blocks."""
    num_heads: int = 4
    """Attention heads a block; divides embedding_dim."""
    dropout_rate: float = 0.2
    """Dropout on embeddings and on what the attention and feed-forward parts add."""
    attention_dropout_rate: float = 0.5
    """Dropout on the attention weights."""
    pvn_weight: float = 0.005
    """bpr: weight of the penalty where the target is closer to the negative than to the history."""
    encode_mean: bool = False
    """Whether the blocks change the mean too, as STOSA's paper describes it; its published code, by an error, hands on
    the embedded item's mean."""
    loss: Loss = "bpr"
    """bpr: against one random unseen item. ce: softmax over the catalogue. sampled-softmax: against num_negatives
    items."""
    epochs: int = 500
    """Passes over the training data."""
    batch_size: int = 256
    """Users in a batch, on average: sequences are packed, and batches hold equally many rows."""
    graph_max_length: int = 100
    """item-item: how many of a user's training items the graph is built from."""

    def _at_least_zero(self) -> tuple[str, ...]:
        return ("pvn_weight", *super()._at_least_zero())

    def _below_one(self) -> tuple[str, ...]:
        return ("attention_dropout_rate", *super()._below_one())


class WassersteinAttention(nnx.Module):
    r"""Multi-head attention between Gaussians, causal and inside the segments of packed rows.

    .. math::

      A_{ts} = \underset{s \le t}{\mathrm{softmax}} \; \frac{-1}{\sqrt{d}} \Big[
        \lVert q^m_t - k^m_s \rVert^2 + \big\lVert \sqrt{q^c_t} - \sqrt{k^c_s} \big\rVert^2 \Big], \qquad
      m_t = W^m \sum_s A_{ts} v^m_s, \qquad c_t = W^c \sum_s A_{ts}^2 v^c_s

    for each head, of width :math:`d`. Queries, keys and values of the covariance are ELU(·) + 1 of a linear map. What
    the mean sums up to is computed if ``encode_mean``.
    """

    def __init__(
        self, embedding_dim: int, num_heads: int, dropout_rate: float, encode_mean: bool, *, rngs: nnx.Rngs
    ) -> None:
        if embedding_dim % num_heads:
            raise ValueError(f"num_heads must divide embedding_dim, got {num_heads} and {embedding_dim}")
        self.num_heads = num_heads
        self.encode_mean = encode_mean
        linear = partial(Linear, embedding_dim, embedding_dim, kernel_init=published_normal, rngs=rngs)
        self.mean_query, self.mean_key, self.mean_value, self.mean_out = (linear() for _ in range(4))
        self.covariance_query, self.covariance_key, self.covariance_value, self.covariance_out = (
            linear() for _ in range(4)
        )
        self.dropout = Dropout(dropout_rate)

    def __call__(
        self, mean: jax.Array, covariance: jax.Array, segments: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array | None, jax.Array]:
        """Attends from every token to itself and to earlier ones of its segment.

        Args:
          mean: shape (rows, row_length, embedding_dim).
          covariance: shape (rows, row_length, embedding_dim).
          segments: shape (rows, row_length), int32, equal where tokens belong together.
          key: random key for dropout; None: evaluation.

        Returns:
          What is added to the mean (None unless ``encode_mean``) and to the covariance, of their shapes.
        """

        def split(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:-1], self.num_heads, -1)

        def points(of_mean: Linear, of_covariance: Linear) -> jax.Array:
            # Gaussians with diagonal covariances are as far apart as these points are in Euclid's sense.
            return jnp.concatenate([split(of_mean(mean)), split(deviation(of_covariance(covariance)))], axis=-1)

        queries, keys = points(self.mean_query, self.covariance_query), points(self.mean_key, self.covariance_key)
        spread = split(jax.nn.elu(self.covariance_value(covariance)) + 1)
        values = split(self.mean_value(mean)) if self.encode_mean else None
        with jax.named_scope("attention"):
            mixed, mixed_spread = self._attend(queries, keys, values, spread, segments, key)
        mean_part = None if mixed is None else self.mean_out(mixed.reshape(mean.shape))
        return mean_part, self.covariance_out(mixed_spread.reshape(covariance.shape))

    def _attend(
        self,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array | None,
        spread: jax.Array,
        segments: jax.Array,
        key: jax.Array | None,
    ) -> tuple[jax.Array | None, jax.Array]:
        """Averages values (rows, row_length, heads, dim a head) by the weights, and spread by their squares."""
        length = queries.shape[1]
        wide = jnp.promote_types(queries.dtype, jnp.float32)
        scale = spread.shape[-1] ** -0.5
        # -|q - k|² without -|q|², which changes no softmax.
        sizes = scale * jnp.sum(jnp.square(keys.astype(wide)), axis=-1)  # (rows, keys, heads)
        sizes = jnp.moveaxis(sizes, 1, 2)[:, :, None]
        # Nothing sees what comes later: the first queries need the first keys only.
        step = -(-length // -(-length // QUERIES_AT_ONCE))
        mixed, mixed_spread = [], []
        for i, start in enumerate(range(0, length, step)):
            stop = min(start + step, length)
            seen = segments[:, start:stop, None] == segments[:, None, :stop]
            seen &= jnp.tri(stop - start, stop, start, dtype=bool)
            products = jnp.einsum(
                "bqhd,bkhd->bhqk", queries[:, start:stop], keys[:, :stop], preferred_element_type=wide
            )
            scores = jnp.where(seen[:, None], 2 * scale * products - sizes[..., :stop], BLOCKED)
            weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
            # The sum divides the few mixed values instead of the many weights.
            total = jnp.moveaxis(jnp.sum(weights, axis=-1), 1, 2)[..., None]
            weights = self.dropout(weights, None if key is None else jax.random.fold_in(key, i)).astype(spread.dtype)
            mix = partial(jnp.einsum, "bhqk,bkhd->bqhd", preferred_element_type=wide)
            mixed_spread.append((mix(weights * weights, spread[:, :stop]) / (total * total)).astype(spread.dtype))
            if values is not None:
                mixed.append((mix(weights, values[:, :stop]) / total).astype(values.dtype))
        return jnp.concatenate(mixed, axis=1) if mixed else None, jnp.concatenate(mixed_spread, axis=1)


class FeedForward(nnx.Module):
    r"""A feed-forward part four times as wide: :math:`\mathrm{LN}(x + W_2 \, \mathrm{ELU}(W_1 x))`."""

    def __init__(self, embedding_dim: int, dropout_rate: float, *, rngs: nnx.Rngs) -> None:
        linear = partial(Linear, kernel_init=published_normal, rngs=rngs)
        self.linear_in = linear(embedding_dim, 4 * embedding_dim)
        self.linear_out = linear(4 * embedding_dim, embedding_dim)
        self.norm = LayerNorm(embedding_dim, epsilon=1e-12, rngs=rngs)
        self.dropout = Dropout(dropout_rate)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Maps (rows, row_length, embedding_dim) to the same shape."""
        return self.norm(x + self.dropout(self.linear_out(jax.nn.elu(self.linear_in(x))), key))


class Block(nnx.Module):
    r"""One STOSA block: Wasserstein attention, then a feed-forward part each for mean and covariance.

    .. math::

      (a^m, a^c) &= \mathrm{Attention}(m, c) \\
      m' &= \mathrm{FFN}^m\big(\mathrm{LN}(m + a^m)\big), \qquad
      c' = \mathrm{ELU}\big(\mathrm{FFN}^c(\mathrm{LN}(c + a^c))\big) + 1

    with one normalisation LN for both. Unless ``encode_mean``, the mean stays as it is, and the parameters that would
    change it have no effect. Covariances come and go as they are before ELU(·) + 1.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        dropout_rate: float,
        attention_dropout_rate: float,
        encode_mean: bool,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.attention = WassersteinAttention(embedding_dim, num_heads, attention_dropout_rate, encode_mean, rngs=rngs)
        self.attention_norm = LayerNorm(embedding_dim, epsilon=1e-12, rngs=rngs)
        self.mean_feed_forward = FeedForward(embedding_dim, dropout_rate, rngs=rngs)
        self.covariance_feed_forward = FeedForward(embedding_dim, dropout_rate, rngs=rngs)
        self.dropout = Dropout(dropout_rate)

    def __call__(
        self, mean: jax.Array, covariance: jax.Array, segments: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Maps mean and covariance, both (rows, row_length, embedding_dim), to the same shapes."""
        keys = split_keys(key, 5)
        covariance = jax.nn.elu(covariance) + 1
        mean_part, covariance_part = self.attention(mean, covariance, segments, keys[0])
        covariance = self.attention_norm(covariance + self.dropout(covariance_part, keys[1]))
        covariance = self.covariance_feed_forward(covariance, keys[2])
        if mean_part is not None:
            mean = self.attention_norm(mean + self.dropout(mean_part, keys[3]))
            mean = self.mean_feed_forward(mean, keys[4])
        return mean, covariance


class STOSA(Recommender):
    r"""Sequential recommendation by stochastic self-attention, as trained in the SEvo paper.

    Items are Gaussians :math:`N(E^m_j, \mathrm{ELU}(E^c_j) + 1)` with diagonal covariances, from two tables that are
    each smoothed by itself. A history is a Gaussian :math:`N(m, c)` too, and an item scores minus the squared
    Wasserstein distance between the two,

    .. math::

      -W_2^2 = -\lVert m - E^m_j \rVert^2 - \Big\lVert \sqrt{c} - \sqrt{\mathrm{ELU}(E^c_j) + 1} \Big\rVert^2
      = \langle 2 u, v_j \rangle - \lVert v_j \rVert^2 - \lVert u \rVert^2

    with points :math:`u` and :math:`v_j` of twice the width, mean beside standard deviation. The last term is the same
    for all items, and left out: items are ranked by one matrix product.

    The published code has an error, which its published figures share: what the blocks make of the mean is dropped, and
    :math:`m` is the embedded newest item. So it is here, unless ``encode_mean``.

    Args:
      num_items: size of the catalogue. Items are 1 … num_items; row 0 of the tables is padding.
      max_length: the longest history the model sees.
      embedding_dim: width of mean and covariance.
      num_blocks: number of blocks.
      num_heads: attention heads a block; divides ``embedding_dim``.
      dropout_rate: dropout on embeddings and on what the attention and feed-forward parts add.
      attention_dropout_rate: dropout on the attention weights.
      pvn_weight: weight of the penalty, see :meth:`penalty`.
      encode_mean: whether the blocks change the mean too, as STOSA's paper describes it.
      dtype: what the blocks compute in; parameters, norms, attention weights, queries and scores are float32 anyway.
      rngs: random state for the initialisation.

    References:
      Fan et al., `Sequential Recommendation via Stochastic Self-Attention <https://arxiv.org/abs/2201.06035>`_, 2022

    Examples:
      >>> model = STOSA(100, embedding_dim=8, num_heads=2, rngs=nnx.Rngs(0))
      >>> points, bias = model.items()
      >>> points.shape, bias.shape
      ((101, 16), (101,))
    """

    config_class = STOSAConfig
    item_tables = 2

    def __init__(
        self,
        num_items: int,
        *,
        max_length: int = 100,
        embedding_dim: int = 64,
        num_blocks: int = 1,
        num_heads: int = 4,
        dropout_rate: float = 0.2,
        attention_dropout_rate: float = 0.5,
        pvn_weight: float = 0.005,
        encode_mean: bool = False,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.dtype = jnp.dtype(dtype)
        self.pvn_weight = pvn_weight
        embed = partial(nnx.Embed, features=embedding_dim, embedding_init=published_normal, rngs=rngs)
        self.item_mean, self.item_covariance = embed(num_items + 1), embed(num_items + 1)
        self.position_mean, self.position_covariance = embed(max_length), embed(max_length)
        self.norm = LayerNorm(embedding_dim, epsilon=1e-12, rngs=rngs)
        sizes = (embedding_dim, num_heads, dropout_rate, attention_dropout_rate, encode_mean)
        self.blocks = nnx.List([Block(*sizes, rngs=rngs) for _ in range(num_blocks)])
        self.dropout = Dropout(dropout_rate)

    @classmethod
    def from_config(cls, config: STOSAConfig, *, num_users: int, num_items: int, rngs: nnx.Rngs) -> Self:
        """A freshly initialised model, see :meth:`Recommender.from_config`."""
        del num_users
        return cls(num_items, **options_of(cls, config), rngs=rngs)

    @property
    def node_sets(self) -> Mapping[NodeSet, tuple[Group, ...]]:
        """The tables of means and of covariances, each smoothed by itself."""
        return {"items": (("item_mean",), ("item_covariance",))}

    def encode(
        self, batch: Batch, represented: Any = None, key: jax.Array | None = None, candidates: jax.Array | None = None
    ) -> Encoded:
        """Encodes packed histories: at each token twice its point, mean beside standard deviation."""
        del represented
        (means, candidate_means), (covariances, candidate_covariances) = (
            look_up(table.embedding[...], batch.inputs, candidates) for table in (self.item_mean, self.item_covariance)
        )
        keys = split_keys(key, len(self.blocks) + 2)
        mean, covariance = (
            self.dropout(self.norm((items + positions(batch.positions)).astype(self.dtype)), stream_key)
            for items, positions, stream_key in [
                (means, self.position_mean, keys[0]),
                (covariances, self.position_covariance, keys[1]),
            ]
        )
        mean = jax.nn.elu(mean)
        for block, block_key in zip(self.blocks, keys[2:], strict=True):
            mean, covariance = block(mean, covariance, batch.segments, block_key)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        vectors = 2 * jnp.concatenate([mean.astype(wide), deviation(covariance.astype(wide))], axis=-1)
        if candidates is None:
            return Encoded(vectors)
        return Encoded(vectors, *_points(candidate_means, candidate_covariances))

    def items(self, represented: Any = None) -> tuple[jax.Array, jax.Array]:
        """Points (num_items + 1, 2 · embedding_dim) and minus their squared lengths."""
        del represented
        return _points(self.item_mean.embedding[...], self.item_covariance.embedding[...])

    def penalty(
        self, batch: Batch, queries: Queries, represented: Any, loss: jax.Array, key: jax.Array | None = None
    ) -> jax.Array | float:
        r"""Where the target is closer to the negative than to the history, by how much.

        .. math::

          \frac{\lambda}{|T|} \sum_{t \in T} \max\big(0, \, W_2^2(t, t^+) - W_2^2(t^+, t^-)\big)

        over the queries :math:`T` that have a target, with :math:`\lambda` the ``pvn_weight``. Losses without one
        negative a target go without it.
        """
        del batch, represented, loss, key
        if self.pvn_weight == 0 or queries.rows is None:
            return 0.0
        target, negative = queries.rows
        to_target = jnp.sum(jnp.square(queries.vectors / 2 - target), axis=-1)
        to_negative = jnp.sum(jnp.square(target - negative), axis=-1)
        return self.pvn_weight * (queries.weights @ jax.nn.relu(to_target - to_negative))


def _points(means: jax.Array, covariances: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Points, mean beside standard deviation, and minus their squared lengths; both arguments (…, embedding_dim)."""
    points = jnp.concatenate([means, deviation(covariances)], axis=-1)
    return points, -jnp.sum(jnp.square(points), axis=-1)
