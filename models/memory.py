"""Memory: what a run will need, what there is, and a clear word where it did not suffice."""

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from models.checks import SAMPLED_LOSSES

if TYPE_CHECKING:
    from models.data import Interactions

# Parameters, their gradients, two moments, the update and the best parameters so far.
COPIES = 6
# Of what a layer or a score is computed from, as far as the backward pass needs it again.
KEPT = 3
# Numbers a token in a block, besides attention weights, in multiples of the embedding's width.
WIDTHS_A_BLOCK = 12
# Numbers a token in a recurrent layer, in multiples of the state's width: three gates, the state, and a product.
STATES_A_TOKEN = 5
# Bytes an interaction: packed for training, and in two evaluations as a history and as what is not ranked.
INTERACTION = 56
# Bytes a neighbour of an item: its number and similarity, as they are found, and as they are kept, in NumPy and in JAX.
NEIGHBOR = 28
# Users scored at once in evaluations.
USERS_AT_ONCE = 256
NUMBER = 4  # bytes of a float32 or int32
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50, "EiB": 2**60}


class OutOfMemoryError(ValueError):
    """More memory was needed than there is."""


@dataclasses.dataclass(frozen=True)
class Need:
    """Something that needs memory.

    Attributes:
      what: what it is, in words.
      size: how much it needs, in bytes.
      option: the option that lowers it most.
    """

    what: str
    size: int
    option: str


