"""The commands that use a trained model: ``python -m models recommend``, ``evaluate`` and ``export``."""

import csv
import dataclasses
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tabulate import tabulate

from models.checks import QUANTILES, check_titles
from models.config import SELECTION, Duplicates, Grouping, ReadingConfig, SourceConfig, SplitMethod, TrainConfig
from models.files import make_folder, write_bytes, write_json, write_text
from models.training.files import refuse_run_file, refuse_same

if TYPE_CHECKING:
    from models.data import Interactions
    from models.serving.trained import Recommendation

# JAX is imported by the commands themselves, so that --help and a mistyped option answer at once.

USERS_READ_AT_ONCE = 8192
SHOWN = 5
ITEM_COLUMNS = ("rank", "item", "score")
LEAST_TO_SPLIT = 3
# A user, if there are several, and what to recommend.
Found = tuple[Any, "Recommendation"]


@dataclasses.dataclass(frozen=True)
class Recommend:
    """Recommend what may follow one history, or every history of a file, or to users known from training."""

    checkpoint: Path
    """Folder of the training run: what its --output-dir was."""
    which: Literal["best", "last"] = "best"
    """The parameters with the best validation result, or the newest."""
    history: tuple[str, ...] = ()
    """Ids of the items of one user, oldest first."""
    histories: Path | None = None
    """A file of interactions instead: a recommendation for every user in it."""
    users: tuple[str, ...] = ()
    """Ids of users that the model was trained with instead, for models with a table of users."""
    k: int = 10
    """How many items to recommend."""
    include_seen: bool = False
    """Whether items of the history may be recommended again."""
    only_items: Path | None = None
    """A text file with the only items that may be recommended, an id a line."""
    exclude_items: Path | None = None
    """A text file of items that are not recommended to anybody, an id a line."""
    candidates: Path | None = None
    """A file of interactions: the only items that each user may be recommended (with --histories or --users)."""
    titles: Path | None = None
    """A table with one line an item (.csv, .tsv, .parquet, .json, also compressed), to show titles from."""
    title_item_column: str = "item_id"
    """Its column of item ids."""
    title_column: str = "title"
    """Its column of titles."""
    output: Path | None = None
    """A .csv (one line an item) or .jsonl (one line a user) to write (left out: a table is printed)."""
    reading: tyro.conf.OmitArgPrefixes[ReadingConfig] = dataclasses.field(default_factory=ReadingConfig)
    """How the files of histories and candidates are read."""

    def run(self) -> None:
        """Recommends, and prints a table or where the recommendations are."""
        if bool(self.history) + (self.histories is not None) + bool(self.users) != 1:
            raise ValueError(
                "give either --history with the ids of one user's items, or --histories with a file, or --users with "
                "ids of users from training"
            )
        if self.candidates is not None and self.history:
            raise ValueError("candidates belong to users; with --history give the only items with --only-items")
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        self._check_unheeded()
        if self.output is not None:
            if self.output.suffix not in WRITERS:
                raise ValueError(f"output must end in {' or '.join(WRITERS)}, got {self.output}")
            _make_parent("output", self.output)
            refuse_run_file("output", self.output, self.checkpoint)
            names = ("histories", "titles", "only_items", "exclude_items", "candidates")
            refuse_same("output", self.output, {name: getattr(self, name) for name in names})
        titles = None
        if self.titles is not None:
            from models.data import read_titles

            titles = read_titles(self.titles, item_column=self.title_item_column, title_column=self.title_column)

        options: dict[str, Any] = {"k": self.k, "exclude_seen": not self.include_seen}
        if self.only_items is not None:
            options["only_items"] = read_ids("only_items", self.only_items)
        if self.exclude_items is not None:
            options["exclude_items"] = read_ids("exclude_items", self.exclude_items)
        candidates = None if self.candidates is None else self._candidates()

        from models.serving.trained import TrainedModel

        recommender = TrainedModel.load(self.checkpoint, self.which)
        _refuse_sources("output", self.output, recommender.config)
        for name in ("only_items", "exclude_items"):
            if unknown := recommender.unknown(options.get(name, ())):
                print(f"warning: {name}: unknown to the model and passed over: {_some(unknown)}", file=sys.stderr)
        recommend = partial(recommender.recommend, **options)
        if self.users:
            mine = None  # an id that is text may have spaces at its ends
            if candidates is not None:
                mine = [candidates.get(user, candidates.get(user.strip(), [])) for user in self.users]
            found = zip(self.users, recommender.recommend_to_users(self.users, **options, candidates=mine), strict=True)
        elif self.histories is None:
            (recommendation,) = recommend([self.history])  # type: ignore[call-arg]  # mypy fills in the wrong ones
            if len(recommendation.unknown) == len(set(self.history)):
                raise ValueError(
                    f"history: {self.checkpoint} knows none of {_some(recommendation.unknown)}; "
                    f"an item it knows is {recommender.item_ids[1]}"
                )
            found = [(None, recommendation)]
        else:
            data = load_and_describe(SourceConfig(data=self.histories, **dataclasses.asdict(self.reading)))
            found = _recommend_to_all(data, recommend, candidates)
        watch = _Watch()
        if self.output is None:
            print(_table(list(_lines(watch.pass_on(found), titles))))
        else:
            write = WRITERS[self.output.suffix]
            write_bytes(self.output, lambda file: write(file, watch.pass_on(found), titles))
            print(f"recommendations for {watch.users:,} {'user' if watch.users == 1 else 'users'}: {self.output}")
        watch.report()

    def _check_unheeded(self) -> None:
        """Refuses options that belong to a file which is not given."""
        check_titles(self)
        if self.histories is None and self.candidates is None:
            for field in dataclasses.fields(self.reading):
                value = getattr(self.reading, field.name)
                if value != field.default:
                    raise ValueError(
                        f"{field.name} is not heeded without a file of interactions, got {value}; leave it out or give "
                        "--histories or --candidates"
                    )

    def _candidates(self) -> dict[str, list[Any]]:
        """The candidates of each user, by the user's id as text."""
        data = load_and_describe(SourceConfig(data=self.candidates, **dataclasses.asdict(self.reading)))
        users = map(str, data.user_ids.tolist())
        return {user: data.item_ids[items].tolist() for user, items in zip(users, data, strict=True)}


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Test a trained model, on the data it comes from or on others."""

    checkpoint: Path
    """Folder of the training run: what its --output-dir was."""
    which: Literal["best", "last"] = "best"
    """The parameters with the best validation result, or the newest."""
    data: Path | None = None
    """Another file, or name of a public data set; its items are matched by their ids (left out: the run's data)."""
    duplicates: Duplicates | None = None
    """Which interactions of the same user and item stay (left out, here and in what follows: as in the run)."""
    min_user_interactions: int | None = None
    """Users with fewer interactions are left out."""
    min_item_interactions: int | None = None
    """Items with fewer interactions are left out."""
    split: SplitMethod | None = None
    """leave-one-out: test on each user's last item. global-time: on each user's first item behind a moment."""
    split_quantiles: tuple[float, float] | None = None
    """global-time: shares of all interactions before the moments of validation and test."""
    split_times: tuple[str, str] | None = None
    """global-time: the two moments themselves."""
    ks: tuple[int, ...] | None = None
    """Lengths of the lists that metrics are given for."""
    exclude_seen: tyro.conf.FlagCreatePairsOff[bool] = False
    """Leave items in a user's history out of the ranking, even if the run did not."""
    include_seen: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(aliases=["--no-exclude-seen"])] = False
    """Rank items in a user's history too, even if the run did not."""
    cache_dir: Path | None = None
    """Where public data sets are kept."""
    by: tuple[Grouping, ...] = ()
    """Groups of users to show as well, by their item's training interactions, or by how long their history is."""
    per_user: Path | None = None
    """A .csv to write the rank of every test user's item to."""
    output: Path | None = None
    """A .json to write the result to."""
    reading: tyro.conf.OmitArgPrefixes[ReadingConfig] = dataclasses.field(default_factory=ReadingConfig)
    """How the data are read (left out: as in the run, unless --data is given)."""
    given: tyro.conf.Suppress[tuple[str, ...]] = ()
    """The options that the command line itself sets."""

    def run(self) -> None:
        """Tests, and prints the metrics and how they came about."""
        if self.exclude_seen and self.include_seen:
            raise ValueError("exclude_seen and include_seen exclude each other; give one of them")
        for name in ("per_user", "output"):
            _make_parent(name, getattr(self, name))
            refuse_run_file(name, getattr(self, name), self.checkpoint)
        refuse_same("output", self.output, {"per_user": self.per_user})

        from models.data import of_known_users, split_interactions
        from models.serving.trained import evaluate, in_catalogue
        from models.training.checkpoints import load_run
        from models.training.overlap import SPLITTING, overlap_note

        run = load_run(self.checkpoint, self.which)
        config = self._config(run.info.config)
        for name in ("per_user", "output"):
            refuse_same(name, getattr(self, name), {"data": config.data})  # which may be the run's
            _refuse_sources(name, getattr(self, name), run.info.config)
        interactions = load_and_describe(config)
        same_data = run.info.trained_on(interactions)
        if not same_data:
            shortest = LEAST_TO_SPLIT if config.split == "leave-one-out" else 1
            interactions = in_catalogue(interactions, run.item_ids, min_user_interactions=shortest)
            print(f"  {interactions.notes[-1]}")
        split = split_interactions(interactions, config)
        if run.users is not None:
            split = of_known_users(split, run.users.ids, trained_on=same_data)
        note = overlap_note(run, config, split, interactions if same_data else None)
        evaluation = evaluate(run, split, ks=config.ks, exclude_seen=config.exclude_seen)
        tested = f"at the epoch with the best validation {SELECTION}" if self.which == "best" else "at the newest epoch"
        protocol = f"{evaluation.protocol}{note}; tested {tested}"
        print(f"{self.checkpoint}, epoch {run.epoch}: {len(evaluation.ranks):,} users")
        print("test: " + "  ".join(f"{name} {value:.4f}" for name, value in evaluation.metrics.items()))
        print(f"({protocol})")
        for grouping in dict.fromkeys(self.by):
            trained_on = same_data and all(getattr(config, x) == getattr(run.info.config, x) for x in SPLITTING)
            print(f"\n{_groups_table(grouping, evaluation.groups[grouping], trained_on)}")
        if self.per_user is not None:
            rows = zip(
                evaluation.users.tolist(), evaluation.items.tolist(), (evaluation.ranks + 1).tolist(), strict=True
            )
            write_text(self.per_user, _csv([("user", "item", "rank"), *rows]))
            print(f"ranks: {self.per_user}")
        if self.output is not None:
            report = {
                "checkpoint": str(self.checkpoint),
                "which": self.which,
                "epoch": run.epoch,
                "data": None if config.data is None else str(config.data),
                "users": len(evaluation.ranks),
                "protocol": protocol,
                "test": evaluation.metrics,
            }
            if self.by:
                report["groups"] = {grouping: evaluation.groups[grouping] for grouping in self.by}
            write_json(self.output, report)
            print(f"result: {self.output}")

    def _config(self, config: TrainConfig) -> TrainConfig:
        """The run's configuration with what this command's options say otherwise."""
        usual = dataclasses.asdict(ReadingConfig())
        reading = {} if self.data is None else usual
        own = dataclasses.asdict(self.reading)
        reading |= {name: value for name, value in own.items() if name in self.given or value != usual[name]}
        names = ("data", "cache_dir", "duplicates", "min_user_interactions", "min_item_interactions", "ks")
        names += ("split", "split_quantiles", "split_times")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if "split_quantiles" in given:
            given.setdefault("split_times", None)
        if given.get("split_times") is not None or given.get("split") == "leave-one-out":
            given.setdefault("split_quantiles", QUANTILES)
        if given.get("split") == "leave-one-out":
            given.setdefault("split_times", None)
        if self.exclude_seen or self.include_seen:
            given["exclude_seen"] = self.exclude_seen
        return dataclasses.replace(config, **reading | given).checked()


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a trained model to one file that JAX alone can run, on a CPU, a GPU or a TPU."""

    checkpoint: Path
    """Folder of the training run: what its --output-dir was."""
    which: Literal["best", "last"] = "best"
    """The parameters with the best validation result, or the newest."""
    output: Path | None = None
    """File to write; the items' ids come beside it (left out: model.jaxexport in the run's folder)."""
    embeddings: Path | None = None
    """An .npz to write instead, or with --output besides: the items' ids and vectors, for --graph knn --vectors."""

    def run(self) -> None:
        """Exports, and prints where to and how to use it."""
        if self.embeddings is not None and self.embeddings.suffix != ".npz":
            raise ValueError(f"embeddings must end in .npz, got {self.embeddings}")
        _make_parent("embeddings", self.embeddings)
        refuse_run_file("embeddings", self.embeddings, self.checkpoint)
        output = self.checkpoint / "model.jaxexport" if self.output is None else self.output
        if self.output is not None:
            _make_parent("output", output)
            refuse_run_file("output", output, self.checkpoint)

        from models.serving import export

        if self.output is not None:
            refuse_same("embeddings", self.embeddings, {"output": output, "its ids": export.items_path(output)})
        from models.training.checkpoints import load_run

        run = load_run(self.checkpoint, self.which)
        _refuse_sources("embeddings", self.embeddings, run.info.config)
        for path in (output, export.items_path(output)):
            _refuse_sources("output", path, run.info.config)
        if self.embeddings is not None:
            vectors = export.write_embeddings(run, self.embeddings)
            print(
                f"{self.checkpoint}, epoch {run.epoch}: wrote {len(vectors):,} vectors of {vectors.shape[1]} numbers "
                f"and the items' ids, {self.embeddings}; give it to train --graph knn --vectors {self.embeddings}"
            )
            if self.output is None:
                return
        items = export.write_export(run, output)
        size = output.stat().st_size / 1e6
        print(
            f"{self.checkpoint}, epoch {run.epoch}: wrote {output} ({size:.1f} MB, for {', '.join(export.PLATFORMS)})"
        )
        print(f"and the items' ids: {items}. To use them:\n")
        print(export.usage(run, output, items))


