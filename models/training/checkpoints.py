"""What a training run leaves behind: enough to go on after a crash, and to use the model.

A run's folder holds

* ``run.json``: the configuration, the optimizer, and a fingerprint of the data;
* ``items.npz``: the raw id of every item;
* ``checkpoints/EPOCH/``: parameters (the newest and the best so far) and optimizer state, without the graph, which
  ``init`` builds again. The two newest are kept, each written by Orbax as a whole or not at all. ``late.json`` in it:
  what an evaluation has found that came later.
"""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from tqdm import tqdm

from models.architectures.base import Recommender
from models.architectures.registry import config_from_dict, make_model, model_class
from models.checks import first_line
from models.config import GRAPH_FILES, Optimizer, SplitMethod, TrainConfig
from models.data import Interactions, ids_from_arrays, ids_to_arrays
from models.files import check_format, read_json, write_bytes, write_json
from models.graphs import files_digest, graph_files
from models.processes import is_first, on_first
from models.training import beside
from models.training.quiet import quiet_orbax
from sevo_optax import with_graphs, without_graphs

# Of run.json. Format 1 knew no digest of the items' ids and no identity, and its fingerprint left times out.
FORMAT = 2
KEPT = 2
# Of a checkpoint. In format 1 its digest left progress out.
CHECKPOINT_FORMAT = 2
# Of one whose arrays lay on several devices: its digest is made of sums that each device can take of its own part.
SPLIT_FORMAT = 3
# What may be over soon, and says nothing against the files.
PASSING = tuple(map(os.strerror, (errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)))
# In a checkpoint's folder: what an evaluation has found since.
LATE = "late.json"
# What Orbax begins the names of unfinished checkpoints' folders with, behind the epoch: at the next start, they go.
UNFINISHED = ".orbax-checkpoint-tmp"
# What Orbax writes for every checkpoint: the arrays, and beside them everything else, as JSON.
PARTS = ("state/_METADATA", "state/manifest.ocdbt", "note/metadata")
Which = Literal["best", "last"]

# Options that every model had in earlier versions, and that did nothing for most; and one that is a logger now.
ELSEWHERE = ("attend_padding", "mask_probability", "mask_last_probability", "tie_output", "tensorboard")

# A run may go on although these differ: they do not change what an epoch does.
MAY_DIFFER = ("data", "cache_dir", "epochs", "patience", "logger", "per_user")


class CheckpointError(ValueError):
    """A checkpoint cannot be read, written or used."""


class UnreachableError(CheckpointError):
    """A checkpoint may well be whole, but cannot be read now, or not by this version: nothing may take its place."""


def fingerprint(interactions: Interactions, split: SplitMethod = "leave-one-out") -> str:
    """A digest of the interactions and their items' ids: two data sets with the same one train alike.

    Args:
      interactions: the data.
      split: how they are split. Where times decide, they count.
    """
    digest = hashlib.sha256()
    for array in (interactions.items, interactions.offsets):
        digest.update(np.ascontiguousarray(array, "<i8").tobytes())
    digest.update(_joined(interactions.item_ids))
    if split == "global-time" and interactions.times is not None:
        times = np.ascontiguousarray(interactions.times)
        digest.update(times.dtype.str.encode() + times.tobytes())
    return digest.hexdigest()[:16]


def _joined(item_ids: np.ndarray) -> bytes:
    return "\n".join(map(str, item_ids.tolist())).encode()


