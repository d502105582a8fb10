"""From parameter paths to leaves, and from leaves to one (nodes, dim) matrix and back.

A path names a leaf (``item_embedding/embedding``) or a part of the tree that holds exactly one array
(``item_embedding``). Matching by the beginning of the path also absorbs the wrappers of Flax, whose leaves appear one
level deeper (``…/embedding/value``) in ``init`` than in ``update``.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Tables = str | Sequence[str] | None


def canonicalize(tables: Tables) -> tuple[str, ...] | None:
    """Checks the ``tables`` argument and returns it as a tuple of paths, or None."""
    if tables is None:
        return None
    paths = (tables,) if isinstance(tables, str) else tables
    if not isinstance(paths, (tuple, list)) or not all(isinstance(path, str) for path in paths):
        raise TypeError(f"tables must be a path such as 'item_embedding', a tuple of paths, or None, got {tables!r}")
    paths = tuple(paths)
    stripped = {path.strip("/") for path in paths}
    if not paths or "" in stripped:
        raise ValueError(
            f"tables must name at least one path and none may be empty, got {tables!r}; "
            "None stands for the only array of the tree"
        )
    if len(stripped) < len(paths):
        raise ValueError(f"tables must name each path once, got {tables!r}")
    return paths


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def label(name: str, names: Sequence[str]) -> str:
    """A leaf's path, one of all ``names``, as error messages show it."""
    return repr(_short(name, names)) if name else "the tree itself"


def _short(name: str, names: Sequence[str]) -> str:
    """A path without the ``/value`` that Flax adds, where no other path begins like it."""
    short = name.removesuffix("/value")
    return name if any(other != name and other.startswith(f"{short}/") for other in names) else short


def _describe(names: Sequence[str], leaves: Sequence[Any]) -> str:
    lines = [
        f"  {_short(name, names) or '(the tree itself)'}: "
        f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(getattr(leaf, 'shape', ()))}"
        for name, leaf in zip(names, leaves, strict=True)
    ]
    return "\n".join(["the tree holds:", *lines])


def _suggest(names: Sequence[str], leaves: Sequence[Any], num_nodes: int | None) -> str:
    """The argument to write: the largest matrix, of those with the right number of rows if there is one."""
    matrices = [i for i, leaf in enumerate(leaves) if len(getattr(leaf, "shape", ())) >= 2]
    fitting = [i for i in matrices if num_nodes in leaves[i].shape] or matrices
    if not fitting:
        return "name the embedding table by its path"
    best = max(fitting, key=lambda i: (len(leaves[i].shape) == 2, math.prod(leaves[i].shape)))
    return f"name the embedding table, as in tables={_short(names[best], names)!r}"


def find(
    tree: Any, tables: tuple[str, ...] | None, num_nodes: int | None = None
) -> tuple[list[int], list[Any], list[str], Any]:
    """Finds the leaves that ``tables`` names.

    Args:
      tree: any pytree of arrays.
      tables: canonical paths, or None for the only leaf of the tree.
      num_nodes: the number of rows of the table, if known, for a better suggestion in the error message.

    Returns:
      ``(positions, leaves, names, treedef)``: the positions of the named leaves in the flattened tree, in the caller's
      order, and the flattened tree itself.

    Raises:
      ValueError: if a path matches no leaf or several, two paths the same one, or no path is given for several leaves.
    """
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    names = [_name(path) for path, _ in with_paths]
    leaves = [leaf for _, leaf in with_paths]
    if not leaves:
        raise ValueError(
            f"tables: the tree holds no array{'' if tables is None else ', and none at ' + ', '.join(tables)}; under "
            "optax.masked or optax.partition, the mask or the labels must leave the table to this transformation"
        )
    if tables is None:
        if len(leaves) != 1:
            raise ValueError(
                f"tables=None needs a tree with exactly one array, but this one holds {len(leaves)}; "
                f"{_suggest(names, leaves, num_nodes)}; {_describe(names, leaves)}"
            )
        return [0], leaves, names, treedef
    positions = []
    for path in tables:
        bare = path.strip("/")
        matches = _matches(path, names) or _matches(bare, names) or _matches(bare.removesuffix("/value"), names)
        if len(matches) != 1:
            found = "matches no array" if not matches else f"matches {len(matches)} arrays"
            advice = "" if matches else f"{_suggest(names, leaves, num_nodes)}; "
            raise ValueError(
                f"tables: the path {path!r} {found}, but it must name exactly one; {advice}{_describe(names, leaves)}"
            )
        positions += matches
    if len(set(positions)) < len(positions):
        raise ValueError(f"tables: {tables!r} names the same array twice; {_describe(names, leaves)}")
    return positions, leaves, names, treedef


def _matches(path: str, names: Sequence[str]) -> list[int]:
    return [i for i, name in enumerate(names) if name == path or name.startswith(path + "/")]


