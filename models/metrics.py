"""Ranking metrics, from the ranks of the one relevant item of each user."""

import jax
import jax.numpy as jnp


def hit_rate_at_k(ranks: jax.typing.ArrayLike, k: int) -> jax.Array:
    """The share of users whose item is among the first ``k`` (HR@k).

    Args:
      ranks: shape (users,), 0 for the first place.
      k: length of the list.

    Returns:
      A scalar in [0, 1].

    Examples:
      >>> import jax.numpy as jnp
      >>> float(hit_rate_at_k(jnp.array([0, 3, 12, 5]), k=5))
      0.5
    """
    return jnp.mean(jnp.asarray(ranks) < k, dtype=jnp.float32)


def ndcg_at_k(ranks: jax.typing.ArrayLike, k: int) -> jax.Array:
    r"""Normalised discounted cumulative gain of one relevant item (NDCG@k).

    The mean of :math:`[r < k] / \log_2(r + 2)` over the ranks :math:`r`.

    Args:
      ranks: shape (users,), 0 for the first place.
      k: length of the list.

    Returns:
      A scalar in [0, 1].

    Examples:
      >>> import jax.numpy as jnp
      >>> round(float(ndcg_at_k(jnp.array([0, 1, 12]), k=10)), 4)  # (1 + 1 / log2(3) + 0) / 3
      0.5436
    """
    ranks = jnp.asarray(ranks)
    return jnp.mean(jnp.where(ranks < k, 1 / jnp.log2(ranks + 2.0), 0))


def summarize(ranks: jax.typing.ArrayLike, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """All metrics at all ``ks``, by name: ``HR@1 … NDCG@10``."""
    metrics = {f"HR@{k}": float(hit_rate_at_k(ranks, k)) for k in ks}
    return metrics | {f"NDCG@{k}": float(ndcg_at_k(ranks, k)) for k in ks}
