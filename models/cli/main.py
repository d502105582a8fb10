"""The command line: ``python -m models train``, ``compare``, ``graph`` and more."""

import dataclasses
import errno
import functools
import itertools
import operator
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from models import processes
from models.checks import (
    GRAPH_OPTIONS,
    LOSS_OPTIONS,
    Heeded,
    check_graph,
    check_heeded,
    check_numbers,
    check_split,
)
from models.cli.commands import Evaluate, Export, Recommend, load_and_describe
from models.cli.parsing import given, parse
from models.config import (
    HEEDED,
    OPTIMIZERS,
    SELECTION,
    DeviceOptions,
    GraphConfig,
    Optimizer,
    SourceConfig,
    TrainConfig,
    needs_graph,
)
from models.files import make_folder
from models.memory import out_of_memory_told
from models.processes import INTERRUPTED, USAGE_ERROR
from models.report import Report
from models.reproduce import Reproduce
from models.training import progress

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from models.config import TableSharding
    from models.training.layout import Layout
    from models.training.training_data import TrainingData

# JAX is imported by the commands themselves, so that --help and a mistyped option answer at once.

PROGRAM = "python -m models"
DESCRIPTION = "Trains, compares and uses recommenders. --version instead of a command says which release this is."
PATHS = ("output_dir", "results_dir", "work_dir", "data_dir", "cache_dir", "checkpoint", "data", "histories", "titles")
PATHS += ("output", "per_user", "attributes", "only_items", "exclude_items", "candidates", "vectors", "embeddings")
PATHS += ("runs",)
BROKEN_PIPE = 141
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where a run starts from."""

    found: ClassVar[str]
    """What an output folder holds that there is something to go on with in, as a pattern."""

    preset: str | None = None
    """Settings to start from, which other options override: MODEL-DATASET, as in the paper, such as sasrec-beauty, with
    beauty, toys, tools or ml-1m ("?" lists all), or a YAML file."""
    resume: bool = False
    """Go on from the newest checkpoint, if there is one; a finished run is kept as it is."""
    overwrite: bool = False
    """Remove a run that the output folder already holds."""
    quiet: bool = False
    """Show no progress, only what is trained on and what came out."""
    given: tyro.conf.Suppress[tuple[str, ...]] = ()
    """The options that the command line itself sets; neither a preset nor a default."""

    def _check_output(self) -> None:
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other; give one of them")

    def _goes_on(self, output_dir: Path) -> bool:
        """Whether this goes on with something: it must be given what it was begun with, heeded or not."""
        return self.resume and any(output_dir.glob(self.found))


@dataclasses.dataclass(frozen=True)
class Train(RunOptions, DeviceOptions):
    """Train one model and test it at its best epoch."""

    found: ClassVar[str] = "run.json"

    output_dir: Path = Path("runs/train")
    """Folder for checkpoints, run.json, history.jsonl, result.json and curve.png."""

    def run(self) -> None:
        """Trains, and prints where the results are."""
        self._check_output()
        config = _config(self)
        _check_mesh(self, config)
        if not self._goes_on(self.output_dir):
            check_heeded([config], _given(self))
        if self.mesh is not None and processes.join(self):
            with processes.together(), progress.silent(self.quiet or not processes.is_first()):
                self._train(config)
        else:
            self._train(config)

    def _train(self, config: TrainConfig) -> None:
        from models.training import loop

        mesh = None
        if self.mesh is not None:
            from models.mesh import make_mesh

            mesh = make_mesh(self.mesh)
            processes.check_same(
                "meshes or table shardings", f"{sorted(mesh.shape.items())} {self.table_sharding}"[:64]
            )
        prepared = _prepare(
            config, self.output_dir, num_devices=1 if mesh is None else mesh.size, smooths=needs_graph(config)
        )
        layout = None if mesh is None else _layout(mesh, self.table_sharding, config, prepared)
        result = loop.train(
            prepared,
            config,
            config.optimizer,
            self.output_dir,
            resume=self.resume,
            overwrite=self.overwrite,
            layout=layout,
        )
        memory = f", peak memory {result.peak_memory / 2**30:.2f} GiB" if result.peak_memory else ""
        print(
            f"best epoch {result.best_epoch} of {len(result.losses)}, {result.epoch_seconds:.2f} s an epoch, "
            f"{result.total_seconds:.0f} s{memory}"
        )
        print("test: " + "  ".join(f"{name} {value:.4f}" for name, value in result.test.items()))
        print(f"({result.protocol})")
        print(f"results: {self.output_dir / 'result.json'}, curve: {self.output_dir / 'curve.png'}")
        if config.per_user and not (self.output_dir / "per_user.csv").exists():
            print(
                "it was finished before, and is kept as it is, without per_user.csv: "
                f"python -m models evaluate --checkpoint {self.output_dir} --per-user FILE writes one"
            )


@dataclasses.dataclass(frozen=True)
class Compare(RunOptions):
    """Train the same model with several optimizers, on the same data and seeds."""

    found: ClassVar[str] = "*/run.json"

    arms: tuple[Optimizer, ...] = OPTIMIZERS
    """The optimizers; gains are over the first. A model that is fitted in closed form has one alone."""
    seeds: int = 1
    """How many seeds, counted on from seed. Several give mean ± standard deviation and a paired t-test."""
    output_dir: Path = Path("runs/compare")
    """Folder for compare.json, compare.png, report.html and one folder a run."""

    def run(self) -> None:
        """Trains every arm, and prints the table and where the picture and the page about it are."""
        from models.training import compare

        self._check_output()
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms must be one or more optimizers, each once, got {' '.join(self.arms) or 'none'}")
        config = _config(self)
        check_numbers(dataclasses.replace(config, seed=config.seed + self.seeds - 1))  # the last of them
        arms = ("closed-form",) if config.optimizer == "closed-form" else self.arms
        each = [dataclasses.replace(config, optimizer=arm).checked() for arm in arms]
        if not self._goes_on(self.output_dir):
            if arms != self.arms and "arms" in self.given:
                raise ValueError(f"arms is not heeded by model {config.model}, got {' '.join(self.arms)}; leave it out")
            check_heeded(each, _given(self), called={"optimizer": "arms "})
        prepared = _prepare(config, self.output_dir, smooths=any(map(needs_graph, each)))
        names = [f"{arm}-{config.seed + i}" for arm in arms for i in range(self.seeds)]
        diverged = None
        try:
            results = compare.compare(
                prepared,
                config,
                self.output_dir,
                optimizers=arms,
                seeds=self.seeds,
                resume=self.resume,
                overwrite=self.overwrite,
            )
        except compare.ComparisonDivergedError as error:
            results, diverged = error.results, error
        if any(results.values()):
            protocol = next(run.protocol for runs in results.values() for run in runs)
            print(f"\ntest metrics ({protocol}):\n")
            print(compare.table(results))
            reached = compare.times_to_quality(compare.read_courses(results, self.output_dir))
            if reached:
                print(f"\ntrained until the best validation {SELECTION} of {arms[0]} with the same seed is reached:\n")
                print(compare.time_table(reached))
            print(f"\ncurves: {self.output_dir / 'compare.png'}, numbers: {self.output_dir / 'compare.json'}")
            self._report(names, prepared)
        others = {path.parent.name for path in self.output_dir.glob("*-*/run.json")} - {*names}
        if self.overwrite and others:
            print(f"note: {self.output_dir} has runs of an earlier comparison besides, {', '.join(sorted(others))}")
        if diverged is not None:
            raise diverged

    def _report(self, names: Sequence[str], prepared: "TrainingData") -> None:
        """Writes the page about the comparison. What was trained is worth more than a page that cannot be made."""
        from models.report.page import write_comparison

        folders = [self.output_dir / name for name in names if (self.output_dir / name / "run.json").exists()]
        try:
            write_comparison(folders, prepared, self.output_dir / "report.html")
        except (ValueError, OSError) as error:
            print(f"warning: there is no report: {error}", file=sys.stderr)
        else:
            print(f"report, to open in a browser: {self.output_dir / 'report.html'}")


@dataclasses.dataclass(frozen=True)
class Tune(RunOptions):
    """Search for settings by the validation items, and test the best ones alone. Goes on with --resume when killed."""

    found: ClassVar[str] = "search.journal"

    search: tuple[str, ...] = ()
    """What is searched: name=low:high, name=low:high:log, name=a,b,c, or a name alone, in its usual range (left out: of
    learning-rate, weight-decay, dropout-rate, beta, num-layers, max-hops and graph, those that the model heeds)."""
    trials: int = 30
    """How many settings are tried, those of earlier calls included."""
    hours: float | None = None
    """Try for no longer than about this; --resume goes on with the trial under way (left out: until all are done)."""
    pruner: Literal["median", "successive-halving", "none"] = "median"
    """When trials are stopped early. median: behind the median of the others at the same epoch. successive-halving:
    a third goes on, again and again. none: never."""
    output_dir: Path = Path("runs/tune")
    """Folder for trials.json, best.yaml (a preset), search.png, search.journal and one folder a trial."""

    def run(self) -> None:
        """Searches, and prints what was found and where it is."""
        self._check_output()
        if self.trials < 1:
            raise ValueError(f"trials must be at least 1, got {self.trials}")
        if self.hours is not None and not 0 < self.hours < float("inf"):
            raise ValueError(f"hours must be a number above 0, got {self.hours}")
        from models.tuning.space import parse_space

        space = parse_space(self.search, _values(self, kept=_searched_for(self)))
        if not self._goes_on(self.output_dir):
            check_heeded(space.variants(), _given(self), called=space.called)
        from models.training.loggers import check_installed
        from models.tuning import search

        search.require_optuna()
        check_installed(space.base.logger)
        make_folder("output_dir", self.output_dir)
        print(f"searched: {' '.join(space.describe())}", flush=True)
        found = search.tune(
            load_and_describe(space.base),
            space,
            self.output_dir,
            trials=self.trials,
            hours=self.hours,
            pruner=self.pruner,
            resume=self.resume,
            overwrite=self.overwrite,
            say=functools.partial(print, flush=True),
        )
        folder = self.output_dir / "trials" / f"{found.best.number:04}"
        print(f"best: trial {found.best.number} of {len(found.trials)}, epoch {found.result.best_epoch}: {folder}")
        print("test: " + "  ".join(f"{name} {value:.4f}" for name, value in found.result.test.items()))
        print(f"({found.result.protocol})")
        names = ("best.yaml", "trials.json", "search.png")
        print("settings: {}, trials: {}, picture: {}".format(*(self.output_dir / name for name in names)))


@dataclasses.dataclass(frozen=True)
class Graph(GraphConfig, SourceConfig):
    """Build a graph, describe it, and draw its degrees and, if it is small, the graph itself."""

    heeded: ClassVar[Heeded] = HEEDED
    """What options need in order to make a difference."""

    part: Literal["train", "all"] = "train"
    """train: the training part of the split. all: every interaction."""
    output_dir: Path = Path("runs/graph")
    """Folder for weights.npz, degrees.png and, for small graphs, drawing.png."""
    given: tyro.conf.Suppress[tuple[str, ...]] = ()
    """The options that the command line itself sets."""

    def run(self) -> None:
        """Builds the graph, and prints its summary and where the pictures are."""
        check_numbers(self)
        check_split(self)
        check_graph(self)
        without = "part all" if self.part == "all" else f"graph {' '.join(self.graph)}"
        if self.part == "all" or set(self.graph) <= {"attributes", "knn"}:  # of no interactions at all
            for name, usual in [("cold_items", 0), ("split", "leave-one-out")]:
                if (value := getattr(self, name)) != usual:
                    raise ValueError(f"{name} is not heeded with {without}, got {value}; leave it out")
        check_heeded([self], _given(self))
        from models import graphs
        from models.data import split_interactions

        graphs.check_folder(self.output_dir)
        make_folder("output_dir", self.output_dir)
        interactions = load_and_describe(self)
        if self.part == "train" and not set(self.graph) <= {"attributes", "knn"}:
            interactions = split_interactions(interactions, self).train
        adjacency = graphs.build_graph(interactions, self)
        source = "embedded data" if self.data is None else self.data.stem
        title = graphs.describe_graphs(source, self.part, self)
        print(title)
        for note in graphs.graph_notes(self, interactions.item_ids):
            print(f"  {note}")
        for line in graphs.describe(adjacency, title, self.output_dir):
            print(line)


COMMANDS: dict[str, Any] = {
    "train": Train,
    "compare": Compare,
    "tune": Tune,
    "recommend": Recommend,
    "evaluate": Evaluate,
    "export": Export,
    "graph": Graph,
    "reproduce": Reproduce,
    "report": Report,
}
TRAINING = ("train", "compare", "tune")
# What a configuration refuses to hold beside another choice, see models.checks; any optimizer goes with all of it.
REFUSED = (*LOSS_OPTIONS, *GRAPH_OPTIONS, "split_quantiles", "split_times")


def _config(command: Any) -> TrainConfig:
    """The checked configuration among a command's options."""
    from models.architectures.registry import config_from_dict

    config = config_from_dict(_values(command))
    if max(config.keep_epochs, default=0) > config.epochs:  # a table's run may end early, and go on later
        raise ValueError(f"keep_epochs must be at most epochs, {config.epochs}, got {max(config.keep_epochs)}")
    return config