def load_and_describe(source: SourceConfig) -> "Interactions":
    """Reads the data, and says what it is and what was done to it."""
    from models.data import load_interactions

    interactions = load_interactions(source)
    print(f"{source.data or 'embedded data'}: {interactions}")
    for note in interactions.notes:
        if note.startswith("warning:"):
            print(note, file=sys.stderr)
        else:
            print(f"  {note}")
    return interactions


def read_ids(option: str, path: Path) -> list[str]:
    """Reads the ids of items from a text file, one a line.

    Raises:
      ValueError: if it cannot be read, or holds none; it names the option.
    """
    try:
        ids = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text in UTF-8"
        raise ValueError(f"{option}: {path} cannot be read ({reason}); give a text file with an id a line") from None
    ids = [raw for raw in ids if raw]
    if not ids:
        raise ValueError(f"{option}: {path} holds no id; give a text file with an id a line")
    return ids


def _recommend_to_all(
    interactions: "Interactions",
    recommend: Callable[..., list["Recommendation"]],
    candidates: Mapping[str, list[Any]] | None = None,
) -> Iterator[Found]:
    """Recommends to some users at a time: what is found for a large file never exists whole."""
    pairs = zip(interactions.user_ids.tolist(), interactions, strict=True)
    while group := list(itertools.islice(pairs, USERS_READ_AT_ONCE)):
        histories = [interactions.item_ids[items] for _, items in group]
        mine = None if candidates is None else [candidates.get(str(user), []) for user, _ in group]
        yield from zip([user for user, _ in group], recommend(histories, candidates=mine), strict=True)


