"""Where the arrays of a run lie on a mesh: tables and their moments split, everything else whole on each device."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models.architectures.base import Group
from models.architectures.registry import make_model, model_class
from models.config import TableSharding, TrainConfig
from models.evaluation.ranking import FullRanking
from models.graphs import Nodes
from models.mesh import DATA, MODEL, constrain, on_each_part
from models.training.optimizers import Stages
from models.training.training_data import Feed, TrainingData
from sevo_optax import SEvoState, without_graphs


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and how tables are split over its axis ``model``.

    Attributes:
      mesh: with the axes ``data`` and ``model``.
      tables: by path, the axis of the rows (nodes) of each table; parameters of other paths are whole on each device.
      sharding: ``columns``: each device has all rows of its columns. ``rows``: each has all columns of its rows, which
        are filled up with zeros where the mesh does not divide them.
    """

    mesh: Mesh
    tables: Mapping[str, int]
    sharding: TableSharding = "columns"

    @property
    def whole(self) -> NamedSharding:
        """The sharding of what every device has."""
        return NamedSharding(self.mesh, P())

    def table_notes(self, state: Any) -> list[str]:
        """What the tables of a model's state, arrays or shapes, are filled up to, a line each."""
        notes, parts = [], self.mesh.shape[MODEL]
        for path, leaf in _by_path(state).items():
            shape, axis = self._filled_shape(path, leaf.shape), self._table_axis(path, leaf.shape)
            if axis is not None and shape != leaf.shape:
                table = path.removesuffix("/value").removesuffix("/embedding")
                filled = f"{leaf.shape[axis]:,} rows are filled up to {shape[axis]:,}"
                notes.append(f"{table}: {filled}, a multiple of model={parts}")
        return notes

    def feed_notes(self, feed: Feed | None) -> list[str]:
        """What the batches of a feed are filled up to, a line."""
        rows, parts = getattr(feed, "rows", 0), self.mesh.shape[DATA]
        if rows % parts == 0:
            return []
        return [f"batches: {rows:,} rows are filled up to {rows + -rows % parts:,}, a multiple of data={parts}"]

    def spec(self, path: str, shape: Sequence[int]) -> P:
        """How a leaf of the model's or the optimizer's state is split: moments as the table that they belong to."""
        axis = self._table_axis(path, shape)
        if axis is None:
            return P()
        split = axis if self.sharding == "rows" else 1 - axis
        return P(*[MODEL if k == split else None for k in range(len(shape))])

    def shardings(self, tree: Any) -> Any:
        """The shardings of a tree's leaves, arrays or shapes."""
        return _map_paths(lambda path, leaf: NamedSharding(self.mesh, self.spec(path, leaf.shape)), tree)

    def fill_up(self, tree: Any) -> Any:
        """The tree with its tables filled up, as they lie on the devices between programs; for traced leaves."""
        return _map_paths(lambda path, leaf: self._resize(path, leaf, self._filled_shape(path, leaf.shape)), tree)

    def cut(self, tree: Any, like: Any) -> Any:
        """The reverse of :meth:`fill_up`; ``like`` has the shapes to cut to."""
        shapes = _by_path(like)
        return _map_paths(lambda path, leaf: self._resize(path, leaf, shapes[path].shape), tree)

    def keep(self, tree: Any) -> Any:
        """Has tables inside a program stay split as they are between programs."""
        return _map_paths(lambda path, leaf: constrain(leaf, *self.spec(path, leaf.shape)), tree)

    def put(self, tree: Any) -> Any:
        """Arrays on the host, as a model or its optimizer has them, on the devices, filled up."""

        def put(path: str, leaf: Any) -> jax.Array:
            value = np.asarray(leaf)
            behind = [
                (0, new - old) for new, old in zip(self._filled_shape(path, value.shape), value.shape, strict=True)
            ]
            return self._place(np.pad(value, behind) if any(map(any, behind)) else value, self.spec(path, value.shape))

        return _map_paths(put, tree)

    def replicate(self, tree: Any) -> Any:
        """The arrays of a tree, whole on each device."""
        return jax.tree.map(lambda leaf: self._place(leaf, P()), tree)

    def place_data(self, prepared: TrainingData) -> TrainingData:
        """The data on the devices of the mesh: each has its share of the users' interactions, and the rest whole."""
        return dataclasses.replace(
            prepared,
            feed=self._place_feed(prepared.feed),
            sampler=self.replicate(prepared.sampler),
            validation=self._place_ranking(prepared.validation),
            test=self._place_ranking(prepared.test),
            context=self.replicate(prepared.context),
        )

    def smooth_apart(self, stages: Stages, nodes: Nodes | None) -> Stages:
        """The stages of an optimizer, where each device smooths its own columns, and nothing is exchanged for it.

        Tables that are split by rows are exchanged for columns before, and back afterwards, an all-to-all each.
        """
        if nodes is None:
            return stages
        groups = {f"sevo {'+'.join(group)}": group for group in nodes.groups}
        return {name: self._apart(stage, groups[name]) if name in groups else stage for name, stage in stages.items()}

    def init(self, make: Callable[[], Any]) -> Any:
        """Makes the state of a model or an optimizer (without its graphs) on the devices, in one program."""
        with jax.set_mesh(self.mesh):
            shapes = jax.eval_shape(lambda: self.fill_up(make()))
            return jax.jit(lambda: self.fill_up(make()), out_shardings=self.shardings(shapes))()

    def init_optimizer(self, stages: Stages, init: Callable[[Any], Any], params: Any, shapes: Any) -> Any:
        """The state of an optimizer.

        Args:
          stages: of the optimizer.
          init: makes the state from the parameters.
          params: the parameters, on the devices and filled up.
          shapes: theirs, as the model has them.
        """

        def bare(params: Any) -> Any:
            return self.fill_up(without_graphs(init(self.cut(params, shapes))))

        with jax.set_mesh(self.mesh):
            shardings = self.shardings(jax.eval_shape(bare, params))
            state = jax.jit(bare, out_shardings=shardings)(params)
        for name, stage in stages.items():
            if name.startswith("sevo "):
                # Made on the host: inside of the program, the graph would be a constant of it.
                state[name] = state[name]._replace(graph=self.replicate(stage.init(shapes).graph))
        return state

    def _apart(self, stage: Any, group: Group) -> Any:
        columns = dataclasses.replace(self, tables={path: self.tables[path] for path in group}, sharding="columns")

        def update(updates: Any, state: SEvoState, params: Any = None, **extra: Any) -> Any:
            del params

            def local(tables: Any, state: SEvoState) -> Any:
                tables, state = stage.update(tables, state, **extra)
                if state.residual is not None:
                    # The largest of the parts' residuals, which that of the whole does not exceed.
                    state = state._replace(residual=jax.lax.pmax(state.residual, MODEL))
                return tables, state

            def is_smoothed(path: str, leaf: jax.Array) -> bool:
                return columns._table_axis(path, leaf.shape) is not None

            # Of the others, only that they are there: nothing of them is exchanged.
            tables = _map_paths(
                lambda path, leaf: (
                    self._exchange(path, leaf, self, columns) if is_smoothed(path, leaf) else jnp.zeros(())
                ),
                updates,
            )
            specs = _map_paths(lambda path, leaf: columns.spec(path, leaf.shape), tables)
            smoothed, state = on_each_part(local, (specs, P()), (specs, P()))(tables, state)
            updates = _map_paths(
                lambda path, leaf, new: self._exchange(path, new, columns, self) if is_smoothed(path, leaf) else leaf,
                updates,
                smoothed,
            )
            return updates, state

        return stage._replace(update=update)

    def _exchange(self, path: str, table: jax.Array, before: "Layout", after: "Layout") -> jax.Array:
        """A table as another layout splits it. Filled up in between, or the partitioner would gather all of it."""
        shape = table.shape
        filled = before._resize(path, table, self._filled_shape(path, shape))
        return after._resize(path, constrain(filled, *after.spec(path, shape)), shape)

    def _table_axis(self, path: str, shape: Sequence[int]) -> int | None:
        """The axis of the rows, if the leaf is a table or belongs to one as its moments do; else None."""
        if len(shape) != 2:
            return None
        return next((axis for table, axis in self.tables.items() if f"/{table}/" in f"/{path}/"), None)

    def _filled_shape(self, path: str, shape: Sequence[int]) -> tuple[int, ...]:
        axis = self._table_axis(path, shape) if self.sharding == "rows" else None
        return tuple(n + (-n % self.mesh.shape[MODEL] if k == axis else 0) for k, n in enumerate(shape))

    def _resize(self, path: str, leaf: jax.Array, shape: Sequence[int]) -> jax.Array:
        if leaf.shape == tuple(shape):
            return leaf
        behind = [(0, max(0, new - old)) for new, old in zip(shape, leaf.shape, strict=True)]
        resized = jnp.pad(leaf, behind)[tuple(slice(n) for n in shape)]
        return constrain(resized, *self.spec(path, shape))

    def _place(self, leaf: Any, spec: P) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                self._place(jax.random.key_data(leaf), spec), impl=jax.random.key_impl(leaf)
            )
        value = np.asarray(leaf)
        # Each process gives its own devices their parts, and no others.
        return jax.make_array_from_callback(value.shape, NamedSharding(self.mesh, spec), lambda index: value[index])

    def _place_feed(self, feed: Feed | None) -> Any:
        """A feed whose items, all that users did, are split over ``data``, and whose rest is whole on each device."""
        if feed is None:
            return None
        items = np.asarray(feed.items)
        filled = np.pad(items, (0, -len(items) % self.mesh.shape[DATA]))
        rest = self.replicate(dataclasses.replace(feed, items=jnp.zeros(0, jnp.int32)))
        return dataclasses.replace(rest, items=self._place(filled, P(DATA)))

    def _place_ranking(self, ranking: FullRanking) -> FullRanking:
        queries: Any = ranking.queries
        placed = self.replicate(dataclasses.replace(ranking, queries=None))
        if hasattr(queries, "packed"):
            rest = self.replicate(dataclasses.replace(queries, packed=None))
            return dataclasses.replace(
                placed, queries=dataclasses.replace(rest, packed=self._place_feed(queries.packed))
            )
        return dataclasses.replace(placed, queries=self.replicate(queries))


