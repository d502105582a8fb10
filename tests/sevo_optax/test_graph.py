import collections
import itertools
import os
import pickle
import sqlite3
import tracemalloc
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.experimental import sparse as jsparse

from sevo_optax import _weights, graph
from sevo_optax.graph import _files, _matrices, _parquet
from tests.jax_names import enable_x64

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"

quick = hypothesis.settings(max_examples=60, deadline=None)


def literal(sequences, num_nodes, max_length, keep, max_hops, weighting):
    """Algorithm 4, line by line, in plain Python."""
    weights = np.zeros((num_nodes, num_nodes))
    for seq in sequences:
        seq = list(seq)
        if max_length is not None:
            seq = seq[:max_length] if keep == "first" else seq[-max_length:]
        for i in range(len(seq) - 1):
            for h, j in enumerate(range(i + 1, min(i + max_hops + 1, len(seq))), start=1):
                gain = 1 if weighting == "frequency" else 1 / h
                weights[seq[i], seq[j]] += gain
                weights[seq[j], seq[i]] += gain
    return weights


def check(weights, num_nodes):
    """Whether a result has the promised form; returns it dense."""
    assert isinstance(weights, jsparse.BCOO)
    assert weights.shape == (num_nodes, num_nodes)
    assert weights.data.dtype == np.float32
    assert weights.indices.dtype == np.int32
    assert weights.indices_sorted
    assert weights.unique_indices
    data, indices = np.asarray(weights.data), np.asarray(weights.indices)
    assert indices.shape == (data.size, 2)
    assert (data > 0).all()
    assert ((indices >= 0) & (indices < num_nodes)).all()
    keys = indices[:, 0].astype(np.int64) * num_nodes + indices[:, 1]
    assert (np.diff(keys) > 0).all()
    dense = np.zeros((num_nodes, num_nodes), np.float32)
    dense[indices[:, 0], indices[:, 1]] = data
    np.testing.assert_array_equal(dense, dense.T)
    return dense


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(_matrices, "CHUNK", 3)


# ---------------------------------------------------------------- co-occurrence

SEQUENCES = [
    [0, 1, 2, 3, 4, 5],
    [5, 5, 5],
    [2],
    [],
    [1, 3, 1, 3, 1, 0, 6],
    [4, 2, 2, 4],
    [6, 0, 1, 2, 3, 3, 4, 5, 6, 0, 1],
]


@pytest.mark.parametrize("weighting", ["distance", "frequency"])
@pytest.mark.parametrize("max_hops", [1, 2, 3, 50])
@pytest.mark.parametrize("keep", ["last", "first"])
@pytest.mark.parametrize("max_length", [None, 1, 2, 4, 100])
def test_cooccurrence_is_algorithm_4(max_length, keep, max_hops, weighting, small_chunks):
    options = {
        "max_length": max_length,
        "keep": keep,
        "max_hops": max_hops,
        "weighting": weighting,
    }
    expected = literal(SEQUENCES, 8, **options)
    flat = np.concatenate([np.array(s, np.int64) for s in SEQUENCES])
    offsets = np.cumsum([0] + [len(s) for s in SEQUENCES])
    forms = [
        SEQUENCES,
        [np.array(s, np.int16) for s in SEQUENCES],
        [np.array(SEQUENCES[0], np.uint64), *SEQUENCES[1:-1], np.array(SEQUENCES[-1], np.int64)],
        (tuple(s) for s in SEQUENCES),
        [(item for item in s) for s in SEQUENCES],
        (flat, offsets),
        (flat.tolist(), offsets.tolist()),
    ]
    for sequences in forms:
        dense = check(graph.cooccurrence(sequences, 8, **options), 8)
        np.testing.assert_allclose(dense, expected, rtol=1e-6)


@quick
@hypothesis.given(
    sequences=st.lists(st.lists(st.integers(0, 5), max_size=12), min_size=1, max_size=6),
    max_length=st.none() | st.integers(1, 14),
    keep=st.sampled_from(["last", "first"]),
    max_hops=st.integers(1, 14),
    weighting=st.sampled_from(["distance", "frequency"]),
    chunk=st.integers(1, 30),
)
def test_cooccurrence_is_algorithm_4_on_any_sequences(sequences, chunk, **options):
    hypothesis.assume(any(sequences))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_matrices, "CHUNK", chunk)
        dense = check(graph.cooccurrence(sequences, 6, **options), 6)
    np.testing.assert_allclose(dense, literal(sequences, 6, **options), rtol=1e-6)


