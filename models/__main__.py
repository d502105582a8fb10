"""The command line: ``python -m models train``, ``compare`` and ``graph``."""

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from models.training.config import Optimizer, SourceConfig, TrainConfig

if TYPE_CHECKING:
    from models.data import Interactions
    from models.training.loop import Prepared

# JAX is imported by the commands themselves, so that --help and a mistyped option answer at once.

PROGRAM = "python -m models"
USAGE_ERROR = 2
INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class Train(TrainConfig):
    """Train one model and test it at its best epoch."""

    optimizer: Optimizer = "sevo-adamw"
    """adamw: plain. sevo-adamw: smooths Adam's direction (Algorithm 1). sevo-gradient: smooths the gradient instead."""
    output_dir: Path = Path("runs/train")
    """Folder for result.json, history.jsonl and curve.png."""

    def run(self) -> None:
        """Trains, and prints where the results are."""
        from models.training import loop

        config = self.resolved()
        result = loop.train(_prepare(config, self.output_dir), config, self.optimizer, self.output_dir)
        print(f"best epoch {result.best_epoch}, {result.epoch_seconds:.2f} s an epoch, {result.total_seconds:.0f} s")
        print("test: " + "  ".join(f"{name} {value:.4f}" for name, value in result.test.items()))
        print(f"({result.protocol})")
        print(f"results: {self.output_dir / 'result.json'}, curve: {self.output_dir / 'curve.png'}")


@dataclasses.dataclass(frozen=True)
class Compare(TrainConfig):
    """Train the same model with AdamW and with SEvo in its two places, on the same data and seed."""

    output_dir: Path = Path("runs/compare")
    """Folder for compare.json, compare.png and one folder a run."""

    def run(self) -> None:
        """Trains three times, and prints the table and where the picture is."""
        from models.training import compare

        config = self.resolved()
        results = compare.compare(_prepare(config, self.output_dir), config, self.output_dir)
        print(f"\ntest metrics ({results[0].protocol}):\n")
        print(compare.table(results))
        print(f"\ncurves: {self.output_dir / 'compare.png'}")


@dataclasses.dataclass(frozen=True)
class Graph(SourceConfig):
    """Build an item graph, describe it, and draw its degrees and, if it is small, the graph itself."""

    part: Literal["train", "all"] = "train"
    """train: the training part of the split. all: every interaction."""
    graph_max_length: int = 50
    """How many of a user's interactions the graph is built from."""
    keep: Literal["last", "first"] = "last"
    """Which of them, if there are more."""
    max_hops: int = 1
    """How far apart in a history two items may be to be related."""
    weighting: Literal["distance", "frequency"] = "distance"
    """distance: a pair counts 1 / hops. frequency: every pair counts 1."""
    attributes: Path | None = None
    """A .tsv or .csv with one line an item: relate items that share an attribute, instead of co-occurrence."""
    attribute_item_column: str = "item_id"
    """Its column of item ids, as they are in the data."""
    attribute_column: str = "genres"
    """Its column of attributes, several separated by '|'."""
    output_dir: Path = Path("runs/graph")
    """Folder for weights.npz, degrees.png and, for small graphs, drawing.png."""

    def run(self) -> None:
        """Builds the graph, and prints its summary and where the pictures are."""
        from models import graphs

        _make_folder(self.output_dir)
        interactions = _load(self)
        if self.part == "train" and self.attributes is None:
            interactions = self.split_interactions(interactions).train
        adjacency, title = graphs.build(
            interactions,
            "embedded data" if self.data is None else self.data.stem,
            self.part,
            graph_max_length=self.graph_max_length,
            keep=self.keep,
            max_hops=self.max_hops,
            weighting=self.weighting,
            attributes=self.attributes,
            item_column=self.attribute_item_column,
            attribute_column=self.attribute_column,
        )
        print(title)
        for line in graphs.describe(adjacency, title, self.output_dir):
            print(line)


Command = (
    Annotated[Train, tyro.conf.subcommand("train", prefix_name=False)]
    | Annotated[Compare, tyro.conf.subcommand("compare", prefix_name=False)]
    | Annotated[Graph, tyro.conf.subcommand("graph", prefix_name=False)]
)


def _make_folder(output_dir: Path) -> None:
    """Makes the output folder, or fails before anything else is done."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir: {output_dir} cannot be made ({error.strerror}); give another folder") from None
    if not os.access(output_dir, os.W_OK):
        raise ValueError(f"output_dir: {output_dir} cannot be written to; give another folder")


def _load(source: SourceConfig) -> "Interactions":
    """Reads the data, and says what it is and what was done to it."""
    interactions = source.load_interactions()
    print(f"{source.data or 'embedded data'}: {interactions}")
    for note in interactions.notes:
        print(f"  {note}")
    return interactions


def _prepare(config: TrainConfig, output_dir: Path) -> "Prepared":
    """Checks everything that can be checked before training, and says what is trained on."""
    from models.training import loop

    _make_folder(output_dir)
    prepared = loop.prepare(_load(config), config)
    print(f"graph: {prepared.adjacency.nse:,} entries between {prepared.adjacency.shape[0]:,} nodes", flush=True)
    return prepared


def _one_line(box: str) -> str:
    """The message inside the frame that the parser draws around an error."""
    text = " ".join(re.sub(r"[╭╮╰╯│─]|-{3,}|[|+]|\x1b\[[0-9;]*m", " ", box).split())
    for advice in ["For full helptext", "Argument helptext", "Arguments are applied", "Perhaps you meant"]:
        text = text.split(advice)[0]
    text = re.sub(r"\(applied to [^)]*\)", "", text)
    text = re.sub(r"no type matching .* - <class '\w+'>: ", "", text)  # an option that may be left out
    for title in ["Unrecognized options", "Value error", "Missing argument", "Missing subcommand", "Invalid choice"]:
        text = text.removeprefix(title).strip()
    return " ".join(text.split()).rstrip(" .")


def _parse(arguments: Sequence[str]) -> Train | Compare | Graph:
    """Parses the command line.

    Raises:
      ValueError: with one line, if the arguments do not fit.
    """
    framed = io.StringIO()
    try:
        with contextlib.redirect_stderr(framed):
            return tyro.cli(Command, prog=PROGRAM, args=list(arguments))
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    command = arguments[0] if arguments and arguments[0] in ("train", "compare", "graph") else ""
    raise ValueError(f"{_one_line(framed.getvalue())}; see {' '.join([PROGRAM, *command.split(), '--help'])}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 2 for bad input, 130 when interrupted."""
    try:
        _parse(sys.argv[1:] if arguments is None else arguments).run()
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("\ninterrupted; what was written so far is kept", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
