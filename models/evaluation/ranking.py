"""Full ranking: every user's next item against the whole catalogue."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.architectures.base import Recommender
from models.compilation import jit
from models.data import Interactions
from models.evaluation import metrics
from models.evaluation.queries import Histories, UserQueries, make_queries
from models.evaluation.split import split_ranks, split_top_items
from models.memory import USERS_AT_ONCE
from models.mesh import DATA, constrain, current_mesh, fill_up, split_catalogue, whole


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["queries", "targets", "seen_users", "seen_items", "chunk_starts"],
    meta_fields=["num_users", "num_items", "chunk_size", "pairs_per_chunk", "exclude_seen", "num_repeated"],
)
@dataclasses.dataclass(frozen=True)
class FullRanking:
    """An evaluation set on the device. Users are scored in chunks, so scores of users × items never exist whole.

    Attributes:
      queries: every user's query.
      targets: shape (chunks, chunk_size), int32, the item to find.
      seen_users: shape (pairs,), int32, user of each distinct (user, item in the history) pair, ascending.
      seen_items: shape (pairs,), int32.
      chunk_starts: shape (chunks + 1,), int32, where each chunk's pairs begin.
      num_users: number of users; the last chunk is filled up with the last user.
      num_items: size of the catalogue.
      chunk_size: users scored at once.
      pairs_per_chunk: the largest number of pairs of one chunk.
      exclude_seen: whether items of the history are left out of the ranking; if not, there are no pairs.
      num_repeated: how many users' items to find are in their history, and ranked though ``exclude_seen`` holds.
    """

    queries: Histories | UserQueries
    targets: jax.Array
    seen_users: jax.Array
    seen_items: jax.Array
    chunk_starts: jax.Array
    num_users: int
    num_items: int
    chunk_size: int
    pairs_per_chunk: int
    exclude_seen: bool
    num_repeated: int

    @property
    def protocol(self) -> str:
        """How targets are ranked, in words."""
        seen = "history not ranked" if self.exclude_seen else "history ranked too"
        if self.num_repeated:
            seen += f" but for the item to find, which {self.num_repeated:,} of {self.num_users:,} users had before"
        return f"full ranking over the catalogue, {seen}, ties counted against the target"

    @classmethod
    def prepare(
        cls,
        history: Interactions,
        targets: np.ndarray,
        *,
        model: type[Recommender],
        config: Any,
        user_ids: np.ndarray | None = None,
        exclude_seen: bool = True,
        chunk_size: int = USERS_AT_ONCE,
    ) -> "FullRanking":
        """Makes the queries and collects what is not to be ranked.

        Args:
          history: what is known of each user; nobody's may be empty.
          targets: shape (users,), the item that follows.
          model: the kind of model.
          config: its configuration.
          user_ids: shape (known users,), the raw ids of the users that the model knows, if it has a table of users.
          exclude_seen: whether items of the history are left out of the ranking.
          chunk_size: users scored at once; a chunk needs ``chunk_size`` × items numbers.

        Raises:
          ValueError: if the model does not know a user.
        """
        queries = make_queries(history, model=model, config=config, user_ids=user_ids)
        users, items = history.distinct_pairs() if exclude_seen else (np.zeros(0, int), np.zeros(0, int))
        chunks = -(-history.num_users // chunk_size)
        starts = np.searchsorted(users, np.arange(chunks + 1) * chunk_size)
        pairs_per_chunk = int(np.diff(starts).max())

        def chunked(values: np.ndarray) -> jax.Array:
            filled = np.pad(values, (0, chunks * chunk_size - history.num_users), mode="edge")
            return jnp.asarray(filled.reshape(chunks, chunk_size), jnp.int32)

        # A slice of fixed length behind the last chunk's start must stay in bounds.
        behind = (0, pairs_per_chunk)
        return cls(
            queries=queries,
            targets=chunked(targets),
            seen_users=jnp.asarray(np.pad(users, behind, constant_values=-1), jnp.int32),
            seen_items=jnp.asarray(np.pad(items, behind), jnp.int32),
            chunk_starts=jnp.asarray(starts, jnp.int32),
            num_users=history.num_users,
            num_items=history.num_items,
            chunk_size=chunk_size,
            pairs_per_chunk=pairs_per_chunk,
            exclude_seen=exclude_seen,
            num_repeated=int(np.sum(items == targets[users])),
        )

    def ranks(self, model: Recommender, context: Mapping[str, Any]) -> jax.Array:
        """Ranks every user's target: shape (users,), int32, 0 for the first place.

        An item in the history is not ranked (if ``exclude_seen``), unless it is the target. Items with the target's
        score count as better, and so does everything that cannot be compared: a model that returns NaN finds nothing.
        """
        if current_mesh() is not None:
            return self._by_split_chunk(model, context, split_ranks)
        return self._by_chunk(model, context, self._rank)

    def top_items(self, model: Recommender, context: Mapping[str, Any], k: int) -> jax.Array:
        """The best items of every user: shape (users, min(k, num_items)), int32, the best first.

        Items in the history are left out if ``exclude_seen``; 0 fills up where too few remain. Of items with the same
        score the one with the smaller number comes first.
        """
        if current_mesh() is not None:
            return self._by_split_chunk(model, context, partial(split_top_items, k=min(k, self.num_items)))
        return self._by_chunk(model, context, lambda chunk, scores: self._top(chunk, scores, k))

    def ranks_and_top_items(
        self, model: Recommender, context: Mapping[str, Any], k: int
    ) -> tuple[jax.Array, jax.Array]:
        """:meth:`ranks` and :meth:`top_items`, on one device from the same scores."""
        if current_mesh() is not None:
            return self.ranks(model, context), self.top_items(model, context, k)
        return self._by_chunk(
            model, context, lambda chunk, scores: (self._rank(chunk, scores), self._top(chunk, scores, k))
        )

    def _rank(self, chunk: jax.Array, scores: jax.Array) -> jax.Array:
        targets = self.targets[chunk]
        score = jnp.take_along_axis(scores, targets[:, None], axis=1)
        # "not smaller" rather than "larger or equal": NaN is neither.
        ahead = jnp.sum(~(scores[:, 1 : self.num_items + 1] < score), axis=1)
        user, item, inside = self._seen(chunk)
        hidden_ahead = inside & (item != targets[user]) & ~(scores[user, item] < score[user, 0])
        return ahead - 1 - jax.ops.segment_sum(hidden_ahead.astype(jnp.int32), user, self.chunk_size)

    def _top(self, chunk: jax.Array, scores: jax.Array, k: int) -> jax.Array:
        user, item, inside = self._seen(chunk)
        # Pairs of other chunks fall on padding, which is no item either.
        scores = scores.at[user, jnp.where(inside, item, 0)].set(-jnp.inf)
        best, found = jax.lax.top_k(scores[:, 1 : self.num_items + 1], min(k, self.num_items))
        return jnp.where(jnp.isneginf(best), 0, found + 1)

    def _by_chunk(
        self,
        model: Recommender,
        context: Mapping[str, Any],
        function: Callable[[jax.Array, jax.Array], Any],
    ) -> Any:
        """Applies ``function(chunk, scores)``, with scores of shape (chunk_size, rows of the item table).

        What it returns, an array or several with a row a user, is put together for all users.
        """
        represented = model.represent(context)
        vectors = self.queries.vectors(model, represented)
        filled = jnp.arange(self.targets.size).reshape(self.targets.shape)
        users = jnp.minimum(filled, self.num_users - 1)
        found = jax.lax.map(
            lambda chunk: function(chunk, model.scores(vectors[users[chunk]], represented)),
            jnp.arange(len(self.targets)),
        )
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: self.num_users], found)

    def _by_split_chunk(
        self, model: Recommender, context: Mapping[str, Any], function: Callable[..., jax.Array]
    ) -> jax.Array:
        """Applies a function of :mod:`models.evaluation.split` to each chunk, users and items split over the mesh."""
        represented = model.represent(context)
        vectors = constrain(self.queries.vectors(model, represented), DATA)
        table, bias = split_catalogue(*model.items(represented), self.num_items)
        filled = jnp.arange(self.targets.size).reshape(self.targets.shape)
        users = jnp.minimum(filled, self.num_users - 1)

        def apply(chunk: jax.Array) -> jax.Array:
            mine, targets = fill_up(vectors[users[chunk]], DATA), fill_up(self.targets[chunk], DATA)
            mine = mine.astype(jnp.promote_types(mine.dtype, table.dtype))
            return whole(function(mine, targets, table, bias, self._seen(chunk))[: self.chunk_size])

        found = jax.lax.map(apply, jnp.arange(len(self.targets)))
        return whole(found.reshape(-1, *found.shape[2:])[: self.num_users])

    def _seen(self, chunk: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """User (inside the chunk), item, and whether the pair belongs to the chunk, for a window of pairs."""
        pairs = self.chunk_starts[chunk] + jnp.arange(self.pairs_per_chunk)
        user = self.seen_users[pairs] - chunk * self.chunk_size
        inside = (user >= 0) & (user < self.chunk_size)
        return jnp.where(inside, user, 0), self.seen_items[pairs], inside


def make_test(
    graphdef: nnx.GraphDef, ks: Sequence[int], prepare: Callable[[Any], Any] = lambda state: state
) -> Callable[[Any, FullRanking, Mapping[str, Any]], tuple[np.ndarray, dict[str, float]]]:
    """Builds ``test(state, ranking, context) -> ranks, metrics``, compiled when it is first called.

    Args:
      graphdef: of the model.
      ks: lengths of the lists that metrics are given for.
      prepare: what is done to the state first, inside the program.

    Returns:
      A function that returns ranks (users,) and all metrics by name, coverage included.
    """

    @jit
    def find(state: Any, ranking: FullRanking, context: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, prepare(state))
        return ranking.ranks_and_top_items(model, context, max(ks))

    def test(state: Any, ranking: FullRanking, context: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, float]]:
        ranks, top_items = find(state, ranking, context)
        coverage = {f"coverage@{k}": metrics.coverage_at_k(top_items, ranking.num_items, k) for k in ks}
        return np.asarray(ranks), metrics.summarize(np.asarray(ranks), ks) | coverage

    return test
