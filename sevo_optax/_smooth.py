"""Structure-aware smoothing as a function, the product that it is made of, and a check of its exact form."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sevo_optax import _propagate, _tables
from sevo_optax._propagate import CSR, EXACT_TOLERANCE, METHODS, Method
from sevo_optax._weights import Adjacency, is_traced


def _is_real_number(value: Any) -> bool:
    dtype = value.dtype if is_traced(value) else np.asarray(value).dtype
    real = jnp.issubdtype(dtype, np.number) and not jnp.issubdtype(dtype, np.complexfloating)
    return real and np.ndim(value) == 0


def check_form(beta: Any, num_layers: Any, method: Any) -> None:
    """Checks what is concrete; traced numbers and schedules are taken on trust."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not callable(beta) and not is_traced(beta):
        if not _is_real_number(beta):
            raise TypeError(f"beta must be a number in [0, 1) or a schedule, got {beta!r}")
        if not 0 <= float(beta) < 1:
            raise ValueError(
                f"beta must lie in [0, 1), got {float(beta)}; "
                "0 leaves the update as it is and 0.99 is the paper's choice"
            )
    if not is_traced(num_layers):
        # Python's own integers may be too large for any dtype.
        integer = isinstance(num_layers, int) or np.issubdtype(np.asarray(num_layers).dtype, np.integer)
        if not integer or isinstance(num_layers, bool) or np.ndim(num_layers) != 0:
            raise TypeError(f"num_layers must be an integer, got {num_layers!r}")
        if int(num_layers) < 0:
            raise ValueError(f"num_layers must be at least 0, got {int(num_layers)}")
        if int(num_layers) >= 2**31:
            raise ValueError(f"num_layers must be below 2**31, got {int(num_layers)}; 1 to 4 are usual")


def check_rounded(beta: Any, dtype: Any) -> None:
    """Checks a number, also one out of a schedule, as it is computed with."""
    if not _is_real_number(beta):
        raise TypeError(f"beta must be one number in [0, 1), got {beta!r}; for several of them, use jax.vmap")
    if is_traced(beta) or 0 <= float(np.asarray(beta, dtype)) < 1:
        return
    message = f"beta must lie in [0, 1), got {float(beta)}"
    if 0 <= float(beta) <= 1:  # rounded up, or where a schedule ends
        name = np.dtype(dtype).name
        message += f", which is 1 in {name}; take at most {float(1 - np.finfo(dtype).eps)}"
    raise ValueError(message)


