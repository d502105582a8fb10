"""Sequences of item ids, in whatever form they come, as one flat array with offsets."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sevo_optax._weights import check_ids, first, out_of_range, refuse_masked


def flatten(sequences: Any, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Checks sequences and returns their ids in one int32 array, with int64 offsets."""
    if isinstance(sequences, tuple) and len(sequences) == 2:
        items, offsets = sequences
        hint = "A tuple of two is read as (flat_items, offsets): pass several sequences as a list."
        items = check_ids(items, num_nodes, "flat_items", "num_nodes", hint=hint)
        offsets = _check_offsets(offsets, items.size, hint)
        return items.astype(np.int32, copy=False), offsets
    if isinstance(sequences, str | bytes | Mapping) or not isinstance(sequences, Iterable):
        raise TypeError(
            f"sequences is a {type(sequences).__name__}; wanted a list of integer sequences or the "
            "tuple (flat_items, offsets)."
        )
    if isinstance(sequences, jax.Array):
        sequences = np.asarray(sequences)

    pieces, lengths, number = [], [], 0
    source = iter(sequences)
    while batch := list(itertools.islice(source, 4096)):
        rows = [_as_row(row, number + index) for index, row in enumerate(batch)]
        lengths.append(np.fromiter(map(len, rows), np.int64, len(rows)))
        pieces.append(_join(rows, number, num_nodes))
        number += len(rows)
    offsets = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum()
    if not offsets[-1]:
        raise ValueError("sequences holds no items; wanted at least one interaction.")
    return np.concatenate(pieces), offsets


def _as_row(row: Any, index: int) -> Sequence[int] | np.ndarray:
    """One sequence as something with a length, items unchecked."""
    if isinstance(row, list | tuple | range):
        return row
    if hasattr(row, "__array__"):
        refuse_masked(row, f"sequences[{index}]")
        row = np.asarray(row)
        if row.ndim == 1:
            return row
        raise TypeError(
            f"sequences[{index}] has {row.ndim} dimensions; wanted one sequence of integers. "
            "Wrap a single sequence in a list: [sequence]."
        )
    if isinstance(row, Iterable) and not isinstance(row, str | bytes | Mapping | set | frozenset):
        return list(row)
    raise TypeError(
        f"sequences[{index}] is {row!r}; wanted a sequence of integers. Wrap a single sequence in a list: [sequence]."
    )


def _join(rows: list[Sequence[int] | np.ndarray], number: int, num_nodes: int) -> np.ndarray:
    """Concatenates rows of ids to int32; ``number`` is the index of the first in ``sequences``."""
    arrays = [row for row in rows if isinstance(row, np.ndarray)]
    kinds = {row.dtype.kind for row in arrays if row.size}
    # NumPy joins signed and unsigned 64-bit integers to floats: mixtures take the other way.
    if len(arrays) == len(rows) and (kinds <= {"i"} or kinds == {"u"}):
        items = np.concatenate([row for row in arrays if row.size] or [np.zeros(0, np.int32)])
    else:
        values = list(
            itertools.chain.from_iterable(row.tolist() if isinstance(row, np.ndarray) else row for row in rows)
        )
        integer = all(issubclass(kind, int | np.integer) and kind is not bool for kind in set(map(type, values)))
        try:
            items = np.fromiter(values if integer else (), np.int64, len(values) if integer else 0)
        except OverflowError:
            integer = False
        if not integer:
            _raise_for(rows, number, num_nodes)
    if items.size and (items.min() < 0 or items.max() >= num_nodes):
        _raise_for(rows, number, num_nodes)
    return items.astype(np.int32, copy=False)


def _raise_for(rows: list[Sequence[int] | np.ndarray], number: int, num_nodes: int) -> None:
    """Finds the first bad id, slowly, and names it."""
    for index, row in enumerate(rows):
        for position, item in enumerate(row):
            place = f"sequences[{number + index}][{position}]"
            if not isinstance(item, int | np.integer) or isinstance(item, bool | np.bool_):
                raise TypeError(
                    f"{place} is {item!r}; wanted an integer. "
                    "Number the items 0..num_nodes-1 and convert the ids with int."
                )
            if not 0 <= item < num_nodes:
                raise ValueError(out_of_range(place, item, num_nodes, "num_nodes"))


def _check_offsets(offsets: Any, size: int, hint: str) -> np.ndarray:
    offsets = np.asarray(offsets)
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or offsets.size < 2:
        raise ValueError(
            f"offsets has shape {offsets.shape} and dtype {offsets.dtype}; wanted integers of shape "
            f"(num_sequences + 1,). {hint}"
        )
    if offsets[0] != 0 or offsets[-1] != size:
        raise ValueError(
            f"offsets runs from {offsets[0]} to {offsets[-1]}; wanted from 0 to {size}, the length "
            f"of flat_items. {hint}"
        )
    bad = first(offsets[1:] < offsets[:-1])
    if bad is not None:
        raise ValueError(
            f"offsets[{bad + 1}] = {offsets[bad + 1]} is below offsets[{bad}] = {offsets[bad]}; "
            f"wanted offsets that never decrease. {hint}"
        )
    return offsets.astype(np.int64)
