import datetime
import gzip
import io
import json
import os
import subprocess
import sys
import threading
from decimal import Decimal
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import polars as pl
import pytest

from models.__main__ import main
from models.config import DataFormat, SourceConfig
from models.data import (
    ids_from_arrays,
    ids_to_arrays,
    ids_usage,
    item_numbers,
    load,
    load_interactions,
    read_attributes,
    read_titles,
)
from models.data.readers import SUFFIXES

# Users and items out of order, ties in time (user 7 at 30: 12 before 5), and a repeated pair (9, 5).
ROWS = [(9, 5, 4, 50), (7, 12, 5, 30), (7, 5, 3, 30), (9, 12, 1, 20), (7, 100, 2, 10), (9, 5, 2, 60), (11, 5, 2, 1)]
NAMES = ("user_id", "item_id", "rating", "timestamp")


def as_raw(interactions):
    """user id -> items and times in raw ids: nothing of the numbering is left."""
    ids = interactions.item_ids[interactions.items].tolist()
    times = [None] * len(ids) if interactions.times is None else interactions.times.tolist()
    pairs = list(zip(ids, times, strict=True))
    bounds = zip(interactions.user_ids.tolist(), interactions.offsets[:-1], interactions.offsets[1:], strict=True)
    return {user: pairs[begin:end] for user, begin, end in bounds}


def expected(rows):
    """The same from rows (user, item, …, time), by sorting lists."""
    users = {}
    for user, item, *_, time in rows:
        users.setdefault(user, []).append((item, time))
    return {user: sorted(pairs, key=lambda pair: 0 if pair[1] is None else pair[1]) for user, pairs in users.items()}


def text(rows, separator, header=None):
    lines = [separator.join(map(str, row)) for row in rows]
    return "\n".join([*([separator.join(header)] if header else []), *lines]) + "\n"


def json_lines(rows, names=("reviewerID", "asin", "overall", "unixReviewTime")):
    return "".join(json.dumps({"reviewText": "fine, ::\n"} | dict(zip(names, row, strict=True))) + "\n" for row in rows)


TYPED = ("user_id:token", "item_id:token", "rating:float", "timestamp:float")
FILES = {
    "a.csv": text(ROWS, ",", NAMES),
    "b.CSV": text(ROWS, ";", ["userId", "movieId", "rating", "Time"]),
    "c.csv.gz": text(ROWS, ",", NAMES),
    "d.tsv": text(ROWS, "\t", ["uid", " asin ", "x", "date"]),
    "e.inter": text(ROWS, "\t", TYPED),
    "ratings.dat": text(ROWS, "::"),
    "u.data": text(ROWS, "\t"),
    "f.json": json_lines(ROWS),
    "g.json.gz": json_lines(ROWS),
    "h.jsonl": "\n" + json_lines(ROWS) + "\n\n",
    "windows.csv": "\ufeff" + text(ROWS, ",", NAMES).replace("\n", "\r\n") + "\r\n",
}


def write(path, content):
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(path, **columns):
    pl.DataFrame(columns).write_parquet(path)
    return path


