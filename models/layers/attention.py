"""Multi-head attention inside the segments of packed rows."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from models.layers.basic import Dropout, Linear, split_keys

# A score that counts for nothing. Finite, so that a row with nothing to attend to gives no NaN.
BLOCKED = -1e9

# Most queries of a causal row that are scored together: fewer save work, more save calls.
QUERIES_AT_ONCE = 64

# PyTorch draws query, key and value as one (3 · dim, dim) matrix, xavier-uniform; published models inherit that.
stacked_xavier_uniform = nnx.initializers.variance_scaling(0.5, "fan_avg", "uniform")


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
            with a memory of zeros. Dropout keeps or drops them together, where padded rows would drop each by itself;
            what they add is a share of the values' bias.

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
