"""The smoothing series over a graph whose rows are split over the devices of a mesh.

Every device holds some rows of Ã and of the table. A layer is one all-to-all of the rows that others need, and the
product of what a device holds with its own rows and those it has received.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sevo_optax import _propagate, _tables
from sevo_optax._propagate import Method
from sevo_optax._shards import Layout, Shards, measure, plan
from sevo_optax._smooth import check_rounded


class ShardedCSR(NamedTuple):
    """Rows of a symmetric matrix, split over devices, which all hold arrays of one size.

    Attributes:
      data: shape (shards, entries), floating; what is behind the last row is padding.
      indices: shape (shards, entries), int32, columns as positions: a device's own rows first, then those received.
      indptr: shape (shards, rows + 1), int32, where each row begins.
      send: shape (shards, shards, exchanged), int32, which of its rows a device sends to each other.
    """

    data: jax.Array
    indices: jax.Array
    indptr: jax.Array
    send: jax.Array


def axes_of(sharding: Any) -> tuple[str, ...]:
    """The mesh axes over which ``graph_sharding`` splits rows.

    Raises:
      TypeError: if it is no NamedSharding.
      ValueError: if it does not split rows, or more than those.
    """
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"graph_sharding is a {type(sharding).__name__}; wanted a jax.sharding.NamedSharding that splits rows, "
            "such as NamedSharding(mesh, PartitionSpec('model')), or None for a graph that every device holds"
        )
    entries = [entry for entry in sharding.spec if entry is not None]
    if len(entries) != 1 or sharding.spec[0] is None:
        raise ValueError(
            f"graph_sharding splits a graph by {sharding.spec}; wanted its rows alone, over one axis of the mesh or a "
            f"tuple of them, such as PartitionSpec({sharding.mesh.axis_names[-1]!r})"
        )
    return entries[0] if isinstance(entries[0], tuple) else (entries[0],)


def num_shards_of(sharding: NamedSharding) -> int:
    """Into how many parts a graph is split."""
    return math.prod(sharding.mesh.shape[name] for name in axes_of(sharding))


def to_devices(
    shards: Shards, tables: Sequence[int], sharding: NamedSharding, dtype: Any, normalize: bool
) -> ShardedCSR:
    """Reads the shards of this process one by one, each onto the devices that hold it.

    Every shard is read twice: for the degrees and sizes of all, and for its entries. With several processes, all of
    them call this function at the same time, and tell each other degrees and sizes.

    Args:
      shards: where the raw rows come from.
      tables: the number of rows of each table of the node set.
      sharding: as given by the user.
      dtype: of the weights.
      normalize: whether the rows are raw weights.

    Returns:
      The arrays, split over the devices of the mesh.
    """
    number = num_shards_of(sharding)
    layout = Layout(tables, number)
    devices: dict[int, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map((number,)).items():
        assert index is not None  # of an array with one axis it never is
        devices.setdefault(index[0].start or 0, []).append(device)

    degree = np.zeros(shards.shape[0])
    sizes = np.zeros((number, 2), np.int64)
    rows = None
    for shard in devices:
        rows = shards.read(layout.ranges(shard))
        degree[layout.nodes(shard)], *sizes[shard] = measure(rows, layout, shard)
    if jax.process_count() > 1:
        # Shards that several processes hold are the same in all of them.
        degree = _largest_of_processes(degree)
        sizes = _largest_of_processes(sizes)
    if not np.isfinite(degree).all():
        raise ValueError(
            f"the weights of node {int(np.argmin(np.isfinite(degree)))} add up to infinity. "
            "Only ratios of weights matter: divide them all by the largest."
        )
    entries, exchanged = (int(size) for size in sizes.max(axis=0))
    positions = layout.rows + number * exchanged
    if max(entries, positions) >= 2**31:
        raise ValueError(
            f"a shard of the graph has {entries} entries in {positions} positions, but 32-bit offsets hold fewer than "
            "2**31; split the graph over more devices"
        )

    fields: list[list[jax.Array]] = [[], [], [], []]
    for shard, places in devices.items():
        if len(devices) > 1 or rows is None:
            rows = shards.read(layout.ranges(shard))
        part = plan(rows, layout, shard, exchanged, degree if normalize else None)
        rows = None
        room = entries - part.data.size
        with np.errstate(over="ignore"):
            data = part.data.astype(dtype)
        if not np.isfinite(data).all():
            raise ValueError(
                f"adjacency holds the weight {part.data.max():g}, too large for {data.dtype.name}. "
                "Only ratios of weights matter: divide them all by the largest."
            )
        blocks = (np.pad(data, (0, room)), np.pad(part.indices, (0, room)), part.indptr, part.send)
        for field, block in zip(fields, blocks, strict=True):
            field += [jax.device_put(block[None], device) for device in places]
    shapes = [(number, entries), (number, entries), (number, layout.rows + 1), (number, number, exchanged)]
    return ShardedCSR(
        *(
            jax.make_array_from_single_device_arrays(shape, NamedSharding(sharding.mesh, P(sharding.spec[0])), field)
            for shape, field in zip(shapes, fields, strict=True)
        )
    )


def _largest_of_processes(values: np.ndarray) -> np.ndarray:
    """The element-wise maximum over all processes, whatever JAX's own width of numbers is."""
    from jax.experimental import multihost_utils

    words = np.ascontiguousarray(values).view(np.uint32)
    return np.asarray(multihost_utils.process_allgather(words)).view(values.dtype).max(axis=0)