def _short_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What a run is, as kept in ``run.json``.

    Attributes:
      optimizer: the optimizer's name.
      config: the resolved configuration.
      num_items: size of the catalogue.
      data: :func:`fingerprint` of the interactions.
      items: a digest of the items' ids: another run's ``items.npz`` has another one. Empty: not known.
      run: a digest of all that decides what the run's parameters become, noted in its checkpoints. Empty: not known.
      num_users: users that were trained on; 0: not known, in runs of earlier versions.
      graph: a digest of the files that the graph was made of. Empty: there were none, or it is not known.
      format: of the file.
    """

    optimizer: Optimizer
    config: TrainConfig
    num_items: int
    data: str
    items: str = ""
    run: str = ""
    num_users: int = 0
    graph: str = ""
    format: int = FORMAT

    @classmethod
    def of(cls, optimizer: Optimizer, config: TrainConfig, interactions: Interactions, *, num_users: int = 0) -> Self:
        """Describes a run.

        Args:
          optimizer: the optimizer's name.
          config: the resolved configuration.
          interactions: the data.
          num_users: how many of their users are trained on.
        """
        data = fingerprint(interactions, config.split)
        # Only what differs from the model's defaults: an option that is new changes no digest.
        settings = {name: value for name, value in config.differing().items() if name not in MAY_DIFFER}
        graph = files_digest(config)
        # Runs of earlier versions, which knew no vectors, keep the digest that their checkpoints have.
        identity = [optimizer, settings, data] + ([graph] if "knn" in config.graph else [])
        run = _short_digest(json.dumps(identity, sort_keys=True).encode())
        items = _short_digest(_joined(interactions.item_ids))
        return cls(optimizer, config, interactions.num_items, data, items, run, num_users, graph)

    def write(self, directory: Path, item_ids: np.ndarray) -> None:
        """Writes ``run.json`` and ``items.npz``."""
        directory.mkdir(parents=True, exist_ok=True)
        values = {"format": self.format} | dataclasses.asdict(self) | {"config": self.config.to_dict()}
        write_json(directory / "run.json", values)
        write_bytes(directory / "items.npz", lambda file: np.savez_compressed(file, **ids_to_arrays(item_ids)))

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Reads ``run.json``.

        Raises:
          CheckpointError: if there is none, or it was not written by this version or an earlier one.
        """
        file = directory / "run.json"
        try:
            values = read_json(file)
            if not is_run(values):
                raise ValueError("it lacks what a run's has")
            later = check_format(values, FORMAT)
        except FileNotFoundError:
            raise CheckpointError(
                f"{directory} holds no run.json; give the folder of a training run (compare has one a run)"
            ) from None
        except ValueError as error:
            raise CheckpointError(f"{file} was not written by a training run ({error}); train again") from None
        if later:
            raise CheckpointError(f"{file} {later}, or train again")
        try:
            info = cls(**values | {"config": _read_config(values)})
            if type(info.num_items) is not int or info.num_items < 1:
                raise ValueError(f"num_items must be a number of at least 1, got {info.num_items!r}")
        except KeyError as error:
            raise CheckpointError(f"{file} does not fit this version (unknown {error}); train again") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{file} does not fit this version ({error}); train again") from None
        return info

    def check_same(self, other: "RunInfo", directory: Path) -> None:
        """Raises a :class:`CheckpointError` unless ``other``, found in ``directory``, is the same run."""
        if other.optimizer != self.optimizer:
            raise CheckpointError(f"{directory} was trained with {other.optimizer}, not {self.optimizer}")
        may_differ = set(MAY_DIFFER)
        if self.config.schedule != "constant":
            may_differ.remove("epochs")  # the schedule's end
        if other.config.model != self.config.model:
            raise CheckpointError(f"{directory} was trained with model={other.config.model}, not {self.config.model}")
        for field in dataclasses.fields(self.config):
            ours, theirs = getattr(self.config, field.name), getattr(other.config, field.name)
            if field.name in GRAPH_FILES and self.graph and other.graph and ours and theirs:
                ours, theirs = ours.name, theirs.name  # wherever they lie: what is in them is compared below
            if field.name == "graph" and self.graph and other.graph:
                ours, theirs = (tuple(Path(name).name for name in names) for names in (ours, theirs))
            if field.name not in may_differ and ours != theirs:
                raise CheckpointError(
                    f"{directory} was trained with {field.name}={theirs}, not {ours}; "
                    "resume with the same options, or give another --output-dir"
                )
        if other.data != self.data:
            raise CheckpointError(
                f"{directory} was trained on other data; resume with the same, or train anew elsewhere"
            )
        if self.graph and other.graph and self.graph != other.graph:
            files = " or ".join(map(str, graph_files(self.config)))
            raise CheckpointError(
                f"{directory} was trained when {files} held something else; "
                "resume with the same, or train anew elsewhere"
            )

    def continuing(self, found: "RunInfo", interactions: Interactions, directory: Path) -> "RunInfo":
        """This run as one that goes on from another, which must be the same.

        Args:
          found: the other, found in ``directory``.
          interactions: this run's data.
          directory: the folder.

        Returns:
          This run with the identity that the other's checkpoints carry.

        Raises:
          CheckpointError: if it is not the same.
        """
        # Format 1 left times out of the fingerprint.
        comparable = self if found.format > 1 else dataclasses.replace(self, data=fingerprint(interactions))
        comparable.check_same(found, directory)
        return dataclasses.replace(self, run=found.run or self.run)

    def trained_on(self, interactions: Interactions) -> bool:
        """Whether this is the data of the run, all of it and split as then."""
        split = self.config.split if self.format > 1 else "leave-one-out"
        return fingerprint(interactions, split) == self.data


