"""Losses over queries and items: they know neither models nor batches.

Scores of queries × items never exist whole. Scores, softmaxes and sums are float32 even if a model computes in less.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from models.architectures.base import Queries
from models.config import LossConfig
from models.feeds import NegativeSampler
from models.mesh import DATA, MODEL, current_mesh, fill_up, on_each_part, size_of, split_catalogue

# Scores, or entries of gathered rows, that may exist at once: 64 MiB in float32.
NUMBERS_AT_ONCE = 2**24

# On CPUs, more would leave the cache between two passes over them.
CPU_QUERIES_AT_ONCE = 128
CPU_NUMBERS_AT_ONCE = 2**18

# Table (rows, dim) and bias (rows,) of the scores: row i is item i's.
Items = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss, and what it needs.

    Attributes:
      function: ``function(queries, items, sampler, key)``, a scalar.
      against_unseen: whether ``queries`` must hold candidates: the target, and one item that the user has not seen.
    """

    function: Callable[[Queries, Items, NegativeSampler, jax.Array], jax.Array]
    against_unseen: bool = False


def make_loss(config: LossConfig) -> Loss:
    """Picks and configures the loss of a configuration.

    Args:
      config: ``loss``, and what it heeds of ``num_negatives``, ``negatives``, ``logq_correction`` and ``gbce_t``.

    Raises:
      ValueError: if there is no loss, or no way to draw negatives, of that name.
    """
    ways = ("shared", "per-position")
    if config.negatives not in ways:
        raise ValueError(f"negatives must be one of {', '.join(ways)}, got {config.negatives!r}")
    sampled = {"num_negatives": config.num_negatives, "per_position": config.negatives == "per-position"}
    losses = {
        "bce": Loss(binary_cross_entropy, against_unseen=True),
        "ce": Loss(cross_entropy),
        "sampled-softmax": Loss(partial(sampled_softmax, **sampled, logq_correction=config.logq_correction)),
        "gbce": Loss(partial(gbce, **sampled, t=config.gbce_t)),
        "bpr": Loss(bpr, against_unseen=True),
    }
    if config.loss not in losses:
        raise ValueError(f"loss must be one of {', '.join(losses)}, got {config.loss!r}")
    return losses[config.loss]


def binary_cross_entropy(
    queries: Queries, items: Items | None = None, sampler: NegativeSampler | None = None, key: jax.Array | None = None
) -> jax.Array:
    r"""Binary cross-entropy of the target against one random unseen item (SASRec's loss).

    .. math::

      \frac{1}{|T|} \sum_{t \in T} \Big[ -\log \sigma(s_t^+) - \log\big(1 - \sigma(s_t^-)\big) \Big]

    over the queries :math:`T` that have a target; :math:`2 \log 2` for a model that knows nothing. Items that the user
    has interacted with are never drawn. Needs memory for queries × width numbers, a few times.

    Args:
      queries: with two candidates: the target, and an item that the user has not seen.
      items: not used, like what follows.
      sampler: not used.
      key: not used.

    Returns:
      A scalar, float32.

    References:
      Kang and McAuley, `Self-Attentive Sequential Recommendation <https://arxiv.org/abs/1808.09781>`_, 2018
    """
    del items, sampler, key
    positive, negative = _scores(queries.vectors, queries.rows, queries.biases)
    return queries.weights @ (jax.nn.softplus(-positive) + jax.nn.softplus(negative))


def bpr(
    queries: Queries, items: Items | None = None, sampler: NegativeSampler | None = None, key: jax.Array | None = None
) -> jax.Array:
    r"""Bayesian personalised ranking: the target shall beat one random unseen item.

    .. math::

      \frac{1}{|T|} \sum_{t \in T} -\log \sigma(s_t^+ - s_t^-)

    over the queries :math:`T` that have a target; :math:`\log 2` for a model that knows nothing. Negatives and
    memory are those of :func:`binary_cross_entropy`: items that the user has interacted with are never drawn.

    Args:
      queries: with two candidates: the target, and an item that the user has not seen.
      items: not used, like what follows.
      sampler: not used.
      key: not used.

    Returns:
      A scalar, float32.

    References:
      Rendle et al., `BPR: Bayesian Personalized Ranking from Implicit Feedback <https://arxiv.org/abs/1205.2618>`_,
      2009
    """
    del items, sampler, key
    positive, negative = _scores(queries.vectors, queries.rows, queries.biases)
    return queries.weights @ jax.nn.softplus(negative - positive)


