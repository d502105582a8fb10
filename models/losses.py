"""Training losses over packed batches: each corrupts, encodes and scores a batch, and averages over its targets.

Scores of tokens × items never exist whole. Scores, softmaxes and sums are float32 even if a model computes in less.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.data.negatives import NegativeSampler
from models.data.packing import Batch
from models.sequence_model import SequenceModel
from models.training.config import ModelConfig

LossFn = Callable[[SequenceModel, Batch, NegativeSampler, jax.Array], jax.Array]

# Scores, or entries of gathered rows, that may exist at once: 64 MiB in float32.
NUMBERS_AT_ONCE = 2**24

# On CPUs, more would leave the cache between two passes over them.
CPU_TOKENS_AT_ONCE = 128
CPU_NUMBERS_AT_ONCE = 2**18


def make_loss(config: ModelConfig) -> LossFn:
    """Picks and configures the loss of a resolved configuration.

    Args:
      config: ``loss``, and what it heeds of ``num_negatives``, ``negatives``, ``logq_correction`` and ``gbce_t``.

    Returns:
      ``loss(model, batch, unseen, key)``, a scalar.

    Raises:
      ValueError: if there is no loss, or no way to draw negatives, of that name.
    """
    ways = ("shared", "per-position")
    if config.negatives not in ways:
        raise ValueError(f"negatives must be one of {', '.join(ways)}, got {config.negatives!r}")
    sampled = {"num_negatives": config.num_negatives, "per_position": config.negatives == "per-position"}
    losses: dict[str, LossFn] = {
        "bce": binary_cross_entropy,
        "ce": cross_entropy,
        "sampled-softmax": partial(sampled_softmax, **sampled, logq_correction=config.logq_correction),
        "gbce": partial(gbce, **sampled, t=config.gbce_t),
        "bpr": bpr,
    }
    if config.loss not in losses:
        raise ValueError(f"loss must be one of {', '.join(losses)}, got {config.loss!r}")
    return losses[config.loss]


def binary_cross_entropy(
    model: SequenceModel, batch: Batch, unseen: NegativeSampler, key: jax.Array, *, deterministic: bool = False
) -> jax.Array:
    r"""Binary cross-entropy of the target against one random unseen item (SASRec's loss).

    .. math::

      \frac{1}{|T|} \sum_{t \in T} \Big[ -\log \sigma(s_t^+) - \log\big(1 - \sigma(s_t^-)\big) \Big]

    over the tokens :math:`T` that have a target; :math:`2 \log 2` for a model that knows nothing. Items that the user
    has interacted with are never drawn. Needs memory for tokens × width numbers, a few times.

    Args:
      model: the model.
      batch: packed sequences.
      unseen: where negatives are drawn from.
      key: random key for masking, negatives and dropout.
      deterministic: whether dropout is off.

    Returns:
      A scalar, float32.

    References:
      Kang and McAuley, `Self-Attentive Sequential Recommendation <https://arxiv.org/abs/1808.09781>`_, 2018
    """
    positive, negative, counted = _against_one_unseen(model, batch, unseen, key, deterministic)
    return _mean(jax.nn.softplus(-positive) + jax.nn.softplus(negative), counted)


def bpr(
    model: SequenceModel, batch: Batch, unseen: NegativeSampler, key: jax.Array, *, deterministic: bool = False
) -> jax.Array:
    r"""Bayesian personalised ranking: the target shall beat one random unseen item.

    .. math::

      \frac{1}{|T|} \sum_{t \in T} -\log \sigma(s_t^+ - s_t^-)

    over the tokens :math:`T` that have a target; :math:`\log 2` for a model that knows nothing. The negatives are those
    of :func:`binary_cross_entropy`, and so is the memory: items that the user has interacted with are never drawn.

    Args:
      model: the model.
      batch: packed sequences.
      unseen: where negatives are drawn from.
      key: random key for masking, negatives and dropout.
      deterministic: whether dropout is off.

    Returns:
      A scalar, float32.

    References:
      Rendle et al., `BPR: Bayesian Personalized Ranking from Implicit Feedback <https://arxiv.org/abs/1205.2618>`_,
      2009
    """
    positive, negative, counted = _against_one_unseen(model, batch, unseen, key, deterministic)
    return _mean(jax.nn.softplus(negative - positive), counted)


def cross_entropy(
    model: SequenceModel,
    batch: Batch,
    unseen: NegativeSampler,
    key: jax.Array,
    *,
    deterministic: bool = False,
    scores_at_once: int = NUMBERS_AT_ONCE,
) -> jax.Array:
    r"""Cross-entropy of the softmax over the whole catalogue.

    .. math::

      \frac{1}{|T|} \sum_{t \in T} \Big[ \log \sum_{i=1}^{n} e^{s_{ti}} - s_{t, t^+} \Big]

    Every item is a negative, those included that the user has interacted with.

    The tokens are worked through in parts of at most ``scores_at_once`` scores (one token at least), of which three
    arrays exist at once. Each part leaves its share of the gradients behind, so that nothing is computed anew.

    Args:
      model: the model.
      batch: packed sequences.
      unseen: not used, but for the number of items.
      key: random key for masking and dropout.
      deterministic: whether dropout is off.
      scores_at_once: the bound on the number of scores, 4 bytes each.

    Returns:
      A scalar, float32.
    """
    _, hidden, targets, weights = _encode(model, batch, key, deterministic)
    table, bias = model.output_layer()
    tokens_at_once = max(1, scores_at_once // unseen.num_items)
    if jax.default_backend() == "cpu":
        tokens_at_once = min(tokens_at_once, CPU_TOKENS_AT_ONCE)
    items = slice(1, unseen.num_items + 1)
    with jax.named_scope("log_sum_exp"):
        normalizer = _log_sum_exp(hidden, table[items], bias[items], weights, tokens_at_once)
    # Rounded as among all items' scores.
    rows = table[targets].astype(hidden.dtype)
    return normalizer - weights @ _scores(hidden, rows, bias[targets])


def sampled_softmax(
    model: SequenceModel,
    batch: Batch,
    unseen: NegativeSampler,
    key: jax.Array,
    *,
    num_negatives: int,
    per_position: bool = False,
    logq_correction: bool = True,
    deterministic: bool = False,
    numbers_at_once: int = NUMBERS_AT_ONCE,
) -> jax.Array:
    r"""Cross-entropy of the softmax over the target and a random sample of the catalogue.

    .. math::

      \frac{1}{|T|} \sum_{t \in T} \bigg[
        \log \Big( e^{s_{t, t^+}} + \sum_{j \in N_t, j \ne t^+} e^{s_{tj} - c_j} \Big) - s_{t, t^+} \bigg]

    over the tokens :math:`T` that have a target. :math:`N_t` are ``num_negatives`` independent draws from the proposal
    :math:`q` of ``unseen``. With the correction, :math:`c_j = \log(|N_t| \, q_j)`: the expectation of the sum inside
    the logarithm is then the one over all items (if :math:`q_j > 0` for all), as in :func:`cross_entropy`. The target
    is not corrected, because it is not there by chance. Without, :math:`c_j = 0`.

    A draw of the target itself is passed over. Items that the user has interacted with may be drawn, as they also
    compete in the whole softmax. Memory is that of :func:`gbce`.

    Args:
      model: the model.
      batch: packed sequences.
      unseen: its proposal is where negatives are drawn from.
      key: random key for masking, negatives and dropout.
      num_negatives: draws a token.
      per_position: whether each token has draws of its own; otherwise one sample serves the whole batch.
      logq_correction: whether scores are corrected for the probability of being drawn.
      deterministic: whether dropout is off.
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
            negative -= unseen.proposal.log_probability(drawn) + np.log(num_negatives)
        everything = jnp.concatenate([positive[:, None], negative], axis=1)
        return jax.nn.logsumexp(everything, axis=1) - positive

    sampling = (num_negatives, per_position, numbers_at_once)
    return _against_sample(model, batch, unseen, key, deterministic, loss, *sampling)


def gbce(
    model: SequenceModel,
    batch: Batch,
    unseen: NegativeSampler,
    key: jax.Array,
    *,
    num_negatives: int,
    per_position: bool = False,
    t: float = 0.75,
    deterministic: bool = False,
    numbers_at_once: int = NUMBERS_AT_ONCE,
) -> jax.Array:
    r"""Generalised binary cross-entropy of the target against a random sample of the catalogue (gSASRec's loss).

    .. math::

      \frac{1}{|T|} \sum_{t \in T} \frac{-1}{|N_t| + 1} \Big[
        \log \sigma(s_{t, t^+})^\beta + \sum_{j \in N_t, j \ne t^+} \log\big(1 - \sigma(s_{tj})\big) \Big],
      \qquad \beta = \alpha \Big( t \big(1 - \tfrac{1}{\alpha}\big) + \tfrac{1}{\alpha} \Big),
      \qquad \alpha = \frac{|N_t|}{n - 1}

    over the tokens :math:`T` that have a target, with :math:`N_t` as in :func:`sampled_softmax`. :math:`\alpha`, at
    most 1, is the share of the negatives that is sampled; without the exponent, a model trained so is overconfident.
    :math:`t = 0` is plain binary cross-entropy (:math:`\beta = 1`); :math:`t = 1` undoes the sampling
    (:math:`\beta = \alpha`), so that :math:`\sigma(s)` is calibrated.

    A draw of the target itself is passed over. Items that the user has interacted with may be drawn.

    The tokens are worked through in parts, in the backward pass anew. A part takes at most ``numbers_at_once`` numbers
    (but one token at least), of which a few arrays exist at once: a score a draw, or, with draws a token, a row of the
    output layer a draw. Shared draws need ``num_negatives`` rows besides.

    Args:
      model: the model.
      batch: packed sequences.
      unseen: its proposal is where negatives are drawn from.
      key: random key for masking, negatives and dropout.
      num_negatives: draws a token.
      per_position: whether each token has draws of its own; otherwise one sample serves the whole batch.
      t: calibration, in [0, 1].
      deterministic: whether dropout is off.
      numbers_at_once: the bound on the numbers that scoring takes, 4 bytes each.

    Returns:
      A scalar, float32.

    References:
      Petrov and Macdonald, `gSASRec: Reducing Overconfidence in Sequential Recommendation Trained with Negative
      Sampling <https://arxiv.org/abs/2308.07192>`_, 2023
    """
    alpha = min(1.0, num_negatives / max(1, unseen.num_items - 1))
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)

    def loss(positive: jax.Array, negative: jax.Array, drawn: jax.Array) -> jax.Array:
        del drawn
        total = beta * jax.nn.softplus(-positive) + jnp.sum(jax.nn.softplus(negative), axis=1)
        return total / (num_negatives + 1)

    sampling = (num_negatives, per_position, numbers_at_once)
    return _against_sample(model, batch, unseen, key, deterministic, loss, *sampling)


