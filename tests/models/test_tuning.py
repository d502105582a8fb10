"""The search for settings: what is searched, pruning, and going on after a kill as if there had been none."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from models import presets
from models.__main__ import main
from models.architectures.registry import config_from_dict
from models.config import SELECTION
from models.data import load_interactions
from models.files import LOCK, claim, write_text
from models.memory import OutOfMemoryError
from models.training import loop
from models.training.interrupts import StoppedError
from models.tuning import search
from models.tuning.search import Outcome
from models.tuning.space import heeds, parse_space
from tests.models.saved_runs import ToyProgram, small_data

SASREC = {"model": "sasrec"}
TABLE = Path("items.csv")


class Fixed:
    """A trial whose values are given."""

    def __init__(self, **values):
        self.values = values

    def suggest_float(self, name, low, high, *, log):
        return self.values[name]

    suggest_int = suggest_float

    def suggest_categorical(self, name, choices):
        assert self.values[name] in choices
        return self.values[name]


class TestSpace:
    @pytest.mark.parametrize(
        ("options", "names"),
        [
            ({}, "learning-rate weight-decay dropout-rate beta num-layers max-hops"),
            ({"optimizer": "adamw"}, "learning-rate weight-decay dropout-rate"),
            ({"smoothing": "exact"}, "learning-rate weight-decay dropout-rate beta max-hops"),
            ({"model": "mf-bpr"}, "graph learning-rate weight-decay beta num-layers max-hops"),
            ({"attributes": TABLE}, "graph learning-rate weight-decay dropout-rate beta num-layers max-hops"),
        ],
    )
    def test_what_is_usual(self, options, names):
        space = parse_space([], SASREC | options)
        assert [text.partition("=")[0] for text in space.describe()] == names.split()
        assert parse_space(space.describe(), SASREC | options) == space

    def test_forms(self):
        texts = ["learning-rate=1e-4:1e-2:log", "batch_size=16:64:log", "num-blocks=1,3", "schedule=constant,linear"]
        rate, batch, blocks, schedule = parse_space([*texts, "beta"], SASREC).searched[:4]
        assert (rate.low, rate.high, rate.log) == (1e-4, 1e-2, True)
        assert (batch.low, type(batch.low), batch.log) == (16, int, True)
        assert list(blocks.values.values()) == [1, 3]
        assert list(schedule.values.values()) == ["constant", "linear"]

    def test_a_decay_in_the_gradient_is_searched_where_it_is_felt(self):
        assert parse_space(["weight-decay"], SASREC).describe() == ["weight-decay=0.001:1.0:log"]
        assert parse_space(["weight-decay"], SASREC | {"optimizer": "adam"}).describe() == [
            "weight-decay=1e-08:0.01:log"
        ]

    @pytest.mark.parametrize(
        ("texts", "options", "message"),
        [
            (["beta=0.9:0.5"], {}, "search: beta must ascend from LOW to HIGH, got '0.9:0.5'"),
            (["beta=0.5:1"], {}, r"beta must lie in \[0, 1\), got 1.0"),
            (["beta=0.5:nan"], {}, "must ascend"),
            (["beta=0.5"], {}, "must be NAME=LOW:HIGH, .* with two values or more, got 'beta=0.5'"),
            (["beta=0.5:0.9:cube"], {}, "search: beta must be NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B,C"),
            (["learning-rate=0:1:log"], {}, "must begin above 0 to be searched by its logarithm"),
            (["num-layers=1:2.5"], {}, "num_layers must be made of whole numbers, .*, got '2.5'"),
            (["loss=bce,mse"], {}, "loss must be among bce, ce, .*, got 'mse'"),
            (["rescale=yes,no"], {}, "rescale must be among true, false, got 'yes'"),
            (["epochs=1:9"], {}, "'epochs=1:9' names no option that may be searched; those are .*, beta,"),
            (["data=a,b"], {}, "names no option that may be searched"),
            (["vectors=a.npz,b.npz"], {}, "names no option that may be searched"),
            (["clip-norm"], {}, "clip_norm has no usual range"),
            (["beta", "beta=0.1,0.2"], {}, "search must name each option once, got beta beta"),
            (["beta", "max-hops"], {"optimizer": "adamw"}, "is not heeded by optimizer adamw"),
            (
                ["beta"],
                {"optimizer": "adamw"},
                "beta is not heeded by optimizer adamw, got 0.3:0.999; leave it out or give",
            ),
            (["graph=item-item,attributes"], {}, "the graph of attributes needs --attributes"),
            (["graph=item-item,user-item"], {}, "user-item needs a table of users, which sasrec does not have"),
            (["graph"], {"graph_weights": (1.0,), "attributes": TABLE}, "graph_weights belong to one choice"),
            ([], {"model": "popularity"}, "search must name options of popularity"),
            (["beta"], {"learning_rate": -1.0}, "learning_rate must be larger than 0"),
        ],
    )
    def test_refused(self, texts, options, message):
        with pytest.raises(ValueError, match=message) as caught:
            parse_space(texts, SASREC | options)
        assert "\n" not in str(caught.value)

    def test_only_what_counts_is_asked_for(self):
        space = parse_space(["beta", "optimizer=adamw,sevo-adamw", "learning-rate"], SASREC)
        assert space.suggest(Fixed(optimizer="adamw", learning_rate=0.1)) == {
            "optimizer": "adamw",
            "learning_rate": 0.1,
        }
        assert space.suggest(Fixed(optimizer="sevo-adamw", learning_rate=0.1, beta=0.5))["beta"] == 0.5
        space = parse_space(["max-hops", "graph"], SASREC | {"attributes": TABLE})
        assert space.base.attributes is None
        assert space.config(space.suggest(Fixed(graph="attributes"))).attributes == TABLE
        both = space.suggest(Fixed(graph="item-item+attributes", max_hops=2))
        assert both == {"graph": ("item-item", "attributes"), "max_hops": 2}
        assert space.config(space.suggest(Fixed(graph="item-item", max_hops=2))).attributes is None
        assert not heeds(space.base, "gbce_t")

    @pytest.mark.parametrize(
        ("texts", "options", "theirs", "others"),
        [
            (["graph=item-item,shared-users"], {"max_neighbors": 5}, {"graph": "shared-users"}, {"graph": "item-item"}),
            (
                ["graph=item-item,shared-users"],
                {"max_neighbors": 5, "graph": ("shared-users",)},
                {"graph": "shared-users"},
                {"graph": "item-item"},
            ),
            (["loss=bce,gbce"], {"num_negatives": 5}, {"loss": "gbce"}, {"loss": "bce"}),
        ],
    )
    def test_what_belongs_to_a_choice_is_for_the_trials_that_make_it(self, texts, options, theirs, others):
        space = parse_space(texts, SASREC | options)
        (name, value) = next(iter(options.items()))
        assert getattr(space.config(space.suggest(Fixed(**theirs))), name) == value
        usual = type(space.base)()
        assert getattr(space.config(space.suggest(Fixed(**others))), name) == getattr(usual, name)

    def test_a_searched_value_is_not_replaced_by_that_of_the_rest(self):
        space = parse_space(["graph=item-item,shared-users", "max-neighbors=5,10"], SASREC | {"max_neighbors": 20})
        found = space.config(space.suggest(Fixed(graph="shared-users", max_neighbors="10")))
        assert found.max_neighbors == 10

    def test_what_others_need_is_asked_for_first(self):
        texts = [
            "rescale=true,false",
            "graph-weighting=distance,frequency",
            "max-hops=1,2",
            "smoothing=neumann,iterative",
        ]
        space = parse_space([*texts, "graph=item-item,shared-users"], SASREC)
        names = [option.name for option in space.searched]
        assert names == ["graph", "max_hops", "smoothing", "rescale", "graph_weighting"]
        asked = space.suggest(Fixed(graph="item-item", max_hops="1", smoothing="iterative"))
        assert set(asked) == {"graph", "max_hops", "smoothing"}
        asked = space.suggest(
            Fixed(graph="item-item", max_hops="2", smoothing="neumann", rescale="true", graph_weighting="distance")
        )
        assert set(asked) == set(names)
        assert set(space.suggest(Fixed(graph="shared-users", smoothing="iterative"))) == {"graph", "smoothing"}

    def test_where_it_starts(self):
        assert parse_space(["beta", "num-layers=2,3", "num-heads=1:2"], SASREC).start() == {
            "beta": 0.99,
            "num_layers": "3",
            "num_heads": 1,
        }
        assert parse_space(["beta=0.1:0.5"], SASREC).start() is None


class Stub:
    """Stands in for the training of a trial: a straight curve up to the learning rate, and a history of it."""

    def __init__(self, epochs=4):
        self.epochs, self.tested, self.begun, self.kill_at = epochs, [], [], None

    def height(self, config):
        return config.learning_rate

    def __call__(self, prepared, config, folder, watch):
        if watch is None:
            self.tested.append(folder.name)
            return SimpleNamespace(test={SELECTION: 0.5})
        folder.mkdir(parents=True, exist_ok=True)
        known = search._points(folder)
        self.begun.append((folder.name, len(known), config.learning_rate))
        for epoch in range(len(known) + 1, self.epochs + 1):
            value = self.height(config) * epoch / self.epochs
            known.append((epoch, value))
            records = [{"epoch": e, "loss": 1.0, "validation": {SELECTION: v}} for e, v in known]
            write_text(folder / "history.jsonl", "".join(json.dumps(record) + "\n" for record in records))
            if (folder.name, epoch) == self.kill_at:
                raise KeyboardInterrupt
            if not watch(epoch, value):
                raise StoppedError
        return SimpleNamespace(validation={SELECTION: known[-1][1]})


@pytest.fixture
def stub(monkeypatch):
    pytest.importorskip("optuna")
    made = Stub()
    monkeypatch.setattr(search, "train", lambda *arguments: made(*arguments))
    monkeypatch.setattr(search.NewestData, "prepared", lambda self, config: None)
    return made


def tune(folder, trials=8, *, texts=("learning-rate=1e-3:0.5:log",), **options):
    space = parse_space(texts, SASREC | {"epochs": 4, "eval_every": 1} | options.pop("base", {}))
    lines = []
    found = search.tune(small_data(), space, folder, trials=trials, say=lines.append, **options)
    return found, lines


def report(folder):
    return json.loads((folder / "trials.json").read_text())


class TestSearch:
    def test_the_best_trial_alone_is_tested(self, tmp_path, stub):
        found, lines = tune(tmp_path, pruner="none")
        assert len(found.trials) == len(stub.begun) == len(lines) == 8
        assert found.trials[0].settings == {"learning_rate": 0.001}  # its own first
        best = max(found.trials, key=lambda trial: trial.value)
        assert (found.best, stub.tested) == (best, [f"{best.number:04}"])
        assert found.config.learning_rate == best.settings["learning_rate"] == pytest.approx(best.value)
        assert f"best {best.value:.4f}, of trial {best.number}" in lines[-1]
        written = report(tmp_path)
        assert written["best"] == best.number
        assert [trial["value"] for trial in written["trials"]] == [trial.value for trial in found.trials]
        assert config_from_dict(presets.load_preset(tmp_path / "best.yaml")) == found.config
        assert (tmp_path / "search.png").stat().st_size > 10_000

    def test_trials_behind_the_median_are_stopped(self, tmp_path, stub):
        found, lines = tune(tmp_path, 12)
        pruned = [trial for trial in found.trials if trial.state == "pruned"]
        assert pruned
        assert all(trial.number >= 5 and trial.value is None and len(trial.curve) < 4 for trial in pruned)
        assert found.best.state == "finished"
        assert "pruned after epoch" in lines[pruned[0].number]

    @pytest.mark.parametrize(
        ("pruner", "kill_at"),
        [
            ("median", ("0003", 2)),
            ("median", ("0000", 4)),
            ("successive-halving", ("0007", 1)),
        ],
    )
    def test_a_killed_search_tries_what_it_would_have_tried(self, tmp_path, stub, kill_at, pruner):
        whole, _ = tune(tmp_path / "whole", 10, pruner=pruner)
        stub.kill_at, stub.begun = kill_at, []
        with pytest.raises(KeyboardInterrupt):
            tune(tmp_path / "killed", 10, pruner=pruner)
        stub.kill_at, before = None, len(stub.begun)
        resumed, _ = tune(tmp_path / "killed", 10, pruner=pruner, resume=True)
        if pruner == "median":
            assert stub.begun[before][:2] == kill_at  # from where it was
        assert min(stub.begun[before:])[0] >= kill_at[0]  # and none of the finished ones again
        assert resumed.trials == whole.trials
        more, _ = tune(tmp_path / "killed", 11, pruner=pruner, resume=True)
        assert more.trials[:10] == whole.trials

    def test_a_trial_that_was_broken_off_is_not_its_own_rival(self):
        """Of eight values the two best go on; the third would be among the best of nine if it counted twice."""
        optuna = pytest.importorskip("optuna")
        study = optuna.create_study(direction="maximize", pruner=search._halving(1))

        def begin(value):
            trial = study.ask()
            trial.report(value, 1)
            return trial, trial.should_prune()

        for value in (0.9, 0.8, 0.5, 0.4, 0.3, 0.2, 0.1):
            study.tell(begin(value)[0], value)
        broken, pruned = begin(0.7)
        assert pruned
        study.tell(broken, state=optuna.trial.TrialState.FAIL)
        assert begin(0.7)[1]

    def test_a_kill_before_optuna_knows(self, tmp_path, stub, monkeypatch):
        whole, _ = tune(tmp_path / "whole", 12)
        with monkeypatch.context() as patch:
            patch.setattr(search._Search, "_tell", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                tune(tmp_path / "killed", 12)
        assert tune(tmp_path / "killed", 12, resume=True)[0].trials == whole.trials

    @pytest.mark.parametrize("cut", [1, 20])
    def test_a_line_that_a_full_disk_has_cut_is_written_again(self, tmp_path, stub, cut):
        whole, _ = tune(tmp_path / "whole", 5)
        tune(tmp_path / "cut", 3)
        journal = tmp_path / "cut" / search.JOURNAL
        journal.write_bytes(journal.read_bytes()[:-cut])
        for trials in (4, 5):
            found, _ = tune(tmp_path / "cut", trials, resume=True)
        assert found.trials == whole.trials

    def test_what_cannot_be_trained_is_no_end(self, tmp_path, stub, monkeypatch):
        def height(config):
            if config.learning_rate > 0.1:
                raise loop.DivergedError({0: "the loss is nan"}, [None])
            if config.learning_rate > 0.05:
                raise OutOfMemoryError("too much")
            if config.learning_rate > 0.02:
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.")  # as JAX says it
            return config.learning_rate

        monkeypatch.setattr(stub, "height", height)
        found, lines = tune(tmp_path, 10, pruner="none")
        states = {trial.state for trial in found.trials}
        assert states == {"finished", "diverged", "refused"}
        assert found.best.value <= 0.05
        assert any("diverged (the loss is nan)" in line for line in lines)

    def test_values_that_do_not_fit_together(self, tmp_path, stub):
        texts = ("embedding-dim=6,7,8,10", "num-heads=1,3")
        found, _ = tune(tmp_path, 6, texts=texts, base={"embedding_dim": 6})
        refused = [trial for trial in found.trials if trial.state == "refused"]
        assert refused
        assert all(trial.settings["embedding_dim"] != 6 and trial.settings["num_heads"] == 3 for trial in refused)
        assert "num_heads must divide embedding_dim" in refused[0].reason

    def test_data_that_no_trial_can_begin_with(self, tmp_path, stub, monkeypatch):
        def refuse(self, config):
            raise ValueError("no user has two interactions")

        monkeypatch.setattr(search.NewestData, "prepared", refuse)
        for resume in (False, True):
            with pytest.raises(ValueError, match="every trial so far was refused: no user has two interactions"):
                tune(tmp_path, 6, resume=resume)

    def test_when_the_time_is_over(self, tmp_path, stub, monkeypatch):
        clock = iter(range(10_000))
        monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        with pytest.raises(ValueError, match="none of 0 trials has come to its end; go on with --resume"):
            tune(tmp_path, hours=2 / 3600)
        assert stub.begun == [("0000", 0, 0.001)]
        found, _ = tune(tmp_path, hours=12 / 3600, resume=True)
        assert len(found.trials) == 2
        assert stub.begun[1][0] == "0000"
        assert stub.begun[1][1] > 0

    def test_folders(self, tmp_path, stub):
        tune(tmp_path / "a", 2)
        with pytest.raises(
            ValueError, match="a holds a search already; go on with --resume, replace it with --overwrite"
        ):
            tune(tmp_path / "a", 2)
        for options, message in [
            ({"base": {"beta": 0.5}}, "has beta=0.99, not 0.5; resume it as it was"),
            ({"base": {"epochs": 5}}, "has epochs=4, not 5"),
            ({"pruner": "none"}, "has pruner=median, not none"),
            ({"texts": ["beta"]}, "has search=learning-rate=0.001:0.5:log, not beta=0.3:0.999"),
        ]:
            with pytest.raises(ValueError, match=message):
                tune(tmp_path / "a", 3, resume=True, **options)
        with claim(tmp_path / "a" / LOCK), pytest.raises(ValueError, match="another process searches in"):
            tune(tmp_path / "a", 3, resume=True)
        (tmp_path / "a" / "notes.txt").write_text("mine")
        assert len(tune(tmp_path / "a", 1, overwrite=True)[0].trials) == 1
        assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "thesis.txt").write_text("mine")
        with pytest.raises(ValueError, match=r"b holds thesis\.txt, but no search"):
            tune(tmp_path / "b", 2, overwrite=True)

    def test_other_attributes_are_another_search(self, tmp_path, stub):
        """Whether the graph is searched or not; where the table lies does not matter if it is not."""
        table = tmp_path / "a.tsv"
        table.write_text("item_id\tgenres\n1\tA\n2\tA\n")
        for name, options in {
            "fixed": {"base": {"graph": ("attributes",), "attributes": table}},
            "searched": {"base": {"attributes": table}, "texts": ("graph=item-item,attributes",)},
        }.items():
            tune(tmp_path / name, 1, **options)
            tune(tmp_path / name, 2, resume=True, **options)
            before = table.read_text()
            table.write_text(before.replace("2\tA", "2\tB"))
            with pytest.raises(ValueError, match="smooths over files of graphs that held something else; resume it"):
                tune(tmp_path / name, 3, resume=True, **options)
            table.write_text(before)

    def test_a_trial_that_is_over_with_the_time_counts(self, tmp_path, stub, monkeypatch):
        clock = iter([0, 0, 0, 0, 0, 10_000])  # the deadline, the first look, and one behind each epoch
        monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=lambda: next(clock, 10_000)))
        found, _ = tune(tmp_path, hours=1)
        assert [trial.state for trial in found.trials] == ["finished"]

    def test_other_data_are_another_search(self, tmp_path, stub, monkeypatch):
        tune(tmp_path, 1)
        monkeypatch.setattr(search, "fingerprint", lambda *_: "other")
        with pytest.raises(ValueError, match=r"the search in .* is of other data; resume it as it was"):
            tune(tmp_path, 2, resume=True)


OPTIONS = ["--epochs", "3", "--eval-every", "1", "--embedding-dim", "8", "--max-length", "8", "--batch-size", "20"]
OPTIONS += ["--search", "learning-rate=1e-3:1:log", "max-hops=1,2", "--trials", "3", "--pruner", "none", "--quiet"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The folders of a search and of one that was interrupted and went on, through the command line."""
    pytest.importorskip("optuna")
    folder = tmp_path_factory.mktemp("tune")
    data = small_data()
    rows = "".join(f"{u},{i}\n" for u, i in zip(data.users.tolist(), data.items.tolist(), strict=True))
    (folder / "data.csv").write_text("user,item\n" + rows)
    epoch, test = ToyProgram.epoch, ToyProgram.test
    tests, epochs = [], []

    def counted(self, number):
        epochs.append(number)
        if len(epochs) == 3 + 5:  # the second epoch of the interrupted search's second trial, behind the first search
            raise KeyboardInterrupt("stopped by hand")
        return epoch(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Program", ToyProgram)
        patch.setattr(ToyProgram, "test", lambda self, params: tests.append(1) or test(self, params))
        command = ["tune", "--data", str(folder / "data.csv"), *OPTIONS, "--output-dir"]
        assert main([*command, str(folder / "whole")]) == 0
        assert len(tests) == 1
        patch.setattr(ToyProgram, "epoch", counted)
        epochs += [0, 0, 0]
        assert main([*command, str(folder / "killed")]) == 130
        assert len(tests) == 1
        assert main([*command, str(folder / "killed"), "--resume"]) == 0
    return folder, epochs[3:]


def test_a_search_goes_on_in_the_middle_of_a_trial(searched):
    folder, epochs = searched
    whole, resumed = report(folder / "whole"), report(folder / "killed")
    assert [trial["state"] for trial in whole["trials"]] == ["finished"] * 3
    assert {tuple(sorted(trial["settings"])) for trial in whole["trials"]} == {("learning_rate", "max_hops")}
    assert resumed == whole
    assert epochs == [1, 2, 3, 1, 2, 2, 3, 1, 2, 3]


def test_what_a_search_leaves(searched):
    folder, _ = searched
    whole = report(folder / "whole")
    best = folder / "whole" / "trials" / f"{whole['best']:04}"
    kept = [path.parent for path in (folder / "whole" / "trials").glob("*/checkpoints")]
    assert kept == [best]
    assert list((folder / "whole" / "trials").glob("*/result.json")) == [best / "result.json"]
    result = json.loads((best / "result.json").read_text())
    assert result["validation"][SELECTION] == whole["trials"][whole["best"]]["value"]
    config = config_from_dict(presets.load_preset(folder / "whole" / "best.yaml"))
    assert config.to_dict() == result["config"]
    assert load_interactions(config).num_users == 60


def test_refused_on_the_command_line(tmp_path, capsys, monkeypatch):
    out = ["--output-dir", str(tmp_path / "out")]
    for options, message in [
        (["--trials", "0"], "trials must be at least 1, got 0"),
        (["--hours", "0"], "hours must be a number above 0, got 0.0"),
        (["--search", "bta=0.1:0.2"], "search: 'bta=0.1:0.2' names no option"),
        (["--resume", "--overwrite"], "resume and overwrite exclude each other"),
        (["--pruner", "hedge"], "--pruner must be one of median, successive-halving, none, got 'hedge'"),
    ]:
        assert main(["tune", *options, *out]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    assert main(["tune", *out]) == 2
    assert capsys.readouterr().err == "error: tune needs optuna; install it with pip install -e '.[tune]'\n"
    assert not (tmp_path / "out").exists()


def test_outcomes_survive_their_record():
    outcome = Outcome(3, "pruned", {"beta": 0.5}, None, [(1, 0.25)], "")
    trial = SimpleNamespace(user_attrs={"outcome": json.loads(json.dumps(dataclasses.asdict(outcome)))})
    assert search._outcome(trial) == outcome
