"""Building blocks shared by the models."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

# A score that counts for nothing. Finite, so that a row with nothing to attend to gives no NaN.
BLOCKED = -1e9

# Most queries of a causal row that are scored together: fewer save work, more save calls.
QUERIES_AT_ONCE = 64

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


@jax.custom_vjp
def _affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return x @ kernel + bias


def _affine_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _affine(x, kernel, bias), (x, kernel)


def _affine_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, ...]:
    x, kernel = saved
    tokens, gradients = (array.reshape(-1, array.shape[-1]) for array in (x, gradient))
    kernel_gradient = jax.lax.dot_general(tokens, gradients, (((0,), (0,)), ((), ())))
    bias_gradient = jnp.ones(len(tokens), gradients.dtype) @ gradients
    return gradient @ kernel.T, kernel_gradient, bias_gradient


_affine.defvjp(_affine_forward, _affine_backward)


class Linear(nnx.Linear):
    """``nnx.Linear`` in its input's dtype, with two plain matrix products as its backward pass.

    Derived automatically, XLA's CPU backend copies the transposed gradient of every layer and sums the bias gradient in
    a tree of windows: a tenth of a training step.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (…, in_features) to (…, out_features)."""
        with jax.named_scope("projections"):
            return _affine(x, self.kernel[...].astype(x.dtype), self.bias[...].astype(x.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalize(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    return _standardize(x, epsilon)[0] * scale + bias


def _standardize(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
    return centred * inverse, inverse


def _normalize_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _normalize(x, scale, bias, epsilon), (x, scale)


def _normalize_backward(
    epsilon: float, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, scale = saved
    standard, inverse = _standardize(x, epsilon)
    inner = gradient * scale
    along = jnp.mean(inner * standard, axis=-1, keepdims=True)
    x_gradient = inverse * (inner - jnp.mean(inner, axis=-1, keepdims=True) - standard * along)
    gradients = gradient.reshape(-1, gradient.shape[-1])
    ones = jnp.ones(len(gradients), gradients.dtype)
    return x_gradient, ones @ (gradients * standard.reshape(gradients.shape)), ones @ gradients


_normalize.defvjp(_normalize_forward, _normalize_backward)


class LayerNorm(nnx.LayerNorm):
    """``nnx.LayerNorm`` with a backward pass that sums over tokens by matrix products, see :class:`Linear`."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis, in float32 at least, and returns the input's dtype."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return _normalize(wide, self.scale[...], self.bias[...], self.epsilon).astype(x.dtype)


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
        linear = partial(Linear, embedding_dim, embedding_dim, rngs=rngs)
        self.query = linear(kernel_init=in_init)
        self.key = linear(kernel_init=in_init)
        self.value = linear(kernel_init=in_init)
        self.out = linear(kernel_init=out_init)
        self.dropout = Dropout(dropout_rate)

    def __call__(
        self,
        query: jax.Array,
        memory: jax.Array,
        segments: jax.Array,
        key: jax.Array | None,
        *,
        causal: bool,
        padding: jax.Array | None = None,
    ) -> jax.Array:
        """Attends from every token to those of its segment.

        Args:
          query: shape (rows, row_length, embedding_dim).
          memory: shape (rows, row_length, embedding_dim).
          segments: shape (rows, row_length), int32, equal where tokens belong together.
          key: random key for dropout; None: evaluation.
          causal: whether a token sees itself and earlier ones only.
          padding: shape (rows, row_length), int32: if given, the number of blank places that a token sees besides, each
            with a memory of zeros.

        Returns:
          Shape (rows, row_length, embedding_dim).
        """

        def split(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:-1], self.num_heads, -1)

        q, k, v = split(self.query(query)), split(self.key(memory)), split(self.value(memory))
        q = q * q.shape[-1] ** -0.5
        with jax.named_scope("attention"):
            mixed = self._attend(q, k, v, segments, key, causal=causal, padding=padding)
        return self.out(mixed.reshape(query.shape))

    def _attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segments: jax.Array,
        key: jax.Array | None,
        *,
        causal: bool,
        padding: jax.Array | None,
    ) -> jax.Array:
        """Attends with queries, keys and values (rows, row_length, heads, dim a head), see :meth:`__call__`."""
        length = q.shape[1]
        wide = jnp.promote_types(q.dtype, jnp.float32)  # of scores, whatever the queries have
        # Blank places are all alike, and the projections of zeros are the biases: attention to them is attention to one
        # key, with a score raised by the logarithm of their number.
        blank = None
        if padding is not None:
            raised = jnp.where(padding > 0, jnp.log(jnp.maximum(padding, 1)), BLOCKED)
            bias = self.key.bias[...].astype(q.dtype).reshape(q.shape[2:])
            blank = jnp.einsum("bqhd,hd->bhq", q, bias, preferred_element_type=wide) + raised[:, None]
        # Nothing sees what comes later: the first queries need the first keys only.
        step = -(-length // -(-length // QUERIES_AT_ONCE)) if causal else length
        mixed = []
        for i, start in enumerate(range(0, length, step)):
            stop = min(start + step, length)
            seen = segments[:, start:stop, None] == segments[:, None, :stop]
            if causal:
                seen &= jnp.tri(stop - start, stop, start, dtype=bool)
            scores = jnp.einsum("bqhd,bkhd->bhqk", q[:, start:stop], k[:, :stop], preferred_element_type=wide)
            scores = jnp.where(seen[:, None], scores, BLOCKED)
            part_key = None if key is None else jax.random.fold_in(key, i)
            mixed.append(self._mix(scores, v[:, :stop], None if blank is None else blank[..., start:stop], part_key))
        return jnp.concatenate(mixed, axis=1)

    def _mix(self, scores: jax.Array, v: jax.Array, blank: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """Averages values by the softmax of scores (rows, heads, queries, keys) and, if any, of one blank key's."""
        largest = jnp.max(scores, axis=-1)
        if blank is not None:
            largest = jnp.maximum(largest, blank)
        largest = jax.lax.stop_gradient(largest)
        keys = split_keys(key, 2)
        # The sum divides the few mixed values instead of the many weights.
        weights = jnp.exp(scores - largest[..., None])
        total = jnp.sum(weights, axis=-1)
        dropped = self.dropout(weights, keys[0]).astype(v.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", dropped, v, preferred_element_type=total.dtype)
        if blank is not None:
            weight = jnp.exp(blank - largest)
            total += weight
            bias = self.value.bias[...].reshape(v.shape[2:])
            mixed += jnp.einsum("bhq,hd->bqhd", self.dropout(weight, keys[1]), bias)
        return (mixed / jnp.moveaxis(total, 1, 2)[..., None]).astype(v.dtype)