class _Watch:
    """Passes recommendations on and notes what was unknown."""

    def __init__(self) -> None:
        self.users = self.with_unknown = self.empty = 0
        self.unknown: dict[Any, None] = {}

    def pass_on(self, found: Iterable[Found]) -> Iterator[Found]:
        for user, recommendation in found:
            self.users += 1
            self.with_unknown += bool(recommendation.unknown)
            self.empty += not recommendation.items
            self.unknown.update(dict.fromkeys(recommendation.unknown))
            yield user, recommendation

    def report(self) -> None:
        if self.unknown:
            where = f", in {self.with_unknown:,} of {self.users:,} histories" if self.users > 1 else ""
            print(f"warning: unknown to the model and passed over{where}: {_some(self.unknown)}", file=sys.stderr)
        if self.empty:
            print(f"warning: no recommendation for {self.empty:,} of {self.users:,} users", file=sys.stderr)


def _some(ids: Iterable[Any]) -> str:
    """A list of ids, shortened."""
    ids = [str(raw_id) for raw_id in ids]
    return ", ".join(ids[:SHOWN]) + (f" and {len(ids) - SHOWN:,} more" if len(ids) > SHOWN else "")


def _lines(found: Iterable[Found], titles: Mapping[str, str] | None) -> Iterator[dict[str, Any]]:
    """One line an item."""
    for user, recommendation in found:
        for rank, (item, score) in enumerate(zip(recommendation.items, recommendation.scores, strict=True), start=1):
            line = {} if user is None else {"user": user}
            line |= zip(ITEM_COLUMNS, (rank, item, float(f"{score:.6g}")), strict=True)
            yield line if titles is None else line | {"title": titles.get(str(item), "")}


