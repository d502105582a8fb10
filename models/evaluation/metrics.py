"""Ranking metrics, from the ranks of the one relevant item of each user."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def hit_rate_at_k(ranks: jax.typing.ArrayLike, k: int) -> jax.Array:
    """The share of users whose item is among the first ``k`` (HR@k).

    With one relevant item a user, this is recall@k, and ``k`` times precision@k.

    Args:
      ranks: shape (users,), 0 for the first place.
      k: length of the list.

    Returns:
      A scalar in [0, 1].

    Raises:
      ValueError: if there is no user, or ``k`` is smaller than 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> float(hit_rate_at_k(jnp.array([0, 3, 12, 5]), k=5))
      0.5
    """
    return jnp.mean(_hit(_checked(ranks, k), k, jnp))


def ndcg_at_k(ranks: jax.typing.ArrayLike, k: int) -> jax.Array:
    r"""Normalised discounted cumulative gain of one relevant item (NDCG@k).

    The mean of :math:`[r < k] / \log_2(r + 2)` over the ranks :math:`r`.

    Args:
      ranks: shape (users,), 0 for the first place.
      k: length of the list.

    Returns:
      A scalar in [0, 1].

    Raises:
      ValueError: if there is no user, or ``k`` is smaller than 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> round(float(ndcg_at_k(jnp.array([0, 1, 12]), k=10)), 4)  # (1 + 1 / log2(3) + 0) / 3
      0.5436
    """
    return jnp.mean(_gain(_checked(ranks, k), k, jnp))


def mrr_at_k(ranks: jax.typing.ArrayLike, k: int) -> jax.Array:
    r"""Mean reciprocal rank (MRR@k).

    The mean of :math:`[r < k] / (r + 1)` over the ranks :math:`r`. With one relevant item a user, this is
    MAP@k, the mean average precision.

    Args:
      ranks: shape (users,), 0 for the first place.
      k: length of the list.

    Returns:
      A scalar in [0, 1].

    Raises:
      ValueError: if there is no user, or ``k`` is smaller than 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> round(float(mrr_at_k(jnp.array([0, 1, 12]), k=10)), 4)  # (1 + 1/2 + 0) / 3
      0.5
    """
    return jnp.mean(_reciprocal(_checked(ranks, k), k, jnp))


def coverage_at_k(top_items: jax.typing.ArrayLike, num_items: int, k: int) -> float:
    """The share of the catalogue that is recommended to anybody among the first ``k``.

    Args:
      top_items: shape (users, at least k or all that there are), the best item first, 0 where there is none.
      num_items: size of the catalogue.
      k: length of the list.

    Returns:
      A number in [0, 1].

    Raises:
      ValueError: if there is no user, or ``k`` is smaller than 1.

    Examples:
      >>> coverage_at_k([[1, 2, 3], [1, 3, 0]], num_items=5, k=2)
      0.6
    """
    recommended = np.unique(np.asarray(_checked(top_items, k))[:, :k])
    return float(np.count_nonzero(recommended) / num_items)


METRICS = {"HR": hit_rate_at_k, "NDCG": ndcg_at_k, "MRR": mrr_at_k}


def summarize(ranks: jax.typing.ArrayLike, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """All metrics at all ``ks``, by name: ``HR@1 … NDCG@1 … MRR@10``.

    As every user has one relevant item, recall@k and MAP@k have no line of their own: they are HR@k and MRR@k.

    Args:
      ranks: shape (users,), 0 for the first place.
      ks: lengths of the list.

    Raises:
      ValueError: if there is no user or no length, or a length is smaller than 1.
    """
    if not ks:
        raise ValueError("ks must be one or more lengths of lists, got none")
    return {f"{name}@{k}": float(metric(ranks, k)) for name, metric in METRICS.items() for k in ks}


def by_user(ranks: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, np.ndarray]:
    """What every user contributes to the metrics of :func:`summarize`, which are the means. On the host.

    Args:
      ranks: shape (users,), 0 for the first place.
      ks: lengths of the list.

    Returns:
      Shape (users,), float64, by name.

    Examples:
      >>> by_user(np.array([0, 1, 12]), ks=[10])["MRR@10"].tolist()
      [1.0, 0.5, 0.0]
    """
    return {f"{name}@{k}": worth(ranks, k, np) for name, worth in _WORTH.items() for k in ks}


# What an item at a rank is worth. Array modules differ: those that are compiled are JAX's, of a group of users NumPy's.
def _hit(ranks: Any, k: int, xp: Any) -> Any:
    return xp.where(ranks < k, 1.0, 0.0)


def _gain(ranks: Any, k: int, xp: Any) -> Any:
    return xp.where(ranks < k, 1 / xp.log2(ranks + 2.0), 0.0)


def _reciprocal(ranks: Any, k: int, xp: Any) -> Any:
    return xp.where(ranks < k, 1 / (ranks + 1.0), 0.0)


_WORTH = {"HR": _hit, "NDCG": _gain, "MRR": _reciprocal}


def _checked(by_user: jax.typing.ArrayLike, k: int) -> jax.Array:
    """The array, if there is anything to average over."""
    if k < 1:
        raise ValueError(f"k, the length of a list, must be at least 1, got {k}")
    by_user = jnp.asarray(by_user)
    if not len(by_user):
        raise ValueError("there is no user to average over")
    return by_user
