"""LESSR: sessions as graphs without loss, by recurrent layers along edges in order and attention along shortcuts."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.architectures.base import Encoded, SequenceRecommender, look_up
from models.config import Loss, Optimizer, PrefixConfig
from models.data import Interactions
from models.feeds import Batch
from models.layers import GRU, BatchNorm, Dropout, Linear, additive_attention, split_keys, symmetric_uniform
from models.layers.sessions import SessionGraph, continues, earlier, previous, refuse_repeats


@dataclasses.dataclass(frozen=True)
class LESSRConfig(PrefixConfig):
    """LESSR's options, with the settings for Amazon Beauty that stand beside SEvo's."""

    model: str = "lessr"
    loss: Loss = "bpr"
    """bce, bpr: against one random unseen item. ce: softmax over the catalogue, as in LESSR's own paper.
    sampled-softmax, gbce: against num_negatives items."""
    optimizer: Optimizer = "adamw"
    """adamw: plain. sevo-adamw: smooths Adam's direction (Algorithm 1). sevo-gradient: smooths the gradient instead;
    -uncorrected: in front of plain AdamW. adam, sgd: weight decay in the gradient; sevo-: Algorithms 3 and 2."""
    weight_decay: float = 1e-4
    """Decoupled weight decay, multiplied by the learning rate; adam, sgd: added to the gradient times the parameter."""
    epochs: int = 300
    """Passes over the training data."""
    num_blocks: int = 4
    """Layers: along edges in order, along shortcuts, and so on in turn."""
    dropout_rate: float = 0.6
    """Dropout on what goes into the layers, the readout and the last projection."""
    separate_prefixes: bool = False
    """Whether each prefix is a row of its own: needed where an item repeats in a history. Otherwise all prefixes of a
    user take one pass: much faster, and the same but for batch statistics and shared dropout, and that of a history
    longer than max_length a prefix has its newest half at least, not always all of it."""

    def _at_least_zero(self) -> tuple[str, ...]:
        return ("num_blocks", *super()._at_least_zero())


class PReLU(nnx.Module):
    """``x`` where positive, and a learned multiple of it elsewhere: one slope a channel, 0.25 at the start.

    References:
      He et al., `Delving Deep into Rectifiers <https://arxiv.org/abs/1502.01852>`_, 2015
    """

    def __init__(self, features: int) -> None:
        self.slope = nnx.Param(jnp.full(features, 0.25))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (…, features) to the same shape."""
        return jnp.where(x > 0, x, self.slope[...].astype(x.dtype) * x)


def _linear(in_features: int, out_features: int, *, use_bias: bool = False, rngs: nnx.Rngs) -> Linear:
    """A linear layer with PyTorch's usual initialisation."""
    draw = symmetric_uniform(in_features**-0.5)
    return Linear(in_features, out_features, use_bias=use_bias, kernel_init=draw, bias_init=draw, rngs=rngs)


