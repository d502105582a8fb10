"""How long does the co-occurrence graph take, and how much memory, from 1 to 50 million interactions?

Draws synthetic logs whose items follow Zipf's law, builds the graph of each in a process of its own
(so that peaks of memory do not mix), and prints a table with the slope of time over interactions in
log-log scale: 1 is linear. With `--log`, also times a real log against Algorithm 4 run literally.

    python benchmarks/graph_build.py
    python benchmarks/graph_build.py --millions 1 2 5 --items 100000
    python benchmarks/graph_build.py --log ml-1m.txt
"""

import argparse
import collections
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sevo_optax import graph


def synthetic_log(interactions: int, num_items: int, mean_length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of geometric length over items whose popularity falls as 1 / rank."""
    rng = np.random.default_rng(seed)
    # The logarithm of a Zipf-distributed rank is uniform. A permutation scatters popular ids.
    rank = rng.random(interactions, dtype=np.float32)
    rank *= np.log(num_items)
    np.exp(rank, out=rank)
    permutation = rng.permutation(num_items).astype(np.int32)
    items = permutation[np.minimum(rank.astype(np.int32) - 1, num_items - 1)]
    lengths = rng.geometric(1.0 / mean_length, size=2 * interactions // mean_length + 100)
    ends = np.cumsum(lengths)
    ends = ends[: np.searchsorted(ends, interactions)]
    return items, np.concatenate([[0], ends, [interactions]])


def peak_memory() -> int:
    """Peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Builds one graph; runs in a process of its own."""
    log = synthetic_log(args.child, args.items, args.mean_length)
    graph.cooccurrence([[0, 1]], 2)  # starts JAX, which has no part in the time
    before = peak_memory()

    def progress(done: int, total: int) -> None:
        print(f"\r  {done / total:6.1%} of {total:,}", end="", file=sys.stderr, flush=True)

    start = time.perf_counter()
    weights = graph.cooccurrence(log, args.items, max_length=args.max_length, max_hops=args.max_hops, progress=progress)
    weights.data.block_until_ready()
    seconds = time.perf_counter() - start
    print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    return {
        "interactions": args.child,
        "seconds": seconds,
        "edges": weights.nse // 2,
        "peak": peak_memory(),
        "before": before,
        "result": weights.data.nbytes + weights.indices.nbytes,
    }


def curve(args: argparse.Namespace) -> None:
    """Prints the table and the slope."""
    print(
        f"{args.items:,} items, sequences of {args.mean_length} interactions on average, "
        f"K={args.max_length}, H={args.max_hops}\n"
    )
    print(
        f"{'interactions':>13} {'seconds':>8} {'M/s':>6} {'edges':>12} {'peak GB':>8} "
        f"{'of it, log':>10} {'result GB':>9}"
    )
    rows = []
    for millions in args.millions:
        command = [sys.executable, __file__, "--child", str(int(millions * 1e6))]
        for name in ("items", "mean_length", "max_length", "max_hops"):
            value = getattr(args, name)
            if value is not None:
                command += [f"--{name.replace('_', '-')}", str(value)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout)
        rows.append(row)
        print(
            f"{row['interactions']:>13,} {row['seconds']:>8.2f} "
            f"{row['interactions'] / row['seconds'] / 1e6:>6.2f} {row['edges']:>12,} "
            f"{row['peak'] / 1e9:>8.2f} {row['before'] / 1e9:>10.2f} {row['result'] / 1e9:>9.2f}",
            flush=True,
        )
    if len(rows) > 1:
        x, y = (np.log([row[key] for row in rows]) for key in ("interactions", "seconds"))
        print(f"\nslope of log seconds over log interactions: {np.polyfit(x, y, 1)[0]:.2f}")
        growth = (rows[-1]["peak"] - rows[0]["peak"]) / (rows[-1]["interactions"] - rows[0]["interactions"])
        print(f"peak memory grows by {growth:.0f} bytes an interaction")


def literal(sequences: list[list[int]], max_length: int | None, max_hops: int) -> dict:
    """Algorithm 4 as printed (last K, by distance)."""
    weights = collections.defaultdict(float)
    for seq in sequences:
        seq = seq if max_length is None else seq[-max_length:]
        for i in range(len(seq) - 1):
            for h, j in enumerate(range(i + 1, min(i + max_hops + 1, len(seq))), start=1):
                weights[seq[i], seq[j]] += 1 / h
                weights[seq[j], seq[i]] += 1 / h
    return weights


def real_log(args: argparse.Namespace) -> None:
    """Times a log of lines `user item item ...` side by side with the literal loop."""
    with open(args.log) as file:
        sequences = [[int(item) for item in line.split()[1:]] for line in file]
    num_nodes = 1 + max(map(max, sequences))
    graph.cooccurrence([[0, 1]], 2)
    options = {"max_length": args.max_length or 200, "max_hops": args.max_hops}
    fast, slow = [], []
    for _ in range(3):
        start = time.perf_counter()
        weights = graph.cooccurrence(sequences, num_nodes, **options)
        middle = time.perf_counter()
        expected = literal(sequences, **options)
        slow.append(time.perf_counter() - middle)
        fast.append(middle - start)
    if weights.nse != len(expected):
        raise SystemExit(f"{weights.nse} entries, but the literal loop has {len(expected)}")
    print(
        f"{args.log}: {sum(map(len, sequences)):,} interactions, K={options['max_length']}, "
        f"H={options['max_hops']}\n"
        f"cooccurrence {min(fast):.3f} s, literal loop {min(slow):.3f} s: "
        f"{min(slow) / min(fast):.1f} times faster (best of 3 each)\n"
    )
    print(graph.summary(weights))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 2, 5, 10, 20, 50])
    parser.add_argument("--items", type=int, default=1_000_000, help="number of items")
    parser.add_argument("--mean-length", type=int, default=50, help="interactions a sequence")
    parser.add_argument("--max-length", type=int, help="K; all interactions if not given")
    parser.add_argument("--max-hops", type=int, default=1, help="H")
    parser.add_argument("--log", type=Path, help="time this log (`user item item ...`) instead")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(measure(args)))
    elif args.log is not None:
        real_log(args)
    else:
        curve(args)


if __name__ == "__main__":
    main()