def _read_config(values: Mapping[str, Any]) -> TrainConfig:
    """The configuration in a ``run.json``: earlier versions had one for all models, without the optimizer."""
    config = {"optimizer": values["optimizer"]} | values["config"]
    known = {field.name for field in dataclasses.fields(model_class(config.get("model", "")).config_class)}
    return config_from_dict({name: value for name, value in config.items() if name in known or name not in ELSEWHERE})


def is_run(values: Mapping[str, Any]) -> bool:
    """Whether this is what a training run writes into ``run.json``, in this version or another."""
    return {"format", "config", "num_items", "data"} <= set(values)


def read_item_ids(directory: Path, info: RunInfo) -> np.ndarray:
    """Reads a run's ``items.npz``: shape (num_items + 1,), the raw ids of items 1 … num_items.

    Raises:
      CheckpointError: if it is damaged, or belongs to another run.
    """
    file = directory / "items.npz"
    try:
        item_ids = ids_from_arrays(beside.read_arrays(file))
    except Exception as error:  # whatever is wrong with a zip file, each part of its reader says it in its own way
        raise CheckpointError(f"{file} cannot be read ({first_line(error)}); train again") from None
    foreign = info.items and _short_digest(_joined(item_ids)) != info.items
    if item_ids.shape != (info.num_items + 1,) or foreign:
        raise CheckpointError(f"{file} belongs to another run than {directory / 'run.json'}; put its own back")
    return item_ids


def flatten(tree: Any, prefix: str, read: Callable[[Any], Any] = np.asarray) -> dict[str, Any]:
    """The leaves of a tree by path; graphs of SEvo's states are left out.

    Args:
      tree: the tree.
      prefix: what the names begin with.
      read: what is made of each leaf: an array on the host.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(without_graphs(tree))
    return {f"{prefix}.{jax.tree_util.keystr(path, simple=True, separator='.')}": read(x) for path, x in leaves}


def _on_default_device(tree: Any) -> Any:
    return jax.tree.map(jax.numpy.asarray, tree)


def unflatten(
    leaves: dict[str, np.ndarray], like: Any, prefix: str, place: Callable[[Any], Any] = _on_default_device
) -> Any:
    """The reverse of :func:`flatten`: a tree like ``like``, with its graphs.

    Args:
      leaves: arrays by name.
      like: the tree, or its shapes.
      prefix: what the names begin with.
      place: puts a tree of arrays on devices.

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
        values.append(value)
    return with_graphs(place(jax.tree.unflatten(treedef, values)), like)


def _digest(leaves: Mapping[str, np.ndarray], progress: Mapping[str, Any] | None = None) -> str:
    digest = hashlib.sha256()
    for name in sorted(leaves):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(leaves[name]).tobytes())
    if progress is not None:
        digest.update(json.dumps(progress, sort_keys=True).encode())
    return digest.hexdigest()


def _split_digest(leaves: Mapping[str, Any], progress: Mapping[str, Any]) -> str:
    """A digest that does not depend on how many devices the arrays lie on, and needs none of them whole."""
    digest = hashlib.sha256(json.dumps(progress, sort_keys=True).encode())
    for name in sorted(leaves):
        leaf = leaves[name]
        sums = _device_sums(leaf) if isinstance(leaf, jax.Array) else _sums(leaf, np)
        digest.update(json.dumps([name, str(leaf.dtype), leaf.shape, [int(x) for x in sums]]).encode())
    return digest.hexdigest()