class TestFormats:
    @pytest.mark.parametrize("name", FILES)
    def test_every_format_gives_the_same(self, tmp_path, name):
        data = load(write(tmp_path / name, FILES[name]))
        assert as_raw(data) == expected(ROWS)
        assert as_raw(data)[7] == [(100, 10), (12, 30), (5, 30)]
        assert data.user_ids.dtype == data.item_ids.dtype == data.times.dtype == np.int64
        assert data.items.dtype == np.int32
        assert data.offsets.dtype == np.int64
        assert data.num_items == 3
        assert data.item_ids.tolist() == [0, 5, 12, 100]

    def test_parquet(self, tmp_path):
        path = write_parquet(tmp_path / "a.parquet", **dict(zip(NAMES, zip(*ROWS, strict=True), strict=True)))
        assert as_raw(load(path)) == expected(ROWS)

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_the_suffix_can_be_overruled(self, tmp_path, suffix):
        path = write(tmp_path / f"misnamed{suffix}", FILES["a.csv"])
        assert as_raw(load(path, data_format="csv")) == expected(ROWS)

    @pytest.mark.parametrize("data_format", ["parquet", "json", "s3rec"])
    def test_a_header_that_there_cannot_be(self, tmp_path, data_format):
        path = write(tmp_path / "a.txt", "1 2 3\n")
        with pytest.raises(ValueError, match=f"header is not heeded by {data_format}, which has none, got False"):
            load(path, data_format=data_format, header=False)

    def test_two_separators_without_a_header_are_refused(self, tmp_path):
        path = write(tmp_path / "a.csv", "u1;i1;4,5;100\nu1;i2;3,5;90\nu2;i1;1,0;80\n")
        with pytest.raises(ValueError, match="line 1, has commas and semicolons, either of which may separate"):
            load(path, header=False)
        path = write(path, "user;item;rating;time\nu1;i1;4,5;100\nu1;i2;3,5;90\nu2;i1;1,0;80\n")
        assert load(path).user_ids.tolist() == ["u1", "u2"]

    def test_compression_is_seen_in_the_file_not_in_its_name(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_bytes(gzip.compress(FILES["a.csv"].encode()))
        assert as_raw(load(path)) == expected(ROWS)
        path = tmp_path / "b.csv.gz"
        path.write_text(FILES["a.csv"])
        assert as_raw(load(path)) == expected(ROWS)

    def test_sequences_keep_their_ids(self, tmp_path):
        path = write(tmp_path / "a.txt.gz", "30 2 9\n4 9 1 1\n")
        data = load(path)
        assert as_raw(data) == {30: [(2, None), (9, None)], 4: [(9, None), (1, None), (1, None)]}
        assert data.num_items == 9
        assert data.item_ids.tolist() == list(range(10))
        assert data.notes == ("in the order of each line",)

    def test_sequences_and_embedded_data_need_no_polars_and_no_pooch(self, tmp_path):
        path = write(tmp_path / "a.txt", "1 2 3\n")
        code = (
            f"import sys; from models.data import load; load({str(path)!r}); load(); "
            "assert not {'polars', 'pooch', 'requests'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_words_of_the_options(self):
        assert set(SUFFIXES.values()) == set(DataFormat.__args__) - {"auto"}


class TestColumns:
    def test_given_by_name(self, tmp_path):
        path = write(tmp_path / "a.csv", text(ROWS, ",", ["item_id", "user_id", "time", "when"]))
        data = load(path, user_column="item_id", item_column="user_id", time_column="when")
        assert as_raw(data) == expected(ROWS)
        assert data.notes == ("users from 'item_id', items from 'user_id', in order of 'when', ties as in the file",)

    def test_without_a_header(self, tmp_path):
        path = write(tmp_path / "a.csv", text(ROWS, ","))
        assert as_raw(load(path, header=False)) == expected(ROWS)
        swapped = load(path, header=False, user_column="2", item_column="1", time_column="none")
        assert as_raw(swapped) == expected([(item, user, None) for user, item, _, _ in ROWS])
        assert swapped.times is None

    def test_three_columns_without_a_header_have_no_times(self, tmp_path):
        path = write(tmp_path / "a.tsv", text([row[:3] for row in ROWS], "\t"))
        data = load(path, header=False)
        assert as_raw(data) == expected([(user, item, None) for user, item, _, _ in ROWS])
        assert "in the order of the file (no column of times among 1, 2, 3)" in data.notes[0]

    def test_a_missing_time_column_is_told(self, tmp_path):
        data = load(write(tmp_path / "a.csv", "user,item,mood\nb,x,1\na,y,2\nb,a,3\n"))
        assert as_raw(data) == {"a": [("y", None)], "b": [("x", None), ("a", None)]}
        assert data.notes == (
            "users from 'user', items from 'item', in the order of the file "
            "(no column of times among user, item, mood)",
        )

    UNUSED = "and {} is not in the order of {}, which went unused; if it is the time, give --time-column {}"

    @pytest.mark.parametrize(
        ("name", "content", "columns"),
        [
            ("a.csv", "user,item,when\n1,2,30\n1,3,10\n", ["when"]),
            ("a.csv", "user,item,moment,rating\n1,2,2001-02-03,5\n1,3,2001-02-02,4\n", ["moment"]),
            ("a.csv", "user,item,rating\n1,2,1600000001\n1,3,1600000000\n", ["rating"]),
            ("a.csv", "user,item,bought,sent\n1,2,7,9\n2,1,3,1\n1,3,5,8\n", ["bought", "sent"]),
            ("a.json", '{"user": 1, "item": 2, "t": 3, "x": [1]}\n{"user": 1, "item": 2, "t": 1.5}\n', ["t"]),
        ],
    )
    def test_a_time_column_that_went_unused_is_told(self, tmp_path, name, content, columns):
        path = write(tmp_path / name, content)
        _, warning = load(path).notes
        assert warning.startswith("warning: no column has a usual name of times, ")
        assert self.UNUSED.format(path, " or ".join(map(repr, columns)), columns[0]) in warning
        assert len(load(path, time_column="none").notes) == len(load(path, time_column=columns[0]).notes) == 1

    @pytest.mark.parametrize(
        "content",
        [
            "user,item,when\n1,2,10\n2,5,1\n1,3,30\n",  # in order inside each user
            "user,item,row,when\n1,2,1,30\n1,3,2,10\n",  # in the order of another column
            "user,item,rating\n1,2,5\n1,3,4\n",
            "user,item,title\n1,2,b\n1,3,a\n",
            "user,item,when\n1,2,30\n2,3,10\n",  # no user has an order
        ],
    )
    def test_no_warning(self, tmp_path, content):
        assert len(load(write(tmp_path / "a.csv", content)).notes) == 1

    def test_an_unused_time_column_of_parquet(self, tmp_path):
        days = [datetime.date(2001, 1, 2), datetime.date(2001, 1, 1)]
        path = write_parquet(tmp_path / "a.parquet", user=[1, 1], item=[1, 2], day=days, tags=[["a"], ["b"]])
        assert "'day', which went unused" in load(path).notes[1]

    def test_warnings_are_lines_of_their_own(self, tmp_path, capsys):
        path = write(tmp_path / "a.csv", "user,item,when\n1,2,30\n1,3,10\n1,4,20\n")
        assert main(["graph", "--data", str(path), "--part", "all", "--output-dir", str(tmp_path / "out")]) == 0
        out, err = capsys.readouterr()
        assert err.startswith("warning: no column has a usual name of times")
        assert err.count("\n") == 1
        assert "warning:" not in out

    def test_the_most_usual_name_is_taken(self, tmp_path):
        path = write(tmp_path / "a.csv", "asin,item_id,date,timestamp,user,reviewerID\n1,2,3,4,5,6\n")
        assert as_raw(load(path)) == {5: [(2, 4)]}

    def test_sequences_of_recbole_are_passed_over(self, tmp_path):
        header = "user_id:token\titem_id:token_seq\tmovie_id:token\n"
        assert as_raw(load(write(tmp_path / "a.inter", header + "1\t2 3\t4\n"))) == {1: [(4, None)]}

    @pytest.mark.parametrize(
        ("name", "content", "options", "message"),
        [
            ("a.csv", FILES["a.csv"], {"user_column": "who"}, "no column 'who'; it has user_id, item_id, rating, time"),
            ("a.csv", FILES["a.csv"], {"item_column": "x"}, "item_column: .*a.csv has no column 'x'; it has user_id"),
            ("a.csv", FILES["a.csv"], {"time_column": "x"}, "time_column: .*a.csv has no column 'x'; it has user_id"),
            (
                "a.csv",
                FILES["a.csv"],
                {"user_column": "item_id"},
                "different columns, got user 'item_id', item 'item_i",
            ),
            (
                "a.csv",
                "who,item\n1,2\n",
                {},
                "user_column: no column of .* usual name of user ids; say which of who, i",
            ),
            ("a.csv", "user,what\n1,2\n", {}, "item_column: no column of .* usual name of item ids; say which of user"),
            ("a.csv", "1,2,3\n4,5,6\n", {}, "say which of 1, 2, 3 it is .or --no-header, if that is a row of data"),
            ("a.csv", "1\n2\n", {"header": False}, "item_column: no column of"),
            (
                "a.inter",
                "user_id\titem_id\n1\t2\n",
                {},
                "line 1: 'user_id' has no type; a .inter file has columns such",
            ),
            ("a.dat", "1,2,3\n", {}, "line 1, has no '::'; the format is 'user::item::rating::time'"),
            ("a.txt", "1 2 3\n", {"item_column": "asin"}, "item_column: .*a.txt is read as S3-Rec text"),
            ("a.json", json_lines(ROWS), {"user_column": "x"}, "no column 'x'; it has reviewText, reviewerID, asin"),
        ],
    )
    def test_refuses(self, tmp_path, name, content, options, message):
        with pytest.raises(ValueError, match=message) as caught:
            load(write(tmp_path / name, content), **options)
        assert "\n" not in str(caught.value)


class TestIds:
    @pytest.mark.parametrize(
        ("ids", "found"),
        [
            (["7", "10", "-2"], [-2, 7, 10]),
            (["7", "007", "10"], ["007", "10", "7"]),
            (["7", "+7", "1"], ["+7", "1", "7"]),
            (["7", "7.0", "a"], ["7", "7.0", "a"]),
            (["1", "9223372036854775808", "2"], ["1", "2", "9223372036854775808"]),
            (["é", "日本", '"a,b"'], ["a,b", "é", "日本"]),
            ([" x", "x", "nan"], [" x", "nan", "x"]),
        ],
    )
    def test_text_is_read_as_it_is_written(self, tmp_path, ids, found):
        path = write(tmp_path / "a.csv", "user,item\n" + "".join(f"1,{i}\n" for i in ids))
        data = load(path)
        assert data.item_ids[1:].tolist() == found
        path = write(tmp_path / "b.csv", "item,user\n" + "".join(f"1,{i}\n" for i in ids))
        assert load(path).user_ids.tolist() == found

    @pytest.mark.parametrize(
        ("ids", "found"),
        [
            (["7", "10"], ["10", "7"]),
            (pl.Series(["b", "a"], dtype=pl.Categorical), ["a", "b"]),
            (pl.Series([7.0, 3.0]), [3, 7]),
            (pl.Series([7, 3], dtype=pl.UInt8), [3, 7]),
            (pl.Series([7, 2**64 - 1], dtype=pl.UInt64), [str(2**64 - 1), "7"]),
        ],
    )
    def test_types_of_parquet(self, tmp_path, ids, found):
        data = load(write_parquet(tmp_path / "a.parquet", user=[1, 2], item=ids))
        assert data.item_ids[1:].tolist() == found

    @pytest.mark.parametrize(
        ("ids", "found"),
        [
            (["7", 10], ["10", "7"]),
            ([7, 10], [7, 10]),
            ([7, 2**70], [str(2**70), "7"]),
            (["x", 5, 5.0], ["5", "x"]),
            ([2**53 + 1, 2**53, 7.0], ["7", str(2**53), str(2**53 + 1)]),
        ],
    )
    def test_types_of_json(self, tmp_path, ids, found):
        lines = "".join(json.dumps({"user": 1, "item": i}) + "\n" for i in ids)
        assert load(write(tmp_path / "a.json", lines)).item_ids[1:].tolist() == found

    def test_json_that_has_nan_for_what_it_lacks(self, tmp_path):
        path = write(tmp_path / "a.json", '{"user": NaN, "item": 3}\n{"user": "u", "item": 5}\n')
        with pytest.raises(ValueError, match=r"row 1 .*, column 'user': the user id is missing"):
            load(path)

    def test_signs_of_patterns_in_the_name_of_a_parquet_file(self, tmp_path):
        write_parquet(tmp_path / "a1.parquet", user=[1], item=[2])
        path = write_parquet(tmp_path / "a[1].parquet", user=[1], item=[3])
        assert load(path).item_ids.tolist() == [0, 3]

    def test_json_that_leaves_out_what_it_lacks(self, tmp_path):
        lines = '{"user": 1, "item": 3}\n{"user": 1, "item": 5, "timestamp": 2}\n'
        with pytest.raises(ValueError, match=r"row 1 .*, column 'timestamp': the time is missing"):
            load(write(tmp_path / "a.json", lines))
        lines = '{"user": 1, "item": 3, "timestamp": 9}\n{"item": 5, "timestamp": 2, "user": 1, "brand": "x"}\n'
        data = load(write(tmp_path / "b.json", lines))
        assert data.item_ids[next(iter(data))].tolist() == [5, 3]

    def test_numbers_of_raw_ids(self):
        integers, words = np.array([0, 5, 0, 12]), np.array(["", "12", "x"])
        assert item_numbers(integers, [12, "5", np.int64(5), 0, 7, "x", "", "0", 5.0]).tolist() == [
            3,
            1,
            1,
            2,
            0,
            0,
            0,
            2,
            1,
        ]
        assert item_numbers(words, ["x", 12, "", None, np.str_("x")]).tolist() == [2, 1, 0, 0, 2]
        assert item_numbers(words, []).dtype == np.int32

    def test_attributes_find_raw_ids(self, tmp_path, capsys):
        data = write(tmp_path / "a.csv", "user,item\n1,500\n1,30\n2,500\n2,7\n")
        table = write(tmp_path / "items.csv", "item_id,genres\n30,A\n500,A\n9,A\n7,B\n")
        assert read_attributes(table)[0].tolist() == [30, 500, 9, 7]
        out = tmp_path / "out"
        assert (
            main(
                [
                    "graph",
                    "--data",
                    str(data),
                    "--graph",
                    "attributes",
                    "--attributes",
                    str(table),
                    "--output-dir",
                    str(out),
                ]
            )
            == 0
        )
        from sevo_optax import graph

        assert np.argwhere(np.asarray(graph.load(out / "weights.npz").todense())).tolist() == [[2, 3], [3, 2]]

    @pytest.mark.parametrize(("ids", "numbers"), [(["7"], [1]), ([" 7"], [1]), (["007", "7.0", "+7", "1_0"], [0] * 4)])
    def test_text_finds_integers_spelled_in_the_usual_way(self, ids, numbers):
        assert item_numbers(np.array([0, 7, 10]), ids).tolist() == numbers

    def test_spaces_at_the_ends_are_told(self, tmp_path):
        data = load(write(tmp_path / "a.csv", "user,item,time\na,x,1\na ,y,2\na,x  ,3\nb,x,3\nb, x,4\n"))
        assert data.item_ids[1:].tolist() == [" x", "x", "x  ", "y"]
        told = "ids of {} differ from another only by spaces at their ends, such as {}; they are kept apart"
        assert data.notes[1:] == (
            "warning: 2 user " + told.format("'user'", "'a' and 'a '"),
            "warning: 3 item " + told.format("'item'", "' x' and 'x'"),
        )

    def test_spaces_after_separators_are_told(self, tmp_path):
        data = load(write(tmp_path / "a.csv", "user, item, time\na, x, 1\na, y, 2\nb, x, 3\n"))
        assert data.notes[1:] == (
            "warning: 2 of 2 item ids of 'item' begin or end with a space, such as ' x'; it is a part of the id",
        )

    def test_ids_that_say_there_is_none_are_told(self, tmp_path):
        data = load(write(tmp_path / "a.csv", "user,item,time\nNULL,x,1\na,y,2\nNULL,\\N,3\n"))
        assert data.notes[1:] == (
            "warning: 2 rows have the user id 'NULL' in 'user', and count as one user; if it says that there is none, "
            "remove these rows",
            "warning: 1 rows have the item id '\\\\N' in 'item', and count as one item; if it says that there is none, "
            "remove these rows",
        )

    @pytest.mark.parametrize("place", ["x\0,1", "1,x\0", "1,\0x"])
    def test_nul_is_refused(self, tmp_path, place):
        path = write(tmp_path / "a.csv", f"user,item\n1,x\n{place}\n")
        with pytest.raises(ValueError, match=r"row 2 .*: the (user|item) id holds a NUL character; remove it"):
            load(path)

    def test_a_long_id_costs_what_it_is_long(self, tmp_path):
        long = "é" * 1_000_000
        rows = [(f"u{i % 7}", f"i{i}") for i in range(2000)] + [("u0", long), (long, "i0")]
        path = write(tmp_path / "a.csv", text(rows, ",", ["user", "item"]))
        data = load(path, time_column="none")
        for ids in (data.item_ids, data.user_ids):
            assert ids.dtype.kind == "T"
            assert ids.tolist()[-1] == long
        assert as_raw(data) == expected([(user, item, None) for user, item in rows])
        assert item_numbers(data.item_ids, [long, "i0"]).tolist() == [2001, 1]

        arrays = ids_to_arrays(data.item_ids) | ids_to_arrays(data.user_ids, "user_ids")
        np.savez_compressed(tmp_path / "items.npz", **arrays)
        with np.load(tmp_path / "items.npz", allow_pickle=False) as file:
            again = ids_from_arrays(file)
            assert ids_from_arrays(file, "user_ids").tolist() == data.user_ids.tolist()
        assert again.dtype == data.item_ids.dtype
        assert again.tolist() == data.item_ids.tolist()
        names = {"np": np}
        exec(ids_usage(data.item_ids, str(tmp_path / "items.npz")), names)
        assert names["item_ids"].tolist() == data.item_ids.tolist()

    @pytest.mark.parametrize("ids", [np.array([0, 3, 9]), np.array(["", "a", "bé"]), np.array(["", "a", "b"], object)])
    def test_ids_are_kept_in_files(self, tmp_path, ids):
        np.savez(tmp_path / "items.npz", **ids_to_arrays(ids))
        with np.load(tmp_path / "items.npz", allow_pickle=False) as file:
            assert list(file) == ["item_ids"]
            assert ids_from_arrays(file).tolist() == ids.tolist()


class TestItemTables:
    """Attributes and titles come through the same reader as interactions."""

    ROWS = (("0001", 'Good, "Bad"', "Drama|War"), ("007", "Ugly", "War"), ("12", "", ""), ("x ", "Té", "Drama"))

    def files(self):
        names = ("item_id", "title", "genres")
        quoted = [tuple('"' + cell.replace('"', '""') + '"' for cell in row) for row in self.ROWS]
        csv = text(quoted, ",", names)
        tsv = text(self.ROWS, "\t", names)
        json_text = "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in self.ROWS)
        typed = text(self.ROWS, "\t", ["item_id:token", "title:token", "genres:token"])
        frame = pl.DataFrame(dict(zip(names, zip(*self.ROWS, strict=True), strict=True)))
        parquet = io.BytesIO()
        frame.write_parquet(parquet)
        return {
            "a.csv": csv,
            "a.csv.gz": csv,
            "semicolons.csv": text(quoted, ";", names),
            "a.tsv": tsv,
            "a.TSV.gz": tsv,
            "no suffix": tsv,
            "movies.item": tsv,
            "recbole.item": typed,
            "commas.txt": csv,
            "a.jsonl": json_text,
            "a.json.gz": json_text,
            "a.parquet": parquet.getvalue(),
        }

    def test_every_format_gives_the_same(self, tmp_path):
        for name, content in self.files().items():
            path = write(tmp_path / name, content)
            items, genres = read_attributes(path)
            found = list(zip(items.tolist(), genres.tolist(), strict=True))
            assert found == [("0001", "Drama"), ("0001", "War"), ("007", "War"), ("x ", "Drama")], name
            titles = read_titles(path)
            assert {item: title for item, title in titles.items() if title} == {
                "0001": 'Good, "Bad"',
                "007": "Ugly",
                "x ": "Té",
            }, name

    def test_ids_keep_their_zeros_and_their_edges(self, tmp_path, capsys):
        data = write(tmp_path / "a.csv", "user,item\n1,0001\n1,12\n1,0002\n2,12\n2,0001\n")
        table = write(tmp_path / "items.csv", "item_id,genres\n0001,A\n0002,A\n12,B\n")
        out = tmp_path / "out"
        arguments = ["graph", "--data", data, "--graph", "attributes", "--attributes", table, "--output-dir", out]
        assert main([*map(str, arguments), "--part", "all"]) == 0
        from sevo_optax import graph

        weights = np.asarray(graph.load(out / "weights.npz").todense())
        assert np.argwhere(weights).tolist() == [[1, 2], [2, 1]]  # '0001' and '0002'

    def test_lists_and_sequences(self, tmp_path):
        expected = [(1, "A"), (1, "B"), (3, "B")]
        lists = {"item_id": [1, 2, 3], "genres": [["A", "B"], [], ["B"]]}
        write_parquet(tmp_path / "a.parquet", **lists)
        write(tmp_path / "a.json", json_lines(zip(*lists.values(), strict=True), tuple(lists)))
        write(tmp_path / "a.item", "item_id:token\tgenres:token_seq\n1\tA B\n2\t\n3\tB\n")
        nested = {"item_id": [1, 2, 3], "genres": [[["A"], ["B"]], [[]], [["B"]]]}
        write_parquet(tmp_path / "nested.parquet", **nested)
        columns = {"a.parquet": "genres", "a.json": "genres", "a.item": "genres:token_seq", "nested.parquet": "genres"}
        for name, column in columns.items():
            items, genres = read_attributes(tmp_path / name, attribute_column=column)
            assert list(zip(items.tolist(), genres.tolist(), strict=True)) == expected, name

    def test_lists_of_what_is_no_text(self, tmp_path):
        path = write(tmp_path / "a.json", '{"item_id":1,"genres":["A","B"]}\n{"item_id":2,"genres":["C",["D"]]}\n')
        with pytest.raises(ValueError, match=r"row 2: 'genres' is \['C', \['D'\]\]; it must hold numbers or text"):
            read_attributes(path)
        write_parquet(tmp_path / "a.parquet", item_id=[1], genres=[[b"\xff"]])
        with pytest.raises(ValueError, match=r"column 'genres' holds List\(Binary\), which is no text"):
            read_attributes(tmp_path / "a.parquet")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.csv", "", r"^titles: .*a.csv is empty"),
            ("a.csv", "id,name\n1,A\n", "^title_item_column: .*a.csv has no column 'item_id'; it has id, name"),
            ("a.csv", "item_id,name\n1,A\n", "^title_column: .*a.csv has no column 'title'; it has item_id, name"),
            ("a.csv", "item_id,title,title\n1,A,B\n", "title_column: .* has several columns 'title'"),
            ("a.csv", "item_id,title\n1,A\n2,B,C\n", "^titles: .*a.csv, line 3, has 3 fields, but the first"),
            ("a.csv", b"item_id,title\n1,\xff\n", "^titles: .*a.csv, line 2, is not UTF-8 text"),
            ("a.json", '{"item_id": 1, "title": ["A"]}\n', "^title_column: 'title' of .* holds lists"),
            ("a.json", "[" * 100_000, "^titles: .*a.json, line 1, is nested too deeply"),
            ("a.parquet", "PAR1", "^titles: .*a.parquet cannot be read as parquet"),
            ("a.csv", "item_id,title\nx\0,A\n", "^titles: .*, row 1 .*: the item id holds a NUL"),
        ],
    )
    def test_refuses(self, tmp_path, name, content, message):
        path = write(tmp_path / name, content)
        with pytest.raises(ValueError, match=message) as caught:
            read_titles(path)
        assert "\n" not in str(caught.value)

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"^attributes: .*/none.tsv does not exist; give a table with one"):
            read_attributes(tmp_path / "none.tsv")
        with pytest.raises(FileNotFoundError, match=r"^titles: .* is a folder; give a table"):
            read_titles(tmp_path)


