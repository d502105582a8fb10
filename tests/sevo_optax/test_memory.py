"""Graphs that do not fit are refused before anything is allocated, with an estimate that is about right."""

import os
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from sevo_optax import _memory, _weights, graph, sevo, smooth
from sevo_optax.graph import _build, _files, _matrices, _reshape

GIB = 2**30


@pytest.fixture
def tiny(monkeypatch):
    """A machine with 1,000 bytes left, on which every need is looked at."""
    monkeypatch.setattr(_memory, "_SMALL", 0)
    monkeypatch.setattr(_memory, "available_memory", lambda: 1000)


def random_edges(nodes=3000, edges=40_000):
    return np.random.default_rng(0).integers(nodes, size=(2, edges))


WEIGHTS = graph.from_edges(*random_edges(50, 200), num_nodes=50)

CALLS = {
    "from_edges": lambda: graph.from_edges(*random_edges(), num_nodes=3000),
    "cooccurrence": lambda: graph.cooccurrence(random_edges(), num_nodes=3000),
    "user_item": lambda: graph.user_item(*random_edges(), 3000, 3000),
    "shared_attributes": lambda: graph.shared_attributes(np.arange(50), np.arange(50) % 2, num_nodes=50),
    "from_scipy": lambda: graph.from_scipy(scipy.sparse.eye_array(1000)),
    "combine": lambda: graph.combine([WEIGHTS, WEIGHTS]),
    "top_k": lambda: graph.top_k(WEIGHTS, 1),
    "dense": lambda: graph.normalize(np.ones((50, 50))),
    "dense, half precision": lambda: smooth(np.ones((50, 1), np.float32), jnp.ones((50, 50), jnp.bfloat16)),
    "sevo": lambda: sevo(WEIGHTS),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_too_large_a_graph_is_refused_in_one_line(tiny, call):
    with pytest.raises(ValueError, match=r"needs about \d+\.\d GiB of memory, but only 0\.0 GiB are free\. ") as error:
        call()
    assert "\n" not in str(error.value)
    # Who waits for memory to run out learns it too.
    assert isinstance(error.value, MemoryError)


def test_file_that_does_not_fit_is_not_called_damaged(tmp_path, monkeypatch):
    path = tmp_path / "graph.npz"
    graph.save(path, WEIGHTS)
    monkeypatch.setattr(_memory, "_SMALL", 0)
    for fitting in (0, 1):  # how many steps fit, of reading the file and preparing what it holds
        rooms = iter([GIB] * fitting + [0])
        monkeypatch.setattr(_memory, "available_memory", lambda rooms=rooms: next(rooms))
        with pytest.raises(ValueError, match=r"needs about") as error:
            graph.load(path)
        assert "holds no graph" not in str(error.value)


@pytest.mark.parametrize(
    "build",
    [
        lambda n: graph.from_edges([0], [1], num_nodes=n),
        lambda n: graph.cooccurrence([[0, 1]], num_nodes=n),
        lambda n: graph.user_item([0], [1], n - 5, 5),
    ],
)
def test_row_pointers_alone_may_be_too_much(monkeypatch, build):
    monkeypatch.setattr(_memory, "available_memory", lambda: 16 * GIB)
    with pytest.raises(ValueError, match=r"2147483647 nodes.* needs about (48|56)\.\d GiB.* 16\.0 GiB .*0 to n-1"):
        build(2**31 - 1)


def test_shared_attributes_are_estimated_from_a_sample(monkeypatch):
    rng = np.random.default_rng(0)
    nodes, attributes = rng.integers(4000, size=30_000), (40 * rng.random(30_000) ** 2).astype(int)
    built = graph.shared_attributes(nodes, attributes, num_nodes=4000)
    incidence = scipy.sparse.csr_array((np.ones(nodes.size), (nodes, attributes)))
    incidence.sum_duplicates()
    sharing = np.bincount(incidence.indices)
    monkeypatch.setattr(_matrices, "CHUNK", 1000)
    assert _build._estimate_shared(incidence, sharing) == pytest.approx(built.nse, rel=0.05)
    assert np.square(sharing).sum() > 1.2 * built.nse  # what no sample would have said
    monkeypatch.setattr(_memory, "_SMALL", 0)
    monkeypatch.setattr(_memory, "available_memory", lambda: 30 * built.nse)
    most = int(sharing.argmax())
    with pytest.raises(
        ValueError, match=rf"shared attributes needs .* Leave out .* such as {most} of {sharing[most]} n"
    ):
        graph.shared_attributes(nodes, attributes, num_nodes=4000)


def test_an_attribute_that_many_share_is_seen_without_a_sample(monkeypatch):
    """Two nodes of a thousand: the 256 that are counted have none of them more often than one."""
    nodes = np.arange(500_000)
    incidence = scipy.sparse.csr_array((np.ones(nodes.size), (nodes, np.where(nodes < 1000, 0, nodes))))
    monkeypatch.setattr(_matrices, "CHUNK", 1000)
    assert _build._estimate_shared(incidence, np.bincount(incidence.indices)) >= 1000**2


@pytest.mark.parametrize(
    "build",
    [
        lambda: graph.from_edges(*random_edges(2000, 400_000), num_nodes=2000),
        lambda: graph.user_item(*random_edges(2000, 400_000), 2000, 2000),
        lambda: graph.cooccurrence(random_edges(2000, 300_000), num_nodes=2000),
        lambda: graph.shared_attributes(np.arange(3000), np.arange(3000) % 4, num_nodes=3000),
        lambda: graph.normalize(np.ones((1000, 1000))),
    ],
    ids=["from_edges", "user_item", "cooccurrence", "shared_attributes", "dense"],
)
def test_estimate_is_about_the_peak(monkeypatch, build):
    """Not far above what is allocated, so that nothing is refused that fits, and not far below."""
    needs = []
    for module in (_matrices, _build, _reshape, _files, _weights):
        monkeypatch.setattr(module, "require_memory", lambda needed, *_: needs.append(needed))
    build()
    tracemalloc.start()
    build()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The arrays of JAX are not seen here: a third of all where the BCOO makes the peak.
    assert 0.3 * peak < max(needs) < 1.5 * peak


def test_nothing_is_asked_for_small_graphs(monkeypatch):
    monkeypatch.setattr(_memory, "available_memory", lambda: pytest.fail("asked"))
    graph.normalize(WEIGHTS)


def test_available_memory_is_that_of_the_machine():
    room = _memory.available_memory()
    assert room is None or 0 < room <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_the_tightest_limit_counts(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(_memory, "_system", lambda: 8 * GIB)
    monkeypatch.setattr(_memory, "_container", lambda: None)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert _memory.available_memory() == 8 * GIB
    monkeypatch.setattr(_memory, "_container", lambda: 4 * GIB)
    assert _memory.available_memory() == 4 * GIB
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2 * GIB, 2 * GIB))
    assert _memory.available_memory() < 2 * GIB