def _sums(values: Any, xp: Any) -> tuple[Any, Any]:
    """Two weighted sums of an array's bits modulo 2³²: one that changes with any entry, in any order of adding."""
    wide = values.dtype.itemsize
    if values.dtype == bool:
        bits = values.astype(xp.uint32)
    else:
        words = {1: xp.uint8, 2: xp.uint16}.get(wide, xp.uint32)
        bits = jax.lax.bitcast_convert_type(values, words) if xp is jax.numpy else _words(values, words)
        bits = bits.astype(xp.uint32)
    place, stride = xp.zeros((1,) * bits.ndim, xp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        count = xp.arange(bits.shape[axis], dtype=xp.uint32) * xp.asarray(stride % 2**32, xp.uint32)
        place = place + count.reshape([-1 if k == axis else 1 for k in range(bits.ndim)])
        stride *= bits.shape[axis]
    first, second = 2 * place + 1, place * xp.asarray(2654435761, xp.uint32) | 1
    return xp.sum(bits * first, dtype=xp.uint32), xp.sum(bits * second, dtype=xp.uint32)


def _words(values: np.ndarray, words: Any) -> np.ndarray:
    values = np.ascontiguousarray(values)
    return values.view(words).reshape(values.shape if values.dtype.itemsize <= 4 else (*values.shape, -1))


_device_sums = jax.jit(partial(_sums, xp=jax.numpy))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One checkpoint.

    Attributes:
      epoch: how many epochs were trained.
      leaves: arrays by name, see :func:`flatten`, on the host; or all of them on the devices of a mesh, to be
        saved from there.
      progress: what the training loop noted: plain JSON. ``run``, if it is there, is the identity of the run.
      shapes: by name, the shapes of leaves on a mesh that are filled up; they are read as of these shapes.
    """

    epoch: int
    leaves: dict[str, Any]
    progress: dict[str, Any]
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run, newest last; the folder appears with the first one.

    Args:
      directory: the run's folder.
      run: the run's identity, see :class:`RunInfo`; empty: whatever lies there is taken for the run's.
    """

    def __init__(self, directory: Path, run: str = "") -> None:
        self.directory, self.run = directory / "checkpoints", run

    def _folder(self, epoch: int) -> Path:
        return self.directory / str(epoch)

    def epochs(self) -> list[int]:
        """The epochs that have a checkpoint, ascending."""
        if not self.directory.is_dir():
            return []
        names = {path.parent.name for path in self.directory.glob("*/state")}
        return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint, and removes the oldest of more than two.

        Raises:
          CheckpointError: if it cannot be written; older ones stay.
        """
        folder = self._folder(checkpoint.epoch)
        progress = checkpoint.progress | ({"run": self.run} if self.run else {})
        note: dict[str, Any] = {"format": CHECKPOINT_FORMAT, "progress": progress}
        if any(isinstance(leaf, jax.Array) for leaf in checkpoint.leaves.values()):
            arrays = {name: [str(leaf.dtype), leaf.shape] for name, leaf in checkpoint.leaves.items()}
            note |= {"format": SPLIT_FORMAT, "arrays": arrays, "shapes": checkpoint.shapes}
            note["digest"] = _split_digest(checkpoint.leaves, progress)
        else:
            note["digest"] = _digest(checkpoint.leaves, progress)
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(checkpoint.leaves), note=ocp.args.JsonSave(note))
        try:
            on_first(partial(self._make_room, folder, sum(x.nbytes for x in checkpoint.leaves.values())))
            with quiet_orbax(), _checkpointer() as checkpointer:
                checkpointer.save(folder.absolute(), args=arguments)
            on_first(self._remove_old)
        except Exception as error:  # Orbax and what it writes with raise errors of many kinds
            if is_first():
                self._remove_unfinished()
            older = [epoch for epoch in self.epochs() if epoch < checkpoint.epoch]
            kept = f"the one of epoch {older[-1]} is kept" if older else "there is no older one"
            raise CheckpointError(
                f"the checkpoint of epoch {checkpoint.epoch} cannot be written to {self.directory} "
                f"({_system_reason(error)}); {kept}"
            ) from error

    def amend(self, epoch: int, progress: Mapping[str, Any]) -> None:
        """Notes what has become known of a checkpoint's parameters since it was saved.

        Its arrays stay as they are: the best parameters are those that it has, or, if ``best_epoch`` is its own, the
        newest.

        Args:
          epoch: of the checkpoint.
          progress: what is to be read instead of what was noted then.

        Raises:
          CheckpointError: if it cannot be written; the checkpoint is as before.
        """
        file = self._folder(epoch) / LATE
        try:
            on_first(partial(write_json, file, dict(progress)))
        except OSError as error:
            raise CheckpointError(f"{file} cannot be written ({_system_reason(error)}); go on with --resume") from error

    def _make_room(self, folder: Path, size: int) -> None:
        if folder.exists() and not (folder / "state").exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
        self.directory.mkdir(parents=True, exist_ok=True)
        _check_space(self.directory, size)

    def _remove_old(self) -> None:
        for epoch in self.epochs()[:-KEPT]:
            self._remove(epoch)

    def load(self, epoch: int) -> Checkpoint:
        """Reads the checkpoint of an epoch.

        Raises:
          UnreachableError: if the system does not let it be read, or a later version has written it.
          CheckpointError: if it is damaged.
        """
        path = self._folder(epoch)
        try:
            missing = [name for name in PARTS if not (path / name).exists()]
            if missing:
                raise FileNotFoundError(f"it lacks {', '.join(missing)}")
            with quiet_orbax(), _checkpointer() as checkpointer:
                restore = partial(checkpointer.restore, path.absolute())
                note = restore(args=ocp.args.Composite(note=ocp.args.JsonRestore())).note
                if later := check_format(note, SPLIT_FORMAT):
                    raise UnreachableError(f"{path} {later}")
                # Of how many devices a checkpoint comes must not matter: what is asked for are arrays on the host.
                like = {name: _blank(*array) for name, array in note.get("arrays", {}).items()} or None
                state = restore(args=ocp.args.Composite(state=ocp.args.StandardRestore(like))).state
            leaves = {name: np.asarray(value) for name, value in state.items()}
            progress, kind = note["progress"], note.get("format", 1)
            if kind == SPLIT_FORMAT:
                intact = note["digest"] == _split_digest(leaves, progress)
                for name, shape in note["shapes"].items():
                    leaves[name] = leaves[name][tuple(slice(n) for n in shape)]
            else:
                intact = note["digest"] == _digest(leaves, progress if kind > 1 else None)
            if (path / LATE).exists():
                progress = progress | read_json(path / LATE)
                if progress["best_epoch"] == epoch:
                    last = [name for name in leaves if name.startswith("last.")]
                    leaves |= {"best" + name.removeprefix("last"): leaves[name] for name in last}
        except UnreachableError:
            raise
        except Exception as error:  # whatever is wrong with the files, there is nothing to read
            reason = _system_reason(error)
            if reason in PASSING:
                advice = "nothing was changed; try again, or remove that folder to go on without it"
                raise UnreachableError(f"{path} cannot be read ({reason}); {advice}") from error
            raise CheckpointError(f"{path} cannot be read ({reason})") from error
        if not intact:
            raise CheckpointError(f"{path} is damaged: its contents do not match its digest")
        return Checkpoint(epoch, leaves, progress)

    def readable(self) -> Iterator[Checkpoint]:
        """The checkpoints that can be read, the newest first; damaged ones are reported.

        Raises:
          UnreachableError: if one may be whole, but cannot be read now, see :meth:`load`.
          CheckpointError: if there are checkpoints, but none can be read, or one belongs to another run.
        """
        found, failure = False, None
        listed = self.epochs()
        for epoch in reversed(listed):
            try:
                checkpoint = self.load(epoch)
            except UnreachableError:
                raise
            except CheckpointError as error:
                failure = error
                if is_first() and self._folder(epoch).exists():
                    tqdm.write(f"{error}; it is left out", file=sys.stderr)
                continue
            if self.run and checkpoint.progress.get("run", self.run) != self.run:
                raise CheckpointError(
                    f"{self._folder(epoch)} belongs to another run than {self.directory.parent / 'run.json'}; "
                    "move it away"
                )
            found = True
            yield checkpoint
        if failure is not None and not found:
            if self.epochs() != listed:  # the run goes on, and has replaced them
                yield from self.readable()
                return
            raise CheckpointError(f"{failure}, and there is no other; train again with --overwrite")

    def remove_after(self, epoch: int) -> None:
        """Removes the checkpoints behind an epoch, behind 0 all, and what a killed process has left unfinished."""
        self._remove_unfinished()
        for number in self.epochs():
            if number > epoch:
                self._remove(number)

    def _remove_unfinished(self) -> None:
        # What Orbax has begun to write and given up may still appear while its folder is removed.
        for _ in range(50):
            unfinished = list(self.directory.glob(f"*{UNFINISHED}*"))
            if not unfinished:
                return
            for path in unfinished:
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(0.02)

    def _remove(self, epoch: int) -> None:
        # Of a folder that is removed by halves nobody would know what it is.
        removed = self._folder(epoch).rename(self.directory / f"{epoch}{UNFINISHED}-removed")
        shutil.rmtree(removed)


def _blank(dtype: str, shape: Sequence[int]) -> np.ndarray:
    """An array of a shape and dtype, without the memory."""
    return np.broadcast_to(np.zeros((), np.dtype(dtype)), tuple(shape))


def _checkpointer() -> ocp.Checkpointer:
    handler = ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler(), note=ocp.JsonCheckpointHandler())
    return ocp.Checkpointer(handler)


def _check_space(directory: Path, size: int) -> None:
    """Raises an :class:`OSError` if ``size`` bytes do not fit, before anything is written."""
    if shutil.disk_usage(directory).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _system_reason(error: Exception) -> str:
    """Why files cannot be read or written. TensorStore says it behind several lines of paths and options."""
    known = (*map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)), *PASSING)
    found = [reason for reason in known if reason in str(error)]
    if found:
        return found[0]
    return "files of it are missing" if str(error).startswith("NOT_FOUND") else first_line(error)


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
      CheckpointError: if the folder holds no run, or nothing of it can be read, or the best is asked for before the
        first evaluation.
    """
    if which not in ("best", "last"):
        raise ValueError(f"which must be best or last, got {which!r}")
    directory = Path(directory)
    info = RunInfo.read(directory)
    item_ids = read_item_ids(directory, info)
    checkpoint = next(Checkpoints(directory, info.run).readable(), None)
    if checkpoint is None:
        raise CheckpointError(f"{directory} holds no checkpoint yet; it appears with the first evaluation")
    if which == "best" and not checkpoint.progress["best_epoch"]:
        raise CheckpointError(
            f"{directory} was interrupted after epoch {checkpoint.epoch}, before its first evaluation, so no epoch is "
            "its best yet; go on with --resume, or take the newest parameters with --which last"
        )
    make = partial(make_model, info.config, num_users=info.num_users, num_items=info.num_items, seed=0)
    try:
        graphdef, params = nnx.split(nnx.eval_shape(make))  # shapes alone: the values are in the checkpoint
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{directory / 'run.json'} describes no model ({first_line(error)}); train again"
        ) from None
    try:
        params = unflatten(checkpoint.leaves, params, which)
    except CheckpointError as error:
        raise CheckpointError(
            f"the checkpoint of epoch {checkpoint.epoch} in {directory} does not fit: {error}"
        ) from None
    epoch = checkpoint.epoch if which == "last" else checkpoint.progress["best_epoch"]
    model = nnx.merge(graphdef, params)
    try:
        users = beside.read_users(directory) if model.query == "user" else None
        context = beside.read_context(directory)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return LoadedRun(model, info, item_ids, epoch, context, users)
