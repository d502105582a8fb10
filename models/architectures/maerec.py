"""MAERec: a graph of items, some of whose paths are masked and restored, below self-attention over a history."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from flax import nnx
from jax.experimental.sparse import BCOO

from models.architectures.base import Encoded, Queries, SequenceRecommender, look_up
from models.checks import Heeded
from models.config import Optimizer, TransformerConfig, above
from models.data import Interactions
from models.feeds import Batch, NegativeSampler
from models.feeds.negatives import Proposal
from models.layers import Attention, Dropout, LayerNorm, Linear, split_keys
from sevo_optax import graph, propagate

NextSeeds = Literal["sums", "ends"]

_xavier_uniform = nnx.initializers.xavier_uniform()

# Keeps quotients finite, as published.
_TINY = 1e-8


@dataclasses.dataclass(frozen=True)
class MAERecConfig(TransformerConfig):
    """MAERec's options, with the settings for Amazon Beauty that SEvo's paper most likely compares with."""

    heeded: ClassVar[Heeded] = {
        **TransformerConfig.heeded,
        **dict.fromkeys(("attention_dropout_rate", "residual_feed_forward"), (above("num_blocks", 0, "1"),)),
        **dict.fromkeys(
            ("num_reconstructed", "num_edge_negatives", "reject_edges", "log_reconstruction"),
            (above("reconstruction_weight", 0, "0.005"),),
        ),
        "next_seeds": (above("mask_depth", 1, "2"),),
        "low_reward": (above("mask_steps", 1, "2"),),
    }

    model: str = "maerec"
    num_heads: int = 4
    """Attention heads a block; divides embedding_dim."""
    dropout_rate: float = 0.2
    """Dropout on embeddings and behind the layers."""
    attention_dropout_rate: float = 0.3
    """Dropout on attention weights."""
    residual_feed_forward: bool = False
    """Whether a feed-forward part is added to its input; as published, it is not."""
    item_graph_hops: int = 3
    """Items at most so far apart in a training sequence are neighbours in the item graph."""
    num_gcn_layers: int = 2
    """Propagations over the item graph."""
    mask_steps: int = 5
    """Steps until other paths are masked."""
    num_mask_seeds: int = 200
    """Items that masked paths start from."""
    mask_depth: int = 3
    """Length of the masked paths, in edges."""
    path_probability: float = 0.5
    """Probability that a path goes on; behind k edges, its k-th power. In (0, 1]."""
    next_seeds: NextSeeds = "sums"
    """Where paths go on: ends: at the ends of masked edges. sums: at the sums of both ends' numbers, as published."""
    num_reconstructed: int = 2048
    """Masked edges that a step restores."""
    num_edge_negatives: int = 40
    """Pairs of items that a masked edge is compared with: half with another target, half with another source."""
    reject_edges: bool = False
    """Whether those pairs are never edges; as published, they may be."""
    log_reconstruction: bool = False
    """Whether the reconstruction's loss has a logarithm; as published, it has none."""
    reconstruction_weight: float = 5e-3
    """Weight of the reconstruction's loss."""
    low_reward: float = 0.2
    """Weight of the masking's loss while the main loss falls more slowly than before; otherwise 1."""
    l2_weight: float = 1e-8
    """Weight of the sum of the squares of all parameters."""
    optimizer: Optimizer = "adam"
    """adamw: plain. sevo-adamw: smooths Adam's direction (Algorithm 1). sevo-gradient: smooths the gradient instead;
    -uncorrected: in front of plain AdamW. adam, sgd: weight decay in the gradient; sevo-: Algorithms 3 and 2."""
    weight_decay: float = 0.0
    """Decoupled weight decay, multiplied by the learning rate; adam, sgd: added to the gradient times the parameter."""
    epochs: int = 100
    """Passes over the training data."""
    batch_size: int = 256
    """Users in a batch, on average: sequences are packed, and batches hold equally many rows."""
    eval_every: int = 1
    """Epochs between two evaluations on the validation items."""

    def _at_least_one(self) -> tuple[str, ...]:
        own = ("item_graph_hops", "num_gcn_layers", "mask_steps", "num_mask_seeds", "mask_depth", "num_reconstructed")
        return (*own, *super()._at_least_one())

    def _at_least_zero(self) -> tuple[str, ...]:
        return ("reconstruction_weight", "low_reward", "l2_weight", *super()._at_least_zero())

    def _below_one(self) -> tuple[str, ...]:
        return ("attention_dropout_rate", *super()._below_one())

    def _check(self) -> None:
        super()._check()
        _check_masking(self.path_probability, self.next_seeds, self.num_edge_negatives)