def test_a_container_leaves_its_limit_less_what_it_uses(monkeypatch):
    root = Path("/sys/fs/cgroup")
    numbers = {root / "memory.max": 4 * GIB, root / "memory.current": 3 * GIB}
    monkeypatch.setattr(_memory, "_number", numbers.get)
    monkeypatch.setattr(_memory, "_file_cache", lambda path: GIB)  # is given back on demand
    assert _memory._container() == 2 * GIB
    numbers.clear()
    assert _memory._container() is None


@pytest.mark.parametrize(
    ("lines", "group"),
    [
        ("0::/slurm/job_1/step_0\n", "/sys/fs/cgroup/slurm/job_1"),
        ("5:cpu,memory:/slurm/job_1\n0::/\n", "/sys/fs/cgroup/memory/slurm/job_1"),
        ("0::/../outside\n", "/sys/fs/cgroup"),
    ],
)
def test_a_group_above_its_own_may_limit_a_process(monkeypatch, lines, group):
    monkeypatch.setattr(Path, "read_text", lambda path: lines if str(path) == "/proc/self/cgroup" else missing(path))
    monkeypatch.setattr(_memory, "_file_cache", lambda path: 0)
    version = (
        ["memory.limit_in_bytes", "memory.usage_in_bytes"] if "/memory/" in group else ["memory.max", "memory.current"]
    )
    numbers = dict(zip([Path(group, name) for name in version], [3 * GIB, GIB], strict=True))
    monkeypatch.setattr(_memory, "_number", numbers.get)
    assert _memory._container() == 2 * GIB


def missing(path):
    raise FileNotFoundError(path)