def test_cooccurrence_defaults_are_last_one_hop_by_distance():
    dense = check(graph.cooccurrence([[0, 1, 2]], 3), 3)
    np.testing.assert_array_equal(dense, [[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    dense = check(graph.cooccurrence([[0, 1, 2]], 3, max_length=2), 3)
    np.testing.assert_array_equal(dense, [[0, 0, 0], [0, 0, 1], [0, 1, 0]])


def test_the_example_of_the_paper():
    # v2 -> v1 -> v3 with H = 2: (v2, v3) weighs 1 by frequency and 1/2 by distance.
    sequence = [[2, 1, 3]]
    assert check(graph.cooccurrence(sequence, 4, max_hops=2, weighting="frequency"), 4)[2, 3] == 1
    assert check(graph.cooccurrence(sequence, 4, max_hops=2), 4)[2, 3] == 0.5


def test_a_repeated_item_gains_a_self_loop_of_twice_the_weight():
    dense = check(graph.cooccurrence([[1, 1, 0, 1]], 2, max_hops=3), 2)
    # positions (0,1): 2; (0,3): 2/3; (1,3): 2/2
    np.testing.assert_allclose(dense[1, 1], 2 + 2 / 3 + 1, rtol=1e-6)
    assert dense[0, 0] == 0


def test_cooccurrence_takes_rows_of_a_matrix():
    rows = np.array([[0, 1, 2], [2, 1, 1]])
    expected = literal(rows, 3, None, "last", 2, "distance")
    for matrix in (rows, jnp.asarray(rows)):
        dense = check(graph.cooccurrence(matrix, 3, max_hops=2), 3)
        np.testing.assert_allclose(dense, expected, rtol=1e-6)


def test_sequences_of_one_item_make_a_graph_without_edges():
    assert graph.cooccurrence([[0], [1]], 2).nse == 0


def test_large_ids_do_not_overflow():
    largest = 2**20
    weights = graph.cooccurrence([[largest, largest - 1, largest]], largest + 1)
    np.testing.assert_array_equal(weights.indices, [[largest - 1, largest], [largest, largest - 1]])
    np.testing.assert_array_equal(weights.data, [2.0, 2.0])


def test_progress_counts_the_interactions_kept(small_chunks):
    seen = []
    graph.cooccurrence(
        [[0, 1, 0, 1], [1, 0, 1, 0, 1]],
        2,
        max_length=4,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(3, 8), (6, 8), (8, 8)]


def test_partial_sums_are_merged_like_a_binary_counter():
    ones = scipy.sparse.eye_array(4, format="csr")
    summed = _matrices.Sum(4)
    for count in range(1, 40):
        summed.add(scipy.sparse.csr_array(ones))
        assert len(summed._parts) <= np.log2(count) + 1
    np.testing.assert_array_equal(summed.total().toarray(), 39 * np.eye(4))


@pytest.mark.parametrize(
    ("sequences", "error", "match"),
    [
        ([], ValueError, "no items"),
        ([[], []], ValueError, "no items"),
        ([[0, 1], [2, 5]], ValueError, r"sequences\[1\]\[1\] = 5; wanted 0..4"),
        ([[0, 1], [-1, 5]], ValueError, r"sequences\[1\]\[0\] = -1"),
        ([np.array([0, 1]), np.array([7])], ValueError, r"sequences\[1\]\[0\] = 7"),
        ([[0], [2**70]], ValueError, r"sequences\[1\]\[0\] = 1180591620717411303424"),
        ([[0, 1.5]], TypeError, r"sequences\[0\]\[1\] is 1.5; wanted an integer"),
        ([[0, 1.0]], TypeError, r"sequences\[0\]\[1\] is 1.0; wanted an integer"),
        ([[0, True]], TypeError, r"sequences\[0\]\[1\] is True"),
        ([[0], np.array([0.0, 1.0])], TypeError, r"sequences\[1\]\[0\] is .*0.0"),
        ([np.array([True])], TypeError, r"sequences\[0\]\[0\] is .*True"),
        ([[0, "1"]], TypeError, r"sequences\[0\]\[1\] is '1'"),
        ([[0, None]], TypeError, r"sequences\[0\]\[1\] is None"),
        ([[[0, 1]]], TypeError, r"sequences\[0\]\[0\] is \[0, 1\]"),
        ([0, 1, 2], TypeError, r"sequences\[0\] is 0; .* Wrap a single sequence"),
        (np.array([0, 1, 2]), TypeError, r"sequences\[0\] has 0 dimensions; .* Wrap"),
        ([[0], {1, 2}], TypeError, r"sequences\[1\] is \{1, 2\}"),
        (["01"], TypeError, r"sequences\[0\] is '01'"),
        ("01", TypeError, "sequences is a str"),
        ({0: [1, 2]}, TypeError, "sequences is a dict"),
        (7, TypeError, "sequences is a int"),
        (([0, 1, 9], [0, 3]), ValueError, r"flat_items\[2\] = 9"),
        (([0, 1, 2], [1, 3]), ValueError, "offsets runs from 1 to 3; wanted from 0 to 3"),
        (([0, 1, 2], [0, 2]), ValueError, "from 0 to 2; .* tuple of two is read as"),
        (([0, 1, 2], [0, 2, 1, 3]), ValueError, r"offsets\[2\] = 1 is below offsets\[1\] = 2"),
        (([0, 1, 2], [0.0, 3.0]), ValueError, "offsets has shape .* float64"),
        (([0, 1, 2], [0]), ValueError, r"offsets has shape \(1,\)"),
        (([], [0]), ValueError, "flat_items is empty"),
    ],
)
def test_cooccurrence_names_the_first_bad_item(sequences, error, match):
    with pytest.raises(error, match=match):
        graph.cooccurrence(sequences, 5)


def test_cooccurrence_names_bad_items_behind_the_first_batch():
    sequences = [[0, 1]] * 5000 + [[1, 0, 2]]
    with pytest.raises(ValueError, match=r"sequences\[5000\]\[2\] = 2"):
        graph.cooccurrence(sequences, 2)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_nodes": 0}, ValueError, "num_nodes is 0"),
        ({"num_nodes": -1}, ValueError, "num_nodes is -1"),
        ({"num_nodes": 2.0}, TypeError, "num_nodes is 2.0"),
        ({"num_nodes": True}, TypeError, "num_nodes is True"),
        ({"num_nodes": 2**31}, ValueError, "num_nodes is 2147483648; .* int32"),
        ({"max_length": 0}, ValueError, "max_length is 0"),
        ({"max_length": 1.5}, TypeError, "max_length is 1.5"),
        ({"max_hops": 0}, ValueError, "max_hops is 0"),
        ({"max_hops": None}, TypeError, "max_hops is None"),
        ({"keep": "newest"}, ValueError, "keep is 'newest'; wanted 'last' or 'first'"),
        ({"weighting": None}, ValueError, "weighting is None; wanted 'distance' or 'frequency'"),
    ],
)
def test_cooccurrence_rejects_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        graph.cooccurrence([[0, 1]], **({"num_nodes": 2} | options))


# ---------------------------------------------------------------- other builders


def test_user_item_puts_users_before_items():
    dense = check(graph.user_item([0, 2, 2, 0], [1, 0, 1, 1], 3, 2), 5)
    expected = np.zeros((5, 5))
    for user, item in [(0, 1), (2, 0), (2, 1)]:  # (0, 1) occurs twice and weighs 1
        expected[user, 3 + item] = expected[3 + item, user] = 1
    np.testing.assert_array_equal(dense, expected)


def test_user_item_weights_add_up():
    weights = graph.user_item([0, 1, 1, 0], [1, 0, 0, 0], 2, 2, weights=[5, 1, 2.5, 0])
    dense = check(weights, 4)
    assert dense[0, 3] == 5
    assert dense[1, 2] == 3.5
    assert weights.nse == 4


@pytest.mark.parametrize(
    ("users", "items", "weights", "error", "match"),
    [
        ([0, 3], [0, 0], None, ValueError, r"users\[1\] = 3; wanted 0..2, as num_users is 3"),
        ([0, 0], [0, -1], None, ValueError, r"items\[1\] = -1; wanted 0..1, as num_items is 2"),
        ([0], [0, 1], None, ValueError, "users has length 1 but items has 2"),
        ([], [], None, ValueError, "users is empty"),
        ([0.5], [0], None, TypeError, r"users\[0\] is .*0.5"),
        ([False, True], [0, 1], None, TypeError, r"users is a mask .*Give np\.flatnonzero of it"),
        ([[0]], [[0]], None, ValueError, r"users has shape \(1, 1\)"),
        ([[0], [0, 1]], [0, 1], None, ValueError, "users is ragged"),
        ([0, 1], [0, 1], [1.0], ValueError, "weights has length 1; wanted 2"),
        ([0, 1], [0, 1], [1.0, -1.0], ValueError, r"weights\[1\] = -1"),
        ([0, 1], [0, 1], [np.nan, 1.0], ValueError, r"weights\[0\] = nan"),
        ([0, 1], [0, 1], [1.0, np.inf], ValueError, r"weights\[1\] = inf"),
        ([0, 1], [0, 1], ["a", "b"], TypeError, "weights has dtype <U1"),
        ([0, 1], [0, 1], [True, True], TypeError, "weights has dtype bool"),
        ([0, 1], [0, 1], [1j, 1], TypeError, "weights has dtype complex"),
    ],
)
def test_user_item_rejects_bad_input(users, items, weights, error, match):
    with pytest.raises(error, match=match):
        graph.user_item(users, items, 3, 2, weights=weights)


def test_user_item_rejects_too_many_nodes():
    with pytest.raises(ValueError, match=r"num_users \+ num_items is 2147483648"):
        graph.user_item([0], [0], 2**30, 2**30)


ATTRIBUTES = [(0, "b"), (0, "a"), (1, "a"), (1, "b"), (1, "a"), (2, "c"), (3, "b"), (5, "c")]


@pytest.mark.parametrize(
    "convert",
    [
        str,
        ord,
        lambda letter: ord(letter) / 2,
        lambda letter: (letter, 1),
        lambda letter: {"a": 1, "b": "1", "c": None.__class__}[letter],
    ],
    ids=["str", "int", "float", "tuple", "mixed"],
)
@pytest.mark.parametrize("weighting", ["any", "count"])
def test_shared_attributes(weighting, convert):
    nodes = [node for node, _ in ATTRIBUTES]
    values = [convert(letter) for _, letter in ATTRIBUTES]
    sets = [{a for n, a in ATTRIBUTES if n == node} for node in range(6)]
    expected = np.zeros((6, 6))
    for i, j in itertools.permutations(range(6), 2):
        shared = len(sets[i] & sets[j])
        expected[i, j] = min(1, shared) if weighting == "any" else shared
    forms = [values]
    if isinstance(values[0], str | int | float) and len(set(map(type, values))) == 1:
        forms += [np.array(values), np.array(values, object)]
    for attributes in forms:
        dense = check(graph.shared_attributes(nodes, attributes, 6, weighting=weighting), 6)
        np.testing.assert_array_equal(dense, expected)


def test_shared_attributes_takes_a_column_of_polars():
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"node": [0, 1, 2], "genre": ["x", "y", "x"]})
    dense = check(graph.shared_attributes(frame["node"], frame["genre"], 3), 3)
    np.testing.assert_array_equal(dense, [[0, 0, 1], [0, 0, 0], [1, 0, 0]])


