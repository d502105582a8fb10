"""Nearest neighbours against a loop over all pairs in plain NumPy."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse as jsparse

from sevo_optax import graph, sevo
from sevo_optax.graph import _knn, _matrices

METRICS = ("cosine", "dot", "euclidean")
every_metric = pytest.mark.parametrize("metric", METRICS)


def literal(vectors, k, metric="cosine", mutual=False, nodes=None):
    """The definition, pair by pair, in float64."""
    vectors = np.asarray(vectors, np.float64)
    num_nodes = len(vectors)
    taking_part = range(num_nodes) if nodes is None else sorted(set(np.asarray(nodes).tolist()))
    counted = np.zeros((num_nodes, num_nodes))
    for i in taking_part:
        weights = {}
        for j in taking_part:
            dot = vectors[i] @ vectors[j]
            norms = np.linalg.norm(vectors[i]) * np.linalg.norm(vectors[j])
            if metric == "euclidean":
                weight = 1 / (1 + np.linalg.norm(vectors[i] - vectors[j]))
            elif metric == "dot":
                weight = dot
            else:
                weight = dot / norms if norms else 0
            if i != j and weight > 0:
                weights[j] = weight
        for j in sorted(weights, key=lambda j: (-weights[j], j))[:k]:
            counted[i, j] = weights[j]
    return np.minimum(counted, counted.T) if mutual else np.maximum(counted, counted.T)


def dense(weights):
    assert isinstance(weights, jsparse.BCOO)
    assert weights.data.dtype == np.float32
    assert weights.indices_sorted
    assert weights.unique_indices
    out = np.asarray(weights.todense())
    np.testing.assert_array_equal(out, out.T)
    return out


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(params=[False, True], ids=["large blocks", "small blocks"])
def blocks(request, monkeypatch):
    """Blocks of rows and columns that end anywhere, next to those of every day."""
    if request.param:
        monkeypatch.setattr(_knn, "_ROWS", 7)
        monkeypatch.setattr(_matrices, "CHUNK", 7 * 13)


@every_metric
@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("k", [1, 4, 100])
def test_equals_the_definition(rng, blocks, metric, mutual, k):
    vectors = rng.normal(size=(60, 5)) * np.exp(rng.normal(size=(60, 1)))
    actual = dense(graph.knn(vectors, k, metric=metric, mutual=mutual))
    np.testing.assert_allclose(actual, literal(vectors, k, metric, mutual), rtol=1e-6, atol=0)
    if mutual and k < 60:
        assert (np.count_nonzero(actual, axis=1) <= k).all()


@every_metric
@pytest.mark.parametrize("k", [2, 5])
def test_of_equal_weights_the_smaller_index_is_taken(rng, blocks, metric, k):
    """Many copies of few vectors, whose weights are equal bit by bit."""
    # Norms and products are powers of two: no reference rounds.
    vectors = np.array([[4.0, 0, 0, 0], [0, 2, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])[rng.integers(4, size=50)]
    np.testing.assert_allclose(
        dense(graph.knn(vectors, k, metric=metric)), literal(vectors, k, metric), rtol=1e-6, atol=0
    )


def test_ranks_what_float32_cannot_tell_apart():
    """Neighbours that differ by less than the rounding of float32, the better ones at the end."""
    angle = 0.3 - 1e-9 * np.arange(40)
    vectors = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    vectors = np.concatenate([[[1.0, 0.0]], vectors])
    counted = np.flatnonzero(dense(graph.knn(vectors, 3))[0])
    np.testing.assert_array_equal(counted, literal(vectors, 3)[0].nonzero()[0])
    assert set(range(38, 41)) <= set(counted)


@pytest.mark.parametrize(
    ("metric", "power"), [("cosine", -400), ("cosine", 400), ("dot", -30), ("dot", 30), ("euclidean", 10)]
)
def test_scale_does_not_matter(rng, metric, power):
    vectors = rng.normal(size=(40, 6))
    expected = dense(graph.knn(vectors, 3, metric=metric))
    actual = dense(graph.knn(np.ldexp(vectors, power), 3, metric=metric))
    np.testing.assert_array_equal(actual > 0, expected > 0)
    if metric == "cosine":
        np.testing.assert_array_equal(actual, expected)
    elif metric == "dot":
        np.testing.assert_allclose(actual, np.ldexp(expected, 2 * power), rtol=1e-6)
    else:
        np.testing.assert_allclose(1 / actual[actual > 0] - 1, 1024 * (1 / expected[expected > 0] - 1), rtol=1e-3)


def test_far_from_the_origin_distances_are_as_exact(rng):
    vectors = rng.integers(-50, 50, size=(60, 3)) / 8
    expected = dense(graph.knn(vectors, 4, metric="euclidean"))
    np.testing.assert_allclose(dense(graph.knn(vectors + 2.0**40, 4, metric="euclidean")), expected, rtol=1e-6)


def test_vector_of_zeros_has_no_direction(rng):
    vectors = rng.normal(size=(10, 3))
    vectors[4] = 0
    for metric in ("cosine", "dot"):
        assert not dense(graph.knn(vectors, 3, metric=metric))[4].any()
    assert np.count_nonzero(dense(graph.knn(vectors, 3, metric="euclidean"))[4]) >= 3


@every_metric
def test_only_nodes_that_take_part(rng, blocks, metric):
    vectors = rng.normal(size=(30, 4))
    vectors[0] = np.nan  # is not read
    nodes = np.array([5, 29, 3, 3, 17, 8, 2, 11])
    actual = dense(graph.knn(vectors, 3, metric=metric, nodes=nodes))
    np.testing.assert_allclose(actual, literal(vectors, 3, metric, nodes=nodes), rtol=1e-6)
    assert set(np.flatnonzero(actual.any(axis=1))) <= set(nodes.tolist())


@pytest.mark.parametrize("convert", [jnp.asarray, lambda x: jnp.asarray(x, jnp.bfloat16), lambda x: x.astype(np.int8)])
def test_takes_any_real_matrix(rng, convert):
    vectors = rng.integers(-5, 6, size=(20, 4)).astype(np.float32)
    np.testing.assert_array_equal(dense(graph.knn(convert(vectors), 2)), dense(graph.knn(vectors, 2)))


def test_one_node_and_no_positive_weight():
    for metric in METRICS:
        assert graph.knn(np.ones((1, 3)), 2, metric=metric).nse == 0
    assert graph.knn(np.eye(4), 2).nse == 0


def test_progress_and_use(rng, monkeypatch):
    monkeypatch.setattr(_knn, "_ROWS", 8)
    calls = []
    weights = graph.knn(rng.normal(size=(20, 3)), 2, progress=lambda *call: calls.append(call))
    assert calls == [(8, 20), (16, 20), (20, 20)]
    table = jnp.ones((20, 2))
    tx = sevo(weights)
    assert tx.update(table, tx.init(table))[0].shape == (20, 2)


def test_memory_is_bounded_by_blocks(monkeypatch):
    """Equal vectors, each a candidate of each: no array of nodes times nodes is made."""
    sizes = []
    real = np.flatnonzero
    monkeypatch.setattr(_knn.np, "flatnonzero", lambda mask: sizes.append(mask.size) or real(mask))
    monkeypatch.setattr(_matrices, "CHUNK", 1 << 14)
    monkeypatch.setattr(_knn, "_ROWS", 64)
    weights = graph.knn(np.ones((1000, 2)), 2)
    assert max(sizes) <= 1 << 14
    assert set(np.asarray(weights.indices)[np.asarray(weights.indices)[:, 0] == 999, 1].tolist()) == {0, 1}


@every_metric
@pytest.mark.parametrize("mutual", [False, True])
def test_an_index_finds_nearly_the_same(rng, monkeypatch, metric, mutual):
    pytest.importorskip("faiss")
    monkeypatch.setattr(_knn, "_ROWS", 256)
    vectors = rng.normal(size=(1500, 12)) * np.exp(0.3 * rng.normal(size=(1500, 1)))
    vectors[7] = 0
    calls = []
    options = {"metric": metric, "mutual": mutual, "nodes": np.arange(1, 1500)}
    expected = dense(graph.knn(vectors, 6, **options))
    first = graph.knn(vectors, 6, method="approximate", progress=lambda *call: calls.append(call), **options)
    actual = dense(first)
    both = (actual > 0) & (expected > 0)
    assert both.sum() > 0.97 * (expected > 0).sum()
    np.testing.assert_array_equal(actual[both], expected[both])
    assert calls == sorted(calls)
    assert calls[-1] == (1499, 1499)
    again = graph.knn(vectors, 6, method="approximate", **options)
    np.testing.assert_array_equal(again.indices, first.indices)  # the same links, whatever the threads do
    np.testing.assert_array_equal(again.data, first.data)


def test_vectors_of_zeros_keep_an_index_from_nothing(rng):
    """By distance, they are nearer to any vector of norm one than most others are."""
    pytest.importorskip("faiss")
    vectors = rng.normal(size=(600, 64))
    vectors[::3] = 0
    expected, actual = (dense(graph.knn(vectors, 5, method=method)) for method in ("exact", "approximate"))
    assert ((actual > 0) & (expected > 0)).sum() > 0.97 * (expected > 0).sum()


@every_metric
@pytest.mark.parametrize("k", [1, 4, 100])
def test_an_index_of_few_vectors_equals_the_definition(rng, metric, k):
    pytest.importorskip("faiss")
    vectors = rng.normal(size=(40, 5))
    actual = dense(graph.knn(vectors, k, metric=metric, method="approximate"))
    np.testing.assert_allclose(actual, literal(vectors, k, metric), rtol=1e-6, atol=0)


def test_an_index_needs_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"^method 'approximate' needs faiss, .*: pip install faiss-cpu, or take"):
        graph.knn(np.ones((3, 2)), 1, method="approximate")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "fast"}, ValueError, "method is 'fast'; wanted 'exact' or 'approximate'"),
        ({"k": 0}, ValueError, "k is 0; wanted a positive integer"),
        ({"k": 1.5}, TypeError, "k is 1.5"),
        ({"metric": "manhattan"}, ValueError, "metric is 'manhattan'; wanted 'cosine' or 'dot' or 'euclidean'"),
        ({"vectors": np.ones(3)}, ValueError, r"vectors has shape \(3,\); wanted \(nodes, dim\)"),
        ({"vectors": np.ones((3, 0))}, ValueError, r"vectors has shape \(3, 0\)"),
        ({"vectors": np.ones((3, 2), complex)}, TypeError, "vectors has dtype complex128"),
        ({"vectors": [["a", "b"]]}, TypeError, "vectors has dtype"),
        ({"vectors": [[0.0, 1.0], [np.nan, 0.0]]}, ValueError, r"vectors\[1\] holds NaN or infinity"),
        ({"nodes": [0, 3]}, ValueError, r"nodes\[1\] = 3; wanted 0\.\.2"),
        ({"nodes": [0.5]}, TypeError, "nodes"),
        ({"nodes": []}, ValueError, "nodes is empty"),
    ],
)
def test_errors_name_the_argument_and_the_value(arguments, error, message):
    with pytest.raises(error, match=message):
        graph.knn(**{"vectors": np.ones((3, 2)), "k": 1} | arguments)


def test_too_many_vectors_for_the_memory(monkeypatch):
    monkeypatch.setattr("sevo_optax._memory.available_memory", lambda: 2**30)
    vectors = np.broadcast_to(np.float32(1), (10**6, 64))
    with pytest.raises(ValueError, match=r"10 neighbours of each of 1000000 vectors needs about 2\.2 GiB .* Lower k"):
        graph.knn(vectors, 10)


def test_a_similarity_too_small_for_float32_is_no_edge():
    """Unit vectors that are nearly orthogonal, as those of topics are."""
    weights = graph.knn(np.array([[1, 1e-30, 0], [0, 1e-30, 1], [1, 0, 0]]), 2)
    np.testing.assert_allclose(weights.todense()[0], [0, 0, 1])
