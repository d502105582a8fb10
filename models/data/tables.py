"""Opening tables, all in one way: csv, tsv, parquet, RecBole's files, MovieLens' ``.dat``, JSON lines."""

import abc
import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import math
import os
import re
import tempfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from models.checks import first_line, shortened

if TYPE_CHECKING:
    import polars

# polars is imported where it is used: training on plain sequences works without it.

TableFormat = Literal["csv", "tsv", "parquet", "inter", "dat", "json"]

# Suffix (before .gz) -> format, of files with one row an interaction or an item.
TABLE_SUFFIXES: dict[str, TableFormat] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".data": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".inter": "inter",
    ".dat": "dat",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
}
SAMPLE_ROWS = 1000
LISTED = 30
GZIP = b"\x1f\x8b"
STDERR = 2
SEQUENCE_TYPES = ("token_seq", "float_seq")


def suffix_of(path: Path) -> str:
    """The suffix in small letters, that before ``.gz`` if there is one."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def listed(names: Sequence[str]) -> str:
    """Names in one line, at most :data:`LISTED` of them."""
    shown = [name if name.isprintable() and name else repr(name) for name in names[:LISTED]]
    return ", ".join(shown) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


class Source:
    """A file or a pipe to read from, possibly compressed with gzip. As text, it is how errors begin.

    Attributes:
      path: where it is.
      option: the option that gave it, which every error names.
    """

    def __init__(self, path: Path, option: str, wanted: str) -> None:
        """Finds the file, and reads a pipe, which can be read only once.

        Raises:
          FileNotFoundError: if there is none; it says what is ``wanted``.
          ValueError: if a pipe cannot be read.
        """
        self.path, self.option = path, option
        self._content: bytes | None = None
        with self._explaining():
            pipe, there = path.is_fifo(), path.exists()
            if pipe:
                self._content = path.read_bytes()
        if not pipe and not path.is_file():
            what = "is a folder" if path.is_dir() else "is no file" if there else "does not exist"
            raise FileNotFoundError(f"{self} {what}; give {wanted}")

    def __str__(self) -> str:
        return f"{self.option}: {self.path}"

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{self} is damaged or cut short ({error}); get the file again") from None
        except OSError as error:
            raise ValueError(f"{self} cannot be read ({error.strerror or error}); give another file") from None

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The content, decompressed while it is read, whatever the file is called.

        Raises:
          ValueError: if it is damaged, or cannot be read.
        """
        with self._explaining(), contextlib.ExitStack() as stack:
            file = stack.enter_context(self.path.open("rb") if self._content is None else io.BytesIO(self._content))
            begin = file.read(len(GZIP))
            file.seek(0)
            yield stack.enter_context(gzip.open(file)) if begin == GZIP else file

    def text(self) -> bytes:
        """The whole content, checked to be UTF-8.

        Raises:
          ValueError: if it is not, is damaged, or cannot be read.
        """
        with self.open() as file:
            data = file.read()
        decoder = codecs.getincrementaldecoder("utf-8")()
        chunk_size = 1 << 24  # the text is only looked at: it never exists whole
        try:
            for begin in range(0, len(data), chunk_size):
                decoder.decode(data[begin : begin + chunk_size], final=begin + chunk_size >= len(data))
        except UnicodeDecodeError:
            line = next(i for i, line in enumerate(data.split(b"\n"), start=1) if not _is_utf8(line))
            raise self.not_utf8(line) from None
        return data.removeprefix(codecs.BOM_UTF8)

    def not_utf8(self, line: int) -> ValueError:
        """The error for a line that is not UTF-8."""
        return ValueError(f"{self}, line {line}, is not UTF-8 text; convert the file to UTF-8, for example with iconv")


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


