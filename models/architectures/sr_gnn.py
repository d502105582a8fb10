"""SR-GNN: a gated graph network over the items of a session, read out by attention to the newest one."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from models.architectures.base import Encoded, SequenceRecommender, look_up
from models.config import Loss, Optimizer, PrefixConfig
from models.data import Interactions
from models.feeds import Batch
from models.layers import Dropout, Linear, additive_attention, symmetric_uniform
from models.layers.sessions import SessionGraph, earlier, following, previous, refuse_repeats

IncomingMessages = Literal["predecessors", "successors"]


@dataclasses.dataclass(frozen=True)
class SRGNNConfig(PrefixConfig):
    """SR-GNN's options, with the settings for Amazon Beauty that stand beside SEvo's."""

    model: str = "sr-gnn"
    loss: Loss = "bpr"
    """bce, bpr: against one random unseen item. ce: softmax over the catalogue, as in SR-GNN's own paper.
    sampled-softmax, gbce: against num_negatives items."""
    optimizer: Optimizer = "adam"
    """adamw: plain. sevo-adamw: smooths Adam's direction (Algorithm 1). sevo-gradient: smooths the gradient instead;
    -uncorrected: in front of plain AdamW. adam, sgd: weight decay in the gradient; sevo-: Algorithms 3 and 2."""
    weight_decay: float = 1e-6
    """Decoupled weight decay, multiplied by the learning rate; adam, sgd: added to the gradient times the parameter."""
    batch_size: int = 100
    """Prefixes in a batch, on average."""
    dropout_rate: float = 0.0
    """Dropout on embeddings; the published model has none."""
    incoming: IncomingMessages = "predecessors"
    """What the incoming half of a message gathers; successors: the error of the code that Table 3's values are likely
    from, see the model."""
    separate_prefixes: bool = False
    """Whether each prefix is a row of its own: needed where an item repeats in a history. Otherwise all prefixes of a
    user take one pass: much faster, and the same queries, but that of a history longer than max_length a prefix has its
    newest half at least, not always all of it."""


class SRGNN(SequenceRecommender):
    r"""Session-based recommendation with a graph neural network.

    A session's distinct items are nodes, with an edge :math:`u \to v` where :math:`v` follows :math:`u`, once or more.
    Nodes start as the items' embeddings :math:`h`, gather messages along the edges in both directions, and are updated
    by one gated step:

    .. math::

      a_v &= \Big[ \tfrac{1}{|P_v|} \sum_{u \in P_v} (W_{in} h_u + c_{in}) + b_{in} \;;\;
                   \tfrac{1}{|S_v|} \sum_{w \in S_v} (W_{out} h_w + c_{out}) + b_{out} \Big] \\
      r_v, z_v &= \sigma(W_{r,z} \, a_v + U_{r,z} \, h_v + b_{r,z}), \qquad
      n_v = \tanh\big(W_n a_v + b_n + r_v \circ (U_n h_v + b'_n)\big), \qquad
      h'_v = n_v + z_v \circ (h_v - n_v)

    with :math:`P_v` the nodes before :math:`v` and :math:`S_v` those behind it; a sum over nothing is zero. The query
    at the newest token :math:`t` is

    .. math::

      W_s \Big[ \sum_{k \le t} \alpha_k h'_k \;;\; h'_t \Big] + b_s, \qquad
      \alpha_k = w^\top \sigma(L_1 h'_t + L_2 h'_k)

    (its section 3; no softmax), where a repeated item counts each time. An item's score is the inner product with its
    embedding.

    With ``incoming="successors"`` the first half is :math:`\sum_{w \in S_v} \tfrac{1}{|P_w|} (W_{in} h_w + c_{in}) +
    b_{in}`: the published code that Table 3 of the SEvo paper likely stems from forgets to transpose a matrix. Then the
    newest item, which matters most, hears of nothing before it.

    All prefixes of a history can take one pass if no item repeats, because only the newest node of a prefix differs
    from the same node of the whole history: nothing follows it yet. An item that repeats later, in evaluation, then
    counts as another item with the same embedding. With ``separate_prefixes`` a segment is one session, a repeated item
    is one node, and only the newest token of a segment has a query; the others' are zero.

    Args:
      num_items: size of the catalogue. Items are 1 … num_items; row 0 of the table is padding.
      embedding_dim: width of everything.
      dropout_rate: dropout on embeddings.
      incoming: what the incoming half of a message gathers.
      separate_prefixes: whether a segment is one session with one query; otherwise each of its prefixes is one.
      dtype: what the layers compute in; parameters and attention weights are float32 anyway.
      rngs: random state for the initialisation.

    References:
      Wu et al., `Session-based Recommendation with Graph Neural Networks <https://arxiv.org/abs/1811.00855>`_, 2019
    """

    config_class = SRGNNConfig
    feed = "prefixes"

    def __init__(
        self,
        num_items: int,
        *,
        embedding_dim: int = 64,
        dropout_rate: float = 0.0,
        incoming: IncomingMessages = "predecessors",
        separate_prefixes: bool = False,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if incoming not in get_args(IncomingMessages):
            raise ValueError(f"incoming must be one of {', '.join(get_args(IncomingMessages))}, got {incoming!r}")
        self.dtype = jnp.dtype(dtype)
        self.incoming = incoming
        self.separate_prefixes = separate_prefixes
        # The published initialisation: the same for everything.
        draw = symmetric_uniform(embedding_dim**-0.5)
        linear = partial(Linear, kernel_init=draw, bias_init=draw, rngs=rngs)
        self.item_embedding = nnx.Embed(num_items + 1, embedding_dim, embedding_init=draw, rngs=rngs)
        self.edge_in = linear(embedding_dim, embedding_dim)
        self.edge_out = linear(embedding_dim, embedding_dim)
        self.message_bias = nnx.Param(draw(rngs.params(), (2 * embedding_dim,)))
        self.message_gates = linear(2 * embedding_dim, 3 * embedding_dim)
        self.state_gates = linear(embedding_dim, 3 * embedding_dim)
        self.attention_query = linear(embedding_dim, embedding_dim)
        self.attention_key = linear(embedding_dim, embedding_dim)
        self.attention_weight = nnx.Param(draw(rngs.params(), (embedding_dim,)))
        self.transform = linear(2 * embedding_dim, embedding_dim)
        self.dropout = Dropout(dropout_rate)

    @classmethod
    def make_context(cls, train: Interactions, config: SRGNNConfig) -> dict[str, Any]:
        """Nothing, after a look at the data: see :func:`models.layers.sessions.refuse_repeats`."""
        refuse_repeats(train, config)
        return {}

    def encode(
        self,
        batch: Batch,
        represented: Mapping[str, Any] | None = None,
        key: jax.Array | None = None,
        candidates: jax.Array | None = None,
    ) -> Encoded:
        """Encodes packed histories: what predicts the item behind a prefix, at the prefix's newest token."""
        del represented
        embedded, rows = look_up(self.item_embedding.embedding[...], batch.inputs, candidates)
        x = self.dropout(embedded.astype(self.dtype), key)
        if self.separate_prefixes:
            vectors = self._encode_sessions(x, SessionGraph.build(batch.inputs, batch.segments))
        else:
            vectors = self._encode_chains(x, batch.segments)
        return Encoded(vectors, rows, None if rows is None else jnp.zeros((), rows.dtype))

    def _encode_chains(self, x: jax.Array, segments: jax.Array) -> jax.Array:
        """Queries of all prefixes, from embeddings (rows, row_length, embedding_dim)."""
        before, behind = self.edge_in(x), following(self.edge_out(x), segments)
        into = previous(before, segments)
        inside = following(before, segments) if self.incoming == "successors" else into
        newest = jnp.zeros_like(into) if self.incoming == "successors" else into
        # A node inside a prefix, and a node that is the prefix's newest: nothing follows it.
        inside = self._step(x, inside, behind)
        newest = self._step(x, newest, jnp.zeros_like(behind))
        weight = self.attention_weight[...]
        query = self.attention_query(newest)
        mixed = additive_attention(
            query,
            self.attention_key(inside),
            inside,
            weight,
            earlier(segments, itself=False),
            normalize=False,
            causal=True,
        )
        own = jax.nn.sigmoid(query + self.attention_key(newest)) @ weight.astype(x.dtype)
        return self.transform(jnp.concatenate([mixed + own[..., None] * newest, newest], axis=-1))

    def _encode_sessions(self, x: jax.Array, graph: SessionGraph) -> jax.Array:
        """A query a session, from embeddings (rows, row_length, embedding_dim)."""
        # With dropout, a node's copies differ.
        x = graph.at(graph.first, x)
        edges = graph.edges(x.dtype)
        num_before, num_behind = (jnp.maximum(jnp.sum(edges, axis=axis, keepdims=True), 1) for axis in (1, 2))
        to_incoming = edges / num_before
        if self.incoming == "predecessors":
            to_incoming = jnp.swapaxes(to_incoming, 1, 2)
        state = self._step(x, to_incoming @ self.edge_in(x), (edges / num_behind) @ self.edge_out(x))
        state = graph.at(graph.first, state)
        mixed = graph.pool(
            self.attention_query(state),
            self.attention_key(state),
            state,
            self.attention_weight[...],
            graph.segments > 0,
            normalize=False,
        )
        vectors = self.transform(jnp.concatenate([mixed, state], axis=-1))
        return jnp.where(graph.ends[..., None], vectors, 0)

    def _step(self, x: jax.Array, incoming: jax.Array, outgoing: jax.Array) -> jax.Array:
        """The gated step of nodes that have gathered messages; all of shape (rows, row_length, embedding_dim)."""
        messages = jnp.concatenate([incoming, outgoing], axis=-1) + self.message_bias[...].astype(x.dtype)
        from_messages = jnp.split(self.message_gates(messages), 3, axis=-1)
        from_state = jnp.split(self.state_gates(x), 3, axis=-1)
        reset, update = (jax.nn.sigmoid(m + s) for m, s in zip(from_messages[:2], from_state[:2], strict=True))
        new = jnp.tanh(from_messages[2] + reset * from_state[2])
        return new + update * (x - new)