def _check_masking(path_probability: float, next_seeds: str, num_edge_negatives: int) -> None:
    if not 0 < path_probability <= 1:
        raise ValueError(f"path_probability must lie in (0, 1], got {path_probability}")
    if next_seeds not in ("sums", "ends"):
        raise ValueError(f"next_seeds must be one of sums, ends, got {next_seeds!r}")
    if num_edge_negatives < 2 or num_edge_negatives % 2:
        raise ValueError(
            f"num_edge_negatives must be an even number of at least 2, half of them with another target and half with "
            f"another source, got {num_edge_negatives}"
        )


class Masking(nnx.Variable):
    """What masking remembers from one step to the next."""


class Represented(NamedTuple):
    """The item graph's part of a step.

    Attributes:
      items: shape (num_items + 1, dim), the sum of ``layers``.
      layers: the item table, and what it becomes with each propagation, each (num_items + 1, dim).
      edges: shape (edges, 2), int32, the item graph's entries; None in evaluation.
      seeds: shape (num_items + 1,), bool: the edges that touch one of these are masked; None in evaluation.
      resampled: whether these seeds are new; None in evaluation.
      similarity: the mean over all items of how much an item is like its surroundings, if seeds are new, otherwise 0;
        None in evaluation.
    """

    items: jax.Array
    layers: tuple[jax.Array, ...]
    edges: jax.Array | None = None
    seeds: jax.Array | None = None
    resampled: jax.Array | None = None
    similarity: jax.Array | None = None


class EdgeSample(NamedTuple):
    """Masked edges to restore, and what they are compared with.

    Attributes:
      sources: shape (count,), int32, where each edge begins.
      targets: shape (count,), int32, where it ends.
      other_targets: shape (count, negatives / 2), int32, what its source is paired with besides.
      other_sources: shape (count, negatives / 2), int32, what its target is paired with besides.
      counted: shape (count,), bool: false where there are fewer masked edges.
    """

    sources: jax.Array
    targets: jax.Array
    other_targets: jax.Array
    other_sources: jax.Array
    counted: jax.Array


def item_graph(train: Interactions, hops: int) -> BCOO:
    """Joins items that are at most ``hops`` apart in a sequence, and every item, and padding, with itself.

    Args:
      train: the sequences.
      hops: the largest distance.

    Returns:
      Shape (num_items + 1, num_items + 1), float32, symmetric; entries are 1.

    Examples:
      >>> item_graph(Interactions.from_sequences([[1, 3, 2]]), hops=1).todense()
      Array([[1., 0., 0., 0.],
             [0., 1., 0., 1.],
             [0., 0., 1., 1.],
             [0., 1., 1., 1.]], dtype=float32)
    """
    num_nodes = train.num_items + 1
    together = graph.to_scipy(graph.cooccurrence((train.items, train.offsets), num_nodes, max_hops=hops))
    joined = together + scipy.sparse.eye_array(num_nodes, format="csr")
    joined.data[:] = 1
    return graph.from_scipy(joined)


def _weighted(edges: BCOO, weights: jax.Array) -> BCOO:
    return BCOO((weights, edges.indices), shape=edges.shape, indices_sorted=True, unique_indices=True)


@jax.custom_vjp
def _directed_product(edges: BCOO, weights: jax.Array, mirrored: jax.Array, x: jax.Array) -> jax.Array:
    """The product of a matrix that has ``weights`` where ``edges`` has entries, and ``mirrored`` if transposed."""
    return propagate(_weighted(edges, weights), x)