class TestPipes:
    @pytest.mark.parametrize("name", ["a.csv", "f.json", "g.json.gz", "a.parquet"])
    def test_a_pipe_is_read(self, tmp_path, name):
        if name == "a.parquet":
            write_parquet(tmp_path / name, **dict(zip(NAMES, zip(*ROWS, strict=True), strict=True)))
        else:
            write(tmp_path / name, FILES[name])
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        content = (tmp_path / name).read_bytes()
        writer = threading.Thread(target=pipe.write_bytes, args=(content,))
        writer.start()
        data = load(pipe, data_format=SUFFIXES[Path(name.removesuffix(".gz")).suffix])
        writer.join()
        assert as_raw(data) == expected(ROWS)

    def test_attributes_and_titles_from_pipes(self, tmp_path):
        found = []
        for number, read in enumerate([read_attributes, read_titles]):
            pipe = tmp_path / str(number)
            os.mkfifo(pipe)
            writer = threading.Thread(target=pipe.write_bytes, args=(b"item_id\tgenres\ttitle\n1\tA\tB\n",))
            writer.start()
            found.append(read(pipe))
            writer.join()
        (items, attributes), titles = found
        assert (items.tolist(), attributes.tolist(), titles) == ([1], ["A"], {"1": "B"})

    def test_standard_input(self):
        code = "from models.data import load; print(load('/dev/stdin', data_format='csv'))"
        done = subprocess.run([sys.executable, "-c", code], input=FILES["a.csv"], capture_output=True, text=True)
        assert done.stdout.startswith("3 users, 3 items, 7 interactions"), done.stderr

    def test_what_is_no_file(self):
        with pytest.raises(FileNotFoundError, match="/dev/null is no file; give a file of interactions"):
            load("/dev/null")