class NAType:
    """As pandas marks what is missing: one object for all."""

    def __repr__(self):
        return "<NA>"


@pytest.mark.parametrize(
    ("nodes", "attributes", "error", "match"),
    [
        ([0, 1], ["a"], ValueError, "nodes has length 2 but attributes has 1"),
        ([], [], ValueError, "nodes is empty"),
        ([0, 9], ["a", "b"], ValueError, r"nodes\[1\] = 9"),
        ([0, 1], ["a", None], ValueError, r"attributes\[1\] is None, a missing value"),
        ([0, 1], ["a", NAType()], ValueError, r"attributes\[1\] is <NA>, a missing value"),
        ([0, 1], np.array([np.nan, 1.0]), ValueError, r"attributes\[0\] is nan"),
        ([0, 1], ["a", ["b"]], TypeError, r"attributes\[1\] is \['b'\], which is not hashable"),
        ([0, 1], "ab", TypeError, "attributes is a str"),
        ([0, 1], 3, TypeError, "attributes is a int"),
        ([0, 1], np.zeros((2, 2)), ValueError, r"attributes has shape \(2, 2\)"),
    ],
)
def test_shared_attributes_rejects_bad_input(nodes, attributes, error, match):
    with pytest.raises(error, match=match):
        graph.shared_attributes(nodes, attributes, 3)


def test_shared_attributes_refuses_an_attribute_too_common_to_store(monkeypatch):
    assert _matrices.MAX_ENTRIES == 2**31
    monkeypatch.setattr(_matrices, "MAX_ENTRIES", 25)
    attributes = ["rare"] + ["all"] * 5
    assert graph.shared_attributes(range(5), attributes[:5], 6).nse == 12
    with pytest.raises(ValueError, match="'all' is shared by 5 nodes"):
        graph.shared_attributes(range(6), attributes, 6)


SYMMETRIZE = {
    "sum": lambda b: b + b.T,
    "mean": lambda b: (b + b.T) / 2,
    "max": lambda b: np.maximum(b, b.T),
    "min": lambda b: np.minimum(b, b.T),
}


@pytest.mark.parametrize("symmetrize", SYMMETRIZE)
@pytest.mark.parametrize("weighted", [True, False])
def test_from_edges(symmetrize, weighted):
    rng = np.random.default_rng(0)
    sources, targets = rng.integers(0, 9, (2, 60))
    weights = rng.integers(0, 4, 60) / 2 if weighted else None
    directed = np.zeros((9, 9))
    np.add.at(directed, (sources, targets), weights if weighted else 1)
    result = graph.from_edges(sources, targets, weights, num_nodes=9, symmetrize=symmetrize)
    np.testing.assert_allclose(check(result, 9), SYMMETRIZE[symmetrize](directed))


def test_from_edges_sums_both_directions_by_default():
    dense = check(graph.from_edges([0, 1, 0, 2], [1, 0, 1, 2], num_nodes=3), 3)
    np.testing.assert_array_equal(dense, [[0, 3, 0], [3, 0, 0], [0, 0, 2]])


def test_all_pairs_as_edges_equal_cooccurrence():
    sequence = [0, 1, 1, 2, 0]
    pairs = [(a, b) for a, b in itertools.pairwise(sequence)]
    np.testing.assert_array_equal(
        check(graph.from_edges(*zip(*pairs, strict=True), num_nodes=3), 3),
        check(graph.cooccurrence([sequence], 3), 3),
    )


@pytest.mark.parametrize(
    ("sources", "targets", "weights", "error", "match"),
    [
        ([], [], None, ValueError, "sources is empty"),
        ([0], [4], None, ValueError, r"targets\[0\] = 4; wanted 0..3"),
        ([0], [1, 2], None, ValueError, "sources has length 1 but targets has 2"),
        (["a"], [1], None, TypeError, r"sources\[0\] is .*'a'"),
        ([0, 1], [1, 2], [1, -2], ValueError, r"weights\[1\] = -2"),
        ([0, 1], [1, 2], [1, 1e39], ValueError, r"edge \(1, 2\) is 1e\+39, too large for float32"),
        ([0, 1], [1, 2], [1, 1e-50], ValueError, r"edge \(1, 2\) is 1e-50, too small for float32"),
        ([0, 0], [1, 1], [1e308, 1e308], ValueError, "too large for float32"),
    ],
)
def test_from_edges_rejects_bad_input(sources, targets, weights, error, match):
    with pytest.raises(error, match=match):
        graph.from_edges(sources, targets, weights, num_nodes=4)


def test_from_edges_rejects_an_unknown_symmetrize():
    with pytest.raises(ValueError, match="symmetrize is 'product'; wanted 'sum' or 'mean'"):
        graph.from_edges([0], [1], num_nodes=2, symmetrize="product")


# ---------------------------------------------------------------- parquet and SQL


@pytest.fixture(params=["pyarrow", "polars"])
def reader(request, monkeypatch):
    """Leaves only one of the two readers to be found."""
    pytest.importorskip(request.param)
    find_spec = _parquet.importlib.util.find_spec

    def only(name, *args):
        return None if name in {"pyarrow", "polars"} - {request.param} else find_spec(name, *args)

    monkeypatch.setattr(_parquet.importlib.util, "find_spec", only)
    return request.param


def write(path, **columns):
    polars = pytest.importorskip("polars")
    polars.DataFrame(columns).write_parquet(path)
    return path


def test_from_parquet_equals_from_edges(reader, tmp_path, small_chunks):
    rng = np.random.default_rng(1)
    sources, targets = rng.integers(0, 5, (2, 40))
    weights = rng.random(40)
    parts = []
    for name, part in [("a", slice(0, 15)), ("b", slice(15, 40))]:
        (tmp_path / name).mkdir()
        parts.append(tmp_path / name / "part.parquet")
        columns = {"target": targets[part], "weight": weights[part], "extra": weights[part]}
        write(parts[-1], **columns, source=sources[part])
    (tmp_path / "_SUCCESS").touch()
    for symmetrize in SYMMETRIZE:
        options = {"num_nodes": 5, "symmetrize": symmetrize}
        expected = check(graph.from_edges(sources, targets, weights, **options), 5)
        for path in (tmp_path, str(tmp_path), parts):
            result = check(graph.from_parquet(path, **options), 5)
            np.testing.assert_allclose(result, expected, rtol=1e-6)
    first = graph.from_edges(sources[:15], targets[:15], weights[:15], num_nodes=5)
    np.testing.assert_allclose(check(graph.from_parquet(parts[0], num_nodes=5), 5), check(first, 5), rtol=1e-6)


