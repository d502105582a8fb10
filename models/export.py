"""Exporting a trained model to one file that JAX alone can run, without this code.

The file holds a ``jax.export`` artifact: the parameters and the computation, compiled when it is first called, on a
CPU, a GPU or a TPU. Beside it lies a table of the items' raw ids. See :func:`usage` for the few lines that run it.
"""

from pathlib import Path

import jax
import numpy as np

from models.data import ids_to_arrays, ids_usage
from models.inference import next_scores
from models.training.checkpoints import LoadedRun
from models.training.files import write_bytes

PLATFORMS = ("cpu", "cuda", "tpu")


def export_scores(run: LoadedRun) -> jax.export.Exported:
    """Exports a model as ``scores(histories)``.

    ``histories`` has shape (batch, max_length), int32, for any batch: the newest item numbers of each history, oldest
    first, filled up with 0 at either end. The scores have shape (batch, num_items + 1), float32: column ``i`` is for
    item number ``i``, and column 0, which is no item, holds minus infinity. What was seen is scored like anything else.

    Args:
      run: the trained model.
    """
    max_length, num_items = run.info.config.max_length, run.info.num_items

    def scores(histories: jax.Array) -> jax.Array:
        empty_first = jax.numpy.argsort(histories > 0, axis=1, stable=True)
        histories = jax.numpy.take_along_axis(histories, empty_first, axis=1)
        return next_scores(run.model, histories, num_items=num_items, max_length=max_length)

    (batch,) = jax.export.symbolic_shape("batch")
    histories = jax.ShapeDtypeStruct((batch, max_length), np.int32)
    return jax.export.export(jax.jit(scores), platforms=PLATFORMS)(histories)


def write_export(run: LoadedRun, path: Path) -> Path:
    """Writes a model's export, and the raw ids of its items beside it, each as a whole or not at all.

    Args:
      run: the trained model.
      path: the file to write.

    Returns:
      The file of the ids: an ``.npz`` whose ``item_ids[i]`` is the raw id of item number ``i``, from 1 on.

    Raises:
      OSError: if a file cannot be written.
    """
    items = path.with_name(f"{path.stem}.items.npz")
    data = export_scores(run).serialize()
    write_bytes(items, lambda file: np.savez_compressed(file, **ids_to_arrays(run.item_ids)))
    write_bytes(path, lambda file: file.write(data))
    return items


def usage(run: LoadedRun, path: Path, items: Path) -> str:
    """The lines of Python that recommend with an export: they need jax, numpy and flatbuffers.

    Args:
      run: the exported model.
      path: its export.
      items: the raw ids of its items.
    """
    history = run.item_ids[1:4].tolist()
    return f"""\
import jax, numpy as np

scores = jax.export.deserialize(bytearray(open({str(path)!r}, "rb").read())).call
{ids_usage(run.item_ids, str(items))}
number_of = {{raw: number for number, raw in enumerate(item_ids.tolist()) if number}}

history = {history!r}  # raw ids, oldest first
numbers = [number_of[raw] for raw in history][-{run.info.config.max_length}:]
batch = np.zeros((1, {run.info.config.max_length}), np.int32)
batch[0, : len(numbers)] = numbers
best = np.argsort(-np.asarray(scores(batch))[0])[:10]
print(item_ids[best])"""