class Table(abc.ABC):
    """A table that is open.

    Attributes:
      source: the file.
      columns: the names of its columns. Those of a file without a header are called 1, 2, 3 ….
      header: whether the file names them.
    """

    source: Source
    columns: list[str]
    header: bool = True

    @abc.abstractmethod
    def read(self, columns: Sequence[str], *, lists: Collection[str] = ()) -> "polars.DataFrame":
        """Reads some columns, each named so; text as integers, if all of it spells integers in the usual way.

        Args:
          columns: their names.
          lists: those of them that may hold lists of text, where the format has lists.

        Raises:
          ValueError: if the file is damaged, naming the place.
        """

    @abc.abstractmethod
    def sample(self, columns: Sequence[str]) -> "polars.DataFrame":
        """The first :data:`SAMPLE_ROWS` rows of some columns, without those that can not be read."""

    def check_columns(self, wanted: dict[str, str]) -> None:
        """Checks that the columns are there, each once.

        Args:
          wanted: what to call a column in an error, usually an option -> its name.

        Raises:
          ValueError: if one is not; the message lists the columns.
        """
        for option, name in wanted.items():
            if name not in self.columns:
                raise ValueError(f"{option}: {self.source.path} has no column {name!r}; it has {listed(self.columns)}")
            if self.columns.count(name) > 1:
                raise ValueError(f"{option}: {self.source.path} has several columns {name!r}; rename all but one")


def open_table(source: Source, table_format: TableFormat, *, header: bool = True) -> Table:
    """Opens a table.

    Args:
      source: the file.
      table_format: how it is written.
      header: whether the first line of csv or tsv names the columns.

    Raises:
      ValueError: if the file is damaged, empty, or no such table.
    """
    if table_format == "parquet":
        return _Parquet(source)
    if table_format == "json":
        return _JsonLines(source)
    return _Text(source, table_format, header and table_format != "dat")


class _Text(Table):
    """Fields between separators."""

    def __init__(self, source: Source, table_format: TableFormat, header: bool) -> None:
        self.source, self.header = source, header
        data = source.text().rstrip(b"\r\n")
        if not data:
            raise ValueError(f"{source} is empty; it needs at least one row")
        first_line = data.split(b"\n", 1)[0].rstrip(b"\r")
        self._separator = {"csv": _csv_separator(source, first_line, header), "dat": "\x1f"}.get(table_format, "\t")
        if table_format == "dat":
            if b"::" not in first_line:
                raise ValueError(f"{source}, line 1, has no '::'; the format is 'user::item::rating::time'")
            # polars separates at single bytes only.
            data, first_line = (text.replace(b"::", self._separator.encode()) for text in (data, first_line))
        self._quote = '"' if table_format == "csv" or (header and _is_quoted(first_line)) else None
        self._data = data
        names = [name or "" for name in self._parse(first_line, header=False).row(0)]
        if not header:
            names = [str(place) for place in range(1, len(names) + 1)]
        elif table_format == "inter":
            names = _untyped(source, names)
        self.columns = [name.strip() for name in names]

    def read(self, columns: Sequence[str], *, lists: Collection[str] = ()) -> "polars.DataFrame":
        import polars

        frame = self._whole()
        return polars.DataFrame([self._column(frame, name) for name in columns])

    def sample(self, columns: Sequence[str]) -> "polars.DataFrame":
        import polars

        frame = self._whole(SAMPLE_ROWS)
        return polars.DataFrame([self._column(frame, name) for name in columns])

    def _column(self, frame: "polars.DataFrame", name: str) -> "polars.Series":
        return _integers_if_all_are(frame.to_series(self.columns.index(name)).alias(name))

    def _whole(self, num_rows: int | None = None) -> "polars.DataFrame":
        # With a header, polars counts the fields of every row against the first line. It does so only as long as it
        # reads all columns: left to pick some, it would pass over a row that an unquoted comma has shifted.
        heading = b"" if self.header else self._separator.join(self.columns).encode() + b"\n"
        return self._parse(heading + self._data, header=True, num_rows=num_rows)

    def _parse(self, text: bytes, header: bool, num_rows: int | None = None) -> "polars.DataFrame":
        import polars

        try:
            return polars.read_csv(
                text,
                separator=self._separator,
                quote_char=self._quote,
                has_header=header,
                infer_schema=False,
                n_rows=num_rows,
            )
        except (polars.exceptions.PolarsError, polars.exceptions.PanicException) as error:
            raise self._misshapen(error) from None

    def _misshapen(self, error: BaseException) -> ValueError:
        """The error for text that is no table, naming the first row that is too long."""
        quoting = csv.QUOTE_NONE if self._quote is None else csv.QUOTE_MINIMAL
        text = io.StringIO(self._data.decode(), newline="")
        rows = csv.reader(text, delimiter=self._separator, quoting=quoting)
        try:
            fields = len(next(rows))
            for row in rows:
                if len(row) > fields:
                    return ValueError(
                        f"{self.source}, line {rows.line_num}, has {len(row)} fields, but the first line has "
                        f"{fields}; correct or quote that line, or say how the file is written, with another format"
                    )
        except csv.Error:
            pass  # what polars says is at least as good
        return ValueError(
            f"{self.source} cannot be read as a table ({first_line(error)}); check its quotes and separators"
        )


