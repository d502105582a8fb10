"""Checks that need no data: of options, before anything is read, and how errors show values."""

import dataclasses
import difflib
import functools
import math
import os
import re
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

LARGEST_FLOAT = 3.4028235e38  # of float32, which everything is computed in
LARGEST_INT = 2**31 - 1  # of int32; random keys repeat themselves beyond 32 bits
LONGEST_VALUE = 60  # of one in an error
LONGEST_REASON = 200  # of an error in another one
QUANTILES = (0.8, 0.9)
SAMPLED_LOSSES = ("sampled-softmax", "gbce")
# The losses that heed an option.
LOSS_OPTIONS = {
    "num_negatives": SAMPLED_LOSSES,
    "negatives": SAMPLED_LOSSES,
    "negative_power": SAMPLED_LOSSES,
    "logq_correction": ("sampled-softmax",),
    "gbce_t": ("gbce",),
}


# What only one of the graphs heeds.
OF_GRAPH = {
    "attributes": ("attributes", "attribute_item_column", "attribute_column"),
    "knn": ("vectors", "knn_neighbors", "knn_metric", "knn_method"),
    "shared-users": ("max_neighbors",),
    "item-item": ("graph_max_length", "graph_keep", "max_hops", "graph_weighting"),
}
# Of these, with the graph, what no configuration may hold for another one; presets and earlier runs do hold the rest.
GRAPH_OPTIONS = {
    name: graph
    for graph, names in OF_GRAPH.items()
    for name in names
    if graph != "item-item" and name not in ("attribute_item_column", "attribute_column")
}


@dataclasses.dataclass(frozen=True)
class Condition:
    """What an option needs in order to make a difference.

    Attributes:
      option: another option, which decides.
      holds: ``holds(config)``: whether it makes a difference with what that option is.
      instead: a value of that option with which it does.
    """

    option: str
    holds: Callable[[Any], bool]
    instead: str


Heeded = Mapping[str, tuple[Condition, ...]]
"""What options need in order to make a difference, all of it; others always do."""


def unheeded(config: Any, name: str) -> Condition | None:
    """What an option lacks in order to make a difference to a configuration; None: nothing.

    >>> from models.config import TrainConfig
    >>> unheeded(TrainConfig(optimizer="sgd"), "b2").option, unheeded(TrainConfig(), "b2")
    ('optimizer', None)
    """
    conditions = config.heeded.get(name, ())
    return next((x for x in conditions if hasattr(config, x.option) and not x.holds(config)), None)


def check_heeded(configs: Sequence[Any], given: Mapping[str, Any], *, called: Mapping[str, str] | None = None) -> None:
    """Checks that the options that a command line gives make a difference.

    What a preset, an earlier run or a default says is not looked at: it may be meant for other choices.

    Args:
      configs: what is asked for, one or more of one class; of several, one must heed an option.
      given: values by option.
      called: what stands on the command line before a value of an option, where that is not the option's name.

    Raises:
      ValueError: if one would not be heeded; it names the option, its value, what does not heed it, and the way out.

    Examples:
      >>> from models.config import TrainConfig
      >>> check_heeded([TrainConfig(graph=("shared-users",), max_hops=3)], {"epochs": 2, "max_hops": 3})
      Traceback (most recent call last):
      ValueError: max_hops is not heeded by graph shared-users, got 3; leave it out or give --graph item-item
    """
    for name, value in given.items():
        lacking = [(condition, config) for config in configs if (condition := unheeded(config, name)) is not None]
        if len(lacking) < len(configs):
            continue
        # Of several configurations, those that lack the least: their way out is the shortest.
        least = max((condition for condition, _ in lacking), key=configs[0].heeded[name].index)
        option = least.option
        values = dict.fromkeys(_words(getattr(config, option)) for condition, config in lacking if condition is least)
        values.pop("", None)
        decider = f"by {option} {' or '.join(values)}" if values else f"without {option}"
        way_out = (called or {}).get(option, f"{option.replace('_', '-')} ") + least.instead
        raise ValueError(f"{name} is not heeded {decider}, got {_words(value)}; leave it out or give --{way_out}")


