"""Building blocks shared by the models."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

# Added to a blocked score. Finite, so that a row with nothing to attend to gives no NaN.
BLOCKED = -1e9

# PyTorch draws query, key and value as one (3 · dim, dim) matrix, xavier-uniform; published models inherit that.
stacked_xavier_uniform = nnx.initializers.variance_scaling(0.5, "fan_avg", "uniform")


def random_words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One pseudo-random 32-bit word an element, cheaply: enough for dropout, not for statistics.

    Two words are drawn from the key, and the element's number is mixed with them (multiply, xor and shift, as in the
    finalisers of well-known hash functions). ``jax.random.bits`` costs ten times as much on a CPU, an eighth of a
    training step; this fuses with what it is used for and never lies in memory.

    Args:
      key: a random key.
      shape: shape of the result, of fewer than 2**32 elements.

    Returns:
      uint32 words.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    word = jax.lax.iota(jnp.uint32, math.prod(shape)) * jnp.uint32(0x9E3779B1) ^ first
    word = (word ^ word >> 16) * jnp.uint32(0x21F0AAAD) ^ second
    word = (word ^ word >> 15) * jnp.uint32(0x735A2D97)
    return (word ^ word >> 15).reshape(shape)


class Dropout(nnx.Module):
    """Dropout with an explicit key; without a key it does nothing.

    Args:
      rate: the share of entries set to zero, in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        if not 0 <= rate < 1:
            raise ValueError(f"dropout_rate must lie in [0, 1), got {rate}")
        self.rate = rate

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Applies dropout to ``x``; ``key`` None: evaluation."""
        if key is None or self.rate == 0:
            return x
        keep = random_words(key, x.shape) >= jnp.uint32(self.rate * 2**32)
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
      Shape (rows, 1, row_length), [row, head, query].
    """
    return jnp.where(padding > 0, jnp.log(jnp.maximum(padding, 1)), BLOCKED)[:, None]


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

    def __call__(
        self,
        query: jax.Array,
        memory: jax.Array,
        bias: jax.Array,
        key: jax.Array | None,
        *,
        blank_bias: jax.Array | None = None,
    ) -> jax.Array:
        """Attends from ``query`` to ``memory``.

        Args:
          query: shape (rows, queries, embedding_dim).
          memory: shape (rows, keys, embedding_dim).
          bias: broadcasts to (rows, num_heads, queries, keys); added to the scores.
          key: random key for dropout; None: evaluation.
          blank_bias: if given, there is one more key, of a memory of zeros; broadcasts to (rows, num_heads, queries).

        Returns:
          Shape (rows, queries, embedding_dim).
        """

        def split(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:-1], self.num_heads, -1)

        keys = split_keys(key, 2)
        q, k, v = split(self.query(query)), split(self.key(memory)), split(self.value(memory))
        q = q * q.shape[-1] ** -0.5
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias
        if blank_bias is None:
            weights = self.dropout(jax.nn.softmax(scores, axis=-1), keys[0])
            mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
            return self.out(mixed.reshape(query.shape))
        # The projections of zeros are the biases, so the blank key needs no row of its own: a softmax in two parts.
        blank_score = jnp.einsum("bqhd,hd->bhq", q, split(self.key.bias[...])) + blank_bias
        largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1), blank_score))
        weights, blank_weight = jnp.exp(scores - largest[..., None]), jnp.exp(blank_score - largest)
        total = jnp.sum(weights, axis=-1) + blank_weight
        weights = self.dropout(weights / total[..., None], keys[0])
        blank_weight = self.dropout(blank_weight / total, keys[1])
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        mixed += jnp.einsum("bhq,hd->bqhd", blank_weight, split(self.value.bias[...]))
        return self.out(mixed.reshape(query.shape))
