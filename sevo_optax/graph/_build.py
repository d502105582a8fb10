"""Graphs from what is known about the nodes: sequences, interactions, attributes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import scipy.sparse
from jax.experimental import sparse as jsparse
from numpy.typing import ArrayLike

from sevo_optax._memory import require_memory
from sevo_optax._weights import (
    check_choice,
    check_ids,
    check_num_nodes,
    check_positive_int,
    check_same_length,
    check_weights,
    is_missing,
    raw_bcoo,
    to_bcoo,
)
from sevo_optax.graph import _matrices
from sevo_optax.graph._matrices import Sum, directed_csr, mirror
from sevo_optax.graph._sequences import flatten


def cooccurrence(
    sequences: Iterable[Sequence[int] | np.ndarray] | tuple[ArrayLike, ArrayLike],
    num_nodes: int,
    *,
    max_length: int | None = None,
    keep: Literal["last", "first"] = "last",
    max_hops: int = 1,
    weighting: Literal["distance", "frequency"] = "distance",
    progress: Callable[[int, int], object] | None = None,
) -> jsparse.BCOO:
    r"""Weighs pairs of items by how often and how closely they follow each other.

    Algorithm 4 of the paper. Every sequence is cut to its last (or first) :math:`K` items
    :math:`v_1, \dots, v_T`, and each pair of positions at most :math:`H` apart adds to both
    directions of an edge:

    .. math::
      w_{v_i v_j} \mathrel{+}= \omega(j - i), \quad
      w_{v_j v_i} \mathrel{+}= \omega(j - i) \qquad \text{for } 1 \le j - i \le H,

    with :math:`\omega(h) = 1/h` by distance and :math:`\omega(h) = 1` by frequency. The algorithm is
    followed literally where an item meets itself: both additions then fall on the same entry, so
    the self-loop of :math:`v` gains :math:`2\,\omega(h)`.

    Edges are summed in chunks, in time linear in the number of pairs and in memory proportional to
    the number of distinct edges.

    Args:
      sequences: item ids in 0..num_nodes-1, oldest first and without padding: a list (or another
        iterable, read once) of integer sequences of any lengths. Or the tuple
        ``(flat_items, offsets)``, the fastest form: sequence number s is
        ``flat_items[offsets[s]:offsets[s + 1]]``. A tuple of length two is always read so.
      num_nodes: number of nodes of the graph, at least the largest id plus one.
      max_length: :math:`K`, how many items of a sequence to look at; None looks at all.
      keep: which end of a longer sequence to keep, "last" or "first".
      max_hops: :math:`H`, the longest distance between two items that are still related.
      weighting: "distance" or "frequency".
      progress: called as ``progress(done, total)`` after each chunk, in interactions.

    Returns:
      Raw symmetric weights, BCOO float32 of shape (num_nodes, num_nodes).

    Raises:
      TypeError: if an id is not an integer, or ``sequences`` holds something else than sequences.
      ValueError: if an id lies outside 0..num_nodes-1, there are no interactions, the offsets do not
        fit, or an option is none of those listed.

    Examples:
      Items 2, 1, 3 in this order, related over at most two hops:

      >>> from sevo_optax import graph
      >>> graph.cooccurrence([[2, 1, 3]], num_nodes=4, max_hops=2).todense()
      Array([[0. , 0. , 0. , 0. ],
             [0. , 0. , 1. , 1. ],
             [0. , 1. , 0. , 0.5],
             [0. , 1. , 0.5, 0. ]], dtype=float32)
    """
    num_nodes = check_num_nodes(num_nodes)
    max_hops = check_positive_int(max_hops, "max_hops")
    check_choice(keep, ("last", "first"), "keep")
    check_choice(weighting, ("distance", "frequency"), "weighting")
    if max_length is not None:
        max_length = check_positive_int(max_length, "max_length")

    items, offsets = flatten(sequences, num_nodes)
    starts, ends = offsets[:-1], offsets[1:]
    if max_length is not None and keep == "last":
        starts = np.maximum(starts, ends - max_length)
    elif max_length is not None:
        ends = np.minimum(ends, starts + max_length)
    # The kept interactions are numbered 0..total-1; sequence s owns bounds[s]..bounds[s + 1]-1.
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(ends - starts)])
    total = int(bounds[-1])
    shift = starts - bounds[:-1]

    summed = Sum(num_nodes)
    # Each partial sum has a row pointer for every node: chunks no smaller keep the time linear.
    chunk = max(_matrices.CHUNK, num_nodes)
    require_memory(
        60 * min(chunk, total) + 24 * num_nodes,
        f"a co-occurrence graph of {num_nodes} nodes",
        "Number the items that occur from 0 to n-1.",
    )
    for begin in range(0, total, chunk):
        end = min(begin + chunk, total)
        low = int(np.searchsorted(bounds, begin, side="right")) - 1
        high = int(np.searchsorted(bounds, end, side="left"))
        count = np.diff(np.clip(bounds[low : high + 1], begin, end))
        number = np.arange(begin, end)
        position = number + np.repeat(shift[low:high], count)
        following = np.repeat(bounds[low + 1 : high + 1] - 1, count) - number
        for hop in range(1, max_hops + 1):
            alive = following >= hop
            if not alive.all():
                position, following = position[alive], following[alive]
            if not position.size:
                break
            weight = 1.0 / hop if weighting == "distance" else 1.0
            one, other = items[position], items[position + hop]
            # One triangle is enough: it is mirrored at the end.
            count = directed_csr(np.minimum(one, other), np.maximum(one, other), None, num_nodes)
            summed.add(count * weight)
        if progress is not None:
            progress(end, total)
    # Mirroring only doubles the diagonal: in float32 already it costs no accuracy.
    triangle = summed.total().astype(np.float32)
    return to_bcoo(mirror(triangle, "sum"))


def user_item(
    users: ArrayLike,
    items: ArrayLike,
    num_users: int,
    num_items: int,
    *,
    weights: ArrayLike | None = None,
) -> jsparse.BCOO:
    r"""Connects users with the items they interacted with.

    The bipartite graph of Section 5.2 of the paper: :math:`w_{ui} = 1` if user :math:`u` interacted
    with item :math:`i`, and 0 otherwise. Users are the nodes 0..num_users-1, items follow as nodes
    num_users..num_users+num_items-1; stack the tables in the same order.

    Args:
      users: user ids in 0..num_users-1, integers of shape (interactions,).
      items: item ids in 0..num_items-1, integers of shape (interactions,).
      num_users: number of users.
      num_items: number of items.
      weights: finite, non-negative weights of shape (interactions,), such as ratings; those of
        repeated interactions add up. With None every pair that occurs weighs 1, however often it
        is repeated.

    Returns:
      Raw symmetric weights, BCOO float32 of shape (num_users + num_items, num_users + num_items).

    Raises:
      TypeError: if ids are not integers or weights not real numbers.
      ValueError: if an id is out of range, a weight negative or not finite, lengths differ, or there
        are no interactions.

    Examples:
      >>> from sevo_optax import graph
      >>> graph.user_item([0, 1, 1], [1, 0, 1], num_users=2, num_items=2).todense()
      Array([[0., 0., 0., 1.],
             [0., 0., 1., 1.],
             [0., 1., 0., 0.],
             [1., 1., 0., 0.]], dtype=float32)
    """
    num_users = check_num_nodes(num_users, "num_users")
    num_items = check_num_nodes(num_items, "num_items")
    num_nodes = check_num_nodes(num_users + num_items, "num_users + num_items")
    users = check_ids(users, num_users, "users", "num_users")
    items = check_ids(items, num_items, "items", "num_items")
    check_same_length(users=users, items=items)
    directed = directed_csr(
        users,
        items.astype(np.int64) + num_users,
        None if weights is None else check_weights(weights, users.size),
        num_nodes,
    )
    if weights is None:
        directed.data[:] = 1.0
    return raw_bcoo(mirror(directed, "sum"))


def shared_attributes(
    nodes: ArrayLike,
    attributes: ArrayLike,
    num_nodes: int,
    *,
    weighting: Literal["any", "count"] = "any",
) -> jsparse.BCOO:
    r"""Connects nodes that share an attribute, such as movies of the same genre.

    Similarity based on prior knowledge (Section 4 of the paper): with :math:`S_i` the attributes
    of node :math:`i`, two different nodes weigh

    .. math::
      w_{ij} = \begin{cases} \min(1, |S_i \cap S_j|) & \text{"any"} \\
      |S_i \cap S_j| & \text{"count".} \end{cases}

    A node has no self-loop. An attribute of m nodes yields m (m - 1) stored entries; leave out those
    that nearly all nodes have. How many entries there will be is estimated first, from a sample of the nodes.

    Args:
      nodes: node ids in 0..num_nodes-1, integers of shape (pairs,).
      attributes: the attribute of each pair, shape (pairs,): numbers, strings or any hashable
        objects. Repeated pairs count once.
      num_nodes: number of nodes.
      weighting: "any" weighs 1 if at least one attribute is shared, "count" the number shared.

    Returns:
      Raw symmetric weights, BCOO float32 of shape (num_nodes, num_nodes).

    Raises:
      TypeError: if ids are not integers or an attribute is not hashable.
      ValueError: if an id is out of range, an attribute is missing (None or NaN) or too common to
        store its edges, the graph does not fit into memory, lengths differ, or there are no pairs.

    Examples:
      >>> from sevo_optax import graph
      >>> genres = {0: "Comedy|Drama", 1: "Drama|Comedy", 2: "Drama", 3: "Western"}
      >>> pairs = [(movie, genre) for movie in genres for genre in genres[movie].split("|")]
      >>> movies, labels = zip(*pairs)
      >>> graph.shared_attributes(movies, labels, num_nodes=4, weighting="count").todense()
      Array([[0., 2., 1., 0.],
             [2., 0., 1., 0.],
             [1., 1., 0., 0.],
             [0., 0., 0., 0.]], dtype=float32)
    """
    num_nodes = check_num_nodes(num_nodes)
    check_choice(weighting, ("any", "count"), "weighting")
    nodes = check_ids(nodes, num_nodes, "nodes", "num_nodes")
    codes, distinct = _encode(attributes)
    check_same_length(nodes=nodes, attributes=codes)

    incidence = scipy.sparse.csr_array(
        (np.ones(nodes.size, np.int32), (nodes, codes)), shape=(num_nodes, len(distinct))
    )
    incidence.sum_duplicates()
    incidence.data[:] = 1
    sharing = np.bincount(incidence.indices, minlength=len(distinct))
    common = int(sharing.argmax())
    most = distinct[common].item() if isinstance(distinct, np.ndarray) else distinct[common]
    entries = int(sharing[common]) ** 2
    if entries >= _matrices.MAX_ENTRIES:
        raise ValueError(
            f"attribute {most!r} is shared by {sharing[common]} nodes, which makes {entries:.1e} "
            f"entries; wanted fewer than {_matrices.MAX_ENTRIES:.1e}. "
            "Leave out attributes this common: they tell little about similarity."
        )
    remedy = f"Leave out the most common attributes, such as {most!r} of {sharing[common]} nodes."
    estimate = _estimate_shared(incidence, sharing)
    if estimate >= _matrices.MAX_ENTRIES:
        raise ValueError(
            f"the nodes share attributes in about {estimate:.1e} pairs; wanted fewer than "
            f"{_matrices.MAX_ENTRIES:.1e}. {remedy}"
        )
    # The product and its rows, and the result twice: in NumPy and in JAX.
    require_memory(40 * estimate + 24 * num_nodes, f"a graph of about {estimate:.1e} shared attributes", remedy)
    shared = (incidence @ incidence.T).tocsr()
    row = np.repeat(np.arange(num_nodes, dtype=np.int32), np.diff(shared.indptr))
    shared.data[shared.indices == row] = 0
    del row
    shared.eliminate_zeros()
    shared.sort_indices()
    shared.data = np.ones(shared.nnz, np.float32) if weighting == "any" else shared.data.astype(np.float32)
    return to_bcoo(shared)


def _estimate_shared(incidence: scipy.sparse.csr_array, sharing: np.ndarray) -> int:
    """About how many pairs of nodes share an attribute, counted exactly on 256 nodes or fewer."""
    most = float(np.square(sharing, dtype=np.float64).sum())
    if most < _matrices.CHUNK:
        return int(most)
    active = np.flatnonzero(np.diff(incidence.indptr))
    sample = np.random.default_rng(0).choice(active, min(256, active.size), replace=False)
    members = incidence.T.tocsr()
    counts = [(incidence[[node]] @ members).nnz for node in sample]
    # The sample may miss one attribute that very many share: among themselves, these are pairs in any case.
    return max(int(np.mean(counts) * active.size), int(sharing.max(initial=0)) ** 2)


def _encode(attributes: Any) -> tuple[np.ndarray, Any]:
    """Numbers attributes in 0..len(distinct)-1; returns the codes and the distinct attributes."""
    if isinstance(attributes, str | bytes | Mapping | set | frozenset) or not isinstance(attributes, Iterable):
        raise TypeError(f"attributes is a {type(attributes).__name__}; wanted one attribute for each of nodes.")
    # NumPy would turn a list of mixed types into strings, and tuples into a second dimension.
    values = np.asarray(attributes) if hasattr(attributes, "__array__") else list(attributes)
    if isinstance(values, np.ndarray):
        if values.ndim != 1:
            raise ValueError(
                f"attributes has shape {values.shape}; wanted (pairs,), one row for each pair of a "
                "node and one of its attributes."
            )
        if values.dtype.kind in "iubSU":
            distinct, codes = np.unique(values, return_inverse=True)
            return codes, distinct
        values = values.tolist()
    numbers: dict[Any, int] = {}
    codes = np.empty(len(values), np.int64)
    for index, value in enumerate(values):
        if is_missing(value):
            raise ValueError(
                f"attributes[{index}] is {value}, a missing value, which nodes cannot share. Leave out such pairs."
            )
        try:
            codes[index] = numbers.setdefault(value, len(numbers))
        except TypeError as error:
            raise TypeError(
                f"attributes[{index}] is {value!r}, which is not hashable; wanted numbers, strings "
                "or other hashable objects. Convert lists to tuples, or list one pair for each."
            ) from error
    return codes, list(numbers)