@pytest.mark.parametrize("symmetrize", SYMMETRIZE)
def test_from_parquet_in_shards_equals_the_rows_of_the_whole(reader, tmp_path, small_chunks, symmetrize):
    rng = np.random.default_rng(1)
    sources, targets = rng.integers(0, 10, (2, 60))
    weights = rng.random(60)
    write(tmp_path / "edges.parquet", source=sources, target=targets, weight=weights)
    options = {"num_nodes": 10, "symmetrize": symmetrize}
    expected = graph.to_scipy(graph.from_edges(sources, targets, weights, **options)).toarray()
    shards = graph.from_parquet(tmp_path, num_shards=4, **options)
    assert [part.shape for part in shards] == [(3, 10)] * 3 + [(1, 10)]
    np.testing.assert_allclose(np.concatenate([part.toarray() for part in shards]), expected, rtol=1e-6)
    assert shards.summary() == graph.shard(expected, 4).summary()
    # Two tables, each of them split: the rows of a shard are no single range.
    some = shards.read([(1, 3), (7, 9)]).toarray()
    np.testing.assert_allclose(some, expected[[1, 2, 7, 8]], rtol=1e-6)


def test_from_parquet_in_shards_holds_one_shard(tmp_path, monkeypatch):
    """Peak memory of reading a graph in eighths, against reading it whole; both hold a chunk of rows besides."""
    rng = np.random.default_rng(0)
    num_nodes, num_edges = 20_000, 400_000
    sources, targets = rng.integers(0, num_nodes, (2, num_edges))
    path = write(tmp_path / "edges.parquet", source=sources, target=targets, weight=rng.random(num_edges))
    del sources, targets
    monkeypatch.setattr(_matrices, "CHUNK", 10_000)

    def peak(read):
        tracemalloc.start()
        result = read()
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used, result

    graph.from_edges([0], [1], num_nodes=2)  # starts JAX
    whole, weights = peak(lambda: graph.from_parquet(path, num_nodes=num_nodes))
    shards = graph.from_parquet(path, num_nodes=num_nodes, num_shards=8)
    part, _ = peak(lambda: [shards[k].nnz for k in (0, 7)])
    edges_of_a_shard = weights.nse / 8
    assert part < 48 * edges_of_a_shard + 100 * 10_000
    assert part < whole / 4


def test_from_parquet_in_shards_reads_what_an_engine_aggregated(tmp_path):
    duckdb = pytest.importorskip("duckdb")
    sequences, rows = interactions()
    with duckdb.connect() as connection:
        connection.execute("CREATE TABLE interactions (user_id BIGINT, item_id BIGINT, position BIGINT)")
        connection.executemany("INSERT INTO interactions VALUES (?, ?, ?)", rows)
        connection.execute(f"COPY ({graph.COOCCURRENCE_SQL}) TO '{tmp_path / 'edges.parquet'}' (FORMAT parquet)")
    shards = graph.from_parquet(tmp_path, num_nodes=8, num_shards=3)
    weights = graph.cooccurrence(sequences, 8, max_length=200)
    np.testing.assert_allclose(
        np.concatenate([part.toarray() for part in shards]), graph.to_scipy(weights).toarray(), rtol=1e-6
    )


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16"])
def test_from_parquet_in_shards_takes_narrow_columns(tmp_path, dtype):
    path = write(tmp_path / "edges.parquet", source=np.array([0, 1, 100], dtype), target=np.array([1, 2, 101], dtype))
    shards = graph.from_parquet(path, num_nodes=100_000, num_shards=2, weight=None)
    whole = graph.to_scipy(graph.from_parquet(path, num_nodes=100_000, weight=None))
    assert [part.nnz for part in shards] == [whole.nnz, 0]


def test_from_parquet_maps_columns(reader, tmp_path):
    path = write(tmp_path / "edges.parquet", a=[0, 1], b=[1, 2], count=[3, 4])
    names = {"source": "a", "target": "b"}
    dense = check(graph.from_parquet(path, num_nodes=3, weight="count", **names), 3)
    np.testing.assert_array_equal(dense, [[0, 3, 0], [3, 0, 4], [0, 4, 0]])
    dense = check(graph.from_parquet(path, num_nodes=3, weight=None, **names), 3)
    np.testing.assert_array_equal(dense, [[0, 1, 0], [1, 0, 1], [0, 1, 0]])


@pytest.mark.parametrize(
    ("columns", "error", "match"),
    [
        ({"source": [0], "target": [1]}, ValueError, "no column 'weight', only 'source', 'target'"),
        (
            {"source": [0, None], "target": [1, 1], "weight": [1, 1]},
            ValueError,
            "column 'source' holds nulls",
        ),
        (
            {"source": [0] * 5, "target": [1, 1, 1, 1, 9], "weight": [1] * 5},
            ValueError,
            r"column 'target'\[4\] = 9; wanted 0..2",
        ),
        (
            {"source": [0] * 5, "target": [1] * 5, "weight": [1.0, 1.0, 1.0, -1.5, 1.0]},
            ValueError,
            r"column 'weight'\[3\] = -1.5",
        ),
        (
            {"source": [0.0], "target": [1], "weight": [1]},
            TypeError,
            "column 'source' has dtype float64; wanted integers",
        ),
        ({"source": [0], "target": [1], "weight": ["x"]}, TypeError, "column 'weight' has dtype"),
    ],
)
def test_from_parquet_rejects_bad_files(reader, tmp_path, small_chunks, columns, error, match):
    path = write(tmp_path / "edges.parquet", **columns)
    with pytest.raises(error, match=match):
        graph.from_parquet(path, num_nodes=3)


