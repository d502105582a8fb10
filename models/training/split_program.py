"""The compiled parts of training on a mesh of devices."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from models.architectures.registry import make_model
from models.compilation import jit
from models.config import Optimizer, TrainConfig
from models.evaluation.ranking import FullRanking, make_test
from models.mesh import whole
from models.training.layout import Layout
from models.training.program import Program, concrete, make_parts
from models.training.training_data import TrainingData
from sevo_optax import with_graphs, without_graphs


class SplitProgram(Program):
    """A :class:`Program` for one seed whose batches and tables are split over a mesh.

    Between programs, tables that the mesh does not divide are filled up, see :class:`Layout`; inside, models and
    optimizers see them as they are without a mesh.

    Args:
      prepared: the data.
      config: the run, resolved.
      optimizer: which optimizer.
      seed: the seed.
      layout: the mesh, and how tables are split.
    """

    def __init__(
        self, prepared: TrainingData, config: TrainConfig, optimizer: Optimizer, seed: int, layout: Layout
    ) -> None:
        self.prepared, self.config, self.seeds, self.layout = layout.place_data(prepared), config, [seed], layout
        if config.diagnostics and prepared.nodes is not None:
            nodes = dataclasses.replace(prepared.nodes, adjacency=layout.replicate(prepared.nodes.adjacency))
            self.prepared = dataclasses.replace(self.prepared, nodes=nodes)
        train = prepared.split.train

        def make() -> Any:
            return make_model(config, num_users=train.num_users, num_items=train.num_items, seed=seed)

        parts = make_parts(nnx.eval_shape(make), prepared, config, optimizer, layout)
        self.graphdef = parts.graphdef
        self.shapes = jax.eval_shape(lambda: concrete(nnx.state(make())))
        self.model_state = layout.init(lambda: concrete(nnx.state(make())))
        self.opt_state = layout.init_optimizer(parts.stages, parts.init, self.model_state, self.shapes)
        # The graphs are the same, and the rest is as without a mesh.
        self.opt_shapes = jax.eval_shape(lambda state: without_graphs(parts.init(state)), self.shapes)
        self.key = layout.replicate(jax.random.key(seed))
        self._fold = jax.random.fold_in

        def epoch(state: Any, opt_state: Any, *data: Any) -> Any:
            cut_opt = with_graphs(layout.cut(without_graphs(opt_state), self.opt_shapes), opt_state)
            state, new, losses = parts.epoch(layout.cut(state, self.shapes), cut_opt, *data)
            return layout.fill_up(state), layout.fill_up(new), whole(losses)

        def diagnose(state: Any, opt_state: Any, *data: Any) -> Any:
            cut_opt = with_graphs(layout.cut(without_graphs(opt_state), self.opt_shapes), opt_state)
            return whole(parts.diagnose(layout.cut(state, self.shapes), cut_opt, *data))

        def ranks(state: Any, *data: Any) -> jax.Array:
            return parts.ranks(layout.cut(state, self.shapes), *data)

        def item_table(state: Any, context: Any) -> jax.Array:
            model = nnx.merge(self.graphdef, layout.cut(state, self.shapes))
            return whole(model.items(model.represent(context))[0])

        shardings = layout.shardings(self.model_state), layout.shardings(self.opt_state), layout.whole
        self._epoch = jit(epoch, donate_argnums=(0, 1), out_shardings=shardings)
        self._ranks, self._diagnose, self._item_table = jit(ranks), jit(diagnose), jit(item_table)
        self._test = make_test(self.graphdef, config.ks, lambda state: layout.cut(state, self.shapes))

    def epoch(self, number: int) -> np.ndarray:
        """Trains epoch ``number``, see :meth:`Program.epoch`."""
        with jax.set_mesh(self.layout.mesh):
            return super().epoch(number)

    def ranks(self, ranking: FullRanking) -> np.ndarray:
        """Shape (1, users), see :meth:`Program.ranks`."""
        with jax.set_mesh(self.layout.mesh):
            return super().ranks(ranking)

    def diagnose(self, number: int) -> list[dict[str, float]]:
        """The diagnostics after epoch ``number``, see :meth:`Program.diagnose`."""
        with jax.set_mesh(self.layout.mesh):
            return super().diagnose(number)

    def item_table(self, params: Any) -> np.ndarray:
        """The table that items are scored by, see :meth:`Program.item_table`; whole on each device for a moment."""
        with jax.set_mesh(self.layout.mesh):
            return np.asarray(self._item_table(params, self.prepared.context), np.float32)

    def like(self, i: int) -> tuple[Any, Any]:
        """The shapes of parameters and optimizer state, as they are without a mesh, and the graphs."""
        del i
        return self.shapes, with_graphs(self.opt_shapes, self.opt_state)

    def place(self, tree: Any) -> Any:
        """Arrays on the host on the devices of the mesh, filled up."""
        return self.layout.put(tree)

    def test(self, params: Any) -> tuple[np.ndarray, dict[str, float]]:
        """Ranks (users,) and metrics of the test items, see :meth:`Program.test`."""
        with jax.set_mesh(self.layout.mesh):
            return super().test(params)
