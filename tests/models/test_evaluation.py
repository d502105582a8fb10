import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import metrics
from models.data import Interactions, drifting_interests, leave_one_out
from models.sasrec import SASRec
from models.training.evaluation import FullRanking
from tests.models.test_sasrec import alone


def naive_ranks(model, history, targets, max_length):
    """One user after the other, scores sorted by hand."""
    graphdef, params = nnx.split(model)
    encode = jax.jit(lambda params, batch: nnx.merge(graphdef, params)(batch))
    ranks = []
    table = np.asarray(model.output_layer()[0])
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
    model = SASRec(40, max_length=max_length, embedding_dim=8, rngs=nnx.Rngs(0))
    ranking = FullRanking.prepare(
        split.test_history, split.test, model=SASRec, max_length=max_length, batch_size=20, chunk_size=chunk_size
    )
    expected = naive_ranks(model, split.test_history, split.test, max_length)
    assert np.asarray(ranking.ranks(model)).tolist() == expected


class Constant(nnx.Module):
    """Scores every item alike, or as told."""

    def __init__(self, scores):
        self.vectors = nnx.data(jnp.asarray(scores, jnp.float32)[:, None])

    def __call__(self, batch, key=None):
        return jnp.ones((*batch.inputs.shape, 1))

    def output_layer(self):
        return self.vectors, jnp.zeros(len(self.vectors))


HISTORY = Interactions.from_sequences([[1, 2, 2], [6]], num_items=6)


def ranks(scores, targets):
    ranking = FullRanking.prepare(HISTORY, np.array(targets), model=SASRec, max_length=4)
    return np.asarray(ranking.ranks(Constant(scores))).tolist()


def test_history_is_not_ranked():
    assert ranks([9, 8, 7, 5, 4, 6, 1], [3, 3]) == [1, 3]  # 5 beats 3; for the second user, 1 and 2 do as well


def test_ties_count_against_the_target():
    assert ranks([0] * 7, [3, 3]) == [3, 4]


def test_the_target_is_ranked_even_if_seen_before():
    assert ranks([0, 1, 9, 3, 4, 5, 6], [2, 6]) == [0, 1]


def test_nan_finds_nothing():
    got = ranks([np.nan] * 7, [3, 3])
    assert min(got) >= 3
    assert ranks([0, 1, 1, 5, np.nan, 1, 1], [3, 3]) == [1, 1]


def test_metrics_against_the_definition():
    got = metrics.summarize(jnp.array([0, 4, 9, 10, 30]), ks=(1, 5, 10))
    dcg = [1 / np.log2(r + 2) for r in (0, 4, 9)]
    expected = {
        "HR@1": 0.2,
        "HR@5": 0.4,
        "HR@10": 0.6,
        "NDCG@1": 0.2,
        "NDCG@5": sum(dcg[:2]) / 5,
        "NDCG@10": sum(dcg) / 5,
    }
    assert got == pytest.approx(expected, rel=1e-6)
    assert list(got) == list(expected)
