import csv
import dataclasses
import json

import jax
import numpy as np
import pytest

from models.__main__ import main
from models.architectures.registry import make_config, make_model
from models.config import SourceConfig
from models.data import Interactions, item_numbers, leave_one_out, load_interactions, read_titles
from models.evaluation.ranking import FullRanking
from models.serving import trained as serving
from models.serving.trained import TrainedModel, evaluate, in_catalogue
from models.training import loop
from models.training.beside import KnownUsers
from models.training.checkpoints import CheckpointError, load_run
from models.training.training_data import make_training_data
from tests.models.saved_runs import CONFIG, save_run, small_data

IDS = np.array([f"item {i}" if i else "" for i in range(41)])


@pytest.fixture(scope="module", params=["sasrec", "bert4rec"])
def run(request, tmp_path_factory):
    return save_run(tmp_path_factory.mktemp(request.param), small_data(IDS), model=request.param)


@pytest.fixture(scope="module")
def sasrec(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("sasrec"), small_data(IDS))


@pytest.fixture(scope="module")
def recommender(sasrec):
    return TrainedModel.load(sasrec)


def raw(interactions):
    return [interactions.item_ids[items].tolist() for items in interactions]


def test_what_does_not_depend_on_the_request_is_computed_once(monkeypatch):
    config, data = make_config("lightgcn", embedding_dim=4), small_data(IDS)
    prepared = make_training_data(data, config)
    train = prepared.split.train
    model = make_model(config, num_users=train.num_users, num_items=train.num_items, seed=0)
    users = KnownUsers.from_interactions(data, train.user_ids)
    trained = TrainedModel(model, data.item_ids, config, prepared.context, users)
    monkeypatch.setattr(type(model), "represent", lambda *_: pytest.fail("computed again"))
    assert [len(one.items) for one in trained.recommend_to_users(users.ids[:2].tolist())] == [10, 10]


def test_recommends_in_the_order_of_the_evaluation(run, monkeypatch):
    monkeypatch.setattr(serving, "USERS_AT_ONCE", 16)
    monkeypatch.setattr(serving, "SHORTEST_ROW", 4)  # rows of 4 (sasrec only), 8 and 12
    loaded = load_run(run)
    split = leave_one_out(small_data(IDS))
    assert split.test_history.lengths.max() > CONFIG.max_length > split.test_history.lengths.min()
    ranking = FullRanking.prepare(split.test_history, split.test, model=type(loaded.model), config=loaded.info.config)
    ranks, best = jax.jit(lambda ranking: (ranking.ranks(loaded.model, {}), ranking.top_items(loaded.model, {}, 9)))(
        ranking
    )
    found = TrainedModel.load(run).recommend(raw(split.test_history), k=40)
    assert [one.items[:9] for one in found] == IDS[best].tolist()
    assert [one.items.index(IDS[item]) for one, item in zip(found, split.test, strict=True)] == ranks.tolist()
    for one, history in zip(found, raw(split.test_history), strict=True):
        assert sorted(one.items + history) == sorted(IDS[1:])
        assert one.scores == sorted(one.scores, reverse=True)
        assert one.unknown == []


def test_seen_items_on_request(run):
    recommender = TrainedModel.load(run)
    histories = raw(small_data(IDS))[:4]
    without = recommender.recommend(histories, k=40)
    with_seen = recommender.recommend(histories, k=40, exclude_seen=False)
    for one, other, history in zip(without, with_seen, histories, strict=True):
        assert sorted(other.items) == sorted(IDS[1:])
        assert [item for item in other.items if item not in history] == one.items


def test_the_model_sees_the_newest_items_and_excludes_all(recommender):
    newest = [f"item {i}" for i in range(1, 13)]
    older = [f"item {i}" for i in range(20, 40)] * 3
    short, long = recommender.recommend([newest, older + newest], k=40)
    assert len(short.items) == 28
    assert len(long.items) == 8
    assert long.items == [item for item in short.items if item not in older]


def test_alone_and_in_a_batch(recommender):
    histories = raw(small_data(IDS))[:3]
    together = recommender.recommend(histories, k=5)
    for history, one in zip(histories, together, strict=True):
        (alone,) = recommender.recommend([history], k=5)
        assert alone.items == one.items
        np.testing.assert_allclose(alone.scores, one.scores, rtol=1e-5)


