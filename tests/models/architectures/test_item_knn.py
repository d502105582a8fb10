import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.architectures import item_knn
from models.architectures.item_knn import ItemKNN, ItemKNNConfig, nearest_items
from models.architectures.registry import make_config, make_model
from models.data import Interactions, drifting_interests
from models.feeds import pack

MAX_LENGTH = 5


@pytest.fixture(scope="module")
def interactions():
    """With repeated items, users that end in the middle of a row, and items that nobody has."""
    made = drifting_interests(num_users=40, num_items=30, num_groups=4, mean_length=7, seed=1)
    sequences = [[*sequence.tolist(), sequence[0], sequence[0]] for sequence in made]
    return Interactions.from_sequences(sequences, num_items=34)


def cosines(interactions):
    """Cosines of all pairs of different items, pair by pair."""
    owners = [{u for u, items in enumerate(interactions) if item in items} for item in range(35)]
    found = np.zeros((35, 35))
    for i in range(1, 35):
        for j in range(1, 35):
            common = len(owners[i] & owners[j])
            if i != j and common:
                found[i, j] = common / (len(owners[i]) * len(owners[j])) ** 0.5
    return found


def kept(interactions, num_neighbors):
    """The cosines of each item with its neighbours, of equal ones the smaller numbers; 0 elsewhere."""
    found = cosines(interactions)
    for row in found:
        order = sorted(range(35), key=lambda j, row=row: (-row[j], j))
        row[order[num_neighbors:]] = 0
    return found


def fitted(interactions, **options):
    config = make_config("item-knn", max_length=MAX_LENGTH, **options)
    model = make_model(config, num_users=interactions.num_users, num_items=34, seed=0)
    model.fit(interactions, config)
    return model


@pytest.mark.parametrize("num_neighbors", [1, 4, 34])
@pytest.mark.parametrize("pairs_at_once", [1, 60, 10**6])
def test_neighbours(interactions, num_neighbors, pairs_at_once):
    neighbors, similarities = nearest_items(interactions, num_neighbors, pairs_at_once=pairs_at_once)
    assert neighbors.shape == similarities.shape == (35, num_neighbors)
    dense = np.zeros((35, 35))
    np.put_along_axis(dense, neighbors, similarities, axis=1)
    np.testing.assert_allclose(dense, kept(interactions, num_neighbors), rtol=1e-12)
    assert (np.diff(similarities, axis=1) <= 0).all()
    assert not neighbors[similarities == 0].any()


def test_no_part_counts_more_pairs_than_it_may():
    sizes = np.array([3, 1, 4, 1, 5, 9, 2, 6])
    parts = item_knn._parts(sizes, 7)
    assert [stop for _, stop in parts[:-1]] == [start for start, _ in parts[1:]]
    assert (parts[0][0], parts[-1][1]) == (0, len(sizes))
    assert all(sizes[a:b].sum() <= 7 or b == a + 1 for a, b in parts)
    assert parts == [(0, 2), (2, 4), (4, 5), (5, 6), (6, 7), (7, 8)]


def test_items_with_the_same_attributes(interactions, tmp_path):
    """Which finds those that nobody has interacted with."""
    table = tmp_path / "items.tsv"
    table.write_text("item_id\tgenres\n1\tDrama|War\n34\tWar\n3\tComedy\n99\tWar\n5\tWar|Drama\n")
    model = fitted(interactions, similarity="attributes", attributes=table, num_neighbors=5)
    rows = {1: {5: 1, 34: 0.5**0.5}, 5: {1: 1, 34: 0.5**0.5}, 34: {1: 0.5**0.5, 5: 0.5**0.5}}
    for item in range(35):
        found = dict(zip(model.neighbors[item].tolist(), model.similarities[item].tolist(), strict=True))
        assert {x: s for x, s in found.items() if s} == pytest.approx(rows.get(item, {}))
    with pytest.raises(ValueError, match="attributes is not heeded by similarity users, got "):
        make_config("item-knn", attributes=table)


def test_a_query_is_the_history_up_to_a_token(interactions):
    """Whoever shares the row, and whatever comes later."""
    model = fitted(interactions)
    batch = pack(interactions, max_length=20, batch_size=100, with_targets=False).shuffle(jax.random.key(5)).batch(0)
    vectors = np.asarray(jax.jit(model.encode)(batch, None).vectors)
    assert vectors.shape == (*batch.inputs.shape, MAX_LENGTH)
    assert vectors.dtype == np.int32
    assert max(len(np.unique(row[row > 0])) for row in np.asarray(batch.segments)) > 1
    for user, sequence in enumerate(interactions):
        row, places = np.nonzero((np.asarray(batch.users) == user) & (np.asarray(batch.segments) > 0))
        window = sequence[-20:].tolist()
        for i, (r, place) in enumerate(zip(row, places, strict=True)):
            history = window[: i + 1][-MAX_LENGTH:]
            assert vectors[r, place].tolist() == [0] * (MAX_LENGTH - len(history)) + history
    assert not vectors[np.asarray(batch.segments) == 0].any()


def test_scores_are_sums_of_similarities(interactions):
    model = fitted(interactions, num_neighbors=4)
    similarity = kept(interactions, 4)
    histories = [[1, 2, 3, 4, 5], [0, 0, 0, 9, 9], [7, 0, 7, 8, 7], [0, 0, 0, 0, 33]]
    scores = np.asarray(model.scores(jnp.array(histories), None))
    for row, history in zip(scores, histories, strict=True):
        expected = sum(similarity[item] for item in set(history) if item)
        np.testing.assert_allclose(row[1:], np.broadcast_to(expected, 35)[1:], rtol=1e-5, atol=1e-7)
    assert (scores[0] > 0).any()


def test_no_array_is_larger_than_the_scores_of_a_chunk(interactions):
    model = fitted(interactions, num_neighbors=4)
    graphdef, state = nnx.split(model)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars if hasattr(variable.aval, "size"))
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)

    traced = jax.make_jaxpr(lambda state, h: nnx.merge(graphdef, state).scores(h, None))
    found = traced(state, jnp.ones((20, MAX_LENGTH), jnp.int32))
    assert max(sizes(found.jaxpr)) == 20 * 35


def test_the_state_is_no_parameter(interactions):
    model = fitted(interactions, num_neighbors=4)
    assert not jax.tree.leaves(nnx.state(model, nnx.Param))
    assert [leaf.shape for leaf in jax.tree.leaves(nnx.state(model))] == [(35, 4)] * 2
    assert not model.node_sets


def test_more_neighbours_than_there_are_items():
    interactions = Interactions.from_sequences([[1, 2], [2, 3]])
    model = ItemKNN(3, num_neighbors=50)
    model.fit(interactions, ItemKNNConfig())
    assert model.neighbors[...].tolist() == [[0, 0], [2, 0], [1, 3], [2, 0]]
    alone = ItemKNN(1)
    alone.fit(Interactions.from_sequences([[1]]), ItemKNNConfig())
    assert alone.scores(jnp.array([[1]]), None).tolist() == [[0.0, 0.0]]


def test_what_it_cannot_do(interactions):
    model = fitted(interactions)
    batch = pack(interactions, max_length=9, batch_size=100).batch(0)
    with pytest.raises(ValueError, match="candidates must be None: item-knn is not trained"):
        model.encode(batch, None, candidates=batch.targets)
    with pytest.raises(ValueError, match="item-knn has no item table"):
        model.items(None)
    for name in ("num_neighbors", "max_length"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            make_config("item-knn", **{name: 0})
