"""How fast is the smoothing series, next to every other way to multiply a sparse matrix?

    python benchmarks/propagation.py                                  # a synthetic graph of the size of Beauty
    python benchmarks/propagation.py --data beauty.txt ml-1m.txt      # one user a line: user item item ...
    python benchmarks/propagation.py --nodes 1000000 --edges 10000000

All backends take turns within a round, in random order, and ratios are medians over the rounds, so that whatever else
the machine does hits all of them alike. Times are those of the whole series (Eq. 7).
"""

import argparse
import importlib.util
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.experimental import sparse

from sevo_optax import _propagate, _weights, graph

BETA = 0.99
OURS = "sevo_optax"


def read_weights(path: Path) -> sparse.BCOO:
    """The graph of the training part: the last two items of every user are for validation and test."""
    users = [np.array(line.split()[1:], np.int64) for line in path.read_text().splitlines()]
    return graph.cooccurrence([items[:-2] for items in users], num_nodes=1 + int(max(map(np.max, users))))


def synthetic_sequences(num_users: int = 22_363, num_items: int = 12_101, mean_length: float = 6.9) -> list[np.ndarray]:
    """As many users, items and training clicks as Beauty has, popularity by Zipf's law."""
    rng = np.random.default_rng(0)
    lengths = 3 + rng.geometric(1 / (mean_length - 2), num_users) - 1
    popularity = 1 / np.arange(10, 10 + num_items)
    items = rng.choice(num_items, lengths.sum(), p=popularity / popularity.sum()) + 1
    return np.split(items, np.cumsum(lengths)[:-1])