def test_from_parquet_rejects_what_is_not_there(reader, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no"):
        graph.from_parquet(tmp_path, num_nodes=3)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        graph.from_parquet(tmp_path / "edges.parquet", num_nodes=3)
    integers = np.zeros(0, np.int64)
    path = write(tmp_path / "e.parquet", source=integers, target=integers, weight=integers)
    with pytest.raises(ValueError, match="holds no rows"):
        graph.from_parquet(path, num_nodes=3)


def test_from_parquet_takes_folders_among_files(reader, tmp_path):
    (tmp_path / "folder").mkdir()
    first = write(tmp_path / "a.parquet", source=[0], target=[1], weight=[2.0])
    write(tmp_path / "folder" / "b.parquet", source=[1], target=[2], weight=[3.0])
    found = graph.from_parquet([first, str(tmp_path / "folder")], num_nodes=3)
    np.testing.assert_array_equal(found.todense(), [[0, 2, 0], [2, 0, 3], [0, 3, 0]])


def test_from_parquet_says_what_to_install(monkeypatch, tmp_path):
    path = write(tmp_path / "edges.parquet", source=[0], target=[1], weight=[1])
    monkeypatch.setattr(_parquet.importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        graph.from_parquet(path, num_nodes=3)


def statement(max_length, keep, max_hops, weighting):
    """The documented statement with other settings."""

    def edit(sql, old, new):
        assert sql.count(old) == 1
        return sql.replace(old, new)

    sql = edit(graph.COOCCURRENCE_SQL, "place <= 200", f"place <= {max_length}")
    sql = edit(sql, "place <= 1 ", f"place <= {max_hops} ")
    if keep == "first":
        sql = edit(sql, "position DESC", "position ASC")
    if weighting == "frequency":
        sql = edit(sql, "SUM(1.0e0 / hops.hop)", "SUM(1.0e0)")
    return sql


def interactions():
    rng = np.random.default_rng(2)
    sequences = [rng.integers(0, 8, rng.integers(1, 15)).tolist() for _ in range(12)]
    rows = [(u, i, p) for u, items in enumerate(sequences) for p, i in enumerate(items)]
    rng.shuffle(rows)
    return sequences, [tuple(map(int, row)) for row in rows]


SETTINGS = list(itertools.product([3, 200], ["last", "first"], [1, 2, 30], ["distance", "frequency"]))


def test_sql_on_duckdb(tmp_path):
    duckdb = pytest.importorskip("duckdb")
    pytest.importorskip("pyarrow")
    sequences, rows = interactions()
    with duckdb.connect() as connection:
        connection.execute("CREATE TABLE interactions (user_id INT, item_id INT, position INT)")
        connection.executemany("INSERT INTO interactions VALUES (?, ?, ?)", rows)
        for index, (max_length, keep, max_hops, weighting) in enumerate(SETTINGS):
            file = tmp_path / f"{index}.parquet"
            sql = statement(max_length, keep, max_hops, weighting)
            connection.execute(f"COPY ({sql}) TO '{file}' (FORMAT parquet)")
            options = {
                "max_length": max_length,
                "keep": keep,
                "max_hops": max_hops,
                "weighting": weighting,
            }
            np.testing.assert_allclose(
                check(graph.from_parquet(file, num_nodes=9), 9),
                check(graph.cooccurrence(sequences, 9, **options), 9),
                rtol=1e-6,
            )


def test_sql_on_another_engine():
    if sqlite3.sqlite_version_info < (3, 28):
        pytest.skip("this SQLite has no window functions")
    sequences, rows = interactions()
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute("CREATE TABLE interactions (user_id INT, item_id INT, position INT)")
        connection.executemany("INSERT INTO interactions VALUES (?, ?, ?)", rows)
        for max_length, keep, max_hops, weighting in SETTINGS:
            sql = statement(max_length, keep, max_hops, weighting)
            edges = connection.execute(sql).fetchall()
            options = {
                "max_length": max_length,
                "keep": keep,
                "max_hops": max_hops,
                "weighting": weighting,
            }
            np.testing.assert_allclose(
                check(graph.from_edges(*zip(*edges, strict=True), num_nodes=9), 9),
                check(graph.cooccurrence(sequences, 9, **options), 9),
                rtol=1e-6,
            )
    finally:
        connection.close()


# ---------------------------------------------------------------- matrices

PLAIN = np.array([[0, 2, 0, 0.5], [2, 1, 0, 0], [0, 0, 0, 0], [0.5, 0, 0, 0]])


@pytest.mark.parametrize(
    "convert",
    [
        np.array,
        lambda a: a.astype(np.float16),
        lambda a: np.asfortranarray(a),
        jnp.asarray,
        lambda a: jnp.asarray(a, jnp.bfloat16),
        jsparse.BCOO.fromdense,
        lambda a: jsparse.BCOO.fromdense(a, nse=9),
        lambda a: jsparse.BCSR.fromdense(a, nse=9),
        scipy.sparse.csr_matrix,
        scipy.sparse.csc_array,
        scipy.sparse.coo_matrix,
        scipy.sparse.lil_array,
        scipy.sparse.dok_array,
        scipy.sparse.dia_array,
        scipy.sparse.bsr_array,
    ],
)
def test_every_representation_is_accepted(convert):
    csr = _weights.symmetric_csr(convert(PLAIN))
    assert isinstance(csr, scipy.sparse.csr_array)
    assert csr.dtype == np.float64
    assert csr.has_canonical_format
    assert csr.nnz == 5
    np.testing.assert_array_equal(csr.toarray(), PLAIN)


def test_integer_weights_are_accepted():
    weights = np.array([[0, 3], [3, 0]], np.int8)
    np.testing.assert_array_equal(_weights.symmetric_csr(weights).toarray(), weights)
    check(graph.from_scipy(scipy.sparse.csr_array(weights)), 2)


def test_duplicates_add_up_padding_and_zeros_go():
    indices = [[1, 0], [0, 1], [1, 0], [2, 2], [3, 3], [0, 2], [2, 0], [0, 7]]
    data = [1.0, 3.0, 2.0, 4.0, 9.0, 0.0, 0.0, 0.0]
    weights = jsparse.BCOO((jnp.array(data), jnp.array(indices)), shape=(3, 3))
    csr = _weights.symmetric_csr(weights)
    np.testing.assert_array_equal(csr.toarray(), [[0, 3, 0], [3, 0, 0], [0, 0, 4]])
    assert csr.nnz == 3


def test_the_callers_matrix_is_left_alone():
    indices = np.array([1, 1, 0, 0]), np.array([0, 2, 4])
    matrix = scipy.sparse.csr_matrix((np.array([2.0, 1.0, 3.0, 0.0]), *indices), shape=(2, 2))
    np.testing.assert_array_equal(check(graph.from_scipy(matrix), 2), [[0, 3], [3, 0]])
    np.testing.assert_array_equal(matrix.data, [2, 1, 3, 0])
    np.testing.assert_array_equal(matrix.indices, [1, 1, 0, 0])


@pytest.mark.parametrize("index", [(0, 3), (3, 0), (-1, 0), (0, 4), (4, 4)])
def test_ids_outside_a_bcoo_are_no_padding(index):
    indices = jnp.array([[0, 1], [1, 0], index])
    weights = jsparse.BCOO((jnp.array([1.0, 1.0, 2.0]), indices), shape=(3, 3))
    with pytest.raises(ValueError, match=rf"edge \({index[0]}, {index[1]}\) with weight 2"):
        _weights.symmetric_csr(weights)


def changed(index, value):
    matrix = PLAIN.copy()
    matrix[index] = value
    return matrix


@pytest.mark.parametrize(
    ("matrix", "error", "match"),
    [
        (changed((1, 0), 3), ValueError, r"not symmetric: w\[0, 1\] = 2 but w\[1, 0\] = 3"),
        (changed((3, 2), 1e-3), ValueError, r"w\[2, 3\] = 0 but w\[3, 2\] = 0.001.*from_edges"),
        (changed((1, 0), -2), ValueError, r"w\[1, 0\] = -2; weights must be finite and non-neg"),
        (changed((0, 2), np.nan), ValueError, r"w\[0, 2\] = nan"),
        (changed((3, 3), np.inf), ValueError, r"w\[3, 3\] = inf"),
        (PLAIN[:2], ValueError, r"w has shape \(2, 4\); wanted \(num_nodes, num_nodes\)"),
        (PLAIN[0], ValueError, r"w has shape \(4,\)"),
        (np.zeros((0, 0)), ValueError, r"w has shape \(0, 0\)"),
        (np.zeros((2, 2, 2)), ValueError, r"w has shape \(2, 2, 2\)"),
        (PLAIN > 0, TypeError, "w has dtype bool"),
        (PLAIN + 0j, TypeError, "w has dtype complex128"),
        (PLAIN.astype(object), TypeError, "w has dtype object"),
        (scipy.sparse.csr_array(PLAIN > 0), TypeError, r"w has dtype bool.*w.astype"),
        (PLAIN.tolist(), TypeError, "w is a list; wanted a BCOO"),
        (None, TypeError, "w is a NoneType"),
        (jsparse.BCOO.fromdense(np.stack([PLAIN] * 4), n_batch=1)[0:1], ValueError, "shape"),
        (jsparse.BCOO.fromdense(PLAIN, n_batch=1), ValueError, "n_batch=1 and n_dense=0"),
        (jsparse.BCOO.fromdense(PLAIN, n_dense=1), ValueError, "n_batch=0 and n_dense=1"),
    ],
)
def test_bad_matrices_are_named(matrix, error, match):
    with pytest.raises(error, match=match):
        _weights.symmetric_csr(matrix, "w")


def test_rounding_is_evened_out_but_no_more():
    rng = np.random.default_rng(3)
    factors = rng.random((30, 4), np.float32)
    exact = (factors[:, None] * factors).sum(-1)
    exact = np.maximum(exact, exact.T)
    rounded = exact * (1 + 2e-7 * rng.standard_normal(exact.shape).astype(np.float32))
    assert not np.array_equal(rounded, rounded.T)
    csr = _weights.symmetric_csr(rounded)
    np.testing.assert_array_equal(csr.toarray(), csr.T.toarray())
    np.testing.assert_allclose(csr.toarray(), exact, rtol=1e-6)
    # An entry that only one direction has is rounding next to a heavy edge of the same node only.
    lone = np.array([[5.0, 1e-7, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1e-7], [0, 0, 0, 0]])
    with pytest.raises(ValueError, match=r"\[2, 3\] = 1e-07"):
        _weights.symmetric_csr(lone)


def test_traced_weights_are_refused():
    weights = graph.from_edges([0], [1], num_nodes=2)

    def prepare(adjacency):
        graph.normalize(adjacency)
        return 0.0

    for adjacency in (weights, weights.todense(), jsparse.BCSR.from_bcoo(weights)):
        with pytest.raises(TypeError, match=r"adjacency is a traced value.*outside jax\.jit"):
            jax.jit(prepare)(adjacency)


def test_scipy_round_trip():
    weights = graph.cooccurrence(SEQUENCES, 8, max_hops=3)
    csr = graph.to_scipy(weights)
    assert csr.dtype == np.float32
    assert csr.has_canonical_format
    np.testing.assert_array_equal(csr.toarray(), check(weights, 8))
    np.testing.assert_array_equal(check(graph.from_scipy(csr), 8), csr.toarray())
    assert graph.to_scipy(PLAIN).dtype == np.float64


def test_to_bcoo_takes_a_dtype():
    csr = _weights.symmetric_csr(PLAIN)
    assert _weights.to_bcoo(csr, jnp.bfloat16).dtype == jnp.bfloat16
    with enable_x64(True):
        wide = _weights.to_bcoo(csr, np.float64)
        assert wide.dtype == np.float64
        assert wide.indices.dtype == np.int32
        check(graph.from_scipy(csr), 4)


# ---------------------------------------------------------------- operations


def random_graph(rng, num_nodes=7, levels=4):
    upper = np.triu(rng.integers(0, levels, (num_nodes, num_nodes)))
    return (upper + upper.T).astype(np.float64)


def test_combine_is_a_weighted_sum():
    rng = np.random.default_rng(4)
    dense = [random_graph(rng) for _ in range(3)]
    graphs = [graph.from_scipy(dense[0]), scipy.sparse.csr_array(dense[1]), dense[2]]
    np.testing.assert_allclose(check(graph.combine(graphs), 7), sum(dense))
    expected = 0.5 * dense[0] + 3 * dense[2]
    np.testing.assert_allclose(check(graph.combine(graphs, [0.5, 0, 3]), 7), expected)
    np.testing.assert_array_equal(check(graph.combine(graphs[:1]), 7), dense[0])


def test_combine_keeps_normalised_graphs():
    one = graph.normalize(graph.from_edges([0], [1], [50.0], num_nodes=3))
    other = graph.normalize(graph.from_edges([1], [2], num_nodes=3))
    dense = check(graph.combine([one, other], [0.25, 0.75]), 3)
    np.testing.assert_allclose(dense, [[0, 0.25, 0], [0.25, 0, 0.75], [0, 0.75, 0]])


@pytest.mark.parametrize(
    ("graphs", "coefficients", "error", "match"),
    [
        ([], None, ValueError, "graphs is empty"),
        (PLAIN, None, TypeError, "graphs is a ndarray; wanted a list"),
        (3, None, TypeError, "graphs is a int"),
        ([PLAIN, np.eye(3)], None, ValueError, r"graphs\[1\] has 3 nodes but graphs\[0\] has 4"),
        ([PLAIN, -PLAIN], None, ValueError, r"graphs\[1\]\[0, 1\] = -2"),
        ([PLAIN, "x"], None, TypeError, r"graphs\[1\] is a str"),
        ([PLAIN, PLAIN], [1], ValueError, "1 coefficients for 2 graphs"),
        ([PLAIN, PLAIN], [1, -1], ValueError, r"coefficients\[1\] is -1"),
        ([PLAIN, PLAIN], [np.nan, 1], ValueError, r"coefficients\[0\] is nan"),
        ([PLAIN, PLAIN], [np.inf, 1], ValueError, r"coefficients\[0\] is inf"),
        ([PLAIN, PLAIN], ["1", 1], TypeError, r"coefficients\[0\] is '1'"),
        ([PLAIN, PLAIN], {1: 2.0, 2: 3.0}, TypeError, "coefficients is a mapping; wanted a list"),
        ([PLAIN, PLAIN], [0, 0.0], ValueError, "all coefficients are 0"),
        ([PLAIN], [1e308], ValueError, "too large for float32"),
    ],
)
def test_combine_rejects_bad_input(graphs, coefficients, error, match):
    with pytest.raises(error, match=match):
        graph.combine(graphs, coefficients)


def slow_top_k(dense, k):
    kept = np.zeros(dense.shape, bool)
    for i, row in enumerate(dense):
        ranked = sorted((-w, j) for j, w in enumerate(row) if w > 0 and j != i)
        for _, j in ranked[:k]:
            kept[i, j] = kept[j, i] = True
        kept[i, i] = True
    return np.where(kept, dense, 0)


@quick
@hypothesis.given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 8), chunk=st.integers(1, 60))
def test_top_k(seed, k, chunk):
    dense = random_graph(np.random.default_rng(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_matrices, "CHUNK", chunk)
        result = check(graph.top_k(dense, k), 7)
    np.testing.assert_array_equal(result, slow_top_k(dense, k))


def test_top_k_breaks_ties_by_the_smaller_index():
    # Node 3 has neighbours 0, 1, 2 of equal weight, each of which prefers another node.
    star = graph.from_edges([3, 3, 3, 0, 1, 2], [0, 1, 2, 4, 4, 4], [1, 1, 1, 2, 2, 2], num_nodes=5)
    dense = check(graph.top_k(star, 1), 5)
    np.testing.assert_array_equal(dense[3], [1, 0, 0, 0, 0])


def test_top_k_keeps_self_loops_beside_the_k():
    weights = np.array([[9.0, 1, 2], [1, 0, 0], [2, 0, 5]])
    np.testing.assert_array_equal(check(graph.top_k(weights, 1), 3), weights)
    np.testing.assert_array_equal(check(graph.top_k(np.eye(2), 1), 2), np.eye(2))


@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (1.0, TypeError), (True, TypeError)])
def test_top_k_rejects_bad_k(k, error):
    with pytest.raises(error, match=f"k is {k}"):
        graph.top_k(PLAIN, k)