def _values(command: Any, *, kept: Collection[str] = ()) -> dict[str, Any]:
    """The fields of the configuration among a command's options, but for what is passed over, see below."""
    kind = next(base for base in type(command).__mro__ if base.__name__.endswith("Config"))
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: getattr(command, name) for name in names if name in kept or not _is_passed_over(command, name)}


def _is_passed_over(command: Any, name: str) -> bool:
    """Whether a value is a preset's for another loss, graph or split than the command line chooses.

    Only of what a configuration refuses to hold beside that choice: the rest of a preset stays as it is.
    """
    if name in command.given or name not in REFUSED:
        return False
    deciding = [x for x in command.heeded[name] if x.option != "optimizer"]
    return any(x.option in command.given and not x.holds(command) for x in deciding)


def _searched_for(command: Any) -> set[str]:
    """The options of a search that may be for some of its trials alone."""
    from models.tuning.space import field_of

    searched = {field_of(text) for text in command.search}
    deciding = ((name, {x.option for x in conditions}) for name, conditions in command.heeded.items())
    return {"attributes", *(name for name, options in deciding if options & searched)}


def _given(command: Any) -> dict[str, Any]:
    """The options that the command line itself sets, with their values."""
    return {name: getattr(command, name) for name in command.given}


def _check_mesh(options: DeviceOptions, config: TrainConfig) -> None:
    """Checks the mesh that is asked for against the configuration, as far as that needs neither data nor devices."""
    if options.mesh is None:
        usual = DeviceOptions()
        for field in dataclasses.fields(DeviceOptions):
            value = getattr(options, field.name)
            if value != getattr(usual, field.name):
                raise ValueError(f"{field.name} is not heeded without a mesh, got {value}; give --mesh")
        return
    from models.mesh import parse_mesh
    from models.training.layout import check_mesh

    sizes = parse_mesh(options.mesh)
    check_mesh(sizes, config)
    if options.table_sharding != DeviceOptions.table_sharding and sizes["model"] == 1:
        raise ValueError(
            f"table_sharding is not heeded by mesh {options.mesh}, got {options.table_sharding}; leave it out or "
            "give a mesh with a model axis, such as --mesh model=2"
        )


