"""Reading tables with one interaction a row: csv, tsv, parquet, RecBole ``.inter``, MovieLens ``.dat``, JSON lines."""

import codecs
import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from models.data.interactions import Interactions
from models.data.splits import seconds_since_1970

if TYPE_CHECKING:
    import polars

# polars is imported where it is used: training on plain sequences works without it.

TableFormat = Literal["csv", "tsv", "parquet", "inter", "dat", "json"]
Role = Literal["user", "item", "time"]

# What the columns are usually called, best guess first; case and anything but letters and digits do not count.
USUAL_NAMES: dict[Role, tuple[str, ...]] = {
    "user": ("userid", "user", "uid", "reviewerid", "customerid", "visitorid", "memberid", "sessionid"),
    "item": (
        *("itemid", "item", "iid", "movieid", "movie", "asin", "parentasin", "productid", "product", "bookid", "isbn"),
        *("businessid", "trackid", "songid", "artistid", "articleid", "videoid", "gameid"),
    ),
    "time": (
        *("timestamp", "unixreviewtime", "time", "ratingtime", "unixtimestamp", "datetime", "date", "eventtime"),
        *("createdat", "ts"),
    ),
}
# In files without a header, columns are called by their place. Both MovieLens and Amazon publish user, item, rating and
# time in this order.
USUAL_PLACES: dict[Role, tuple[str, ...]] = {"user": ("1",), "item": ("2",), "time": ("4",)}
NO_TIMES = "none"

# A table that is open: the names of its columns, and how to read some of them, each named so.
_Table = tuple[list[str], Callable[[list[str]], "polars.DataFrame"]]


def read_table(
    path: Path,
    table_format: TableFormat,
    *,
    user_column: str | None = None,
    item_column: str | None = None,
    time_column: str | None = None,
    header: bool = True,
) -> Interactions:
    """Reads a table with one interaction a row.

    Each user's interactions are put in order of time; those of the same time stay in the order of the file, and so does
    everything if there are no times. Users and items are numbered in ascending order of their ids. Ids that are
    integers, each written in the one usual way, become integers; any other id stays text (``007`` is not ``7``).

    Args:
      path: the file; text may be compressed with gzip.
      table_format: how it is written.
      user_column: column of the users' ids; None: one with a usual name (without a header: the first).
      item_column: column of the items' ids; None: one with a usual name (without a header: the second).
      time_column: column of the times, numbers or ISO 8601 dates (which become seconds since 1970); None: one with a
        usual name (without a header: the fourth), if there is one; ``none``: there are no times.
      header: whether the first line of csv or tsv names the columns; if not, they are called 1, 2, 3 ….

    Returns:
      The interactions, with ``times`` if there are any.

    Raises:
      ValueError: if the file is damaged or empty, a column is missing, or an id or a time is; the message says where.
    """
    header = header and table_format != "dat"
    if table_format == "parquet":
        columns, read = _open_parquet(path)
    elif table_format == "json":
        columns, read = _open_json(path)
    else:
        columns, read = _open_text(path, table_format, header)
    chosen = _choose(path, columns, {"user": user_column, "item": item_column, "time": time_column}, header)
    frame = read(list(chosen.values()))
    if not len(frame):
        raise ValueError(f"data: {path} holds no interactions; it needs at least one row")
    user, item = (_checked_ids(path, frame[chosen[role]], f"{role} id") for role in ("user", "item"))
    times = _checked_times(path, frame[chosen["time"]]) if "time" in chosen else None
    order = f"in order of {chosen['time']!r}, ties as in the file" if "time" in chosen else "in the order of the file"
    note = f"users from {chosen['user']!r}, items from {chosen['item']!r}, {order}"
    if "time" not in chosen and time_column is None:
        note += f" (no column of times among {', '.join(columns)})"
    return _assemble(user, item, times, note)


def _assemble(user: "polars.Series", item: "polars.Series", times: np.ndarray | None, note: str) -> Interactions:
    """Numbers users and items by their ids, and sorts."""
    users, items = (series.rank("dense").to_numpy() for series in (user, item))
    # Both sorts are stable, so rows of the same user and time stay in the order of the file.
    order = np.argsort(users, kind="stable") if times is None else np.lexsort([times, users])
    lengths = np.bincount(users)[1:]
    user_ids, item_ids = (_distinct(series) for series in (user, item))
    return Interactions(
        items=items[order].astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        num_items=len(item_ids),
        user_ids=user_ids,
        item_ids=np.insert(item_ids, 0, 0 if item_ids.dtype.kind == "i" else ""),
        times=None if times is None else times[order],
        notes=(note,),
    )


