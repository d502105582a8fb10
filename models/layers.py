"""Building blocks shared by the models."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

# Added to a blocked score. Finite, so that a row with nothing to attend to gives no NaN.
BLOCKED = -1e9

# PyTorch draws query, key and value as one (3 · dim, dim) matrix, xavier-uniform; published models inherit that.
stacked_xavier_uniform = nnx.initializers.variance_scaling(0.5, "fan_avg", "uniform")


class Dropout(nnx.Module):
    """Dropout with an explicit key; without a key it does nothing.

    Args:
      rate: the share of entries set to zero, in [0, 1). Resolved to 1/65536.
    """

    def __init__(self, rate: float) -> None:
        if not 0 <= rate < 1:
            raise ValueError(f"dropout_rate must lie in [0, 1), got {rate}")
        self.rate = rate

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Applies dropout to ``x``; ``key`` None: evaluation."""
        if key is None or self.rate == 0:
            return x
        # 16 random bits decide as well as 32, at half the cost.
        keep = jax.random.bits(key, x.shape, jnp.uint16) >= jnp.uint16(round(self.rate * 2**16))
        return jnp.where(keep, x / (1 - self.rate), 0)


def split_keys(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """``count`` keys out of one, or as many times None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def attention_bias(segments: jax.Array, *, causal: bool) -> jax.Array:
    """Which tokens of a packed row see each other.

    Args:
      segments: shape (rows, row_length), equal where tokens belong together.
      causal: whether a token sees itself and earlier ones only.

    Returns:
      Shape (rows, 1, row_length, row_length), [row, head, query, key]: 0 where seen, else :data:`BLOCKED`.
    """
    together = segments[:, :, None] == segments[:, None, :]
    if causal:
        together &= jnp.tri(segments.shape[1], dtype=bool)
    return jnp.where(together, 0.0, BLOCKED)[:, None]


def padding_bias(padding: jax.Array) -> jax.Array:
    """Lets one blank key stand for all the padding in front of a history.

    In a row of its own, a history of ``n`` items has ``max_length - n`` blank places in front. They are all alike, so
    attention to them equals attention to one blank key whose score is raised by the logarithm of their number.

    Args:
      padding: shape (rows, row_length), int32, the number of blank places.

    Returns:
      Shape (rows, 1, row_length, 1), [row, head, query, blank key].
    """
    return jnp.where(padding > 0, jnp.log(jnp.maximum(padding, 1)), BLOCKED)[:, None, :, None]


class Attention(nnx.Module):
    """Multi-head attention with dropout on the weights.

    Args:
      embedding_dim: width of the input and output.
      num_heads: number of heads; divides ``embedding_dim``.
      dropout_rate: dropout on the attention weights.
      in_init: initialiser of the query, key and value projections; biases start at zero.
      out_init: initialiser of the output projection.
      rngs: random state for the initialisation.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        dropout_rate: float,
        *,
        in_init: nnx.Initializer,
        out_init: nnx.Initializer,
        rngs: nnx.Rngs,
    ) -> None:
        if embedding_dim % num_heads:
            raise ValueError(f"num_heads must divide embedding_dim, got {num_heads} and {embedding_dim}")
        self.num_heads = num_heads
        linear = partial(nnx.Linear, embedding_dim, embedding_dim, rngs=rngs)
        self.query = linear(kernel_init=in_init)
        self.key = linear(kernel_init=in_init)
        self.value = linear(kernel_init=in_init)
        self.out = linear(kernel_init=out_init)
        self.dropout = Dropout(dropout_rate)

    def __call__(self, query: jax.Array, memory: jax.Array, bias: jax.Array, key: jax.Array | None) -> jax.Array:
        """Attends from ``query`` to ``memory``.

        Args:
          query: shape (rows, queries, embedding_dim).
          memory: shape (rows, keys, embedding_dim).
          bias: broadcasts to (rows, num_heads, queries, keys); added to the scores.
          key: random key for dropout; None: evaluation.

        Returns:
          Shape (rows, queries, embedding_dim).
        """

        def split(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:-1], self.num_heads, -1)

        q, k, v = split(self.query(query)), split(self.key(memory)), split(self.value(memory))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
        weights = jax.nn.softmax(scores + bias, axis=-1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", self.dropout(weights, key), v)
        return self.out(mixed.reshape(query.shape))