def check_mesh(sizes: Mapping[str, int], config: TrainConfig) -> None:
    """Checks that a mesh suits a configuration.

    Args:
      sizes: of the axes ``data`` and ``model``.
      config: of the run.

    Raises:
      ValueError: if the model has no table that is trained, or the mesh does not divide batches or columns.
    """
    if model_class(config.model).feed == "none":
        raise ValueError(f"mesh: {config.model} is fitted in closed form, on one device; leave the mesh out")
    data, model = sizes[DATA], sizes[MODEL]
    if config.batch_size % data:
        nearest = -(-config.batch_size // data) * data
        raise ValueError(
            f"batch_size must be a multiple of data={data} of the mesh, got {config.batch_size}; "
            f"give --batch-size {nearest} or another mesh"
        )
    if config.embedding_dim % model:
        raise ValueError(
            f"embedding_dim must be a multiple of model={model} of the mesh, got {config.embedding_dim}: tables are "
            "smoothed by columns, however they are split; give another mesh"
        )


def make_layout(
    mesh: Mesh, sharding: TableSharding, config: TrainConfig, *, num_users: int, num_items: int
) -> tuple[Layout, list[str]]:
    """The layout for the model of a configuration.

    Args:
      mesh: with the axes ``data`` and ``model``.
      sharding: how tables are split.
      config: of the run.
      num_users: users of the training data.
      num_items: size of the catalogue.

    Returns:
      The layout, and what of the tables is filled up, a line each.

    Raises:
      ValueError: as :func:`check_mesh`.
    """
    check_mesh(mesh.shape, config)
    make = partial(make_model, config, num_users=num_users, num_items=num_items, seed=0)
    model = nnx.eval_shape(make)
    paths = {path for groups in model.node_sets.values() for group in groups for path in group}
    layout = Layout(mesh, {path: model.node_axes.get(path, 0) for path in sorted(paths)}, sharding)
    return layout, layout.table_notes(nnx.state(model))


def _map_paths(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(_name(path), *leaves), tree, *others)


def _by_path(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
