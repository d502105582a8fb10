"""Weights on the host: from whatever holds a graph to a checked CSR matrix, normalised, and back to BCOO.

Shared by the builders in :mod:`sevo_optax.graph` and by the transformation, so that both accept and refuse the same.
"""

import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.experimental import sparse as jsparse

from sevo_optax._memory import require_memory
from sevo_optax._shards import Shards

Adjacency: TypeAlias = (
    jsparse.BCOO | jsparse.BCSR | scipy.sparse.sparray | scipy.sparse.spmatrix | np.ndarray | jax.Array | Shards
)
"""Whatever holds weights of shape (nodes, nodes): BCOO, BCSR, SciPy sparse, or a dense array.

:class:`graph.Shards`, which holds some rows at a time, is for :func:`sevo` with ``graph_sharding`` alone.
"""

# How far w_ij and w_ji may lie apart, relative to the heaviest edge of nodes i and j.
_SYMMETRY_TOLERANCE = 1e-6


def raw_bcoo(csr: scipy.sparse.csr_array) -> jsparse.BCOO:
    """Like ``to_bcoo``, but refuses weights that float32 would round to no edge at all."""
    check_float32(csr)
    return to_bcoo(csr)


def check_float32(csr: scipy.sparse.csr_array) -> None:
    """Refuses weights that float32 cannot hold."""
    data = cast(csr, np.float32)
    bad = first(data == 0)
    if bad is not None:
        raise ValueError(
            f"the weight of edge ({row_of(csr, bad)}, {csr.indices[bad]}) is {csr.data[bad]:g}, too "
            "small for float32. Only ratios of weights matter: multiply them all, or drop the edge."
        )


def cast(csr: scipy.sparse.csr_array, dtype: Any) -> np.ndarray:
    """The weights in another dtype; refuses those that are too large for it."""
    with np.errstate(over="ignore", under="ignore"):
        data: np.ndarray = csr.data.astype(dtype)
    bad = first(~np.isfinite(data))
    if bad is not None:
        raise ValueError(
            f"the weight of edge ({row_of(csr, bad)}, {csr.indices[bad]}) is {csr.data[bad]:g}, "
            f"too large for {data.dtype.name}. "
            "Only ratios of weights matter: divide them all by the largest."
        )
    return data


def row_of(csr: scipy.sparse.csr_array, position: int) -> int:
    """Row that the stored entry number ``position`` belongs to."""
    return int(np.searchsorted(csr.indptr, position, side="right")) - 1


def first(mask: np.ndarray) -> int | None:
    """Position of the first True, or None."""
    if not mask.size:
        return None
    position = int(mask.argmax())
    return position if mask[position] else None


def check_weight_dtype(dtype: Any, name: str) -> None:
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(
            f"{name} has dtype {dtype}; wanted real floating-point or integer numbers. Convert them"
            + (f", for example with {name}.astype(np.float32)." if name.isidentifier() else " where they are made.")
        )