class TestTimes:
    @pytest.mark.parametrize(
        ("times", "seconds"),
        [
            (["10", "9.5", "1e1"], [10.0, 9.5, 10.0]),
            (["1970-01-02", "1970-01-01 00:00:01", "1970-01-01T01:00:00+01:00"], [86400.0, 1.0, 0.0]),
            (["1970-01-01T00:00:00Z", "1970-01-01T00:00:00.25", "1970-01-01"], [0.0, 0.25, 0.0]),
            (["9223372036854775807", "9223372036854775806", "3"], [2**63 - 1, 2**63 - 2, 3]),
        ],
    )
    def test_text(self, tmp_path, times, seconds):
        path = write(tmp_path / "a.csv", "user,item,time\n" + "".join(f"1,{i},{t}\n" for i, t in enumerate(times)))
        assert as_raw(load(path)) == expected([(1, i, second) for i, second in enumerate(seconds)])

    @pytest.mark.parametrize(
        ("times", "told"),
        [
            ([1_600_000_000, 1_600_000_001_000, 1_600_000_002], "2 look like seconds and 1 look like milliseconds"),
            ([1.6e9, 1.6e15, 5.0], "1 look like seconds and 1 look like microseconds"),
            ([1_600_000_000, 1_700_000_000, 1_800_000_000], None),
            ([1, 2, 1_600_000_000_000], None),
        ],
    )
    def test_mixed_units_are_told(self, tmp_path, times, told):
        path = write(tmp_path / "a.csv", "user,item,ts\n" + "".join(f"1,{i},{t}\n" for i, t in enumerate(times)))
        warnings = load(path).notes[1:]
        if told is None:
            assert warnings == ()
        else:
            assert warnings == (
                f"warning: the times of 'ts' are mixed: {told} since 1970; bring them to one unit, or their order is "
                "wrong",
            )

    @pytest.mark.parametrize("dtype", [pl.Datetime("ms"), pl.Datetime("ns"), pl.Datetime("us", "Asia/Tokyo"), pl.Date])
    def test_dates_of_parquet(self, tmp_path, dtype):
        days = [datetime.datetime(1970, 1, 3, tzinfo=datetime.UTC), datetime.datetime(1970, 1, 2, tzinfo=datetime.UTC)]
        times = (
            pl.Series(days).cast(pl.Date) if dtype == pl.Date else pl.Series(days).dt.cast_time_unit("us").cast(dtype)
        )
        path = write_parquet(tmp_path / "a.parquet", user=[1, 1], item=[1, 2], timestamp=times)
        assert as_raw(load(path)) == {1: [(2, 86400.0), (1, 172800.0)]}

    MISSING = "the time is missing; correct or remove the row, or give --time-column none"

    @pytest.mark.parametrize(
        ("times", "message"),
        [
            (["1", "", "3"], f"row 2 .a header not counted., column 'time': {MISSING}"),
            (["1", '""', "3"], f"row 2 .*{MISSING}"),
            (["1", "2", "-3"], "row 3 .*: -3: the time is negative"),
            (["1", "2.5", "-0.5"], "row 3 .*: '-0.5': the time is negative"),
            (["1.5", "nan", "3"], "row 2 .*: 'nan': the time is no finite number"),
            (["1.5", "inf", "3"], "row 2 .*: 'inf': the time is no finite number"),
            (["1", "2", "soon"], "row 3 .*: 'soon': the time is no number, as those before are"),
            (["soon", "2", "3"], "row 1, column 'time': 'soon' is neither a number nor a date such as 2001-12-31"),
            (["2001-02-28", "2001-02-29", "2001-03-01"], "row 2, column 'time': '2001-02-29' is neither a number nor"),
            (["2001-02-28", "7", "2001-03-01"], "row 2, column 'time': '7' is neither"),
            (["1969-12-31", "2001-02-28", "2001-03-01"], "row 1 .*: '1969-12-31': the time is negative"),
        ],
    )
    def test_refuses(self, tmp_path, times, message):
        path = write(tmp_path / "a.csv", "user,item,time\n" + "".join(f"1,{i},{t}\n" for i, t in enumerate(times)))
        with pytest.raises(ValueError, match=message) as caught:
            load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert load(path, time_column="none").items.tolist() == [1, 2, 3]

    @pytest.mark.parametrize(
        ("times", "message"),
        [
            ([1.0, None], f"row 2 .*{MISSING}"),
            ([float("nan"), 1.0], "row 1 .*: nan: the time is no finite number"),
            ([3, -1], "row 2 .*: -1: the time is negative"),
            (
                pl.Series([1, 2**64 - 1], dtype=pl.UInt64),
                "row 2 .*: 18446744073709551615: the time does not fit 64 bits",
            ),
            ([datetime.time(1), datetime.time(2)], "column 'time' holds Time, but times are numbers or dates"),
            ([True, False], "column 'time' holds Boolean, but times are numbers or dates"),
        ],
    )
    def test_refuses_of_parquet(self, tmp_path, times, message):
        with pytest.raises(ValueError, match=message):
            load(write_parquet(tmp_path / "a.parquet", user=[1, 2], item=[1, 2], time=times))


