"""Building the weighted graphs that SEvo smooths along.

Every function here runs once, on the host, in NumPy and SciPy, and returns *raw symmetric weights*:
a :class:`jax.experimental.sparse.BCOO` of float32 values whose int32 indices are sorted row by row and
unique. Nodes are numbered 0..num_nodes-1. The transformation normalises the weights itself, so a
graph is handed over as it comes out of a builder:

* :func:`cooccurrence`: items that follow each other in a sequence (Algorithm 4),
* :func:`user_item`: users and the items they interacted with, as one bipartite graph,
* :func:`shared_attributes`: prior knowledge, such as movies of the same genre,
* :func:`knn`: nearest neighbours of feature vectors, such as embeddings of texts,
* :func:`from_edges`, :func:`from_parquet`, :func:`from_scipy`: anything else, directed edges included.

:func:`combine` adds several relations over the same nodes, :func:`top_k` and :func:`drop_below` thin a graph out,
:func:`summary` describes it, :func:`save` and :func:`load` keep it, :func:`shard` splits its rows over devices.

A log too large for one machine is reduced to edges where it lies. ``COOCCURRENCE_SQL`` is Algorithm 4
as one SQL statement; write its result to parquet and read that::

    duckdb.sql(f"COPY ({graph.COOCCURRENCE_SQL}) TO 'edges.parquet'")
    weights = graph.from_parquet("edges.parquet", num_nodes=num_items + 1)
"""

from sevo_optax._shards import Shards as Shards
from sevo_optax._shards import ShardSummary as ShardSummary
from sevo_optax._weights import Adjacency as Adjacency
from sevo_optax.graph._build import cooccurrence as cooccurrence
from sevo_optax.graph._build import shared_attributes as shared_attributes
from sevo_optax.graph._build import user_item as user_item
from sevo_optax.graph._convert import from_edges as from_edges
from sevo_optax.graph._convert import from_scipy as from_scipy
from sevo_optax.graph._convert import to_scipy as to_scipy
from sevo_optax.graph._files import load as load
from sevo_optax.graph._files import save as save
from sevo_optax.graph._knn import knn as knn
from sevo_optax.graph._parquet import COOCCURRENCE_SQL as COOCCURRENCE_SQL
from sevo_optax.graph._parquet import from_parquet as from_parquet
from sevo_optax.graph._reshape import combine as combine
from sevo_optax.graph._reshape import drop_below as drop_below
from sevo_optax.graph._reshape import normalize as normalize
from sevo_optax.graph._reshape import top_k as top_k
from sevo_optax.graph._shard import shard as shard
from sevo_optax.graph._summary import GraphSummary as GraphSummary
from sevo_optax.graph._summary import summary as summary

__all__ = [
    "COOCCURRENCE_SQL",
    "Adjacency",
    "GraphSummary",
    "ShardSummary",
    "Shards",
    "combine",
    "cooccurrence",
    "drop_below",
    "from_edges",
    "from_parquet",
    "from_scipy",
    "knn",
    "load",
    "normalize",
    "save",
    "shard",
    "shared_attributes",
    "summary",
    "to_scipy",
    "top_k",
    "user_item",
]


def __dir__() -> list[str]:
    return list(__all__)