def test_drop_below():
    dense = check(graph.drop_below(PLAIN, 1), 4)
    np.testing.assert_array_equal(dense, np.where(PLAIN >= 1, PLAIN, 0))
    np.testing.assert_array_equal(check(graph.drop_below(PLAIN, 0), 4), PLAIN)
    assert graph.drop_below(PLAIN, 1e300).nse == 0


@pytest.mark.parametrize("weight", [0.1, 0.3, 0.7])
def test_drop_below_keeps_a_weight_equal_to_the_threshold(weight):
    assert graph.drop_below(graph.from_edges([0], [1], [weight], num_nodes=2), weight).nse == 2


@pytest.mark.parametrize(
    ("threshold", "error"), [(-1.0, ValueError), (np.nan, ValueError), (np.inf, ValueError), ("1", TypeError)]
)
def test_drop_below_rejects_bad_thresholds(threshold, error):
    with pytest.raises(error, match=f"threshold is {threshold!r}"):
        graph.drop_below(PLAIN, threshold)


@pytest.mark.parametrize("isolated", ["zero", "identity"])
def test_normalize(isolated):
    rng = np.random.default_rng(5)
    dense = random_graph(rng, 12, 3) * rng.random()
    dense[[2, 7]] = dense[:, [2, 7]] = 0
    degree = dense.sum(1)
    with np.errstate(divide="ignore"):
        root = np.where(degree > 0, degree**-0.5, 0)
    expected = root[:, None] * dense * root
    if isolated == "identity":
        expected[[2, 7], [2, 7]] = 1
    result = check(graph.normalize(dense, isolated=isolated), 12)
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-7)
    assert np.abs(np.linalg.eigvalsh(result.astype(np.float64))).max() <= 1 + 1e-6
    exact = _weights.normalize_csr(_weights.symmetric_csr(dense), isolated)
    assert exact.dtype == np.float64
    assert exact.has_canonical_format
    np.testing.assert_allclose(exact.toarray(), expected, rtol=1e-14)