def resolve_axis(node_axis: Any, shapes: Sequence[tuple[int, ...]], num_nodes: int | None = None) -> int:
    """Returns ``node_axis`` as an int.

    ``optax.inject_hyperparams`` traces every integer. If that happened, the axis whose lengths add up to ``num_nodes``
    is taken, provided that only one does.
    """
    try:
        return operator.index(node_axis)
    except jax.errors.TracerIntegerConversionError:
        pass
    except TypeError:
        raise TypeError(f"node_axis must be an integer, got {node_axis!r}") from None
    fits = [
        axis for axis in range(min(len(shape) for shape in shapes)) if sum(shape[axis] for shape in shapes) == num_nodes
    ]
    if len(fits) != 1:
        raise TypeError(
            "node_axis is traced and the shapes do not tell which axis it is; keep it static with "
            "optax.inject_hyperparams(..., static_args=('node_axis',))"
        )
    return fits[0]


def check_axis(axis: int, position: int, leaves: Sequence[Any], names: Sequence[str]) -> None:
    """Checks that the leaf at ``position`` has an axis of this number."""
    shape = list(leaves[position].shape)
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"node_axis={axis} is no axis of {label(names[position], names)} with shape {shape}; "
            f"{_describe(names, leaves)}"
        )


def check_is_array(position: int, leaves: Sequence[Any], names: Sequence[str]) -> None:
    """Checks that the leaf at ``position`` has a shape and a dtype."""
    if not hasattr(leaves[position], "dtype"):
        raise TypeError(
            f"tables: {label(names[position], names)} must be an array, got {type(leaves[position]).__name__}; "
            f"{_describe(names, leaves)}"
        )


def refuse_float8(dtype: Any, what: str) -> None:
    """Refuses floats of eight bits and less: JAX promotes them to nothing, and no update survives their rounding."""
    if jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 2:
        raise TypeError(
            f"{what} has dtype {jnp.dtype(dtype).name}; wanted float16, bfloat16, float32 or float64. "
            "Keep the parameters in bfloat16 at least and cast them where the model uses them"
        )


def check(
    positions: Sequence[int],
    leaves: Sequence[Any],
    names: Sequence[str],
    node_axis: Any,
    num_nodes: int,
) -> int:
    """Checks that the chosen leaves form the node set of the graph, from shapes and dtypes alone.

    Returns:
      The node axis.

    Raises:
      TypeError: if a leaf is no real floating-point array.
      ValueError: if the row count or the widths do not fit.
    """
    for i in positions:
        dtype = getattr(leaves[i], "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"tables: {label(names[i], names)} must be a real floating-point array, got "
                f"{dtype or type(leaves[i]).__name__}; {_describe(names, leaves)}"
            )
        refuse_float8(dtype, f"tables: {label(names[i], names)}")
    shapes = [tuple(leaves[i].shape) for i in positions]
    axis = resolve_axis(node_axis, shapes, num_nodes)
    for i in positions:
        check_axis(axis, i, leaves, names)
    rows = [shape[axis] for shape in shapes]
    if sum(rows) != num_nodes:
        counted = " + ".join(map(str, rows))
        raise ValueError(
            f"adjacency has {num_nodes} nodes, but the chosen tables have {counted} rows along axis {axis}; a table "
            "and its graph must count the same nodes (padding and mask rows included), and a (dim, nodes) table needs "
            f"node_axis=1; {_describe(names, leaves)}"
        )
    widths = {_width(shape, axis) for shape in shapes}
    if len(widths) > 1:
        raise ValueError(
            f"tables stacked as one node set must have one width, got {sorted(widths)}; {_describe(names, leaves)}"
        )
    return axis


def _width(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    rest = list(shape)
    del rest[axis]
    return tuple(rest)


def stack(leaves: Sequence[jax.Array], axis: int, dtype: Any) -> jax.Array:
    """The rows of all leaves, in this order, as one matrix of shape (nodes, dim) and of ``dtype``."""
    rows = [jnp.moveaxis(leaf, axis, 0) for leaf in leaves]
    blocks = [block.reshape(block.shape[0], math.prod(block.shape[1:])).astype(dtype) for block in rows]
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks)


def split(matrix: jax.Array, leaves: Sequence[jax.Array], axis: int, dtype: Any = None) -> list[jax.Array]:
    """The inverse of :func:`stack`: arrays with the shapes of ``leaves``, of ``dtype`` or, if None, of their dtypes."""
    out = []
    start = 0
    for leaf in leaves:
        shape = (leaf.shape[axis], *_width(leaf.shape, axis))
        block = jax.lax.slice_in_dim(matrix, start, start + shape[0])
        out.append(jnp.moveaxis(block.reshape(shape), 0, axis).astype(dtype or leaf.dtype))
        start += shape[0]
    return out