class TestBadFiles:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.csv", "", "is empty; it needs at least one row"),
            ("a.csv", "\n\r\n", "is empty"),
            ("a.csv", "user,item,time\n", "holds no interactions"),
            ("a.csv.gz", "", "is empty"),
            ("a.dat", "", "is empty"),
            ("a.inter", "user_id:token\titem_id:token\n", "holds no interactions"),
            ("a.json", "", "is empty; it needs at least one line"),
            ("a.json.gz", "\n", "is empty; it needs at least one line"),
            ("a.parquet", "", "cannot be read as parquet .*; get or write the file again"),
            ("a.parquet", "PAR1 no parquet", "cannot be read as parquet"),
            ("a.csv", "user,item\n1,2\n1,2,3\n1,2,3,4\n", "line 3, has 3 fields, but the first line has 2; correct"),
            ("a.dat", "1::2::3::4\n1::2::3::4::5\n", "line 2, has 5 fields, but the first line has 4"),
            ("a.tsv", "user\titem\n1\t2\n1\t2\t3\n", "line 3, has 3 fields"),
            ("a.csv", "user,item,title,time\n1,2,One,3\n1,3,Two, Three,4\n", "line 3, has 5 fields"),
            ("a.txt", "1 1 2 1000001\n", "the item ids reach to 1000001, but only 3 occur; number the items from 1"),
            (
                "a.csv",
                'user,item\n"1,2\n3,4\n',
                "as a table .*; check its quotes and separators|row 1 .*, column 'item'",
            ),
            ("a.csv", b"user,item,title\n1,2,x\n1,3,caf\xe9\n", "line 3, is not UTF-8 text; convert the file to UTF-8"),
            ("a.csv", "user,item\n1,é\n".encode("utf-16"), "line 1, is not UTF-8 text"),
            ("a.csv", b"user,item\n1,\xc3", "line 2, is not UTF-8 text"),
            ("a.dat", b"1::2::3::4\n\xff::2::3::4\n", "line 2, is not UTF-8 text"),
            ("a.json", b'{"user": 1, "item": 2}\n{"user": "\xe9", "item": 2}\n', "line 2, is not UTF-8 text"),
            (
                "a.json",
                '{"user": 1, "item": 2}\n\n{"user": 1, "it',
                "line 3, is no JSON .*; the format is one object a",
            ),
            ("a.json", '[{"user": 1, "item": 2}]\n', "line 1, is no JSON object; the format is one object a line"),
            ("a.json", "{'user': 1, 'item': 2}\n", "line 1, is no JSON"),
            ("a.json", '{"user": 1, "item": [2]}\n', r"row 1: 'item' is \[2\]; it must be a number or text"),
            (
                "a.json",
                '{"user": 1, "item": 2}\n{"user": true, "item": 2}\n',
                "row 2: 'user' is True; it must be a numb",
            ),
            ("a.json", '{"user": 1, "item": 2}\n{"user": 1}\n', "row 2 .*, column 'item': the item id is missing"),
            ("a.json", '{"user": 1, "item": 2.5}\n', "column 'item': 2.5: the item id must be an integer or text"),
            ("a.csv", "user,item\n1,2\n,3\n", "row 2 .a header not counted., column 'user': the user id is missing"),
            ("a.csv", 'user,item\n1,2\n1,""\n', "row 2 .*, column 'item': the item id is missing; give the row one"),
            ("a.csv", "user,item\n1,x\n1,  \n", "row 2 .*, column 'item': '  ': the item id is missing"),
            ("a.csv", "user,item\n1,2\n\n3,4\n", "row 2 .*, column 'user': the user id is missing"),
            ("a.csv", "user,item\n1,2\n3\n", "row 2 .*, column 'item': the item id is missing"),
            ("a.json", "[" * 100_000, "line 1, is nested too deeply to be read; the format is one object a line"),
            ("a.json", '{"user":' * 100_000, "line 1, is nested too deeply"),
            ("a.json", '{"user": 1, "item": ' + "9" * 5000 + "}", "line 1, is no JSON .*4300 digits"),
            (
                "a.json",
                '{"user": "\\ud800", "item": 2}',
                r"row 1: 'user' is '\\ud800', which lacks half of a character",
            ),
            ("a.json", '{"user": 1, "item": Infinity}', "column 'item': inf: the item id must be an integer or text"),
            ("a.json", '{"user": 1, "item": 2, "time": true}', "column 'time' holds Boolean, but times are"),
            ("a.json", "null", "line 1, is no JSON object"),
            ("a.json", "{}\n{}", "user_column: no column of"),
            ("a.csv", "\0", r"user_column: no column of .* say which of '\\x00' it is"),
            ("a.csv", '"', "cannot be read as a table"),
            ("a.csv", "user,item,item\n1,2,3\n", "item_column: .* has several columns 'item'; rename all but one"),
            ("a.csv", ",,\n1,2,3\n", "say which of '', '', '' it is"),
            ("a.csv", f"user,item,time\n1,2,3\n1,2,{'x' * 999}\n", "'x{55} …x': the time is no number"),
            ("a.csv", ",".join(f"c{i}" for i in range(5000)), "say which of c0, c1, .*, c29 and 4970 more it is"),
            ("a.csv", "\r\r", "is empty"),
            ("a.csv", b"\x1f\x8b", "is damaged or cut short .*; get the file again"),
            ("a.txt", "²  1\n", "line 1: '²' is no integer id"),
            ("a.txt", "1 ++1\n", r"line 1: '\+\+1' is no integer id"),
            ("a.txt", f"1 2\n2 {'9' * 5000}\n", "line 2: '9{55} …9' is no integer id"),
            ("a.txt", "\0 1 2\n", r"line 1: '\\x00' is no integer id"),
            ("a.dat", "::", "row 1 .*, column '1': the user id is missing"),
            (
                "a.inter",
                "user_id:token\titem_id:token\ttimestamp:float\n1\t2\tx\n",
                "'x' is neither a number nor a date",
            ),
            ("a.xyz", "1 2 3\n", "the suffix of .*a.xyz says nothing of its format; rename it to one of .csv, .tsv"),
            ("none", "1 2 3\n", "or give --data-format {csv,tsv,parquet"),
        ],
    )
    def test_one_clear_line(self, tmp_path, name, content, message):
        path = write(tmp_path / name, content)
        with pytest.raises(ValueError, match=message) as caught:
            load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["a.csv.gz", "a.json.gz", "a.txt.gz", "a.parquet"])
    @pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
    def test_cut_short(self, tmp_path, name, share):
        rng = np.random.default_rng(0)
        rows = rng.integers(1, 100_000, (2000, 4)).tolist()
        path = tmp_path / name
        if name == "a.parquet":
            write_parquet(path, **dict(zip(NAMES, zip(*rows, strict=True), strict=True)))
        else:
            kinds = {"a.csv.gz": text(rows, ",", NAMES), "a.json.gz": json_lines(rows)}
            write(path, kinds.get(name) or "".join(f"{i} {' '.join(map(str, row))}\n" for i, row in enumerate(rows)))
        assert len(load(path)) in (2000, 8000)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"again$") as caught:
            load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_panic_of_polars_is_one_line_too(self, tmp_path, capfd):
        path = write_parquet(tmp_path / "a.parquet", user=list(range(500)), item=list(range(500)))
        whole = path.read_bytes()
        path.write_bytes(whole[:4] + whole[-600:])  # the footer speaks of bytes that are gone
        with pytest.raises(ValueError, match=r"a.parquet cannot be read as parquet .*; get or write the file again$"):
            load(path)
        assert capfd.readouterr().err == ""

    def test_damaged_gzip(self, tmp_path):
        path = write(tmp_path / "a.csv.gz", FILES["a.csv"] * 50)
        data = bytearray(path.read_bytes())
        data[-6] ^= 0xFF  # the check sum
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"is damaged or cut short .*; get the file again"):
            load(path)

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"does not exist; give a file of interactions .* ml-100k"):
            load(tmp_path / "a.csv")
        with pytest.raises(FileNotFoundError, match="is a folder"):
            load(tmp_path)
        with pytest.raises(ValueError, match=r"cannot be read \(File name too long\); give another file"):
            load(tmp_path / ("x" * 300))
        for name in ("a\0b", "a\ud800b"):
            with pytest.raises(FileNotFoundError, match="does not exist"):
                load(tmp_path / name)

    @pytest.mark.parametrize("option", ["user_column", "item_column", "time_column", "rating_column"])
    @pytest.mark.parametrize("name", ["\ud800", "\0", "\n", ""])
    def test_names_that_are_none(self, tmp_path, option, name):
        path = write(tmp_path / "a.csv", FILES["a.csv"])
        with pytest.raises(ValueError, match=f"^{option}: .* has no column .*; it has user_id") as caught:
            load(path, min_rating=1, **{option: name})
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(("ids", "kind"), [([[1], [2]], "List"), ([True, False], "Boolean"), ([b"a", b"b"], "Bin")])
    def test_ids_that_are_none(self, tmp_path, ids, kind):
        path = write_parquet(tmp_path / "a.parquet", user=ids, item=[1, 2])
        with pytest.raises(ValueError, match=f"column 'user' holds {kind}.*, but user ids are integers or text"):
            load(path)

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ([1, None], "row 2 .*: the item id is missing"),
            ([1.0, None], "row 2 .*: the item id is missing"),
            ([float("nan"), 1.0], "row 1 .*: the item id is missing"),
            ([1.0, 2.5], "row 2 .*: 2.5: the item id must be an integer or text, not a fraction"),
            ([1.0, float("inf")], "row 2 .*: inf: the item id must be an integer"),
            (["a", ""], "row 2 .*: the item id is missing"),
        ],
    )
    def test_missing_ids_of_parquet(self, tmp_path, ids, message):
        with pytest.raises(ValueError, match=message):
            load(write_parquet(tmp_path / "a.parquet", user=[1, 2], item=ids))

    def test_decimal_ids_are_integers(self, tmp_path):
        long = 10**25
        ids = [Decimal("7.00"), Decimal(long), Decimal(12)]
        for items, expected in ((ids[::2], [0, 7, 12]), (ids, ["", str(long), "12", "7"])):
            data = load(write_parquet(tmp_path / "a.parquet", user=list(range(len(items))), item=items))
            assert data.item_ids.tolist() == expected
        for bad, message in (
            (Decimal("7.5"), "'7.5': the item id must be an integer"),
            (None, "the item id is missing"),
        ):
            with pytest.raises(ValueError, match=f"row 2 .*: {message}"):
                load(write_parquet(tmp_path / "a.parquet", user=[1, 2], item=[Decimal("1.0"), bad]))