def _is_quoted(first_line: bytes) -> bool:
    """Whether all names between tabs stand in quotes, as R writes them: so do the texts below."""
    return all(re.fullmatch(rb'"[^"]+"', name) for name in first_line.split(b"\t"))


def _csv_separator(source: Source, first_line: bytes, header: bool) -> str:
    """The comma, unless the first line has none, but another usual separator."""
    if not header and b"," in first_line and b";" in first_line:
        raise ValueError(
            f"{source}, line 1, has commas and semicolons, either of which may separate its columns; put a line that "
            "names the columns above it, and leave out --no-header"
        )
    return next((separator for separator in ",;\t|" if separator.encode() in first_line), ",")


def _untyped(source: Source, names: list[str]) -> list[str]:
    """RecBole's header says ``name:type``. Sequences keep their type, and so have no usual name."""
    split = [name.strip().rpartition(":") for name in names]
    for name, (_, _, kind) in zip(names, split, strict=True):
        if kind not in ("token", "float", *SEQUENCE_TYPES):
            raise ValueError(
                f"{source}, line 1: {name!r} has no type; a .inter file has columns such as 'user_id:token', "
                "'timestamp:float', between tabs"
            )
    return [full if kind in SEQUENCE_TYPES else bare for full, (bare, _, kind) in zip(names, split, strict=True)]


def _integers_if_all_are(text: "polars.Series") -> "polars.Series":
    """The column as integers, if that loses nothing of how it is written."""
    import polars

    numbers = text.cast(polars.Int64, strict=False)
    return numbers if numbers.cast(polars.String).equals(text, check_names=False) else text


class _Parquet(Table):
    def __init__(self, source: Source) -> None:
        import polars

        self.source = source
        # polars gives up on some damaged files with a panic, which is no Exception.
        self._errors = (polars.exceptions.PolarsError, polars.exceptions.PanicException, OSError)
        with source.open() as file:
            # What is a file stays one: polars then reads no more of it than it needs.
            self._file: Path | bytes = source.path if isinstance(file, io.BufferedReader) else file.read()
        try:
            with self._readable() as readable, _panics_unprinted():
                self.columns = list(polars.read_parquet_schema(readable))
        except self._errors as error:
            raise self._damaged(error) from None

    def read(self, columns: Sequence[str], *, lists: Collection[str] = ()) -> "polars.DataFrame":
        return self._read(columns, None)

    def sample(self, columns: Sequence[str]) -> "polars.DataFrame":
        return self._read(columns, SAMPLE_ROWS)

    def _read(self, columns: Sequence[str], num_rows: int | None) -> "polars.DataFrame":
        import polars

        try:
            with self._readable() as readable, _panics_unprinted():
                return polars.read_parquet(readable, columns=list(columns), n_rows=num_rows)
        except self._errors as error:
            raise self._damaged(error) from None

    def _readable(self) -> BinaryIO:
        # Open: in a path, polars would take brackets and asterisks for a pattern that other files may match.
        return self._file.open("rb") if isinstance(self._file, Path) else io.BytesIO(self._file)

    def _damaged(self, error: BaseException) -> ValueError:
        return ValueError(f"{self.source} cannot be read as parquet ({first_line(error)}); get or write the file again")


@contextlib.contextmanager
def _panics_unprinted() -> Iterator[None]:
    """Drops what is written to the terminal if this fails: polars reports a panic there, before it raises it."""
    with tempfile.TemporaryFile() as written:
        try:
            terminal = os.dup(STDERR)
        except OSError:  # closed
            yield
            return
        os.dup2(written.fileno(), STDERR)
        try:
            yield
        finally:
            os.dup2(terminal, STDERR)
            os.close(terminal)
        written.seek(0)
        os.write(STDERR, written.read())