def cross_entropy(
    queries: Queries,
    items: Items,
    sampler: NegativeSampler,
    key: jax.Array | None = None,
    *,
    scores_at_once: int = NUMBERS_AT_ONCE,
) -> jax.Array:
    r"""Cross-entropy of the softmax over the whole catalogue.

    .. math::

      \frac{1}{|T|} \sum_{t \in T} \Big[ \log \sum_{i=1}^{n} e^{s_{ti}} - s_{t, t^+} \Big]

    Every item is a negative, those included that the user has interacted with.

    The queries are worked through in parts of at most ``scores_at_once`` scores (one query at least), of which three
    arrays exist at once. Each part leaves its share of the gradients behind, so that nothing is computed anew.

    Args:
      queries: the queries.
      items: table and bias of the scores.
      sampler: not used, but for the number of items.
      key: not used.
      scores_at_once: the bound on the number of scores, 4 bytes each.

    Returns:
      A scalar, float32.
    """
    del key
    table, bias = items
    vectors, targets, weights = queries.vectors, queries.targets, queries.weights
    with jax.named_scope("log_sum_exp"):
        if current_mesh() is None:
            catalogue = slice(1, sampler.num_items + 1)
            scored = vectors, table[catalogue], bias[catalogue], weights
        else:
            scored = fill_up(vectors, DATA), *split_catalogue(table, bias, sampler.num_items), fill_up(weights, DATA)
        queries_at_once = max(1, scores_at_once // (len(scored[1]) // size_of(MODEL)))
        if jax.default_backend() == "cpu":
            queries_at_once = min(queries_at_once, CPU_QUERIES_AT_ONCE)
        normalizer = _log_sum_exp(*scored, queries_at_once)
    # Rounded as among all items' scores.
    rows = table[targets].astype(vectors.dtype)
    return normalizer - weights @ _scores(vectors, rows, bias[targets])


def sampled_softmax(
    queries: Queries,
    items: Items,
    sampler: NegativeSampler,
    key: jax.Array,
    *,
    num_negatives: int,
    per_position: bool = False,
    logq_correction: bool = True,
    numbers_at_once: int = NUMBERS_AT_ONCE,
) -> jax.Array:
    r"""Cross-entropy of the softmax over the target and a random sample of the catalogue.

    .. math::

      \frac{1}{|T|} \sum_{t \in T} \bigg[
        \log \Big( e^{s_{t, t^+}} + \sum_{j \in N_t, j \ne t^+} e^{s_{tj} - c_j} \Big) - s_{t, t^+} \bigg]

    over the queries :math:`T` that have a target. :math:`N_t` are ``num_negatives`` independent draws from the proposal
    :math:`q` of ``sampler``. With the correction, :math:`c_j = \log(|N_t| \, q_j)`: the expectation of the sum inside
    the logarithm is then the one over all items (if :math:`q_j > 0` for all), as in :func:`cross_entropy`. The target
    is not corrected, because it is not there by chance. Without, :math:`c_j = 0`.

    A draw of the target itself is passed over. Items that the user has interacted with may be drawn, as they also
    compete in the whole softmax. Memory is that of :func:`gbce`.

    Args:
      queries: the queries.
      items: table and bias of the scores.
      sampler: its proposal is where negatives are drawn from.
      key: random key for the draws.
      num_negatives: draws a query.
      per_position: whether each query has draws of its own; otherwise one sample serves the whole batch.
      logq_correction: whether scores are corrected for the probability of being drawn.
      numbers_at_once: the bound on the numbers that scoring takes, 4 bytes each.

    Returns:
      A scalar, float32.

    References:
      * Bengio and Senécal, `Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language
        Model <https://doi.org/10.1109/TNN.2007.912312>`_, 2008
      * On the target: Khrylchenko et al., `Correcting the LogQ Correction: Revisiting Sampled Softmax for Large-Scale
        Retrieval <https://arxiv.org/abs/2507.09331>`_, 2025
    """

    def loss(positive: jax.Array, negative: jax.Array, drawn: jax.Array) -> jax.Array:
        if logq_correction:
            negative -= sampler.proposal.log_probability(drawn) + np.log(num_negatives)
        everything = jnp.concatenate([positive[:, None], negative], axis=1)
        return jax.nn.logsumexp(everything, axis=1) - positive

    sampling = (num_negatives, per_position, numbers_at_once)
    return _against_sample(queries, items, sampler, key, loss, *sampling)


def gbce(
    queries: Queries,
    items: Items,
    sampler: NegativeSampler,
    key: jax.Array,
    *,
    num_negatives: int,
    per_position: bool = False,
    t: float = 0.75,
    numbers_at_once: int = NUMBERS_AT_ONCE,
) -> jax.Array:
    r"""Generalised binary cross-entropy of the target against a random sample of the catalogue (gSASRec's loss).

    .. math::

      \frac{1}{|T|} \sum_{t \in T} \frac{-1}{|N_t| + 1} \Big[
        \log \sigma(s_{t, t^+})^\beta + \sum_{j \in N_t, j \ne t^+} \log\big(1 - \sigma(s_{tj})\big) \Big],
      \qquad \beta = \alpha \Big( t \big(1 - \tfrac{1}{\alpha}\big) + \tfrac{1}{\alpha} \Big),
      \qquad \alpha = \frac{|N_t|}{n - 1}

    over the queries :math:`T` that have a target, with :math:`N_t` as in :func:`sampled_softmax`. :math:`\alpha`, at
    most 1, is the share of the negatives that is sampled; without the exponent, a model trained so is overconfident.
    :math:`t = 0` is plain binary cross-entropy (:math:`\beta = 1`); :math:`t = 1` undoes the sampling
    (:math:`\beta = \alpha`), so that :math:`\sigma(s)` is calibrated, if all items are drawn alike.

    A draw of the target itself is passed over. Items that the user has interacted with may be drawn.

    The queries are worked through in parts, in the backward pass anew. A part takes at most ``numbers_at_once`` numbers
    (but one query at least), of which a few arrays exist at once: a score a draw, or, with draws a query, a row of the
    output layer a draw. Shared draws need ``num_negatives`` rows besides.

    Args:
      queries: the queries.
      items: table and bias of the scores.
      sampler: its proposal is where negatives are drawn from.
      key: random key for the draws.
      num_negatives: draws a query.
      per_position: whether each query has draws of its own; otherwise one sample serves the whole batch.
      t: calibration, in [0, 1].
      numbers_at_once: the bound on the numbers that scoring takes, 4 bytes each.

    Returns:
      A scalar, float32.

    References:
      Petrov and Macdonald, `gSASRec: Reducing Overconfidence in Sequential Recommendation Trained with Negative
      Sampling <https://arxiv.org/abs/2308.07192>`_, 2023
    """
    alpha = min(1.0, num_negatives / max(1, sampler.num_items - 1))
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)

    def loss(positive: jax.Array, negative: jax.Array, drawn: jax.Array) -> jax.Array:
        del drawn
        total = beta * jax.nn.softplus(-positive) + jnp.sum(jax.nn.softplus(negative), axis=1)
        return total / (num_negatives + 1)

    sampling = (num_negatives, per_position, numbers_at_once)
    return _against_sample(queries, items, sampler, key, loss, *sampling)


