"""Item tables in two dimensions, by UMAP."""

import dataclasses
from pathlib import Path
from typing import Any, Self

import numpy as np

from models.config import TrainConfig
from models.files import write_bytes
from models.training.files import EMBEDDINGS

SETTINGS = {"n_neighbors": 15, "min_dist": 0.1, "metric": "euclidean", "random_state": 0}


@dataclasses.dataclass(frozen=True)
class Maps:
    """The item tables of a run, after some epochs.

    Attributes:
      places: shape (items, 2) by epoch: items 1 … num_items.
      attributes: names of attributes.
      first: shape (items,), the place in ``attributes`` of the first that each item has; -1: it has none.
    """

    places: dict[int, np.ndarray]
    attributes: tuple[str, ...]
    first: np.ndarray

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads what :meth:`write` wrote.

        Raises:
          ValueError: if it cannot be read.
        """
        try:
            with np.load(path) as file:
                places = {int(name.removeprefix("epoch")): file[name] for name in file if name.startswith("epoch")}
                return cls(dict(sorted(places.items())), tuple(file["attributes"].tolist()), file["first"])
        except Exception as error:  # a damaged archive fails in many ways
            raise ValueError(f"{path} cannot be read ({error}); delete it and its cell, and train again") from None

    def write(self, path: Path) -> None:
        """Writes a compressed archive."""
        arrays: dict[str, Any] = {f"epoch{epoch}": places.astype(np.float16) for epoch, places in self.places.items()}
        arrays |= {"attributes": np.array(self.attributes), "first": self.first.astype(np.int16)}
        write_bytes(path, lambda file: np.savez_compressed(file, **arrays))


def make_maps(folder: Path, config: TrainConfig, item_ids: np.ndarray) -> Maps:
    """Projects the item tables that a run has kept, each by itself.

    Args:
      folder: of the run.
      config: of the run: ``keep_epochs``, and where the attributes are.
      item_ids: shape (num_items + 1,), raw ids.
    """
    places = {}
    for epoch in config.keep_epochs:
        path = folder / EMBEDDINGS / f"{epoch}.npz"
        if path.is_file():  # an early end of the run has not reached the others
            with np.load(path) as file:
                places[epoch] = project(file["items"][1 : len(item_ids)])
    attributes, first = first_attributes(config, item_ids)
    return Maps(places, attributes, first)


def project(table: np.ndarray) -> np.ndarray:
    """Places of the rows of a table in two dimensions, centred and of at most size 1.

    Args:
      table: shape (items, dim).

    Returns:
      Shape (items, 2).
    """
    places = umap_class()(n_components=2, n_jobs=1, **SETTINGS).fit_transform(table)
    places = places - places.mean(axis=0)
    return places / max(float(np.abs(places).max()), 1e-12)


def umap_class() -> type:
    """UMAP itself, which is slow to import and not needed otherwise.

    Raises:
      ValueError: if it is not installed.
    """
    try:
        from umap import UMAP
    except ImportError:
        raise ValueError("maps of items need umap-learn; install it with pip install -e '.[maps]'") from None
    return UMAP


def first_attributes(config: TrainConfig, item_ids: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """The attribute that stands first in each item's line.

    Args:
      config: where the attributes are.
      item_ids: shape (num_items + 1,), raw ids.

    Returns:
      Names of all attributes, and of items 1 … num_items the place among them; -1: none.
    """
    from models.data import item_numbers, read_attributes

    items, values = read_attributes(
        config.attributes, item_column=config.attribute_item_column, attribute_column=config.attribute_column
    )
    names, codes = np.unique(values.astype(str), return_inverse=True)
    numbers = item_numbers(item_ids, items.tolist())
    first = np.full(len(item_ids), -1)
    for number, code in zip(numbers[::-1], codes[::-1], strict=True):  # the first of an item is written last
        first[number] = code
    return tuple(names.tolist()), first[1:]
