"""What SEvo costs: one compiled SASRec training step with each optimizer, against plain AdamW.

The optimizers take turns, so that the machine's moods hit all of them, and the ratio is the median of the ratios of
neighbours. Without --data the step is one on the embedded data; the published settings are those for Beauty.
"""

import argparse
import functools
import statistics
import time
from pathlib import Path

import jax
import optax
from flax import nnx
from tqdm import tqdm

from models.architectures import registry
from models.architectures.registry import make_model
from models.compilation import jit
from models.config import OPTIMIZERS
from models.data import load
from models.objectives.losses import make_loss
from models.objectives.objective import training_loss
from models.training.optimizers import make_stages
from models.training.training_data import make_training_data


def make_step(prepared, config, optimizer):
    """Compiles one training step that donates what it replaces; returns it with its first arguments."""
    train = prepared.split.train
    model = make_model(config, num_users=train.num_users, num_items=train.num_items, seed=config.seed)
    graphdef, params = nnx.split(model, nnx.Param)
    tx = optax.named_chain(*make_stages(optimizer, config, prepared.nodes).items())
    loss = make_loss(config)

    @functools.partial(jit, donate_argnums=(0, 1))
    def step(params, opt_state, feed, sampler, key, index):
        def loss_fn(params):
            return training_loss(nnx.merge(graphdef, params), loss, feed.batch(index), {}, sampler, key)

        value, grads = jax.value_and_grad(loss_fn)(params)
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, value

    return step, params, tx.init(params)


def make_parser(description):
    """The options of a benchmark of SASRec training steps."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="file with one line 'user item item …' a user")
    parser.add_argument("--max-length", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=512)
    return parser


def make_config(options):
    """The paper's settings with those options."""
    return registry.make_config(
        data=options.data,
        max_length=options.max_length,
        graph_max_length=options.max_length,
        batch_size=options.batch_size,
    )


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=60, help="rounds in which every optimizer takes its steps")
    parser.add_argument("--steps", type=int, default=3, help="steps of one optimizer in a round")
    options = parser.parse_args()

    config = make_config(options)
    interactions = load(config.data)
    prepared = make_training_data(interactions, config)
    print(f"{config.data.stem if config.data else 'embedded data'}: {interactions}")
    tokens = prepared.feed.num_tokens / prepared.feed.num_batches
    print(
        f"{jax.devices()[0].device_kind}; {tokens:,.0f} tokens a step; "
        f"table of {interactions.num_items + 1:,} rows; graph of {prepared.nodes.adjacency.nse:,} entries"
    )
    runs = {optimizer: make_step(prepared, config, optimizer) for optimizer in OPTIMIZERS}
    seconds = {optimizer: [] for optimizer in OPTIMIZERS}
    key = jax.random.key(0)
    for turn in tqdm(range(-1, options.rounds), desc="rounds", disable=None):
        for optimizer, (step, params, opt_state) in runs.items():
            start = time.perf_counter()
            for k in range(options.steps):
                index = (turn * options.steps + k) % prepared.feed.num_batches
                params, opt_state, loss = step(params, opt_state, prepared.feed, prepared.sampler, key, index)
            loss.block_until_ready()
            runs[optimizer] = step, params, opt_state
            if turn >= 0:  # the first round compiles
                seconds[optimizer].append((time.perf_counter() - start) / options.steps)
    print(f"\n{'optimizer':<15}{'ms/step':>9}{'over adamw':>12}")
    for optimizer in OPTIMIZERS:
        ratio = statistics.median(a / b for a, b in zip(seconds[optimizer], seconds["adamw"], strict=True))
        print(f"{optimizer:<15}{1e3 * statistics.median(seconds[optimizer]):>9.2f}{ratio:>12.3f}")


if __name__ == "__main__":
    main()
