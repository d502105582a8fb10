"""Prior knowledge about items: which attributes each has, and what it is called."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.data.ids import item_numbers
from models.data.rows import Rows, checked_ids
from models.data.tables import SEQUENCE_TYPES, TABLE_SUFFIXES, Source, Table, open_table, suffix_of

if TYPE_CHECKING:
    import polars

WANTED = "a table with one line an item (.tsv, .csv, .parquet, .json …)"


def read_attributes(
    path: str | os.PathLike[str],
    *,
    item_column: str = "item_id",
    attribute_column: str = "genres",
    separator: str = "|",
) -> tuple[np.ndarray, np.ndarray]:
    """Reads which item has which attributes from a table with one line an item.

    Args:
      path: a table as :func:`models.data.readers.load` reads it, also compressed or a pipe, and RecBole's ``.item``;
        with any other suffix, columns are between tabs if the first line has one, and otherwise as in a csv.
      item_column: column of the items' raw ids, integers or text, kept as they are written.
      attribute_column: column of the attributes: text, or lists where the format has them.
      separator: what stands between several attributes of one item (in RecBole's sequences a space).

    Returns:
      ``(items, attributes)``, one entry each for every attribute of every item, for
      :func:`sevo_optax.graph.shared_attributes`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no such table, a column is missing, or no item has an attribute.
    """
    import polars

    wanted = {"item_column": item_column, "attribute_column": attribute_column}
    pairs = _read_items(Path(path), "attributes", wanted)
    if not pairs["value"].dtype.is_nested():
        if attribute_column.endswith(tuple(f":{kind}" for kind in SEQUENCE_TYPES)):
            separator = " "
        pairs = pairs.with_columns(polars.col("value").cast(polars.String).str.split(separator))
    while pairs["value"].dtype.is_nested():  # the paths of a tree of categories
        pairs = pairs.explode("value")
    pairs = pairs.with_columns(polars.col("value").cast(polars.String).str.strip_chars())
    pairs = pairs.filter(polars.col("value").fill_null("") != "")
    if pairs.is_empty():
        raise ValueError(f"attribute_column: no item of {path} has anything in {attribute_column!r}")
    return pairs["item"].to_numpy(), pairs["value"].to_numpy()


def item_attributes(config: Any, item_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads the attributes of a catalogue's items, as a configuration says.

    Args:
      config: has ``attributes``, ``attribute_item_column`` and ``attribute_column``.
      item_ids: shape (num_items + 1,), the catalogue's raw ids.

    Returns:
      ``(items, attributes)``, one entry each for every attribute of every known item: int32 numbers from 1, and text.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if none is given, it is no such table, or no item of it is in the catalogue.
    """
    if config.attributes is None:
        raise ValueError("attributes: the graph of attributes needs --attributes, a .tsv or .csv with one line an item")
    items, values = read_attributes(
        config.attributes, item_column=config.attribute_item_column, attribute_column=config.attribute_column
    )
    numbers = item_numbers(item_ids, items.tolist())
    if not numbers.any():
        raise ValueError(
            f"attribute_item_column: no item of {config.attributes} is among the items of the data; the first is "
            f"{items[0]}, those look like {item_ids[1]}"
        )
    known = numbers > 0  # filters may have left items out
    return numbers[known], values[known]


def read_titles(
    path: str | os.PathLike[str], *, item_column: str = "item_id", title_column: str = "title"
) -> dict[str, str]:
    """Reads titles from a table with one line an item.

    Args:
      path: a table, as :func:`read_attributes` takes it.
      item_column: column of the items' raw ids.
      title_column: column of the titles.

    Returns:
      Title by raw id, both as text.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no such table, or a column is missing.
    """
    import polars

    wanted = {"title_item_column": item_column, "title_column": title_column}
    pairs = _read_items(Path(path), "titles", wanted)
    if pairs["value"].dtype.is_nested():
        raise ValueError(f"title_column: {title_column!r} of {path} holds lists, but a title is text")
    return dict(zip(*(pairs[name].cast(polars.String).to_list() for name in ("item", "value")), strict=True))


def _read_items(path: Path, option: str, wanted: dict[str, str]) -> "polars.DataFrame":
    """The columns ``item`` and ``value``, where neither is missing.

    Args:
      path: the file.
      option: the option that gave it.
      wanted: two options -> columns: the items' and the values'.
    """
    import polars

    table = _open_items(Source(path, option, WANTED))
    table.check_columns(wanted)
    item_column, value_column = wanted.values()
    frame = table.read(list(dict.fromkeys(wanted.values())), lists=[value_column])
    pairs = polars.DataFrame([frame[item_column].alias("item"), frame[value_column].alias("value")])
    if _innermost(pairs["value"].dtype) in (polars.Binary, polars.Object, polars.Struct):
        raise ValueError(f"{table.source}: column {value_column!r} holds {pairs['value'].dtype}, which is no text")
    missing = pairs["item"].is_null() | pairs["value"].is_null()
    if pairs["item"].dtype == polars.String:
        missing |= pairs["item"].str.strip_chars() == ""
    pairs = pairs.filter(~missing)
    if pairs.is_empty():
        return polars.DataFrame({"item": [], "value": []}, schema=dict.fromkeys(["item", "value"], polars.String))
    rows = Rows(table.source, np.flatnonzero(~missing.to_numpy()))
    return pairs.with_columns(checked_ids(rows, pairs["item"].alias(item_column), "item id").alias("item"))


def _innermost(dtype: Any) -> Any:
    """What lists, and lists of lists, hold."""
    import polars

    while isinstance(dtype, polars.List | polars.Array):
        dtype = dtype.inner
    return dtype


def _open_items(source: Source) -> Table:
    suffix = suffix_of(source.path)
    if suffix in TABLE_SUFFIXES:
        return open_table(source, TABLE_SUFFIXES[suffix])
    with source.open() as file:
        first_line = file.readline()
    if suffix == ".item" and b":token" in first_line:
        return open_table(source, "inter")
    return open_table(source, "tsv" if b"\t" in first_line else "csv")
