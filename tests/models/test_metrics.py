import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.evaluation import metrics


def test_summary_against_the_definition():
    got = metrics.summarize(jnp.array([0, 4, 9, 10, 30]), ks=(1, 5, 10))
    dcg = [1 / np.log2(r + 2) for r in (0, 4, 9)]
    expected = {
        "HR@1": 0.2,
        "HR@5": 0.4,
        "HR@10": 0.6,
        "NDCG@1": 0.2,
        "NDCG@5": sum(dcg[:2]) / 5,
        "NDCG@10": sum(dcg) / 5,
        "MRR@1": 0.2,
        "MRR@5": (1 + 1 / 5) / 5,
        "MRR@10": (1 + 1 / 5 + 1 / 10) / 5,
    }
    assert got == pytest.approx(expected, rel=1e-6)
    assert list(got) == list(expected)


def test_what_every_user_contributes():
    ranks = np.random.default_rng(0).integers(0, 20, 300)
    found = metrics.by_user(ranks, ks=(1, 5, 10))
    assert all(isinstance(mine, np.ndarray) and mine.shape == (300,) for mine in found.values())
    means = {name: mine.mean() for name, mine in found.items()}
    assert means == pytest.approx(metrics.summarize(ranks), rel=1e-6)
    assert list(means) == list(metrics.summarize(ranks))


def test_lists_longer_than_the_catalogue():
    assert metrics.summarize([0, 2], ks=(1000,)) == pytest.approx(
        {"HR@1000": 1.0, "NDCG@1000": 0.75, "MRR@1000": (1 + 1 / 3) / 2}
    )


@pytest.mark.parametrize(
    ("ranks", "ks", "message"),
    [
        ([], (1,), "there is no user to average over"),
        ([1], (), "ks must be one or more lengths"),
        ([1], (5, 0), "must be at least 1, got 0"),
    ],
)
def test_summary_refuses(ranks, ks, message):
    with pytest.raises(ValueError, match=message):
        metrics.summarize(np.array(ranks), ks)


def test_metrics_compile():
    ranks = jnp.array([0, 4, 9])
    for metric in metrics.METRICS.values():
        assert jax.jit(metric, static_argnums=1)(ranks, 5) == pytest.approx(float(metric(ranks, 5)))


def test_coverage():
    top = np.array([[4, 2, 0], [2, 3, 4]])
    assert metrics.coverage_at_k(top, 8, 1) == 0.25
    assert metrics.coverage_at_k(top, 8, 100) == 3 / 8
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        metrics.coverage_at_k(top, 8, 0)
    with pytest.raises(ValueError, match="no user"):
        metrics.coverage_at_k(top[:0], 8, 1)


def test_agrees_with_ranx():
    """In a process of its own and uncompiled: numba would take a minute for it."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(200, 30))
    targets = rng.integers(30, size=200)
    ranks = (scores > scores[np.arange(200), targets][:, None]).sum(axis=1)
    ks = (1, 3, 10, 30, 100)
    script = """
import json, sys
NAMES = ("hit_rate", "ndcg", "mrr", "recall", "map")
from ranx import Qrels, Run, evaluate
scores, targets, ks = json.load(sys.stdin)
qrels = Qrels({str(user): {str(target): 1} for user, target in enumerate(targets)})
run = Run({str(user): {str(item): score for item, score in enumerate(row)} for user, row in enumerate(scores)})
found = evaluate(qrels, run, [f"{name}@{k}" for name in NAMES for k in ks])
print(json.dumps({name: float(value) for name, value in found.items()}))
"""
    data = json.dumps([scores.tolist(), targets.tolist(), ks])
    command = [sys.executable, "-c", script]
    interpreted = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(command, input=data, env=interpreted, capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours = metrics.summarize(ranks, ks)
    same = {"hit_rate": "HR", "ndcg": "NDCG", "mrr": "MRR", "recall": "HR", "map": "MRR"}  # with one relevant item
    assert len(theirs) == len(same) * len(ks)
    for name, value in theirs.items():
        name, k = name.split("@")
        assert ours[f"{same[name]}@{k}"] == pytest.approx(value, abs=1e-6), name