def smooth(
    x: jax.typing.ArrayLike,
    adjacency: Adjacency,
    *,
    beta: jax.typing.ArrayLike = 0.99,
    num_layers: jax.typing.ArrayLike = 3,
    method: Method = "neumann",
    rescale: bool = True,
    normalize: bool = True,
) -> jax.Array:
    r"""Smooths the rows of a matrix over a graph, the transformation :math:`\psi` of the paper.

    With :math:`\tilde A = D^{-1/2} A D^{-1/2}` the normalised adjacency, :math:`\beta` the strength of the smoothing
    and :math:`L` the number of layers, ``method`` chooses between

    .. math::

      \begin{align*}
      \text{neumann, rescaled (Eq. 7):} &&
        \hat\psi(X) &= \frac{1-\beta}{1-\beta^{L+1}} \sum_{l=0}^{L} \beta^l \tilde A^l X\\
      \text{neumann (Eq. 6):} &&
        \hat\psi_{nsa}(X) &= (1-\beta) \sum_{l=0}^{L} \beta^l \tilde A^l X\\
      \text{iterative (Zhou et al.):} &&
        \hat\psi_l(X) &= \beta \tilde A \hat\psi_{l-1}(X) + (1-\beta) X, \quad \hat\psi_0(X) = X\\
      \text{exact (Eq. 5):} &&
        \psi^*(X) &= (1-\beta) (I - \beta \tilde A)^{-1} X
      \end{align*}

    The Neumann forms are structure-aware and direction-aware for every :math:`\beta \in [0, 1)`; the iterative form may
    reverse the direction once :math:`\beta \ge 1/2` (Theorem 1). The exact form is meant for validation and small
    graphs: it is solved by conjugate gradients to a residual of 1e-6 (float32) or 1e-12 (float64) relative to
    :math:`(1-\beta) X`, up to rounding. Where they end more than a hundred times above that (:math:`\beta` too close to
    1 for the dtype, raw weights passed off as normalised ones), a :class:`RuntimeWarning` says so. A traced call cannot
    warn: there, :func:`residual` tells.

    A node without neighbours has a zero row in :math:`\tilde A`, so the Neumann forms scale its row by the factor in
    front of the sum (0.254 at :math:`\beta=0.99, L=3`, as in the published code). To keep such a row as it is, pass
    ``graph.normalize(adjacency, isolated="identity")`` with ``normalize=False``.

    Args:
      x: shape (nodes, dim) or (nodes,), floating. Computed in float32 at least and returned in its own dtype. ``vmap``
        over further axes costs no more than as many columns.
      adjacency: raw symmetric non-negative weights, shape (nodes, nodes), as :class:`jax.experimental.sparse.BCOO` (see
        :mod:`sevo_optax.graph`), BCSR, scipy sparse matrix or dense array. Under ``jit``, a BCOO argument is normalised
        on the device and cannot be checked.
      beta: number in [0, 1), possibly traced.
      num_layers: :math:`L \ge 0`, possibly traced (then without reverse-mode derivatives). Not used by the exact form.
      method: ``"neumann"``, ``"iterative"`` or ``"exact"``.
      rescale: whether the Neumann series is divided by its largest possible norm :math:`1-\beta^{L+1}` (Section 2.3,
        Theorem 2), without which steps are shorter and training slower (Figure 4a). The other two forms need none:
        their norm is at most 1 already.
      normalize: whether ``adjacency`` holds raw weights. False if it is :math:`\tilde A` already.

    Returns:
      The smoothed array, like ``x``. Derivatives with respect to ``x`` and ``beta`` are supported.

    Raises:
      TypeError: if ``x`` is not floating, or an argument has the wrong type.
      ValueError: if the shapes do not fit, the weights are not symmetric, non-negative and finite, or a number is out
        of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sevo_optax import graph, smooth
      >>> path = graph.from_edges([0, 1], [1, 2], num_nodes=3)
      >>> print(smooth(jnp.array([[1.0], [0.0], [0.0]]), path, beta=0.5, num_layers=1))
      [[0.6666667 ]
       [0.23570226]
       [0.        ]]

    References:
      Xu et al., `Graph-enhanced Optimizers for Structure-aware Recommendation Embedding Evolution
      <https://arxiv.org/abs/2310.03032>`_, 2024, Section 2

      Zhou et al., `Learning with Local and Global Consistency
      <https://papers.nips.cc/paper/2506-learning-with-local-and-global-consistency>`_, 2003
    """
    check_form(beta, num_layers, method)
    if callable(beta):
        raise TypeError("beta must be a number here; schedules belong to sevo(...)")
    x, csr = checked(x, adjacency, normalize)
    return smooth_array(x, csr, beta, num_layers, method, rescale)


def propagate(adjacency: Adjacency, x: jax.typing.ArrayLike) -> jax.Array:
    r"""Multiplies a sparse symmetric matrix with the rows of an array, in the fastest kernel of each platform.

    .. math::

      Y = A X, \qquad \frac{\partial}{\partial X} \langle G, A X \rangle = A^\top G = A G

    It is the product that :func:`smooth` repeats, for models that propagate over a graph themselves, such as a LightGCN
    layer: ``propagate(graph.normalize(weights), x)``. The derivative with respect to ``x`` is the same product once
    more, never a transpose or a scatter of its own, and ``vmap`` folds a batch into columns.

    Args:
      adjacency: symmetric non-negative weights :math:`A`, used as they are, shape (nodes, nodes), as in :func:`smooth`.
        In a model, make it an argument of the jitted step, as BCOO: concrete weights are checked on the host in every
        call, and a closed-over graph would become a constant of the program. Of a traced BCOO the values cannot be
        checked; if it is not symmetric, the derivative is wrong.
      x: shape (nodes, dim) or (nodes,), floating. Computed in float32 at least and returned in its own dtype.

    Returns:
      The product :math:`A X`, like ``x``.

    Raises:
      TypeError: if ``x`` is not floating, or ``adjacency`` no matrix.
      ValueError: if the shapes do not fit, or the weights are not symmetric, non-negative and finite.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sevo_optax import graph, propagate
      >>> weights = graph.normalize(graph.from_edges([0, 1], [1, 2], num_nodes=3))
      >>> x = jnp.array([[1.0], [0.0], [0.0]])
      >>> print(jax.jit(propagate)(weights, x))
      [[0.        ]
       [0.70710677]
       [0.        ]]

    References:
      He et al., `LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation
      <https://arxiv.org/abs/2002.02126>`_, 2020, Section 3.1
    """
    x, csr = checked(x, adjacency, normalize=False)
    return product([x], 0, csr)[0].astype(x.dtype)


