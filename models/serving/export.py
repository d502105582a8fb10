"""Exporting a trained model to one file that JAX alone can run, without this code.

The file holds a ``jax.export`` artifact: the parameters and the computation, compiled when it is first called, on a
CPU, a GPU or a TPU. Beside it lies a table of the items' raw ids. See :func:`usage` for the few lines that run it.
"""

from pathlib import Path

import jax
import numpy as np

from models.data import ids_to_arrays, ids_usage, write_item_vectors
from models.evaluation.queries import history_scores, user_scores
from models.files import write_bytes
from models.training.checkpoints import LoadedRun

PLATFORMS = ("cpu", "cuda", "tpu")
SUFFIX = ".jaxexport"


def export_scores(run: LoadedRun) -> jax.export.Exported:
    """Exports a model as ``scores(histories)`` or, where it has a table of users, as ``scores(users)``.

    ``histories`` has shape (batch, max_length), int32, for any batch: the newest item numbers of each history, oldest
    first, filled up with 0 at either end. ``users`` has shape (batch,), int32: numbers of users. The scores have shape
    (batch, num_items + 1), float32: column ``i`` is for item number ``i``, and column 0, which is no item, holds minus
    infinity. What was seen is scored like anything else.

    Args:
      run: the trained model.
    """
    num_items, config = run.info.num_items, run.info.config
    # Computed once, and a constant of the export.
    represented = jax.jit(run.model.represent)(run.context) if run.context else run.model.represent(run.context)

    def of_histories(histories: jax.Array) -> jax.Array:
        empty_first = jax.numpy.argsort(histories > 0, axis=1, stable=True)
        histories = jax.numpy.take_along_axis(histories, empty_first, axis=1)
        return history_scores(run.model, represented, histories, num_items=num_items, max_length=config.max_length)

    def of_users(users: jax.Array) -> jax.Array:
        return user_scores(run.model, represented, users, num_items=num_items)

    (batch,) = jax.export.symbolic_shape("batch")
    if run.model.query == "user":
        scores, shape = of_users, (batch,)
    else:
        scores, shape = of_histories, (batch, config.max_length)
    return jax.export.export(jax.jit(scores), platforms=PLATFORMS)(jax.ShapeDtypeStruct(shape, np.int32))


def items_path(path: Path) -> Path:
    """Where the raw ids of an export's items lie: beside it."""
    return path.with_name(f"{path.name.removesuffix(SUFFIX)}.items.npz")


def write_export(run: LoadedRun, path: Path) -> Path:
    """Writes a model's export, and the raw ids of its items beside it, each as a whole or not at all.

    Args:
      run: the trained model.
      path: the file to write.

    Returns:
      The file of the ids: an ``.npz`` whose ``item_ids[i]`` is the raw id of item number ``i``, from 1 on, and, for a
      model with a table of users, ``user_ids[u]`` that of user number ``u``, from 0 on; ids of very different lengths
      as :func:`models.data.ids.ids_to_arrays` keeps them.

    Raises:
      OSError: if a file cannot be written.
    """
    items = items_path(path)
    data = export_scores(run).serialize()
    ids = ids_to_arrays(run.item_ids) | ({} if run.users is None else ids_to_arrays(run.users.ids, "user_ids"))
    write_bytes(items, lambda file: np.savez_compressed(file, **ids))
    write_bytes(path, lambda file: file.write(data))
    return items


def write_embeddings(run: LoadedRun, path: Path) -> np.ndarray:
    """Writes the vectors that a model scores items by, and the items' raw ids.

    Args:
      run: the trained model.
      path: an .npz to write: ``item_ids``, shape (num_items,), and ``vectors``, shape (num_items, dim), float32,
        without biases, as :func:`models.data.read_item_vectors` takes it.

    Returns:
      The vectors.

    Raises:
      OSError: if it cannot be written.
      ValueError: if the model has no vectors of items.
    """
    model = run.model
    if not model.node_sets:
        raise ValueError(f"embeddings: {run.info.config.model} has no vectors of items")
    table, _ = model.items(model.represent(run.context))
    vectors = np.asarray(table, np.float32)[1 : run.info.num_items + 1]
    write_item_vectors(path, run.item_ids[1:], vectors)
    return vectors


def usage(run: LoadedRun, path: Path, items: Path) -> str:
    """The lines of Python that recommend with an export: they need jax, numpy and flatbuffers.

    Args:
      run: the exported model.
      path: its export.
      items: the raw ids of its items.
    """
    load = f"""\
import jax, numpy as np

scores = jax.export.deserialize(bytearray(open({str(path)!r}, "rb").read())).call
{ids_usage(run.item_ids, str(items))}
"""
    if run.users is not None:
        return f"""{load}{ids_usage(run.users.ids, str(items), "user_ids")}

batch = np.array([user_ids.tolist().index({run.users.ids[:1].tolist()[0]!r})], np.int32)
best = np.argsort(-np.asarray(scores(batch))[0])[:10]
print(item_ids[best])"""
    history = run.item_ids[1:4].tolist()
    return f"""{load}number_of = {{raw: number for number, raw in enumerate(item_ids.tolist()) if number}}

history = {history!r}  # raw ids, oldest first
numbers = [number_of[raw] for raw in history][-{run.info.config.max_length}:]
batch = np.zeros((1, {run.info.config.max_length}), np.int32)
batch[0, : len(numbers)] = numbers
best = np.argsort(-np.asarray(scores(batch))[0])[:10]
print(item_ids[best])"""
