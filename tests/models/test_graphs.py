"""Graphs by name, and what they are smoothed over."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models import graphs
from models.architectures.base import Encoded, Recommender
from models.architectures.registry import make_config
from models.config import GraphConfig
from models.data import Interactions, write_item_vectors
from models.graphs import Nodes, build_graph, smoothed_nodes
from models.training.optimizers import make_stages
from models.training.program import make_diagnose
from sevo_optax import graph, smooth

TRAIN = Interactions.from_sequences([[1, 2, 3], [2, 4], [1, 2]], num_items=5)


class Table(nnx.Module):
    """A model of users and items, as far as graphs are concerned."""

    num_special = 2
    node_axes = {}  # noqa: RUF012

    def __init__(self, sets):
        self.node_sets = nnx.static(sets)


@pytest.fixture
def attributes(tmp_path):
    file = tmp_path / "items.tsv"
    file.write_text("item_id\tgenres\n1\tDrama\n5\tDrama\n")
    return file


def test_items_that_follow_each_other():
    dense = build_graph(TRAIN, GraphConfig(), num_special=3).todense()
    assert dense.shape == (8, 8)
    assert {(i, j): dense[i, j] for i, j in np.argwhere(dense) if i < j} == {(1, 2): 2, (2, 3): 1, (2, 4): 1}


def test_users_stand_in_front_of_items():
    dense = build_graph(TRAIN, GraphConfig(graph=("user-item",))).todense()
    assert dense.shape == (3 + 6, 3 + 6)
    pairs = {(int(user), int(node) - 3) for user, node in np.argwhere(dense[:3])}
    assert pairs == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 4), (2, 1), (2, 2)}


def test_items_of_the_same_users():
    found = graphs.item_graph("shared-users", TRAIN, GraphConfig()).todense()
    pairs = {(int(i), int(j)): found[i, j] for i, j in np.argwhere(found) if i < j}
    cosines = {(1, 2): 2 / 6**0.5, (1, 3): 1 / 2**0.5, (2, 3): 1 / 3**0.5, (2, 4): 1 / 3**0.5}
    assert pairs == pytest.approx(cosines)
    np.testing.assert_array_equal(found, found.T)
    # Item 2 keeps item 1, item 3 item 1, and item 4 has none but item 2.
    few = graphs.item_graph("shared-users", TRAIN, GraphConfig(max_neighbors=1)).todense()
    assert {(int(i), int(j)) for i, j in np.argwhere(few) if i < j} == {(1, 2), (1, 3), (2, 4)}


# Histories of 3 and of 2 in which each option of the graph makes a difference; weights by pair of items.
@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ({"max_hops": 2}, {(1, 2): 2, (2, 3): 1, (1, 3): 0.5, (2, 4): 1}),
        ({"max_hops": 2, "graph_weighting": "frequency"}, {(1, 2): 2, (2, 3): 1, (1, 3): 1, (2, 4): 1}),
        ({"graph_max_length": 2}, {(1, 2): 1, (2, 3): 1, (2, 4): 1}),
        ({"graph_max_length": 2, "graph_keep": "first"}, {(1, 2): 2, (2, 4): 1}),
    ],
)
def test_options_of_consecutive_items(options, pairs):
    dense = build_graph(TRAIN, GraphConfig(**options)).todense()
    assert {(i, j): dense[i, j] for i, j in np.argwhere(dense) if i < j} == pairs


@pytest.mark.parametrize(("metric", "near_1"), [("cosine", 2), ("euclidean", 3)])
def test_options_of_nearest_items(tmp_path, metric, near_1):
    """Item 2 points where item 1 does, item 3 lies nearer, and both have nearer ones than item 1."""
    vectors = np.array([[1, 0], [9, -0.1], [1, 2], [1, 3], [9, -1]], np.float32)
    write_item_vectors(tmp_path / "items.npz", TRAIN.item_ids[1:], vectors)
    config = GraphConfig(graph=("knn",), vectors=tmp_path / "items.npz", knn_neighbors=1, knn_metric=metric)
    dense = build_graph(TRAIN, config).todense()
    assert dense[1].nonzero()[0].tolist() == [near_1]


def test_columns_of_attributes(tmp_path):
    file = tmp_path / "items.csv"
    file.write_text("number,genres,brand,item_id\n1,x,a,9\n3,y,a,8\n4,y,b,7\n")
    options = {"attributes": file, "attribute_item_column": "number", "attribute_column": "brand"}
    dense = build_graph(TRAIN, GraphConfig(graph=("attributes",), **options)).todense()
    assert {(i, j) for i, j in np.argwhere(dense) if i < j} == {(1, 3)}


def test_all_pairs_of_a_history_by_distance():
    """As far apart as a history of 50 is long."""
    data = Interactions.from_sequences([range(1, 51)])
    found = build_graph(data, GraphConfig(max_hops=49)).todense()
    place = np.arange(1, 51)
    np.testing.assert_allclose(
        found[1:, 1:][place[:, None] < place], 1 / (place - place[:, None])[np.triu_indices(50, 1)]
    )


def test_graphs_are_combined_normalised_and_weighted(attributes):
    config = GraphConfig(graph=("item-item", "attributes"), graph_weights=(1.0, 0.1), attributes=attributes)
    found = build_graph(TRAIN, config).todense()
    follows = build_graph(TRAIN, GraphConfig())
    shares = graph.from_edges([1], [5], num_nodes=6)
    expected = graph.normalize(follows).todense() + 0.1 * graph.normalize(shares).todense()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_items_join_users(attributes):
    """A graph of items beside one of users: users are isolated in the former."""
    config = GraphConfig(graph=("user-item", "attributes"), attributes=attributes)
    found = build_graph(TRAIN, config).todense()
    assert found.shape == (9, 9)
    assert found[3 + 1, 3 + 5] == 1


def test_a_graph_from_a_file(tmp_path):
    weights = graph.from_edges([1, 2], [4, 5], [2.0, 3.0], num_nodes=6)
    graph.save(tmp_path / "mine.npz", weights)
    found = build_graph(TRAIN, GraphConfig(graph=(str(tmp_path / "mine.npz"),)), num_special=2).todense()
    assert found.shape == (7, 7)
    assert (found[1, 4], found[5, 2]) == (2, 3)
    graph.save(tmp_path / "other.npz", graph.from_edges([1], [2], num_nodes=9))
    with pytest.raises(ValueError, match=r"other.npz has 9 nodes, but the item table has 6 rows"):
        build_graph(TRAIN, GraphConfig(graph=(str(tmp_path / "other.npz"),)))
    with pytest.raises(
        FileNotFoundError, match="none of item-item, shared-users, user-item, attributes, knn, and no file"
    ):
        build_graph(TRAIN, GraphConfig(graph=("itemitem",)))


def test_a_model_must_have_the_tables():
    config = make_config("sasrec", graph=("user-item",))
    with pytest.raises(ValueError, match="user-item needs a table of users, which sasrec does not have"):
        smoothed_nodes(TRAIN, config, Table({"items": (("item_embedding",),)}))
    assert smoothed_nodes(TRAIN, config, Table({})) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"graph": ()}, "graph must name one or more graphs, each once, got none"),
        ({"graph": ("item-item", "item-item")}, "each once"),
        ({"graph_weights": (1.0, 2.0)}, "graph_weights must hold one number for each of item-item, got 1.0 2.0"),
        ({"graph_weights": (-1.0,)}, "graph_weights must be at least 0, and not all 0"),
        ({"graph_weights": (0.0,)}, "graph_weights must be at least 0, and not all 0"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        make_config("sasrec", **options)


def test_the_attributes_must_be_given():
    with pytest.raises(ValueError, match="the graph of attributes needs --attributes"):
        build_graph(TRAIN, GraphConfig(graph=("attributes",)))


class Nested(Recommender):
    """A table in a part of its own, and an output kernel (dim, nodes) whose nodes are columns."""

    node_sets = {"items": (("inside/table",), ("out",))}  # noqa: RUF012
    node_axes = {"out": 1}  # noqa: RUF012

    def __init__(self):
        self.inside = nnx.Dict(table=nnx.Param(jnp.ones((6, 3))))
        self.out = nnx.Param(jax.random.normal(jax.random.key(0), (3, 6)))


@pytest.fixture
def nodes():
    return Nodes(build_graph(TRAIN, GraphConfig()), "items", Nested.node_sets["items"], Nested.node_axes)


def test_kernels_are_smoothed_along_their_columns(nodes):
    stages = make_stages("sevo-gradient", make_config("sasrec"), nodes)
    params = nnx.state(Nested(), nnx.Param)
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), params)
    for group, get in {"inside/table": lambda g: g["inside"]["table"], "out": lambda g: g["out"]}.items():
        stage = stages[f"sevo {group}"]
        smoothed, _ = stage.update(grads, stage.init(params), params)
        (before,), (after,) = (jax.tree.leaves(get(tree)) for tree in (grads, smoothed))
        if group == "out":
            before, after = before.T, after.T
        np.testing.assert_allclose(after, smooth(before, nodes.adjacency), rtol=1e-5, atol=1e-6)
    assert nodes.rows == ("inside/table",)
    updates, _ = optax.named_chain(*stages.items()).update(
        grads, optax.named_chain(*stages.items()).init(params), params
    )
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.parametrize("name", ["sevo-gradient", "sevo-adamw"])
def test_kernels_alone_have_no_idle_rows_to_correct(nodes, name):
    alone = dataclasses.replace(nodes, groups=(("out",),))
    params = {"out": jax.random.normal(jax.random.key(0), (3, 6))}
    grads = {"out": jax.random.normal(jax.random.key(1), (3, 6))}
    config = make_config("sasrec", learning_rate=0.1, weight_decay=0.0)
    tx = optax.named_chain(*make_stages(name, config, alone).items())
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    smoothed = {"sevo-gradient": grads["out"], "sevo-adamw": jnp.sign(grads["out"])}[name]  # of the first step
    expected = smooth(smoothed.T, nodes.adjacency, beta=config.beta).T
    expected = -0.1 * (jnp.sign(expected) if name == "sevo-gradient" else expected)
    np.testing.assert_allclose(updates["out"], expected, rtol=1e-4)


def test_items_that_share_no_users_have_no_edges():
    strangers = Interactions.from_sequences([[1], [2], [3]])
    assert graphs.shared_users(strangers, 5).nse == 0
    assert graphs.shared_users(strangers, 5).shape == (4, 4)


def test_diagnostics_of_nested_tables_and_kernels(nodes):
    class Feed:
        max_num_targets = None

        def shuffle(self, key):
            return self

        def batch(self, index):
            return Batch()

    class Batch:
        targets = users = jnp.zeros((2,), jnp.int32)

    class Trained(Nested):
        def encode(self, batch, represented=None, key=None, candidates=None):
            return Encoded(jnp.ones((2, 3)))

        def items(self, represented=None):
            return self.inside["table"][...] + self.out[...].T ** 2, jnp.zeros(6)

    from models.objectives.losses import Loss

    model = Trained()
    loss = Loss(lambda queries, items, sampler, key: jnp.sum(items[0] * jnp.arange(18.0).reshape(6, 3)))
    stages = make_stages("sevo-gradient", make_config("sasrec"), nodes)
    tx = optax.named_chain(*stages.items())
    graphdef, state = nnx.split(model)
    diagnose = make_diagnose(graphdef, stages, loss, nodes.groups, nodes.axes)
    report = diagnose(state, tx.init(state), Feed(), None, {}, nodes.adjacency, jax.random.key(0))
    raw = jnp.arange(18.0).reshape(6, 3)
    smoothed = smooth(raw, nodes.adjacency)
    expected = float(jnp.sum(raw * smoothed) / jnp.linalg.norm(raw) / jnp.linalg.norm(smoothed))
    assert float(report["inside/table/alignment"]) == pytest.approx(expected, rel=1e-5)
    assert float(report["out/raw update"]) > float(report["out/smoothed update"])


def test_a_graph_in_words():
    config = dataclasses.replace(GraphConfig(), graph=("item-item", "attributes"), max_hops=3)
    words = graphs.describe_graphs("mine", "train", config)
    assert words.startswith("mine: co-occurrence in training interactions, last 50, up to 3 hops")
    assert words.endswith("and items that share genres")
