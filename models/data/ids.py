"""Raw ids: what users and items are called in the data, as arrays and as numbers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# Arrays of fixed width serve most ids best. A few long ones among many short ones would make them huge.
SMALL = 1 << 24
WASTEFUL = 8


def text_ids(ids: Sequence[str]) -> np.ndarray:
    """Text ids as an array.

    Args:
      ids: none may end with NUL, which text of fixed width cannot tell from its own end.

    Returns:
      Shape (ids,), text of fixed width; of variable width where that would take much more memory than the ids.

    Examples:
      >>> text_ids(["plum", "pear"]).dtype, text_ids(["plum"] * 999 + ["x" * 10**6]).dtype
      (dtype('<U4'), StringDType())
    """
    lengths = [len(raw) for raw in ids]
    fixed = 4 * len(ids) * max(lengths, default=0)
    return np.array(ids, dtype=np.dtypes.StringDType() if fixed > max(SMALL, WASTEFUL * sum(lengths)) else str)


def ids_to_arrays(ids: np.ndarray, name: str = "item_ids") -> dict[str, np.ndarray]:
    """Ids as arrays that ``np.savez`` writes without pickle, for :func:`ids_from_arrays`.

    Args:
      ids: shape (ids,), numbers or text.
      name: what to call them.

    Returns:
      The ids as they are; if they are text of variable width, their bytes and where each id ends, under longer names.
    """
    if ids.dtype.kind == "O":
        ids = text_ids([str(raw) for raw in ids.tolist()])
    if ids.dtype.kind != "T":
        return {name: ids}
    encoded = [raw.encode() for raw in ids.tolist()]
    ends = np.cumsum([len(raw) for raw in encoded], dtype=np.int64)
    return {f"{name}_utf8": np.frombuffer(b"".join(encoded), np.uint8), f"{name}_ends": ends}


def ids_from_arrays(arrays: Mapping[str, np.ndarray], name: str = "item_ids") -> np.ndarray:
    """The reverse of :func:`ids_to_arrays`.

    Raises:
      KeyError: if the arrays are others.
      ValueError: if they are damaged.
    """
    if name in arrays:
        return arrays[name]
    text, ends = arrays[f"{name}_utf8"].tobytes(), arrays[f"{name}_ends"].tolist()
    starts = [0, *ends[:-1]]
    return text_ids([text[start:end].decode() for start, end in zip(starts, ends, strict=True)])


def ids_usage(ids: np.ndarray, path: str, name: str = "item_ids") -> str:
    """Lines of Python that load the ids that :func:`ids_to_arrays` gave and ``np.savez`` wrote, with NumPy alone."""
    if ids.dtype.kind != "T":
        return f'{name} = np.load({path!r})["{name}"]'
    return f"""\
file = np.load({path!r})
parts = np.split(file["{name}_utf8"], file["{name}_ends"][:-1])
{name} = np.array([part.tobytes().decode() for part in parts], object)"""


def item_lookup(item_ids: np.ndarray) -> Callable[[Any], int]:
    """A function from one raw item id to the item's number, 0 if the id is unknown, see :func:`id_lookup`.

    Args:
      item_ids: shape (num_items + 1,), the raw ids, as in :class:`models.data.interactions.Interactions`.
    """
    position = id_lookup(item_ids[1:])

    def number(raw_id: Any) -> int:
        found = position(raw_id)
        return 0 if found is None else found + 1

    return number


def id_lookup(ids: np.ndarray) -> Callable[[Any], int | None]:
    """A function from one raw id to its position, None if it is unknown.

    Where the data's ids are integers, text that spells one in the usual way is taken as one (``007`` is not ``7``), and
    where they are text, numbers are spelled out: ids from a command line or a table find their items and users.

    Args:
      ids: the raw ids, each once.
    """
    position = {raw_id: place for place, raw_id in enumerate(ids.tolist())}
    integers = ids.dtype.kind in "iu"

    def find(raw_id: Any) -> int | None:
        if not integers:
            return position.get(str(raw_id))
        if isinstance(raw_id, str):
            try:
                raw_id, spelled = int(raw_id), raw_id.strip()
            except ValueError:
                return None
            if str(raw_id) != spelled:
                return None
        return position.get(raw_id)

    return find


def item_numbers(item_ids: np.ndarray, raw: Iterable[Any]) -> np.ndarray:
    """Translates raw item ids to item numbers, see :func:`item_lookup`.

    Args:
      item_ids: shape (num_items + 1,), the raw ids, as in :class:`models.data.interactions.Interactions`.
      raw: the ids to look up.

    Returns:
      Shape (ids,), int32: the numbers, 0 where an id is unknown.
    """
    return np.array(list(map(item_lookup(item_ids), raw)), dtype=np.int32)