def random_weights(nodes: int, edges: int) -> sparse.BCOO:
    """About ``edges`` stored entries, half as many undirected edges."""
    rng = np.random.default_rng(0)
    ends = rng.integers(nodes, size=(2, edges // 2))
    return graph.from_edges(*ends[:, ends[0] != ends[1]], num_nodes=nodes)


def backends(csr: scipy.sparse.csr_array, num_layers: int) -> dict[str, Callable[[Any], Any]]:
    """For each backend a function that runs the series on a host matrix already converted by ``prepare``."""
    device = _propagate.to_device(csr, jnp.float32)
    bcoo = _weights.to_bcoo(csr)

    def series(product: Callable, x: Any) -> Any:
        total = x
        for _ in range(num_layers):
            total = x + BETA * product(total)
        return total * ((1 - BETA) / (1 - BETA ** (num_layers + 1)))

    def compiled(product: Callable, *matrix: Any) -> Callable[[Any], Any]:
        run = jax.jit(lambda x, *matrix: series(partial(product, *matrix), x))
        return lambda x: run(x, *matrix).block_until_ready()

    ours = jax.jit(lambda x, csr: _propagate.series(csr, x, BETA, num_layers, "neumann", True))
    single = csr.astype(np.float32)
    out = {
        OURS: lambda x: ours(x, device).block_until_ready(),
        "BCOO": compiled(lambda matrix, x: matrix @ x, bcoo),
        "gather + segment_sum": compiled(_propagate._segment_kernel, *device),
        "scipy CSR": lambda x: series(single.__matmul__, x),
    }
    if importlib.util.find_spec("torch"):
        # Else the idle threads of OpenMP spin through the turn of the next backend.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import warnings

        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its CSR support a beta
            matrix = torch.sparse_csr_tensor(
                torch.from_numpy(single.indptr.astype(np.int64)),
                torch.from_numpy(single.indices.astype(np.int64)),
                torch.from_numpy(single.data),
                single.shape,
            )
        out["torch CSR"] = lambda x: series(matrix.__matmul__, x)
    return out


def convert(name: str, x: np.ndarray) -> Any:
    if name == "scipy CSR":
        return x
    if name == "torch CSR":
        import torch

        return torch.from_numpy(x)
    return jnp.asarray(x)


def interleave(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Times of every call, one of each a round, after one round that compiles."""
    order = list(calls)
    shuffle = random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 5:
        shuffle(order)
        for name in order:
            call = calls[name]
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(numerator: list[float], denominator: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def report(name: str, weights: sparse.BCOO, dim: int, num_layers: int, seconds: float) -> None:
    csr = _weights.normalize_csr(_weights.symmetric_csr(weights))
    nodes, edges = csr.shape[0], csr.nnz
    x = np.random.default_rng(0).normal(size=(nodes, dim)).astype(np.float32)
    runs = backends(csr, num_layers)
    inputs = {backend: convert(backend, x) for backend in runs}
    times = interleave({backend: partial(run, inputs[backend]) for backend, run in runs.items()}, seconds)

    # Needed: the matrix, the operand and the result, each once a layer. Moved: one row of the operand for each entry,
    # and the update of the sum, which reads x and the product and writes the total.
    table = 4 * nodes * dim
    matrix = 8 * edges + 4 * (nodes + 1)
    needed = num_layers * (matrix + 2 * table)
    moved = num_layers * (matrix + 4 * edges * dim + 4 * table)

    rounds = len(times[OURS])
    print(f"\n{name}: {nodes:,} nodes, {edges:,} entries, dim {dim}, {num_layers} layers, {rounds} rounds")
    print(f"bytes moved over bytes needed: {moved / needed:.1f} ({moved / 1e6:.0f} MB over {needed / 1e6:.0f} MB)")
    print("| backend | median ms | time over ours | GB/s moved |")
    print("|---|---|---|---|")
    for backend, series in times.items():
        median = statistics.median(series)
        print(
            f"| {backend} | {1e3 * median:.1f} | {ratio(series, times[OURS]):.2f} | {moved / median / 1e9:.1f} |",
            flush=True,
        )


def report_batches(name: str, weights: sparse.BCOO, dim: int, num_layers: int, seconds: float, batch: int = 4) -> None:
    """What ``vmap`` costs over folding columns by hand, and bfloat16 over float32 and its two casts."""
    csr = _propagate.prepare(weights, jnp.float32, normalize=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, csr.indptr.shape[0] - 1, dim)), jnp.float32)
    folded = jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)
    half = folded.astype(jnp.bfloat16)

    @jax.jit
    def run(x: jax.Array, csr: Any) -> jax.Array:
        return _propagate.series(csr, x, BETA, num_layers, "neumann", True)

    @jax.jit
    def cast(x: jax.Array, csr: Any) -> jax.Array:
        return run(x.astype(jnp.float32), csr).astype(x.dtype)

    to_float = jax.jit(lambda x: x.astype(jnp.float32))
    to_half = jax.jit(lambda x: x.astype(jnp.bfloat16))
    batched = jax.jit(jax.vmap(run, in_axes=(0, None)))
    # As tables are stored, with the batch in front: folding by hand then means moving it to the columns and back.
    by_hand = jax.jit(
        lambda x, csr: jnp.moveaxis(
            run(jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1), csr).reshape(x.shape[1], batch, -1), 1, 0
        )
    )
    from sevo_optax import sevo

    tx = sevo(weights)
    state = tx.init(half)
    transform = jax.jit(lambda x, state: tx.update(x, state)[0])
    times = interleave(
        {
            "vmap": lambda: batched(x, csr).block_until_ready(),
            "by hand": lambda: by_hand(x, csr).block_until_ready(),
            "folded": lambda: run(folded, csr).block_until_ready(),
            "bfloat16": lambda: transform(half, state).block_until_ready(),
            "float32 + casts": lambda: to_half(run(to_float(half), csr)).block_until_ready(),
        },
        seconds,
    )
    print(f"\n{name}: {batch} tables of dim {dim}")
    print(f"vmap over columns folded by hand, moving the axes: {ratio(times['vmap'], times['by hand']):.2f}")
    print(f"vmap over columns stored side by side:             {ratio(times['vmap'], times['folded']):.2f}")
    print(
        f"bfloat16 over float32 and two casts:               {ratio(times['bfloat16'], times['float32 + casts']):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="interactions, one user a line")
    parser.add_argument("--nodes", type=int, help="nodes of a random graph")
    parser.add_argument("--edges", type=int, help="stored entries of the random graph (20 a node unless given)")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15, help="time for each table")
    args = parser.parse_args()

    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.device_kind} ({platform.machine()}), scipy {scipy.__version__}")
    graphs: dict[str, Callable[[], sparse.BCOO]] = {}
    for path in args.data:
        graphs[path.stem] = partial(read_weights, path)
    if args.nodes:
        graphs["random"] = lambda: random_weights(args.nodes, args.edges or 20 * args.nodes)
    if not graphs:
        graphs["synthetic"] = lambda: graph.cooccurrence(synthetic_sequences(), num_nodes=12_102)
    for name, make in graphs.items():
        weights = make()
        report(name, weights, args.dim, args.layers, args.seconds)
        if name != "random":
            report_batches(name, weights, args.dim, args.layers, args.seconds)


if __name__ == "__main__":
    main()
