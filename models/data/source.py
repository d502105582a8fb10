"""From a configuration's source to interactions and their split."""

import dataclasses

from models.config import ReadingConfig, SourceConfig
from models.data.interactions import Interactions
from models.data.readers import load
from models.data.splits import Split, cold_start, make_split


def load_interactions(source: SourceConfig) -> Interactions:
    """Reads and filters the interactions of a source, see :func:`models.data.load`."""
    reading = {field.name: getattr(source, field.name) for field in dataclasses.fields(ReadingConfig)}
    return load(
        source.data,
        **reading,
        duplicates=source.duplicates,
        min_user_interactions=source.min_user_interactions,
        min_item_interactions=source.min_item_interactions,
        cache_dir=source.cache_dir,
    )


def split_interactions(interactions: Interactions, source: SourceConfig) -> Split:
    """Splits interactions as a source says, see :func:`models.data.make_split` and :func:`models.data.cold_start`."""
    split = make_split(interactions, source.split, quantiles=source.split_quantiles, times=source.split_times)
    return cold_start(split, source.cold_items) if source.cold_items else split
