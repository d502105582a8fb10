"""The devices of a run as a mesh with two axes, and where arrays lie on it.

A mesh has the axes ``data``, over which the rows of a batch are split, and ``model``, over which tables are. Inside of
``jax.set_mesh`` the functions of this module say where an array shall lie, and the compiler's partitioner does the
rest; without a mesh they return what they are given, and a program is what it would be without them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

DATA, MODEL = "data", "model"
AXES = {DATA: "batches", MODEL: "tables"}


def parse_mesh(text: str) -> dict[str, int]:
    """Reads the sizes of a mesh's axes.

    Args:
      text: such as ``data=4,model=2``; an axis that is left out has size 1.

    Raises:
      ValueError: if an axis is unknown or given twice, or a size is no number of at least 1.

    Examples:
      >>> parse_mesh("data=4,model=2"), parse_mesh("model=8")
      ({'data': 4, 'model': 2}, {'data': 1, 'model': 8})
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (x.strip() for x in part.partition("="))
        if name not in AXES:
            known = " and ".join(f"{axis} ({what})" for axis, what in AXES.items())
            raise ValueError(f"mesh: there is no axis {name!r}; the axes are {known}, as in data=4,model=2")
        if name in sizes:
            raise ValueError(f"mesh: the axis {name} is given twice, got {text}")
        if not (size.isascii() and size.isdecimal()) or int(size) < 1:
            raise ValueError(f"mesh: {name} must be a number of devices of at least 1, got {size!r}")
        sizes[name] = int(size)
    return {name: sizes.get(name, 1) for name in AXES}


def make_mesh(text: str) -> Mesh:
    """The first devices there are, as a mesh.

    Args:
      text: as for :func:`parse_mesh`.

    Raises:
      ValueError: as :func:`parse_mesh`; or if there are fewer devices than asked for, or a process would have none.
    """
    sizes = parse_mesh(text)
    wanted, devices = sizes[DATA] * sizes[MODEL], jax.devices()
    if wanted > len(devices):
        platform = devices[0].platform
        advice = f", or set XLA_FLAGS=--xla_force_host_platform_device_count={wanted}" if platform == "cpu" else ""
        raise ValueError(
            f"mesh {text} needs {wanted} devices, and there are {len(devices)} ({platform}); "
            f"give a smaller mesh{advice}"
        )
    if wanted < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"mesh {text} has {wanted} devices, and the {jax.process_count()} processes have {len(devices)}; "
            "give a mesh of all of them"
        )
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 2, devices=devices[:wanted])


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh that a program is traced for; None: the program is for one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(AXES) == set(mesh.axis_names) else None


def size_of(axis: str) -> int:
    """How many parts an axis splits into; 1 without a mesh."""
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape[axis]


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Says over which axis of the mesh each axis of an array is split; those that are left out, and None, are whole."""
    if current_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))


def whole(tree: Any) -> Any:
    """Has every device hold the whole arrays of a tree."""
    return tree if current_mesh() is None else jax.tree.map(constrain, tree)


def fill_up(x: jax.Array, axis: str, value: jax.typing.ArrayLike = 0) -> jax.Array:
    """Fills up the first axis of an array until an axis of the mesh divides it, and splits it."""
    if current_mesh() is None:
        return x
    missing = -len(x) % size_of(axis)
    if missing:
        x = jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1)), constant_values=value)
    return constrain(x, axis)


def split_batch(batch: Any) -> Any:
    """Splits the rows of a batch over ``data``; rows in which nothing is filled fill up the last part."""
    return jax.tree.map(lambda x: fill_up(x, DATA), batch)


def split_catalogue(table: jax.Array, bias: jax.Array, num_items: int) -> tuple[jax.Array, jax.Array]:
    """Splits the rows that items are scored by over ``model``: an all-to-all at most, if they were split by columns.

    Args:
      table: shape (rows, dim), where row ``i`` is item ``i``'s.
      bias: shape (rows,).
      num_items: size of the catalogue.

    Returns:
      Both, filled up to a multiple of the parts. The bias of every row that is no item is minus infinity.
    """
    row = jnp.arange(len(bias))
    bias = jnp.where((row >= 1) & (row <= num_items), bias, -jnp.inf)
    return fill_up(table, MODEL), fill_up(bias, MODEL, -jnp.inf)


def on_each_part(
    function: Callable[..., Any], in_specs: Any, out_specs: Any, *, differentiable: bool = False
) -> Callable[..., Any]:
    """``jax.shard_map`` on the current mesh: what the function does, each device does with its own parts."""
    # Derivatives need to know what differs between devices; kernels that cannot tell go without.
    return jax.shard_map(
        function, mesh=current_mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=differentiable
    )


def take(values: jax.Array, index: jax.Array) -> jax.Array:
    """``values[index]``, where values may be split over ``data`` along their first axis; every device gets all."""
    return values[index] if current_mesh() is None else constrain(values[constrain(index)])


def sizes_in_words(sizes: Mapping[str, int]) -> str:
    """A mesh's sizes as they are given on the command line."""
    return ",".join(f"{name}={size}" for name, size in sizes.items())
