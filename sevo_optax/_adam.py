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

    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    mu: optax.Updates
    nu: optax.Updates


def scale_by_adam_corrected(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any | None = None,
    *,
    nesterov: bool = False,
    tables: Tables = None,
    node_axis: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates as Adam does, but lets rows of an embedding table without a gradient keep their direction.

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

    so that :math:`u_t = u_{t-1}` while the row is idle (Theorem 3), up to rounding: moments in half precision cannot
    follow for more than some hundred steps (in bfloat16, with :math:`\beta_2 = 0.999`, a row that was idle for 1,000
    steps makes steps half as long again), so keep tables, and ``mu_dtype``, in float32. Where no row is idle, and for
    all leaves other than ``tables``, this is :func:`optax.scale_by_adam`, bit for bit if updates have the dtype of the
    parameters. The correction suits embedding tables alone: the row of a dense kernel whose input stays zero for
    thousands of steps would go on moving along its last gradient.

    With ``nesterov`` the estimate stands for the missing gradient in the look-ahead too. The direction of an idle row
    then differs from that of the step before by the step's own gradient, and tends to :math:`u` above.

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
      nesterov: whether the direction looks ahead by one step, as in :func:`optax.scale_by_adam`.
      tables: which leaves to correct, as in :func:`sevo`: the path of the embedding table, or a tuple of paths. None:
        the tree holds exactly one array.
      node_axis: the axis of each table that counts its rows, as in :func:`sevo`.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` with the state :class:`ScaleByAdamCorrectedState`.

    Raises:
      TypeError: if ``tables`` is not a path, a tuple of paths or None, ``node_axis`` no integer, or a table has floats
        of eight bits.
      ValueError: if a path names no leaf or several, ``tables`` is None for a tree of several arrays, or ``node_axis``
        is no axis of a table. The message lists the leaves.

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
    return _scale_by_adam_corrected(b1, b2, eps, eps_root, mu_dtype, nesterov, tables, node_axis)


def _scale_by_adam_corrected(
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    eps_root: jax.typing.ArrayLike,
    mu_dtype: Any | None,
    nesterov: bool,
    tables: Tables,
    node_axis: Any,
    num_nodes: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``num_nodes`` tells which axis is meant where ``node_axis`` is traced."""
    paths = _tables.canonicalize(tables)
    adam = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype)

    def find(tree: Any) -> tuple[dict[int, int], list[Any], Any]:
        """The axis of the rows by position of each leaf to correct, and the flattened tree."""
        positions, leaves, names, treedef = _tables.find(tree, paths, num_nodes)
        for i in positions:
            _tables.check_is_array(i, leaves, names)
        axis = _tables.resolve_axis(node_axis, [leaves[i].shape for i in positions], num_nodes)
        for i in positions:
            _tables.check_axis(axis, i, leaves, names)
            _tables.refuse_float8(leaves[i].dtype, f"tables: {_tables.label(names[i], names)}")
        return {i: axis % leaves[i].ndim for i in positions}, leaves, treedef

    def init_fn(params: optax.Params) -> ScaleByAdamCorrectedState:
        # A tree without leaves is how optax asks for the structure of the state.
        if jax.tree.leaves(params):
            find(params)
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

        axes, leaves, treedef = find(updates)
        idle = {
            i: jnp.all(leaves[i] == 0, axis=tuple(k for k in range(leaves[i].ndim) if k != axis), keepdims=True)
            for i, axis in axes.items()
        }
        # At the first step there is no past to estimate from: the moments are zero, whatever they are multiplied with.
        last = jnp.maximum(state.count, 1)

        def where_idle(tree: Any, previous: optax.Updates, factor: jax.typing.ArrayLike) -> Any:
            out, old = treedef.flatten_up_to(tree), treedef.flatten_up_to(previous)
            for i, rest in idle.items():
                out[i] = jnp.where(rest, (factor * old[i]).astype(out[i].dtype), out[i])
            return treedef.unflatten(out)

        # β m + (1 - β) m / (1 - β^{t-1}) = m (1 - βᵗ) / (1 - β^{t-1})
        mu = where_idle(mu, state.mu, (1 - b1**count) / (1 - b1**last))
        nu = where_idle(nu, state.nu, (1 - b2**count) / (1 - b2**last))
        if nesterov:
            ahead = optax.tree.bias_correction(mu, b1, optax.safe_increment(count))
            now = optax.tree.bias_correction(where_idle(updates, state.mu, 1 / (1 - b1**last)), b1, count)
            mu_hat = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, ahead, now)
        else:
            mu_hat = optax.tree.bias_correction(mu, b1, count)
        nu_hat = optax.tree.bias_correction(nu, b2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v + eps_root) + eps), mu_hat, nu_hat)
        mu = optax.tree.cast_like(mu, state.mu)
        nu = optax.tree.cast_like(nu, state.nu)
        return updates, ScaleByAdamCorrectedState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
