"""Splitting the rows of a graph that one device cannot hold."""

from sevo_optax._shards import Shards, in_memory
from sevo_optax._weights import Adjacency, check_positive_int, symmetric_csr


def shard(adjacency: Adjacency, num_shards: int) -> Shards:
    """Splits the rows of a graph over devices, on the host.

    :func:`sevo` does so by itself when it is given ``graph_sharding``. This function says beforehand what it will cost,
    and shows the rows of each device. A graph that the host cannot hold either is read in shards by
    :func:`from_parquet`.

    Args:
      adjacency: symmetric weights of shape (nodes, nodes).
      num_shards: over how many devices.

    Returns:
      A :class:`Shards`: a sequence of SciPy CSR arrays, with a ``summary``.

    Raises:
      TypeError: if ``adjacency`` is no matrix, or ``num_shards`` no integer.
      ValueError: if the weights are invalid, or ``num_shards`` is not positive.

    Examples:
      A ring of six nodes over three devices. Each needs one row of each other:

      >>> from sevo_optax import graph
      >>> ring = graph.from_edges(range(6), [1, 2, 3, 4, 5, 0], num_nodes=6)
      >>> shards = graph.shard(ring, 3)
      >>> shards[1].toarray()
      array([[0., 1., 0., 1., 0., 0.],
             [0., 0., 1., 0., 1., 0.]])
      >>> shards.summary()
      ShardSummary(num_shards=3, rows=2, entries=4, largest_share=1.0, exchanged=1)
      >>> shards.summary().bytes_per_layer(dim=16)  # what a device sends: two rows of 16 float32 numbers
      128
    """
    return in_memory(symmetric_csr(adjacency), check_positive_int(num_shards, "num_shards"))
