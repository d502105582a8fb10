"""Structure-aware embedding evolution as an optax transformation."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from sevo_optax import _propagate, _sharded, _tables, _weights
from sevo_optax._propagate import CSR, Method
from sevo_optax._sharded import ShardedCSR
from sevo_optax._shards import Layout, Shards, in_memory
from sevo_optax._smooth import check_form, smooth_leaves
from sevo_optax._tables import Tables
from sevo_optax._weights import Adjacency, is_traced


class SEvoState(NamedTuple):
    """State of :func:`sevo`.

    Attributes:
      count: shape (), int32, the number of updates so far: what a schedule of ``beta`` is called with.
      graph: the normalised adjacency as CSR arrays, split over devices if ``graph_sharding`` says so. It never changes.
        It lives here, and not in a closure, so that a jitted step receives it as an argument: a constant of that size
        would be printed into the program and folded by the compiler.
      residual: shape (), float32, how far the last solve of ``method="exact"`` ended from the solution, as
        :func:`residual` defines it: near 1e-6, or 1e-12 in float64, where it has converged. None for the other methods,
        which solve nothing. ``optax.tree.get(state, "residual")`` finds it in the state of a chain.
    """

    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    graph: CSR | ShardedCSR
    residual: jax.Array | None = None


def sevo(
    adjacency: Adjacency,
    tables: Tables = None,
    *,
    beta: optax.ScalarOrSchedule = 0.99,
    num_layers: int = 3,
    method: Method = "neumann",
    rescale: bool = True,
    normalize: bool = True,
    node_axis: int = 0,
    graph_sharding: NamedSharding | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Smooths the update of an embedding table over a graph, so that related rows move together.

    The rows of the chosen table's update :math:`\Delta E` are replaced by

    .. math::

      \hat\psi(\Delta E) = \frac{1-\beta}{1-\beta^{L+1}} \sum_{l=0}^{L} \beta^l \tilde A^l \Delta E, \qquad
      \tilde A = D^{-1/2} A D^{-1/2}

    (Eq. 7 of the paper; :func:`smooth` lists the other forms). All other leaves come back as they are. The model and
    its inference do not change.

    The transformation only changes a direction, so it may stand anywhere in a chain. Two places matter, and they make
    different optimizers:

    * **before the moments**, it smooths the gradient, and Adam then normalises what it sees::

        optax.chain(sevo(weights, "item_embedding"), adamw_corrected(1e-3, tables="item_embedding"))

    * **after the moments**, before weight decay and step size, it is Algorithm 1 of the paper: :func:`sevo_adamw`.

    **Split graphs.** With :math:`n` nodes, :math:`m` stored entries, :math:`N` devices on the axes of
    ``graph_sharding``, :math:`d` columns a device and numbers of :math:`b` bytes, each device holds
    :math:`R = \lceil n/N \rceil` rows of :math:`\tilde A` (about :math:`8m/N + 4R` bytes) and of the table. A layer of
    the series sends it the rows of others that its own rows have entries for, in one all-to-all; what is needed is
    planned once, on the host. With :math:`H` the most rows that one device needs of one other, a device sends and
    receives

    .. math::

      (N-1) \, H \, d \, b \; L \quad \text{bytes a step}, \qquad H \le \min(R, \, m/N^2 \text{ if evenly spread})

    and holds :math:`4NH` bytes of plan and :math:`NHdb` of received rows. It never exceeds what gathering the table
    would take, :math:`(N-1) R d b` a layer. ``graph.shard(weights, N).summary()`` counts :math:`H` for a graph. Devices
    reserve as many entries as the fullest of them, so nodes should not be numbered by popularity.

    The table should be split by rows over the same axes: then nothing else is sent. Otherwise it is exchanged for one
    that is, before and after. Rows that the devices do not divide are padded inside. Results equal those of the whole
    graph up to rounding. Under ``vmap`` the replicas' columns travel together, in one all-to-all a layer for all of
    them. The state holds arrays of shape (N, …) split over the mesh; :func:`without_graphs` takes them out of
    checkpoints, and ``init``, outside of ``jit``, builds them for any other number of devices. Not available for
    ``method="exact"``.

    Args:
      adjacency: raw symmetric non-negative weights, shape (nodes, nodes), as :class:`jax.experimental.sparse.BCOO` (see
        :mod:`sevo_optax.graph`), BCSR, scipy sparse matrix or dense array; with ``graph_sharding`` also
        :class:`graph.Shards`. Node ``i`` is row ``i`` of the table: padding and mask rows are counted too. Checked and
        normalised once, on the host.
      tables: which leaf to smooth: its path, such as ``"item_embedding/embedding"``, or the path of a part of the tree
        that holds exactly one array, such as ``"item_embedding"``. A tuple of paths is one node set, stacked in that
        order, for example ``("user_embedding", "item_embedding")`` with :func:`graph.user_item`. None: the tree holds
        exactly one array, as it does under :func:`optax.masked`.
      beta: strength of the smoothing, a number in [0, 1), possibly traced, or a schedule of the step count. What is
        traced cannot be checked: a schedule must stay below 1, in float32.
      num_layers: :math:`L \ge 0`, the number of terms behind the first one.
      method: ``"neumann"``, ``"iterative"`` or ``"exact"``, see :func:`smooth`.
      rescale: whether the Neumann series is rescaled (Eq. 7, Theorem 2) or not (Eq. 6, the slower curve of Figure 4a).
      normalize: whether ``adjacency`` holds raw weights. False if it is :math:`\tilde A` already.
      node_axis: which axis of the table counts the nodes: 1 for a (dim, nodes) kernel of an output layer.
      graph_sharding: None: every device holds the whole graph. Or how to split its rows over devices, for a graph that
        one device cannot hold: ``NamedSharding(mesh, PartitionSpec("model"))``, or a tuple of axes in place of one. See
        *Split graphs* above. Needs JAX 0.10 or later.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`. Its state is a :class:`SEvoState`, which holds the graph.
      Tables are smoothed in float32 at least and returned in their own dtype. To ``vmap`` over replicas with one graph,
      take the axes from :func:`state_axes`.

    Raises:
      TypeError: if an argument or the chosen leaf has the wrong type; floats of eight bits are refused.
      ValueError: if the weights are not square, symmetric, non-negative and finite, a number is out of range, a path
        names no leaf or several, or the table and the graph differ in their number of nodes. The message lists the
        leaves. ``update`` also refuses a state whose graph has another number of nodes or entries, or,
        split by rows, of shards or rows a shard.

    Note:
      One NaN in a gradient reaches every row within :math:`L` hops of its own, and every row with ``method="exact"``.
      :func:`optax.apply_if_finite` around the whole chain drops such a step.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from sevo_optax import adamw_corrected, graph, sevo
      >>> weights = graph.cooccurrence([[0, 1, 2], [1, 2]], num_nodes=4)
      >>> params = {"item_embedding": jnp.ones((4, 2)), "bias": jnp.ones(4)}
      >>> tx = optax.chain(sevo(weights, "item_embedding", beta=0.9), adamw_corrected(1e-3, tables="item_embedding"))
      >>> state = tx.init(params)
      >>> grads = {"item_embedding": jnp.zeros((4, 2)).at[1].set(1.0), "bias": jnp.zeros(4)}
      >>> updates, state = tx.update(grads, state, params)
      >>> bool((updates["item_embedding"][2] != 0).all())  # row 2 moves along with its neighbour, row 1
      True

    References:
      Xu et al., `Graph-enhanced Optimizers for Structure-aware Recommendation Embedding Evolution
      <https://arxiv.org/abs/2310.03032>`_, 2024
    """
    check_form(beta, num_layers, method)
    paths = _tables.canonicalize(tables)
    if is_traced(adjacency):
        raise TypeError(
            "adjacency is traced, but sevo(...) checks and normalises it on the host; create the transformation "
            "outside of jax.jit, and under optax.inject_hyperparams, which traces arrays, pass a BCOO or a scipy "
            "matrix, or static_args=('adjacency',)"
        )
    if graph_sharding is None:
        if isinstance(adjacency, Shards):
            raise ValueError(
                f"adjacency is split into {len(adjacency)} shards, but graph_sharding is None; say over which devices, "
                "as in graph_sharding=NamedSharding(mesh, PartitionSpec('model'))"
            )
        matrix = _weights.symmetric_csr(adjacency)
        if normalize:
            matrix = _weights.normalize_csr(matrix)
        num_nodes = matrix.shape[0]
    else:
        shards = _as_shards(adjacency, graph_sharding, method)
        num_nodes = shards.shape[0]

    def init_fn(params: optax.Params) -> SEvoState:
        dtypes = []
        rows = [num_nodes]
        # A tree without leaves is how optax asks for the structure of the state.
        if jax.tree.leaves(params):
            positions, leaves, names, _ = _tables.find(params, paths, num_nodes)
            axis = _tables.check(positions, leaves, names, node_axis, num_nodes)
            dtypes = [leaves[i].dtype for i in positions]
            rows = [leaves[i].shape[axis] for i in positions]
        dtype = _propagate.compute_dtype(*dtypes)
        count = jnp.zeros([], jnp.int32)
        graph: CSR | ShardedCSR
        if graph_sharding is None:
            graph = _propagate.to_device(matrix, dtype)
        else:
            with jax.ensure_compile_time_eval():  # also while this is traced, for shapes or under jit
                graph = _sharded.to_devices(shards, rows, graph_sharding, dtype, normalize)
            place = NamedSharding(graph_sharding.mesh, PartitionSpec(graph_sharding.spec[0]))
            if is_traced(count) and jax.sharding.AxisType.Explicit not in place.mesh.axis_types:
                # jit would put it where it likes; explicit axes are in its type already.
                graph = jax.lax.with_sharding_constraint(graph, place)
        return SEvoState(
            count=count,
            graph=graph,
            residual=jnp.zeros([], jnp.float32) if method == "exact" else None,
        )

    def update_fn(
        updates: optax.Updates,
        state: SEvoState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SEvoState]:
        del params, extra_args
        _check_state(state)
        positions, leaves, names, treedef = _tables.find(updates, paths, num_nodes)
        axis = _tables.check(positions, leaves, names, node_axis, num_nodes)
        strength = beta(state.count) if callable(beta) else beta
        chosen = [leaves[i] for i in positions]
        off = None
        with jax.named_scope("sevo"):
            if graph_sharding is None:
                graph = _check_graph(state.graph, num_nodes, matrix.nnz)
                smoothed, off = smooth_leaves(chosen, axis, graph, strength, num_layers, method, rescale)
            else:
                split = _check_split_graph(state.graph, Layout([leaf.shape[axis] for leaf in chosen], len(shards)))
                smoothed = _sharded.smooth_leaves(
                    chosen, axis, split, strength, num_layers, method, rescale, graph_sharding
                )
        for i, leaf in zip(positions, smoothed, strict=True):
            leaves[i] = leaf
        return jax.tree.unflatten(treedef, leaves), SEvoState(
            count=optax.safe_increment(state.count),
            graph=state.graph,
            residual=None if off is None else off.astype(jnp.float32),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _as_shards(adjacency: Any, sharding: Any, method: Method) -> Shards:
    """The rows of ``adjacency`` in as many shards as ``sharding`` splits a graph into."""
    number = _sharded.num_shards_of(sharding)
    if jax.__version_info__ < (0, 10):
        raise ValueError(
            f"graph_sharding needs JAX 0.10 or later, this is {jax.__version__}; upgrade it, or leave it out"
        )
    if method == "exact":
        raise ValueError(
            "method='exact' does not work with graph_sharding: it is meant for graphs that one device holds; "
            "use method='neumann' with more layers"
        )
    if not isinstance(adjacency, Shards):
        return in_memory(_weights.symmetric_csr(adjacency), number)
    if len(adjacency) != number:
        raise ValueError(
            f"adjacency is split into {len(adjacency)} shards, but graph_sharding splits a graph over {number} "
            f"devices; make it with num_shards={number}"
        )
    return adjacency


def _check_state(state: Any) -> None:
    """Checks that a state is one of ``sevo`` and holds a graph."""
    if not isinstance(state, SEvoState):
        raise TypeError(
            f"the state of sevo(...) is a {type(state).__name__}; wanted the SEvoState that its init or update returned"
        )
    if state.graph is None:
        raise ValueError("the state of sevo(...) holds no graph; put it back: with_graphs(state, tx.init(params))")


_EXCHANGE = (
    "start with tx.init(params), or exchange the graph alone: with_graphs(without_graphs(state), tx.init(params))"
)


def _check_graph(graph: Any, num_nodes: int, num_entries: int) -> CSR:
    """Checks that the graph of a state is whole and of this size."""
    if isinstance(graph, ShardedCSR):
        raise ValueError(
            f"the state of sevo(...) holds a graph split over {graph.send.shape[0]} devices, but graph_sharding is "
            f"None; {_EXCHANGE}"
        )
    nodes, entries = graph.indptr.shape[0] - 1, graph.data.shape[0]
    if (nodes, entries) != (num_nodes, num_entries):
        raise ValueError(
            f"the state of sevo(...) holds the graph of {nodes} nodes and {entries} entries, but this transformation "
            f"was made for one of {num_nodes} nodes and {num_entries} entries; {_EXCHANGE}"
        )
    if not jnp.issubdtype(graph.indices.dtype, jnp.integer):
        raise ValueError(
            f"the state of sevo(...) holds a graph whose indices are {graph.indices.dtype}; cast without_graphs(state) "
            "instead, and put the graph back by with_graphs"
        )
    whole: CSR = graph
    return whole


def _check_split_graph(graph: Any, layout: Layout) -> ShardedCSR:
    """Checks that the graph of a state is split as ``layout`` says."""
    wanted = (layout.num_shards, layout.rows + 1)
    if not isinstance(graph, ShardedCSR) or graph.indptr.shape != wanted:
        held = (
            f"{graph.send.shape[0]} shards of {graph.indptr.shape[1] - 1} rows"
            if isinstance(graph, ShardedCSR)
            else "a whole graph"
        )
        raise ValueError(
            f"the state of sevo(...) holds {held}, but graph_sharding asks for {wanted[0]} shards of {wanted[1] - 1} "
            f"rows; {_EXCHANGE}"
        )
    return graph


def state_axes(state: optax.OptState, axis: int = 0) -> Any:
    """The axes with which to ``vmap`` over replicas of an optimizer state that share one graph.

    Args:
      state: an optimizer state of one replica, or its shapes from :func:`jax.eval_shape`.
      axis: the axis of the replicas; the last one, or for a negative number the first, of leaves with fewer axes, such
        as counts.

    Returns:
      A tree like ``state`` with the axis of every leaf and None for the graph, for ``in_axes`` and ``out_axes``.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sevo_optax import graph, sevo_adamw, state_axes
      >>> tx = sevo_adamw(1e-3, graph.from_edges([0], [1], num_nodes=2))
      >>> params = jnp.ones((5, 2, 8))  # five seeds
      >>> axes = state_axes(jax.eval_shape(tx.init, params[0]))
      >>> state = jax.vmap(tx.init, out_axes=axes)(params)
      >>> update = jax.vmap(tx.update, in_axes=(0, axes, 0), out_axes=(0, axes))
      >>> updates, state = update(params, state, params)
      >>> updates.shape, state[1].graph.data.shape
      ((5, 2, 8), (2,))
    """

    def of(leaf: Any) -> Any:
        return min(axis, np.ndim(leaf)) if axis >= 0 else max(axis, -1 - np.ndim(leaf))

    def axes(leaf: Any) -> Any:
        if not isinstance(leaf, SEvoState):
            return of(leaf)
        whole: Any = None
        graph = None if leaf.graph is None else type(leaf.graph)(*[whole] * len(leaf.graph))
        return SEvoState(of(leaf.count), graph, whole if leaf.residual is None else of(leaf.residual))

    return jax.tree.map(axes, state, is_leaf=_is_state)


def without_graphs(state: optax.OptState) -> Any:
    """An optimizer state without its graphs, for checkpoints: ``init`` builds them again.

    Args:
      state: an optimizer state, with any number of :class:`SEvoState` in it.

    Returns:
      The same tree, where every graph is None, hence without leaves. :func:`with_graphs` leads back.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sevo_optax import graph, sevo, with_graphs, without_graphs
      >>> tx = sevo(graph.from_edges([0], [1], num_nodes=2))
      >>> params = jnp.ones((2, 8))
      >>> saved = jax.device_get(without_graphs(tx.init(params)))  # write this to disk
      >>> state = with_graphs(saved, tx.init(params))
      >>> updates, state = tx.update(params, state)
    """
    return _map_states(lambda leaf: leaf._replace(graph=cast(Any, None)), state)


def with_graphs(state: optax.OptState, like: optax.OptState) -> Any:
    """Puts back what :func:`without_graphs` took out.

    Args:
      state: an optimizer state without graphs.
      like: a state of the same transformation, as its ``init`` returns it, to take the graphs from.

    Returns:
      ``state`` with graphs. They are those of ``like``, not copies: donated with the state, they are gone there, too.

    Raises:
      ValueError: if one holds more states of ``sevo`` than the other.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sevo_optax import graph, sevo, with_graphs, without_graphs
      >>> tx = sevo(graph.from_edges([0], [1], num_nodes=2))
      >>> state = tx.init(jnp.ones((2, 8)))
      >>> with_graphs(without_graphs(state), state).graph is state.graph
      True
    """
    # By their order: the containers around them may differ, as Flax wraps what stands in its optimizers.
    mine, fresh = _states(state), _states(like)
    if len(mine) != len(fresh):
        raise ValueError(
            f"like must be a state of the same transformation, as tx.init(params) returns it, but it holds "
            f"{len(fresh)} states of sevo, and state {len(mine)}"
        )
    graphs = iter([leaf.graph for leaf in fresh])
    return _map_states(lambda leaf: leaf._replace(graph=next(graphs)), state)


def _is_state(leaf: Any) -> bool:
    return isinstance(leaf, SEvoState)


def _states(tree: optax.OptState) -> list[SEvoState]:
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=_is_state) if _is_state(leaf)]


def _map_states(change: Callable[[SEvoState], SEvoState], state: optax.OptState) -> Any:
    """Applies ``change`` to every SEvoState, in the order of the tree."""
    return jax.tree.map(lambda leaf: change(leaf) if _is_state(leaf) else leaf, state, is_leaf=_is_state)
