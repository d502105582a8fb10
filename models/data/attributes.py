"""Prior knowledge about items: which attributes each has."""

import os
from pathlib import Path

import numpy as np


def read_attributes(
    path: str | os.PathLike[str],
    *,
    item_column: str = "item_id",
    attribute_column: str = "genres",
    separator: str = "|",
) -> tuple[np.ndarray, np.ndarray]:
    """Reads which item has which attributes from a table with one line an item.

    Args:
      path: a file with a header line, tab-separated (``.tsv``) or comma-separated (anything else).
      item_column: column of the items' raw ids, integers or text.
      attribute_column: column of the attributes.
      separator: what stands between several attributes of one item.

    Returns:
      ``(items, attributes)``, one entry each for every attribute of every item, for
      :func:`sevo_optax.graph.shared_attributes`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no such table, a column is missing, or no item has an attribute.
    """
    import polars

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"attributes: {path} does not exist; give a .tsv or .csv file with one line an item")
    try:
        table = polars.read_csv(path, separator="\t" if path.suffix == ".tsv" else ",", quote_char=None)
    except (polars.exceptions.PolarsError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"attributes: {path} cannot be read as a table ({reason})") from None
    for name, column in {"item_column": item_column, "attribute_column": attribute_column}.items():
        if column not in table.columns:
            raise ValueError(f"{name}: {path} has no column {column!r}; it has {', '.join(table.columns)}")
    pairs = (
        table.select(item_column, polars.col(attribute_column).cast(polars.String).str.split(separator))
        .explode(attribute_column)
        .drop_nulls()
        .filter(polars.col(attribute_column) != "")
    )
    if pairs.is_empty():
        raise ValueError(f"attribute_column: no item of {path} has anything in {attribute_column!r}")
    return pairs[item_column].to_numpy(), pairs[attribute_column].to_numpy()
