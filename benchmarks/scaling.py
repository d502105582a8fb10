"""What does a step cost on many devices, and what does it cost on one when the table is large?

    python benchmarks/scaling.py              # collectives and bytes a step, of compiled programs and by formula
    python benchmarks/scaling.py --model      # the formulas at 10 million and a billion nodes, on named accelerators
    python benchmarks/scaling.py --rows       # a step at a million nodes and at 10 million on this machine

The first two need no more than a laptop. The devices of the first are virtual ones of the CPU: what programs send is
the same on any, how long that takes is not, hence the formulas. `--rows` times the parts of a step next to a sum of two
tables in place and to reading random rows, in turns, and gives shares of what these two reach. Seconds are those of
all cores together, the best of all rounds, so that other work on the machine disturbs them little. Neighbours are
anywhere ("far") or at most 1,000 rows away ("near").
"""

import argparse
import dataclasses
import math
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

if __name__ == "__main__" and "--rows" not in sys.argv:  # before JAX starts
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tabulate
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sevo_optax import _propagate, graph, scale_by_adam_corrected, sevo_adamw

# Which axis of the table is split, and whether the rows of the graph are: "both" splits the graph and the rows of the
# table over some devices, and columns over others.
LAYOUTS = ("columns", "rows", "graph rows", "both")


# ---------------------------------------------------------------- the cost model


@dataclasses.dataclass(frozen=True)
class Problem:
    """A table, its graph and the devices that share them."""

    nodes: int
    entries_per_node: int = 10
    dim: int = 64
    num_layers: int = 3
    itemsize: int = 4
    away: float = 1.0  # share of the entries whose column any other device may own, evenly; the rest stay at home

    @property
    def entries(self) -> int:
        """Stored entries of the graph."""
        return self.nodes * self.entries_per_node

    @property
    def table(self) -> int:
        """Bytes of the table."""
        return self.nodes * self.dim * self.itemsize

    def exchanged(self, devices: int) -> float:
        """H, how many rows a device needs of one other, if entries that leave a device are spread evenly."""
        return self.nodes / devices * (1 - (1 - self.away / devices) ** self.entries_per_node)

    def flags(self, shards: int, columns: int) -> float:
        """Bytes that a device sends to agree on idle rows: a flag for each of its rows, all-reduced over columns."""
        return 2 * (columns - 1) / columns * self.nodes / shards

    def halo(self, shards: int, columns: int, exchanged: float | None = None) -> float:
        """Bytes that a device sends in all layers, where the graph is split over ``shards``."""
        if shards == 1:
            return 0.0
        exchanged = self.exchanged(shards) if exchanged is None else exchanged
        return self.num_layers * (shards - 1) * exchanged * self.dim / columns * self.itemsize

    def sent(self, layout: str, shards: int, columns: int, exchanged: float | None = None) -> float:
        """Bytes that a device sends in a step of ``sevo_adamw``; a graph is split over ``shards``, 1 if it is whole."""
        if layout == "rows":  # the direction, to columns and back
            return 2 * (columns - 1) / columns * self.table / columns
        return self.flags(shards, columns) + self.halo(shards, columns, exchanged)

    def held(self, shards: int, columns: int) -> float:
        """Bytes that a device holds: parameters, gradients, two moments, one temporary table, and the graph."""
        graph_bytes = (4 + self.itemsize) * self.entries + 4 * self.nodes
        received = 0.0 if shards == 1 else shards * self.exchanged(shards)
        tables = 5 * self.table / (shards * columns)
        return tables + graph_bytes / shards + received * (2 * self.dim / columns * self.itemsize + 4)

    def moved(self, shards: int, columns: int, line: int) -> dict[str, float]:
        """Bytes between a device and its memory, which moves lines of ``line`` bytes: a lower bound.

        Moments: the gradient twice (once to see which rows are idle), both moments in and out, the direction out.
        Update: parameters in and out, the direction in. A layer: every entry and the row that it points to, the product
        out, and the sum of the series: two tables in, one out.
        """
        share = self.table / (shards * columns)
        row = self.dim / columns * self.itemsize
        gathered = math.ceil(row / line) * line
        layer = self.entries / shards * (4 + self.itemsize + gathered) + 4 * share
        if shards > 1:  # rows to send are read and written, received ones written, read and written behind the own
            layer += shards * self.exchanged(shards) * (gathered + 4 * row) + 2 * share
        return {"smoothing": self.num_layers * layer, "moments": 7 * share, "update": 3 * share}


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """Bandwidths in bytes a second, one way."""

    name: str
    memory: float  # bytes
    bandwidth: float
    line: int
    domain: int  # devices that reach each other directly
    link: float  # of a device within its domain, or of one link of a torus
    network: float = 0.0  # of a domain to all others
    torus: int = 0  # dimensions, 0 for a switch

    def exchange(self, sent: float, devices: int) -> float | None:
        """Seconds of an all-to-all in which every device sends ``sent`` bytes; None if there are no such systems."""
        if devices == 1:
            return 0.0
        if self.torus:
            # Half of what half of the devices send crosses the middle, over 2 links for each line along the longest
            # side k: sent · k / (8 · link).
            if devices > self.domain:
                return None
            side = 2 ** math.ceil(math.log2(devices) / self.torus)
            return sent * max(side, 2) / (8 * self.link)
        inside = min(devices, self.domain) - 1
        outside = devices - 1 - inside
        within = sent * inside / (devices - 1) / self.link
        if not outside:
            return within
        return max(within, sent * outside / (devices - 1) * self.domain / self.network)


