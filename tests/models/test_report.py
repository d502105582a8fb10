"""The page about runs: what is read, the figures, the items, and the page itself in a browser."""

import base64
import dataclasses
import gzip
import json
import re
import shutil
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from models.__main__ import main
from models.architectures.registry import config_from_dict, make_config
from models.config import SELECTION
from models.data import load_interactions, split_interactions, write_item_vectors
from models.graphs import build_graph
from models.report import items, tables
from models.report.graphs import known_source, source_of
from models.report.page import curves, styles, write_page
from models.report.runs import Arm, Group, read_groups
from models.training.checkpoints import Checkpoint, Checkpoints, RunInfo, flatten
from models.training.compare import Gain, gain
from tests.browser_check import find_chromium, watch
from tests.models.saved_runs import CONFIG, params_of, small_data

RESULTS = Path(__file__).parents[2] / "results"
HOSTILE = "</script><script>alert('1')</script> & <b>"
NDCG = {("adamw", 0): 0.30, ("adamw", 1): 0.34, ("sevo-adamw", 0): 0.36, ("sevo-adamw", 1): 0.38}


def write_run(folder, optimizer, seed, ndcg=0.3, *, finished=True, trained=False, **options):
    """Writes what a training run leaves, with checkpoints if it shall look trained."""
    config = config_from_dict(CONFIG.differing() | {"optimizer": optimizer, "seed": seed} | options)
    interactions = load_interactions(config)
    info = RunInfo.of(optimizer, config, interactions, num_users=60)
    info.write(folder, interactions.item_ids)
    history = [
        {"epoch": epoch, "loss": 1.0 / epoch, "validation": {SELECTION: ndcg * epoch / 2, "HR@10": 0.5}}
        for epoch in (1, 2)
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(record) + "\n" for record in history))
    if trained:
        params = params_of(config, interactions.num_items, seed + 10 * len(optimizer))
        progress = {"best": ndcg, "best_epoch": 2, "stale": 0, "seconds": 1.0}
        leaves = flatten(params, "best") | flatten(params, "last")
        Checkpoints(folder, info.run).save(Checkpoint(2, leaves, progress))
    if finished:
        result = {
            "optimizer": optimizer,
            "config": config.to_dict(),
            "protocol": "leave-one-out, full ranking",
            "best_epoch": 2,
            "validation": {SELECTION: ndcg},
            "test": {SELECTION: ndcg, "HR@10": 0.5},
            "losses": [1.0, 0.5],
            "epoch_seconds": 0.25,
            "total_seconds": 1.0,
            "peak_memory": 0,
            "device": "cpu",
            "groups": {
                "popularity": {
                    "never seen": {"users": 0},
                    "1-4": {"users": 20, SELECTION: ndcg / 2},
                    "20 and more": {"users": 1500, SELECTION: 0.5},
                }
            },
        }
        (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "clicks.txt"
    rows = [[user, *sequence.tolist()] for user, sequence in enumerate(small_data(), start=1)]
    path.write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, data):
    """Two arms of two seeds, and one that is not finished."""
    folder = tmp_path_factory.mktemp("runs") / "<i>mine</i>"
    for (optimizer, seed), ndcg in NDCG.items():
        write_run(folder / f"{optimizer}-{seed}", optimizer, seed, ndcg, trained=seed == 0, data=str(data))
    write_run(folder / "sevo-gradient-0", "sevo-gradient", 0, finished=False, data=str(data))
    return folder


@pytest.fixture(scope="module")
def group(comparison):
    (group,) = read_groups([comparison])
    return group


@pytest.fixture(scope="module")
def page(tmp_path_factory, group):
    """The page, with titles that would break out of it."""
    output = tmp_path_factory.mktemp("page") / "report.html"
    write_page([group], output, titles={"1": HOSTILE, "2": "Plain title"})
    return output


def payload(page):
    packed = re.search(r'id="payload">(.*?)</script>', page.read_text()).group(1)
    return json.loads(gzip.decompress(base64.b64decode(packed)))


class TestRuns:
    def test_seeds_make_an_arm_and_plain_ones_come_first(self, group):
        assert group.title == "sasrec on clicks, bce"
        assert [(arm.label, len(arm.runs), len(arm.finished)) for arm in group.arms] == [
            ("adamw", 2, 2),
            ("sevo-adamw", 2, 2),
            ("sevo-gradient", 1, 0),
        ]

    def test_runs_at_several_depths_and_cells_beside_them(self, tmp_path, data):
        write_run(tmp_path / "train", "adamw", 0, data=str(data))
        write_run(tmp_path / "compare" / "adamw-1", "adamw", 1, data=str(data))
        write_run(
            tmp_path / "train" / "checkpoints" / "copy", "adamw", 2, data=str(data)
        )  # a run's own, whatever it is
        shutil.copy(RESULTS / "table-3" / "beauty-sasrec-bce-adamw-seed0.json", tmp_path)
        found = [run.seed for group in read_groups([tmp_path]) for arm in group.arms for run in arm.runs]
        assert found == [0, 1, 0]

    def test_runs_over_other_files_are_no_seeds_of_one_another(self, tmp_path, data):
        ids = load_interactions(make_config(data=data)).item_ids[1:]
        for seed, name in enumerate(("text", "image")):
            vectors = tmp_path / name / "items.npz"
            vectors.parent.mkdir()
            write_item_vectors(vectors, ids, np.random.default_rng(seed).normal(size=(len(ids), 3)))
            folder = tmp_path / name / "run"
            write_run(folder, "sevo-adamw", 0, graph=("knn",), vectors=str(vectors), data=str(data))
        (group,) = read_groups([tmp_path])
        assert len(group.arms) == 2
        source = source_of(group)
        found = [source.graph_of(arm) for arm in group.arms]
        assert len({graph.title for graph in found}) == 1
        assert found[0].items.nnz
        for arm, graph in zip(group.arms, found, strict=True):
            (alone,) = source_of(dataclasses.replace(group, arms=(arm,))).graphs
            assert (graph.items != alone.items).nnz == 0
        write_item_vectors(vectors, ids, np.ones((len(ids), 3)))
        assert f"{vectors} held something else in training" in source_of(group).text

    def test_a_run_that_is_named_twice_counts_once(self, comparison):
        (group,) = read_groups([comparison / "adamw-0", comparison.parent, comparison])
        assert sum(len(arm.runs) for arm in group.arms) == 5

    def test_arms_of_one_optimizer_are_told_apart(self, tmp_path, data):
        for beta in (0.5, 0.9):
            write_run(tmp_path / str(beta), "sevo-adamw", 0, beta=beta, data=str(data))
        write_run(tmp_path / "plain", "adamw", 0, data=str(data))
        (group,) = read_groups([tmp_path])
        assert [arm.label for arm in group.arms] == ["adamw", "sevo-adamw (beta 0.5)", "sevo-adamw (beta 0.9)"]
        assert [group.baseline(arm) for arm in group.arms] == [None, group.arms[0], group.arms[0]]

    def test_other_losses_and_data_are_not_compared(self, tmp_path, data):
        write_run(tmp_path / "bce", "adamw", 0, data=str(data))
        write_run(tmp_path / "ce", "adamw", 0, loss="ce", data=str(data))
        write_run(tmp_path / "filtered", "adamw", 0, min_item_interactions=8, data=str(data))
        write_run(tmp_path / "cold", "adamw", 0, cold_items=0.1, data=str(data))
        assert len(read_groups([tmp_path])) == 4

    def test_the_plain_arm_with_the_same_settings_is_the_baseline(self, tmp_path, data):
        write_run(tmp_path / "better", "adamw", 0, 0.9, learning_rate=0.1, data=str(data))
        write_run(tmp_path / "same", "adamw", 0, 0.3, data=str(data))
        write_run(tmp_path / "smoothed", "sevo-adamw", 0, 0.6, data=str(data))
        write_run(tmp_path / "tuned", "sevo-adamw", 0, 0.9, learning_rate=0.01, data=str(data))
        (group,) = read_groups([tmp_path])
        found = {arm.runs[0].source.name: group.baseline(arm) for arm in group.arms}
        assert found["smoothed"].runs[0].source.name == "same"
        assert found["tuned"].runs[0].source.name == "better"

    def test_cells_are_read_as_well(self, tmp_path):
        values = {"adamw": [], "sevo-adamw": []}
        for arm, mine in values.items():
            for seed in (0, 1):
                path = RESULTS / "table-3" / f"beauty-sasrec-bce-{arm}-seed{seed}.json"
                mine.append(json.loads(path.read_text())["test"][SELECTION])
                shutil.copy(path, tmp_path)
        (group,) = read_groups([tmp_path])
        assert [arm.label for arm in group.arms] == ["adamw", "sevo-adamw"]
        plain, smoothed = group.arms
        assert smoothed.gain(plain, SELECTION) == gain(values["sevo-adamw"], values["adamw"])
        assert source_of(group).graphs == ()

    def test_cells_of_an_earlier_version_are_told_apart(self, tmp_path):
        cell = json.loads((RESULTS / "table-3" / "beauty-sasrec-bce-sevo-gradient-seed0.json").read_text())
        for revision in (1, cell["revision"]):
            (tmp_path / f"{revision}.json").write_text(json.dumps(cell | {"revision": revision}))
        (group,) = read_groups([tmp_path])
        assert [arm.label for arm in group.arms] == ["sevo-gradient (earlier version)", "sevo-gradient"]
        assert "earlier version, which corrected the moments" in tables.summary(group).lines[0].note

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "is no folder; give what --output-dir or --results-dir was"),
            ({}, "holds no training run"),
            ({"some.json": '{"a": 1}'}, "holds no training run"),
            ({"some.json": "{"}, "some.json cannot be read"),
            ({"a/run.json": "{}"}, "was not written by a training run"),
        ],
    )
    def test_what_is_no_run_is_refused_in_one_line(self, tmp_path, capsys, content, message):
        folder = tmp_path / "folder"
        for name, text in ({} if content is None else content).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        if content == {}:
            folder.mkdir()
        assert main(["report", "--runs", str(folder), "--output", str(tmp_path / "report.html")]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert len(err.splitlines()) == 1
        assert not (tmp_path / "report.html").exists()


class TestTables:
    def test_gains_are_paired_over_common_seeds(self, group):
        plain, smoothed, unfinished = tables.summary(group).lines
        expected = gain([0.36, 0.38], [0.30, 0.34])
        figure = smoothed.figures[1]
        assert figure.value == f"0.3700 ± {statistics.stdev([0.36, 0.38]):.4f}"
        assert figure.gain == f"{expected.relative:+.1%}, p = {expected.p_value:.2g}"
        assert figure.better
        assert not plain.figures[1].gain
        assert unfinished.note == "1 not finished, 2 epochs so far"
        assert unfinished.figures[1].value == tables.NONE

    def test_without_a_common_seed_or_with_other_epochs_there_is_no_gain(self, tmp_path, data):
        write_run(tmp_path / "plain", "adamw", 0, 0.3, data=str(data))
        write_run(tmp_path / "seed", "sevo-adamw", 1, 0.4, data=str(data))
        write_run(tmp_path / "epochs", "sevo-gradient", 0, 0.4, epochs=3, data=str(data))
        (group,) = read_groups([tmp_path])
        assert [line.figures[1].gain for line in tables.summary(group).lines] == ["", "", ""]
        plain, *others = group.arms
        assert [arm.gain(plain, SELECTION) for arm in others] == [Gain(None, None)] * 2

    def test_groups_of_users_where_results_have_them(self, group):
        (table,) = tables.by_group(group)
        assert table.title == f"Test {SELECTION} by popularity: training interactions of the item to find"
        assert table.columns == ["1-4 (20 users)", "20 and more (1,500 users)"]
        rare = gain([0.18, 0.19], [0.15, 0.17])
        gains = [f"{rare.relative:+.1%}, p = {rare.p_value:.2g}", "+0.0%"]
        assert [[figure.gain for figure in line.figures] for line in table.lines] == [["", ""], gains]
        run = dataclasses.replace(group.arms[0].runs[0], result=group.arms[0].runs[0].result | {"groups": {}})
        assert tables.by_group(Group("one result has none", [*group.arms, Arm("older", [run])])) == []

    def test_curves_are_means_where_all_seeds_were_evaluated(self, group):
        found = curves(group)
        assert found["chosen"] == SELECTION
        plain = found["arms"][0]
        assert plain["validation"][SELECTION] == {
            "epochs": [1, 2],
            "mean": [0.16, 0.32],
            "sd": [round(statistics.stdev([0.15, 0.17]), 5), round(statistics.stdev([0.3, 0.34]), 5)],
        }
        assert found["arms"][2]["loss"] == {"epochs": [1, 2], "mean": [1.0, 0.5], "sd": []}


class TestItems:
    def test_the_nearest_are_those_with_the_largest_cosines(self, monkeypatch):
        monkeypatch.setattr(items, "ROWS_AT_ONCE", 7)
        table = np.random.default_rng(0).normal(size=(30, 5))
        table[4] = 0.0
        found = items.nearest(table, k=4)
        unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)
        cosines = unit @ unit.T
        np.fill_diagonal(cosines, -np.inf)
        expected = np.argsort(-cosines, axis=1, kind="stable")[:, :4]
        others = np.arange(30) != 4  # everything is as near to a row of zeros
        np.testing.assert_array_equal(found.items[others], expected[others])
        np.testing.assert_allclose(found.similarities[others], np.sort(cosines[others])[:, ::-1][:, :4], rtol=1e-5)

    def test_a_catalogue_of_few_items(self):
        assert items.nearest(np.eye(2), k=10).items.tolist() == [[1], [0]]
        assert items.nearest(np.eye(1), k=10).items.shape == (1, 0)

    def test_principal_components_are_those_of_the_singular_values(self):
        table = np.random.default_rng(1).normal(size=(40, 6)) * np.arange(1, 7)
        places, shares = items.principal_components(table)
        left, values, _ = np.linalg.svd(table - table.mean(axis=0), full_matrices=False)
        np.testing.assert_allclose(np.abs(places), np.abs(left[:, :2] * values[:2]), rtol=1e-9)
        np.testing.assert_allclose(shares, values[:2] ** 2 / np.sum(values**2))
        np.testing.assert_allclose(places, items.principal_components(table[:, ::-1])[0], rtol=1e-9)

    def test_the_most_popular_are_kept(self):
        counts = np.array([3, 9, 1, 9])
        assert items.most_popular(counts, 4, 2).tolist() == [1, 3]
        assert items.most_popular(counts, 4, 4).tolist() == [0, 1, 2, 3]
        assert items.most_popular(None, 4, 2).tolist() == [0, 1]

    def test_each_arm_has_its_own_graph(self, tmp_path, data):
        options = {"trained": True, "data": str(data)}
        write_run(tmp_path / "a", "adamw", 1, **options)
        write_run(tmp_path / "b", "sevo-adamw", 1, **options)
        write_run(tmp_path / "c", "sevo-adamw", 1, max_hops=3, **options)
        (group,) = read_groups([tmp_path])
        source = source_of(group)
        assert len(source.graphs) == 2
        found = {arm.config.max_hops if not arm.plain else "plain": source.graph_of(arm) for arm in group.arms}
        assert found["plain"] is None
        assert found[3].items.nnz > found[1].items.nnz > 0

    def test_lines_of_many_settings_differ(self):
        arms = [SimpleNamespace(optimizer=name) for name in ["sevo-adamw"] * 13 + ["sevo-gradient"] * 2]
        found = [tuple(style.values()) for style in styles(arms)]
        assert len(set(found)) == len(found)

    def test_what_is_linked_stands_in_the_graph(self, page, group):
        (found,) = payload(page)
        adjacency = source_of(group).graphs[0].items.toarray()
        for arm in found["items"]["arms"]:
            for item in (0, 17):
                expected = [int(adjacency[item, other] != 0) for other in arm["neighbours"][item]]
                assert arm["linked"][item] == expected

    def test_a_source_that_is_known_is_the_one_that_is_read(self, group):
        read, config = source_of(group), group.arms[0].config
        interactions = load_interactions(config)
        train = split_interactions(interactions, config).train
        known = known_source(group, interactions, train, build_graph(train, config))
        np.testing.assert_array_equal(known.counts, read.counts)
        assert (known.text, known.graphs[0].title) == (read.text, read.graphs[0].title)
        assert known.graphs[0].summary == read.graphs[0].summary
        assert known.graphs[0].items.shape == (interactions.num_items, interactions.num_items)
        assert (known.graphs[0].items != read.graphs[0].items).nnz == 0

    def test_data_that_have_moved(self, tmp_path, data):
        moved = shutil.copy(data, tmp_path / "clicks.txt")
        write_run(tmp_path / "run", "sevo-adamw", 0, data=str(moved))
        (group,) = read_groups([tmp_path / "run"])
        Path(moved).rename(tmp_path / "elsewhere.txt")
        assert "--data says where" in source_of(group).text
        assert len(source_of(group, tmp_path / "elsewhere.txt").graphs) == 1
        (tmp_path / "other.txt").write_text("1 1 2 3 4\n2 4 3 2 1\n")
        assert "not those of training" in source_of(group, tmp_path / "other.txt").text


class TestPage:
    def test_nothing_from_data_becomes_code(self, page):
        text = page.read_text()
        assert HOSTILE not in text
        assert "<i>mine" not in text
        assert "&lt;i&gt;mine&lt;/i&gt;/adamw-0" in text
        (found,) = payload(page)
        assert found["items"]["names"][:3] == [f"{HOSTILE} (1)", "Plain title (2)", "3"]

    def test_arms_that_cannot_be_read_are_left_out(self, page):
        (found,) = payload(page)
        assert [arm["label"] for arm in found["items"]["arms"]] == ["adamw", "sevo-adamw"]
        assert found["degrees"][0]["counts"]

    def test_it_is_one_file_of_sensible_size(self, page):
        assert page.stat().st_size < 2.5e6
        assert not re.search(r"""(src|href)=["']?https?:""", page.read_text())

    def test_the_command(self, comparison, tmp_path, capsys, monkeypatch):
        titles = tmp_path / "titles.tsv"
        titles.write_text("item_id\ttitle\n1\tFirst\n")
        monkeypatch.setattr("models.report.page.has_umap", lambda: True)
        monkeypatch.setattr("models.reproduce.maps.project", lambda table: table[:, :2])  # UMAP takes its time
        output = tmp_path / "new" / "page.html"
        assert main(["report", "--runs", str(comparison), "--output", str(output), "--titles", str(titles)]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith(f"report: {output} (")
        (found,) = payload(output)
        assert found["items"]["names"][0] == "First (1)"
        assert list(found["items"]["arms"][0]["maps"]) == ["PCA", "UMAP"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "--runs must be given"),
            (["--runs"], "runs must "),
            (["--runs", ""], "runs must name a file or folder"),
            (["--runs", ".", "--output", "report.pdf"], "output must end in .html, got report.pdf"),
            (["--runs", ".", "--titles", "none.tsv"], "none.tsv"),
        ],
    )
    def test_mistakes_are_one_line(self, tmp_path, monkeypatch, capsys, arguments, message):
        monkeypatch.chdir(tmp_path)
        assert main(["report", *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert len(err.splitlines()) == 1

    def test_without_plotly_it_says_what_to_install(self, group, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "plotly.offline", None)
        with pytest.raises(ValueError, match=r"needs plotly; install it with pip install -e '\.\[report\]'"):
            write_page([group], tmp_path / "report.html")

    def test_no_arm_has_a_table(self, data, tmp_path):
        write_run(tmp_path / "run", "adamw", 0, data=str(data))
        write_page(read_groups([tmp_path / "run"]), tmp_path / "report.html")
        assert "adamw is not shown" in (tmp_path / "report.html").read_text()
        assert payload(tmp_path / "report.html")[0]["items"] is None


def test_in_a_browser(page):
    """No error and no request; curves switch off; another item has other neighbours; narrow windows do."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("there is no Chromium here; Debian's package is called chromium, or set CHROMIUM to its path")
    (found,) = payload(page)
    wrong = []
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 400, "height": 860})
        tab.set_default_timeout(180_000)
        tab.context.set_offline(True)
        watch(tab, page.as_uri(), wrong)
        tab.goto(page.as_uri())
        tab.wait_for_selector("body[data-drawn=yes]")
        assert tab.evaluate("document.documentElement.scrollWidth") == 400
        tab.set_viewport_size({"width": 1400, "height": 1000})
        assert tab.evaluate("document.documentElement.scrollWidth") == 1400

        visible = (
            "document.getElementById('curves-0').data.filter(x => x.visible !== 'legendonly').map(x => x.legendgroup)"
        )
        assert set(tab.evaluate(visible)) == {"adamw", "sevo-adamw", "sevo-gradient"}
        tab.locator("#curves-0 .legendtoggle").nth(1).click()
        for _ in range(200):  # plotly waits for a second click first
            if "sevo-adamw" not in tab.evaluate(visible):
                break
            tab.wait_for_timeout(50)
        assert set(tab.evaluate(visible)) == {"adamw", "sevo-gradient"}
        tab.select_option("#metric-0", "HR@10")
        assert set(tab.evaluate(visible)) == {"adamw", "sevo-gradient"}
        assert tab.locator("#curves-0 .ytitle").text_content() == "validation HR@10"

        def columns():
            rows = tab.locator("#neighbours-0 tbody tr").all()
            texts = [[cell.evaluate("x => x.firstChild.data") for cell in row.locator("td").all()] for row in rows]
            return [list(column) for column in zip(*texts, strict=True)]

        for item in (0, 20):
            tab.fill("#item-0", found["items"]["names"][item])
            tab.locator("#item-0").press("Tab")
            names = [[found["items"]["names"][i] for i in arm["neighbours"][item]] for arm in found["items"]["arms"]]
            assert columns() == names
        tab.fill("#item-0", "plain")  # a part of a title
        tab.locator("#item-0").press("Tab")
        assert tab.locator("#near-0").text_content().startswith("Nearest to Plain title (2)")
        tab.fill("#item-0", "nothing like it")
        tab.locator("#item-0").press("Tab")
        assert tab.locator("#near-0").text_content() == "No item is called nothing like it"
        tab.select_option("#arm-0", "adamw")
        assert tab.locator("#bars-0-0 .bars .point").count() == 4
        browser.close()
    assert not wrong