def _against_one_unseen(
    model: SequenceModel, batch: Batch, unseen: NegativeSampler, key: jax.Array, deterministic: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores of each token's target and of one unseen item, and whether the token has a target."""
    negative_key, dropout_key = jax.random.split(key)
    batch = model.corrupt(batch, jax.random.fold_in(key, 2))
    with jax.named_scope("negatives"):
        negatives = unseen.sample(negative_key, batch.users)
    with jax.named_scope("lookup"):
        embedded, rows, biases = model.embed(batch.inputs, jnp.stack([batch.targets, negatives]))
    hidden = model.encode(embedded, batch, None if deterministic else dropout_key)
    positive, negative = (_scores(hidden, row, bias) for row, bias in zip(rows, biases, strict=True))
    return positive, negative, batch.targets > 0


def _encode(
    model: SequenceModel, batch: Batch, key: jax.Array, deterministic: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Corrupts and encodes a batch.

    Returns:
      A key for negatives; and of the tokens that may have a target, hidden (tokens, dim), targets (tokens,), 0 where
      there is none, and weights (tokens,) that average over targets.
    """
    negative_key, dropout_key = jax.random.split(key)
    batch = model.corrupt(batch, jax.random.fold_in(key, 2))
    hidden = model(batch, None if deterministic else dropout_key)
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), batch.targets.reshape(-1)
    room = model.targets_at_most(targets.size)
    if room < targets.size:
        # Where few tokens have a target, only those are scored.
        (chosen,) = jnp.nonzero(targets, size=room, fill_value=targets.size)
        hidden = hidden.at[chosen].get(mode="fill", fill_value=0)
        targets = targets.at[chosen].get(mode="fill", fill_value=0)
    weights = (targets > 0).astype(_sum_type(hidden))
    return negative_key, hidden, targets, weights / jnp.maximum(jnp.sum(weights), 1)


def _against_sample(
    model: SequenceModel,
    batch: Batch,
    unseen: NegativeSampler,
    key: jax.Array,
    deterministic: bool,
    loss: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    num_negatives: int,
    per_position: bool,
    numbers_at_once: int,
) -> jax.Array:
    """The mean of a loss of each target against a random sample of the catalogue.

    ``loss(positive, negative, drawn)`` takes scores (tokens,) and (tokens, num_negatives), minus infinity where the
    target was drawn, and the items that were drawn, which broadcast to the latter; it returns (tokens,).
    """
    negative_key, hidden, targets, weights = _encode(model, batch, key, deterministic)
    table, bias = model.output_layer()
    if not per_position:
        shared = unseen.proposal.sample(negative_key, (num_negatives,))
        rows, biases = table[shared].astype(hidden.dtype), bias[shared]

    def part(hidden: jax.Array, targets: jax.Array, weights: jax.Array, number: jax.Array) -> jax.Array:
        if per_position:
            keys = jax.vmap(partial(jax.random.fold_in, negative_key))(number)
            drawn = jax.vmap(lambda key: unseen.proposal.sample(key, (num_negatives,)))(keys)
            negative = _scores(hidden[:, None], table[drawn], bias[drawn])
        else:
            drawn = shared
            negative = jnp.matmul(hidden, rows.T, preferred_element_type=weights.dtype) + biases
        negative = jnp.where(drawn == targets[:, None], -jnp.inf, negative)
        positive = _scores(hidden, table[targets], bias[targets])
        return jnp.sum(weights * loss(positive, negative, drawn))

    by_token = (hidden, targets, weights, jnp.arange(len(targets)))
    numbers = num_negatives * (table.shape[1] if per_position else 1)
    if jax.default_backend() == "cpu":
        numbers_at_once = min(numbers_at_once, CPU_NUMBERS_AT_ONCE)
    cut = _cut(by_token, max(1, numbers_at_once // numbers))
    totals = jax.lax.map(jax.checkpoint(lambda by_token: part(*by_token)), cut)
    return jnp.sum(totals)


def _sum_type(hidden: jax.Array) -> jnp.dtype:
    """The type of scores and sums: at least float32."""
    return jnp.promote_types(hidden.dtype, jnp.float32)


def _scores(hidden: jax.Array, rows: jax.Array, biases: jax.Array) -> jax.Array:
    """Scores from hidden and rows of the output layer, both (…, dim), and biases."""
    wide = _sum_type(hidden)
    return jnp.sum(hidden.astype(wide) * rows.astype(wide), axis=-1) + biases


def _mean(losses: jax.Array, counted: jax.Array) -> jax.Array:
    return jnp.sum(losses * counted) / jnp.maximum(jnp.sum(counted), 1)


def _cut(by_token: Any, tokens_at_once: int) -> Any:
    """Cuts arrays (tokens, …) into parts of at most ``tokens_at_once``: (parts, tokens, …), filled up with zeros."""
    tokens = len(jax.tree.leaves(by_token)[0])
    parts = -(-tokens // tokens_at_once)
    size = -(-tokens // parts)

    def cut(values: jax.Array) -> jax.Array:
        blank = ((0, parts * size - tokens), *[(0, 0)] * (values.ndim - 1))
        return jnp.pad(values, blank).reshape(parts, size, *values.shape[1:])

    return jax.tree.map(cut, by_token)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _log_sum_exp(
    hidden: jax.Array, table: jax.Array, bias: jax.Array, weights: jax.Array, tokens_at_once: int
) -> jax.Array:
    """``weights @ logsumexp(hidden @ table.T + bias)``, some tokens at a time."""
    return _log_sum_exp_forward(hidden, table, bias, weights, tokens_at_once)[0]


def _log_sum_exp_forward(
    hidden: jax.Array, table: jax.Array, bias: jax.Array, weights: jax.Array, tokens_at_once: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The value, and its gradients: those of one number are known, up to a factor, while the scores are at hand."""
    rows = table.astype(hidden.dtype)
    dot = partial(jnp.matmul, preferred_element_type=weights.dtype)

    def join(values: jax.Array) -> jax.Array:
        return values.reshape(-1, *values.shape[2:])[: len(hidden)]

    def add(carry: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]) -> tuple:
        table_gradient, bias_gradient = carry
        hidden, weights = part
        # Items come first: sums over them then run along whole vectors of tokens.
        scores = dot(rows, hidden.T) + bias[:, None]
        largest = jnp.max(scores, axis=0)
        exponentials = jnp.exp(scores - largest)
        total = jnp.sum(exponentials, axis=0)
        scale = weights / total
        factors = exponentials.astype(hidden.dtype)
        hidden_gradient = dot(factors.T, rows) * scale[:, None]
        table_gradient += dot(factors, (hidden * scale[:, None]).astype(hidden.dtype))
        bias_gradient += exponentials @ scale
        return (table_gradient, bias_gradient), (hidden_gradient.astype(hidden.dtype), largest + jnp.log(total))

    start = jnp.zeros(table.shape, weights.dtype), jnp.zeros(bias.shape, weights.dtype)
    (table_gradient, bias_gradient), by_token = jax.lax.scan(add, start, _cut((hidden, weights), tokens_at_once))
    hidden_gradient, normalizers = map(join, by_token)
    gradients = hidden_gradient, table_gradient.astype(table.dtype), bias_gradient.astype(bias.dtype), normalizers
    return weights @ normalizers, gradients


def _log_sum_exp_backward(
    tokens_at_once: int, gradients: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array, ...]:
    del tokens_at_once
    return tuple((cotangent * gradient).astype(gradient.dtype) for gradient in gradients)


_log_sum_exp.defvjp(_log_sum_exp_forward, _log_sum_exp_backward)
