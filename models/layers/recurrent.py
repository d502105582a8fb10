"""Recurrent layers inside the segments of packed rows."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

_kernel_init = nnx.initializers.xavier_uniform()


class GRU(nnx.Module):
    r"""A gated recurrent unit that begins anew in every segment of a packed row.

    .. math::

      r_t, z_t &= \sigma(W_{r,z} \, x_t + b_{r,z} + U_{r,z} \, h_{t-1} + c_{r,z}) \\
      n_t &= \tanh\big(W_n x_t + b_n + r_t \circ (U_n h_{t-1} + c_n)\big) \\
      h_t &= (1 - z_t) \circ n_t + z_t \circ h_{t-1}

    with :math:`h = 0` before a segment's first token: the form of PyTorch and cuDNN, in which the reset gate multiplies
    the product. Kernels stack the three gates in this order: reset, update, new.

    Args:
      in_features: width of the input.
      features: width of the state.
      use_bias: whether there are the biases :math:`b` and :math:`c`.
      kernel_init: initialiser of the two stacked kernels, (in_features, 3 · features) and (features, 3 · features).
      bias_init: initialiser of the two stacked biases, (3 · features,).
      rngs: random state for the initialisation.

    References:
      Cho et al., `Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation
      <https://arxiv.org/abs/1406.1078>`_, 2014

    Examples:
      >>> gru = GRU(5, 3, use_bias=False, rngs=nnx.Rngs(0))
      >>> gru(jnp.ones((2, 4, 5))).shape
      (2, 4, 3)
      >>> states = gru(jnp.ones((1, 4, 5)), jnp.array([[1, 1, 2, 2]]))  # two segments, and the same in both
      >>> bool((states[0, :2] == states[0, 2:]).all())
      True
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        use_bias: bool = True,
        kernel_init: nnx.Initializer = _kernel_init,
        bias_init: nnx.Initializer = nnx.initializers.zeros,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_kernel = nnx.Param(kernel_init(rngs.params(), (in_features, 3 * features)))
        self.state_kernel = nnx.Param(kernel_init(rngs.params(), (features, 3 * features)))
        self.in_bias = nnx.Param(bias_init(rngs.params(), (3 * features,))) if use_bias else None
        self.state_bias = nnx.Param(bias_init(rngs.params(), (3 * features,))) if use_bias else None

    def __call__(self, x: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        """Runs along the rows.

        Products are computed in the input's dtype, gates and states in float32 at least.

        Args:
          x: shape (rows, row_length, in_features).
          segments: shape (rows, row_length), int32, equal in neighbouring tokens that belong together; None: a row is
            one segment.

        Returns:
          The states after each token, shape (rows, row_length, features), in the input's dtype.
        """
        wide = jnp.promote_types(x.dtype, jnp.float32)
        if segments is None:
            segments = jnp.zeros(x.shape[:2], jnp.int32)
        same = (segments[:, 1:] == segments[:, :-1]).astype(wide)
        goes_on = jnp.pad(same, ((0, 0), (1, 0)))
        blank = jnp.zeros(self.state_kernel.shape[-1:], wide)
        in_bias, state_bias = (
            blank if bias is None else bias[...].astype(wide) for bias in (self.in_bias, self.state_bias)
        )
        in_kernel, state_kernel = (kernel[...].astype(x.dtype) for kernel in (self.in_kernel, self.state_kernel))
        with jax.named_scope("gru"):
            # Time comes first: the loop then takes whole blocks of memory.
            states = _gru(jnp.swapaxes(x, 0, 1), goes_on.T[..., None], in_kernel, in_bias, state_kernel, state_bias)
            return jnp.swapaxes(states, 0, 1).astype(x.dtype)


@jax.custom_vjp
def _gru(
    x: jax.Array,
    goes_on: jax.Array,
    in_kernel: jax.Array,
    in_bias: jax.Array,
    state_kernel: jax.Array,
    state_bias: jax.Array,
) -> jax.Array:
    """States (time, rows, features); ``goes_on`` (time, rows, 1) is 0 where a segment begins, and 1 elsewhere.

    The gradients of the kernels are one product each, after the loop back in time: derived automatically, every step of
    the loop adds a product of its own to the whole kernel.
    """
    return _gru_forward(x, goes_on, in_kernel, in_bias, state_kernel, state_bias)[0]


def _gru_forward(
    x: jax.Array,
    goes_on: jax.Array,
    in_kernel: jax.Array,
    in_bias: jax.Array,
    state_kernel: jax.Array,
    state_bias: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    wide = goes_on.dtype
    inputs = jnp.matmul(x, in_kernel, preferred_element_type=wide) + in_bias

    def step(state: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        inputs, goes_on = at
        state = state * goes_on
        product = jnp.matmul(state.astype(x.dtype), state_kernel, preferred_element_type=wide) + state_bias
        in_reset, in_update, in_new = jnp.split(inputs, 3, axis=-1)
        state_reset, state_update, state_new = jnp.split(product, 3, axis=-1)
        reset, update = jax.nn.sigmoid(in_reset + state_reset), jax.nn.sigmoid(in_update + state_update)
        new = jnp.tanh(in_new + reset * state_new)
        return new + update * (state - new), (state, reset, update, new, state_new)

    start = jnp.zeros((x.shape[1], state_kernel.shape[0]), wide)
    _, saved = jax.lax.scan(step, start, (inputs, goes_on))
    before, _, update, new, _ = saved
    states = new + update * (before - new)
    return states, (x, goes_on, in_kernel, state_kernel, saved)


def _gru_backward(
    residuals: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, None, jax.Array, jax.Array, jax.Array, jax.Array]:
    x, goes_on, in_kernel, state_kernel, saved = residuals
    wide = goes_on.dtype

    def step(carry: jax.Array, at: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        gradient, goes_on, (state, reset, update, new, state_new) = at
        gradient = gradient + carry
        to_new = gradient * (1 - update) * (1 - new * new)
        to_update = gradient * (state - new) * update * (1 - update)
        to_reset = to_new * state_new * reset * (1 - reset)
        to_product = jnp.concatenate([to_reset, to_update, to_new * reset], axis=-1)
        to_state = jnp.matmul(to_product.astype(x.dtype), state_kernel.T, preferred_element_type=wide)
        return (gradient * update + to_state) * goes_on, (to_product, to_new)

    start = jnp.zeros(gradient.shape[1:], wide)
    _, (to_product, to_new) = jax.lax.scan(step, start, (gradient.astype(wide), goes_on, saved), reverse=True)
    features = state_kernel.shape[0]
    to_inputs = jnp.concatenate([to_product[..., : 2 * features], to_new], axis=-1)

    def flat(values: jax.Array) -> jax.Array:
        return values.reshape(-1, values.shape[-1])

    def outer(values: jax.Array, gradients: jax.Array) -> jax.Array:
        # Sums over tokens as a plain product: neither operand is copied to be transposed.
        product = partial(jax.lax.dot_general, dimension_numbers=(((0,), (0,)), ((), ())), preferred_element_type=wide)
        return product(flat(values).astype(x.dtype), flat(gradients).astype(x.dtype)).astype(x.dtype)

    ones = jnp.ones(x.shape[0] * x.shape[1], wide)
    x_gradient = jnp.matmul(to_inputs.astype(x.dtype), in_kernel.T)
    return (
        x_gradient,
        None,
        outer(x, to_inputs),
        ones @ flat(to_inputs),
        outer(saved[0], to_product),
        ones @ flat(to_product),
    )


_gru.defvjp(_gru_forward, _gru_backward)