def _words(value: Any) -> str:
    """A value as on the command line; nothing for None."""
    return "" if value is None else " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


NAMES = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("True or False", "True or False"),
    Path: ("a path", "paths"),
}
TEXT = ("text", "texts")


def wanted(kind: Any) -> str:
    """What values of a type are called.

    >>> wanted(int | None), wanted(tuple[float, float]), wanted(tuple[int, ...])
    ('a whole number', '2 numbers', 'whole numbers')
    """
    if isinstance(kind, types.UnionType) or get_origin(kind) is Union:
        return " or ".join(wanted(option) for option in get_args(kind) if option is not type(None))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is tuple:
        arguments = get_args(kind)
        if get_origin(arguments[0]) is Literal:
            return wanted(arguments[0])
        many = NAMES.get(arguments[0], TEXT)[1]
        return many if arguments[-1] is ... else f"{len(arguments)} {many}"
    return NAMES.get(kind, TEXT)[0]


def check_types(options: Any) -> None:
    """Checks that options are of their fields' types, and choices among their values.

    Args:
      options: a dataclass.

    Raises:
      ValueError: if one is not.

    Examples:
      >>> from models.config import TrainConfig
      >>> check_types(TrainConfig(schedule="cosin"))
      Traceback (most recent call last):
      ValueError: schedule must be one of constant, linear, cosine, got 'cosin'
      >>> check_types(TrainConfig(epochs=2.5))
      Traceback (most recent call last):
      ValueError: epochs must be a whole number, got 2.5
    """
    hints = _hints(type(options))
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if not _fits(value, hints[field.name]):
            raise ValueError(f"{field.name} must be {wanted(hints[field.name])}, got {shortened(value)}")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type; an integer is a number, too, and text a path."""
    arguments = get_args(kind)
    if isinstance(kind, types.UnionType) or get_origin(kind) is Union:
        return any(_fits(value, option) for option in arguments)
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in arguments
    if get_origin(kind) is tuple:
        kinds = arguments[:1] * len(value) if isinstance(value, tuple) and arguments[-1] is ... else arguments
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, (str, os.PathLike) if kind is Path else kind)


def check_numbers(options: Any) -> None:
    """Checks that the arrays of a run can hold every number among the options.

    Args:
      options: a dataclass.

    Raises:
      ValueError: if a number is infinite or NaN, or too large for float32 or int32.

    Examples:
      >>> from models.config import TrainConfig
      >>> check_numbers(TrainConfig(learning_rate=float("inf")))
      Traceback (most recent call last):
      ValueError: learning_rate must be a finite number, got inf
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not (math.isfinite(number) and abs(number) <= LARGEST_FLOAT):
                size = "" if not math.isfinite(number) else f" of at most {LARGEST_FLOAT:g}"
                raise ValueError(f"{field.name} must be a finite number{size}, got {number:g}")
            if isinstance(number, int) and abs(number) > LARGEST_INT:
                digits = str(number) if number.bit_length() < 128 else f"a number of {number.bit_length()} bits"
                raise ValueError(f"{field.name} must be at most {LARGEST_INT}, got {digits}")


def check_titles(options: Any) -> None:
    """Checks that the columns of titles come with a file of them.

    Args:
      options: has ``titles``, ``title_item_column`` and ``title_column``, and is a dataclass.

    Raises:
      ValueError: if there is no file, but a column of it is named.
    """
    usual = {field.name: field.default for field in dataclasses.fields(options)}
    for name in ("title_item_column", "title_column"):
        if options.titles is None and getattr(options, name) != usual[name]:
            raise ValueError(
                f"{name} is not heeded without titles, got {getattr(options, name)}; give --titles as well"
            )


def check_split(options: Any) -> None:
    """Checks that the options of a split belong to the split that is chosen.

    Args:
      options: a dataclass with ``split``, ``split_quantiles``, ``split_times`` and ``cold_items``.

    Raises:
      ValueError: if one would not be heeded, or is out of range.
    """
    if not 0 <= options.cold_items < 1:
        raise ValueError(f"cold_items must lie in [0, 1), got {options.cold_items}")
    given = []
    if options.split_times is not None:
        given.append("split_times")
    if options.split_quantiles != QUANTILES:
        given.append("split_quantiles")
    if options.split != "global-time" and given:
        raise ValueError(
            f"{given[0]} is not heeded by split {options.split}, got {' '.join(map(str, getattr(options, given[0])))}; "
            "leave it out or give --split global-time"
        )
    if len(given) > 1:
        raise ValueError("split_times and split_quantiles exclude each other; give one of them")


