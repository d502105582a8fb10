"""Batch normalisation over those places of packed rows that are filled."""

import jax
import jax.numpy as jnp
from flax import nnx


class BatchNorm(nnx.BatchNorm):
    r"""``nnx.BatchNorm`` as in PyTorch: the running variance is the unbiased one, and a batch may be empty.

    .. math::

      y = \gamma \, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    In training, :math:`\mu` and :math:`\sigma^2` are those of the batch, and running averages keep a tenth of them; in
    evaluation they are the running averages. These are state (``nnx.BatchStat``), not parameters.

    Args:
      num_features: width of the input.
      rngs: random state, for the initialisation's sake; it is not used.

    References:
      Ioffe and Szegedy, `Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift
      <https://arxiv.org/abs/1502.03167>`_, 2015

    Examples:
      >>> norm = BatchNorm(1, rngs=nnx.Rngs(0))
      >>> x = jnp.array([[1.0], [3.0], [100.0]])
      >>> norm(x, jnp.array([True, True, False]), training=True)[:2].round(3).tolist()
      [[-1.0], [1.0]]
      >>> norm.mean[...].round(3).tolist(), norm.var[...].round(3).tolist()
      ([0.20000000298023224], [1.100000023841858])
    """

    def __init__(self, num_features: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(num_features, momentum=0.9, epsilon=1e-5, rngs=rngs)

    def __call__(self, x: jax.Array, counted: jax.Array, *, training: bool) -> jax.Array:
        """Normalises over all axes but the last, in float32 at least, and returns the input's dtype.

        Args:
          x: shape (…, num_features).
          counted: shape (…), bool: whose statistics count. Without any, running averages serve, and stay.
          training: whether to use, and keep, the batch's statistics.
        """
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean, var = self.mean[...], self.var[...]
        if training:
            count = jnp.sum(counted)
            share = counted.ravel() / jnp.maximum(count, 1).astype(wide.dtype)
            flat = wide.reshape(-1, wide.shape[-1])
            batch_mean = share @ flat
            batch_var = share @ jnp.square(flat - batch_mean)
            unbiased = batch_var * (count / jnp.maximum(count - 1, 1))
            kept = jnp.where(count > 0, self.momentum, 1.0)
            self.mean[...] = jax.lax.stop_gradient(kept * mean + (1 - kept) * batch_mean).astype(mean.dtype)
            self.var[...] = jax.lax.stop_gradient(kept * var + (1 - kept) * unbiased).astype(var.dtype)
            mean, var = jnp.where(count > 0, batch_mean, mean), jnp.where(count > 0, batch_var, var)
        scale = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
        return ((wide - mean) * scale + self.bias[...]).astype(x.dtype)