def _distinct(ids: "polars.Series") -> np.ndarray:
    """The distinct ids in ascending order, as int64 or text of fixed width."""
    values = ids.unique().sort().to_numpy()
    return values if values.dtype.kind == "i" else values.astype(str)


# Opening


def is_gzip(path: Path) -> bool:
    """Whether the file begins as gzip files do, whatever it is called."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def read_bytes(path: Path) -> bytes:
    """The content of a text file, decompressed if need be, and checked to be UTF-8.

    Raises:
      ValueError: if it is damaged or not UTF-8.
    """
    with _open_bytes(path) as file:
        data = file.read()
    decoder = codecs.getincrementaldecoder("utf-8")()
    chunk_size = 1 << 24  # the text is only looked at: it never exists whole
    try:
        for begin in range(0, len(data), chunk_size):
            decoder.decode(data[begin : begin + chunk_size], final=begin + chunk_size >= len(data))
    except UnicodeDecodeError:
        line = next(i for i, line in enumerate(data.split(b"\n"), start=1) if not _is_utf8(line))
        raise _not_utf8(path, line) from None
    return data


@contextlib.contextmanager
def _open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The file, decompressed while it is read."""
    with gzip.open(path, "rb") if is_gzip(path) else path.open("rb") as file:
        try:
            yield file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"data: {path} is damaged or cut short ({error}); get the file again") from None


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _not_utf8(path: Path, line: int) -> ValueError:
    return ValueError(
        f"data: {path}, line {line}, is not UTF-8 text; convert the file to UTF-8, for example with iconv"
    )


def _open_text(path: Path, table_format: TableFormat, header: bool) -> _Table:
    import polars

    data = read_bytes(path).removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")
    if not data:
        raise ValueError(f"data: {path} is empty; it needs at least one row")
    first_line = data.split(b"\n", 1)[0].rstrip(b"\r")
    separator = {"csv": _csv_separator(first_line), "dat": "\x1f"}.get(table_format, "\t")
    if table_format == "dat":
        if b"::" not in first_line:
            raise ValueError(f"data: {path}, line 1, has no '::'; the format is 'user::item::rating::time'")
        # polars separates at single bytes only.
        data, first_line = (text.replace(b"::", separator.encode()) for text in (data, first_line))
    quote = '"' if table_format == "csv" else None

    def parse(text: bytes, header: bool) -> "polars.DataFrame":
        try:
            return polars.read_csv(text, separator=separator, quote_char=quote, has_header=header, infer_schema=False)
        except polars.exceptions.PolarsError as error:
            raise _misshapen(path, data, separator, quote, error) from None

    names = [name or "" for name in parse(first_line, header=False).row(0)]
    if not header:
        names = [str(place) for place in range(1, len(names) + 1)]
    elif table_format == "inter":
        names = _untyped(path, names)
    names = [name.strip() for name in names]

    def read(wanted: list[str]) -> "polars.DataFrame":
        # With a header, polars counts the fields of every row against the first line. It does so only as long as it
        # reads all columns: left to pick some, it would pass over a row that an unquoted comma has shifted.
        heading = b"" if header else separator.join(names).encode() + b"\n"
        frame = parse(heading + data, header=True)
        return polars.DataFrame(_integers_if_all_are(frame.to_series(names.index(n)).alias(n)) for n in wanted)

    return names, read


def _csv_separator(first_line: bytes) -> str:
    """The comma, unless the first line has none, but another usual separator."""
    return next((separator for separator in ",;\t|" if separator.encode() in first_line), ",")