def test_unknown_items_are_passed_over_and_reported(recommender):
    known, mixed, nothing, empty = recommender.recommend(
        [["item 3", "item 4"], ["x", "item 3", 7, "x", "item 4"], ["x"], []], k=3
    )
    assert mixed == dataclasses.replace(known, unknown=["x", 7])
    assert (nothing.items, nothing.scores, nothing.unknown) == ([], [], ["x"])
    assert (empty.items, empty.scores, empty.unknown) == ([], [], [])
    assert recommender.recommend([]) == []
    assert recommender.recommend([["x"]])[0].items == []


def test_a_known_catalogue_without_new_items(recommender):
    (found,) = recommender.recommend([IDS[1:].tolist()])
    assert found.items == []


@pytest.mark.parametrize("ids", [np.arange(41) * 10, np.array(["", *map(str, range(10, 410, 10))])])
def test_numbers_and_text(sasrec, recommender, ids):
    loaded = load_run(sasrec)
    renamed = TrainedModel(loaded.model, ids, loaded.info.config)
    histories = [[10, 20], ["10", "20"], np.array([10, 20]), (np.int64(10), np.str_("20"))]
    found = renamed.recommend([*histories, [10, "20", 10.5, None]], k=3)
    assert all(one.items == found[0].items for one in found)
    assert [one.unknown for one in found[:4]] == [[]] * 4
    expected = recommender.recommend([["item 1", "item 2"]], k=3)[0].items
    assert [str(item) for item in found[0].items] == [f"{10 * int(item.split()[1])}" for item in expected]
    assert {type(item) for item in found[0].items} == {type(ids.tolist()[1])}
    raw_ids = [10, "20", "010", "zz", 10.5, None, 0, ""]
    assert [renamed._number(raw_id) for raw_id in raw_ids] == item_numbers(ids, raw_ids).tolist()


def test_few_shapes_are_compiled(sasrec):
    recommender = TrainedModel.load(sasrec)
    histories = [history[:5] for history in raw(small_data(IDS))]
    for count, k in [(60, 10), (57, 3), (33, 16), (64, 1)]:
        recommender.recommend((histories * 2)[:count], k=k)
    assert recommender._top._cache_size() == 1


@pytest.mark.parametrize(
    ("histories", "k", "message"),
    [
        ([["item 1"]], 0, "k must be at least 1, got 0"),
        (["item 1"], 3, r"number 0 is 'item 1'; for a single user give \[history\]"),
        ([["item 1"], 7], 3, "number 1 is 7"),
        ([["item 1"], [["item 2", "item 3"]]], 3, r"number 1 holds \['item 2', 'item 3'\]"),
        ([[{"id": 3}]], 3, "number 0 holds .*; ids of items are numbers or text"),
    ],
)
def test_bad_requests(recommender, histories, k, message):
    with pytest.raises(ValueError, match=message):
        recommender.recommend(histories, k=k)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"only_items": "item 1"}, "only_items"),
        ({"exclude_items": "item 1"}, "exclude_items"),
        ({"candidates": ["item 1"]}, "candidates: number 0"),
    ],
)
def test_one_id_is_no_list_of_letters(recommender, options, what):
    with pytest.raises(
        ValueError, match=rf"^{what} must be a list of ids, got 'item 1'; for a single one give \['item 1'\]$"
    ):
        recommender.recommend([["item 1"]], k=3, **options)


def test_some_items_only(recommender):
    (all_of_them,) = recommender.recommend([["item 1"]], k=40)
    (only,) = recommender.recommend([["item 1"]], k=40, only_items=["item 1", "item 7", "item 9", "nothing known"])
    assert sorted(only.items) == ["item 7", "item 9"]
    assert only.items == [item for item in all_of_them.items if item in only.items]
    (without,) = recommender.recommend([["item 1"]], k=40, exclude_items=["item 7"])
    assert without.items == [item for item in all_of_them.items if item != "item 7"]
    (both,) = recommender.recommend([["item 1"]], k=40, only_items=["item 7", "item 9"], exclude_items=["item 7"])
    assert both.items == ["item 9"]
    with pytest.raises(ValueError, match="leave no item of the catalogue"):
        recommender.recommend([["item 1"]], only_items=["nothing known"])


