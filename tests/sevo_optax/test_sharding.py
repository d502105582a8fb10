"""Several devices: shardings chosen by the compiler and shardings that are part of the types."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.sparse
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sevo_optax import _sharded, _shards, graph, sevo, smooth
from tests.sevo_optax import reference


def test_explicit_mesh_of_one_device():
    """The code path of many devices, where it can be seen by a debugger."""
    rng = np.random.default_rng(0)
    weights = reference.random_weights(rng, 12)
    x = rng.normal(size=(12, 4)).astype(np.float32)
    mesh = jax.make_mesh((1,), ("a",), axis_types=(AxisType.Explicit,))
    for spec in (P("a", None), P(None, "a")):
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        tx = sevo(weights)
        for update in (tx.update, jax.jit(tx.update)):
            updates, _ = update(placed, tx.init(x))
            assert updates.sharding == placed.sharding
            # Another program may add in another order, and terms of size one cancel.
            np.testing.assert_allclose(updates, smooth(x, weights), rtol=1e-6, atol=1e-7)
        text = jax.jit(tx.update).lower(placed, tx.init(x)).as_text()
        assert "csr_sparse_dense" in text


def test_graph_sharding_refuses_what_it_cannot_split():
    weights = np.ones((4, 4))
    mesh = jax.make_mesh((1, 1), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, P("a"))
    for sharding in (P("a"), "a", mesh):
        with pytest.raises(TypeError, match=r"graph_sharding is a .*; wanted a jax.sharding.NamedSharding"):
            sevo(weights, graph_sharding=sharding)
    for spec in (P(), P(None, "a"), P("a", "b")):
        with pytest.raises(ValueError, match="wanted its rows alone, over one axis of the mesh or a tuple of them"):
            sevo(weights, graph_sharding=NamedSharding(mesh, spec))
    shards = graph.shard(weights, 2)
    with pytest.raises(ValueError, match="split into 2 shards, but graph_sharding is None"):
        sevo(shards)
    with pytest.raises(TypeError, match="wanted the whole graph"):
        smooth(np.ones((4, 1)), shards)
    with pytest.raises(ValueError, match="num_shards is 0"):
        graph.shard(weights, 0)
    if jax.__version_info__ < (0, 10):
        with pytest.raises(ValueError, match="graph_sharding needs JAX"):
            sevo(weights, graph_sharding=rows)
        return
    with pytest.raises(ValueError, match="method='exact' does not work with graph_sharding"):
        sevo(weights, method="exact", graph_sharding=rows)
    with pytest.raises(
        ValueError, match=r"2 shards, but graph_sharding splits a graph over 1 devices; .* num_shards=1"
    ):
        sevo(shards, graph_sharding=rows)
    with pytest.raises(ValueError, match="the weights of node 0 add up to infinity"):
        sevo(np.full((4, 4), 1e308), graph_sharding=rows).init(np.ones((4, 1), np.float32))
    whole, split = sevo(weights), sevo(weights, graph_sharding=rows)
    x = np.ones((4, 1), np.float32)
    with pytest.raises(ValueError, match="holds a whole graph, but graph_sharding asks for 1 shards of 4 rows"):
        split.update(x, whole.init(x))
    with pytest.raises(ValueError, match="a graph split over 1 devices, but graph_sharding is None"):
        whole.update(x, split.init(x))


@pytest.mark.parametrize("tables", [(13,), (7, 1, 5), (2, 11)])
def test_plans_of_shards_rebuild_the_product(tables):
    """Each shard plans alone, and what it expects to receive is what the others plan to send."""
    rng = np.random.default_rng(3)
    num_nodes, num_shards = sum(tables), 4
    weights = scipy.sparse.csr_array(np.round(reference.random_weights(rng, num_nodes, 0.2), 3))
    x = rng.normal(size=(num_nodes, 2))
    layout = _shards.Layout(tables, num_shards)
    shards = graph.shard(weights, num_shards)
    rows = [shards.read(layout.ranges(k)) for k in range(num_shards)]
    measured = [_shards.measure(part, layout, k) for k, part in enumerate(rows)]
    degree = np.zeros(num_nodes)
    for k, (own, _, _) in enumerate(measured):
        degree[layout.nodes(k)] = own
    np.testing.assert_allclose(degree, weights.sum(axis=1))
    assert sum(entries for _, entries, _ in measured) == weights.nnz
    room = max(exchanged for _, _, exchanged in measured)
    plans = [_shards.plan(part, layout, k, room, degree) for k, part in enumerate(rows)]
    owner, row = layout.place(np.arange(num_nodes))
    tables_of = np.zeros((num_shards, layout.rows, 2))
    tables_of[owner, row] = x
    expected = reference.normalize(weights.toarray()) @ x
    for k, plan in enumerate(plans):
        received = [tables_of[q][plans[q].send[k]] for q in range(num_shards)]
        operand = np.concatenate([tables_of[k], *received])
        matrix = scipy.sparse.csr_array((plan.data, plan.indices, plan.indptr), shape=(layout.rows, len(operand)))
        np.testing.assert_allclose((matrix @ operand)[row[owner == k]], expected[owner == k], rtol=1e-12)


def test_processes_tell_each_other_numbers_of_64_bits(monkeypatch):
    """JAX itself would round what it carries to 32 bits."""
    for mine, theirs in (([1 + 1e-12, 0.0], [0.0, 2 + 1e-12]), ([2**40, 0], [0, 2**33 + 1])):
        other = np.array(theirs).view(np.uint32)
        monkeypatch.setattr(multihost_utils, "process_allgather", lambda words, other=other: np.stack([words, other]))
        np.testing.assert_array_equal(_sharded._largest_of_processes(np.array(mine)), np.maximum(mine, theirs))


def test_shards_are_a_sequence_of_rows():
    weights = reference.random_weights(np.random.default_rng(0), 10)
    shards = graph.shard(weights, 4)
    assert [part.shape for part in shards] == [(3, 10), (3, 10), (3, 10), (1, 10)]
    np.testing.assert_array_equal(np.concatenate([part.toarray() for part in shards]), weights)
    np.testing.assert_array_equal(shards[-1].toarray(), shards[1:][2].toarray())
    with pytest.raises(IndexError, match="shard 4 of 4"):
        shards[4]
    alone = graph.shard(np.zeros((3, 3)), 2).summary()
    assert alone == (2, 2, 0, 1.0, 0)
    assert alone.bytes_held() == 12


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="tables that are split over several devices need JAX 0.10 or later"
)
def test_on_four_devices():
    """In a process of its own, since the number of devices is fixed when JAX starts."""
    process = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.sevo_optax.sharded_checks"],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4",
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stderr