def _product(graph: ShardedCSR, axes: tuple[str, ...], x: jax.Array) -> jax.Array:
    """This device's rows of Ã·X; ``x`` holds its own rows of X."""
    data, indices, indptr, send = (part[0] for part in graph)
    if send.size:
        received = jax.lax.all_to_all(x[send], axes, 0, 0, tiled=True)
        x = jnp.concatenate([x, received.reshape(math.prod(received.shape[:-1]), x.shape[1])])
    return _propagate.propagate_rows(data, indices, indptr, x)


def smooth_leaves(
    leaves: Sequence[jax.Array],
    axis: int,
    graph: ShardedCSR,
    beta: jax.typing.ArrayLike,
    num_layers: jax.typing.ArrayLike,
    method: Method,
    rescale: bool,
    sharding: NamedSharding,
) -> list[jax.Array]:
    """Smooths the rows of ``leaves`` as one node set, in float32 at least; ``graph`` is split by ``sharding``."""
    mesh, axes = sharding.mesh, axes_of(sharding)
    dtype = _propagate.compute_dtype(*(leaf.dtype for leaf in leaves), graph.data.dtype)
    check_rounded(beta, dtype)
    axis %= leaves[0].ndim

    def local(leaves: Sequence[jax.Array], graph: ShardedCSR, beta: jax.Array) -> list[jax.Array]:
        graph = graph._replace(data=graph.data.astype(dtype))
        matrix = _tables.stack(leaves, axis, dtype)
        smoothed = _propagate.terms(partial(_product, graph, axes), matrix, beta, num_layers, method, rescale)
        return _tables.split(smoothed, leaves, axis)

    # Columns that the types split over other axes of the mesh stay so; what is left to the compiler stays with it.
    shardings = [jax.typeof(leaf).sharding for leaf in leaves]
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    columns: list[Any] = [None] * leaves[0].ndim
    for other in shardings:
        if AxisType.Explicit in other.mesh.axis_types:
            for k, entry in enumerate(other.spec):
                names = entry if isinstance(entry, tuple) else (entry,)
                columns[k] = tuple(name for name in names if name is not None and name not in axes) or None
            break
    columns[axis] = None
    split = P(*columns[:axis], axes, *columns[axis + 1 :])

    def place(leaf: jax.Array, spec: P) -> jax.Array:
        return jax.sharding.reshard(leaf, NamedSharding(mesh, spec)) if explicit else leaf

    missing = [-leaf.shape[axis] % graph.send.shape[0] for leaf in leaves]
    padded = []
    for leaf, rows in zip(leaves, missing, strict=True):
        if rows:
            leaf = jnp.pad(place(leaf, P(*columns)), [(0, rows if k == axis else 0) for k in range(leaf.ndim)])
        padded.append(place(leaf, split))
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, P(axes), P()),
        out_specs=split,
        axis_names={*axes, *explicit},
        check_vma=False,
    )
    out = []
    for new, leaf, rows, own in zip(
        run(padded, graph, jnp.asarray(beta, dtype)), leaves, missing, shardings, strict=True
    ):
        if rows:
            new = jax.lax.slice_in_dim(place(new, P(*columns)), 0, leaf.shape[axis], axis=axis)
        out.append(place(new, own.spec if AxisType.Explicit in own.mesh.axis_types else P()))
    return out
