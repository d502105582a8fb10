"""The sparse product Ã·X, lowered for each backend, and the smoothing series built on it.

The product is one JAX primitive so that each transformation does the right thing once and for all: every platform gets
its fastest kernel at lowering time (also when exporting for another platform), ``vmap`` folds the batch into columns
instead of leaving the fast kernel, and the transpose of a symmetric matrix is the matrix.

A column of the product needs that column of X alone. On several devices a table is therefore split by columns while it
is smoothed: see :func:`columnwise` for meshes whose shardings are part of the types, and ``_lower_cpu`` for those where
the compiler chooses them.
"""

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sevo_optax import _weights

Method = Literal["neumann", "iterative", "exact"]
METHODS = get_args(Method)

# Relative residual at which the Krylov solve of ``method="exact"`` stops, by dtype of the computation.
EXACT_TOLERANCE = {"float32": 1e-6, "float64": 1e-12}


class CSR(NamedTuple):
    """A symmetric (nodes, nodes) matrix by compressed rows, as plain arrays so that it can live in an optimizer state.

    Attributes:
      data: shape (edges,), floating.
      indices: shape (edges,), int32, the column of each entry.
      indptr: shape (nodes + 1,), int32, where each row begins.
    """

    data: jax.Array
    indices: jax.Array
    indptr: jax.Array


def to_device(matrix: Any, dtype: Any) -> CSR:
    """Copies a scipy CSR matrix to the default device in ``dtype``."""
    if matrix.nnz >= 2**31:
        raise ValueError(
            f"adjacency has {matrix.nnz} entries, but 32-bit offsets hold fewer than 2**31; "
            "sparsify it first, for example with graph.top_k"
        )
    # Copies, not views of host memory: only buffers that JAX owns can be donated.
    return CSR(
        jnp.array(_weights.cast(matrix, dtype)),
        jnp.array(matrix.indices, jnp.int32),
        jnp.array(matrix.indptr, jnp.int32),
    )


def prepare(adjacency: Any, dtype: Any, normalize: bool) -> CSR:
    """Turns raw weights into the normalised CSR arrays used by :func:`propagate`.

    Concrete weights are checked and normalised on the host in float64. A traced BCOO (an argument of a jitted function)
    cannot be inspected: its shape and layout are checked, its values are normalised on the device and taken on trust.
    """
    if isinstance(adjacency, sparse.BCOO) and any(
        isinstance(part, jax.core.Tracer) for part in (adjacency.data, adjacency.indices)
    ):
        return _prepare_traced(adjacency, dtype, normalize)
    matrix = _weights.symmetric_csr(adjacency)
    return to_device(_weights.normalize_csr(matrix) if normalize else matrix, dtype)


def _prepare_traced(adjacency: sparse.BCOO, dtype: Any, normalize: bool) -> CSR:
    _weights.check_matrix(adjacency, "adjacency")
    num_nodes = adjacency.shape[0]
    # The number of nodes need not fit into narrow indices. And where the weights alone differ between devices, JAX's
    # sorting has a wrong derivative (0.10).
    parts = _vary_alike((adjacency.data, adjacency.indices.astype(jnp.int32)))
    adjacency = sparse.BCOO(parts, shape=adjacency.shape, indices_sorted=adjacency.indices_sorted)
    if not adjacency.indices_sorted:
        adjacency = adjacency.sort_indices()
    rows, columns = adjacency.indices[:, 0], adjacency.indices[:, 1]
    data = adjacency.data.astype(dtype)
    if normalize:
        degree = jax.ops.segment_sum(data, rows, num_nodes)
        scale = jnp.where(degree > 0, jax.lax.rsqrt(jnp.where(degree > 0, degree, 1)), 0)
        # Entries past the last row or column are BCOO's padding: they must stay out of range of every gather.
        data = data * scale.at[rows].get(mode="fill", fill_value=0)
        data = data * scale.at[columns].get(mode="fill", fill_value=0)
    data = jnp.where((rows < num_nodes) & (columns < num_nodes), data, 0)
    indptr = jnp.searchsorted(rows, jnp.arange(num_nodes + 1)).astype(jnp.int32)
    return CSR(data, jnp.clip(columns, 0, num_nodes - 1).astype(jnp.int32), indptr)


