"""Training on eight virtual devices; test_mesh.py runs this file in a process of its own."""

import re
import sys
import traceback
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from models.architectures.registry import make_config
from models.data import Interactions
from models.layers import additive
from models.mesh import make_mesh, split_batch
from models.training.layout import make_layout
from models.training.program import Program
from models.training.split_program import SplitProgram
from models.training.training_data import make_training_data

RNG = np.random.default_rng(0)
NUM_ITEMS, DIM, STEPS = 300, 8, 50
SEQUENCES = [RNG.integers(1, NUM_ITEMS + 1, size=RNG.integers(4, 9)).tolist() for _ in range(70)]
BYTES = {"pred": 1, "s32": 4, "u32": 4, "f32": 4}
TABLE = (NUM_ITEMS + 1) * DIM * 4
KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
# Each model is trained without a mesh once, and with each of its layouts.
SASREC = {"model": "sasrec", "loss": "ce", "num_blocks": 1, "max_length": 8, "optimizer": "sevo-adamw"}
PAIRS = {"model": "mf-bpr", "loss": "gbce", "negatives": "per-position", "num_negatives": 8, "init_std": 0.1}
CASES = [
    (SASREC, [("data=4,model=2", "columns"), ("data=2,model=4", "rows")]),
    (PAIRS | {"optimizer": "sevo-gradient", "graph": ("user-item",)}, [("data=2,model=4", "rows")]),
]


def collectives(program):
    """Kind and bytes, as one device receives them, of each exchange in an epoch's program."""
    data = program.prepared
    with jax.set_mesh(program.layout.mesh):
        lowered = program._epoch.lower(
            program.model_state, program.opt_state, data.feed, data.sampler, data.context, program.key
        )
    return exchanges(lowered.compile())


def exchanges(compiled):
    """Kind and bytes, as one device receives them, of each exchange in a program."""
    found = []
    for shapes, kind in re.findall(rf"= (\(.*?\)|\S+) ({KINDS})(?:-start)?\(", compiled.as_text()):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        sizes = [BYTES[dtype] * prod(map(int, filter(None, dims.split(",")))) for dtype, dims in arrays]
        found.append((kind, sum(sizes)))
    return found


def tables(program):
    """How many rows each smoothed table has."""
    groups = program.prepared.nodes.groups
    return [program.shapes[path]["embedding"].shape[0] for group in groups for path in group]


def layout_bytes(rows, model):
    """What a device has of a table of some rows."""
    return -(-rows // model) * DIM * 4


def check(options, layouts):
    config = make_config(embedding_dim=DIM, batch_size=16, epochs=1, ks=(1, 400), **options)
    prepared = make_training_data(Interactions.from_sequences(SEQUENCES, NUM_ITEMS), config)
    sizes = {"num_users": prepared.split.train.num_users, "num_items": NUM_ITEMS}
    alone = Program(prepared, config, config.optimizer, [0])
    epochs = range(1, -(-STEPS // prepared.feed.num_batches) + 1)
    losses = np.concatenate([alone.epoch(number)[0] for number in epochs])
    ranks, metrics = alone.test(alone.params_of(0))
    for mesh, sharding in layouts:
        layout, _ = make_layout(make_mesh(mesh), sharding, config, **sizes)
        program = SplitProgram(prepared, config, config.optimizer, 0, layout)
        found = collectives(program)
        model = layout.mesh.shape["model"]
        exchanged = sorted(size for kind, size in found if kind == "all-to-all")
        # Split columns: the softmax alone takes the table by rows, and gives its gradient back. Split rows: smoothing
        # alone takes the update by columns, and gives it back.
        assert exchanged == sorted([layout_bytes(rows, model) for rows in tables(program)] * 2), exchanged
        largest = max([size for kind, size in found if kind == "all-gather"], default=0)
        assert largest < TABLE / 4, f"an all-gather of {largest} bytes, and the table has {TABLE}"
        for leaf in jax.tree.leaves((program.model_state, program.opt_state)):
            if leaf.ndim == 2 and leaf.shape[0] >= 70:  # the tables, and their moments
                assert leaf.addressable_shards[0].data.nbytes == leaf.nbytes // model, leaf.shape
        split = np.concatenate([program.epoch(number)[0] for number in epochs])
        np.testing.assert_allclose(split, losses, rtol=1e-5)
        found_ranks, found_metrics = program.test(program.params_of(0))
        assert (np.abs(found_ranks - ranks) <= 1).all()
        for name, value in metrics.items():
            assert abs(found_metrics[name] - value) < 0.02, name


def check_additive_attention():
    """Rows that are scored some at a time stay on their device, and so do the gradients."""
    additive.CPU_NUMBERS_AT_ONCE = 2 * 6 * 6 * DIM  # two rows at a time, of the four of each device
    arrays = [jnp.asarray(RNG.normal(size=(16, 6, DIM)), jnp.float32) for _ in range(3)]
    weight, seen = jnp.asarray(RNG.normal(size=DIM), jnp.float32), jnp.tril(jnp.ones((1, 6, 6), bool))

    def loss(arrays, weight):
        arrays = split_batch(arrays)
        return jnp.square(additive.additive_attention(*arrays, weight, seen, normalize=True, causal=True)).sum()

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    alone = program(arrays, weight)
    with jax.set_mesh(make_mesh("data=4,model=2")):
        largest = max(size for _, size in exchanges(program.lower(arrays, weight).compile()))
        assert largest <= DIM * 4, f"an exchange of {largest} bytes, and only the weight's gradient is of all"
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), program(arrays, weight), alone)


def main():
    assert jax.device_count() == 8, "run through test_mesh.py"
    failed = []
    checks = {case[0]["model"]: partial(check, *case) for case in CASES}
    for name, run in (checks | {"additive attention": check_additive_attention}).items():
        try:
            run()
        except Exception:  # report every case in one go
            failed.append(name)
            traceback.print_exc()
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
