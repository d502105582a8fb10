"""Vectors of items: embeddings of texts or pictures, or of another model, as they are kept in a file."""

import zipfile
from pathlib import Path

import numpy as np

from models.checks import first_line
from models.data.ids import ids_from_arrays, ids_to_arrays, item_numbers
from models.files import write_bytes

WANTED = (
    "wanted an .npz with item_ids, shape (n,), and vectors, shape (n, dim), or an .npy with one row for each row of "
    "the item table"
)


def write_item_vectors(path: Path, item_ids: np.ndarray, vectors: np.ndarray) -> None:
    """Writes vectors of items, for :func:`read_item_vectors`.

    Args:
      path: an .npz to write, as a whole or not at all.
      item_ids: shape (items,), raw ids, numbers or text.
      vectors: shape (items, dim), row ``r`` for item ``item_ids[r]``.

    Raises:
      OSError: if it cannot be written.
    """
    arrays = ids_to_arrays(item_ids) | {"vectors": vectors}
    write_bytes(path, lambda file: np.savez(file, **arrays))


def read_item_vectors(path: Path, item_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads vectors of items, and numbers them as a catalogue does.

    An ``.npz`` holds two arrays: ``item_ids``, shape (n,), each item's raw id as it stands in the data, numbers or text
    (for text of very different lengths, ``item_ids_utf8`` and ``item_ids_ends`` instead, see
    :func:`models.data.ids_to_arrays`), and ``vectors``, shape (n, dim), real and finite: row ``r`` belongs to item
    ``item_ids[r]``. Rows may stand in any order, each item has one at most, and rows of unknown items are passed over.

    An ``.npy`` holds the vectors alone, shape (num_items + 1, dim): row ``i`` belongs to item number ``i``, in the
    order of ``items.npz`` in a run's folder, and row 0 to none. Every item has a vector then.

    Args:
      path: the file.
      item_ids: shape (num_items + 1,), the catalogue's raw ids, entry 0 for no item.

    Returns:
      ``(vectors, known)``: shape (num_items + 1, dim), zeros where an item has none, and shape (num_items + 1,), bool,
      whether it has one.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no such file, or has a vector for no item of the catalogue.

    Examples:
      >>> import tempfile
      >>> file = Path(tempfile.mkdtemp()) / "items.npz"
      >>> write_item_vectors(file, np.array(["pear", "kiwi", "plum"]), np.array([[1.0], [2.0], [3.0]]))
      >>> vectors, known = read_item_vectors(file, np.array(["", "plum", "apple", "pear"]))
      >>> vectors.ravel().tolist(), known.tolist()
      ([0.0, 3.0, 0.0, 1.0], [False, True, False, True])
    """
    if not path.exists():
        raise FileNotFoundError(f"vectors: {path} does not exist")
    try:
        # NumPy leaves a file open that it has opened itself and finds damaged.
        with path.open("rb") as file:
            found = np.load(file)
            if isinstance(found, np.ndarray):
                raw, vectors = None, found
            else:
                with found as arrays:
                    raw, vectors = ids_from_arrays(arrays), arrays["vectors"]
    except KeyError as error:
        raise ValueError(f"vectors: {path} lacks an array ({str(error).strip(chr(34))}); {WANTED}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = first_line(error)
        if "pickle" in reason:
            reason = "an array of Python objects, or no file of NumPy's; write text ids with dtype str"
        raise ValueError(f"vectors: {path} cannot be read ({reason}); {WANTED}") from None
    if vectors.ndim != 2 or not vectors.shape[1] or vectors.dtype.kind not in "fiu":
        raise ValueError(f"vectors: {path} holds {vectors.dtype}{list(vectors.shape)}; {WANTED}")
    rows = len(item_ids)
    if raw is None:
        if len(vectors) != rows:
            raise ValueError(
                f"vectors: {path} has {len(vectors):,} rows, but the item table has {rows:,}, row 0 included, which is "
                "no item; give an .npz with item_ids beside the vectors, and they are matched"
            )
        numbers, vectors = np.arange(1, rows), vectors[1:]
    else:
        if raw.shape != (len(vectors),):
            raise ValueError(
                f"vectors: {path} has item_ids of shape {raw.shape} for {len(vectors):,} vectors; wanted one a vector"
            )
        numbers = item_numbers(item_ids, raw.tolist())
        if not numbers.any():
            raise ValueError(
                f"vectors: no item of {path} is among the items of the data; the first is {raw[0]}, those look like "
                f"{item_ids[1]}"
                if len(raw)
                else f"vectors: {path} holds no item; {WANTED}"
            )
        known_rows = numbers > 0
        numbers, vectors, raw = numbers[known_rows], vectors[known_rows], raw[known_rows]
        twice = np.flatnonzero(np.bincount(numbers, minlength=rows) > 1)
        if twice.size:
            raise ValueError(f"vectors: {path} has several vectors of item {item_ids[twice[0]]}; keep one of them")
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size:
        raise ValueError(
            f"vectors: {path} holds NaN or infinity for item {item_ids[numbers[bad[0]]]}; "
            "repair its vector, or leave it out"
        )
    table = np.zeros((rows, vectors.shape[1]), np.float64 if vectors.dtype == np.float64 else np.float32)
    table[numbers] = vectors
    known = np.zeros(rows, bool)
    known[numbers] = True
    return table, known
