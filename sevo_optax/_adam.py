"""Adam's moments with the correction for rows that were not sampled (Theorem 3)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sevo_optax import _tables
from sevo_optax._tables import Tables


class ScaleByAdamCorrectedState(NamedTuple):
    """State of :func:`scale_by_adam_corrected`, laid out as :class:`optax.ScaleByAdamState`.

    Attributes:
      count: shape (), int32, the number of updates so far.
      mu: first moments, like the parameters, in ``mu_dtype``.
      nu: second moments, like the parameters.
    """

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates


def scale_by_adam_corrected(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any | None = None,
    *,
    tables: Tables = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates as Adam does, but lets rows without a gradient keep their direction.

    Where a row :math:`g_t` of the incoming update is exactly zero, Adam's moments shrink, and so does the step
    (Proposition 1). Here such a row's gradient is estimated from its moments instead (Eq. 9 and 10):

    .. math::

      \begin{align*}
      m_t &= \beta_1 m_{t-1} + (1-\beta_1)
        \begin{cases} g_t & g_t \ne 0\\ m_{t-1} / (1-\beta_1^{t-1}) & g_t = 0 \end{cases}\\
      v_t &= \beta_2 v_{t-1} + (1-\beta_2)
        \begin{cases} g_t^2 & g_t \ne 0\\ v_{t-1} / (1-\beta_2^{t-1}) & g_t = 0 \end{cases}\\
      u_t &= \frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t) + \bar\varepsilon} + \varepsilon}
      \end{align*}

    so that :math:`u_t = u_{t-1}` while the row is idle (Theorem 3). Where no row is idle this is
    :func:`optax.scale_by_adam`, bit for bit.

    **What counts as idle is exact zeros in the incoming update.** Hence almost no row is idle after :func:`sevo` has
    smoothed the gradient, or when every row receives a gradient anyway, as an output layer under a full softmax does;
    and whatever adds to the gradient in front of this transformation (noise, L2 through
    :func:`optax.add_decayed_weights`) switches the correction off. A row that has never been sampled has zero moments
    and stays where it is.

    Args:
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the denominator outside the square root, as in the published code.
      eps_root: added to the denominator inside the square root, as the paper prints it.
      mu_dtype: dtype of the first moment; None: that of the parameters.
      tables: paths of the leaves to correct, as in :func:`sevo`. None: every leaf with two or more dimensions, whose
        rows lie along its first axis; one-dimensional leaves get plain Adam.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` with the state :class:`ScaleByAdamCorrectedState`.

    Raises:
      TypeError: if ``tables`` is not a path, a tuple of paths or None.
      ValueError: if a path names no leaf or several.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sevo_optax import scale_by_adam_corrected
      >>> tx = scale_by_adam_corrected()
      >>> state = tx.init(jnp.zeros((2, 1)))
      >>> _, state = tx.update(jnp.array([[1.0], [2.0]]), state)
      >>> updates, state = tx.update(jnp.array([[1.0], [0.0]]), state)  # the second row is idle
      >>> updates.round(3)
      Array([[1.],
             [1.]], dtype=float32)

    References:
      Xu et al., `Graph-enhanced Optimizers for Structure-aware Recommendation Embedding Evolution
      <https://arxiv.org/abs/2310.03032>`_, 2024, Section 3
    """
    return _scale_by_adam_corrected(b1, b2, eps, eps_root, mu_dtype, tables, node_axis=0)


def _scale_by_adam_corrected(
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    eps_root: jax.typing.ArrayLike,
    mu_dtype: Any | None,
    tables: Tables,
    node_axis: Any,
    num_nodes: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    paths = _tables.canonicalize(tables)
    adam = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype)

    def rows(updates: optax.Updates) -> tuple[list[int], int]:
        """The positions of the leaves to correct, and the axis of their rows."""
        if paths is None and num_nodes is None:
            leaves = jax.tree.leaves(updates)
            return [i for i, leaf in enumerate(leaves) if leaf.ndim >= 2], 0
        positions, leaves, _, _ = _tables.find(updates, paths)
        shapes = [leaves[i].shape for i in positions]
        return positions, _tables.resolve_axis(node_axis, shapes, num_nodes)

    def init_fn(params: optax.Params) -> ScaleByAdamCorrectedState:
        if paths is not None and jax.tree.leaves(params):
            _tables.find(params, paths)
        return ScaleByAdamCorrectedState(*adam.init(params))

    def update_fn(
        updates: optax.Updates,
        state: ScaleByAdamCorrectedState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByAdamCorrectedState]:
        del params, extra_args
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)

        leaves, treedef = jax.tree.flatten(updates)
        positions, axis = rows(updates)
        idle: list[Any] = [None] * len(leaves)
        for i in positions:
            others = tuple(k for k in range(leaves[i].ndim) if k != axis % leaves[i].ndim)
            idle[i] = jnp.all(leaves[i] == 0, axis=others, keepdims=True)

        def correct(moment: optax.Updates, previous: optax.Updates, decay: Any) -> optax.Updates:
            # β m + (1 - β) m / (1 - β^{t-1}) = m (1 - βᵗ) / (1 - β^{t-1}); at t = 1 there is nothing to scale, m is 0.
            last = jnp.maximum(state.count, 1)
            growth = (1 - decay**count) / (1 - decay**last)
            return treedef.unflatten(
                m if rest is None else jnp.where(rest, (growth * p).astype(m.dtype), m)
                for m, p, rest in zip(treedef.flatten_up_to(moment), treedef.flatten_up_to(previous), idle, strict=True)
            )

        mu = correct(mu, state.mu, b1)
        nu = correct(nu, state.nu, b2)
        mu_hat = optax.tree.bias_correction(mu, b1, count)
        nu_hat = optax.tree.bias_correction(nu, b2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v + eps_root) + eps), mu_hat, nu_hat)
        mu = optax.tree.cast_like(mu, state.mu)
        nu = optax.tree.cast_like(nu, state.nu)
        return updates, ScaleByAdamCorrectedState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
