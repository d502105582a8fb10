"""Sessions as graphs: what follows what inside the segments of packed rows.

A session is a segment: a history, or a prefix of one. Its nodes are its distinct items. Two forms say the same where no
item repeats, and differ in what they are good for:

* A *chain* takes every token for a node of its own, with the tokens before and behind it as neighbours. It looks left
  only, so that one pass gives the queries of every prefix.
* A :class:`SessionGraph` takes an item that repeats for one node. A node may then see what comes later, so that a
  session has a single query, at its newest token.
"""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from models.data import Interactions
from models.layers.additive import weights_of


class SessionGraph(NamedTuple):
    """Sessions whose items may repeat. A node lives where its item occurs first; other tokens carry copies.

    Attributes:
      segments: shape (rows, row_length), int32, tokens of a session agree; 0 where not filled.
      together: shape (rows, row_length, row_length), bool, whether two tokens are of the same session.
      first: shape (rows, row_length), int32, where the token's item occurs first in its session.
      last: shape (rows, row_length), int32, where it occurs last.
      newest: shape (rows, row_length), int32, where the session's newest token is.
    """

    segments: jax.Array
    together: jax.Array
    first: jax.Array
    last: jax.Array
    newest: jax.Array

    @classmethod
    def build(cls, items: jax.Array, segments: jax.Array) -> Self:
        """Finds out about the sessions of packed rows.

        Args:
          items: shape (rows, row_length), int32.
          segments: shape (rows, row_length), int32; a session's tokens lie side by side, the newest last.

        Examples:
          >>> graph = SessionGraph.build(jnp.array([[0, 7, 5, 7, 5]]), jnp.array([[0, 1, 1, 1, 2]]))
          >>> graph.first.tolist(), graph.last.tolist(), graph.newest.tolist()
          ([[0, 1, 2, 1, 4]], [[0, 3, 2, 3, 4]], [[0, 3, 3, 3, 4]])
        """
        length = segments.shape[1]
        together = (segments[:, :, None] == segments[:, None]) & (segments > 0)[:, None]
        # A place that is not filled stands for itself, so that indices stay in bounds.
        related = together | jnp.eye(length, dtype=bool)
        alike = related & (items[:, :, None] == items[:, None])

        def last(places: jax.Array) -> jax.Array:
            return length - 1 - jnp.argmax(places[..., ::-1], axis=-1).astype(jnp.int32)

        return cls(segments, together, jnp.argmax(alike, axis=-1).astype(jnp.int32), last(alike), last(related))

    @property
    def places(self) -> jax.Array:
        """Shape (row_length,), int32."""
        return jnp.arange(self.first.shape[1], dtype=jnp.int32)

    @property
    def nodes(self) -> jax.Array:
        """Shape (rows, row_length), bool: where nodes live."""
        return (self.segments > 0) & (self.first == self.places)

    @property
    def ends(self) -> jax.Array:
        """Shape (rows, row_length), bool: the newest tokens."""
        return (self.segments > 0) & (self.newest == self.places)

    def at(self, places: jax.Array, x: jax.Array) -> jax.Array:
        """The entries of ``x``, shape (rows, row_length, …), at a place a token."""
        return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), axis=1)

    def edges(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """Shape (rows, row_length, row_length): 1 from each node (second axis) to what follows it once or more."""
        goes_on = continues(self.segments)
        before = jnp.pad(self.first[:, :-1], ((0, 0), (1, 0)))
        blank = jnp.zeros(self.together.shape, dtype)
        mark = jax.vmap(lambda row, start, end, there: row.at[start, end].max(there))
        return mark(blank, before, self.first, goes_on.astype(dtype))

    def pool(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        weight: jax.Array,
        counted: jax.Array,
        *,
        normalize: bool,
    ) -> jax.Array:
        """Mixes a session's values by their additive scores with the newest token's query.

        Args:
          query: shape (rows, row_length, channels), read at the newest tokens.
          key: shape (rows, row_length, channels).
          value: shape (rows, row_length, dim).
          weight: shape (channels,), see :func:`models.layers.additive_scores`.
          counted: shape (rows, row_length), bool: whose values count.
          normalize: whether a softmax turns scores into weights.

        Returns:
          Shape (rows, row_length, dim); only the newest tokens' entries mean something.
        """
        hidden = jax.nn.sigmoid(self.at(self.newest, query) + key)
        wide = jnp.promote_types(key.dtype, jnp.float32)
        scores = jnp.matmul(hidden, weight.astype(key.dtype), preferred_element_type=wide)
        seen = self.together & counted[:, None]
        weights = weights_of(scores[:, None], seen, normalize=normalize).astype(value.dtype)
        return jnp.einsum("bqk,bkd->bqd", weights, value)


def continues(segments: jax.Array) -> jax.Array:
    """Whether a token has one before it in its segment: shape (rows, row_length), bool."""
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return jnp.pad(same, ((0, 0), (1, 0)))


def previous(x: jax.Array, segments: jax.Array) -> jax.Array:
    """What each token's left neighbour has, 0 without one: shape (rows, row_length, dim), as ``x``."""
    shifted = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return jnp.where(continues(segments)[..., None], shifted, 0)


def following(x: jax.Array, segments: jax.Array) -> jax.Array:
    """What each token's right neighbour has, 0 without one: shape (rows, row_length, dim), as ``x``."""
    return previous(x[:, ::-1], segments[:, ::-1])[:, ::-1]


def earlier(segments: jax.Array, *, itself: bool) -> jax.Array:
    """Whether a token (second axis) has another (third axis) before it in its segment, or is ``itself`` that one."""
    length = segments.shape[1]
    together = (segments[:, :, None] == segments[:, None]) & (segments > 0)[:, None]
    return together & jnp.tri(length, length, 0 if itself else -1, dtype=bool)


def refuse_repeats(train: Interactions, config: Any) -> None:
    """Makes sure that all prefixes may take one pass.

    Args:
      train: the training part.
      config: with ``separate_prefixes``, which makes repeats no problem, and ``max_length``.

    Raises:
      ValueError: if a user has an item twice among ``max_length`` that follow each other.

    Examples:
      >>> from models.config import PrefixConfig
      >>> refuse_repeats(Interactions.from_sequences([[1, 2, 3], [4, 5, 4]]), PrefixConfig())
      Traceback (most recent call last):
      ...
      ValueError: separate_prefixes must be on for these data: user 2 has item 4 twice within 50 items, ...
    """
    if config.separate_prefixes:
        return
    users = train.users
    order = np.lexsort((train.items, users))
    same = (users[order][1:] == users[order][:-1]) & (train.items[order][1:] == train.items[order][:-1])
    (found,) = np.nonzero(same & (np.diff(order) < config.max_length))
    if found.size:
        place = order[found[0]]
        raise ValueError(
            f"separate_prefixes must be on for these data: user {train.user_ids[users[place]]} has item "
            f"{train.item_ids[train.items[place]]} twice within {config.max_length} items, and all prefixes take one "
            "pass only where no item repeats"
        )