def check_matrix(adjacency: Any, name: str) -> None:
    """Checks all that can be said of a matrix without its values, which may be traced."""
    shape = tuple(adjacency.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(
            f"{name} has shape {shape}; wanted (num_nodes, num_nodes) with at least one node. "
            "For a rectangular user-item matrix use graph.user_item(...)."
        )
    check_num_nodes(shape[0], f"{name}.shape[0]")
    check_weight_dtype(adjacency.dtype, name)
    if isinstance(adjacency, jsparse.BCOO | jsparse.BCSR) and (adjacency.n_batch or adjacency.n_dense):
        raise ValueError(
            f"{name} has n_batch={adjacency.n_batch} and n_dense={adjacency.n_dense}; wanted 0 "
            "and 0. Convert it with jax.experimental.sparse.bcoo_update_layout."
        )


def _raw_csr(adjacency: Any, name: str) -> scipy.sparse.csr_array:
    """Copies any accepted representation into a float64 CSR, checking no values yet."""
    leaves = jax.tree.leaves(adjacency)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise TypeError(
            f"{name} is a traced value; a graph is prepared once on the host, in NumPy. "
            "Build and pass it outside jax.jit, jax.grad and jax.vmap."
        )
    if isinstance(adjacency, Shards):
        raise TypeError(
            f"{name} is a Shards, some rows of a graph at a time; wanted the whole graph. "
            "Shards are for sevo(..., graph_sharding=...) alone."
        )
    refuse_masked(adjacency, name)
    known = isinstance(adjacency, jsparse.BCOO | jsparse.BCSR | np.ndarray | jax.Array)
    if not (known or scipy.sparse.issparse(adjacency)):
        raise TypeError(
            f"{name} is a {type(adjacency).__name__}; wanted a BCOO, a BCSR, a SciPy sparse matrix "
            "or a dense two-dimensional array. Functions of sevo_optax.graph, such as "
            "graph.from_edges(...), build one."
        )
    check_matrix(adjacency, name)
    shape = tuple(adjacency.shape)
    num_nodes = shape[0]

    if isinstance(adjacency, jsparse.BCOO | jsparse.BCSR):
        _require(28 * adjacency.nse + 16 * num_nodes, name, shape, adjacency.nse)
        data = np.asarray(adjacency.data).astype(np.float64)
        if isinstance(adjacency, jsparse.BCOO):
            indices = np.asarray(adjacency.indices)
            row, col = indices[:, 0], indices[:, 1]
        else:
            indptr = np.asarray(adjacency.indptr)
            row = np.repeat(np.arange(num_nodes), np.diff(indptr))
            # What lies behind the last row pointer is padding.
            col, data = np.asarray(adjacency.indices)[: row.size], data[: row.size]
        if row.size and not (min(row.min(), col.min()) >= 0 and max(row.max(), col.max()) < num_nodes):
            # JAX pads with index == shape; anything else outside is a mistake in the ids.
            outside = (row < 0) | (row >= num_nodes) | (col < 0) | (col >= num_nodes)
            padding = (data == 0) | (col == num_nodes)
            if isinstance(adjacency, jsparse.BCOO):
                padding = (data == 0) | ((row == num_nodes) & (col == num_nodes))
            bad = first(outside & ~padding)
            if bad is not None:
                raise ValueError(
                    f"{name} stores the edge ({row[bad]}, {col[bad]}) with weight {data[bad]:g}; "
                    f"node ids must lie in 0..{num_nodes - 1}. "
                    "Give the matrix a larger shape or renumber the nodes."
                )
            row, col, data = row[~outside], col[~outside], data[~outside]
        return scipy.sparse.coo_array((data, (row, col)), shape=shape).tocsr()

    if scipy.sparse.issparse(adjacency):
        _require(28 * adjacency.nnz + 16 * num_nodes, name, shape, adjacency.nnz)
        csr = scipy.sparse.csr_array(adjacency.tocsr(copy=True).astype(np.float64))
        csr.check_format(full_check=True)
        return csr
    dense = np.asarray(adjacency)
    if dense.dtype not in (np.float32, np.float64):  # SciPy knows neither half precision nor ml_dtypes
        _require(8 * dense.size, name, shape, int(np.count_nonzero(dense)))
        dense = dense.astype(np.float64)
    entries = int(np.count_nonzero(dense))
    _require(dense.size + 20 * entries, name, shape, entries)
    return scipy.sparse.csr_array(dense).astype(np.float64)


def _require(needed: int, name: str, shape: tuple[int, ...], entries: int) -> None:
    require_memory(
        needed,
        f"preparing {name} of shape {shape} with {entries} entries",
        "Keep fewer edges, or prepare the graph on a machine with more memory.",
    )


def symmetric_csr(adjacency: Any, name: str = "adjacency") -> scipy.sparse.csr_array:
    """Checks raw weights and returns them as a canonical float64 CSR.

    Args:
      adjacency: BCOO, BCSR, SciPy sparse matrix or dense array of shape (nodes, nodes), of a real
        floating-point or integer dtype, non-negative and symmetric up to float32 rounding.
      name: what to call the argument in error messages.

    Returns:
      A new float64 CSR, exactly symmetric, with sorted unique column indices, without BCOO padding
      and without explicit zeros.

    Raises:
      TypeError: if ``adjacency`` is traced, no matrix, or not of a real number dtype.
      ValueError: if it is not square, or a weight is not finite, negative or not symmetric.
    """
    csr = _raw_csr(adjacency, name)
    csr.sum_duplicates()

    bad = first(~np.isfinite(csr.data))
    if bad is None:
        bad = first(csr.data < 0)
    if bad is not None:
        raise ValueError(
            f"{name}[{row_of(csr, bad)}, {csr.indices[bad]}] = {csr.data[bad]:g}; weights must be "
            "finite and non-negative. Remove the edge or repair its weight."
        )
    csr.eliminate_zeros()

    _require(16 * csr.nnz + 16 * csr.shape[0], name, csr.shape, csr.nnz)
    mirrored = csr.T.tocsr()
    mirrored.sort_indices()
    if (
        np.array_equal(csr.indptr, mirrored.indptr)
        and np.array_equal(csr.indices, mirrored.indices)
        and np.array_equal(csr.data, mirrored.data)
    ):
        return csr
    difference = csr - mirrored
    heaviest = np.maximum(*(m.max(axis=1).toarray().ravel() for m in (csr, mirrored)))
    row = np.repeat(np.arange(csr.shape[0]), np.diff(difference.indptr))
    allowed = _SYMMETRY_TOLERANCE * np.maximum(heaviest[row], heaviest[difference.indices])
    bad = first(np.abs(difference.data) > allowed)
    if bad is not None:
        i, j = int(row[bad]), int(difference.indices[bad])
        raise ValueError(
            f"{name} is not symmetric: {name}[{i}, {j}] = {csr[i, j]:.9g} but "
            f"{name}[{j}, {i}] = {csr[j, i]:.9g}; wanted equal weights. Symmetrise with "
            "graph.from_edges(sources, targets, weights, num_nodes=..., symmetrize='mean')."
        )
    # Only rounding is left, and its mean is exactly symmetric.
    mean = csr * 0.5 + mirrored * 0.5
    mean.eliminate_zeros()
    return mean


def normalize_csr(csr: scipy.sparse.csr_array, isolated: str = "zero") -> scipy.sparse.csr_array:
    """D^-1/2 A D^-1/2 in float64; ``csr`` comes from ``symmetric_csr``.

    Args:
      csr: symmetric float64 weights.
      isolated: "zero" leaves the row of a node without edges empty; "identity" puts a one on its
        diagonal.

    Returns:
      The normalised weights as a canonical float64 CSR, exactly symmetric.
    """
    check_choice(isolated, ("zero", "identity"), "isolated")
    row = np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))
    degree = np.bincount(row, weights=csr.data, minlength=csr.shape[0])
    bad = first(~np.isfinite(degree))
    if bad is not None:
        raise ValueError(
            f"the weights of node {bad} add up to infinity. "
            "Only ratios of weights matter: divide them all by the largest."
        )
    root = np.sqrt(degree)
    # One product per edge, commutative in i and j, keeps the result exactly symmetric.
    data = csr.data / (root[row] * root[csr.indices])
    out = scipy.sparse.csr_array((data, csr.indices.copy(), csr.indptr.copy()), shape=csr.shape)
    if isolated == "identity":
        out = out + scipy.sparse.diags_array((degree == 0).astype(np.float64)).tocsr()
        out.eliminate_zeros()
    return out