def _directed_product_forward(edges: BCOO, weights: jax.Array, mirrored: jax.Array, x: jax.Array) -> tuple:
    return _directed_product(edges, weights, mirrored, x), (edges, mirrored)


def _directed_product_backward(saved: tuple[BCOO, jax.Array], gradient: jax.Array) -> tuple:
    edges, mirrored = saved
    return None, None, None, propagate(_weighted(edges, mirrored), gradient)


_directed_product.defvjp(_directed_product_forward, _directed_product_backward)


def propagate_layers(edges: BCOO, table: jax.Array, num_layers: int, seeds: jax.Array | None = None) -> tuple:
    r"""Propagates a table over the item graph without the edges that touch a seed.

    .. math::

      H_0 = E, \qquad H_{l+1} = D^{-1/2} M A M D^{-1/2} H_l

    where :math:`A` is the item graph, :math:`M` is diagonal, 0 at seeds and 1 elsewhere, and :math:`D` holds the
    degrees of :math:`MAM`. Edges are never rewritten: nodes are scaled.

    Args:
      edges: the item graph, (nodes, nodes), whose entries are 1.
      table: shape (nodes, dim).
      num_layers: how many propagations.
      seeds: shape (nodes,), bool; None: no edge is masked.

    Returns:
      ``table`` and the result of each propagation, ``num_layers + 1`` arrays (nodes, dim).
    """
    kept = jnp.ones((len(table), 1), table.dtype)
    if seeds is not None:
        kept = jnp.where(seeds[:, None], 0, kept)
    # Everybody is their own neighbour: where edges are left, the degree is at least 1.
    scale = kept * jax.lax.rsqrt(jnp.maximum(propagate(edges, kept), 1))
    layers = [table]
    for _ in range(num_layers):
        layers.append(scale * propagate(edges, scale * layers[-1]))
    return tuple(layers)


def similarity_to_surroundings(
    edges: BCOO, mirror: jax.Array, table: jax.Array, key: jax.Array, *, depth: int, path_probability: float
) -> jax.Array:
    r"""How much each item is like what can be reached from it: the paper's measure of consistency.

    With :math:`B_0` the item graph, :math:`B_k` a random part of :math:`B_{k-1}` in which each entry stays with
    probability :math:`p^k`, and :math:`d_k` the row sums of :math:`B_k`,

    .. math::

      S_0 = B_0 E - E, \quad c_0 = d_0, \qquad
      S_k = B_k S_{k-1} - S_{k-1} - d_{k-1} S_{k-1}, \quad c_k = B_k c_{k-1} - c_{k-1} - d_{k-1}

    and the result is the cosine between the rows of :math:`\sum_k S_k / (\sum_k c_k + 10^{-8})` and of :math:`E`.

    Args:
      edges: the item graph, (nodes, nodes), whose entries are 1.
      mirror: shape (edges,), int32, where the entry of the opposite direction is.
      table: shape (nodes, dim), :math:`E`.
      key: random key.
      depth: the largest :math:`k`.
      path_probability: :math:`p`.

    Returns:
      Shape (nodes,), in [-1, 1].
    """
    ones = jnp.ones((len(table), 1), table.dtype)
    dim = table.shape[1]
    summed, degree = jnp.split(propagate(edges, jnp.concatenate([table, ones], axis=1)), [dim], axis=1)
    state, count = summed - table, degree
    states, counts = state, count
    kept = jnp.ones(len(edges.indices), bool)
    for k, part_key in enumerate(jax.random.split(key, depth), start=1):
        kept &= jax.random.uniform(part_key, kept.shape) < path_probability**k
        weights = kept.astype(table.dtype)
        product = _directed_product(edges, weights, weights[mirror], jnp.concatenate([state, count, ones], axis=1))
        summed, counted, next_degree = jnp.split(product, [dim, dim + 1], axis=1)
        state, count = summed - state - degree * state, counted - count - degree
        degree = next_degree
        states, counts = states + state, counts + count
    return jnp.sum(_unit(states / (counts + _TINY)) * _unit(table), axis=1)