class EdgeOrderLayer(nnx.Module):
    r"""Edge-order preserving aggregation (EOPA): a node's messages pass a recurrent unit in order of time.

    .. math::

      y_v = \mathrm{PReLU}\big(W_{self} \, \hat x_v + W_{neigh} \, \mathrm{GRU}(\hat x_{u_1}, \hat x_{u_2}, \dots)\big),
      \qquad \hat x = \mathrm{BN}(x)

    where :math:`u_1, u_2, \dots` come right before :math:`v` in the session, once for each time; the state of a node
    without any is zero. The messages have dropout.
    """

    def __init__(self, in_features: int, features: int, dropout_rate: float, *, rngs: nnx.Rngs) -> None:
        draw = symmetric_uniform(in_features**-0.5)
        self.norm = BatchNorm(in_features, rngs=rngs)
        self.dropout = Dropout(dropout_rate)
        self.gru = GRU(in_features, in_features, kernel_init=draw, bias_init=draw, rngs=rngs)
        self.own = _linear(in_features, features, rngs=rngs)
        self.neighbour = _linear(in_features, features, rngs=rngs)
        self.activation = PReLU(features)

    def __call__(
        self, x: jax.Array, segments: jax.Array, graph: SessionGraph | None, nodes: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """Maps (rows, row_length, in_features) to (rows, row_length, features), see :meth:`LESSR.encode`."""
        x = self.norm(x, nodes, training=key is not None)
        messages = self.dropout(x, key)
        if graph is None:
            gathered = previous(self._first_states(messages), segments)
        else:
            gathered = self._last_states(graph.at(graph.first, messages), graph)
        return self.activation(self.own(x) + self.neighbour(gathered))

    def _first_states(self, x: jax.Array) -> jax.Array:
        """The recurrent unit's states after one step from zero, where the kernel of the state meets nothing."""
        inputs = x @ self.gru.in_kernel[...].astype(x.dtype) + self.gru.in_bias[...].astype(x.dtype)
        in_reset, in_update, in_new = jnp.split(inputs, 3, axis=-1)
        reset_bias, update_bias, new_bias = jnp.split(self.gru.state_bias[...].astype(x.dtype), 3)
        new = jnp.tanh(in_new + jax.nn.sigmoid(in_reset + reset_bias) * new_bias)
        return (1 - jax.nn.sigmoid(in_update + update_bias)) * new

    def _last_states(self, messages: jax.Array, graph: SessionGraph) -> jax.Array:
        """The recurrent unit's states of nodes that have taken all their messages."""
        # Tokens in the order of their nodes: the messages of a node then lie side by side, in order of time. A token
        # without one before it brings no message, and stands alone behind all others.
        length = graph.first.shape[1]
        receives = continues(graph.segments)
        owner = jnp.where(receives, graph.first, length + graph.places)
        order = jnp.argsort(owner * length + graph.places, axis=1)
        place = jnp.argsort(order, axis=1)
        sent = graph.at(order, jnp.pad(messages[:, :-1], ((0, 0), (1, 0), (0, 0))))
        states = self.gru(sent, graph.at(order, owner))
        last = graph.at(graph.at(graph.last, place), states)
        return jnp.where(graph.at(graph.last, receives)[..., None], last, 0)


class ShortcutLayer(nnx.Module):
    r"""Shortcut graph attention (SGAT): a node looks at all nodes that occur before it, and at itself.

    .. math::

      y_j = \mathrm{PReLU}\Big(\sum_i a_{ij} W_v \hat x_i\Big), \qquad
      a_{ij} \propto \exp w^\top \sigma(W_q \hat x_i + b_q + W_k \hat x_j), \qquad \hat x = \mathrm{BN}(x)

    over the nodes :math:`i` that occur once at least before an occurrence of :math:`j`. The nodes have dropout.
    """

    def __init__(self, in_features: int, features: int, dropout_rate: float, *, rngs: nnx.Rngs) -> None:
        self.norm = BatchNorm(in_features, rngs=rngs)
        self.dropout = Dropout(dropout_rate)
        self.query = _linear(in_features, features, use_bias=True, rngs=rngs)
        self.key = _linear(in_features, features, rngs=rngs)
        self.value = _linear(in_features, features, rngs=rngs)
        self.weight = nnx.Param(symmetric_uniform(features**-0.5)(rngs.params(), (features,)))
        self.activation = PReLU(features)

    def __call__(
        self, x: jax.Array, segments: jax.Array, graph: SessionGraph | None, nodes: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """Maps (rows, row_length, in_features) to (rows, row_length, features), see :meth:`LESSR.encode`."""
        x = self.dropout(self.norm(x, nodes, training=key is not None), key)
        if graph is None:
            seen = earlier(segments, itself=True)
        else:
            x = graph.at(graph.first, x)
            seen = graph.together & nodes[:, None] & (graph.places <= graph.last[..., None])
        # What the paper calls query belongs to the source of a message: here each target asks all of its sources.
        source, target = self.query(x), self.key(x)
        mixed = additive_attention(
            target, source, self.value(x), self.weight[...], seen, normalize=True, causal=graph is None
        )
        return self.activation(mixed)


class Readout(nnx.Module):
    r"""Attention of the newest node to all nodes of a session.

    .. math::

      \mathrm{PReLU}\Big(W_{out} \sum_i a_i \hat x_i\Big), \qquad
      a_i \propto \exp w^\top \sigma(W_u \hat x_i + W_v \hat x_{newest} + b_v), \qquad \hat x = \mathrm{BN}(x)

    The nodes have dropout.
    """

    def __init__(self, in_features: int, features: int, dropout_rate: float, *, rngs: nnx.Rngs) -> None:
        self.norm = BatchNorm(in_features, rngs=rngs)
        self.dropout = Dropout(dropout_rate)
        self.key = _linear(in_features, features, rngs=rngs)
        self.query = _linear(in_features, features, use_bias=True, rngs=rngs)
        self.weight = nnx.Param(symmetric_uniform(features**-0.5)(rngs.params(), (features,)))
        self.out = _linear(in_features, features, rngs=rngs)
        self.activation = PReLU(features)

    def __call__(
        self, x: jax.Array, segments: jax.Array, graph: SessionGraph | None, nodes: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """Maps (rows, row_length, in_features) to (rows, row_length, features), see :meth:`LESSR.encode`."""
        x = self.dropout(self.norm(x, nodes, training=key is not None), key)
        weight = self.weight[...]
        if graph is None:
            seen = earlier(segments, itself=True)
            mixed = additive_attention(self.query(x), self.key(x), x, weight, seen, normalize=True, causal=True)
        else:
            x = graph.at(graph.first, x)
            mixed = graph.pool(self.query(x), self.key(x), x, weight, nodes, normalize=True)
        return self.activation(self.out(mixed))


class LESSR(SequenceRecommender):
    r"""Lossless edge-order preserving aggregation and shortcut graph attention for session-based recommendation.

    A session's distinct items are nodes, and start as the items' embeddings. Layers along edges in order
    (:class:`EdgeOrderLayer`) and along shortcuts (:class:`ShortcutLayer`) take turns; each one's output is put in front
    of its input. The query at the newest token :math:`t` joins the final features of its node with those of the whole
    session (:class:`Readout`):

    .. math::

      W \, \mathrm{BN}\big([x_t \;;\; \mathrm{Readout}(x)]\big)

    An item's score is the inner product with its embedding, whose norm is at most 1: :meth:`constrain` sees to it after
    every update. Batch normalisation counts nodes, and in the last one the prefixes that have a target. Weight decay
    spares biases, slopes and the scales of normalisations.

    This is the model of its paper and of its authors' code. The values in Table 3 of the SEvo paper are likely of code
    that differs: its shortcut graph has no shortcuts, weights do not depend on the target, and messages reach the wrong
    nodes.

    All prefixes of a history can take one pass if no item repeats, because a node then looks left only. Batch
    statistics count each token once then, and not once in each prefix; dropout is shared by a user's prefixes. An item
    that repeats later, in evaluation, counts as another item with the same embedding. With ``separate_prefixes`` a
    segment is one session, a repeated item is one node, and only the newest token of a segment has a query; the others'
    are zero.

    Args:
      num_items: size of the catalogue. Items are 1 … num_items; row 0 of the table is padding.
      embedding_dim: width of the embeddings and of each layer's output.
      num_blocks: number of layers.
      dropout_rate: dropout on what goes into the layers, the readout and the last projection.
      separate_prefixes: whether a segment is one session with one query; otherwise each of its prefixes is one.
      dtype: what the layers compute in; parameters, statistics and attention weights are float32 anyway.
      rngs: random state for the initialisation.

    References:
      Chen and Wong, `Handling Information Loss of Graph Neural Networks for Session-based Recommendation
      <https://doi.org/10.1145/3394486.3403170>`_, 2020
    """

    config_class = LESSRConfig
    feed = "prefixes"
    undecayed = frozenset({"bias", "in_bias", "state_bias", "scale", "slope"})

    def __init__(
        self,
        num_items: int,
        *,
        embedding_dim: int = 64,
        num_blocks: int = 4,
        dropout_rate: float = 0.6,
        separate_prefixes: bool = False,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.dtype = jnp.dtype(dtype)
        self.separate_prefixes = separate_prefixes
        normal = nnx.initializers.normal(1.0)
        self.item_embedding = nnx.Embed(num_items + 1, embedding_dim, embedding_init=normal, rngs=rngs)
        kinds = (EdgeOrderLayer, ShortcutLayer)
        make = partial(dict, features=embedding_dim, dropout_rate=dropout_rate, rngs=rngs)
        self.blocks = nnx.List([kinds[i % 2](embedding_dim * (i + 1), **make()) for i in range(num_blocks)])
        width = embedding_dim * (num_blocks + 1)
        self.readout = Readout(width, **make())
        self.norm = BatchNorm(width + embedding_dim, rngs=rngs)
        self.dropout = Dropout(dropout_rate)
        self.transform = _linear(width + embedding_dim, embedding_dim, rngs=rngs)
        self.constrain()

    @classmethod
    def make_context(cls, train: Interactions, config: LESSRConfig) -> dict[str, Any]:
        """Nothing, after a look at the data: see :func:`models.layers.sessions.refuse_repeats`."""
        refuse_repeats(train, config)
        return {}

    def constrain(self) -> None:
        """Scales embeddings with a norm larger than 1 down to it."""
        table = self.item_embedding.embedding[...]
        self.item_embedding.embedding[...] = at_most_one(table)

    def encode(
        self,
        batch: Batch,
        represented: Mapping[str, Any] | None = None,
        key: jax.Array | None = None,
        candidates: jax.Array | None = None,
    ) -> Encoded:
        """Encodes packed histories: what predicts the item behind a prefix, at the prefix's newest token.

        In training (``key`` not None) the running statistics of batch normalisation change.
        """
        del represented
        embedded, rows = look_up(self.item_embedding.embedding[...], batch.inputs, candidates)
        x = embedded.astype(self.dtype)
        filled = batch.segments > 0
        graph = SessionGraph.build(batch.inputs, batch.segments) if self.separate_prefixes else None
        nodes = filled if graph is None else graph.nodes
        ends = filled if graph is None else graph.ends
        keys = split_keys(key, len(self.blocks) + 2)
        for block, block_key in zip(self.blocks, keys[2:], strict=True):
            x = jnp.concatenate([block(x, batch.segments, graph, nodes, block_key), x], axis=-1)
        both = jnp.concatenate([x, self.readout(x, batch.segments, graph, nodes, keys[0])], axis=-1)
        both = self.norm(both, ends & (batch.targets > 0), training=key is not None)
        vectors = jnp.where(ends[..., None], self.transform(self.dropout(both, keys[1])), 0)
        return Encoded(vectors, rows, None if rows is None else jnp.zeros((), rows.dtype))


def at_most_one(table: jax.Array) -> jax.Array:
    """Scales rows with a norm larger than 1 down to it.

    Args:
      table: shape (rows, dim).

    Examples:
      >>> at_most_one(jnp.array([[3.0, 4.0], [0.3, 0.4]])).round(3).tolist()
      [[0.6000000238418579, 0.800000011920929], [0.30000001192092896, 0.4000000059604645]]
    """
    norm = jnp.linalg.norm(table, axis=1, keepdims=True)
    return jnp.where(norm > 1, table / (norm + 1e-7), table)