def to_bcoo(csr: scipy.sparse.csr_array, dtype: Any = np.float32) -> jsparse.BCOO:
    """Turns a canonical CSR into a BCOO with sorted, unique int32 indices."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    # Values and both indices, once in NumPy and once in JAX, and the row of each entry.
    _require(2 * (np.dtype(dtype).itemsize + 8) * csr.nnz + 4 * csr.nnz, "the graph", csr.shape, csr.nnz)
    data = cast(csr, dtype)
    num_nodes = csr.shape[0]
    indices = np.empty((csr.nnz, 2), np.int32)
    indices[:, 0] = np.repeat(np.arange(num_nodes, dtype=np.int32), np.diff(csr.indptr))
    indices[:, 1] = csr.indices
    kept = data != 0
    if not kept.all():  # too small for the dtype
        data, indices = data[kept], indices[kept]
    return jsparse.BCOO(
        (jnp.asarray(data), jnp.asarray(indices)),
        shape=csr.shape,
        indices_sorted=True,
        unique_indices=True,
    )


def check_choice(value: Any, choices: tuple[str, ...], name: str) -> None:
    if not isinstance(value, str) or value not in choices:
        wanted = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} is {value!r}; wanted {wanted}.")


def check_num_nodes(value: Any, name: str = "num_nodes") -> int:
    number = check_positive_int(value, name)
    if number >= 2**31:
        raise ValueError(
            f"{name} is {number}; wanted less than 2**31, because indices are stored as int32. "
            "Renumber the nodes that occur to 0..n-1."
        )
    return number


def _number(value: Any) -> Any:
    """A number out of an array without axes, such as JAX's."""
    return np.asarray(value)[()] if isinstance(value, jax.Array) and value.ndim == 0 and not is_traced(value) else value


