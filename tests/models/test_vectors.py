"""Vectors of items: the file, and the graph of nearest neighbours made of it."""

import dataclasses
import shutil
import sys

import numpy as np
import pytest

from models import graphs
from models.architectures.registry import make_config
from models.config import GraphConfig
from models.data import Interactions, read_item_vectors, write_item_vectors
from models.training.checkpoints import CheckpointError, RunInfo
from sevo_optax import graph

TRAIN = Interactions.from_sequences([[1, 2, 3], [2, 4], [1, 2]], num_items=5)
TRAIN = dataclasses.replace(TRAIN, item_ids=np.array([0, 10, 20, 30, 40, 50]))
VECTORS = {20: [1.0, 0.0], 50: [0.0, 1.0], 99: [5.0, 5.0], 10: [0.1, 1.0], 40: [1.0, 0.2]}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "items.npz"
    write_item_vectors(path, np.array(list(VECTORS)), np.array(list(VECTORS.values())))
    return path


def test_rows_are_matched_by_id(file):
    vectors, known = read_item_vectors(file, TRAIN.item_ids)
    assert known.tolist() == [False, True, True, False, True, True]
    np.testing.assert_array_equal(vectors[[1, 2, 4, 5]], [VECTORS[x] for x in (10, 20, 40, 50)])
    assert not vectors[[0, 3]].any()


def test_text_of_very_different_lengths(tmp_path):
    ids = np.array(["a", "b" * 10**7, "c"], dtype=np.dtypes.StringDType())
    write_item_vectors(tmp_path / "items.npz", ids, np.eye(3))
    vectors, _ = read_item_vectors(tmp_path / "items.npz", np.array(["", "c", "a"]))
    np.testing.assert_array_equal(vectors[1:], np.eye(3)[[2, 0]])


def test_rows_of_a_table(tmp_path):
    table = np.arange(12, dtype=np.float32).reshape(6, 2)
    np.save(tmp_path / "items.npy", table)
    vectors, known = read_item_vectors(tmp_path / "items.npy", TRAIN.item_ids)
    np.testing.assert_array_equal(vectors[1:], table[1:])
    assert known.tolist() == [False] + [True] * 5
    np.save(tmp_path / "items.npy", table[1:])
    with pytest.raises(ValueError, match="has 5 rows, but the item table has 6, row 0 included"):
        read_item_vectors(tmp_path / "items.npy", TRAIN.item_ids)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"item_ids": np.array([10])}, "lacks an array .*vectors.*wanted an .npz with item_ids"),
        ({"vectors": np.eye(2)}, "lacks an array"),
        ({"item_ids": np.array([10, 20]), "vectors": np.ones(2)}, r"holds float64\[2\]; wanted"),
        ({"item_ids": np.array([10, 20]), "vectors": np.array([["a"], ["b"]])}, r"holds <U1\[2, 1\]"),
        ({"item_ids": np.array([10]), "vectors": np.eye(2)}, r"item_ids of shape \(1,\) for 2 vectors"),
        ({"item_ids": np.array([7, 8]), "vectors": np.eye(2)}, "first is 7, those look like 10"),
        ({"item_ids": np.zeros(0, int), "vectors": np.ones((0, 2))}, "holds no item"),
        ({"item_ids": np.array([20, 20]), "vectors": np.eye(2)}, "several vectors of item 20"),
        ({"item_ids": np.array([10, 20]), "vectors": np.array([[0], [np.nan]])}, "infinity for item 20; repair"),
        ({"item_ids": np.array([10, None]), "vectors": np.eye(2)}, "Python objects, .* write text ids with dtype str"),
    ],
)
def test_bad_files(tmp_path, arrays, message):
    np.savez(tmp_path / "items.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        read_item_vectors(tmp_path / "items.npz", TRAIN.item_ids)
    assert str(caught.value).startswith("vectors: ")
    assert "\n" not in str(caught.value)


def test_no_file_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vectors: .* does not exist"):
        read_item_vectors(tmp_path / "none.npz", TRAIN.item_ids)
    (tmp_path / "items.npz").write_text("1 2 3\n")
    with pytest.raises(ValueError, match=r"items\.npz cannot be read"):
        read_item_vectors(tmp_path / "items.npz", TRAIN.item_ids)


def test_the_graph_of_nearest_items(file):
    config = GraphConfig(graph=("knn",), vectors=file, knn_neighbors=1)
    found = graphs.build_graph(TRAIN, config, num_special=2).todense()
    assert found.shape == (7, 7)
    assert {(int(i), int(j)) for i, j in np.argwhere(found)} == {(1, 5), (5, 1), (2, 4), (4, 2)}
    assert graphs.graph_notes(config, TRAIN.item_ids) == (
        f"1 of 5 items have no vector in {file}: they get no edges of graph knn",
    )
    assert graphs.describe_graphs("mine", "train", config) == "mine: 1 nearest items by cosine of items.npz"
    assert not graphs.graph_notes(config, np.array([0, 10, 20, 40, 50]))
    with pytest.raises(ValueError, match="the graph knn needs --vectors"):
        graphs.build_graph(TRAIN, GraphConfig(graph=("knn",)))


def test_an_index_that_is_not_installed(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    config = GraphConfig(graph=("knn",), vectors=file, knn_method="approximate")
    with pytest.raises(ValueError, match=r"^knn_method: method 'approximate' needs faiss"):
        graphs.build_graph(TRAIN, config)


def test_the_files_of_a_graph_are_part_of_the_run(file, tmp_path):
    config = make_config("sasrec", graph=("knn",), vectors=file)
    before = RunInfo.of("sevo-adamw", config, TRAIN)
    write_item_vectors(file, np.array([10, 20]), np.eye(2))
    after = RunInfo.of("sevo-adamw", config, TRAIN)
    assert before.run != after.run
    # The same file somewhere else is the same.
    moved = (tmp_path / "moved" / file.name).resolve()
    moved.parent.mkdir()
    shutil.copy(file, moved)
    there = RunInfo.of("sevo-adamw", dataclasses.replace(config, vectors=moved), TRAIN)
    assert there.continuing(after, TRAIN, tmp_path).run == after.run
    with pytest.raises(CheckpointError, match=r"was trained when .*items\.npz held something else"):
        after.continuing(before, TRAIN, tmp_path)

    weights = tmp_path / "weights.npz"
    config = make_config("sasrec", graph=(str(weights),))
    graph.save(weights, graph.from_edges([1], [2], num_nodes=6))
    before = RunInfo.of("sevo-adamw", config, TRAIN)
    graph.save(weights, graph.from_edges([1], [3], num_nodes=6))
    after = RunInfo.of("sevo-adamw", config, TRAIN)
    assert after.run == before.run  # its checkpoints carry it, and those of earlier versions do, too
    with pytest.raises(CheckpointError, match=r"was trained when .*weights\.npz held something else"):
        after.continuing(before, TRAIN, tmp_path)
    # A run of an earlier version does not tell.
    assert after.continuing(dataclasses.replace(before, graph=""), TRAIN, tmp_path).run == before.run


def test_a_run_without_files_is_called_as_it_was():
    """Of the last version without vectors: its checkpoints carry this."""
    info = RunInfo.of("sevo-adamw", make_config("sasrec"), TRAIN)
    assert (info.graph, info.data, info.run) == ("", "374e30aa13cb9fef", "a8b8192170cf9cd6")