def check_loss(options: Any) -> None:
    """Checks that the options of a loss belong to the loss that is chosen.

    Args:
      options: a dataclass with ``loss`` and the options in ``LOSS_OPTIONS``.

    Raises:
      ValueError: if one would not be heeded.
    """
    usual = {field.name: field.default for field in dataclasses.fields(options)}
    for name, losses in LOSS_OPTIONS.items():
        value = getattr(options, name)
        if options.loss not in losses and value != usual.get(name, value):
            raise ValueError(
                f"{name} is not heeded by loss {options.loss}, got {value}; leave it out or give --loss {losses[0]}"
            )


def check_graph(options: Any) -> None:
    """Checks that the options of graphs fit the graphs that are asked for.

    Args:
      options: a dataclass with the fields of ``GraphConfig``.

    Raises:
      ValueError: if one would not be heeded, or does not fit.
    """
    graphs, weights = options.graph, options.graph_weights
    if not graphs or len(set(graphs)) < len(graphs):
        raise ValueError(f"graph must name one or more graphs, each once, got {' '.join(graphs) or 'none'}")
    if weights and len(weights) != len(graphs):
        raise ValueError(
            f"graph_weights must hold one number for each of {', '.join(graphs)}, got {' '.join(map(str, weights))}"
        )
    if weights and (min(weights) < 0 or not sum(weights)):
        raise ValueError(f"graph_weights must be at least 0, and not all 0, got {' '.join(map(str, weights))}")
    usual = {field.name: field.default for field in dataclasses.fields(options)}
    for name, graph in GRAPH_OPTIONS.items():
        value = getattr(options, name)
        if graph not in graphs and value != usual.get(name, value):
            raise ValueError(
                f"{name} is not heeded by graph {' '.join(graphs)}, got {value}; leave it out or give --graph {graph}"
            )
    for name in ("graph_max_length", "max_hops", "max_neighbors", "knn_neighbors"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")


def check_text(arguments: Sequence[str]) -> None:
    """Refuses arguments that neither files nor terminals can hold.

    Raises:
      ValueError: if one has a NUL character, or bytes that are not UTF-8 (Python makes lone surrogates of them).
    """
    option = ""
    for argument in arguments:
        if argument.startswith("--"):
            option = argument.partition("=")[0]
        where = option.encode(errors="backslashreplace").decode().replace("\0", "\\x00") or "the command line"
        if "\0" in argument:
            raise ValueError(f"{where} must not hold a NUL character, got {shortened(argument)}")
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where} must be text in UTF-8, got {shortened(argument)}") from None


def near(name: str, known: Sequence[str], most: int = 1) -> str:
    """A question whether a known name was meant, or one of a few; empty if none is like it.

    >>> near("epoch", ["seed", "epochs"])
    '; did you mean epochs?'
    >>> near("sasrec", ["sasrec-toys", "sasrec-tools"], most=3)
    '; did you mean sasrec-toys or sasrec-tools?'
    """
    *others, last = difflib.get_close_matches(name, known, n=most) or [""]
    return f"; did you mean {', '.join(others)}{' or ' if others else ''}{last}?" if last else ""


def first_line(error: BaseException) -> str:
    r"""The first line of what an error says, without colours, cut where it is too long for a line.

    >>> first_line(ValueError("no such column\nthe table has: a, b")), first_line(KeyError())
    ('no such column', 'KeyError')
    """
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return (lines or [type(error).__name__])[0][:LONGEST_REASON].rstrip(".")


def shortened(value: Any) -> str:
    """The value as Python would write it, cut where it is too long for a line.

    >>> shortened("many")
    "'many'"
    >>> len(shortened("9" * 5000))
    60
    """
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deep {type(value).__name__}"
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 4]} …{text[-2:]}"