def is_traced(value: Any) -> bool:
    """Whether a value is known only when the program runs."""
    return isinstance(value, jax.core.Tracer)


def check_positive_int(value: Any, name: str) -> int:
    value = _number(value)
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is {value!r}; wanted a positive integer.")
    if value < 1:
        raise ValueError(f"{name} is {value}; wanted a positive integer.")
    return int(value)


def out_of_range(place: str, value: Any, bound: int, bound_name: str) -> str:
    return (
        f"{place} = {value}; wanted 0..{bound - 1}, as {bound_name} is {bound}. Renumber the ids from 0, "
        f"or raise {bound_name}: ids that start at 1 need one more than there are."
    )


def refuse_masked(values: Any, name: str) -> None:
    """Refuses what NumPy would read through its mask."""
    if np.ma.is_masked(values):
        raise ValueError(
            f"{name} has masked entries, which would count as any other; leave them out, as .compressed() does, or "
            "fill them with .filled(...)."
        )


def check_vector(values: Any, name: str) -> np.ndarray:
    refuse_masked(values, name)
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} is ragged; wanted one dimension.") from error
    if array.dtype == object and array.ndim == 0:  # a generator, a set
        raise TypeError(f"{name} is a {type(values).__name__}; wanted an array or a list.")
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; wanted one dimension.")
    return array


def is_missing(value: Any) -> bool:
    """Whether a value is None, NaN, or pandas' NA or NaT, which equal nothing and yet are one object each."""
    if isinstance(value, float | np.floating):
        return math.isnan(value)
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def check_ids(values: Any, bound: int, name: str, bound_name: str, row: int = 0, hint: str = "") -> np.ndarray:
    """Node ids as a one-dimensional, non-empty integer array within 0..bound-1."""
    array = check_vector(values, name)
    if not array.size:
        raise ValueError(f"{name} is empty; wanted at least one id. {hint}".rstrip())
    if array.dtype.kind == "b":
        raise TypeError(f"{name} is a mask (dtype bool); wanted integers. Give np.flatnonzero of it. {hint}".rstrip())
    if array.dtype.kind not in "iu":
        if array.dtype.kind == "f":  # point at the fraction, if there is one
            unlike = ~(array == np.floor(array))
        else:
            unlike = np.array([isinstance(x, bool) or not isinstance(x, int | np.integer) for x in array])
        bad = first(unlike)
        advice = "Convert the ids with astype(np.int64)."
        if bad is None:
            raise TypeError(f"{name} has dtype {array.dtype}; wanted integers. {advice} {hint}".rstrip())
        if is_missing(array[bad]):
            advice = "It is missing: leave such rows out, and convert the ids with astype(np.int64)."
        raise TypeError(
            f"{name}[{row + bad}] is {array[bad]!r} (dtype {array.dtype}); wanted integers. {advice} {hint}".rstrip()
        )
    if array.min() < 0 or array.max() >= bound:
        bad = int(np.argmax((array < 0) | (array >= bound)))
        message = out_of_range(f"{name}[{row + bad}]", array[bad], bound, bound_name)
        raise ValueError(f"{message} {hint}".rstrip())
    return array


def check_weights(values: Any, size: int, name: str = "weights", row: int = 0) -> np.ndarray:
    """Weights as a float64 array of shape (size,), finite and non-negative."""
    array = check_vector(values, name)
    check_weight_dtype(array.dtype, name)
    if array.size != size:
        raise ValueError(f"{name} has length {array.size}; wanted {size}, one for each edge.")
    array = array.astype(np.float64)
    bad = first(~(np.isfinite(array) & (array >= 0)))
    if bad is not None:
        raise ValueError(
            f"{name}[{row + bad}] = {array[bad]:g}; weights must be finite and non-negative. "
            "Remove the edge or repair its weight."
        )
    return array


def check_same_length(**arrays: np.ndarray) -> None:
    (first, a), (second, b) = arrays.items()
    if a.size != b.size:
        raise ValueError(f"{first} has length {a.size} but {second} has {b.size}; wanted the same length.")


def check_non_negative(value: Any, name: str) -> None:
    value = _number(value)
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} is {value!r}; wanted a finite, non-negative number.")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value}; wanted a finite, non-negative number.")