def _write_csv(file: IO[bytes], found: Iterable[Found], titles: Mapping[str, str] | None) -> None:
    for number, (user, recommendation) in enumerate(found):
        if not number:  # here, since there may be users, but no recommendation
            names = [*(() if user is None else ("user",)), *ITEM_COLUMNS, *(() if titles is None else ("title",))]
            file.write(_csv([names]).encode())
        file.write(_csv(line.values() for line in _lines([(user, recommendation)], titles)).encode())


def _write_jsonl(file: IO[bytes], found: Iterable[Found], titles: Mapping[str, str] | None) -> None:
    for user, recommendation in found:
        record = {} if user is None else {"user": user}
        record |= dataclasses.asdict(recommendation)
        if titles is not None:
            record["titles"] = [titles.get(str(item), "") for item in recommendation.items]
        file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())


WRITERS = {".csv": _write_csv, ".jsonl": _write_jsonl}


def _csv(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _table(lines: list[dict[str, Any]]) -> str:
    """Lines under their names; numbers to the right, scores with four digits that count."""
    if not lines:
        return ""
    cells = [[f"{value:#.4g}" if name == "score" else str(value) for name, value in line.items()] for line in lines]
    sides = ["left" if isinstance(value, str) else "right" for value in lines[0].values()]
    return tabulate([list(lines[0]), *cells], tablefmt="plain", disable_numparse=True, colalign=sides)


def _groups_table(grouping: Grouping, groups: Mapping[str, Mapping[str, Any]], trained_on: bool) -> str:
    """The metrics of groups of users, a group a line.

    Args:
      grouping: what the users are grouped by.
      groups: metrics by the group's name.
      trained_on: whether the run was trained on the training part of the data that it is tested on.
    """
    from models.evaluation.groups import COUNTED

    names = [name for name in max(groups.values(), key=len) if name != "users"]
    lines = [[grouping, "users", *names]]
    for group, found in groups.items():
        values = [f"{found[name]:.4f}" for name in names] if found["users"] else ["none"]
        lines.append([group, f"{found['users']:,}", *values])
    sides = ["left"] + ["right"] * (len(names) + 1)
    counted = COUNTED[grouping]
    if grouping == "popularity" and not trained_on:
        counted += ", counted in the training part of these data, which the run was not trained on"
    return f"by {grouping}: {counted}\n" + tabulate(lines, tablefmt="plain", disable_numparse=True, colalign=sides)


def _refuse_sources(option: str, path: Path | None, config: TrainConfig) -> None:
    """Refuses an output that would replace a file which a run was made of."""
    from models.graphs import graph_files

    sources = {"the run's data": config.data}
    sources |= {f"the run's graph or similarities, {file.name}": file for file in graph_files(config)}
    refuse_same(option, path, sources)


def _make_parent(option: str, path: Path | None) -> None:
    """Makes the folder of a file to write, or fails before anything else is done."""
    if path is None:
        return
    make_folder(option, path.parent)
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder; give a file")