def _misshapen(path: Path, data: bytes, separator: str, quote: str | None, error: Exception) -> ValueError:
    """The error for text that is no table, naming the first row that is too long."""
    quoting = csv.QUOTE_NONE if quote is None else csv.QUOTE_MINIMAL
    rows = csv.reader(io.StringIO(data.decode(), newline=""), delimiter=separator, quoting=quoting)
    try:
        fields = len(next(rows))
        for row in rows:
            if len(row) > fields:
                return ValueError(
                    f"data: {path}, line {rows.line_num}, has {len(row)} fields, but the first line has {fields}; "
                    "correct or quote that line, or give another --data-format"
                )
    except csv.Error:
        pass  # what polars says is at least as good
    return ValueError(f"data: {path} cannot be read as a table ({_reason(error)}); check its quotes and separators")


def _untyped(path: Path, names: list[str]) -> list[str]:
    """RecBole's header says ``name:type``. Sequences keep their type, and so have no usual name."""
    split = [name.strip().rpartition(":") for name in names]
    for name, (_, _, kind) in zip(names, split, strict=True):
        if kind not in ("token", "float", "token_seq", "float_seq"):
            raise ValueError(
                f"data: {path}, line 1: {name!r} has no type; a .inter file has columns such as 'user_id:token', "
                "'timestamp:float', between tabs"
            )
    return [full if kind.endswith("_seq") else bare for full, (bare, _, kind) in zip(names, split, strict=True)]


def _integers_if_all_are(text: "polars.Series") -> "polars.Series":
    """The column as integers, if that loses nothing of how it is written."""
    import polars

    numbers = text.cast(polars.Int64, strict=False)
    return numbers if numbers.cast(polars.String).equals(text, check_names=False) else text


def _open_parquet(path: Path) -> _Table:
    import polars

    def damaged(error: BaseException) -> ValueError:
        return ValueError(f"data: {path} cannot be read as parquet ({_reason(error)}); get or write the file again")

    # polars gives up on some damaged files with a panic, which is no Exception.
    errors = (polars.exceptions.PolarsError, polars.exceptions.PanicException, OSError)

    def read(wanted: list[str]) -> "polars.DataFrame":
        try:
            return polars.read_parquet(path, columns=wanted)
        except errors as error:
            raise damaged(error) from None

    try:
        return list(polars.read_parquet_schema(path)), read
    except errors as error:
        raise damaged(error) from None