def test_normalize_leaves_isolated_nodes_by_default():
    assert graph.normalize(np.zeros((3, 3))).nse == 0
    np.testing.assert_array_equal(check(graph.normalize(np.zeros((3, 3)), isolated="identity"), 3), np.eye(3))


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_normalize_does_not_depend_on_the_scale(scale):
    expected = check(graph.normalize(PLAIN), 4)
    np.testing.assert_allclose(check(graph.normalize(PLAIN * scale), 4), expected, rtol=1e-6)


def test_normalize_rejects_bad_input():
    with pytest.raises(ValueError, match="isolated is 'ones'; wanted 'zero' or 'identity'"):
        graph.normalize(PLAIN, isolated="ones")
    with pytest.raises(ValueError, match="weights of node 0 add up to infinity"):
        graph.normalize(np.full((2, 2), 1.7e308))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["graph.npz", "graph", "graph.of.items"])
def test_save_and_load(tmp_path, name):
    weights = graph.normalize(graph.cooccurrence(SEQUENCES, 8, max_hops=3))
    path = tmp_path / name
    graph.save(path, graph.from_edges([0], [1], num_nodes=2))
    graph.save(str(path), weights)
    assert os.listdir(tmp_path) == [name]
    loaded = graph.load(path)
    np.testing.assert_array_equal(check(loaded, 8), check(weights, 8))
    np.testing.assert_array_equal(scipy.sparse.load_npz(path).toarray(), check(weights, 8))


def test_saved_files_hold_no_pickle(tmp_path):
    graph.save(tmp_path / "graph.npz", PLAIN)
    with np.load(tmp_path / "graph.npz", allow_pickle=False) as file:
        assert all(file[name].dtype.kind != "O" for name in file.files)


@pytest.mark.parametrize(("weight", "why"), [(1e-50, "small"), (1e300, "large")])
def test_what_could_not_be_loaded_is_not_saved(tmp_path, weight, why):
    with pytest.raises(ValueError, match=f"too {why} for float32"):
        graph.save(tmp_path / "graph.npz", np.array([[0, weight], [weight, 0]]))
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "graph.npz"
    graph.save(path, PLAIN)

    def fail(file, *args, **kwargs):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(_files.scipy.sparse, "save_npz", fail)
    with pytest.raises(OSError, match="disk full"):
        graph.save(path, np.eye(2))
    assert os.listdir(tmp_path) == ["graph.npz"]
    np.testing.assert_array_equal(check(graph.load(path), 4), PLAIN)


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX")
def test_saved_files_follow_the_umask(tmp_path):
    graph.save(tmp_path / "graph.npz", PLAIN)
    (tmp_path / "other").touch()
    assert (tmp_path / "graph.npz").stat().st_mode == (tmp_path / "other").stat().st_mode


def damaged_files(folder):
    graph.save(folder / "good.npz", PLAIN)
    good = (folder / "good.npz").read_bytes()
    yield "empty", b""
    yield "text", b"user item item"
    yield "truncated", good[: len(good) // 2]
    yield "pickle", pickle.dumps({"weights": PLAIN})
    np.save(folder / "array.npy", PLAIN)
    yield "array", (folder / "array.npy").read_bytes()
    np.savez(folder / "other.npz", weights=PLAIN)
    yield "other keys", (folder / "other.npz").read_bytes()
    np.savez(folder / "object.npz", format=np.array([{}], object))
    yield "object", (folder / "object.npz").read_bytes()
    arrays = {"format": np.array(b"csr"), "shape": np.array([2, 2]), "data": np.ones(2)}
    np.savez(folder / "o.npz", **arrays, indices=np.array([0, 9]), indptr=np.array([0, 1, 2]))
    yield "indices outside", (folder / "o.npz").read_bytes()
    scipy.sparse.save_npz(folder / "d.npz", scipy.sparse.csr_array(np.triu(PLAIN)))
    yield "directed", (folder / "d.npz").read_bytes()


def test_load_rejects_what_is_no_graph(tmp_path):
    for name, content in damaged_files(tmp_path):
        path = tmp_path / f"bad {name}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"bad {name} holds no graph: .*graph.save"):
            graph.load(path)
    with pytest.raises(FileNotFoundError):
        graph.load(tmp_path / "missing.npz")


def test_load_survives_any_flipped_byte(tmp_path):
    graph.save(tmp_path / "good.npz", graph.cooccurrence(SEQUENCES, 8))
    good = (tmp_path / "good.npz").read_bytes()
    rng = np.random.default_rng(6)
    for position in rng.choice(len(good), 60, replace=False):
        bad = bytearray(good)
        bad[position] ^= rng.integers(1, 256)
        (tmp_path / "bad.npz").write_bytes(bad)
        try:
            loaded = graph.load(tmp_path / "bad.npz")
        except ValueError:
            continue
        check(loaded, loaded.shape[0])


# ---------------------------------------------------------------- summary


def test_summary():
    sources, targets = [0, 0, 1, 3, 5, 0], [1, 2, 2, 4, 5, 0]
    weights = graph.from_edges(sources, targets, [1, 2, 3, 4, 5, 6], num_nodes=7)
    found = graph.summary(weights)
    assert (found.nodes, found.edges, found.self_loops, found.isolated) == (7, 4, 2, 1)
    assert (found.components, found.largest_component) == (4, 3)
    # 3 edges among 0, 1, 2; one between 3 and 4; 5 has only a self-loop; 6 nothing
    np.testing.assert_allclose(found.degree_quantiles, np.quantile([2, 2, 2, 1, 1, 0, 0], found.QUANTILES))
    np.testing.assert_allclose(found.weight_quantiles, np.quantile([1, 2, 3, 4] * 2, found.QUANTILES))
    assert found.memory == weights.data.nbytes + weights.indices.nbytes
    text = str(found)
    assert "7 (1 isolated)" in text
    assert "4 (and 2 self-loops)" in text
    with pytest.raises(AttributeError):
        found.nodes = 3


def test_summary_of_nothing():
    found = graph.summary(np.zeros((3, 3)))
    assert (found.nodes, found.edges, found.isolated, found.components) == (3, 0, 3, 3)
    assert found.weight_quantiles == (0.0,) * 6
    assert "3 isolated" in str(found)


# ---------------------------------------------------------------- anything at all

anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 8),
    st.just(2**65),
    st.floats(),
    st.text(max_size=2),
)
columns = st.one_of(
    anything,
    st.lists(st.integers(-1, 5), max_size=5),
    st.lists(anything, max_size=4),
    st.lists(st.lists(st.integers(0, 4), max_size=4) | anything, max_size=4),
    st.lists(st.integers(0, 4), max_size=5).map(np.array),
    st.lists(st.floats(), max_size=4).map(np.array),
    st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), max_size=3).map(np.array),
)
sizes = st.one_of(st.integers(1, 6), anything.filter(lambda n: n != 2**65))


