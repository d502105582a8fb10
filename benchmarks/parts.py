"""Where a SASRec training step spends its time: each part as a program of its own, and the whole step beside them.

The parts take turns. Compiled together, XLA overlaps and fuses some of them, so that the whole is less than their sum.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from overhead import make_config, make_parser, make_step
from tqdm import tqdm

from models.architectures.registry import make_model
from models.compilation import jit
from models.data import load
from models.layers import Attention
from models.training.training_data import make_training_data
from sevo_optax import sevo


def without_attention(*arguments, **options):
    """Stands in for ``Attention._attend``: every token keeps its own value."""
    return arguments[3]


def build(prepared, config):
    """The parts by name, each a compiled function without arguments."""
    train = prepared.split.train
    model = make_model(config, num_users=train.num_users, num_items=train.num_items, seed=0)
    graphdef, params = nnx.split(model, nnx.Param)
    packed, unseen, key = prepared.feed, prepared.sampler, jax.random.key(0)
    batch = packed.batch(0)
    table = params["item_embedding"]["embedding"][...]
    ids = jnp.stack([batch.inputs, batch.targets, batch.targets])
    weights = jax.random.normal(key, (*batch.inputs.shape, table.shape[1]))
    adamw = optax.adamw(config.learning_rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
    smoother = sevo(prepared.nodes.adjacency, beta=config.beta, num_layers=config.num_layers)
    # States are arguments, as in a training step.
    moments, graph = adamw.init(params), smoother.init(table)

    def encode(params, weights):
        return jnp.sum(nnx.merge(graphdef, params)(batch, key) * weights)

    def update(grads, moments, params):
        updates, moments = adamw.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    def bind(fun, *arguments):
        compiled = jit(fun)
        compiled(*arguments)  # traced here, while attention is or is not replaced
        return lambda: compiled(*arguments)

    parts = {
        "gathering the batch, negatives": bind(
            lambda packed, unseen: (packed.batch(0), unseen.sample(key, packed.batch(0).users)), packed, unseen
        ),
        # Squared, so that the gradient needs what was looked up.
        "table lookup and its gradient": bind(jax.grad(lambda table: jnp.sum(table[ids] ** 2 * weights)), table),
        "encoder with its lookup, forwards and backwards": bind(jax.grad(encode), params, weights),
        "moments and update": bind(update, params, moments, params),
        "smoothing": bind(smoother.update, table, graph),
        "evaluation (once an evaluation)": bind(
            lambda params, ranking: ranking.ranks(nnx.merge(graphdef, params), {}), params, prepared.validation
        ),
    }
    attend, Attention._attend = Attention._attend, without_attention
    try:
        parts["encoder without attention"] = bind(jax.grad(encode), params, weights)
    finally:
        Attention._attend = attend
    return parts


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    config = make_config(options)
    prepared = make_training_data(load(config.data), config)
    parts = build(prepared, config)
    step, *carry = make_step(prepared, config, "sevo-adamw")

    def whole():
        carry[0], carry[1], loss = step(*carry[:2], prepared.feed, prepared.sampler, jax.random.key(0), 0)
        return loss

    parts = {"whole step (sevo-adamw)": whole} | parts
    seconds = {name: [] for name in parts}
    for turn in tqdm(range(-1, options.rounds), desc="rounds", disable=None):
        for name, part in parts.items():
            start = time.perf_counter()
            jax.block_until_ready(part())
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    print(f"{jax.devices()[0].device_kind}, {prepared.feed.rows} rows of {prepared.feed.slot.shape[1]} tokens a step")
    for name, values in seconds.items():
        print(f"{name:<50}{1e3 * statistics.median(values):>9.2f} ms")


if __name__ == "__main__":
    main()
