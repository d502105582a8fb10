"""From a table with one interaction a row to interactions."""

import dataclasses
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Literal

import numpy as np

from models.checks import shortened
from models.data.ids import text_ids
from models.data.interactions import Interactions
from models.data.splits import seconds_since_1970
from models.data.tables import Source, Table, listed

if TYPE_CHECKING:
    import polars

Role = Literal["user", "item", "time", "rating"]

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
    "rating": ("rating", "overall", "score", "stars", "ratings", "ratingvalue", "reviewrating", "userrating"),
}
# In files without a header, columns are called by their place. MovieLens publishes user, item, rating and time in this
# order, as Amazon did until 2014; from 2018 on its item comes first.
USUAL_PLACES: dict[Role, tuple[str, ...]] = {"user": ("1",), "item": ("2",), "time": ("4",), "rating": ("3",)}
NO_TIMES = "none"
# An integer, or as pandas writes one that has stood in a column with a gap.
WHOLE = r"^-?(0|[1-9][0-9]*)(\.0)?$"
# What databases and pandas write for a missing value. ("NA" is Namibia, too.)
SAID_MISSING = ("NULL", "null", "NaN", "nan", "None", "\\N", "<NA>", "N/A")

# Numbers with such names are no times, unless they look like seconds since 1970.
NO_TIME_NAMES = re.compile(
    r"(id|rating|ratings|overall|score|stars|price|amount|cost|quantity|qty|count|weight|value|label|age|votes?|views?)$"
)
# What a number of this size says since 1970, if it is a moment between 1973 and 2103.
UNITS = {"seconds": 1.0, "milliseconds": 1e3, "microseconds": 1e6, "nanoseconds": 1e9}
UNIT_BEGIN, UNIT_END = 1e8, 4.2e9
SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of a table, to tell which one is bad.

    Attributes:
      source: the file.
      numbers: shape (rows,), which they are, from 0; None: all.
    """

    source: Source
    numbers: np.ndarray | None = None

    def __str__(self) -> str:
        return str(self.source)

    def number(self, place: int) -> int:
        """The number of the row in the file, from 1."""
        return int(place if self.numbers is None else self.numbers[place]) + 1

    def refuse(self, values: "polars.Series", bad: "polars.Series", reason: str) -> None:
        """Names the first row that is bad, if there is one."""
        place = bad.arg_max() if bad.any() else None
        if place is not None:
            found = values[place]
            shown = "" if found is None or found == "" else f"{shortened(found)}: "
            raise ValueError(
                f"{self}, row {self.number(place)} (a header not counted), column {values.name!r}: {shown}{reason}"
            )


def interactions_of(
    table: Table,
    *,
    user_column: str | None = None,
    item_column: str | None = None,
    time_column: str | None = None,
    rating_column: str | None = None,
    min_rating: float | None = None,
    where: Sequence[str] = (),
    num_rows: int | None = None,
) -> Interactions:
    """Reads a table with one interaction a row.

    Each user's interactions are put in order of time; those of the same time stay in the order of the file, and so does
    everything if there are no times. Users and items are numbered in ascending order of their ids. Ids that are
    integers, each written in the one usual way or like ``6.0``, become integers; any other id stays text (``007`` is
    not ``7``).

    Args:
      table: the open file.
      user_column: column of the users' ids; None: one with a usual name (without a header: the first).
      item_column: column of the items' ids; None: one with a usual name (without a header: the second).
      time_column: column of the times, numbers or ISO 8601 dates (which become seconds since 1970); None: one with a
        usual name (without a header: the fourth), if there is one; ``none``: there are no times.
      rating_column: column of the ratings, for ``min_rating``; None: one with a usual name (without a header: the
        third).
      min_rating: rows with a smaller rating are left out; None: none.
      where: ``column=value``: rows with another value are left out. A column may come several times, and then may have
        any of the values.
      num_rows: how many rows the file must have; None: any number.

    Returns:
      The interactions, with ``times`` if there are any. Their ``notes`` tell where the order is from and what was left
      out; those that begin with ``warning:`` what may be wrong.

    Raises:
      ValueError: if the file is damaged or empty, a column is missing, or an id or a time is; the message says where.
    """
    source = table.source
    given: dict[Role, str | None] = {"user": user_column, "item": item_column, "time": time_column}
    chosen = _choose(table, given)
    if rating_column is not None and min_rating is None:
        raise ValueError(f"rating_column: {rating_column!r} is read only to compare with min_rating; give both")
    rating = None if min_rating is None else _rating_column(table, rating_column, min_rating)
    wanted = _conditions(table, where)
    names = dict.fromkeys([*chosen.values(), *([rating] if rating else []), *wanted])
    frame = table.read(list(names))
    if not len(frame):
        raise ValueError(f"{source} holds no interactions; it needs at least one row")
    if num_rows is not None and len(frame) != num_rows:
        raise ValueError(
            f"{source} holds {len(frame):,} interactions, but its publisher counts {num_rows:,}; "
            "delete it to fetch it again, or give it by its path to use it as it is"
        )
    rows, notes = Rows(source), []
    for column, values in wanted.items():
        frame, rows = _kept(frame, rows, _has_value(rows, frame[column], values))
        notes.append(f"{column} is {' or '.join(values)}: kept {len(frame):,} rows")
    if rating is not None:
        before = len(frame)
        frame, rows = _kept(frame, rows, _is_rated(rows, frame[rating], min_rating))
        notes.append(f"{rating} at least {min_rating:g}: {before - len(frame):,} rows left out")
    user, item = (checked_ids(rows, frame[chosen[role]], f"{role} id") for role in ("user", "item"))
    times = _checked_times(rows, frame[chosen["time"]]) if "time" in chosen else None
    order = f"in order of {chosen['time']!r}, ties as in the file" if "time" in chosen else "in the order of the file"
    note = f"users from {chosen['user']!r}, items from {chosen['item']!r}, {order}"
    users, items = (series.rank("dense").to_numpy() for series in (user, item))
    warnings = [told(ids, what) for told in (_spaced, _said_missing) for ids, what in ((user, "user"), (item, "item"))]
    if times is not None:
        warnings.append(_mixed_units(chosen["time"], times))
    elif time_column is None:
        note += f" (no column of times among {listed(table.columns)})"
        warnings.append(_unused_times(table, set(chosen.values()), users, rows))
    # Both sorts are stable, so rows of the same user and time stay in the order of the file.
    order = np.argsort(users, kind="stable") if times is None else np.lexsort([times, users])
    lengths = np.bincount(users)[1:]
    item_ids = _distinct(item, [0], [""])
    return Interactions(
        items=items[order].astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        num_items=len(item_ids) - 1,
        user_ids=_distinct(user),
        item_ids=item_ids,
        times=None if times is None else times[order],
        notes=(note, *notes, *(f"warning: {warning}" for warning in warnings if warning)),
    )


def _distinct(ids: "polars.Series", number: Sequence[int] = (), text: Sequence[str] = ()) -> np.ndarray:
    """The distinct ids in ascending order, behind ``number`` if they are integers and ``text`` if they are text."""
    values = ids.unique().sort()
    if values.dtype.is_integer():
        return np.concatenate([np.array(number, np.int64), values.to_numpy()])
    return text_ids([*text, *values.to_list()])


# Choosing columns and rows


def _choose(table: Table, given: dict[Role, str | None]) -> dict[Role, str]:
    """Which column has which role; without times, ``time`` is left out."""
    path, columns = table.source.path, table.columns
    chosen: dict[Role, str] = {}
    for role, name in given.items():
        if role == "time" and name == NO_TIMES and name not in columns:
            continue
        if name is None:
            name = _usual(table, role)
        if name is not None:
            table.check_columns({f"{role}_column": name})
            chosen[role] = name
        elif role != "time":
            raise ValueError(
                f"{role}_column: no column of {path} has a usual name of {role} ids; say which of "
                f"{listed(columns)} it is (or --no-header, if that is a row of data)"
            )
    if len(set(chosen.values())) < len(chosen):
        raise ValueError(
            f"{table.source.option}: users, items and times of {path} must be in different columns, "
            f"got {', '.join(f'{role} {name!r}' for role, name in chosen.items())}"
        )
    return chosen


def _usual(table: Table, role: Role) -> str | None:
    """The column with the most usual name for the role."""
    bare = {_bare(name): name for name in reversed(table.columns)}
    usual = USUAL_NAMES if table.header else USUAL_PLACES
    return next((bare[candidate] for candidate in usual[role] if candidate in bare), None)


def _bare(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def _rating_column(table: Table, name: str | None, min_rating: float) -> str:
    if not np.isfinite(min_rating):
        raise ValueError(f"min_rating must be a finite number, got {min_rating}")
    name = _usual(table, "rating") if name is None else name
    if name is None:
        raise ValueError(
            f"min_rating: no column of {table.source.path} has a usual name of ratings; say with --rating-column "
            f"which of {listed(table.columns)} it is"
        )
    table.check_columns({"rating_column": name})
    return name


def _conditions(table: Table, where: Sequence[str]) -> dict[str, list[str]]:
    """Column -> the values it may have."""
    wanted: dict[str, list[str]] = {}
    for condition in where:
        column, equals, value = condition.partition("=")
        if not equals or not column or not value:
            raise ValueError(
                f"where must be column=value, such as event=purchase, got {condition!r}; "
                f"the columns are {listed(table.columns)}"
            )
        table.check_columns({"where": column})
        wanted.setdefault(column, []).append(value)
    return wanted


def _kept(frame: "polars.DataFrame", rows: Rows, keep: "polars.Series") -> tuple["polars.DataFrame", Rows]:
    numbers = np.flatnonzero(keep.to_numpy())
    return frame.filter(keep), Rows(rows.source, numbers if rows.numbers is None else rows.numbers[numbers])


def _has_value(rows: Rows, column: "polars.Series", values: list[str]) -> "polars.Series":
    """Where the column, spelled out, is one of the values; a number need not be spelled as in the file."""
    import polars

    if column.dtype.is_nested() or column.dtype in (polars.Binary, polars.Object, polars.Duration):
        raise ValueError(f"where: {column.name!r} holds {column.dtype}, which is neither numbers nor text")
    spelled = column.cast(polars.String)
    found = spelled.unique(maintain_order=True).to_list()
    matching = [text for text in found if text is not None and any(_same(text, value) for value in values)]
    if not matching:
        shown = [shortened(text) for text in found[:SHOWN] if text is not None]
        more = f" and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
        raise ValueError(
            f"where: no row of {rows.source.path} has {column.name}={' or '.join(values)}; "
            f"its values are {', '.join(shown)}{more}"
        )
    return spelled.is_in(matching).fill_null(False)


def _same(text: str, value: str) -> bool:
    if text == value:
        return True
    try:
        return Decimal(text) == Decimal(value)  # floats would take neighbours among long ids for the same
    except InvalidOperation:
        return False


def _is_rated(rows: Rows, ratings: "polars.Series", min_rating: float) -> "polars.Series":
    import polars

    advice = "correct or remove the row, or give another --rating-column"
    if ratings.dtype != polars.String and not ratings.dtype.is_numeric():
        raise ValueError(f"{rows}: column {ratings.name!r} holds {ratings.dtype}, but ratings are numbers")
    text = ratings.str.strip_chars() if ratings.dtype == polars.String else ratings
    numbers = text.cast(polars.Float64, strict=False)
    rows.refuse(ratings, (numbers.is_null() | numbers.is_nan()).fill_null(True), f"the rating is no number; {advice}")
    keep = numbers >= min_rating
    if not keep.any():
        raise ValueError(
            f"min_rating: no row of {rows.source.path} has a rating of at least {min_rating:g}; "
            f"the largest in {ratings.name!r} is {float(numbers.max()):g}"
        )
    return keep


# Checking ids and times


def checked_ids(rows: Rows, ids: "polars.Series", what: str) -> "polars.Series":
    """Ids as Int64 or String, see :func:`interactions_of`.

    Raises:
      ValueError: if one is missing, or is no id; it is called ``what``, and its row named.
    """
    import polars

    missing = f"the {what} is missing; give the row one or remove it"
    if ids.dtype in (polars.Categorical, polars.Enum):
        ids = ids.cast(polars.String)
    fraction = f"the {what} must be an integer or text, not a fraction"
    if ids.dtype.is_decimal():  # as databases keep long integers
        rows.refuse(ids, ids.is_null(), missing)
        ids = ids.cast(polars.String).str.replace(r"\.0+$", "")
        rows.refuse(ids, ids.str.contains(".", literal=True), fraction)
    elif ids.dtype.is_float():
        ids = ids.fill_nan(None)
        rows.refuse(ids, ids.is_null(), missing)
        fractions = (ids != ids.floor()) | ids.is_infinite()
        rows.refuse(ids, fractions, fraction)
    elif ids.dtype == polars.String:
        rows.refuse(ids, ids.is_null() | (ids.str.strip_chars() == ""), missing)
        nul = ids.str.contains("\0", literal=True)
        rows.refuse(ids, nul, f"the {what} holds a NUL character; remove it, for example with tr -d '\\000'")
        if not (ids.str.ends_with(".0").any() and ids.str.contains(WHOLE).all()):
            return ids
        ids = ids.str.strip_suffix(".0")
    elif ids.dtype.is_integer():
        rows.refuse(ids, ids.is_null(), missing)
    else:
        raise ValueError(f"{rows}: column {ids.name!r} holds {ids.dtype}, but {what}s are integers or text")
    numbers = ids.cast(polars.Int64, strict=False)
    return ids.cast(polars.String) if numbers.null_count() else numbers


def _spaced(ids: "polars.Series", what: str) -> str | None:
    """Warns of ids with spaces at their ends, above all if others differ from them by these alone."""
    import polars

    if ids.dtype != polars.String:
        return None
    distinct = ids.unique().sort()
    bare = distinct.str.strip_chars()
    spaced = distinct.filter(distinct != bare)
    if spaced.is_empty():
        return None
    alike = distinct.filter(bare.is_duplicated())
    if alike.is_empty():
        return (
            f"{len(spaced):,} of {len(distinct):,} {what} ids of {ids.name!r} begin or end with a space, such as "
            f"{shortened(spaced[0])}; it is a part of the id"
        )
    first = bare.filter(bare.is_duplicated())[0]
    shown = [shortened(text) for text in alike.to_list() if text.strip() == first][:2]
    return (
        f"{len(alike):,} {what} ids of {ids.name!r} differ from another only by spaces at their ends, such as "
        f"{' and '.join(shown)}; they are kept apart"
    )


def _said_missing(ids: "polars.Series", what: str) -> str | None:
    """Warns of ids that are what databases and pandas write where there is none."""
    import polars

    if ids.dtype != polars.String:
        return None
    found = ids.filter(ids.str.strip_chars().is_in(SAID_MISSING))
    if found.is_empty():
        return None
    return (
        f"{len(found):,} rows have the {what} id {shortened(found[0])} in {ids.name!r}, and count as one {what}; if it "
        "says that there is none, remove these rows"
    )


def _checked_times(rows: Rows, times: "polars.Series") -> np.ndarray:
    """The times as int64 or float64, none of them missing or negative; dates as seconds since 1970."""
    import polars

    advice = "correct or remove the row, or give --time-column none to take the order of the file"
    kind = times.dtype
    missing = times.is_null()
    if kind == polars.String:
        missing |= times.str.strip_chars() == ""
    rows.refuse(times, missing, f"the time is missing; {advice}")
    if kind == polars.String:
        values = _times_from_text(rows, times, advice)
    elif kind in (polars.Date, polars.Datetime):
        values = times.cast(polars.Datetime("us")).dt.epoch("us").cast(polars.Float64) / 1e6
    elif kind.is_numeric():
        values = times.cast(polars.Int64 if kind.is_integer() else polars.Float64, strict=False)
        rows.refuse(times, values.is_null(), f"the time does not fit 64 bits; {advice}")
    else:
        raise ValueError(f"{rows}: column {times.name!r} holds {kind}, but times are numbers or dates")
    if values.dtype.is_float():
        rows.refuse(times, ~values.is_finite(), f"the time is no finite number; {advice}")
    rows.refuse(times, values < 0, f"the time is negative; {advice}")
    return values.to_numpy()


def _times_from_text(rows: Rows, times: "polars.Series", advice: str) -> "polars.Series":
    """Numbers if the first is one, dates otherwise."""
    import polars

    numbers = times.str.strip_chars().cast(polars.Float64, strict=False)
    if numbers[0] is not None:
        rows.refuse(times, numbers.is_null(), f"the time is no number, as those before are; {advice}")
        return numbers
    seconds = []
    for place, text in enumerate(times.to_list()):
        try:
            seconds.append(seconds_since_1970(text.strip()))
        except ValueError:
            raise ValueError(
                f"{rows}, row {rows.number(place)}, column {times.name!r}: {shortened(text)} is neither a number nor a "
                f"date such as 2001-12-31 or 2001-12-31T23:59:59; {advice}"
            ) from None
    return polars.Series(seconds, dtype=polars.Float64)


def _mixed_units(name: str, times: np.ndarray) -> str | None:
    """Warns of times of which some look like seconds since 1970 and others like milliseconds."""
    found = {}
    for unit, scale in UNITS.items():
        number = int(((times >= UNIT_BEGIN * scale) & (times < UNIT_END * scale)).sum())
        if number:
            found[unit] = number
    if len(found) < 2:
        return None
    counts = " and ".join(f"{number:,} look like {unit}" for unit, number in found.items())
    return f"the times of {name!r} are mixed: {counts} since 1970; bring them to one unit, or their order is wrong"


def _unused_times(table: Table, chosen: set[str], users: np.ndarray, rows: Rows) -> str | None:
    """Warns of columns that may be times, if the rows of users are in the order of no column at all."""
    order = np.argsort(users, kind="stable")
    same_user = users[order][1:] == users[order][:-1]
    if not same_user.any():
        return None
    others = [name for name in dict.fromkeys(table.columns) if name not in chosen and table.columns.count(name) == 1]
    sample = table.sample(others)
    possible = []
    try:
        columns = table.read([name for name in sample.columns if _is_ordered_kind(sample[name])])
    except ValueError:
        return None  # of a column that is not needed
    for column in columns:
        values = _comparable(column)[order if rows.numbers is None else rows.numbers[order]]
        later, earlier = values[1:][same_user], values[:-1][same_user]
        if (later >= earlier).all() and (later > earlier).any():
            return None
        if _may_be_times(table, column):
            possible.append(column.name)
    if not possible:
        return None
    return (
        f"no column has a usual name of times, and {table.source.path} is not in the order of "
        f"{' or '.join(map(repr, possible[:SHOWN]))}, which went unused; if it is the time, give "
        f"--time-column {possible[0]}, and if the order of the file is right, --time-column none"
    )


def _is_ordered_kind(sample: "polars.Series") -> bool:
    """Whether these are numbers or dates."""
    import polars

    if sample.dtype != polars.String:
        return sample.dtype.is_numeric() or sample.dtype.is_temporal()
    text = sample.str.strip_chars().drop_nulls()
    text = text.filter(text != "")
    if text.is_empty():
        return False
    return text.cast(polars.Float64, strict=False).null_count() == 0 or all(map(_is_date, text.to_list()))


def _is_date(text: str) -> bool:
    try:
        seconds_since_1970(text)
    except (ValueError, OverflowError):
        return False
    return True


def _comparable(column: "polars.Series") -> np.ndarray:
    """Numbers in the order of the column; what is missing or no number is NaN."""
    import polars

    if column.dtype == polars.String:
        text = column.str.strip_chars()
        numbers = text.cast(polars.Float64, strict=False)
        if numbers.null_count() == len(numbers):  # dates: written in one way, they are in the order of their text
            numbers = text.rank("dense")
        column = numbers
    elif column.dtype.is_temporal():
        column = column.to_physical()
    return column.cast(polars.Float64, strict=False).fill_null(float("nan")).to_numpy()


def _may_be_times(table: Table, column: "polars.Series") -> bool:
    """Dates; numbers that look like seconds since 1970; other numbers unless their name or place says otherwise."""
    import polars

    if column.dtype.is_temporal():
        return True
    numbers = column.cast(polars.Float64, strict=False) if column.dtype == polars.String else column
    if numbers.null_count() == len(numbers):
        return True
    if numbers.min() >= UNIT_BEGIN:
        return True
    if not table.header:
        return column.name not in USUAL_PLACES["rating"]
    return not NO_TIME_NAMES.search(_bare(column.name))