def residual(
    smoothed: jax.typing.ArrayLike,
    x: jax.typing.ArrayLike,
    adjacency: Adjacency,
    *,
    beta: jax.typing.ArrayLike = 0.99,
    normalize: bool = True,
) -> jax.Array:
    r"""How far a smoothed matrix is from the exact form (Eq. 5): an upper bound of its relative error.

    With :math:`\psi^*(X) = (1-\beta) (I - \beta \tilde A)^{-1} X`,

    .. math::

      r = \frac{\| (1-\beta) X - (I - \beta \tilde A) Y \|_F}{(1-\beta) \|X\|_F}
        \ge \frac{\| Y - \psi^*(X) \|_F}{\|X\|_F}

    because no eigenvalue of :math:`I - \beta \tilde A` is below :math:`1 - \beta`. It works under ``jit`` and says
    whether ``smooth(..., method="exact")`` has converged, or how good an approximation the other forms are. The state
    of :func:`sevo` holds it for its exact form.

    Args:
      smoothed: :math:`Y`, like ``x``. In half precision, its rounding shows in the result.
      x: shape (nodes, dim) or (nodes,), floating.
      adjacency: as in :func:`smooth`.
      beta: as in :func:`smooth`.
      normalize: as in :func:`smooth`.

    Returns:
      A scalar, float32 at least. Near 1e-6 (float32) or 1e-12 (float64), plus rounding of the size of the machine
      precision over :math:`1 - \beta`, where the exact form has converged. It is absolute where ``x`` is zero.

    Raises:
      TypeError: as :func:`smooth`.
      ValueError: as :func:`smooth`, or if the shapes of ``smoothed`` and ``x`` differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sevo_optax import graph, residual, smooth
      >>> path = graph.from_edges([0, 1], [1, 2], num_nodes=3)
      >>> x = jnp.array([[1.0], [0.0], [0.0]])
      >>> bool(residual(smooth(x, path, beta=0.9, method="exact"), x, path, beta=0.9) < 1e-5)
      True
      >>> print(f"{residual(smooth(x, path, beta=0.9), x, path, beta=0.9):.1f}")  # the Neumann form with three layers
      1.3
    """
    check_form(beta, 0, "exact")
    if callable(beta):
        raise TypeError("beta must be a number here; schedules belong to sevo(...)")
    x, csr = checked(x, adjacency, normalize)
    smoothed = jnp.asarray(smoothed)
    if smoothed.shape != x.shape or not jnp.issubdtype(smoothed.dtype, jnp.floating):
        raise ValueError(
            f"smoothed must be floating of shape {x.shape}, like x, got {smoothed.dtype} of shape {smoothed.shape}"
        )
    return residual_of_leaves([smoothed], [x], 0, csr, beta)


def residual_of_leaves(
    smoothed: Sequence[jax.Array],
    leaves: Sequence[jax.Array],
    axis: int,
    csr: CSR,
    beta: jax.typing.ArrayLike,
) -> jax.Array:
    """The relative residual of the exact form over all leaves as one node set; see :func:`residual`."""
    dtype = _propagate.compute_dtype(*(leaf.dtype for leaf in leaves), csr.data.dtype)
    beta = jnp.asarray(beta, dtype)
    # Both sides are linear in X and Y: entries of size one neither overflow nor underflow when they are squared.
    largest = [jax.lax.stop_gradient(jnp.max(jnp.abs(leaf.astype(dtype)), initial=0)) for leaf in leaves]
    scale = jnp.max(jnp.stack(largest))
    scale = jnp.where(scale == 0, 1, scale)
    smoothed = [leaf.astype(dtype) / scale for leaf in smoothed]
    leaves = [leaf.astype(dtype) / scale for leaf in leaves]
    products = product(smoothed, axis, csr)
    off = sum(
        jnp.sum(((1 - beta) * x - y + beta * ay) ** 2) for x, y, ay in zip(leaves, smoothed, products, strict=True)
    )
    size = sum(jnp.sum(x**2) for x in leaves)
    return jnp.sqrt(off / jnp.where(size == 0, 1, size)) / (1 - beta)


