"""Using a trained model: recommending, with raw ids in and out, and testing."""

import dataclasses
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.checks import shortened
from models.compilation import jit
from models.data import Batch, Interactions, Split, item_lookup, item_numbers
from models.sequence_model import SequenceModel
from models.training.checkpoints import LoadedRun, Which, load_run
from models.training.evaluation import FullRanking, make_test

USERS_AT_ONCE = 256
SCORES_AT_ONCE = 2**26  # 256 MiB
# Shapes are rounded up to powers of two from here on, so that few of them are ever compiled.
SHORTEST_ROW = 16
SHORTEST_LIST = 16


def next_scores(model: SequenceModel, histories: jax.Array, *, num_items: int, max_length: int) -> jax.Array:
    """Scores every item as the one that follows each history.

    Args:
      model: the model.
      histories: shape (rows, length), int32, item numbers, newest last, 0 in front of short histories. Where something
        follows the history in the model's inputs (BERT4Rec's mask token), the first column is not seen.
      num_items: size of the catalogue.
      max_length: the longest sequence the model takes; at least ``length``.

    Returns:
      Shape (rows, num_items + 1), float32; minus infinity in column 0, which is no item.
    """
    behind = jnp.asarray(_behind_history(model, num_items), jnp.int32)
    rows, length = histories.shape
    inputs = jnp.concatenate([histories[:, len(behind) :], jnp.broadcast_to(behind, (rows, len(behind)))], axis=1)
    filled = inputs > 0
    unused = jnp.zeros_like(inputs)
    batch = Batch(
        inputs=inputs,
        positions=jnp.where(filled, jnp.arange(max_length - length, max_length), 0),
        padding=jnp.where(filled, max_length - jnp.sum(filled, axis=1, keepdims=True), 0),
        segments=filled.astype(jnp.int32),
        users=unused,
        targets=unused,
    )
    weight, bias = model.output_layer()
    scores = model(batch)[:, -1] @ weight.T + bias
    return scores[:, : num_items + 1].at[:, 0].set(-jnp.inf)


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


class Recommender:
    """A trained model that recommends.

    Users need not be known: a history is all there is to a user. They are scored in chunks, so that scores of users ×
    items never exist whole, and chunks have few different shapes, each compiled when it first occurs.

    Args:
      model: the model.
      item_ids: shape (num_items + 1,), the raw ids of items 1 … num_items, behind one that means nothing.
      max_length: the longest sequence the model takes.

    Examples:
      >>> import numpy as np
      >>> from models.registry import make_model
      >>> from models.training.config import TrainConfig
      >>> model = make_model(TrainConfig().resolved(), num_items=3, max_length=50, seed=0)  # untrained
      >>> recommender = Recommender(model, np.array(["", "apple", "pear", "plum"]), max_length=50)
      >>> (found,) = recommender.recommend([["apple", "kiwi"]])
      >>> sorted(found.items), found.unknown
      (['pear', 'plum'], ['kiwi'])
    """

    def __init__(self, model: SequenceModel, item_ids: np.ndarray, max_length: int) -> None:
        self.item_ids, self.max_length = item_ids, max_length
        self.num_items = len(item_ids) - 1
        self._number = item_lookup(item_ids)
        self._num_behind = len(_behind_history(model, self.num_items))
        self._chunk_size = max(1, min(USERS_AT_ONCE, SCORES_AT_ONCE // len(item_ids)))
        graphdef, self._params = nnx.split(model, nnx.Param)

        def top(
            params: Any, histories: jax.Array, seen: tuple[jax.Array, jax.Array], k: int
        ) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graphdef, params)
            scores = next_scores(model, histories, num_items=self.num_items, max_length=max_length)
            return jax.lax.top_k(scores.at[seen].set(-jnp.inf), k)

        self._top = jit(top, static_argnums=3)

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
        return cls(run.model, run.item_ids, run.info.config.max_length)

    def recommend(
        self, histories: Iterable[Sequence[Any]], k: int = 10, *, exclude_seen: bool = True
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

        Returns:
          One recommendation a history, in the same order.

        Raises:
          ValueError: if ``k`` is smaller than 1, or a history is no sequence of ids.
        """
        k = operator.index(k)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        numbers, unknown = [], []
        for place, history in enumerate(histories):
            if isinstance(history, str | bytes) or not isinstance(history, Iterable):
                raise ValueError(
                    f"histories must hold one list of item ids a user, but number {place} is {history!r}; "
                    "for a single user give [history]"
                )
            raw = history.tolist() if isinstance(history, np.ndarray) else list(history)
            _check_ids(raw, place)
            mine = [self._number(raw_id) for raw_id in raw]
            numbers.append(np.array(mine, np.int32))
            unknown.append(list(dict.fromkeys(raw_id for raw_id, number in zip(raw, mine, strict=True) if not number)))
        numbers = [mine[mine > 0] for mine in numbers]

        lengths = np.array([len(mine) for mine in numbers], np.int64)
        order = np.argsort(lengths, kind="stable")
        order = order[lengths[order] > 0]
        chunks = [order[i : i + self._chunk_size] for i in range(0, len(order), self._chunk_size)]
        found = [self._dispatch([numbers[user] for user in chunk], k, exclude_seen) for chunk in chunks]

        results = [Recommendation([], [], missing) for missing in unknown]
        for chunk, (scores, items) in zip(chunks, found, strict=True):
            scores, items = np.asarray(scores)[:, :k], np.asarray(items)[:, :k]
            counts = np.sum(scores > -np.inf, axis=1)
            raw_items = self.item_ids[items]
            for row, user in enumerate(chunk):
                results[user].items.extend(raw_items[row, : counts[row]].tolist())
                results[user].scores.extend(scores[row, : counts[row]].tolist())
        return results

    def _dispatch(self, histories: list[np.ndarray], k: int, exclude_seen: bool) -> tuple[jax.Array, jax.Array]:
        """Scores and numbers of the best items of one chunk, shape (rows, at least k or the catalogue's size)."""
        longest = max(map(len, histories)) + self._num_behind
        length = min(self.max_length, max(SHORTEST_ROW, _power_of_two(longest)))
        rows = np.zeros((min(self._chunk_size, _power_of_two(len(histories))), length), np.int32)
        for row, history in zip(rows, histories, strict=False):
            newest = history[-(length - self._num_behind) :]
            row[length - len(newest) :] = newest
        seen = np.zeros((2, 1), np.int32)  # column 0 is no item anyway
        if exclude_seen:
            items = np.concatenate(histories)
            users = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
            room = rows.size * _power_of_two(-(-len(items) // rows.size))
            seen = np.pad(np.stack([users, items]), ((0, 0), (0, room - len(items)))).astype(np.int32)
        size = min(self.num_items, max(SHORTEST_LIST, _power_of_two(k)))
        return self._top(self._params, rows, tuple(seen), size)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The outcome of a test.

    Attributes:
      metrics: by name, as a training run gives them.
      protocol: how they came about.
      users: shape (users,), raw ids.
      items: shape (users,), raw ids of the items to find.
      ranks: shape (users,), int32, 0 for the first place.
    """

    metrics: dict[str, float]
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
        max_length=run.info.config.max_length,
        exclude_seen=exclude_seen,
    )
    graphdef, params = nnx.split(run.model, nnx.Param)
    ranks, found = make_test(graphdef, tuple(ks))(params, ranking)
    return Evaluation(
        metrics=found,
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
    return kept.noting(
        f"items matched by their ids: removed {np.sum(number[occurring] == 0):,} unknown items, {unknown:,} "
        f"interactions with them and {interactions.num_users - kept.num_users:,} users"
    )


def _behind_history(model: SequenceModel, num_items: int) -> np.ndarray:
    """What follows a history in the model's inputs: nothing, or BERT4Rec's mask token."""
    return model.queries(Interactions.from_sequences([[1]], num_items)).items[1:]


def _check_ids(raw: list[Any], place: int) -> None:
    """Refuses what cannot be an id, such as a list where a history is nested once too often."""
    for raw_id in raw:
        try:
            hash(raw_id)
        except TypeError:
            raise ValueError(
                f"histories must hold ids of items, numbers or text, but number {place} holds {shortened(raw_id)}"
            ) from None


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << max(0, number - 1).bit_length()
