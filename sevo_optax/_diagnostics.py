"""Two numbers to choose a strength by: how rough a matrix is over the graph, and how far smoothing turns it."""

import jax
import jax.numpy as jnp

from sevo_optax._propagate import Method
from sevo_optax._smooth import check_form, checked, product, smooth_array
from sevo_optax._weights import Adjacency


def smoothness(x: jax.typing.ArrayLike, adjacency: Adjacency, *, normalize: bool = True) -> jax.Array:
    r"""The Dirichlet energy of the rows of a matrix over a graph (Eq. 1): smaller is smoother.

    .. math::

      \mathcal{J}(X) = \operatorname{Tr}(X^\top \tilde L X)
        = \tfrac12 \sum_{i,j} w_{ij} \Big\| \frac{x_i}{\sqrt{d_i}} - \frac{x_j}{\sqrt{d_j}} \Big\|_2^2, \qquad
      \tilde L = I - \tilde A

    The trace is what is computed. (The paper prints its pairwise form without the one half; a node without neighbours
    adds its squared norm to the trace and nothing to the sum.)

    Args:
      x: shape (nodes, dim) or (nodes,), floating.
      adjacency: as in :func:`smooth`.
      normalize: as in :func:`smooth`.

    Returns:
      A scalar, float32 at least. Of a matrix that is nearly smooth, rounding may leave a little less than 0: about the
      machine precision times :math:`\|X\|_F^2`.

    Raises:
      TypeError: as :func:`smooth`.
      ValueError: as :func:`smooth`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sevo_optax import graph, smoothness
      >>> pair = graph.from_edges([0], [1], num_nodes=2)
      >>> float(smoothness(jnp.array([[1.0], [1.0]]), pair)), float(smoothness(jnp.array([[1.0], [-1.0]]), pair))
      (0.0, 4.0)
    """
    x, csr = checked(x, adjacency, normalize)
    x = x.astype(csr.data.dtype)
    return jnp.sum(x * (x - product([x], 0, csr)[0]))


def alignment(
    x: jax.typing.ArrayLike,
    adjacency: Adjacency,
    *,
    beta: jax.typing.ArrayLike = 0.99,
    num_layers: jax.typing.ArrayLike = 3,
    method: Method = "neumann",
    normalize: bool = True,
) -> jax.Array:
    r"""The cosine between a matrix and its smoothed self: 1 keeps the direction, below 0 turns against it.

    A transformation :math:`\psi` is direction-aware if :math:`\langle \psi(X), X \rangle > 0` for every
    :math:`X \ne 0` (Definition 2, Section 2.2). This is that inner product, free of the sizes of both matrices:

    .. math::

      \cos(\psi(X), X) = \frac{\operatorname{Tr}(\psi(X)^\top X)}{\|\psi(X)\|_F \, \|X\|_F}

    Give it a gradient: to first order, a step along the smoothed gradient decreases the loss by this fraction of what
    an equally long step along the gradient itself would, and not at all where the cosine is not positive. The Neumann
    form stays positive for every :math:`\beta \in [0, 1)`; the iterative form need not from :math:`\beta = 1/2` on
    (Theorem 1). How small it can get follows from the smallest and the largest eigenvalue of :math:`\psi`
    (Kantorovich's inequality, not in the paper): :math:`\sqrt{1 - \beta^2}`, 0.141 at :math:`\beta=0.99`, for
    the exact form and for the Neumann form of an odd number of layers; with an even number it stays larger.

    Rescaling multiplies :math:`\psi` by a positive number, which a cosine does not see; hence no such argument.

    Args:
      x: shape (nodes, dim) or (nodes,), floating. Computed in float32 at least.
      adjacency: as in :func:`smooth`.
      beta: as in :func:`smooth`.
      num_layers: as in :func:`smooth`.
      method: as in :func:`smooth`.
      normalize: as in :func:`smooth`.

    Returns:
      A scalar in [-1, 1] up to rounding, float32 at least; 0 where ``x`` or its smoothed self is zero. Works under
      ``jit``, ``grad`` and ``vmap`` as :func:`smooth` does.

    Raises:
      TypeError: as :func:`smooth`.
      ValueError: as :func:`smooth`.

    Examples:
      Two neighbours pulled in opposite directions, the hardest case:

      >>> import jax.numpy as jnp
      >>> from sevo_optax import alignment, graph
      >>> pair = graph.from_edges([0], [1], num_nodes=2)
      >>> apart = jnp.array([[1.0], [-1.0]])
      >>> for method in ("neumann", "iterative"):
      ...     print(f"{method}: {alignment(apart, pair, beta=0.9, method=method):.3f}")
      neumann: 1.000
      iterative: -1.000

      A gradient on one row alone:

      >>> print(f"{alignment(jnp.array([[1.0], [0.0]]), pair, beta=0.9):.3f}")
      0.743

    References:
      Xu et al., `Graph-enhanced Optimizers for Structure-aware Recommendation Embedding Evolution
      <https://arxiv.org/abs/2310.03032>`_, 2024, Section 2.2
    """
    check_form(beta, num_layers, method)
    if callable(beta):
        raise TypeError("beta must be a number here; schedules belong to sevo(...)")
    x, csr = checked(x, adjacency, normalize)
    # Smoothing is linear, so every factor cancels: unit vectors neither overflow nor underflow.
    x = _unit(x.astype(csr.data.dtype))
    smoothed = smooth_array(x, csr, beta, num_layers, method, True)
    return jnp.sum(x * _unit(smoothed))


def _unit(x: jax.Array) -> jax.Array:
    """``x`` over its Frobenius norm; zero stays zero."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), initial=0))
    x = x / jnp.where(largest == 0, 1, largest)
    square = jnp.sum(x**2)
    return x / jnp.sqrt(jnp.where(square == 0, 1, square))