def _against_sample(
    queries: Queries,
    items: Items,
    sampler: NegativeSampler,
    key: jax.Array,
    loss: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    num_negatives: int,
    per_position: bool,
    numbers_at_once: int,
) -> jax.Array:
    """The mean of a loss of each target against a random sample of the catalogue.

    ``loss(positive, negative, drawn)`` takes scores (queries,) and (queries, num_negatives), minus infinity where the
    target was drawn, and the items that were drawn, which broadcast to the latter; it returns (queries,).
    """
    vectors, targets, weights = queries.vectors, queries.targets, queries.weights
    shared = None if per_position else sampler.proposal.sample(key, (num_negatives,))
    by_query = (vectors, targets, weights, jnp.arange(len(targets)))
    total = partial(_total_against_sample, loss, num_negatives, numbers_at_once)
    if current_mesh() is None:
        return total((items, sampler, key, shared), by_query)
    # Each device works through its own queries and items in parts, and gradients are summed once, behind them.
    on_part = on_each_part(
        lambda *arguments: jax.lax.psum(total(*arguments, split=True), DATA),
        ((P(MODEL), P(), P(), P()), P(DATA)),
        P(),
        differentiable=True,
    )
    table, bias = items
    items = fill_up(table, MODEL), fill_up(bias, MODEL)
    return on_part((items, sampler, key, shared), jax.tree.map(lambda x: fill_up(x, DATA), by_query))


