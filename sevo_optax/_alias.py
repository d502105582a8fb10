"""Whole optimizers: chains of the building blocks, without arithmetic of their own."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import optax
from jax.sharding import NamedSharding

from sevo_optax._adam import _scale_by_adam_corrected, scale_by_adam_corrected
from sevo_optax._propagate import Method
from sevo_optax._sevo import sevo
from sevo_optax._tables import Tables
from sevo_optax._weights import Adjacency

Mask = Any | Callable[[optax.Params], Any] | None

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Arguments that mean the same in every optimizer are explained once.
_ARGUMENTS = {
    "learning_rate": r"""
  learning_rate: :math:`\eta`, a number or a schedule.""",
    "graph": """
  adjacency: raw symmetric weights, see :func:`sevo`.
  tables: path of the embedding table, or a tuple of paths, or None, see :func:`sevo`.""",
    "moments": """
  b1: decay rate of the first moment.
  b2: decay rate of the second moment (the paper's settings use 0.95 to 0.999).
  eps: added to the denominator outside the square root, as in the published code.
  eps_root: added to the denominator inside the square root, as the paper prints it.
  mu_dtype: dtype of the first moment; None: that of the parameters.""",
    "decay": r"""
  weight_decay: :math:`\lambda`, a number or a schedule.
  mask: which leaves decay, see :func:`optax.adamw`.""",
    "nesterov": """
  nesterov: whether the direction looks ahead by one step, see :func:`optax.adamw`.""",
    "smoothing": """
  beta: strength of the smoothing, see :func:`sevo`.
  num_layers: number of layers, see :func:`sevo`.
  method: form of the smoothing, see :func:`sevo`.
  rescale: whether the Neumann series is rescaled (Eq. 7) or not (Eq. 6), see :func:`sevo`.
  normalize: whether ``adjacency`` holds raw weights, see :func:`sevo`.
  node_axis: the axis of the table that counts the nodes, see :func:`sevo`.
  graph_sharding: how to split the rows of a graph that one device cannot hold, see :func:`sevo`.""",
}


def _explain_arguments(function: _Function) -> _Function:
    """Writes the shared explanations into a docstring, each in place of its name in braces on a line of its own."""
    if function.__doc__ is not None:  # it is under python -OO
        doc = inspect.cleandoc(function.__doc__)
        for name, text in _ARGUMENTS.items():
            doc = doc.replace(f"\n  {{{name}}}", text)
        function.__doc__ = doc
    return function


@_explain_arguments
def adamw_corrected(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = False,
    tables: Tables = None,
    node_axis: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW whose moments are corrected for idle rows of an embedding table.

    :func:`scale_by_adam_corrected`, decoupled weight decay, learning rate:

    .. math::

      \theta_t = \theta_{t-1} - \eta_t \big( u_t + \lambda \theta_{t-1} \big)

    It equals :func:`optax.adamw` for all leaves other than ``tables``, and where every row receives a gradient. Behind
    :func:`sevo` in a chain it is the gradient-side form::

      optax.chain(sevo(weights, "item_embedding"), adamw_corrected(1e-3, tables="item_embedding"))

    Args:
      {learning_rate}
      {moments}
      {decay}
      {nesterov}
      tables: which leaves are corrected: path of the embedding table, or a tuple of paths; None: the tree holds exactly
        one array. See :func:`scale_by_adam_corrected`.
      node_axis: the axis of each table that counts its rows.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: as :func:`scale_by_adam_corrected`.
      ValueError: as :func:`scale_by_adam_corrected`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from sevo_optax import adamw_corrected
      >>> tx = adamw_corrected(0.1, weight_decay=0.0)
      >>> params = jnp.ones((2, 1))
      >>> updates, _ = tx.update(jnp.array([[3.0], [0.0]]), tx.init(params), params)
      >>> [round(float(value), 3) for value in optax.apply_updates(params, updates)[:, 0]]
      [0.9, 1.0]
    """
    return optax.chain(
        scale_by_adam_corrected(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, tables=tables, node_axis=node_axis),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


@_explain_arguments
def sevo_adamw(
    learning_rate: optax.ScalarOrSchedule,
    adjacency: Adjacency,
    tables: Tables = None,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    nesterov: bool = False,
    beta: optax.ScalarOrSchedule = 0.99,
    num_layers: int = 3,
    method: Method = "neumann",
    rescale: bool = True,
    normalize: bool = True,
    node_axis: int = 0,
    graph_sharding: NamedSharding | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW enhanced by SEvo (Algorithm 1 of the paper).

    The corrected moments' direction is smoothed; weight decay stays outside:

    .. math::

      E_t = E_{t-1} - \eta_t \, \hat\psi\Big( \frac{\hat M_t}{\sqrt{\hat V_t + \bar\varepsilon} + \varepsilon} \Big)
        - \eta_t \lambda E_{t-1}

    It is the chain of :func:`scale_by_adam_corrected` on ``tables``, :func:`sevo`, :func:`optax.add_decayed_weights`
    and :func:`optax.scale_by_learning_rate`. Leaves other than ``tables`` get plain AdamW.

    Args:
      {learning_rate}
      {graph}
      {moments}
      {decay}
      {nesterov}
      {smoothing}

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: as :func:`sevo`.
      ValueError: as :func:`sevo`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sevo_optax import graph, sevo_adamw
      >>> weights = graph.from_edges([0], [1], num_nodes=3)
      >>> tx = sevo_adamw(1e-3, weights, "item_embedding", weight_decay=0.1)
      >>> params = {"item_embedding": jnp.ones((3, 2)), "kernel": jnp.ones((2, 2))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> updates["item_embedding"].shape
      (3, 2)

    References:
      Xu et al., `Graph-enhanced Optimizers for Structure-aware Recommendation Embedding Evolution
      <https://arxiv.org/abs/2310.03032>`_, 2024, Algorithm 1
    """
    smoother = sevo(
        adjacency,
        tables,
        beta=beta,
        num_layers=num_layers,
        method=method,
        rescale=rescale,
        normalize=normalize,
        node_axis=node_axis,
        graph_sharding=graph_sharding,
    )
    num_nodes = adjacency.shape[0]
    return optax.chain(
        _scale_by_adam_corrected(b1, b2, eps, eps_root, mu_dtype, nesterov, tables, node_axis, num_nodes),
        smoother,
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


@_explain_arguments
def sevo_adam(
    learning_rate: optax.ScalarOrSchedule,
    adjacency: Adjacency,
    tables: Tables = None,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any | None = None,
    nesterov: bool = False,
    beta: optax.ScalarOrSchedule = 0.99,
    num_layers: int = 3,
    method: Method = "neumann",
    rescale: bool = True,
    normalize: bool = True,
    node_axis: int = 0,
    graph_sharding: NamedSharding | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam enhanced by SEvo (Algorithm 3 of the paper): plain moments, smoothed direction, no weight decay.

    .. math::

      E_t = E_{t-1} - \eta_t \, \hat\psi\Big( \frac{\hat M_t}{\sqrt{\hat V_t + \bar\varepsilon} + \varepsilon} \Big)

    The chain of :func:`optax.scale_by_adam`, :func:`sevo` and :func:`optax.scale_by_learning_rate`. PyTorch's Adam adds
    ``weight_decay * params`` to the gradient; for that, put ``optax.add_decayed_weights(weight_decay)`` in front.

    Args:
      {learning_rate}
      {graph}
      {moments}
      {nesterov}
      {smoothing}

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: as :func:`sevo`.
      ValueError: as :func:`sevo`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from sevo_optax import graph, sevo_adam
      >>> weights = graph.from_edges([0], [1], num_nodes=3)
      >>> tx = optax.chain(optax.add_decayed_weights(0.1), sevo_adam(1e-3, weights))
      >>> params = jnp.ones((3, 2))
      >>> updates, state = tx.update(params, tx.init(params), params)

    References:
      Xu et al., `Graph-enhanced Optimizers for Structure-aware Recommendation Embedding Evolution
      <https://arxiv.org/abs/2310.03032>`_, 2024, Algorithm 3
    """
    return optax.chain(
        optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),
        sevo(
            adjacency,
            tables,
            beta=beta,
            num_layers=num_layers,
            method=method,
            rescale=rescale,
            normalize=normalize,
            node_axis=node_axis,
            graph_sharding=graph_sharding,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


@_explain_arguments
def sevo_sgd(
    learning_rate: optax.ScalarOrSchedule,
    adjacency: Adjacency,
    tables: Tables = None,
    *,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    beta: optax.ScalarOrSchedule = 0.99,
    num_layers: int = 3,
    method: Method = "neumann",
    rescale: bool = True,
    normalize: bool = True,
    node_axis: int = 0,
    graph_sharding: NamedSharding | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with momentum enhanced by SEvo (Algorithm 2 of the paper).

    .. math::

      M_t = \mu M_{t-1} + G_t, \qquad E_t = E_{t-1} - \eta_t \, \hat\psi(M_t)

    The chain of :func:`optax.trace`, :func:`sevo` and :func:`optax.scale_by_learning_rate`. PyTorch's SGD adds
    ``weight_decay * params`` to the gradient; for that, put ``optax.add_decayed_weights(weight_decay)`` in front.

    Args:
      {learning_rate}
      {graph}
      momentum: :math:`\mu`; None: no momentum and no state for it.
      nesterov: whether the momentum is Nesterov's.
      {smoothing}

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: as :func:`sevo`.
      ValueError: as :func:`sevo`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sevo_optax import graph, sevo_sgd
      >>> tx = sevo_sgd(0.1, graph.from_edges([0], [1], num_nodes=3), momentum=0.9)
      >>> params = jnp.ones((3, 2))
      >>> updates, state = tx.update(params, tx.init(params), params)

    References:
      Xu et al., `Graph-enhanced Optimizers for Structure-aware Recommendation Embedding Evolution
      <https://arxiv.org/abs/2310.03032>`_, 2024, Algorithm 2
    """
    return optax.chain(
        optax.identity() if momentum is None else optax.trace(momentum, nesterov),
        sevo(
            adjacency,
            tables,
            beta=beta,
            num_layers=num_layers,
            method=method,
            rescale=rescale,
            normalize=normalize,
            node_axis=node_axis,
            graph_sharding=graph_sharding,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )
