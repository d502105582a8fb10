import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.architectures.base import Encoded, Recommender
from models.architectures.registry import make_config
from models.architectures.sasrec import SASRec
from models.data import Interactions, drifting_interests, leave_one_out
from models.evaluation import metrics
from models.evaluation.queries import Histories
from models.evaluation.ranking import FullRanking, make_test
from tests.models.test_sasrec import alone


def naive_ranks(model, history, targets, max_length):
    """One user after the other, scores sorted by hand."""
    graphdef, params = nnx.split(model)
    encode = jax.jit(lambda params, batch: nnx.merge(graphdef, params)(batch))
    ranks = []
    table = np.asarray(model.items()[0])
    for sequence, target in zip(history, targets, strict=True):
        known = sequence[-max_length:]
        hidden = np.asarray(encode(params, alone(known, max_length)))[0, len(known) - 1]
        candidates = sorted(set(range(1, len(table))) - set(sequence.tolist()) - {target})
        ranks.append(int((table[candidates] @ hidden >= table[target] @ hidden).sum()))
    return ranks


@pytest.fixture
def split():
    return leave_one_out(drifting_interests(num_users=70, num_items=40, num_groups=5, seed=3))


@pytest.mark.parametrize(("max_length", "chunk_size"), [(5, 256), (50, 16), (50, 70)])
def test_ranks_equal_sorting_by_hand(split, max_length, chunk_size):
    model = SASRec(40, max_length=max_length, embedding_dim=8, num_blocks=1, rngs=nnx.Rngs(0))
    ranking = FullRanking.prepare(
        split.test_history,
        split.test,
        model=SASRec,
        config=make_config("sasrec", max_length=max_length),
        chunk_size=chunk_size,
    )
    expected = naive_ranks(model, split.test_history, split.test, max_length)
    assert np.asarray(ranking.ranks(model, {})).tolist() == expected


class Constant(Recommender):
    """Scores every item alike, or as told."""

    def __init__(self, scores, dtype=jnp.float32):
        self.vectors, self.dtype = nnx.data(jnp.asarray(scores, jnp.float32)[:, None]), dtype

    def encode(self, batch, represented=None, key=None, candidates=None):
        return Encoded(jnp.ones((*batch.inputs.shape, 1), self.dtype))

    def items(self, represented=None):
        return self.vectors, jnp.zeros(len(self.vectors))


SHORT = make_config("sasrec", max_length=4)
HISTORY = Interactions.from_sequences([[1, 2, 2], [6]], num_items=6)


def ranks(scores, targets):
    ranking = FullRanking.prepare(HISTORY, np.array(targets), model=SASRec, config=SHORT)
    return np.asarray(ranking.ranks(Constant(scores), {})).tolist()


def test_history_is_not_ranked():
    assert ranks([9, 8, 7, 5, 4, 6, 1], [3, 3]) == [1, 3]  # 5 beats 3; for the second user, 1 and 2 do as well


def test_ties_count_against_the_target():
    assert ranks([0] * 7, [3, 3]) == [3, 4]


def test_the_target_is_ranked_even_if_seen_before():
    assert ranks([0, 1, 9, 3, 4, 5, 6], [2, 6]) == [0, 1]


def test_the_protocol_tells_how_many_targets_were_seen_before():
    history = Interactions.from_sequences([[1, 2, 2], [1, 3], [4, 5]], num_items=6)
    options = {"model": SASRec, "config": make_config("sasrec", max_length=8)}
    protocols = [
        FullRanking.prepare(history, np.array(targets), exclude_seen=exclude_seen, **options).protocol
        for targets, exclude_seen in (([2, 3, 6], True), ([6, 6, 6], True), ([2, 3, 6], False))
    ]
    assert "history not ranked but for the item to find, which 2 of 3 users had before," in protocols[0]
    assert "history not ranked," in protocols[1]
    assert "history ranked too," in protocols[2]


def test_nan_finds_nothing():
    got = ranks([np.nan] * 7, [3, 3])
    assert min(got) >= 3
    assert ranks([0, 1, 1, 5, np.nan, 1, 1], [3, 3]) == [1, 1]


def test_seen_items_are_ranked_on_request(split):
    model = SASRec(40, max_length=8, embedding_dim=8, num_blocks=1, rngs=nnx.Rngs(1))
    options = {"model": SASRec, "config": make_config("sasrec", max_length=8), "chunk_size": 16}
    everything = FullRanking.prepare(split.test_history, split.test, exclude_seen=False, **options)
    unseen = FullRanking.prepare(split.test_history, split.test, **options)
    assert "history ranked too" in everything.protocol
    assert "history not ranked" in unseen.protocol
    table = np.asarray(model.items()[0])
    graphdef, params = nnx.split(model)
    encode = jax.jit(lambda params, batch: nnx.merge(graphdef, params)(batch))
    ranks = everything.ranks(model, {})
    top, fresh_top, filled_top = (
        np.asarray(ranking.top_items(model, {}, k)) for ranking, k in ((everything, 7), (unseen, 7), (unseen, 1000))
    )
    for user, (sequence, target) in enumerate(zip(split.test_history, split.test, strict=True)):
        if user % 10:
            continue
        scores = table @ np.asarray(encode(params, alone(sequence[-8:], 8)))[0, len(sequence[-8:]) - 1]
        order = [item for item in np.argsort(-scores, kind="stable") if item]
        fresh = [item for item in order if item not in sequence]
        assert ranks[user] == order.index(target)
        assert top[user].tolist() == order[:7]
        assert fresh_top[user].tolist() == fresh[:7]
        assert filled_top[user].tolist() == fresh + [0] * (40 - len(fresh))


def test_top_items_of_equal_scores():
    def top(scores, k=6):
        ranking = FullRanking.prepare(HISTORY, np.array([3, 3]), model=SASRec, config=SHORT)
        return np.asarray(ranking.top_items(Constant(scores), {}, k)).tolist()

    assert top([9, 0, 0, 1, 0, 2, 0], 4) == [[5, 3, 4, 6], [5, 3, 1, 2]]
    assert top([9] * 7) == [[3, 4, 5, 6, 0, 0], [1, 2, 3, 4, 5, 0]]


def test_ranks_and_best_items_come_from_the_same_scores(split):
    """The histories are encoded and the items scored once for both."""
    passes = []

    class Counting(SASRec):
        def encode(self, *arguments, **options):
            passes.append("encode")
            return super().encode(*arguments, **options)

        def scores(self, *arguments):
            passes.append("scores")
            return super().scores(*arguments)

    model = Counting(40, max_length=8, embedding_dim=8, num_blocks=0, rngs=nnx.Rngs(0))
    config = make_config("sasrec", max_length=8)
    ranking = FullRanking.prepare(split.test_history, split.test, model=SASRec, config=config, chunk_size=16)
    graphdef, state = nnx.split(model)
    ranks, found = make_test(graphdef, (1, 9))(state, ranking, {})
    assert sorted(passes) == ["encode", "scores"]
    assert ranks.tolist() == np.asarray(ranking.ranks(model, {})).tolist()
    top_items = np.asarray(ranking.top_items(model, {}, 9))
    assert found == metrics.summarize(ranks, (1, 9)) | {
        f"coverage@{k}": len(np.unique(top_items[:, :k])) / 40 for k in (1, 9)
    }


def test_half_precision_ends_before_the_scores():
    scores = 1 + np.array([0, 3, 2, 1, 5, 6, 4]) * 2.0**-20
    ranking = FullRanking.prepare(HISTORY, np.array([6, 2]), model=SASRec, config=SHORT)
    model = Constant(scores, jnp.bfloat16)
    assert np.asarray(ranking.ranks(model, {})).tolist() == [2, 3]
    assert np.asarray(ranking.top_items(model, {}, 3)).tolist() == [[5, 4, 6], [5, 4, 1]]


def test_scores_never_exist_whole(split):
    ranking = FullRanking.prepare(split.test_history, split.test, model=SASRec, config=SHORT, chunk_size=16)
    for program in (lambda model: ranking.ranks(model, {}), lambda model: ranking.top_items(model, {}, 3)):
        text = jax.jit(lambda program=program: program(Constant(np.ones(41)))).lower().as_text()
        assert "tensor<16x41xf32>" in text
        assert "tensor<70x41xf32>" not in text
        assert "tensor<80x41xf32>" not in text


def test_one_vector_a_user_is_kept(split):
    """Not one a token: what the batches leave behind is their users' newest tokens."""
    config = make_config("sasrec", max_length=8, embedding_dim=6)
    model = SASRec(40, max_length=8, embedding_dim=6, num_blocks=0, rngs=nnx.Rngs(0))
    queries = Histories.from_interactions(split.test_history, model=SASRec, max_length=config.max_length, batch_size=20)
    batches, most = queries.newest.shape
    assert batches == 4
    text = jax.jit(lambda: queries.vectors(model, None)).lower().as_text()
    shapes = [tuple(map(int, shape.split("x")[:-1])) for shape in re.findall(r"tensor<((?:\d+x)+)f32>", text)]
    of_all_batches = {shape for shape in shapes if len(shape) > 2 and shape[0] == batches}
    assert of_all_batches == {(batches, most, 6)}
    vectors = np.asarray(queries.vectors(model, None))
    for user, sequence in enumerate(split.test_history):
        alone_ = np.asarray(model(alone(sequence[-8:], 8)))[0, min(len(sequence), 8) - 1]
        np.testing.assert_allclose(vectors[user], alone_, rtol=1e-5, atol=1e-6)


def test_histories_keep_little_beside_the_users_vectors():
    """Rows of many short histories do not all stand in the last batch, whose users all batches would have room for."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / 9, 5000), 50)
    data = Interactions.from_sequences([rng.integers(1, 100, n).tolist() for n in lengths], 100)
    histories = Histories.from_interactions(data, model=SASRec, max_length=50, batch_size=128)
    assert histories.newest.size < 1.5 * data.num_users
    users = np.asarray(histories.packed.user)
    found = np.empty(data.num_users, np.int64)
    for index in range(histories.packed.num_batches):
        batch = histories.packed.batch(index)
        places = np.asarray(histories.newest[index])
        found_here = np.asarray(batch.users).ravel()[places]
        inputs = np.asarray(batch.inputs).ravel()[places]
        mine = np.arange(len(places)) + index * len(places)
        for user in np.flatnonzero((np.asarray(histories.place) // len(places)) == index):
            column = int(np.flatnonzero(mine == int(histories.place[user]))[0])
            assert found_here[column] == user
            found[user] = inputs[column]
    assert sorted(users.tolist()) == list(range(data.num_users))
    np.testing.assert_array_equal(found, data.items[data.offsets[1:] - 1])