def test_candidates_of_each_user(recommender):
    histories = [["item 1"], ["item 2"], ["unknown"], ["item 3"]]
    candidates = [["item 4", "item 5"], ["item 6"], ["item 7"], []]
    found = recommender.recommend(histories, k=40, candidates=candidates)
    assert [sorted(one.items) for one in found] == [["item 4", "item 5"], ["item 6"], [], []]
    (only,) = recommender.recommend(histories[:1], k=40, candidates=candidates[:1], exclude_items=["item 4"])
    assert only.items == ["item 5"]
    with pytest.raises(ValueError, match="candidates must hold one list for each of 4 users, got 1"):
        recommender.recommend(histories, candidates=[["item 4"]])


def test_commands_with_lists_of_items(run, tmp_path, capsys):
    (tmp_path / "only.txt").write_text("item 7\n\nitem 9\nitem 11\n")
    (tmp_path / "not.txt").write_text("item 9\n")
    (tmp_path / "histories.csv").write_text("user,item\nanna,item 1\nbert,item 2\n")
    (tmp_path / "mine.csv").write_text("user,item\nanna,item 5\nanna,item 6\n")
    lists = ["--only-items", tmp_path / "only.txt", "--exclude-items", tmp_path / "not.txt"]
    printed, _ = call(capsys, "recommend", "--checkpoint", run, "--history", "item 1", *lists)
    assert sorted(line.split()[2] for line in printed.splitlines()[1:]) == ["11", "7"]
    file = ["--histories", tmp_path / "histories.csv", "--candidates", tmp_path / "mine.csv"]
    printed, err = call(capsys, "recommend", "--checkpoint", run, *file)
    assert {tuple(line.split()[:4:3]) for line in printed.splitlines() if line.startswith("anna")} == {
        ("anna", "5"),
        ("anna", "6"),
    }
    assert "no recommendation for 1 of 2 users" in err

    (tmp_path / "not.txt").write_text("item 9\nitem 99\n")
    (tmp_path / "mine.csv").write_text("user,item\ncarl,item 5\n")
    output = ["--output", tmp_path / "found.csv"]
    _, err = call(capsys, "recommend", "--checkpoint", run, *file, *lists[2:], *output)
    assert "exclude_items: unknown to the model and passed over: item 99\n" in err
    assert "no recommendation for 2 of 2 users" in err
    assert (tmp_path / "found.csv").read_text() == "user,rank,item,score\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--users", "u1"], "has no table of users; give the histories instead"),
        (["--users", "u1", "--history", "item 1"], "give either --history"),
        (["--history", "item 1", "--candidates", "x.csv"], "candidates belong to users"),
        (["--history", "item 1", "--only-items", "none.txt"], "only_items: none.txt cannot be read"),
        (["--history", "item 1", "--title-column", "name"], "title_column is not heeded without titles, got name"),
        (["--history", "item 1", "--user-column", "u"], "user_column is not heeded without a file of interactions"),
    ],
)
def test_requests_that_make_no_sense(run, capsys, arguments, message):
    assert main(["recommend", "--checkpoint", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_best_and_last(run, tmp_path):
    best, last = (TrainedModel.load(run, which).recommend([["item 1"]], k=40)[0] for which in ("best", "last"))
    assert best.items != last.items
    with pytest.raises(CheckpointError, match="holds no run"):
        TrainedModel.load(tmp_path)
    with pytest.raises(ValueError, match="best or last"):
        TrainedModel.load(run, "worst")


def test_nothing_is_the_best_before_the_first_evaluation(tmp_path, prepared_toy):
    directory, epoch = prepared_toy
    with pytest.raises(CheckpointError, match=f"after epoch {epoch}, before its first evaluation.* --which last"):
        load_run(directory)
    assert load_run(directory, "last").epoch == epoch


@pytest.fixture
def prepared_toy(tmp_path, monkeypatch):
    """The folder of a run that was interrupted before its first evaluation, and its epochs."""
    config = dataclasses.replace(CONFIG, eval_every=4, epochs=4)
    monkeypatch.setattr(loop, "any_of_all", lambda _: True)
    with pytest.raises(KeyboardInterrupt, match="interrupted after epoch 1"):
        loop.train(make_training_data(small_data(), config), config, "adamw", tmp_path / "run")
    return tmp_path / "run", 1


def test_ids_of_users_follow_the_rules_of_ids_of_items():
    config = make_config("mf-bpr", embedding_dim=4)
    model = make_model(config, num_users=2, num_items=3, seed=0)
    users = KnownUsers(np.array([7, 12]), np.array([0, 1, 2]), np.array([1, 2], np.int32))
    trained = TrainedModel(model, np.array([0, 10, 11, 12]), config, users=users)
    by_number, by_text = (trained.recommend_to_users([user])[0] for user in (7, " 7"))
    assert by_number == by_text
    for user in ("007", "1_2", "seven", 8, [7]):
        with pytest.raises(ValueError, match="is not among the 2 users that the model was trained with"):
            trained.recommend_to_users([user])


def call(capsys, *arguments):
    """What a command prints, and its warnings."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr()


def error_of(capsys, *arguments):
    """The one line in which a command fails."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    return printed


def test_recommend_prints_a_table(sasrec, recommender, tmp_path, capsys):
    (expected,) = recommender.recommend([["item 3", "item 4"]], k=3)
    printed, warned = call(
        capsys, "recommend", "--checkpoint", sasrec, "--k", 3, "--history", "item 3", "x", "item 4", "y"
    )
    lines = printed.splitlines()
    assert lines[0].split() == ["rank", "item", "score"]
    assert [line[6:].rsplit(maxsplit=1)[0].strip() for line in lines[1:]] == expected.items
    assert [float(line.split()[-1]) for line in lines[1:]] == pytest.approx(expected.scores, abs=1e-4)
    assert warned == "warning: unknown to the model and passed over: x, y\n"

    titles = tmp_path / "titles.tsv"
    titles.write_text(f'id\tname\n{expected.items[0]}\tThe "Title"\n')
    printed, _ = call(
        capsys, "recommend", "--checkpoint", sasrec, "--k", 3, "--history", "item 3", "item 4",
        "--titles", titles, "--title-item-column", "id", "--title-column", "name",
    )  # fmt: skip
    assert 'The "Title"' in printed
    assert printed.splitlines()[0].split() == ["rank", "item", "score", "title"]

    printed, _ = call(capsys, "recommend", "--checkpoint", sasrec, "--k", 40, "--history", "item 3", "--include-seen")
    assert "item 3 " in printed
    assert len(printed.splitlines()) == 41


def test_recommend_to_every_user_of_a_file(sasrec, recommender, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("models.cli.commands.USERS_READ_AT_ONCE", 2)
    data = tmp_path / "histories.csv"
    rows = [("ann", "item 2", 2), ("bob", "x", 1), ("ann", "item 1", 1), ("cid", "item 5", 1), ("cid", "y", 1)]
    data.write_text("who,what,when\n" + "".join(f"{user},{item},{time}\n" for user, item, time in rows))
    options = ["--checkpoint", sasrec, "--histories", data, "--k", 2]
    options += ["--user-column", "who", "--item-column", "what", "--time-column", "when"]
    ann, cid = recommender.recommend([["item 1", "item 2"], ["item 5"]], k=2)

    printed, warned = call(capsys, "recommend", *options)
    assert printed.splitlines()[2].split() == ["user", "rank", "item", "score"]
    assert "warning: unknown to the model and passed over, in 2 of 3 histories: x, y" in warned
    assert "warning: no recommendation for 1 of 3 users" in warned

    call(capsys, "recommend", *options, "--output", tmp_path / "new" / "found.csv")
    with (tmp_path / "new" / "found.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["user"], line["rank"], line["item"]) for line in lines] == [
        (user, str(rank + 1), one.items[rank]) for user, one in [("ann", ann), ("cid", cid)] for rank in range(2)
    ]
    assert float(lines[0]["score"]) == pytest.approx(ann.scores[0], abs=1e-5)

    call(capsys, "recommend", *options, "--output", tmp_path / "found.jsonl")
    records = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [record["user"] for record in records] == ["ann", "bob", "cid"]
    assert [record["items"] for record in records] == [ann.items, [], cid.items]
    assert records[1]["unknown"] == ["x"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --history"),
        (["--history", "item 1", "--histories", "x.csv"], "give either --history"),
        (["--history", "x", "y", "x"], "knows none of x, y; an item it knows is item 1"),
        (["--history", "item 1", "--k", "0"], "k must be at least 1, got 0"),
        (["--history", "item 1", "--output", "found.xlsx"], "output must end in .csv or .jsonl"),
        (["--histories", "none.csv"], "none.csv does not exist"),
        (["--history", "item 1", "--titles", "none.tsv"], "titles: none.tsv does not exist"),
        (["--history", "item 1", "--titles", "titles.csv"], "title_item_column: titles.csv has no column 'item_id'"),
        (["--history", "item 1", "--titles", "bad.csv"], "titles: bad.csv, line 2, is not UTF-8 text"),
    ],
)
def test_bad_options(sasrec, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "titles.csv").write_text("id,name\n1,a\n")
    (tmp_path / "bad.csv").write_bytes(b"item_id,title\n1,\xff\n")
    assert message in error_of(capsys, "recommend", "--checkpoint", sasrec, *options)


def test_titles_with_commas_and_quotes(tmp_path):
    (tmp_path / "movies.csv").write_text('item_id,year,title\n7,1999,"Good, Bad"\n8\n')
    assert read_titles(tmp_path / "movies.csv") == {"7": "Good, Bad"}
    (tmp_path / "movies.item").write_text('title\titem_id\n"Good, Bad\t7\n')
    assert read_titles(tmp_path / "movies.item") == {"7": '"Good, Bad'}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a file, and its test metrics."""
    folder = tmp_path_factory.mktemp("trained")
    rows = zip(small_data().users, IDS[small_data().items], range(10_000), strict=False)
    (folder / "data.csv").write_text("user,item,time\n" + "".join(f"u{u},{item},{time}\n" for u, item, time in rows))
    config = dataclasses.replace(
        CONFIG,
        data=folder / "data.csv",
        num_blocks=0,  # compiles faster
        exclude_seen=False,
        per_user=True,
        epochs=1,
        min_item_interactions=2,
    )
    result = loop.train(make_training_data(load_interactions(config), config), config, "adamw", folder / "run")
    return folder / "run", result


def test_evaluate_gives_what_training_gave(trained, tmp_path, capsys):
    run, result = trained
    printed, _ = call(
        capsys,
        "evaluate",
        "--checkpoint",
        run,
        "--per-user",
        tmp_path / "ranks.csv",
        "--output",
        tmp_path / "test.json",
        "--by",
        "popularity",
        "length",
    )
    report = json.loads((tmp_path / "test.json").read_text())
    assert report["test"] == result.test
    assert report["groups"] == result.groups
    assert {name: sum(x["users"] for x in groups.values()) for name, groups in result.groups.items()} == {
        "popularity": 60,
        "length": 60,
    }
    assert "coverage@10" in result.test
    lines = printed.splitlines()
    table = lines[lines.index("by popularity: training interactions of the item to find") + 1 :]
    assert table[0].split()[:4] == ["popularity", "users", "HR@1", "HR@5"]
    assert table[1].split() == ["never", "seen", "0", "none"]
    some = dict(result.groups["popularity"]["5-19"])
    assert table[3].split() == ["5-19", str(some.pop("users")), *(f"{x:.4f}" for x in some.values())]
    assert "by length: items in the user's history" in lines
    assert report["protocol"] == result.protocol
    assert (report["epoch"], report["users"]) == (result.best_epoch, 60)
    assert (tmp_path / "ranks.csv").read_text() == (run / "per_user.csv").read_text()
    assert f"({result.protocol})" in printed
    assert "test: HR@1 0." in printed


def test_evaluate_replaces_no_data(trained, capsys):
    run, _ = trained
    data = run.parent / "data.csv"
    before = data.read_bytes()
    error = error_of(capsys, "evaluate", "--checkpoint", run, "--per-user", data)
    assert f"per_user: {data} is the file of data as well; give another file" in error
    assert data.read_bytes() == before


@pytest.mark.parametrize("command", ["recommend", "export"])
def test_what_a_run_was_made_of_is_not_replaced(tmp_path, capsys, command):
    data, items = tmp_path / "data.csv", tmp_path / "items.csv"
    data.write_text("user,item\n")
    items.write_text("item,genre\n" + "".join(f"item {i},{i % 3}\n" for i in range(1, 41)))
    options = {"data": data, "graph": ("attributes",), "attributes": items}
    run = save_run(tmp_path / "run", small_data(IDS), **options)
    more = ["--history", "item 3"] if command == "recommend" else []
    for path, what in ((data, "data"), (items, "graph or similarities, items.csv")):
        before = path.read_bytes()
        error = error_of(capsys, command, "--checkpoint", run, *more, "--output", path)
        assert f"output: {path} is the file of the run's {what} as well; give another file" in error
        assert path.read_bytes() == before


def test_evaluate_otherwise(trained, capsys):
    run, result = trained
    expected = evaluate(
        load_run(run), leave_one_out(load_interactions(SourceConfig(data=run.parent / "data.csv"))), ks=[3]
    )
    printed, _ = call(capsys, "evaluate", "--checkpoint", run, "--ks", 3, "--exclude-seen")
    assert "by popularity" not in printed
    assert "  ".join(f"{name} {value:.4f}" for name, value in expected.metrics.items()) in printed
    assert "history not ranked" in printed
    assert result.protocol.count("history ranked too") == 1

    printed, _ = call(
        capsys,
        "evaluate",
        "--checkpoint",
        run,
        "--which",
        "last",
        "--split",
        "global-time",
        "--no-exclude-seen",
        "--by",
        "popularity",
    )
    assert "counted in the training part of these data, which the run was not trained on" in printed
    assert "(global-time split at" in printed
    assert "history ranked too" in printed
    assert "are ones that the run was trained on; tested at the newest epoch)" in printed


def test_evaluate_on_other_data(trained, tmp_path, capsys):
    run, result = trained
    text = (run.parent / "data.csv").read_text()
    # The same interactions, an item nobody knows among them, and a user of such items.
    lines = [line.replace("user,item,time", "who,item,time") for line in text.splitlines()]
    lines += ["u3,item 0,1", *(f"new,item 0,{time}" for time in range(5))]
    (tmp_path / "other.csv").write_text("\n".join(lines))
    out = tmp_path / "test.json"
    printed, _ = call(
        capsys,
        "evaluate",
        "--checkpoint",
        run,
        "--data",
        tmp_path / "other.csv",
        "--user-column",
        "who",
        "--output",
        out,
    )
    assert "removed 1 unknown items, 6 interactions with them and 1 users" in printed
    assert json.loads(out.read_text())["test"] == result.test

    (tmp_path / "strange.csv").write_text("user,item\n" + "a,z\n" * 5)
    error = error_of(capsys, "evaluate", "--checkpoint", run, "--data", tmp_path / "strange.csv")
    assert "no user has 3 or more with items of the catalogue" in error
    assert error.endswith("here z\n")


def test_evaluate_refuses(trained, tmp_path, capsys):
    run, _ = trained
    for options, message in [
        (["--exclude-seen", "--include-seen"], "exclude each other"),
        (["--by", "weather"], "--by must be one of popularity, length, got 'weather'"),
        (["--ks", "0"], "ks must be one or more numbers"),
        (["--data", tmp_path / "none.csv"], "none.csv does not exist"),
        (["--output", tmp_path], "is a folder"),
        (["--output", run / "run.json" / "x"], "cannot be made"),
    ]:
        assert message in error_of(capsys, "evaluate", "--checkpoint", run, *options)


def test_in_catalogue_keeps_numbers_apart():
    data = Interactions.from_sequences([[3, 1, 2], [2, 3]])
    known = in_catalogue(data, np.array([0, 3, 9, 1]))
    assert [items.tolist() for items in known] == [[1, 3], [1]]
    assert known.num_items == 3
    assert in_catalogue(data, np.array([0, 3, 9, 1]), min_user_interactions=2).user_ids.tolist() == [1]