def product(leaves: Sequence[jax.Array], axis: int, csr: CSR) -> list[jax.Array]:
    """The rows of ``leaves``, as one node set, multiplied with the graph; in float32 at least."""
    dtype = _propagate.compute_dtype(*(leaf.dtype for leaf in leaves), csr.data.dtype)

    def local(leaves: Sequence[jax.Array], csr: CSR) -> list[jax.Array]:
        csr = csr._replace(data=csr.data.astype(dtype))
        return _tables.split(_propagate.propagate(csr, _tables.stack(leaves, axis, dtype)), leaves, axis, dtype)

    return _propagate.columnwise(local, leaves, axis, csr)


def smooth_leaves(
    leaves: Sequence[jax.Array],
    axis: int,
    csr: CSR,
    beta: jax.typing.ArrayLike,
    num_layers: jax.typing.ArrayLike,
    method: Method,
    rescale: bool,
) -> tuple[list[jax.Array], jax.Array | None]:
    """Smooths the rows of ``leaves`` as one node set, in float32 at least.

    Returns:
      The smoothed leaves in their own dtypes, and the relative residual of the exact form, None for the others.
    """
    dtype = _propagate.compute_dtype(*(leaf.dtype for leaf in leaves), csr.data.dtype)
    check_rounded(beta, dtype)
    exact = method == "exact"

    def local(leaves: Sequence[jax.Array], csr: CSR, beta: jax.Array) -> list[jax.Array]:
        csr = csr._replace(data=csr.data.astype(dtype))
        matrix = _propagate.series(csr, _tables.stack(leaves, axis, dtype), beta, num_layers, method, rescale)
        # The residual is that of the solution, not of its rounding to half precision.
        return _tables.split(matrix, leaves, axis, dtype if exact else None)

    smoothed = _propagate.columnwise(local, leaves, axis, csr, jnp.asarray(beta, dtype))
    if not exact:
        return smoothed, None
    off = residual_of_leaves(smoothed, leaves, axis, csr, beta)
    return [new.astype(leaf.dtype) for new, leaf in zip(smoothed, leaves, strict=True)], off


def smooth_array(
    x: jax.Array,
    csr: CSR,
    beta: jax.typing.ArrayLike,
    num_layers: jax.typing.ArrayLike,
    method: Method,
    rescale: bool,
) -> jax.Array:
    """Smooths one array, and warns where an exact solve outside of a trace has not converged."""
    (smoothed,), off = smooth_leaves([x], 0, csr, beta, num_layers, method, rescale)
    if off is not None and not is_traced(off):
        allowed = 100 * EXACT_TOLERANCE[np.dtype(off.dtype).name]
        if not float(off) <= allowed:
            if not bool(jnp.isfinite(x).all()):
                warnings.warn("x holds NaN or infinity, and so does what is smoothed", RuntimeWarning, stacklevel=3)
                return smoothed
            warnings.warn(
                f'method="exact" has not converged: relative residual {float(off):.1e}, wanted at most {allowed:.0e}; '
                "lower beta, compute in float64, or check that the weights are normalised (normalize=True)",
                RuntimeWarning,
                stacklevel=3,
            )
    return smoothed


def checked(x: jax.typing.ArrayLike, adjacency: Adjacency, normalize: bool) -> tuple[jax.Array, CSR]:
    """Checks an array and the weights that belong to it, and prepares the weights."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be a real floating-point array, got {x.dtype}; convert it first")
    _tables.refuse_float8(x.dtype, "x")
    if x.ndim not in (1, 2):
        raise ValueError(f"x must have shape (nodes, dim) or (nodes,), got {x.shape}; use jax.vmap for more axes")
    csr = _propagate.prepare(adjacency, _propagate.compute_dtype(x.dtype), normalize)
    num_nodes = csr.indptr.shape[0] - 1
    if x.shape[0] != num_nodes:
        raise ValueError(f"x has {x.shape[0]} rows, but adjacency has {num_nodes} nodes")
    return x, csr