def _layout(mesh: "Mesh", sharding: "TableSharding", config: TrainConfig, prepared: "TrainingData") -> "Layout":
    """How the run lies on the mesh; says what is filled up."""
    from models.mesh import sizes_in_words
    from models.training.layout import make_layout

    train = prepared.split.train
    layout, notes = make_layout(mesh, sharding, config, num_users=train.num_users, num_items=train.num_items)
    print(f"mesh: {sizes_in_words(mesh.shape)}, tables split by {sharding}")
    for note in notes + layout.feed_notes(prepared.feed):
        print(note, flush=True)
    return layout


def _prepare(config: TrainConfig, output_dir: Path, *, num_devices: int = 1, smooths: bool) -> "TrainingData":
    """Checks everything that can be checked before training, and says what is trained on."""
    from models.graphs import graph_notes
    from models.training.loggers import check_installed
    from models.training.training_data import make_training_data

    check_installed(config.logger)
    make_folder("output_dir", output_dir)
    prepared = make_training_data(load_and_describe(config), config, num_devices, smooths=smooths)
    if prepared.nodes is not None:
        adjacency = prepared.nodes.adjacency
        print(f"graph: {adjacency.nse:,} entries between {adjacency.shape[0]:,} nodes", flush=True)
        if not adjacency.nse:
            print("warning: the graph has no entries: nothing is smoothed, only made smaller", file=sys.stderr)
        for note in graph_notes(config, prepared.interactions.item_ids):
            print(f"  {note}", flush=True)
    if prepared.test.num_repeated:
        print(
            f"warning: {prepared.test.num_repeated:,} of {prepared.test.num_users:,} test users had the item to find "
            "before; it is ranked while the rest of their history is not, and so easy to find: --duplicates first "
            "keeps new items alone, --no-exclude-seen ranks all items",
            file=sys.stderr,
        )
    return prepared