def training_needs(config: Any, interactions: "Interactions") -> list[Need]:
    """What training needs at least: everything that options or data can make arbitrarily large.

    Args:
      config: the run, resolved. Options that a model does not have count as 0.
      interactions: the data.
    """
    from models.architectures.registry import model_class

    model = model_class(config.model)

    def option(name: str) -> int:
        return getattr(config, name, None) or 0

    items, dim, blocks = interactions.num_items, config.embedding_dim, option("num_blocks")
    max_length = option("max_length")
    longest = min(int(interactions.lengths.max()), max_length or sys.maxsize)
    users = min(config.batch_size, interactions.num_users)
    tokens = max(longest, users * min(len(interactions) // interactions.num_users, longest))
    if option("windows"):  # batch_size counts windows, which overlap by half
        users = min(config.batch_size, -(-2 * len(interactions) // longest))
        tokens = users * longest
    in_batch = {"batch_size": users, "max_length": longest}
    if not hasattr(config, "max_length"):  # batch_size counts pairs of a user and an item
        tokens = longest = min(config.batch_size, len(interactions))
        in_batch = {"batch_size": tokens}
    if hasattr(config, "separate_prefixes"):  # batch_size counts prefixes: one token each, or one row each
        prefixes = min(config.batch_size, len(interactions))
        tokens = prefixes * longest if config.separate_prefixes else max(longest, prefixes)
    hidden, recurrent = option("hidden_dim"), option("num_gru_layers")
    stored, tables = COPIES * NUMBER, model.item_tables
    of_data = [
        Need(f"the scores of {USERS_AT_ONCE} users for {items:,} items", NUMBER * KEPT * USERS_AT_ONCE * items, "data"),
        Need(f"{len(interactions):,} interactions, packed and as histories", INTERACTION * len(interactions), "data"),
        Need(
            f"lists of up to {max(config.ks):,} items for {interactions.num_users:,} users",
            NUMBER * min(max(config.ks), items) * interactions.num_users,
            "ks",
        ),
    ]
    if model.feed == "none":
        neighbors = min(option("num_neighbors"), items)
        what = f"{neighbors:,} neighbours of each of {items:,} items"
        return [*of_data, Need(what, NEIGHBOR * neighbors * items, "num_neighbors")] if neighbors else of_data
    each = f"{tables} tables of " if tables > 1 else ""
    what = f"the embeddings of {items:,} items, {each}{dim:,} numbers each"
    needs = [
        Need(what, stored * tables * (items + 2) * dim, "embedding_dim"),
        Need(
            f"the embeddings of {max_length:,} positions, {dim:,} numbers each", stored * max_length * dim, "max_length"
        ),
        Need(
            f"the parameters of {blocks:,} blocks of width {dim:,}",
            stored * WIDTHS_A_BLOCK * blocks * dim**2,
            _largest(embedding_dim=dim, num_blocks=blocks),
        ),
        Need(
            f"the layers of {tokens:,} tokens a batch, {dim:,} numbers wide",
            NUMBER * WIDTHS_A_BLOCK * max(1, blocks) * tokens * dim,
            _largest(**in_batch, embedding_dim=dim, num_blocks=blocks),
        ),
        Need(
            f"attention between up to {longest:,} tokens of a row",
            NUMBER * KEPT * blocks * tokens * longest * option("num_heads"),
            _largest(**in_batch, num_blocks=blocks, num_heads=option("num_heads")),
        ),
        Need(
            f"the vectors of {interactions.num_users:,} users to evaluate, {dim:,} numbers each",
            2 * NUMBER * interactions.num_users * dim,
            "embedding_dim",
        ),
        *of_data,
    ]
    if model.query == "user":
        what = f"the embeddings of {interactions.num_users:,} users, {dim:,} numbers each"
        needs.append(Need(what, stored * interactions.num_users * dim, "embedding_dim"))
    if recurrent:
        weights = 3 * hidden * (dim + (2 * recurrent - 1) * hidden)
        most = _largest(hidden_dim=hidden, num_gru_layers=recurrent)
        needs.append(
            Need(f"the parameters of {recurrent:,} recurrent layers of width {hidden:,}", stored * weights, most)
        )
        states = NUMBER * KEPT * STATES_A_TOKEN * tokens * hidden * recurrent
        needs.append(Need(f"the states of {tokens:,} tokens a batch, {hidden:,} numbers wide", states, most))
    if config.loss in SAMPLED_LOSSES:
        negatives = config.num_negatives
        own = " a token" if config.negatives == "per-position" else ""
        what = f"the scores and rows of {negatives:,} negatives{own}, {dim:,} numbers each"
        needs.append(Need(what, NUMBER * KEPT * negatives * (dim + 1), "num_negatives"))
    return needs


def check_memory(needs: Sequence[Need], config: Any, *, room: int | None = None, num_devices: int = 1) -> None:
    """Refuses what cannot fit, before anything is allocated.

    Args:
      needs: what will be needed at the same time.
      config: holds the options that the needs name.
      room: how much there is, in bytes; None: :func:`memory_size`.
      num_devices: how many devices share what is needed, each with memory of its own unless they are CPUs.

    Raises:
      OutOfMemoryError: if together they exceed it; it names the largest of them, and the option that lowers it.

    Examples:
      >>> from models.config import TrainConfig
      >>> check_memory([Need("the table", 3 * 2**30, "embedding_dim")], TrainConfig(), room=2**30)
      Traceback (most recent call last):
      models.memory.OutOfMemoryError: embedding_dim 64: training needs about 3.0 GiB of memory, and there are 1.0 GiB;
      3.0 GiB are for the table; lower --embedding-dim
    """
    room = memory_size(num_devices) if room is None else room
    total = sum(need.size for need in needs)
    if total <= room:
        return
    largest = max(needs, key=lambda need: need.size)
    value = getattr(config, largest.option)
    value = " ".join(map(str, value)) if isinstance(value, tuple) else "embedded" if value is None else value
    raise OutOfMemoryError(
        f"{largest.option} {value}: training needs about {in_words(total)} of memory, and there are {in_words(room)}; "
        f"{in_words(largest.size)} are for {largest.what}; "
        + ("take fewer" if largest.option == "data" else f"lower --{largest.option.replace('_', '-')}")
    )


def memory_size(num_devices: int = 1) -> int:
    """The bytes that training may use: those of the devices, or on a CPU of the machine or the container."""
    import jax

    from sevo_optax import _memory

    device = jax.local_devices()[0]
    statistics = device.memory_stats() or {}
    if device.platform != "cpu" and "bytes_limit" in statistics:
        return statistics["bytes_limit"] * num_devices
    sizes = []
    if hasattr(os, "sysconf"):  # Windows does not tell its memory that way
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit, _ in _memory.control_groups():
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            sizes.append(int(limit.read_text()))
    return min(sizes, default=sys.maxsize)


@contextlib.contextmanager
def out_of_memory_told(*, trains: bool = True) -> Iterator[None]:
    """Turns running out of memory, on a CPU or an accelerator, into one line.

    Args:
      trains: whether it is training that may run out, which has options to need less.

    Raises:
      OutOfMemoryError: instead of ``MemoryError`` and of JAX's ``RESOURCE_EXHAUSTED``.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in text:
            raise
        asked = _size_in(text)
        lower = "lower --batch-size, --max-length, --embedding-dim or --num-negatives, or " if trains else ""
        raise OutOfMemoryError(
            f"out of memory{f', {in_words(asked)} more were needed' if asked else ''} (there are "
            f"{in_words(memory_size())} in all); {lower}end other programs that use the memory"
        ) from None


def in_words(size: int) -> str:
    """A number of bytes for readers.

    >>> in_words(7 * 2**29), in_words(10), in_words(2**75)
    ('3.5 GiB', '0.0 KiB', '32,768.0 EiB')
    """
    unit = next((unit for unit, factor in UNITS.items() if size < 1024 * factor), "EiB")
    return f"{size / UNITS[unit]:,.1f} {unit}"


def _largest(**sizes: int) -> str:
    """The option with the largest of some factors."""
    return max(sizes, key=lambda name: sizes[name])


def _size_in(text: str) -> int:
    """The bytes that an error asked for, 0: it does not say."""
    if found := re.search(r"allocat\w* (\d+) ?bytes", text):
        return int(found[1])
    if found := re.search(r"llocat\w* (?:of )?([\d.]+) ?([KMGTPE]i?B)", text):
        return int(float(found[1]) * UNITS[found[2][0] + "iB"])
    return 0