def _total_against_sample(
    loss: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    num_negatives: int,
    numbers_at_once: int,
    same_for_all: tuple[Items, NegativeSampler, jax.Array, jax.Array | None],
    by_query: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    split: bool = False,
) -> jax.Array:
    """The weighted sum of a loss over queries; ``by_query`` are their vectors, targets, weights and numbers.

    If ``split``, each device of the axis ``model`` has some of the items, and queries are those of one device.
    """
    (table, bias), sampler, key, shared = same_for_all
    vectors = by_query[0]

    def of_items(items: jax.Array, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """What a function makes of the rows of items; the device that has an item tells the others."""
        if not split:
            return function(items)
        row = items - jax.lax.axis_index(MODEL) * len(table)
        mine = (row >= 0) & (row < len(table))
        found = function(jnp.where(mine, row, 0))
        mine = mine.reshape(mine.shape + (1,) * (found.ndim - mine.ndim))
        return jax.lax.psum(jnp.where(mine, found, 0), MODEL)

    if shared is not None:
        rows = of_items(shared, lambda row: table[row].astype(vectors.dtype))
        biases = of_items(shared, lambda row: bias[row])

    def part(vectors: jax.Array, targets: jax.Array, weights: jax.Array, number: jax.Array) -> jax.Array:
        if shared is None:
            keys = jax.vmap(partial(jax.random.fold_in, key))(number)
            drawn = jax.vmap(lambda key: sampler.proposal.sample(key, (num_negatives,)))(keys)
            negative = of_items(drawn, lambda row: _scores(vectors[:, None], table[row], bias[row]))
        else:
            drawn = shared
            negative = jnp.matmul(vectors, rows.T, preferred_element_type=weights.dtype) + biases
        negative = jnp.where(drawn == targets[:, None], -jnp.inf, negative)
        positive = of_items(targets, lambda row: _scores(vectors, table[row], bias[row]))
        return jnp.sum(weights * loss(positive, negative, drawn))

    numbers = num_negatives * (table.shape[1] if shared is None else 1)
    if jax.default_backend() == "cpu":
        numbers_at_once = min(numbers_at_once, CPU_NUMBERS_AT_ONCE)
    cut = _cut(by_query, max(1, numbers_at_once // numbers))
    totals = jax.lax.map(jax.checkpoint(lambda by_query: part(*by_query)), cut)
    return jnp.sum(totals)


def _sum_type(vectors: jax.Array) -> jnp.dtype:
    """The type of scores and sums: at least float32."""
    return jnp.promote_types(vectors.dtype, jnp.float32)


def _scores(vectors: jax.Array, rows: jax.Array, biases: jax.Array) -> jax.Array:
    """Scores from vectors and rows of the item table, both (…, dim), and biases."""
    wide = _sum_type(vectors)
    return jnp.sum(vectors.astype(wide) * rows.astype(wide), axis=-1) + biases


def _cut(by_query: Any, queries_at_once: int) -> Any:
    """Cuts arrays (queries, …) into parts of at most ``queries_at_once``: (parts, queries, …), filled up with zeros."""
    count = len(jax.tree.leaves(by_query)[0])
    parts = -(-count // queries_at_once)
    size = -(-count // parts)

    def cut(values: jax.Array) -> jax.Array:
        blank = ((0, parts * size - count), *[(0, 0)] * (values.ndim - 1))
        return jnp.pad(values, blank).reshape(parts, size, *values.shape[1:])

    return jax.tree.map(cut, by_query)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _log_sum_exp(
    vectors: jax.Array, table: jax.Array, bias: jax.Array, weights: jax.Array, queries_at_once: int
) -> jax.Array:
    """``weights @ logsumexp(vectors @ table.T + bias)``, some queries at a time."""
    return _log_sum_exp_forward(vectors, table, bias, weights, queries_at_once)[0]


def _log_sum_exp_forward(
    vectors: jax.Array, table: jax.Array, bias: jax.Array, weights: jax.Array, queries_at_once: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The value, and its gradients: those of one number are known, up to a factor, while the scores are at hand.

    On a mesh, queries are split over ``data`` and items over ``model``: for each part of the queries, devices exchange
    two numbers a query; behind the last, the gradients of the vectors, and once those of the table and the bias.
    """
    if current_mesh() is None:
        return _log_sum_exp_local(vectors, table, bias, weights, queries_at_once)
    by_query, by_item = P(DATA), P(MODEL)
    function = partial(_log_sum_exp_local, queries_at_once=queries_at_once, split=True)
    return on_each_part(
        function, (by_query, by_item, by_item, by_query), (P(), (by_query, by_item, by_item, by_query))
    )(vectors, table, bias, weights)


def _log_sum_exp_local(
    vectors: jax.Array,
    table: jax.Array,
    bias: jax.Array,
    weights: jax.Array,
    queries_at_once: int,
    split: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The value and its gradients from one device's queries and items, which are all of them unless ``split``."""

    def over(axis: str, values: jax.Array, reduce: Callable[..., jax.Array] = jax.lax.psum) -> jax.Array:
        return reduce(values, axis) if split else values

    rows = table.astype(vectors.dtype)
    dot = partial(jnp.matmul, preferred_element_type=weights.dtype)

    def join(values: jax.Array) -> jax.Array:
        return values.reshape(-1, *values.shape[2:])[: len(vectors)]

    def add(carry: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]) -> tuple:
        table_gradient, bias_gradient = carry
        vectors, weights = part
        # Items come first: sums over them then run along whole vectors of queries.
        scores = dot(rows, vectors.T) + bias[:, None]
        largest = over(MODEL, jnp.max(scores, axis=0), jax.lax.pmax)
        exponentials = jnp.exp(scores - largest)
        total = over(MODEL, jnp.sum(exponentials, axis=0))
        scale = weights / total
        factors = exponentials.astype(vectors.dtype)
        vectors_gradient = dot(factors.T, rows) * scale[:, None]
        table_gradient += dot(factors, (vectors * scale[:, None]).astype(vectors.dtype))
        bias_gradient += exponentials @ scale
        return (table_gradient, bias_gradient), (vectors_gradient.astype(vectors.dtype), largest + jnp.log(total))

    start = jnp.zeros(table.shape, weights.dtype), jnp.zeros(bias.shape, weights.dtype)
    (table_gradient, bias_gradient), by_query = jax.lax.scan(add, start, _cut((vectors, weights), queries_at_once))
    vectors_gradient, normalizers = map(join, by_query)
    vectors_gradient = over(MODEL, vectors_gradient)
    table_gradient, bias_gradient = over(DATA, table_gradient), over(DATA, bias_gradient)
    gradients = vectors_gradient, table_gradient.astype(table.dtype), bias_gradient.astype(bias.dtype), normalizers
    return over(DATA, weights @ normalizers), gradients


def _log_sum_exp_backward(
    queries_at_once: int, gradients: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array, ...]:
    del queries_at_once
    return tuple((cotangent * gradient).astype(gradient.dtype) for gradient in gradients)


_log_sum_exp.defvjp(_log_sum_exp_forward, _log_sum_exp_backward)