def _for_model(command: type[RunOptions], config_class: type[TrainConfig], defaults: Mapping[str, Any]) -> Any:
    """A command with the options of one model, and its defaults but for those given."""
    hidden = {}
    if command is Compare:
        # Every arm has an optimizer of its own.
        usual = next(field.default for field in dataclasses.fields(config_class) if field.name == "optimizer")
        hidden = {"optimizer": (tyro.conf.Suppress[Optimizer], usual)}
    fields = [(name, kind, dataclasses.field(default=default)) for name, (kind, default) in hidden.items()]
    made = dataclasses.make_dataclass(command.__name__, fields, bases=(command, config_class), frozen=True)
    made.__doc__ = command.__doc__
    return made, made(**{name: value for name, value in defaults.items() if name not in hidden})


def _commands(arguments: Sequence[str], preset: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The commands by name, and their defaults. Those that train have the options of the model that is asked for."""
    commands: dict[str, tuple[Any, Any]] = {name: (command, None) for name, command in COMMANDS.items()}
    if arguments and arguments[0] in TRAINING:
        from models.architectures.registry import DEFAULT, model_class

        model = _option(arguments, "--model") or preset.get("model", DEFAULT)
        if model != preset.get("model", model):
            raise ValueError(f"model: the preset is for {preset['model']}, got {model}; leave one of them out")
        config_class = model_class(model).config_class
        commands[arguments[0]] = _for_model(COMMANDS[arguments[0]], config_class, preset)
    return commands


def _parser(commands: Mapping[str, tuple[Any, Any]]) -> Any:
    """The union of all commands."""
    parts = []
    for name, (command, default) in commands.items():
        options = {} if default is None else {"default": default}
        parts.append(Annotated[command, tyro.conf.subcommand(name, prefix_name=False, **options)])
    return functools.reduce(operator.or_, parts)


def _option(arguments: Sequence[str], option: str) -> str | None:
    """The value of an option that must be known before the others; None: it is not there."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option and (equals or i + 1 < len(arguments)):
            return value if equals else arguments[i + 1]
    return None


def _preset(arguments: Sequence[str]) -> dict[str, Any]:
    """The settings of ``--preset``, read before everything else because they are defaults."""
    name = _option(arguments, "--preset")
    if name is None:
        return {}
    from models.presets import load_preset

    return load_preset(name)


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


def _version() -> str:
    from sevo_optax import __version__

    return f"sevo-optax {__version__}"


def _printable() -> None:
    """Has streams that cannot hold a character take its escape instead."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _output_fails() -> bool:
    """Whether standard output cannot be written to. If it can, this leaves an empty line there."""
    try:
        print(flush=True)
    except OSError:
        _drop_output()
        return True
    return False


def _drop_output() -> None:
    """Has what still waits to be written vanish, or the interpreter would complain at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: Sequence[str]) -> None:
    if list(arguments) == ["--version"]:
        print(_version())
        sys.stdout.flush()
        return
    _refuse_empty_paths(arguments)
    preset = _preset(arguments)
    commands = _commands(arguments, preset)
    known = {name: command for name, (command, _) in commands.items()}
    command = parse(_parser(commands), arguments, commands=known, prog=PROGRAM, description=DESCRIPTION)
    if hasattr(command, "given"):
        command = dataclasses.replace(command, given=given(arguments, type(command)))
    if isinstance(command, Compare) and preset.get("optimizer", command.arms[0]) not in command.arms:
        print(
            f"note: the preset's settings are those of {preset['optimizer']}, which is not among the arms; "
            f"{', '.join(command.arms)} have its learning rate and weight decay",
            file=sys.stderr,
        )
    trains = isinstance(command, RunOptions)
    with progress.silent(getattr(command, "quiet", False)), out_of_memory_told(trains=trains):
        command.run()
    sys.stdout.flush()  # here, where a full disk can still be reported


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 2 for bad input, 130 when interrupted, 141 if nobody reads on."""
    _printable()
    try:
        _run(sys.argv[1:] if arguments is None else arguments)
    except BrokenPipeError:
        _drop_output()  # whoever read it has seen enough
        return BROKEN_PIPE
    except OSError as error:
        full = error.errno in FULL
        where = error.filename or ("standard output" if full and _output_fails() else "")
        reason = f"{where}: {error.strerror}" if where and error.strerror else str(error)
        advice = "; make room, then go on with --resume" if full else ""
        print(f"error: {reason}{advice}", file=sys.stderr)
        return USAGE_ERROR
    except (ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'interrupted; what was written so far is kept'}", file=sys.stderr)
        return INTERRUPTED
    return 0
