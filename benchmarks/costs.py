"""Figure 3 of the paper, measured in one run: what an epoch and an inference pass cost, for all models side by side.

Every model is compiled first. Then they take turns: in each round each of them trains one epoch with its plain
optimizer and one with SEvo, if the paper gives it SEvo, and ranks the whole catalogue for every validation user.
Figures are medians over the rounds; minutes of training are those of the published number of epochs. --output writes
the figures as JSON.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

# Threads that wait must not take the core from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jax
from tqdm import tqdm

from models.architectures.registry import make_config
from models.data import load
from models.training.program import Program
from models.training.training_data import make_training_data

# With the plain optimizer of each model's published code.
PLAIN = {"lightgcn": "adam", "sr-gnn": "adam", "maerec": "adam"}
# The paper's figure compares these with SEvo, it does not put SEvo into them.
BASELINES = ("lightgcn", "sr-gnn", "lessr", "maerec")
ALL = (*BASELINES, "mf-bpr", "gru4rec", "sasrec", "bert4rec", "stosa")


class Contender:
    """One model with its compiled programs, one an optimizer."""

    def __init__(self, name, interactions):
        self.config = make_config(name)
        self.prepared = make_training_data(interactions, self.config)
        arms = [PLAIN.get(name, "adamw")] + ([] if name in BASELINES else ["sevo-adamw"])
        self.programs = {arm: Program(self.prepared, self.config, arm, [0]) for arm in arms}
        self.seconds = {arm: [] for arm in [*arms, "inference"]}
        self.epochs = 0

    def turn(self, keep=True):
        """Trains an epoch with each optimizer, and ranks once."""
        self.epochs += 1
        for arm, program in self.programs.items():
            start = time.perf_counter()
            program.epoch(self.epochs)
            if keep:
                self.seconds[arm].append(time.perf_counter() - start)
        start = time.perf_counter()
        program.ranks(self.prepared.validation)
        if keep:
            self.seconds["inference"].append(time.perf_counter() - start)

    def costs(self):
        """The medians, and the training times in minutes."""
        epoch = {arm: statistics.median(values) for arm, values in self.seconds.items()}
        inference = epoch.pop("inference")
        minutes = {arm: value * self.config.epochs / 60 for arm, value in epoch.items()}
        return {"epochs": self.config.epochs, "epoch": epoch, "minutes": minutes, "inference": inference}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="a file 'user item item …' (left out: embedded data)")
    parser.add_argument("--models", nargs="*", default=ALL, choices=ALL)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the figures")
    options = parser.parse_args()
    interactions = load(options.data)
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {os.cpu_count()} cores")
    contenders = {}
    for name in tqdm(options.models, desc="compiling", leave=False, disable=None):
        contenders[name] = Contender(name, interactions)
        contenders[name].turn(keep=False)
    for _ in tqdm(range(options.rounds), desc="rounds", leave=False, disable=None):
        for contender in contenders.values():
            contender.turn()
    costs = {name: contender.costs() for name, contender in contenders.items()}
    print("| model | optimizer | s/epoch | epochs | minutes of training | SEvo / plain | s an inference pass |")
    print("|---|---|---|---|---|---|---|")
    for name, cost in costs.items():
        plain = next(iter(cost["epoch"].values()))
        for arm, value in cost["epoch"].items():
            ratio = f"{value / plain:.2f}" if arm.startswith("sevo") else ""
            print(
                f"| {name} | {arm} | {value:.2f} | {cost['epochs']} | {cost['minutes'][arm]:.0f} | {ratio} "
                f"| {cost['inference']:.2f} |"
            )
    if options.output:
        options.output.write_text(json.dumps(costs, indent=2) + "\n")


if __name__ == "__main__":
    main()
