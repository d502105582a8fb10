"""Seconds an epoch: models here on packed rows or pairs, against plain PyTorch on padded rows, prefixes or pairs.

Everything takes turns in one process: an epoch with AdamW, an epoch with SEvo, some steps of PyTorch with AdamW (from
which its epoch is computed), and so on; ratios are medians over the rounds. With --seeds, several seeds are trained in
one program, too. Without torch, the PyTorch rows are left out.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

# Threads that wait must not take the core from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jax
import numpy as np
from tqdm import tqdm

from models.architectures.registry import config_from_dict
from models.data import load
from models.presets import load_preset
from models.training.program import Program
from models.training.training_data import make_training_data

try:
    import torch
except ImportError:
    torch = None


def config_of(model, path):
    """The paper's settings for a file that is called as one of its data sets; else the model's usual ones."""
    values = {}
    if path is not None:
        try:
            values = load_preset(f"{model}-{path.stem.removeprefix('amazon-')}")
        except ValueError:
            print(f"\nno settings are published for {model} on {path.stem}: the model's usual ones are taken")
    return config_from_dict({"model": model} | values | {"data": path})


class Ours:
    """Trains epoch after epoch; ``seeds`` of them at once."""

    def __init__(self, prepared, config, optimizer, seeds=1):
        self.program, self.number = Program(prepared, config, optimizer, range(seeds)), 0

    def seconds(self):
        """Trains, and returns the seconds of an epoch."""
        self.number += 1
        start = time.perf_counter()
        self.program.epoch(self.number)
        return time.perf_counter() - start


def rows_of(train, length):
    """Left-padded rows of the users' newest items, and a function that draws some of them."""
    rows = np.zeros((train.num_users, length), np.int64)
    for row, sequence in zip(rows, train, strict=True):
        row[length - min(length, len(sequence)) :] = sequence[-length:]
    rows = torch.from_numpy(rows)
    return len(rows), lambda count: (rows[torch.randint(len(rows), (count,))],)


def torch_sasrec(config, train):
    from torch_models import SASRec

    sizes = (config.max_length, config.embedding_dim, config.num_blocks, config.num_heads, config.dropout_rate)
    return SASRec(train.num_items, *sizes), *rows_of(train, config.max_length + 1)


def torch_bert4rec(config, train):
    from torch_models import BERT4Rec

    sizes = (config.max_length, config.embedding_dim, config.num_blocks, config.num_heads, config.dropout_rate)
    return BERT4Rec(train.num_items, *sizes, config.mask_probability), *rows_of(train, config.max_length)


def torch_gru4rec(config, train):
    from torch_models import GRU4Rec, Prefixes

    sizes = (config.embedding_dim, config.hidden_dim, config.num_gru_layers, config.dropout_rate)
    prefixes = Prefixes(train, config.max_length)
    return (
        GRU4Rec(train.num_items, *sizes),
        len(prefixes),
        lambda count: (prefixes[torch.randint(len(prefixes), (count,))],),
    )


def torch_stosa(config, train):
    from torch_models import STOSA

    sizes = (config.max_length, config.embedding_dim, config.num_blocks, config.num_heads, config.dropout_rate)
    model = STOSA(train.num_items, *sizes, config.attention_dropout_rate, config.pvn_weight)
    return model, *rows_of(train, config.max_length + 1)


def torch_mf_bpr(config, train):
    from torch_models import MFBPR, draw_pairs

    items, offsets = torch.from_numpy(train.items.astype(np.int64)), torch.from_numpy(train.offsets)
    model = MFBPR(train.num_users, train.num_items, config.embedding_dim)
    return model, len(train), lambda count: draw_pairs(items, offsets, count)


# The model, how many samples an epoch has, and what draws the arguments of its loss for a batch of some.
TORCH = {
    "sasrec": torch_sasrec,
    "bert4rec": torch_bert4rec,
    "gru4rec": torch_gru4rec,
    "stosa": torch_stosa,
    "mf-bpr": torch_mf_bpr,
}


class Torch:
    """Trains some steps of the published batching, and multiplies."""

    def __init__(self, prepared, config, steps):
        self.train, self.batch_size, self.steps = prepared.split.train, config.batch_size, steps
        self.model, self.samples, self.arguments = TORCH[config.model](config, self.train)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            betas=(config.b1, config.b2),
            weight_decay=config.weight_decay,
        )

    def seconds(self):
        """Trains, and returns the seconds of an epoch."""
        start = time.perf_counter()
        for _ in range(self.steps):
            loss = self.model.loss(*self.arguments(self.batch_size))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return (time.perf_counter() - start) / self.steps * -(-self.samples // self.batch_size)


def measure(model, path, options):
    """Prints the table of one model on one data set."""
    config = config_of(model, path)
    prepared = make_training_data(load(path), config)
    arms = {"AdamW": Ours(prepared, config, "adamw"), "SEvo-AdamW": Ours(prepared, config, "sevo-adamw")}
    several = f"SEvo-AdamW, {options.seeds} seeds"  # an epoch of each of them
    if options.seeds > 1:
        arms[several] = Ours(prepared, config, "sevo-adamw", options.seeds)
    if torch is not None:
        arms["PyTorch, AdamW"] = Torch(prepared, config, options.torch_steps)
    for arm in tqdm(arms.values(), desc="compiling", leave=False, disable=None):
        arm.seconds()
    seconds = {name: [] for name in arms}
    for _ in tqdm(range(options.rounds), desc=f"{model} rounds", leave=False, disable=None):
        for name, arm in arms.items():
            seconds[name].append(arm.seconds())
    tokens = prepared.num_tokens
    name = path.stem if path else "embedded data"
    print(f"\n{model} on {name}: {tokens:,} tokens or pairs an epoch")
    print(f"{'':<24}{'s/epoch':>9}{'tokens/s':>11}{'PyTorch/this':>14}{'this/SEvo-AdamW':>17}")
    for arm, values in seconds.items():
        trained = options.seeds if arm == several else 1
        values = [value / trained for value in values]
        against = [
            statistics.median(x / y for x, y in zip(a, b, strict=True)) if a and b else float("nan")
            for a, b in [(seconds.get("PyTorch, AdamW"), values), (values, seconds["SEvo-AdamW"])]
        ]
        median = statistics.median(values)
        print(f"{arm:<24}{median:>9.2f}{tokens / median:>11,.0f}{against[0]:>14.2f}{against[1]:>17.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="*", default=[None], help="files 'user item item …'")
    parser.add_argument("--models", nargs="*", default=["sasrec", "bert4rec"], choices=list(TORCH))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--torch-steps", type=int, default=3, help="steps of PyTorch a round")
    parser.add_argument("--seeds", type=int, default=1, help="also train so many seeds in one program")
    options = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}", end="")
    print(f", torch {torch.__version__}, {torch.get_num_threads()} threads" if torch else ", no torch")
    for path in options.data:
        for model in options.models:
            measure(model, path, options)


if __name__ == "__main__":
    main()
