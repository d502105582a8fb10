"""Graphs in files."""

import os
import secrets
import zipfile
from pathlib import Path

import scipy.sparse
from jax.experimental import sparse as jsparse

from sevo_optax._memory import require_memory
from sevo_optax._weights import Adjacency, check_float32, raw_bcoo, symmetric_csr
from sevo_optax.graph._convert import to_scipy


def save(path: str | os.PathLike[str], adjacency: Adjacency) -> None:
    """Writes weights to a file.

    The file is in SciPy's npz format, holds no pickle, and can be read with :func:`scipy.sparse.load_npz`
    as well. It appears under its name only when it is complete.

    Args:
      path: where to write, by convention ``*.npz``; an existing file is replaced.
      adjacency: symmetric weights of shape (nodes, nodes).

    Raises:
      TypeError: if ``adjacency`` is no matrix, or traced.
      ValueError: if the weights are invalid, or float32, in which they are loaded, cannot hold them.

    Examples:
      >>> import tempfile
      >>> from sevo_optax import graph
      >>> weights = graph.from_edges([0, 1], [1, 2], num_nodes=3)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     graph.save(f"{folder}/graph.npz", weights)
      ...     graph.load(f"{folder}/graph.npz")
      BCOO(float32[3, 3], nse=4)
    """
    csr = to_scipy(adjacency)
    check_float32(csr)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            scipy.sparse.save_npz(file, csr, compressed=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> jsparse.BCOO:
    """Reads weights that :func:`save` (or :func:`scipy.sparse.save_npz`) wrote.

    Args:
      path: the file.

    Returns:
      Symmetric weights, BCOO float32 of shape (nodes, nodes).

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it holds something else than symmetric weights, or more than fits into memory.

    Examples:
      >>> import tempfile
      >>> import scipy.sparse
      >>> from sevo_optax import graph
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     scipy.sparse.save_npz(f"{folder}/graph.npz", scipy.sparse.csr_array([[0.0, 2.0], [2.0, 0.0]]))
      ...     graph.load(f"{folder}/graph.npz").todense()
      Array([[0., 2.],
             [2., 0.]], dtype=float32)
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                size = sum(part.file_size for part in archive.infolist())
            # What was float32 is twice as large in float64.
            require_memory(2 * size, f"reading {os.fspath(path)}", "Save a smaller graph.")
            file.seek(0)
            return raw_bcoo(symmetric_csr(scipy.sparse.load_npz(file)))
        except MemoryError:
            raise
        except Exception as error:  # a damaged archive fails in many ways
            raise ValueError(
                f"{os.fspath(path)} holds no graph: {error} Write graphs with graph.save(path, adjacency)."
            ) from error
