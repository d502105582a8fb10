"""What a training run leaves behind: enough to go on after a crash, and to use the model.

A run's folder holds

* ``run.json``: the configuration, the optimizer, and a fingerprint of the data;
* ``items.npz``: the raw id of every item;
* ``checkpoints/EPOCH/``: parameters (the newest and the best so far) and optimizer state, without the graph, which
  ``init`` builds again. The two newest are kept, each written as a whole or not at all.
"""

import dataclasses
import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from flax import nnx
from tqdm import tqdm

from models.architectures.base import Recommender
from models.architectures.registry import config_from_dict, make_model
from models.config import Optimizer, TrainConfig
from models.data import Interactions, ids_from_arrays, ids_to_arrays
from models.training import beside
from models.training.files import write_bytes, write_json
from sevo_optax import with_graphs, without_graphs

FORMAT = 1
KEPT = 2
Which = Literal["best", "last"]

# A run may go on although these differ: they do not change what an epoch does.
MAY_DIFFER = ("data", "cache_dir", "epochs", "patience", "tensorboard", "per_user")


class CheckpointError(ValueError):
    """A checkpoint cannot be read, written or used."""


def fingerprint(interactions: Interactions) -> str:
    """A digest of the interactions and their items' ids: two data sets with the same one train alike."""
    digest = hashlib.sha256()
    for array in (interactions.items, interactions.offsets):
        digest.update(np.ascontiguousarray(array, "<i8").tobytes())
    digest.update("\n".join(map(str, interactions.item_ids.tolist())).encode())
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What a run is, as kept in ``run.json``.

    Attributes:
      optimizer: the optimizer's name.
      config: the resolved configuration.
      num_items: size of the catalogue.
      data: :func:`fingerprint` of the interactions.
      num_users: users that were trained on; 0: not known, in runs of earlier versions.
    """

    optimizer: Optimizer
    config: TrainConfig
    num_items: int
    data: str
    num_users: int = 0

    def write(self, directory: Path, item_ids: np.ndarray) -> None:
        """Writes ``run.json`` and ``items.npz``."""
        directory.mkdir(parents=True, exist_ok=True)
        write_bytes(directory / "items.npz", lambda file: np.savez_compressed(file, **ids_to_arrays(item_ids)))
        values = dataclasses.asdict(self) | {"config": self.config.to_dict()}
        write_json(directory / "run.json", {"format": FORMAT} | values)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Reads ``run.json``.

        Raises:
          CheckpointError: if there is none, or it was not written by this version.
        """
        file = directory / "run.json"
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            written = values.pop("format")
        except FileNotFoundError:
            raise CheckpointError(
                f"{directory} holds no run.json; give the folder of a training run (compare has one a run)"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{file} was not written by a training run; train again") from None
        if written != FORMAT:
            raise CheckpointError(f"{file} has format {written}, but this version reads {FORMAT}; train again")
        try:
            return cls(**values | {"config": config_from_dict(values["config"])})
        except (TypeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{file} does not fit this version ({error}); train again") from None

    def check_same(self, other: "RunInfo", directory: Path) -> None:
        """Raises a :class:`CheckpointError` unless ``other``, found in ``directory``, is the same run."""
        if other.optimizer != self.optimizer:
            raise CheckpointError(f"{directory} was trained with {other.optimizer}, not {self.optimizer}")
        may_differ = set(MAY_DIFFER)
        if self.config.schedule != "constant":
            may_differ.remove("epochs")  # the schedule's end
        for field in dataclasses.fields(self.config):
            ours, theirs = getattr(self.config, field.name), getattr(other.config, field.name)
            if field.name not in may_differ and ours != theirs:
                raise CheckpointError(
                    f"{directory} was trained with {field.name}={theirs}, not {ours}; "
                    "resume with the same options, or give another --output-dir"
                )
        if other.data != self.data:
            raise CheckpointError(
                f"{directory} was trained on other data; resume with the same, or train anew elsewhere"
            )


def flatten(tree: Any, prefix: str) -> dict[str, np.ndarray]:
    """The leaves of a tree by path, on the host; graphs of SEvo's states are left out."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(without_graphs(tree))
    return {f"{prefix}.{jax.tree_util.keystr(path, simple=True, separator='.')}": np.asarray(x) for path, x in leaves}


def unflatten(leaves: dict[str, np.ndarray], like: Any, prefix: str) -> Any:
    """The reverse of :func:`flatten`: a tree like ``like``, with its graphs.

    Raises:
      CheckpointError: if a leaf is missing or has another shape or dtype.
    """
    bare = without_graphs(like)
    paths, treedef = jax.tree_util.tree_flatten_with_path(bare)
    values = []
    for path, leaf in paths:
        name = f"{prefix}.{jax.tree_util.keystr(path, simple=True, separator='.')}"
        value = leaves.get(name)
        if value is None:
            raise CheckpointError(f"it holds no {name}: it belongs to another model or optimizer")
        if value.shape != leaf.shape or value.dtype != leaf.dtype:
            raise CheckpointError(
                f"its {name} is {value.dtype}{list(value.shape)}, but {leaf.dtype}{list(leaf.shape)} is wanted: "
                "it belongs to another model or catalogue"
            )
        values.append(jax.numpy.asarray(value))
    return with_graphs(jax.tree.unflatten(treedef, values), like)


def _digest(leaves: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(leaves):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(leaves[name]).tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, on the host.

    Attributes:
      epoch: how many epochs were trained.
      leaves: arrays by name, see :func:`flatten`.
      progress: what the training loop noted: plain JSON.
    """

    epoch: int
    leaves: dict[str, np.ndarray]
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, newest last; the folder appears with the first one.

    Args:
      directory: the run's folder.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = (directory / "checkpoints").absolute()
        # What orbax reports of its own doings would tear the progress bar.
        absl_logging.set_verbosity(absl_logging.ERROR)

    def _manager(self, *, create: bool = False) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, create=create, enable_async_checkpointing=False)
        return ocp.CheckpointManager(self.directory, options=options)

    def epochs(self) -> list[int]:
        """The epochs that have a checkpoint, ascending."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint, and removes the oldest of more than two.

        Raises:
          CheckpointError: if it cannot be written; older ones stay.
        """
        note = {"digest": _digest(checkpoint.leaves), "progress": checkpoint.progress}
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(checkpoint.leaves), note=ocp.args.JsonSave(note))
        try:
            with self._manager(create=True) as manager:
                manager.save(checkpoint.epoch, args=arguments, force=True)
        except Exception as error:  # orbax and what it writes with raise errors of many kinds
            older = self.epochs()
            kept = f"the one of epoch {older[-1]} is kept" if older else "there is no older one"
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"the checkpoint of epoch {checkpoint.epoch} cannot be written to {self.directory} ({reason}); {kept}"
            ) from error

    def load(self, epoch: int) -> Checkpoint:
        """Reads the checkpoint of an epoch.

        Raises:
          CheckpointError: if it is damaged.
        """
        restore = ocp.args.Composite(state=ocp.args.StandardRestore(), note=ocp.args.JsonRestore())
        try:
            with self._manager() as manager:
                found = manager.restore(epoch, args=restore)
            leaves = {name: np.asarray(value) for name, value in found.state.items()}
            intact = found.note["digest"] == _digest(leaves)
            progress = found.note["progress"]
        except Exception as error:  # whatever is wrong with the files, there is nothing to read
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise CheckpointError(f"{self.directory / str(epoch)} cannot be read ({reason})") from error
        if not intact:
            raise CheckpointError(f"{self.directory / str(epoch)} is damaged: its contents do not match its digest")
        return Checkpoint(epoch, leaves, progress)

    def readable(self) -> Iterator[Checkpoint]:
        """The checkpoints that can be read, the newest first; damaged ones are reported.

        Raises:
          CheckpointError: if there are checkpoints, but none can be read.
        """
        found, failure = False, None
        for epoch in reversed(self.epochs()):
            try:
                checkpoint = self.load(epoch)
            except CheckpointError as error:
                failure = error
                tqdm.write(f"{error}; it is left out")
            else:
                found = True
                yield checkpoint
        if failure is not None and not found:
            raise CheckpointError(f"{failure}, and there is no other; train again with --overwrite")

    def remove_after(self, epoch: int) -> None:
        """Removes the checkpoints behind an epoch; behind 0: all."""
        for number in self.epochs():
            if number > epoch:
                shutil.rmtree(self.directory / str(number))


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A trained model.

    Attributes:
      model: the model, with its parameters on the default device.
      info: the run it comes from.
      item_ids: shape (num_items + 1,), the raw ids of items 1 … num_items.
      epoch: how many epochs it was trained for.
      context: what the model computes with.
      users: the users that it knows, if it has a table of users.
    """

    model: Recommender
    info: RunInfo
    item_ids: np.ndarray
    epoch: int
    context: dict[str, Any] = dataclasses.field(default_factory=dict)
    users: beside.KnownUsers | None = None


def load_run(directory: Path, which: Which = "best") -> LoadedRun:
    """Loads the model of a training run.

    Args:
      directory: the run's folder.
      which: ``best``: the parameters with the best validation result. ``last``: the newest.

    Raises:
      CheckpointError: if the folder holds no run, or nothing of it can be read.
    """
    if which not in ("best", "last"):
        raise ValueError(f"which must be best or last, got {which!r}")
    directory = Path(directory)
    info = RunInfo.read(directory)
    try:
        with np.load(directory / "items.npz") as file:
            item_ids = ids_from_arrays(file)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{directory / 'items.npz'} cannot be read ({error}); train again") from None
    checkpoint = next(Checkpoints(directory).readable(), None)
    if checkpoint is None:
        raise CheckpointError(f"{directory} holds no checkpoint yet; it appears with the first evaluation")
    make = partial(make_model, info.config, num_users=info.num_users, num_items=info.num_items, seed=0)
    graphdef, params = nnx.split(nnx.eval_shape(make))  # shapes alone: the values are in the checkpoint
    params = unflatten(checkpoint.leaves, params, which)
    epoch = checkpoint.epoch if which == "last" else checkpoint.progress["best_epoch"]
    model = nnx.merge(graphdef, params)
    users = beside.read_users(directory) if model.query == "user" else None
    return LoadedRun(model, info, item_ids, epoch, beside.read_context(directory), users)