def test_a_tsv_with_quoted_names_has_quoted_ids(tmp_path):
    (tmp_path / "a.tsv").write_text('"user"\t"item"\n"u"\t"a ""b"""\n"u"\t"c"\n')
    assert load(tmp_path / "a.tsv").item_ids.tolist() == ["", 'a "b"', "c"]
    (tmp_path / "b.tsv").write_text('user\titem\nu\t"a"\nu\tb"\n')
    assert load(tmp_path / "b.tsv").item_ids.tolist() == ["", '"a"', 'b"']


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["6", "6.0", "7.0"], [0, 6, 7]),
        (["6.0", "x"], ["", "6.0", "x"]),
        (["6.0", "007"], ["", "007", "6.0"]),
        (["6.0", "6.00"], ["", "6.0", "6.00"]),
        (["6.0", "1" + "0" * 20], ["", "1" + "0" * 20, "6"]),
    ],
)
def test_integers_that_are_written_as_fractions_are_integers(tmp_path, ids, expected):
    (tmp_path / "a.csv").write_text("user,item\n" + "".join(f"u,{raw}\n" for raw in ids))
    assert load(tmp_path / "a.csv").item_ids.tolist() == expected


class TestChoosingRows:
    EVENTS = (
        ("u1", "a", "view", 5.0, 1),
        ("u1", "b", "purchase", 3, 2),
        ("u2", "b", "cart", 4, 1),
        ("u2", "c", "purchase", 3.5, 3),
        ("u2", "a", "view", 1, 2),
    )
    NAMES = ("user", "item", "event", "rating", "time")

    @pytest.fixture(params=["csv", "tsv", "json", "parquet"])
    def path(self, request, tmp_path):
        path = tmp_path / f"a.{request.param}"
        if request.param == "parquet":
            columns = [
                list(map(float, c)) if n == "rating" else c
                for n, c in zip(self.NAMES, zip(*self.EVENTS, strict=True), strict=True)
            ]
            return write_parquet(path, **dict(zip(self.NAMES, columns, strict=True)))
        if request.param == "json":
            return write(path, json_lines(self.EVENTS, self.NAMES))
        return write(path, text(self.EVENTS, "," if request.param == "csv" else "\t", self.NAMES))

    @pytest.mark.parametrize(
        ("options", "kept"),
        [
            ({"min_rating": 3.5}, [0, 2, 3]),
            ({"min_rating": -1}, range(5)),
            ({"min_rating": 2, "rating_column": "time"}, [1, 3, 4]),
            ({"where": ["event=purchase"]}, [1, 3]),
            ({"where": ("event=purchase", "event=cart")}, [1, 2, 3]),
            ({"where": ["event=view", "user=u2"]}, [4]),
            ({"where": ["rating=3.50"]}, [3]),
            ({"where": ["time=2"], "min_rating": 2}, [1]),
        ],
    )
    def test_rows_that_stay(self, path, options, kept):
        assert as_raw(load(path, **options)) == expected([self.EVENTS[row] for row in kept])

    def test_neighbours_among_long_ids_are_told_apart(self, tmp_path):
        shops = [2**53, 2**53 + 1]
        path = write_parquet(tmp_path / "a.parquet", user=[1, 1], item=[2, 3], shop=shops)
        assert load(path, where=[f"shop={shops[1]}"]).item_ids.tolist() == [0, 3]

    def test_what_is_left_out_is_told(self, path):
        data = load(path, where=["event=purchase", "event=view"], min_rating=3)
        assert data.notes[1:] == (
            "event is purchase or view: kept 4 rows",
            "rating at least 3: 1 rows left out",
        )

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"where": ["event=buy"]}, r"no row of .* has event=buy; its values are 'view', 'purchase', 'cart'$"),
            ({"where": ["kind=view"]}, "^where: .* has no column 'kind'; it has .*user, item, event, rating, time$"),
            (
                {"where": ["event"]},
                "^where must be column=value, such as event=purchase, got 'event'; the columns are",
            ),
            ({"where": ["event="]}, "^where must be column=value"),
            ({"where": ["event=\ud800"]}, "no row of .* has event=.*; its values are 'view'"),
            ({"where": ["event=view", "item=b"]}, "^where: no row of .* has item=b; its values are 'a'$"),
            ({"min_rating": 6}, "^min_rating: no row of .* has a rating of at least 6; the largest in 'rating' is 5"),
            ({"min_rating": float("nan")}, "^min_rating must be a finite number, got nan"),
            ({"min_rating": 1, "rating_column": "event"}, "column 'event': 'view': the rating is no number; correct"),
            (
                {"min_rating": 1, "rating_column": "x"},
                "^rating_column: .* has no column 'x'; it has .*user, item, event",
            ),
            (
                {"rating_column": "rating"},
                "^rating_column: 'rating' is read only to compare with min_rating; give both",
            ),
        ],
    )
    def test_refuses(self, path, options, message):
        with pytest.raises(ValueError, match=message):
            load(path, **options)

    def test_without_a_header_the_third_column_is_the_rating(self, tmp_path):
        path = write(tmp_path / "ratings.dat", FILES["ratings.dat"])
        assert as_raw(load(path, min_rating=3)) == expected([row for row in ROWS if row[2] >= 3])
        assert as_raw(load(path, where=["3=2"])) == expected([row for row in ROWS if row[2] == 2])

    def test_bad_rows_that_are_left_out_do_not_matter(self, tmp_path):
        path = write(
            tmp_path / "a.csv", "user,item,event,time\n,,login,\n1,a,buy,5\n1,,search,6\n1,b,buy,4\n1,c,buy,x\n"
        )
        with pytest.raises(ValueError, match=r"row 5 .*: 'x': the time is no number"):  # counted in the file
            load(path, where=["event=buy"])
        path = write(tmp_path / "b.csv", "user,item,event\n,,login\n1,a,buy\n")
        assert as_raw(load(path, where=["event=buy"])) == {1: [("a", None)]}

    def test_missing_ratings_and_values(self, tmp_path):
        path = write(tmp_path / "a.csv", "user,item,rating,event\n1,2,5,\n1,3,,buy\n")
        with pytest.raises(ValueError, match=r"row 2 .*, column 'rating': the rating is no number"):
            load(path, min_rating=1)
        assert as_raw(load(path, where=["event=buy"])) == {1: [(3, None)]}

    def test_no_column_of_ratings(self, tmp_path):
        path = write(tmp_path / "a.csv", "user,item,opinion\n1,2,5\n")
        with pytest.raises(
            ValueError, match=r"^min_rating: no column of .* has a usual name of ratings; say with --rat"
        ):
            load(path, min_rating=4)
        assert as_raw(load(path, min_rating=4, rating_column="opinion")) == {1: [(2, None)]}

    @pytest.mark.parametrize("options", [{"min_rating": 4}, {"where": ["a=b"]}, {"user_column": "x"}])
    def test_where_there_are_no_columns(self, tmp_path, options):
        name = next(iter(options))
        with pytest.raises(ValueError, match=f"^{name}: .*a.txt is read as S3-Rec text, which has no columns"):
            load(write(tmp_path / "a.txt", "1 2 3\n"), **options)
        with pytest.raises(ValueError, match=f"^{name}: the embedded data is used, which has no columns"):
            load(**options)


