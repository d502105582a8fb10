"""Linear layers, normalisation and dropout."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx


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


def symmetric_uniform(bound: float) -> nnx.Initializer:
    """Draws uniformly from [-bound, bound): PyTorch's usual initialisation, with a bound that depends on the layer."""
    return lambda key, shape, dtype=jnp.float32, **_: jax.random.uniform(key, shape, dtype, -bound, bound)


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
        bias = jnp.zeros(self.out_features, x.dtype) if self.bias is None else self.bias[...].astype(x.dtype)
        with jax.named_scope("projections"):
            return _affine(x, self.kernel[...].astype(x.dtype), bias)


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