def survives(build, *args, **kwargs):
    """A valid graph or a clear error, and nothing else."""
    try:
        result = build(*args, **kwargs)
    except (TypeError, ValueError) as error:
        message = str(error)
        assert "wanted" in message or "must be" in message or "matter" in message
        return
    check(result, result.shape[0])


@quick
@hypothesis.given(columns, columns, sizes)
def test_fuzz_cooccurrence(first, second, num_nodes):
    survives(graph.cooccurrence, first, num_nodes)
    survives(graph.cooccurrence, (first, second), num_nodes, max_hops=2)


@quick
@hypothesis.given(columns, columns, columns, sizes, sizes)
def test_fuzz_edges(first, second, third, one_size, other_size):
    survives(graph.user_item, first, second, one_size, other_size, weights=third)
    survives(graph.from_edges, first, second, third, num_nodes=one_size)
    survives(graph.shared_attributes, first, third, one_size)


weights_of_any_kind = st.sampled_from([0.0, 1.0, 2.0, -0.0, 1e-3, -1.0, 5e-324, 1e39, 1e308, np.inf, np.nan])


@quick
@hypothesis.given(
    st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(weights_of_any_kind, min_size=n, max_size=n), min_size=n, max_size=n)
    ),
    st.booleans(),
    sizes,
)
def test_fuzz_matrices(rows, mirror, number):
    matrix = np.array(rows)
    if mirror:
        matrix = np.triu(np.where(matrix < 0, 0, matrix))
        matrix = np.maximum(matrix, matrix.T)
    for given in (matrix, scipy.sparse.coo_array(matrix)):
        survives(graph.from_scipy, given)
        survives(graph.normalize, given, isolated="identity")
        survives(graph.top_k, given, number)
        survives(graph.drop_below, given, number)
        survives(graph.combine, [given, matrix], [number, 1])


# ---------------------------------------------------------------- real data


def read_sequences(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not on this machine")
    with open(path) as file:
        return [[int(item) for item in line.split()[1:]] for line in file]


def read_genres():
    path = SHARED / "ml-1m_items.tsv"
    if not path.exists():
        pytest.skip("ml-1m_items.tsv is not on this machine")
    with open(path, encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file][1:]
    return {int(row[0]): row[3].split("|") for row in rows}


def test_movielens_cooccurrence_is_literal():
    """How much faster it is than this loop, ``benchmarks/graph_build.py --log`` measures."""
    sequences = read_sequences("ml-1m.txt")
    assert sum(map(len, sequences)) == 999_611
    weights = graph.cooccurrence(sequences, 3417, max_length=200)
    expected = collections.defaultdict(float)
    for seq in sequences:
        seq = seq[-200:]
        for i in range(len(seq) - 1):
            for h, j in enumerate(range(i + 1, min(i + 2, len(seq))), start=1):
                expected[seq[i], seq[j]] += 1 / h
                expected[seq[j], seq[i]] += 1 / h
    indices = np.asarray(weights.indices).tolist()
    found = dict(zip(map(tuple, indices), np.asarray(weights.data).tolist(), strict=True))
    assert found == expected


def test_movielens_genres():
    genres = read_genres()
    pairs = [(movie, genre) for movie, names in genres.items() for genre in names]
    movies, names = zip(*pairs, strict=True)
    weights = graph.shared_attributes(movies, names, 3417)
    found = graph.summary(weights)
    assert (found.nodes, found.isolated, found.self_loops) == (3417, 1, 0)
    # Independently: bit masks of genres intersect.
    bit = {name: 1 << index for index, name in enumerate(sorted(set(names)))}
    masks = np.array([sum(bit[name] for name in genres[movie]) for movie in sorted(genres)])
    shared = (masks[:, None] & masks) != 0
    assert found.edges == (shared.sum() - len(masks)) // 2
    degree = np.bincount(np.asarray(weights.indices)[:, 0], minlength=3417)
    np.testing.assert_array_equal(degree[1:], shared.sum(1) - 1)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: graph.cooccurrence(np.ma.masked_equal([[0, 0, 1, 2], [0, 1, 2, 3]], 0), 4),
            ValueError,
            r"sequences\[0\] has masked entries, .*\.compressed\(\)",
        ),
        (
            lambda: graph.from_edges(np.ma.array([0, 1], mask=[0, 1]), [1, 2], num_nodes=3),
            ValueError,
            "sources has masked entries",
        ),
        (lambda: graph.from_scipy(np.ma.array(np.ones((3, 3)), mask=np.eye(3))), ValueError, "has masked entries"),
        (lambda: graph.knn(np.ma.array(np.ones((3, 2)), mask=[[1, 0]] * 3), 1), ValueError, "vectors has masked"),
        (
            lambda: graph.from_edges(np.array([0, np.nan]), [1, 2], num_nodes=3),
            TypeError,
            r"sources\[1\] is .*nan.*It is missing: leave such rows out",
        ),
        (lambda: graph.from_edges([0, None], [1, 2], num_nodes=3), TypeError, r"sources\[1\] is None .*It is missing"),
        (
            lambda: graph.from_edges(np.array([0, 1], object), [1, 2], num_nodes=3),
            TypeError,
            "sources has dtype object",
        ),
        (lambda: graph.from_edges(iter([0]), [1], num_nodes=3), TypeError, "sources is a list_iterator; wanted an arr"),
        (lambda: graph.from_edges({0}, [1], num_nodes=3), TypeError, "sources is a set; wanted an array or a list"),
        (
            lambda: graph.shared_attributes([0, 1], {"a", "b"}, 2),
            TypeError,
            "attributes is a set; wanted one attribute",
        ),
        (lambda: graph.knn(np.ones((3, 2), bool), 1), TypeError, "vectors has dtype bool; wanted real floating"),
        (lambda: graph.knn([[1, 2], [3]], 1), ValueError, "vectors is ragged"),
        (
            lambda: graph.knn(1e-25 * np.eye(3) + 1e-25, 1, metric="dot"),
            ValueError,
            "vectors are too long or too short",
        ),
    ],
)
def test_what_means_something_else_is_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_numbers_may_be_scalars_of_jax():
    weights = graph.from_edges([0], [1], num_nodes=jnp.int32(3))
    assert weights.shape == (3, 3)
    np.testing.assert_allclose(graph.combine([weights, weights], jnp.array([1.0, 2.0])).todense()[0, 1], 3)


def test_parquet_folders_of_other_tools(tmp_path):
    """A job that was interrupted leaves files in _temporary; one that wrote a table makes a folder of that name."""
    for place in ("_temporary/0/part-0.parquet", ".staging/a.parquet", "edges.parquet/part-0.parquet"):
        (tmp_path / place).parent.mkdir(parents=True)
        write(tmp_path / place, source=[0], target=[1], weight=[1.0])
    np.testing.assert_array_equal(graph.from_parquet(tmp_path, num_nodes=2).todense(), [[0, 1], [1, 0]])


def test_a_compressed_graph_counts_as_large_as_it_gets(tmp_path, monkeypatch):
    wanted = []
    monkeypatch.setattr(_files, "require_memory", lambda needed, *rest: wanted.append(needed))
    path = scipy.sparse.diags_array([np.ones(9999)] * 2, offsets=[-1, 1], shape=(10_000, 10_000)).tocsr()
    scipy.sparse.save_npz(tmp_path / "path.npz", path)
    graph.load(tmp_path / "path.npz")
    assert wanted[0] >= 2 * (path.data.nbytes + path.indices.nbytes + path.indptr.nbytes)
    assert (tmp_path / "path.npz").stat().st_size * 4 < wanted[0]
