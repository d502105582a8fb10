"""The items of trained models: where they lie, in two dimensions, and which are near which."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

# Of how many items neighbours are shown, and how many are drawn: what a browser searches and draws at once.
LARGEST_CATALOGUE = 20_000
LARGEST_MAP = 3_000
NEIGHBOURS = 10
ROWS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """The nearest items of each item.

    Attributes:
      items: shape (items, k), int64, rows of the table, the nearest first.
      similarities: shape (items, k), float32, their cosines.
    """

    items: np.ndarray
    similarities: np.ndarray


def item_table(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """The table that a trained model scores items by, at its best epoch.

    Args:
      directory: the run's folder.

    Returns:
      The table, shape (items, dim), float32, and the raw ids of its rows, shape (items,).

    Raises:
      CheckpointError: if nothing of the run can be read.
    """
    from models.training.checkpoints import load_run

    run = load_run(directory)
    table, _ = run.model.items(run.model.represent(run.context))
    return np.asarray(table, np.float32)[1 : len(run.item_ids)], run.item_ids[1:]


def nearest(table: np.ndarray, k: int = NEIGHBOURS) -> Neighbours:
    """The rows of a table with the largest cosine to each row; the row itself is left out.

    Args:
      table: shape (items, dim). A row of zeros is as near to one item as to another.
      k: how many; of a table with fewer other rows, all.

    Examples:
      >>> nearest(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]), k=1).items.tolist()
      [[2], [2], [0]]
    """
    k = min(k, len(table) - 1)
    norms = np.linalg.norm(table, axis=1, keepdims=True)
    unit = np.divide(table, norms, out=np.zeros_like(table), where=norms > 0)
    items, similarities = np.zeros((len(table), k), np.int64), np.zeros((len(table), k), np.float32)
    for start in range(0, len(table), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        cosines = unit[part] @ unit.T
        rows = np.arange(len(cosines))
        cosines[rows, start + rows] = -np.inf
        found = np.argpartition(-cosines, k - 1, axis=1)[:, :k] if k else np.zeros((len(rows), 0), np.int64)
        values = np.take_along_axis(cosines, found, axis=1)
        order = np.lexsort((found, -values), axis=1)
        items[part] = np.take_along_axis(found, order, axis=1)
        similarities[part] = np.take_along_axis(values, order, axis=1)
    return Neighbours(items, similarities)


def principal_components(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of the rows of a table on the two directions in which they vary most (PCA).

    The sign of a direction is the one that makes its largest coefficient positive, so that the same table always gives
    the same map.

    Args:
      table: shape (items, dim).

    Returns:
      Places, shape (items, 2), and the share of the variance that each direction has, shape (2,).

    Examples:
      >>> places, shares = principal_components(np.array([[1.0, 0.0], [3.0, 0.0], [5.0, 0.0]]))
      >>> places.tolist(), shares.tolist()
      ([[-2.0, 0.0], [0.0, 0.0], [2.0, 0.0]], [1.0, 0.0])
    """
    centred = (table - table.mean(axis=0)).astype(np.float64)
    variances, directions = np.linalg.eigh(centred.T @ centred)
    variances, directions = np.maximum(variances[::-1], 0.0), directions[:, ::-1][:, :2]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=0)[None], axis=0)
    directions = directions * np.where(largest < 0, -1.0, 1.0)
    places, shares = centred @ directions, variances[:2] / max(float(variances.sum()), 1e-30)
    if table.shape[1] == 1:  # there is no other direction
        return np.pad(places, ((0, 0), (0, 1))), np.pad(shares, (0, 1))
    return places, shares


def linked(neighbours: Neighbours, adjacency: scipy.sparse.csr_array) -> np.ndarray:
    """Which of the nearest items are neighbours in a graph as well.

    Args:
      neighbours: of the items.
      adjacency: shape (items, items), over the same rows.

    Returns:
      Shape (items, k), bool.
    """
    rows = np.repeat(np.arange(len(neighbours.items)), neighbours.items.shape[1])
    values = adjacency[rows, neighbours.items.ravel()]
    return (np.asarray(values) != 0).reshape(neighbours.items.shape)


def most_popular(counts: np.ndarray | None, num_items: int, limit: int) -> np.ndarray:
    """The rows of at most so many items, the ones with the most interactions, in ascending order.

    Args:
      counts: shape (num_items,), the interactions of each; None: not known, the first are taken.
      num_items: how many there are.
      limit: how many may be taken.
    """
    if num_items <= limit:
        return np.arange(num_items)
    if counts is None:
        return np.arange(limit)
    return np.sort(np.argsort(-counts, kind="stable")[:limit])


def names_of(item_ids: Sequence[Any], titles: Mapping[str, str] | None) -> list[str]:
    """What items are called: the title and, behind it, the id, which tells items of the same title apart."""
    ids = [str(raw) for raw in item_ids]
    known = {} if titles is None else titles
    return [f"{known[raw]} ({raw})" if known.get(raw) else raw for raw in ids]