# Whatever a text field may hold; line ends and NUL are left to csv's own rules.
WORDS = st.text(
    st.characters(codec="utf-8", exclude_characters="\0\r\n", exclude_categories=["Cs"]), min_size=1
).filter(str.strip)


@hypothesis.given(
    st.lists(st.tuples(WORDS, st.one_of(WORDS, st.integers().map(str)), st.integers(0, 5)), min_size=1, max_size=20)
)
def test_quoted_csv_against_sorted_lists(tmp_path_factory, rows):
    def quoted(field):
        return '"' + str(field).replace('"', '""') + '"'

    path = tmp_path_factory.mktemp("csv") / "a.csv"
    write(path, "user,item,time\n" + "".join(",".join(map(quoted, row)) + "\n" for row in rows))

    def integers(column):  # where all of a column are, it is read as integers
        return [int(x) for x in column] if all(_is_integer(x) for x in column) else column

    users, items, times = zip(*rows, strict=True)
    assert as_raw(load(path)) == expected(zip(integers(users), integers(items), times, strict=True))


def _is_integer(word):
    return word.isascii() and word.lstrip("-").isdigit() and str(int(word)) == word and -(2**63) <= int(word) < 2**63


class TestCommandLine:
    def run(self, capsys, *arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    def test_options_reach_the_reader(self, tmp_path, capsys):
        rows = [(f"u{u}", f"i{(3 * u + i) % 8}", i) for u in range(12) for i in range(5)] + [("once", "i1", 0)]
        path = write(tmp_path / "a.csv", text(rows, ";", ["who", "what", "when"]))
        options = ["--user-column", "who", "--item-column", "what", "--time-column", "when", "--duplicates", "first"]
        options += ["--min-user-interactions", 3, "--min-item-interactions", 2, "--output-dir", tmp_path / "out"]
        status, printed, _ = self.run(capsys, "graph", "--data", path, *options)
        assert status == 0
        assert f"{path}: 12 users, 8 items, 60 interactions (62.50% of all pairs, 5.0 a user)\n" in printed
        assert "users from 'who', items from 'what', in order of 'when', ties as in the file\n" in printed
        assert "duplicates, first kept: 0 interactions removed\n" in printed
        assert "removed 1 users, 0 items and 1 interactions in 1 round\n" in printed

    def test_a_file_without_a_header(self, tmp_path, capsys):
        path = write(tmp_path / "a.csv", text(ROWS, ","))
        options = ["--no-header", "--time-column", "none", "--part", "all", "--output-dir", tmp_path / "out"]
        status, printed, _ = self.run(capsys, "graph", "--data", path, *options)
        assert status == 0
        assert "users from '1', items from '2', in the order of the file\n" in printed

    def test_choosing_rows(self, tmp_path, capsys):
        path = write(tmp_path / "a.csv", text(TestChoosingRows.EVENTS, ",", TestChoosingRows.NAMES))
        options = ["--where", "event=purchase", "event=view", "--min-rating", 3, "--part", "all"]
        status, printed, _ = self.run(capsys, "graph", "--data", path, *options, "--output-dir", tmp_path / "out")
        assert status == 0
        assert "event is purchase or view: kept 4 rows\n" in printed
        assert "rating at least 3: 1 rows left out\n" in printed
        assert f"{path}: 2 users, 3 items, 3 interactions" in printed

    def test_every_option_of_the_source_is_passed_on(self, tmp_path):
        path = write(tmp_path / "a.xyz", text(ROWS, "\t"))
        config = SourceConfig(data=path, data_format="tsv", header=False, duplicates="last", min_user_interactions=2)
        assert as_raw(load_interactions(config)) == {7: [(100, 10), (12, 30), (5, 30)], 9: [(12, 20), (5, 60)]}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("user,item\n1,2\n1,\n", "row 2 (a header not counted), column 'item': the item id is missing"),
            ("user,item,time\n1,2,3\n1,2,-3\n", "-3: the time is negative"),
            ("a,b\n1,2\n", "user_column: no column"),
            ("user,item\n1,2\n1,3\n2,3\n", "user 1 of 2 has 2 interactions (id 1), but leave-one-out needs at least 3"),
            ("user,item\n1,9\n1,9\n1,9\n1,9\n", "user 1 has interacted with all 1 items"),
            ("user,item\n1,9\n1,8\n1,7\n", "no user has two interactions to train on"),
        ],
    )
    def test_bad_data_is_one_line_and_status_2(self, tmp_path, capsys, content, message):
        path = write(tmp_path / "bad.csv", content)
        status, _, err = self.run(capsys, "train", "--data", path, "--output-dir", tmp_path / "out")
        assert status == 2
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--data-format", "xls"], "--data-format must be one of auto, csv"),
            (["--duplicates", "none"], "--duplicates must be one of all"),
            (["--split", "random"], "--split must be one of leave-one-out"),
            (["--min-user-interactions", "-1"], "min_user_interactions must be at least 0, got -1"),
            (["--min-item-interactions", "99"], "nothing of 3 users, 3 items, 7 interactions"),
            (
                ["--split", "global-time", "--split-quantiles", "0.9", "0.8"],
                "split_quantiles must ascend between 0 and 1",
            ),
            (["--split", "global-time", "--split-quantiles", "0.5", "nan"], "split_quantiles must be a finite number"),
            (["--split", "global-time", "--split-times", "20", "soon"], "split_times must be a number or a date"),
        ],
    )
    def test_bad_options_are_one_line_and_status_2(self, tmp_path, capsys, options, message):
        path = write(tmp_path / "a.csv", FILES["a.csv"])
        status, _, err = self.run(capsys, "train", "--data", path, *options, "--output-dir", tmp_path / "out")
        assert status == 2
        assert message in err
        assert err.count("\n") == 1
