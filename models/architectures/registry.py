"""Models by name: the only file that lists them."""

import importlib
from collections.abc import Mapping
from typing import Any

from flax import nnx

from models.architectures.base import Recommender
from models.config import TrainConfig

# By name, the module and the class: imported when the model is asked for. A module of another package has a dot.
MODELS: dict[str, str] = {
    "sasrec": "sasrec:SASRec",
    "bert4rec": "bert4rec:BERT4Rec",
    "mf-bpr": "mf_bpr:MFBPR",
    "lightgcn": "lightgcn:LightGCN",
    "item-knn": "item_knn:ItemKNN",
    "popularity": "popularity:Popularity",
    "gru4rec": "gru4rec:GRU4Rec",
    "stosa": "stosa:STOSA",
    "sr-gnn": "sr_gnn:SRGNN",
    "lessr": "lessr:LESSR",
    "maerec": "maerec:MAERec",
}
DEFAULT = "sasrec"


def model_class(name: str) -> type[Recommender]:
    """The class of a model.

    Raises:
      ValueError: if there is none of that name; it lists those that there are.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    module, _, attribute = MODELS[name].partition(":")
    return getattr(importlib.import_module(module if "." in module else f"models.architectures.{module}"), attribute)


def make_config(model: str = DEFAULT, **options: Any) -> TrainConfig:
    """A checked configuration: the model's published settings, but for the options given.

    Args:
      model: name of the model.
      **options: values by field of the model's configuration.

    Raises:
      ValueError: if the model has no such option, or a value is out of range.

    Examples:
      >>> make_config("bert4rec", epochs=3).num_heads
      4
    """
    return config_from_dict({"model": model} | options)


def config_from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """The checked configuration with the given fields, as read from JSON or YAML; others keep the model's defaults.

    Raises:
      ValueError: if the model has no such option, or a value is out of range.
    """
    model = values.get("model", DEFAULT)
    return model_class(model).config_class.from_dict({"model": model} | dict(values)).checked()


def make_model(config: TrainConfig, *, num_users: int, num_items: int, seed: int) -> Recommender:
    """Builds a freshly initialised model from a configuration."""
    model = model_class(config.model)
    return model.from_config(config, num_users=num_users, num_items=num_items, rngs=nnx.Rngs(seed))