ACCELERATORS = (
    Accelerator("H100 SXM", 80e9, 3.35e12, 32, domain=8, link=450e9, network=50e9),
    Accelerator("H100 SXM, 8 ports a node", 80e9, 3.35e12, 32, domain=8, link=450e9, network=400e9),
    Accelerator("TPU v5e", 16e9, 8.1e11, 512, domain=256, link=45e9, torus=2),
    Accelerator("TPU v5p", 95e9, 2.77e12, 512, domain=8960, link=90e9, torus=3),
)


def splits(layout: str, devices: int) -> list[tuple[int, int]]:
    """Over how many devices a layout may split the graph, and the columns."""
    if layout in ("columns", "rows"):
        return [(1, devices)]
    if layout == "graph rows":
        return [(devices, 1)]
    return [(shards, devices // shards) for shards in (2**k for k in range(1, 12)) if devices // shards > 1]


def cost(problem: Problem, layout: str, shards: int, columns: int, on: Accelerator) -> tuple[float, float] | str:
    """Milliseconds of memory and of exchange; or why there is no such step."""
    devices = shards * columns
    if columns > problem.dim:
        # Rows that are exchanged for columns leave devices without any; then all hold all columns.
        return f"{problem.dim} columns"
    if layout == "both":  # those that share the graph are next to each other
        parts = on.exchange(problem.halo(shards, columns), shards), on.exchange(problem.flags(shards, columns), devices)
    else:
        parts = on.exchange(problem.sent(layout, shards, columns), devices), on.exchange(0.0, devices)
    if parts[0] is None or parts[1] is None:
        return f"{on.domain} devices"
    held = problem.held(shards, columns)
    if held > 0.9 * on.memory:
        return f"{held / 1e9:,.0f} GB"
    return 1e3 * sum(problem.moved(shards, columns, on.line).values()) / on.bandwidth, 1e3 * (parts[0] + parts[1])


def model(args: argparse.Namespace) -> None:
    print(
        f"d={args.dim}, {args.entries} entries a node, L={args.layers}, float32. Milliseconds a step: memory + "
        'exchange; in brackets, the limit in the way. "both" says over how many devices it splits the graph.'
    )
    for away, name in ((1.0, "Entries anywhere"), (0.1, "One entry in ten anywhere, the others at home")):
        found = []
        for nodes in (10**7, 10**9):
            problem = Problem(nodes, args.entries, args.dim, args.layers, away=away)
            for on in ACCELERATORS:
                for devices in (1, 8, 64, 512):
                    line: list[Any] = [f"{nodes / 1e6:,.0f} M", on.name, devices]
                    best, least = "none", math.inf
                    for layout in LAYOUTS:
                        costs = {split: cost(problem, layout, *split, on) for split in splits(layout, devices)}
                        fits = {split: value for split, value in costs.items() if not isinstance(value, str)}
                        if not fits:
                            line.append(f"({min(map(str, costs.values()), key=len)})" if costs else "")
                            continue
                        split = min(fits, key=lambda split: sum(fits[split]))
                        memory, exchange = fits[split]
                        prefix = f"{split[0]}: " if layout == "both" else ""
                        line.append(f"{prefix}{memory:,.1f} + {exchange:,.1f}")
                        if memory + exchange < 0.999 * least:
                            best, least = layout, memory + exchange
                    line.append(best if devices > 1 or best == "none" else "one device")
                    found.append(line)
        print(f"\n{name}:\n")
        headers = ("nodes", "accelerator", "devices", *LAYOUTS, "fastest")
        print(tabulate.tabulate(found, headers, tablefmt="github", disable_numparse=True))

    print("\nShare of the nodes within so many edges of those that a batch touches, in a random graph:\n")
    found = []
    for nodes in (10**7, 10**9):
        for touched in (10**3, 10**4, 10**5):
            shares = [reach(nodes, args.entries, touched, hops) for hops in range(4)]
            found.append([f"{nodes / 1e6:,.0f} M", f"{touched:,}", *(f"{100 * share:.3g}%" for share in shares)])
    print(tabulate.tabulate(found, ("nodes", "touched", "0", "1", "2", "3"), tablefmt="github", disable_numparse=True))


def reach(nodes: int, entries_per_node: int, touched: int, hops: int) -> float:
    """The share of all nodes at most ``hops`` edges from any of ``touched``, where edges lead anywhere."""
    met = touched * sum(entries_per_node**hop for hop in range(hops + 1))
    return -math.expm1(-met / nodes)


# ---------------------------------------------------------------- what compiled programs send


ITEMSIZES = {"pred": 1, "s8": 1, "u8": 1, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
KINDS = r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def collectives(text: str) -> tuple[list[str], float]:
    """The collectives of a compiled program, and the bytes that a device sends in them."""
    kinds, sent = [], 0.0
    for line in text.splitlines():
        found = re.search(r"= (.*?) " + KINDS, line)
        if not found:
            continue
        shapes, kind = found.groups()
        size = sum(
            ITEMSIZES[dtype] * math.prod(int(length) for length in dims.split(",") if length)
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        )
        devices = group_size(line)
        others = (devices - 1) / devices
        sent += {"all-reduce": 2 * others, "reduce-scatter": devices - 1.0}.get(kind, others) * size
        kinds.append(kind)
    return kinds, sent


def group_size(line: str) -> int:
    """How many devices take part in a collective."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return len(listed[1].split(","))
    found = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if found:
        return int(found[1])
    by_axes = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    if not by_axes:
        raise SystemExit(f"no replica groups in {line.strip()}")
    sizes = dict(re.findall(r"('\w+')=(\d+)", by_axes[1]))
    return math.prod(int(sizes[axis]) for axis in by_axes[2].split(","))


def layouts(args: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    nodes = args.nodes - args.nodes % 8
    half = args.entries // 2
    sources = np.repeat(np.arange(nodes), half)
    graphs = {
        "random": graph.from_edges(sources, rng.integers(nodes, size=sources.size), num_nodes=nodes),
        "ring": graph.from_edges(sources, (sources + np.tile(np.arange(1, half + 1), nodes)) % nodes, num_nodes=nodes),
    }
    found = []
    for name, weights in graphs.items():
        for devices in (1, 2, 4, 8):
            for layout in LAYOUTS:
                if (name == "ring" and layout in ("columns", "rows")) or (layout == "both" and devices < 4):
                    continue  # the graph makes no difference to the first two
                columns = {"columns": devices, "rows": devices, "graph rows": 1, "both": 2}[layout]
                shards = devices // columns
                spec = P("shards", "columns") if layout != "rows" else P(("shards", "columns"), None)
                kinds_of_axes = (AxisType.Explicit,) * 2
                mesh = jax.make_mesh(
                    (shards, columns), ("shards", "columns"), kinds_of_axes, devices=jax.devices()[:devices]
                )
                sharding = NamedSharding(mesh, P("shards")) if layout in ("graph rows", "both") else None
                exchanged = graph.shard(weights, shards).summary().exchanged
                table = jax.device_put(jnp.ones((nodes, args.dim)), NamedSharding(mesh, spec))
                tx = sevo_adamw(1e-3, weights, num_layers=args.layers, graph_sharding=sharding)
                text = jax.jit(tx.update).lower(table, tx.init(table), table).compile().as_text()
                kinds, sent = collectives(text)
                problem = Problem(nodes, args.entries, args.dim, args.layers)
                expected = problem.sent(layout, shards, columns, exchanged)
                counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))) or "none"
                h = f"{exchanged:,}" if sharding else ""
                found.append([name, layout, devices, counted, f"{sent:,.0f}", f"{expected:,.0f}", h])
    print(f"sevo_adamw, {nodes:,} nodes, {args.entries} entries a node, d={args.dim}, L={args.layers}\n")
    headers = ("graph", "layout", "devices", "collectives a step", "bytes sent a device", "by formula", "H")
    print(tabulate.tabulate(found, headers, tablefmt="github", disable_numparse=True))


# ---------------------------------------------------------------- one device, large tables


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the clock, and seconds of all threads together."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def rows(args: argparse.Namespace) -> None:
    for nodes in args.sizes:
        measure(nodes, args)


def measure(nodes: int, args: argparse.Namespace) -> None:
    """Times the parts of a step at one size; every part works in place where a training step does."""
    rng = np.random.default_rng(0)
    count = nodes * args.entries
    far = rng.integers(nodes, size=count, dtype=np.int32)
    near = rng.integers(-1000, 1001, size=count, dtype=np.int32)
    near += np.repeat(np.arange(nodes, dtype=np.int32), args.entries)
    np.clip(near, 0, nodes - 1, out=near)
    data = jnp.full(count, 1 / args.entries, jnp.float32)
    indptr = jnp.arange(0, count + 1, args.entries, dtype=jnp.int32)
    csr = {name: _propagate.CSR(data, jnp.asarray(index), indptr) for name, index in (("far", far), ("near", near))}
    del far, near

    problem = Problem(nodes, args.entries, args.dim, args.layers)
    moved = problem.moved(1, 1, 64)
    table = problem.table
    gathered = args.layers * problem.entries * math.ceil(args.dim * 4 / 64) * 64
    idle = jnp.arange(nodes)[:, None] % 10 != 0
    grads = jnp.where(idle, 0, jnp.full((nodes, args.dim), 0.1))
    adam = scale_by_adam_corrected()
    plain = optax.scale_by_adam()
    update = optax.chain(optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-3))

    def in_place(fun: Callable[..., Any], *held: Any, whole: tuple[Any, ...] = ()) -> Callable[[], None]:
        """Several steps in one program, as in training: what they work on and in is allocated once."""

        def program(held: Any, whole: Any) -> Any:
            return jax.lax.fori_loop(0, args.steps, lambda _, held: fun(*held, *whole), held)

        run = jax.jit(program, donate_argnums=0)
        box = [jax.tree.map(jnp.array, held)]

        def call() -> None:
            box[0] = run(box[0], whole)
            jax.block_until_ready(box)

        return call

    def smoothing(x: jax.Array, matrix: Any) -> tuple[jax.Array]:
        return (_propagate.series(matrix, x, 0.99, args.layers, "neumann", True),)

    # A direction is the next gradient: else the compiler would look for idle rows once for all steps.
    def moments(tx: Any, grads: jax.Array, state: Any) -> Any:
        return tx.update(grads, state)

    def apply(params: jax.Array, direction: jax.Array) -> tuple[jax.Array]:
        return (optax.apply_updates(params, update.update(direction, update.init(params), params)[0]),)

    source = np.ones((nodes, args.dim), np.float32)
    some = np.empty((1000, args.dim), np.float32)  # stays in the cache
    order = rng.integers(nodes, size=10**6)

    def read_anywhere() -> None:
        for start in range(0, order.size, len(some)):
            np.take(source, order[start : start + len(some)], axis=0, out=some, mode="clip")

    yardsticks = {
        "sum in place": (3 * table * args.steps, in_place(lambda a, b: (a + b,), grads, whole=(grads,))),
        "random rows": (order.size * math.ceil(args.dim * 4 / 64) * 64 + order.nbytes, read_anywhere),
    }
    # For each part, bytes in order, bytes in rows anywhere, and what makes it, one at a time for the sake of memory.
    parts: dict[str, tuple[float, float, Callable[[], Callable[[], Any]]]] = {
        f"smoothing, neighbours {name}": (
            moved["smoothing"] - (gathered if name == "far" else 0),
            gathered if name == "far" else 0,
            partial(in_place, smoothing, grads, whole=(csr[name],)),
        )
        for name in csr
    }
    for name, tx, passes in (("moments, corrected", adam, 7), ("moments, optax", plain, 6)):
        parts[name] = (passes * table, 0, lambda tx=tx: in_place(partial(moments, tx), grads, tx.init(grads)))
    parts["update"] = (moved["update"], 0, partial(in_place, apply, grads, whole=(grads,)))

    best: dict[str, tuple[float, float]] = {}
    for name, (_, _, make) in parts.items():
        call = make()
        for compiled in (call, *(yardstick for _, yardstick in yardsticks.values())):
            compiled()
        for _ in range(args.rounds):
            turn = {other: timed(yardstick) for other, (_, yardstick) in yardsticks.items()} | {name: timed(call)}
            for part, seconds in turn.items():
                best[part] = tuple(map(min, seconds, best.get(part, seconds)))
            print(".", end="", file=sys.stderr, flush=True)
        del call
    print(file=sys.stderr)
    speed = {name: size / best[name][1] for name, (size, _) in yardsticks.items()}
    print(
        f"\n{nodes:,} nodes, {args.entries} entries a node, d={args.dim}, L={args.layers}; a table of "
        f"{table / 1e6:,.0f} MB; best of {args.rounds} rounds; a core moves {speed['sum in place'] / 1e9:.1f} GB/s in "
        f"a sum in place and {speed['random rows'] / 1e9:.1f} GB/s in rows anywhere\n"
    )
    found = []
    for name, (ordered, anywhere, _) in parts.items():
        wall, cpu = (seconds / args.steps for seconds in best[name])
        least = ordered / speed["sum in place"] + anywhere / speed["random rows"]
        share = (ordered + anywhere) / cpu / speed["sum in place"]
        line = [f"{(ordered + anywhere) / 1e6:,.0f}", f"{1e3 * wall:,.0f}", f"{1e3 * cpu:,.0f}", f"{1e3 * least:,.0f}"]
        found.append([name, *line, f"{100 * share:.0f}%", f"{100 * least / cpu:.0f}%"])
    headers = ("part", "MB at least", "ms", "ms of all cores", "by formula", "of the bandwidth", "formula / measured")
    print(tabulate.tabulate(found, headers, tablefmt="github", disable_numparse=True), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", action="store_true", help="print what the formulas say of large graphs")
    parser.add_argument("--rows", action="store_true", help="time the parts of a step on large tables, here")
    parser.add_argument("--nodes", type=int, default=20_000, help="of the compiled programs")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**6, 10**7], help="nodes of --rows")
    parser.add_argument("--rounds", type=int, default=5, help="of --rows")
    parser.add_argument("--steps", type=int, default=3, help="of --rows, in one program")
    parser.add_argument("--dim", type=int, help="columns: 16, with --model 64")
    parser.add_argument("--entries", type=int, default=10, help="stored entries a node")
    parser.add_argument("--layers", type=int, default=3)
    args = parser.parse_args()
    if args.dim is None:
        args.dim = 64 if args.model else 16
    (model if args.model else rows if args.rows else layouts)(args)


if __name__ == "__main__":
    main()