def _rows(indices: jax.Array, indptr: jax.Array) -> jax.Array:
    """The row of each entry, shape (edges,). Padding behind the last row gets ``nodes``."""
    ends = jnp.zeros(indices.shape[0] + 1, indptr.dtype).at[indptr[1:]].add(1)
    return jnp.cumsum(ends[:-1], dtype=indptr.dtype)


def _segment_kernel(data: jax.Array, indices: jax.Array, indptr: jax.Array, x: jax.Array) -> jax.Array:
    rows = _rows(indices, indptr)
    return jax.ops.segment_sum(data[:, None] * x[indices], rows, indptr.shape[0] - 1, indices_are_sorted=True)


def _csr_kernel(data: jax.Array, indices: jax.Array, indptr: jax.Array, x: jax.Array) -> jax.Array:
    return sparse.BCSR((data, indices, indptr), shape=(indptr.shape[0] - 1, x.shape[0])) @ x


def _column_spec(shape: Sequence[int], spec: Sequence[Any], axis: int, mesh_shape: Any) -> P:
    """Moves the mesh axes that split ``axis`` to another axis of the array, or drops them if none can be split so."""
    names = [() if entry is None else entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    names += [()] * (len(shape) - len(names))
    moved, names[axis] = names[axis], ()
    for k in reversed(range(len(shape))):
        if k != axis % len(shape) and shape[k] % math.prod(mesh_shape[name] for name in names[k] + moved) == 0:
            names[k] += moved
            break
    return P(*(entry or None for entry in names))


def columnwise(
    fun: Callable[..., list[jax.Array]], leaves: Sequence[jax.Array], axis: int, *whole: Any
) -> list[jax.Array]:
    """Calls ``fun(leaves, *whole)``, where every device sees all rows of its share of the columns.

    Matters only where shardings are part of the types (``jax.sharding.AxisType.Explicit``). Columns that are split
    already stay where they are. Split rows are exchanged for split columns once before and once after the call.

    Inside of :func:`jax.shard_map`, all arguments vary between devices as far as one does, as in JAX's own products.

    Args:
      fun: returns arrays like ``leaves`` and treats their columns independently.
      leaves: arrays that agree on all axes but ``axis``.
      axis: the axis of the rows.
      *whole: further arguments, the same on every device.

    Returns:
      What ``fun`` returns, sharded as ``leaves`` are.
    """
    shardings = [jax.typeof(leaf).sharding for leaf in leaves]
    explicit = [i for i, sharding in enumerate(shardings) if AxisType.Explicit in sharding.mesh.axis_types]
    if not explicit:
        leaves, whole = _vary_alike((list(leaves), whole))
        return fun(leaves, *whole)
    first: Any = leaves[explicit[0]]
    spec = shardings[explicit[0]].spec
    # A type knows an abstract mesh; outside of jit, devices are needed.
    mesh = shardings[explicit[0]].mesh if isinstance(first, jax.core.Tracer) else first.sharding.mesh
    columns = _column_spec(first.shape, spec, axis, mesh.shape)
    # Inside, nothing is left for the compiler to decide, and no kernel needs to know about meshes.
    local = jax.shard_map(fun, mesh=mesh, in_specs=(columns, *(P() for _ in whole)), out_specs=columns, check_vma=False)
    out = local(
        [jax.sharding.reshard(leaf, NamedSharding(mesh, columns)) for leaf in leaves],
        *jax.sharding.reshard(whole, NamedSharding(mesh, P())),
    )
    return [
        jax.sharding.reshard(leaf, NamedSharding(mesh, sharding.spec if i in explicit else P()))
        for i, (leaf, sharding) in enumerate(zip(out, shardings, strict=True))
    ]


def _vary_alike(tree: Any) -> Any:
    """Has all arrays vary over the manual axes that one of them varies over; derivatives are summed over these."""
    tree = jax.tree.map(jnp.asarray, tree)
    union = frozenset[Any]().union(*map(_varying, jax.tree.leaves(tree)))

    def vary(x: jax.Array) -> jax.Array:
        axes = tuple(union - _varying(x))
        if not axes:
            return x
        lax: Any = jax.lax  # jax 0.7 has the older name alone
        varying: jax.Array = lax.pcast(x, axes, to="varying") if hasattr(lax, "pcast") else lax.pvary(x, axes)
        return varying

    return jax.tree.map(vary, tree)


def _varying(x: jax.Array) -> frozenset[Any]:
    """The manual axes of a mesh over which an array's type says that it differs."""
    aval: Any = jax.typeof(x)
    found: frozenset[Any] = aval.mat.varying if hasattr(aval, "mat") else aval.vma
    return found


_propagate_p = Primitive("sevo_propagate")


@_propagate_p.def_abstract_eval
def _(data: Any, indices: Any, indptr: Any, x: Any, *, symmetric: bool) -> Any:
    del indices
    if data.dtype != x.dtype:
        raise TypeError(f"propagate needs one dtype, got data {data.dtype} and x {x.dtype}")
    # Typed with a sharding, x is whole or split by columns, and so is the result: see `columnwise`.
    return (
        x.update(weak_type=False) if symmetric else x.update(shape=(indptr.shape[0] - 1, x.shape[1]), weak_type=False)
    )


@partial(jax.jit, static_argnames="symmetric")
def _propagate_jit(*args: jax.Array, symmetric: bool) -> jax.Array:
    return _propagate_p.bind(*args, symmetric=symmetric)


def _propagate_impl(*args: jax.Array, symmetric: bool) -> jax.Array:
    # Under jax.disable_jit(), the jitted function would bind the primitive once more, and so on for ever.
    with jax.disable_jit(False):
        return _propagate_jit(*args, symmetric=symmetric)


_propagate_p.def_impl(_propagate_impl)


def _lower(kernel: Callable[..., jax.Array]) -> Callable[..., Any]:
    return mlir.lower_fun(lambda *args, symmetric: kernel(*args), multiple_results=False)


def _lower_cpu(ctx: Any, *args: Any, symmetric: bool) -> Any:
    """Takes the compressed-row kernel, several times faster than any gather and scatter that XLA emits, if it may.

    The compiler cannot look into that kernel and would gather a sharded table around it, so where sharding is left to
    the compiler, the program keeps the form that it can split by columns.
    """
    context: Any = getattr(ctx.module_context, "axis_context", None)
    if hasattr(context, "manual_axes"):
        local = set(context.manual_axes) == set(context.mesh.axis_names)
    else:
        local = getattr(context, "num_devices", 1) == 1
    return _lower(_csr_kernel if local else _segment_kernel)(ctx, *args, symmetric=symmetric)


mlir.register_lowering(_propagate_p, _lower(_segment_kernel))
mlir.register_lowering(_propagate_p, _lower_cpu, platform="cpu")


def _propagate_transpose(
    cotangent: Any, data: Any, indices: Any, indptr: Any, x: Any, *, symmetric: bool
) -> tuple[Any, None, None, Any]:
    cotangent = ad.instantiate_zeros(cotangent)
    if ad.is_undefined_primal(x):
        if symmetric:
            return None, None, None, _propagate(data, indices, indptr, cotangent, True)
        rows = _rows(indices, indptr)
        spread = data[:, None] * cotangent[rows]
        return None, None, None, jax.ops.segment_sum(spread, indices, x.aval.shape[0])
    return jnp.sum(cotangent[_rows(indices, indptr)] * x[indices], axis=1), None, None, None


def _propagate_batch(args: Any, dims: Any, *, symmetric: bool) -> tuple[jax.Array, int]:
    if all(dim is None for dim in dims[:3]):
        # Columns are independent: (batch, nodes, dim) is one product over (nodes, batch * dim).
        def local(leaves: Sequence[jax.Array], csr: CSR) -> list[jax.Array]:
            (x,) = leaves
            replicas, dim = x.shape[1:]  # one of them may be 0, so that -1 tells nothing
            product = _propagate(*csr, x.reshape(x.shape[0], replicas * dim), symmetric)
            return [product.reshape(product.shape[0], replicas, dim)]

        return columnwise(local, [jnp.moveaxis(args[3], dims[3], 1)], 0, CSR(*args[:3]))[0], 1
    return jax.vmap(_segment_kernel, in_axes=tuple(dims))(*args), 0


# A tangent of the weights need not be symmetric, hence the flag.
ad.defjvp(
    _propagate_p,
    lambda dot, data, indices, indptr, x, symmetric: _propagate(dot, indices, indptr, x, False),
    None,
    None,
    lambda dot, data, indices, indptr, x, symmetric: _propagate(data, indices, indptr, dot, symmetric),
)
ad.primitive_transposes[_propagate_p] = _propagate_transpose
batching.primitive_batchers[_propagate_p] = _propagate_batch


def _propagate(data: jax.Array, indices: jax.Array, indptr: jax.Array, x: jax.Array, symmetric: bool) -> jax.Array:
    return _propagate_p.bind(data, indices, indptr, x, symmetric=symmetric)


def propagate(csr: CSR, x: jax.Array) -> jax.Array:
    """The product Ã·X.

    Args:
      csr: the symmetric matrix Ã, (nodes, nodes).
      x: shape (nodes, dim), of the dtype of ``csr.data``.

    Returns:
      An array like ``x``.
    """
    return _propagate(*csr, x, True)


def propagate_rows(data: jax.Array, indices: jax.Array, indptr: jax.Array, x: jax.Array) -> jax.Array:
    """The product of some rows of a matrix, shape (rows, nodes), with ``x``, shape (nodes, dim)."""
    return _propagate(data, indices, indptr, x, False)


def compute_dtype(*dtypes: Any) -> Any:
    """The dtype in which tables of ``dtypes`` are smoothed: at least float32 (half precision loses the tail)."""
    return jnp.result_type(jnp.float32, *dtypes)


def series(
    csr: CSR,
    x: jax.Array,
    beta: jax.typing.ArrayLike,
    num_layers: Any,
    method: Method,
    rescale: bool,
) -> jax.Array:
    """Smooths ``x`` (nodes, dim) over the graph; see :func:`sevo_optax.smooth` for the equations.

    ``x`` and the result have the dtype of ``csr.data``.
    """
    beta = jnp.asarray(beta, x.dtype)
    if isinstance(num_layers, jax.core.Tracer):
        return _series(csr, x, beta, num_layers, method, rescale)
    return _series_jit(csr, x, beta, operator.index(num_layers), method, rescale)


def _series(
    csr: CSR, x: jax.Array, beta: jax.Array, num_layers: jax.typing.ArrayLike, method: Method, rescale: bool
) -> jax.Array:
    return terms(partial(propagate, csr), x, beta, num_layers, method, rescale)


def terms(
    product: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    beta: jax.Array,
    num_layers: jax.typing.ArrayLike,
    method: Method,
    rescale: bool,
) -> jax.Array:
    """The series for any linear ``product``, see :func:`series`."""
    if method == "exact":
        tolerance = EXACT_TOLERANCE[np.dtype(x.dtype).name]
        # The solver squares its residuals: those of small gradients would vanish. Powers of two change no digit.
        scale = jnp.ldexp(
            jnp.ones((), x.dtype), jnp.frexp(jnp.max(jnp.abs(jax.lax.stop_gradient(x)), initial=0))[1] - 1
        )
        solution, _ = jax.scipy.sparse.linalg.cg(
            lambda y: y - beta * product(y),
            (1 - beta) * (x / scale),
            x0=x / scale,
            tol=tolerance,
            maxiter=_most_iterations(jax.lax.stop_gradient(beta), tolerance),
        )
        return solution * scale
    # Without the loop, a batch stays folded from one product to the next, and nothing is copied into the loop's carry.
    unroll = True if isinstance(num_layers, int) and num_layers <= 8 else None
    if method == "iterative":
        return jax.lax.fori_loop(0, num_layers, lambda _, y: beta * product(y) + (1 - beta) * x, x, unroll=unroll)

    # Horner's rule for Σ βˡÃˡ: one product and one fused multiply-add a term. The same recurrence on the number 1 gives
    # Σ βˡ = (1 - β^{L+1}) / (1 - β) without the cancellation of that quotient near β = 1.
    def term(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, norm = carry
        return x + beta * product(total), 1 + beta * norm

    total, norm = jax.lax.fori_loop(0, num_layers, term, (x, jnp.ones_like(beta)), unroll=unroll)
    return total / norm if rescale else (1 - beta) * total


def _most_iterations(beta: jax.Array, tolerance: float) -> jax.Array:
    """How many iterations the conjugate gradients may take: twice what their bound of convergence asks for.

    The condition number is at most κ = (1 + β) / (1 - β), and each iteration shrinks the error by (√κ - 1) / (√κ + 1).
    A matrix that is not normalised, or a β too close to 1 for the dtype, must end as well, without a solution.
    """
    condition = (1 + beta) / (1 - beta)
    needed = jnp.sqrt(condition) * jnp.log(4 * condition**1.5 / tolerance) / 2
    return jnp.minimum(10 + jnp.ceil(2 * needed), 1e5).astype(jnp.int32)


# Eager calls find their program in the cache, although each of them makes new closures for the loop.
_series_jit = jax.jit(_series, static_argnames=("num_layers", "method", "rescale"), inline=True)
