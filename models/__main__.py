"""The command line: ``python -m models train``, ``compare``, ``graph`` and more."""

import contextlib
import dataclasses
import functools
import io
import itertools
import operator
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from models.commands import Evaluate, Export, Recommend, load_and_describe
from models.reproduce import Reproduce
from models.training.config import Optimizer, SourceConfig, TrainConfig
from models.training.files import make_folder

if TYPE_CHECKING:
    from models.training.prepare import Prepared

# JAX is imported by the commands themselves, so that --help and a mistyped option answer at once.

PROGRAM = "python -m models"
USAGE_ERROR = 2
PATHS = ("output_dir", "results_dir", "work_dir", "data_dir", "cache_dir", "checkpoint", "data", "histories", "titles")
PATHS += ("output", "per_user", "attributes")
INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where a run starts from."""

    preset: str | None = None
    """Settings to start from, which other options override: a name such as sasrec-beauty, or a YAML file."""
    resume: bool = False
    """Go on from the newest checkpoint, if there is one; a finished run is kept as it is."""
    overwrite: bool = False
    """Remove a run that the output folder already holds."""

    def _check_output(self) -> None:
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other; give one of them")


@dataclasses.dataclass(frozen=True)
class Train(TrainConfig, RunOptions):
    """Train one model and test it at its best epoch."""

    optimizer: Optimizer = "sevo-adamw"
    """adamw: plain. sevo-adamw: smooths Adam's direction (Algorithm 1). sevo-gradient: smooths the gradient instead."""
    output_dir: Path = Path("runs/train")
    """Folder for checkpoints, run.json, history.jsonl, result.json and curve.png."""

    def run(self) -> None:
        """Trains, and prints where the results are."""
        from models.training import loop

        self._check_output()
        config = _config(self)
        prepared = _prepare(config, self.output_dir)
        result = loop.train(
            prepared, config, self.optimizer, self.output_dir, resume=self.resume, overwrite=self.overwrite
        )
        memory = f", peak memory {result.peak_memory / 2**30:.2f} GiB" if result.peak_memory else ""
        print(
            f"best epoch {result.best_epoch} of {len(result.losses)}, {result.epoch_seconds:.2f} s an epoch, "
            f"{result.total_seconds:.0f} s{memory}"
        )
        print("test: " + "  ".join(f"{name} {value:.4f}" for name, value in result.test.items()))
        print(f"({result.protocol})")
        print(f"results: {self.output_dir / 'result.json'}, curve: {self.output_dir / 'curve.png'}")


@dataclasses.dataclass(frozen=True)
class Compare(TrainConfig, RunOptions):
    """Train the same model with AdamW and with SEvo in its two places, on the same data and seeds."""

    seeds: int = 1
    """How many seeds, counted on from seed. Several give mean ± standard deviation and a paired t-test."""
    output_dir: Path = Path("runs/compare")
    """Folder for compare.json, compare.png and one folder a run."""

    def run(self) -> None:
        """Trains every arm, and prints the table and where the picture is."""
        from models.training import compare

        self._check_output()
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        config = _config(self)
        prepared = _prepare(config, self.output_dir)
        diverged = None
        try:
            results = compare.compare(
                prepared, config, self.output_dir, seeds=self.seeds, resume=self.resume, overwrite=self.overwrite
            )
        except compare.ComparisonDivergedError as error:
            results, diverged = error.results, error
        if any(results.values()):
            protocol = next(run.protocol for runs in results.values() for run in runs)
            print(f"\ntest metrics ({protocol}):\n")
            print(compare.table(results))
            print(f"\ncurves: {self.output_dir / 'compare.png'}, numbers: {self.output_dir / 'compare.json'}")
        if diverged is not None:
            raise diverged


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

        make_folder("output_dir", self.output_dir)
        interactions = load_and_describe(self)
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


COMMANDS: dict[str, Any] = {
    "train": Train,
    "compare": Compare,
    "recommend": Recommend,
    "evaluate": Evaluate,
    "export": Export,
    "graph": Graph,
    "reproduce": Reproduce,
}


def _config(command: TrainConfig) -> TrainConfig:
    """The configuration among a command's options, resolved."""
    fields = dataclasses.fields(TrainConfig)
    return TrainConfig(**{field.name: getattr(command, field.name) for field in fields}).resolved()


def _prepare(config: TrainConfig, output_dir: Path) -> "Prepared":
    """Checks everything that can be checked before training, and says what is trained on."""
    from models.training.prepare import prepare

    make_folder("output_dir", output_dir)
    prepared = prepare(load_and_describe(config), config)
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


def _parser(defaults: Mapping[str, Any]) -> Any:
    """The union of all commands; ``defaults`` replace those of the commands that train."""
    commands = []
    for name, command in COMMANDS.items():
        options = {"default": command(**defaults)} if issubclass(command, TrainConfig) else {}
        commands.append(Annotated[command, tyro.conf.subcommand(name, prefix_name=False, **options)])
    return functools.reduce(operator.or_, commands)


def _preset(arguments: Sequence[str]) -> dict[str, Any]:
    """The settings of ``--preset``, read before everything else because they are defaults."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--preset" and (equals or i + 1 < len(arguments)):
            from models.presets import load_preset

            return load_preset(value if equals else arguments[i + 1])
    return {}


def _refuse_empty_paths(arguments: Sequence[str]) -> None:
    """Refuses an empty folder or file, as from a variable that is not set: it would be the present folder.

    Raises:
      ValueError: if there is one.
    """
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        name, equals, value = argument.partition("=")
        option = name.removeprefix("--").replace("-", "_")
        if name.startswith("--") and option in PATHS and (value if equals else following) == "":
            raise ValueError(f"{option} must name a file or folder, got an empty text")


def _parse(arguments: Sequence[str]) -> Any:
    """Parses the command line.

    Raises:
      ValueError: with one line, if the arguments do not fit.
    """
    framed = io.StringIO()
    _refuse_empty_paths(arguments)
    defaults = _preset(arguments)
    try:
        with contextlib.redirect_stderr(framed):
            return tyro.cli(_parser(defaults), prog=PROGRAM, args=list(arguments))
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    command = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    raise ValueError(f"{_one_line(framed.getvalue())}; see {' '.join([PROGRAM, *command.split(), '--help'])}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 2 for bad input, 130 when interrupted."""
    try:
        _parse(sys.argv[1:] if arguments is None else arguments).run()
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'interrupted; what was written so far is kept'}", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