def _unit(x: jax.Array) -> jax.Array:
    """Rows of length 1, but for rows of zeros."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=1, keepdims=True), 1e-24))


def spread_seeds(
    edges: jax.Array, seeds: jax.Array, key: jax.Array, *, depth: int, path_probability: float, next_seeds: NextSeeds
) -> jax.Array:
    """Follows paths from the first seeds: the edges that touch a seed lead to the next seeds.

    In each of ``depth`` rounds, the edges that touch the round's seeds and are not yet masked are masked. Of the
    distinct numbers that they lead to, a random part becomes the seeds of the next round: behind ``k`` rounds, their
    number times ``path_probability ** k``, rounded down.

    Args:
      edges: shape (edges, 2), int32, in both directions.
      seeds: shape (nodes,), bool, the first round's seeds.
      key: random key.
      depth: the number of rounds.
      path_probability: see above.
      next_seeds: ends: an edge leads to its ends. sums: to the node whose number is the sum of those of its ends, if
        there is one; numbers without a node are drawn as well, and lead nowhere.

    Returns:
      Shape (nodes,), bool, the seeds of all rounds. An edge is masked exactly if it touches one.
    """
    num_nodes = len(seeds)
    rows, columns = edges[:, 0], edges[:, 1]
    everyone, masked = seeds, jnp.zeros(len(rows), bool)
    for k, part_key in enumerate(jax.random.split(key, max(1, depth - 1))[: depth - 1], start=1):
        touched = seeds[rows] | seeds[columns]
        fresh = touched & ~masked
        masked |= touched
        # Edges go both ways: those that begin at a node are as good as those that end there.
        size, number = (num_nodes, rows) if next_seeds == "ends" else (2 * num_nodes - 1, rows + columns)
        found = jnp.zeros(size, bool).at[number].max(fresh)
        order = jnp.argsort(jnp.where(found, jax.random.uniform(part_key, (size,)), 2))
        count = jnp.floor(jnp.sum(found) * path_probability**k).astype(jnp.int32)
        seeds = jnp.zeros(size, bool).at[order].set(jnp.arange(size) < count)[:num_nodes]
        everyone |= seeds
    return everyone


class LossHistory(NamedTuple):
    """What is known of the main loss since paths were last drawn.

    Attributes:
      last: a scalar, float32, the latest value.
      first: a scalar, float32, the value at the step that drew the paths.
      count: a scalar, int32, how many values there are.
    """

    last: jax.Array
    first: jax.Array
    count: jax.Array


def mask_reward(
    history: LossHistory, loss: jax.Array, resampled: jax.Array, low_reward: float
) -> tuple[jax.Array, LossHistory]:
    """The weight of the masking's loss, and the history with this step's main loss.

    It is 1 if the main loss has just fallen by more than its average fall before, or if two falls are not yet known,
    otherwise ``low_reward``. A step that draws new paths begins a new history with its own loss.

    Args:
      history: of the steps before.
      loss: the main loss of this step, a scalar.
      resampled: whether this step draws new paths, a bool scalar.
      low_reward: the smaller weight.
    """
    last, first, count = history
    loss = loss.astype(last.dtype)
    # The falls from each value to the next add up to the fall from the first to the last.
    average = (first - last) / jnp.maximum(count - 1, 1)
    reward = jnp.where((count < 2) | (last - loss > average), 1, low_reward).astype(last.dtype)
    restart = resampled | (count == 0)
    return reward, LossHistory(loss, jnp.where(restart, loss, first), jnp.where(restart, 1, count + 1))


class Decoder(nnx.Module):
    """Scores pairs of nodes by the products of their representations in all pairs of layers, in (0, 1).

    Args:
      num_layers: layers that a node has a representation in.
      embedding_dim: width of a representation.
      rngs: random state for the initialisation.
    """

    def __init__(self, num_layers: int, embedding_dim: int, *, rngs: nnx.Rngs) -> None:
        linear = partial(Linear, kernel_init=_xavier_uniform, rngs=rngs)
        self.num_layers = num_layers
        self.first = linear(num_layers**2 * embedding_dim, num_layers * embedding_dim)
        self.second = linear(num_layers * embedding_dim, embedding_dim)
        self.last = linear(embedding_dim, 1)

    def __call__(self, sources: jax.Array, targets: jax.Array) -> jax.Array:
        """Scores of pairs.

        Args:
          sources: shape (…, num_layers * embedding_dim), a node's representations, layer after layer.
          targets: likewise.

        Returns:
          Shape (…), float32 at least.
        """

        def split(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:-1], self.num_layers, -1)

        products = split(sources)[..., :, None, :] * split(targets)[..., None, :, :]
        hidden = jax.nn.relu(self.first(products.reshape(*sources.shape[:-1], -1)))
        scores = self.last(jax.nn.relu(self.second(hidden)))[..., 0]
        return jax.nn.sigmoid(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)))


class Block(nnx.Module):
    r"""One block of the recommender: post-norm, and without a residual connection around the feed-forward part.

    .. math::

      h = \mathrm{LN}(x + \mathrm{Attention}(x, x, x)), \qquad y = \mathrm{LN}(W_2 \, \mathrm{GELU}(W_1 h))
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        dropout_rate: float,
        attention_dropout_rate: float,
        *,
        residual: bool,
        rngs: nnx.Rngs,
    ) -> None:
        linear = partial(Linear, kernel_init=_xavier_uniform, rngs=rngs)
        self.attention = Attention(
            embedding_dim,
            num_heads,
            attention_dropout_rate,
            in_init=_xavier_uniform,
            out_init=_xavier_uniform,
            rngs=rngs,
        )
        self.attention_norm = LayerNorm(embedding_dim, epsilon=1e-5, rngs=rngs)
        self.feed_forward_in = linear(embedding_dim, 4 * embedding_dim)
        self.feed_forward_out = linear(4 * embedding_dim, embedding_dim)
        self.feed_forward_norm = LayerNorm(embedding_dim, epsilon=1e-5, rngs=rngs)
        self.dropout = Dropout(dropout_rate)
        self.residual = residual

    def __call__(self, x: jax.Array, segments: jax.Array, key: jax.Array | None) -> jax.Array:
        """Maps (rows, row_length, embedding_dim) to the same shape."""
        keys = split_keys(key, 3)
        x = self.attention_norm(x + self.dropout(self.attention(x, x, segments, keys[0], causal=True), keys[1]))
        hidden = jax.nn.gelu(self.feed_forward_in(x), approximate=False)
        out = self.dropout(self.feed_forward_out(hidden), keys[2])
        return self.feed_forward_norm(x + out if self.residual else out)