def _open_json(path: Path) -> _Table:
    import polars

    def records() -> Iterator[dict[str, Any]]:
        with _open_bytes(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _record(path, number, line)

    def read(wanted: list[str]) -> "polars.DataFrame":
        values: dict[str, list[Any]] = {name: [] for name in wanted}
        for record in records():
            for name, column in values.items():
                column.append(record.get(name))
        return polars.DataFrame([_json_column(path, name, column) for name, column in values.items()])

    first = next(records(), None)
    if first is None:
        raise ValueError(f"data: {path} is empty; it needs at least one line")
    return list(first), read


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        raise _not_utf8(path, number) from None
    except ValueError as error:
        raise ValueError(
            f"data: {path}, line {number}, is no JSON ({error}); the format is one object a line"
        ) from None
    if not isinstance(record, dict):
        raise ValueError(f"data: {path}, line {number}, is no JSON object; the format is one object a line")
    return record


def _json_column(path: Path, name: str, values: list[Any]) -> "polars.Series":
    """JSON values as one column: integers, numbers, or text if any is text."""
    import polars

    for row, value in enumerate(values, start=1):
        if isinstance(value, bool | list | dict):
            raise ValueError(f"data: {path}, row {row}: {name!r} is {value!r}; it must be a number or text")
    kinds = {type(value) for value in values if value is not None}
    if str in kinds or any(isinstance(value, int) and abs(value) >= 2**63 for value in values):
        return polars.Series(name, [None if v is None else str(v) for v in values], dtype=polars.String)
    return polars.Series(name, values, dtype=polars.Float64 if float in kinds else polars.Int64)


# Choosing and checking columns


def _choose(path: Path, columns: list[str], given: dict[Role, str | None], header: bool) -> dict[Role, str]:
    """Which column has which role; without times, ``time`` is left out."""
    usual = USUAL_NAMES if header else USUAL_PLACES
    bare = {re.sub(r"[\W_]", "", name).lower(): name for name in reversed(columns)}
    chosen: dict[Role, str] = {}
    for role, name in given.items():
        if role == "time" and name == NO_TIMES and name not in columns:
            continue
        if name is None:
            name = next((bare[candidate] for candidate in usual[role] if candidate in bare), None)
        elif name not in columns:
            raise ValueError(f"{role}_column: {path} has no column {name!r}; it has {', '.join(columns)}")
        if name is not None:
            chosen[role] = name
        elif role != "time":
            raise ValueError(
                f"{role}_column: no column of {path} has a usual name of {role} ids; say which of "
                f"{', '.join(columns)} it is (or --no-header, if that is a row of data)"
            )
    if len(set(chosen.values())) < len(chosen):
        raise ValueError(
            f"data: users, items and times of {path} must be in different columns, "
            f"got {', '.join(f'{role} {name!r}' for role, name in chosen.items())}"
        )
    return chosen


def _checked_ids(path: Path, ids: "polars.Series", what: str) -> "polars.Series":
    """The ids as Int64 or String, none of them missing."""
    import polars

    if ids.dtype in (polars.Categorical, polars.Enum):
        ids = ids.cast(polars.String)
    if ids.dtype.is_float():
        ids = ids.fill_nan(None)
        _refuse(path, ids, ids.is_null(), f"the {what} is missing; give the row one or remove it")
        fractions = (ids != ids.floor()) | ids.is_infinite()
        _refuse(path, ids, fractions, f"the {what} must be an integer or text, not a fraction")
    elif ids.dtype == polars.String:
        blank = ids.is_null() | (ids.str.strip_chars() == "")
        _refuse(path, ids, blank, f"the {what} is missing; give the row one or remove it")
        return ids
    elif ids.dtype.is_integer():
        _refuse(path, ids, ids.is_null(), f"the {what} is missing; give the row one or remove it")
    else:
        raise ValueError(f"data: {path}: column {ids.name!r} holds {ids.dtype}, but {what}s are integers or text")
    numbers = ids.cast(polars.Int64, strict=False)
    return ids.cast(polars.String) if numbers.null_count() else numbers


def _checked_times(path: Path, times: "polars.Series") -> np.ndarray:
    """The times as int64 or float64, none of them missing or negative; dates as seconds since 1970."""
    import polars

    advice = "correct or remove the row, or give --time-column none to take the order of the file"
    kind = times.dtype
    missing = times.is_null()
    if kind == polars.String:
        missing |= times.str.strip_chars() == ""
    _refuse(path, times, missing, f"the time is missing; {advice}")
    if kind == polars.String:
        values = _times_from_text(path, times, advice)
    elif kind in (polars.Date, polars.Datetime):
        values = times.cast(polars.Datetime("us")).dt.epoch("us").cast(polars.Float64) / 1e6
    elif kind.is_integer() or kind.is_float():
        values = times.cast(polars.Float64 if kind.is_float() else polars.Int64)
    else:
        raise ValueError(f"data: {path}: column {times.name!r} holds {kind}, but times are numbers or dates")
    if values.dtype.is_float():
        _refuse(path, times, ~values.is_finite(), f"the time is no finite number; {advice}")
    _refuse(path, times, values < 0, f"the time is negative; {advice}")
    return values.to_numpy()


def _times_from_text(path: Path, times: "polars.Series", advice: str) -> "polars.Series":
    """Numbers if the first is one, dates otherwise."""
    import polars

    numbers = times.str.strip_chars().cast(polars.Float64, strict=False)
    if numbers[0] is not None:
        _refuse(path, times, numbers.is_null(), f"the time is no number, as those before are; {advice}")
        return numbers
    seconds = []
    for row, text in enumerate(times.to_list(), start=1):
        try:
            seconds.append(seconds_since_1970(text.strip()))
        except ValueError:
            raise ValueError(
                f"data: {path}, row {row}, column {times.name!r}: {text!r} is neither a number nor a date such as "
                f"2001-12-31 or 2001-12-31T23:59:59; {advice}"
            ) from None
    return polars.Series(seconds, dtype=polars.Float64)


def _refuse(path: Path, values: "polars.Series", bad: "polars.Series", reason: str) -> None:
    """Names the first row that is bad, if there is one."""
    place = bad.arg_max() if bad.any() else None
    if place is not None:
        found = values[place]
        shown = "" if found is None or found == "" else f"{found!r}: "
        raise ValueError(
            f"data: {path}, row {place + 1} (a header not counted), column {values.name!r}: {shown}{reason}"
        )


def _reason(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
