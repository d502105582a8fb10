"""Using a trained model: recommending, with raw ids in and out, and testing."""

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.architectures.base import Recommender
from models.checks import shortened
from models.compilation import jit
from models.config import TrainConfig
from models.data import Interactions, Split, id_lookup, item_lookup, item_numbers
from models.evaluation.groups import Groups, summarize_groups
from models.evaluation.queries import behind_history, history_scores, user_scores
from models.evaluation.ranking import FullRanking, make_test
from models.memory import USERS_AT_ONCE
from models.training.beside import KnownUsers
from models.training.checkpoints import LoadedRun, Which, load_run

SCORES_AT_ONCE = 2**26  # 256 MiB
# Shapes are rounded up to powers of two from here on, so that few of them are ever compiled.
SHORTEST_ROW = 16
SHORTEST_LIST = 16


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """What to recommend after one history.

    Attributes:
      items: raw ids, best first.
      scores: the model's score of each item. They compare the items of one history, not histories.
      unknown: raw ids in the history that the model has never seen, each once. They were passed over.
    """

    items: list[Any]
    scores: list[float]
    unknown: list[Any]


class TrainedModel:
    """A trained model that recommends.

    Users are histories, or, where the model has a table of users, those that it was trained with. They are scored in
    chunks, so that scores of users × items never exist whole, and chunks have few different shapes, each compiled when
    it first occurs.

    Args:
      model: the model.
      item_ids: shape (num_items + 1,), the raw ids of items 1 … num_items, behind one that means nothing.
      config: its configuration.
      context: what the model computes with.
      users: the users that it knows, if it has a table of users.

    Examples:
      >>> import numpy as np
      >>> from models.architectures.registry import make_config, make_model
      >>> config = make_config("sasrec")
      >>> model = make_model(config, num_users=0, num_items=3, seed=0)  # untrained
      >>> trained = TrainedModel(model, np.array(["", "apple", "pear", "plum"]), config)
      >>> (found,) = trained.recommend([["apple", "kiwi"]])
      >>> sorted(found.items), found.unknown
      (['pear', 'plum'], ['kiwi'])
    """

    def __init__(
        self,
        model: Recommender,
        item_ids: np.ndarray,
        config: TrainConfig,
        context: Mapping[str, Any] | None = None,
        users: KnownUsers | None = None,
    ) -> None:
        self.item_ids, self.config, self.users = item_ids, config, users
        self.num_items = len(item_ids) - 1
        self.query = model.query
        self._number = item_lookup(item_ids)
        self._user = id_lookup(np.zeros(0, np.int64) if users is None else users.ids)
        self._num_behind = len(behind_history(model, self.num_items)) if model.query == "history" else 0
        self._chunk_size = max(1, min(USERS_AT_ONCE, SCORES_AT_ONCE // len(item_ids)))
        graphdef, self._state = nnx.split(model)

        def top(
            state: Any,
            represented: Any,
            rows: jax.Array,
            seen: tuple[jax.Array, jax.Array],
            allowed: jax.Array | None,
            k: int,
        ) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graphdef, state)
            if model.query == "user":
                scores = user_scores(model, represented, rows, num_items=self.num_items)
            else:
                scores = history_scores(
                    model, represented, rows, num_items=self.num_items, max_length=config.max_length
                )
            if allowed is not None:
                scores = jnp.where(allowed, scores, -jnp.inf)
            return jax.lax.top_k(scores.at[seen].set(-jnp.inf), k)

        self._top = jit(top, static_argnums=5)
        # Once, not for each request: a model over a graph takes the whole of it.
        represent = jit(lambda state, context: nnx.merge(graphdef, state).represent(context))
        self._represented = represent(self._state, {} if context is None else context)

    @classmethod
    def load(cls, directory: str | Path, which: Which = "best") -> Self:
        """Loads the model of a training run.

        Args:
          directory: the run's folder: what ``--output-dir`` was.
          which: ``best``: the parameters with the best validation result. ``last``: the newest.

        Raises:
          CheckpointError: if the folder holds no run, or nothing of it can be read.
        """
        run = load_run(Path(directory), which)
        return cls(run.model, run.item_ids, run.info.config, run.context, run.users)

    def recommend(
        self,
        histories: Iterable[Sequence[Any]],
        k: int = 10,
        *,
        exclude_seen: bool = True,
        only_items: Iterable[Any] | None = None,
        exclude_items: Iterable[Any] = (),
        candidates: Iterable[Sequence[Any]] | None = None,
    ) -> list[Recommendation]:
        """Recommends what may follow each history.

        The model sees the newest items of a history, as many as it was trained for; ``exclude_seen`` heeds all of them.
        Ids that the model has never seen are passed over and reported. A history without any other, or without any at
        all, gets an empty recommendation: one such user does not spoil a batch.

        Args:
          histories: the raw ids of each user's items, oldest first. Numbers may be given as text and the other way
            round.
          k: how many items to recommend; of a catalogue with fewer (seen ones excluded), all.
          exclude_seen: whether items of the history are left out.
          only_items: raw ids of the only items that may be recommended to anybody; None: all.
          exclude_items: raw ids of items that are recommended to nobody.
          candidates: for each history, the raw ids of the only items that may be recommended; None: all.

        Returns:
          One recommendation a history, in the same order.

        Raises:
          ValueError: if ``k`` is smaller than 1, a history is no sequence of ids, the model has no use for histories,
            or no item is left to recommend.
        """
        if self.query != "history":
            raise ValueError(
                f"{self.config.model} knows users, not histories; recommend to users that it was trained with "
                "(--users, or recommend_to_users)"
            )
        numbers, unknown = [], []
        for place, history in enumerate(histories):
            if isinstance(history, str | bytes) or not isinstance(history, Iterable):
                raise ValueError(
                    f"histories must hold one list of item ids a user, but number {place} is {history!r}; "
                    "for a single user give [history]"
                )
            raw = history.tolist() if isinstance(history, np.ndarray) else list(history)
            mine = self._numbers(raw, f"histories: number {place}")
            numbers.append(mine[mine > 0])
            unknown.append(list(dict.fromkeys(raw_id for raw_id, number in zip(raw, mine, strict=True) if not number)))
        usable = np.array([len(mine) > 0 for mine in numbers], bool)
        lengths = np.array([len(mine) for mine in numbers], np.int64)
        order = np.argsort(lengths, kind="stable")
        order = order[usable[order]]
        rows = [mine if exclude_seen else mine[:0] for mine in numbers]
        found = self._recommend(order, numbers, rows, k, only_items, exclude_items, candidates)
        return [dataclasses.replace(mine, unknown=missing) for mine, missing in zip(found, unknown, strict=True)]

    def recommend_to_users(
        self,
        users: Iterable[Any],
        k: int = 10,
        *,
        exclude_seen: bool = True,
        only_items: Iterable[Any] | None = None,
        exclude_items: Iterable[Any] = (),
        candidates: Iterable[Sequence[Any]] | None = None,
    ) -> list[Recommendation]:
        """Recommends to users that the model was trained with.

        Args:
          users: their raw ids.
          k: as for :meth:`recommend`, like what follows.
          exclude_seen: whether items that are known of the user are left out.
          only_items: as above.
          exclude_items: as above.
          candidates: as above.

        Returns:
          One recommendation a user, in the same order.

        Raises:
          ValueError: if the model has no table of users, does not know one, or as for :meth:`recommend`.
        """
        if self.query != "user" or self.users is None:
            raise ValueError(
                f"{self.config.model} has no table of users; give the histories instead (--history, --histories, or "
                "recommend)"
            )
        _check_list(users, "users")
        ids = self.users.ids
        numbers = []
        for raw in users:
            try:
                number = self._user(raw)
            except TypeError:  # a list, which nothing is called
                number = None
            if number is None:
                raise ValueError(
                    f"users: {shortened(raw)} is not among the {len(ids):,} users that the model was trained with; "
                    f"one of them is {ids[0]}"
                )
            numbers.append(number)
        seen = [self.users.history(user) if exclude_seen else np.zeros(0, np.int32) for user in numbers]
        return self._recommend(
            np.arange(len(numbers)), np.array(numbers, np.int32), seen, k, only_items, exclude_items, candidates
        )

    def unknown(self, raw_ids: Iterable[Any]) -> list[Any]:
        """The ids that are none of the model's items, in the order given."""
        return [raw_id for raw_id in raw_ids if not self._number(raw_id)]

    def _numbers(self, raw: Iterable[Any], what: str) -> np.ndarray:
        """The numbers of items, 0 for unknown ids; ``what`` is what an error says of ids that cannot be any."""
        _check_list(raw, what)
        numbers = []
        for raw_id in raw:
            try:
                hash(raw_id)
                numbers.append(self._number(raw_id))
            except TypeError:  # a list, where a history is nested once too often
                raise ValueError(f"{what} holds {shortened(raw_id)}; ids of items are numbers or text") from None
        return np.array(numbers, np.int32)

    def _recommend(
        self,
        order: np.ndarray,
        queries: Any,
        seen: Sequence[np.ndarray],
        k: int,
        only_items: Iterable[Any] | None,
        exclude_items: Iterable[Any],
        candidates: Iterable[Sequence[Any]] | None,
    ) -> list[Recommendation]:
        """Recommends to the queries in ``order``; the others get nothing."""
        try:
            k = operator.index(k)
        except TypeError:
            raise TypeError(f"k must be a whole number, got {k!r}") from None
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        allowed = self._allowed(only_items, exclude_items)
        lists = None
        if candidates is not None:
            lists = [self._numbers(mine, f"candidates: number {i}") for i, mine in enumerate(candidates)]
            if len(lists) != len(seen):
                raise ValueError(f"candidates must hold one list for each of {len(seen)} users, got {len(lists)}")
        results = [Recommendation([], [], []) for _ in seen]
        chunks = [order[i : i + self._chunk_size] for i in range(0, len(order), self._chunk_size)]
        found = []
        for chunk in chunks:
            mine = None if lists is None else [lists[user] for user in chunk]
            rows = self._rows([queries[user] for user in chunk])
            found.append(self._dispatch(rows, [seen[user] for user in chunk], k, self._masks(allowed, mine, len(rows))))
        for chunk, (scores, items) in zip(chunks, found, strict=True):
            scores, items = np.asarray(scores)[:, :k], np.asarray(items)[:, :k]
            counts = np.sum(scores > -np.inf, axis=1)
            raw_items = self.item_ids[items]
            for row, user in enumerate(chunk):
                results[user].items.extend(raw_items[row, : counts[row]].tolist())
                results[user].scores.extend(scores[row, : counts[row]].tolist())
        return results

    def _allowed(self, only_items: Iterable[Any] | None, exclude_items: Iterable[Any]) -> np.ndarray | None:
        """Shape (num_items + 1,), which items may be recommended to anybody; None: all."""
        excluded = self._numbers(exclude_items, "exclude_items")
        if only_items is None and not excluded.size:
            return None
        allowed = np.ones(self.num_items + 1, bool)
        if only_items is not None:
            allowed[:] = False
            allowed[self._numbers(only_items, "only_items")] = True
        allowed[excluded] = False
        allowed[0] = False
        if not allowed.any():
            raise ValueError("only_items and exclude_items leave no item of the catalogue to recommend")
        return allowed

    def _masks(self, allowed: np.ndarray | None, candidates: list[np.ndarray] | None, rows: int) -> np.ndarray | None:
        """Which items may be recommended to each row; None: all."""
        if candidates is None:
            return allowed
        masks = np.zeros((rows, self.num_items + 1), bool)
        for mask, mine in zip(masks, candidates, strict=False):
            mask[mine] = True
        return masks if allowed is None else masks & allowed

    def _rows(self, queries: Sequence[Any]) -> np.ndarray:
        """The queries of one chunk, filled up to one of few shapes."""
        count = min(self._chunk_size, _power_of_two(len(queries)))
        if self.query == "user":
            return np.pad(np.array(queries, np.int32), (0, count - len(queries)))
        longest = max(map(len, queries)) + self._num_behind
        length = min(self.config.max_length, max(SHORTEST_ROW, _power_of_two(longest)))
        rows = np.zeros((count, length), np.int32)
        for row, history in zip(rows, queries, strict=False):
            newest = history[-(length - self._num_behind) :]
            row[length - len(newest) :] = newest
        return rows

    def _dispatch(
        self, rows: np.ndarray, seen: Sequence[np.ndarray], k: int, allowed: np.ndarray | None
    ) -> tuple[jax.Array, jax.Array]:
        """Scores and numbers of the best items of one chunk, shape (rows, at least k or the catalogue's size)."""
        items = np.concatenate(seen)
        users = np.repeat(np.arange(len(seen)), [len(mine) for mine in seen])
        room = rows.size * _power_of_two(-(-max(1, len(items)) // rows.size))
        pairs = np.pad(np.stack([users, items]), ((0, 0), (0, room - len(items)))).astype(np.int32)  # 0 is no item
        size = min(self.num_items, max(SHORTEST_LIST, _power_of_two(k)))
        return self._top(self._state, self._represented, rows, tuple(pairs), allowed, size)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The outcome of a test.

    Attributes:
      metrics: by name, as a training run gives them.
      groups: of groups of users, likewise.
      protocol: how they came about.
      users: shape (users,), raw ids.
      items: shape (users,), raw ids of the items to find.
      ranks: shape (users,), int32, 0 for the first place.
    """

    metrics: dict[str, float]
    groups: Groups
    protocol: str
    users: np.ndarray
    items: np.ndarray
    ranks: np.ndarray


def evaluate(run: LoadedRun, split: Split, *, ks: Sequence[int], exclude_seen: bool = True) -> Evaluation:
    """Tests a trained model, as a training run does at its end.

    Args:
      run: the trained model.
      split: the data, with the items numbered as in the run, see :func:`in_catalogue`.
      ks: lengths of the lists that metrics are given for.
      exclude_seen: whether items in a user's history are left out of the ranking.
    """
    ranking = FullRanking.prepare(
        split.test_history,
        split.test,
        model=type(run.model),
        config=run.info.config,
        user_ids=None if run.users is None else run.users.ids,
        exclude_seen=exclude_seen,
    )
    graphdef, state = nnx.split(run.model)
    ranks, found = make_test(graphdef, tuple(ks))(state, ranking, run.context)
    return Evaluation(
        metrics=found,
        groups=summarize_groups(ranks, split, ks),
        protocol=f"{split.protocol}, {ranking.protocol}",
        users=split.test_history.user_ids,
        items=run.item_ids[split.test],
        ranks=ranks,
    )


def in_catalogue(interactions: Interactions, item_ids: np.ndarray, *, min_user_interactions: int = 1) -> Interactions:
    """Numbers the items of other data as in a catalogue.

    Args:
      interactions: the data.
      item_ids: shape (num_items + 1,), the raw ids of the catalogue.
      min_user_interactions: how many interactions a user must keep to be kept.

    Returns:
      The interactions with items of the catalogue. A note tells what was left out.

    Raises:
      ValueError: if nothing remains.

    Examples:
      >>> import numpy as np
      >>> other = Interactions.from_sequences([[7, 8, 9], [9]])
      >>> known = in_catalogue(other, np.array([0, 8, 7]))
      >>> [items.tolist() for items in known], known.notes
      ([[2, 1]], ('items matched by their ids: removed 1 unknown items, 2 interactions with them and 1 users',))
    """
    number = item_numbers(item_ids, interactions.item_ids.tolist())
    occurring = np.unique(interactions.items)
    kept = interactions.where(number[interactions.items] > 0)
    unknown = len(interactions) - len(kept)
    kept = kept.of_users(kept.lengths >= min_user_interactions)
    if not kept.num_users:
        raise ValueError(
            f"of {interactions}, no user has {min_user_interactions} or more with items of the catalogue; "
            f"items there are called such as {item_ids[1]}, here {interactions.item_ids[occurring[0]]}"
        )
    kept = dataclasses.replace(kept, items=number[kept.items], num_items=len(item_ids) - 1, item_ids=item_ids)
    return kept.with_notes(
        f"items matched by their ids: removed {np.sum(number[occurring] == 0):,} unknown items, {unknown:,} "
        f"interactions with them and {interactions.num_users - kept.num_users:,} users"
    )


def _check_list(raw: Any, what: str) -> None:
    """Refuses a single id where several are wanted: its letters would be taken for ids."""
    if isinstance(raw, str | bytes):
        raise ValueError(
            f"{what} must be a list of ids, got {shortened(raw)}; for a single one give [{shortened(raw)}]"
        )


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << max(0, number - 1).bit_length()
