"""What lies beside a run's checkpoints: the model's context, and the users that it knows."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from models.data import Interactions, ids_from_arrays, ids_to_arrays
from models.files import write_bytes

CONTEXT, USERS = "context.npz", "users.npz"


@dataclasses.dataclass(frozen=True)
class KnownUsers:
    """The users that a model with a table of users was trained with.

    Attributes:
      ids: shape (users,), raw ids; user ``u`` of the model is ``ids[u]``.
      offsets: shape (users + 1,), int64, where each user's items begin in ``items``.
      items: shape (interactions,), int32, all that is known of them.
    """

    ids: np.ndarray
    offsets: np.ndarray
    items: np.ndarray

    @classmethod
    def from_interactions(cls, interactions: Interactions, user_ids: np.ndarray) -> Self:
        """Collects what is known of some users.

        Args:
          interactions: all of them.
          user_ids: shape (users,), the raw ids of the users that the model knows, in its order.
        """
        number = {raw: user for user, raw in enumerate(interactions.user_ids.tolist())}
        rows = list(interactions)
        mine = [rows[number[raw]] for raw in user_ids.tolist()]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in mine])]).astype(np.int64)
        return cls(user_ids, offsets, np.concatenate(mine).astype(np.int32))

    def history(self, user: int) -> np.ndarray:
        """What is known of user ``user``."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]


def write_users(directory: Path, interactions: Interactions, user_ids: np.ndarray) -> None:
    """Writes ``users.npz``, see :meth:`KnownUsers.from_interactions`."""
    users = KnownUsers.from_interactions(interactions, user_ids)
    arrays = ids_to_arrays(users.ids, "user_ids") | {"offsets": users.offsets, "items": users.items}
    write_bytes(directory / USERS, lambda file: np.savez_compressed(file, **arrays))


def read_users(directory: Path) -> KnownUsers:
    """Reads ``users.npz``.

    Raises:
      ValueError: if it is missing or damaged.
    """
    arrays = _read(directory / USERS)
    try:
        return KnownUsers(ids_from_arrays(arrays, name="user_ids"), arrays["offsets"], arrays["items"])
    except KeyError as error:
        raise ValueError(f"{directory / USERS} lacks {error}; train again") from None


def write_context(directory: Path, context: Mapping[str, Any]) -> None:
    """Writes ``context.npz``: arrays, and BCOO matrices in three parts each; nothing for an empty context."""
    arrays = {}
    for name, value in context.items():
        if isinstance(value, BCOO):
            if not (value.indices_sorted and value.unique_indices):  # which is what they are read as
                value = value.sum_duplicates()
            arrays |= {f"{name}.data": value.data, f"{name}.indices": value.indices, f"{name}.shape": value.shape}
        else:
            arrays[name] = value
    if arrays:
        arrays = {name: np.asarray(value) for name, value in arrays.items()}
        write_bytes(directory / CONTEXT, lambda file: np.savez_compressed(file, **arrays))


def read_context(directory: Path) -> dict[str, Any]:
    """Reads ``context.npz``; without one, the context is empty.

    Raises:
      ValueError: if it is damaged.
    """
    if not (directory / CONTEXT).exists():
        return {}
    context: dict[str, Any] = {}
    for name, value in (arrays := _read(directory / CONTEXT)).items():
        matrix, _, part = name.rpartition(".")
        if part == "data" and f"{matrix}.indices" in arrays:
            indices, shape = arrays[f"{matrix}.indices"], tuple(arrays[f"{matrix}.shape"].tolist())
            context[matrix] = BCOO(
                (jnp.asarray(value), jnp.asarray(indices)), shape=shape, indices_sorted=True, unique_indices=True
            )
        elif not (part in ("indices", "shape") and f"{matrix}.data" in arrays):
            context[name] = jnp.asarray(value)
    return context


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads an ``.npz``; NumPy would leave a file open that it has opened itself and finds damaged."""
    with path.open("rb") as file, np.load(file) as arrays:
        return dict(arrays)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        return read_arrays(path)
    except Exception as error:  # a damaged archive fails in many ways
        raise ValueError(f"{path} cannot be read ({error}); train again") from None