class _JsonLines(Table):
    """One object a line; what it lacks is missing. The columns are those of all of the first objects."""

    def __init__(self, source: Source) -> None:
        self.source = source
        first = list(itertools.islice(self._records(), SAMPLE_ROWS))
        if not first:
            raise ValueError(f"{source} is empty; it needs at least one line")
        self.columns = list(dict.fromkeys(name for record in first for name in record))

    def read(self, columns: Sequence[str], *, lists: Collection[str] = ()) -> "polars.DataFrame":
        import polars

        values = self._values(columns, None)
        return polars.DataFrame([_json_column(self.source, name, values[name], name in lists) for name in columns])

    def sample(self, columns: Sequence[str]) -> "polars.DataFrame":
        import polars

        found = []
        for name, column in self._values(columns, SAMPLE_ROWS).items():
            with contextlib.suppress(ValueError):
                found.append(_json_column(self.source, name, column, lists=False))
        return polars.DataFrame(found)

    def _values(self, columns: Sequence[str], num_rows: int | None) -> dict[str, list[Any]]:
        values: dict[str, list[Any]] = {name: [] for name in columns}
        for record in itertools.islice(self._records(), num_rows):
            for name, column in values.items():
                column.append(record.get(name))
        return values

    def _records(self) -> Iterator[dict[str, Any]]:
        with self.source.open() as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield self._record(number, line)

    def _record(self, number: int, line: bytes) -> dict[str, Any]:
        form = "the format is one object a line"
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            raise self.source.not_utf8(number) from None
        except RecursionError:
            raise ValueError(f"{self.source}, line {number}, is nested too deeply to be read; {form}") from None
        except ValueError as error:
            raise ValueError(f"{self.source}, line {number}, is no JSON ({error}); {form}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{self.source}, line {number}, is no JSON object; {form}")
        return record


def _json_column(source: Source, name: str, values: list[Any], lists: bool) -> "polars.Series":
    """JSON values as one column: integers, numbers, text if any is text, truth values, or lists of text if allowed."""
    import polars

    # Whoever writes JSON from a table writes NaN where it has nothing.
    values = [None if isinstance(value, float) and math.isnan(value) else value for value in values]
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return polars.Series(name, values, dtype=polars.Boolean)
    if lists and list in kinds:
        several = [value if value is None or isinstance(value, list) else [value] for value in values]
        for row, value in enumerate(several, start=1):
            if any(isinstance(part, bool | list | dict) for part in value or ()):
                raise ValueError(f"{source}, row {row}: {name!r} is {shortened(value)}; it must hold numbers or text")
        parts = [part for value in several for part in value or ()]
        lengths = [None if value is None else len(value) for value in several]
        return _regrouped(_json_column(source, name, parts, lists=False).cast(polars.String), lengths)
    for row, value in enumerate(values, start=1):
        if isinstance(value, bool | list | dict):
            raise ValueError(f"{source}, row {row}: {name!r} is {shortened(value)}; it must be a number or text")
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= sign <= "\udfff" for sign in value):
            raise ValueError(f"{source}, row {row}: {name!r} is {shortened(value)}, which lacks half of a character")
    largest = max((abs(value) for value in values if isinstance(value, int)), default=0)
    if str in kinds or largest >= 2**63 or (float in kinds and largest > 2**53):  # no float has all of their digits
        return polars.Series(name, [None if value is None else _spelled(value) for value in values], polars.String)
    return polars.Series(name, values, dtype=polars.Float64 if float in kinds else polars.Int64)


def _spelled(value: str | float) -> str:
    """A JSON value as text: 5.0 is 5, as in other rows of the column it may stand without the point."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _regrouped(parts: "polars.Series", lengths: list[int | None]) -> "polars.Series":
    """Lists of the given lengths, of parts one after the other."""
    import polars

    remaining = iter(parts.to_list())
    lists = [None if length is None else list(itertools.islice(remaining, length)) for length in lengths]
    return polars.Series(parts.name, lists, dtype=polars.List(polars.String))