class MAERec(SequenceRecommender):
    r"""Graph masked autoencoder for sequential recommendation, as trained for the SEvo paper's comparison.

    Items that are close in a training sequence are neighbours in a graph, over which the item table is propagated. The
    propagated table is what histories are read with, by self-attention, and what they are scored with. In training,
    paths of the graph are masked: propagation does without these edges, and a decoder restores them. Paths start from
    items that are like their surroundings, with Gumbel noise; they are drawn anew every ``mask_steps`` steps. What is
    minimised is

    .. math::

      \mathcal{L} + w \, \mathcal{L}_\mathrm{reconstruction} + \lambda \|\Theta\|^2 - r \, \bar{s}

    with the main loss, the reconstruction's, the squares of all parameters and, at steps that draw new paths, the mean
    similarity :math:`\bar{s}` of items and their surroundings, see :func:`similarity_to_surroundings`. Its reward
    :math:`r` is 1 if the main loss has just fallen by more than its average fall since paths were last drawn, otherwise
    ``low_reward``.

    The defaults are the published code's, errors included, because published results are of that code:

    * Paths go on at nodes whose number is the *sum* of the numbers of a masked edge's two ends, some of which do not
      exist: two lists were added that should have been joined. ``next_seeds="ends"`` joins them.
    * Edges are compared with random pairs that may be edges as well: the test for it never matches.
      ``reject_edges=True`` draws pairs that are none.
    * With :math:`e = \exp(\text{score})`, a masked edge's share :math:`e^+ / (e^+ + \sum e^-)` of the reconstruction's
      loss has no logarithm. ``log_reconstruction=True`` takes it. The loss is a sum over edges either way: on a weight
      of 1 it outgrows the main loss, and hence ``reconstruction_weight``.
    * The feed-forward part of a block has no residual connection. ``residual_feed_forward=True`` adds it.

    Where the published code differs between versions: losses are remembered and steps counted across epochs, and the
    noise, which has no gradient, is left out of :math:`\bar{s}`.

    Args:
      num_items: size of the catalogue. Items are 1 … num_items; row 0 of the table is padding.
      max_length: the longest history the model sees.
      embedding_dim: width of everything.
      num_blocks: number of attention blocks.
      num_heads: attention heads a block; divides ``embedding_dim``.
      dropout_rate: dropout on embeddings and behind the layers.
      attention_dropout_rate: dropout on attention weights.
      residual_feed_forward: whether a feed-forward part is added to its input.
      num_gcn_layers: propagations over the item graph.
      mask_steps: steps until other paths are masked.
      num_mask_seeds: items that masked paths start from, at most all.
      mask_depth: length of the masked paths, in edges.
      path_probability: probability that a path goes on; behind k edges, its k-th power.
      next_seeds: where paths go on, ends or sums.
      num_reconstructed: masked edges that a step restores, at most all.
      num_edge_negatives: pairs that each of them is compared with, an even number.
      reject_edges: whether these are never edges.
      log_reconstruction: whether the reconstruction's loss has a logarithm.
      reconstruction_weight: weight of the reconstruction's loss.
      low_reward: weight of the masking's loss while the main loss falls slowly.
      l2_weight: weight of the sum of the squares of all parameters.
      dtype: what blocks and decoder compute in; parameters, propagation, norms, attention weights and sums of scores
        are float32 anyway.
      rngs: random state for the initialisation.

    References:
      Ye, Xia and Huang, `Graph Masked Autoencoder for Sequential Recommendation <https://arxiv.org/abs/2305.04619>`_,
      2023
    """

    config_class = MAERecConfig

    def __init__(
        self,
        num_items: int,
        *,
        max_length: int = 50,
        embedding_dim: int = 64,
        num_blocks: int = 2,
        num_heads: int = 4,
        dropout_rate: float = 0.2,
        attention_dropout_rate: float = 0.3,
        residual_feed_forward: bool = False,
        num_gcn_layers: int = 2,
        mask_steps: int = 5,
        num_mask_seeds: int = 200,
        mask_depth: int = 3,
        path_probability: float = 0.5,
        next_seeds: NextSeeds = "sums",
        num_reconstructed: int = 2048,
        num_edge_negatives: int = 40,
        reject_edges: bool = False,
        log_reconstruction: bool = False,
        reconstruction_weight: float = 5e-3,
        low_reward: float = 0.2,
        l2_weight: float = 1e-8,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        _check_masking(path_probability, next_seeds, num_edge_negatives)
        self.dtype = jnp.dtype(dtype)
        self.num_gcn_layers = num_gcn_layers
        self.mask_steps = mask_steps
        self.num_mask_seeds = min(num_mask_seeds, num_items + 1)
        self.mask_depth = mask_depth
        self.path_probability = path_probability
        self.next_seeds = next_seeds
        self.num_reconstructed = num_reconstructed
        self.num_edge_negatives = num_edge_negatives
        self.reject_edges = reject_edges
        self.log_reconstruction = log_reconstruction
        self.reconstruction_weight = reconstruction_weight
        self.low_reward = low_reward
        self.l2_weight = l2_weight
        embed = partial(nnx.Embed, features=embedding_dim, embedding_init=_xavier_uniform, rngs=rngs)
        self.item_embedding = embed(num_items + 1)
        self.position_embedding = embed(max_length)
        self.norm = LayerNorm(embedding_dim, epsilon=1e-5, rngs=rngs)
        self.dropout = Dropout(dropout_rate)
        block = partial(Block, embedding_dim, num_heads, dropout_rate, attention_dropout_rate)
        self.blocks = nnx.List([block(residual=residual_feed_forward, rngs=rngs) for _ in range(num_blocks)])
        self.decoder = Decoder(num_gcn_layers, embedding_dim, rngs=rngs)
        self.step = Masking(jnp.zeros((), jnp.int32))
        self.seeds = Masking(jnp.zeros(num_items + 1, bool))
        # What the reward depends on, a LossHistory.
        self.last_loss = Masking(jnp.zeros(()))
        self.first_loss = Masking(jnp.zeros(()))
        self.num_losses = Masking(jnp.zeros((), jnp.int32))

    @classmethod
    def make_context(cls, train: Interactions, config: MAERecConfig) -> dict[str, Any]:
        """The item graph, ``item_graph``, and where its entries of the opposite direction are, ``mirror``."""
        edges = item_graph(train, config.item_graph_hops)
        rows, columns = np.asarray(edges.indices).T
        return {"item_graph": edges, "mirror": jnp.asarray(np.lexsort((rows, columns)), jnp.int32)}

    def represent(self, context: Mapping[str, Any], key: jax.Array | None = None) -> Represented:
        """Propagates the item table over the graph; in training, over what masking leaves of it."""
        edges, table = context["item_graph"], self.item_embedding.embedding[...]
        if key is None:
            layers = propagate_layers(edges, table, self.num_gcn_layers)
            return Represented(sum(layers), layers)

        def draw() -> tuple[jax.Array, jax.Array]:
            return self._draw_seeds(edges, context["mirror"], table, key)

        def keep() -> tuple[jax.Array, jax.Array]:
            return self.seeds[...], jnp.zeros((), table.dtype)

        resampled = self.step[...] % self.mask_steps == 0
        with jax.named_scope("masking"):
            seeds, similarity = jax.lax.cond(resampled, draw, keep)
        self.seeds[...] = seeds
        self.step[...] += 1
        with jax.named_scope("propagation"):
            layers = propagate_layers(edges, table, self.num_gcn_layers, seeds)
        return Represented(sum(layers), layers, edges.indices, seeds, resampled, similarity)

    def encode(
        self, batch: Batch, represented: Represented, key: jax.Array | None = None, candidates: jax.Array | None = None
    ) -> Encoded:
        """Encodes packed histories: at each token, what predicts the next one."""
        embedded, rows = look_up(represented.items, batch.inputs, candidates)
        keys = split_keys(key, len(self.blocks) + 1)
        positions = self.position_embedding.embedding[...][batch.positions]
        x = self.norm((embedded + positions).astype(self.dtype))
        x = self.dropout(x, keys[0])
        total = x
        for block, block_key in zip(self.blocks, keys[1:], strict=True):
            x = block(x, batch.segments, block_key)
            total += x
        return Encoded(total, rows, None if rows is None else jnp.zeros((), rows.dtype))

    def items(self, represented: Represented) -> tuple[jax.Array, jax.Array]:
        """The propagated item table and no bias."""
        return represented.items, jnp.zeros(len(represented.items), represented.items.dtype)

    def penalty(
        self, batch: Batch, queries: Queries, represented: Represented, loss: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        """The squares of all parameters; in training, reconstruction and masking. See :meth:`Recommender.penalty`."""
        del batch, queries
        parameters = jax.tree.leaves(nnx.state(self, nnx.Param))
        total = self.l2_weight * sum(jnp.sum(values * values) for values in parameters)
        if key is None or represented.seeds is None:
            return total
        if self.reconstruction_weight:
            with jax.named_scope("reconstruction"):
                sample = self._draw_edges(represented, key)
                total += self.reconstruction_weight * self._reconstruction(represented.layers, sample)
        return total - self._reward(jax.lax.stop_gradient(loss), represented.resampled) * represented.similarity

    def _draw_seeds(
        self, edges: BCOO, mirror: jax.Array, table: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Draws the seeds of new paths, shape (num_items + 1,), and the mean similarity that this rests on."""
        thin_key, noise_key, spread_key = jax.random.split(key, 3)
        paths = {"depth": self.mask_depth, "path_probability": self.path_probability}
        similarity = similarity_to_surroundings(edges, mirror, table, thin_key, **paths)
        scores = jax.lax.stop_gradient(similarity) + jax.random.gumbel(noise_key, similarity.shape)
        _, best = jax.lax.top_k(scores, self.num_mask_seeds)
        first = jnp.zeros(len(scores), bool).at[best].set(True)
        seeds = spread_seeds(edges.indices, first, spread_key, **paths, next_seeds=self.next_seeds)
        return seeds, jnp.mean(similarity)

    def _draw_edges(self, represented: Represented, key: jax.Array) -> EdgeSample:
        """Draws some of the masked edges without replacement, and what each of them is compared with."""
        edge_key, target_key, source_key = jax.random.split(key, 3)
        edges, seeds = represented.edges, represented.seeds
        masked = seeds[edges[:, 0]] | seeds[edges[:, 1]]
        numbers = jnp.where(masked, jax.random.uniform(edge_key, masked.shape), -1)
        number, chosen = jax.lax.top_k(numbers, min(self.num_reconstructed, len(edges)))
        sources, targets = edges[chosen].T
        return EdgeSample(
            sources,
            targets,
            self._draw_nodes(edges, sources, target_key),
            self._draw_nodes(edges, targets, source_key),
            number >= 0,
        )

    def _reconstruction(self, layers: tuple[jax.Array, ...], sample: EdgeSample) -> jax.Array:
        """The loss of restoring masked edges from the layers of the propagation."""
        # The last propagation takes no part, as published.
        nodes = jnp.concatenate(layers[:-1], axis=1).astype(self.dtype)
        source, target, other_source, other_target = look_up(
            nodes, sample.sources[:, None], sample.targets[:, None], sample.other_sources, sample.other_targets
        )
        # First the edge, then other targets, then other sources.
        lefts = jnp.concatenate([source, jnp.broadcast_to(source, other_target.shape), other_source], axis=1)
        rights = jnp.concatenate([target, other_target, jnp.broadcast_to(target, other_source.shape)], axis=1)
        exponentials = jnp.exp(self.decoder(lefts, rights))
        share = exponentials[:, 0] / (jnp.sum(exponentials, axis=1) + _TINY)
        losses = -jnp.log(share) if self.log_reconstruction else -(share + _TINY)
        return jnp.sum(jnp.where(sample.counted, losses, 0))

    def _draw_nodes(self, edges: jax.Array, nodes: jax.Array, key: jax.Array) -> jax.Array:
        """Draws items uniformly to pair with each of ``nodes``, shape (count,): (count, num_edge_negatives / 2)."""
        num_items = len(self.seeds[...]) - 1
        shape = (len(nodes), self.num_edge_negatives // 2)
        anything = jax.random.randint(key, shape, 1, num_items + 1)
        if not self.reject_edges:
            return anything
        # To draw what is no neighbour is to draw what a user has not seen.
        rows, columns = edges[:, 0], edges[:, 1]
        offsets = jnp.searchsorted(rows, jnp.arange(num_items + 2)).astype(jnp.int32)
        strangers_before = columns - 1 - (jnp.arange(len(columns), dtype=jnp.int32) - offsets[rows])
        anybody = Proposal(None, None, None, num_items)
        strangers = NegativeSampler(strangers_before, offsets, anybody, num_items, longest=num_items)
        drawn = strangers.sample(key, jnp.broadcast_to(nodes[:, None], shape))
        # A node that is everybody's neighbour has nothing but edges; the row for padding has none, but for its own.
        lonely = (nodes == 0) | (offsets[nodes + 1] - offsets[nodes] >= num_items)
        return jnp.where(lonely[:, None], anything, drawn)

    def _reward(self, loss: jax.Array, resampled: jax.Array) -> jax.Array:
        """The weight of the masking's loss at this step; remembers the main loss."""
        remembered = LossHistory(self.last_loss[...], self.first_loss[...], self.num_losses[...])
        reward, remembered = mask_reward(remembered, loss, resampled, self.low_reward)
        for variable, value in zip((self.last_loss, self.first_loss, self.num_losses), remembered, strict=True):
            variable[...] = value
        return reward
