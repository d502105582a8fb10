"""What the host can still hold, so that a graph too large for it is refused before anything is allocated."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Below this nobody runs out of memory, and nothing is looked up.
_SMALL = 1 << 28


class OutOfMemory(ValueError, MemoryError):
    """A graph that does not fit; raised before anything is allocated for it."""


def available_memory() -> int | None:
    """Bytes that this process can still allocate, as far as the system tells; None if it does not."""
    rooms = [room for room in (_system(), _container(), _address_space()) if room is not None]
    return max(0, min(rooms)) if rooms else None


def require_memory(needed: float, what: str, remedy: str) -> None:
    """Raises :class:`OutOfMemory` if ``what`` needs more bytes than there are.

    Args:
      needed: estimate of the bytes to allocate at the same time.
      what: subject of the message, such as ``"the co-occurrence graph"``.
      remedy: the way out.
    """
    if needed < _SMALL:
        return
    room = available_memory()
    if room is not None and needed > room:
        raise OutOfMemory(
            f"{what} needs about {needed / 2**30:.1f} GiB of memory, but only {room / 2**30:.1f} GiB are free. {remedy}"
        )


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file here, or "max"
        return None


def _system() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def control_groups() -> Iterator[tuple[Path, Path]]:
    """The files with the limit and the use of each control group that this process is in, from its own to the root.

    A job of Slurm or systemd has its limit in a group of its own; inside a container, the root is the container's.
    """
    versions = {
        "": (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
        "memory": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    }
    places = dict.fromkeys(versions, "/")
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, place = line.split(":", 2)
            places |= {kind: place for kind in kinds.split(",") if kind in versions}
    except (OSError, ValueError):  # no such file here
        pass
    for kind, (root, limit, usage) in versions.items():
        inside = PurePosixPath(places[kind].lstrip("/"))
        for group in (inside, *inside.parents):
            if ".." not in group.parts:  # of a group above the container's root
                yield root / group / limit, root / group / usage


def _container() -> int | None:
    """What the control groups leave."""
    rooms = []
    for limit, usage in control_groups():
        allowed, used = _number(limit), _number(usage)
        if allowed is not None and used is not None:
            rooms.append(allowed - used + _file_cache(usage.parent / "memory.stat"))
    return min(rooms, default=None)


def _file_cache(stat: Path) -> int:
    """Bytes of the control group that are given back as soon as they are needed."""
    try:
        lines = dict(line.split() for line in stat.read_text().splitlines())
        return int(lines.get("inactive_file", 0)) + int(lines.get("active_file", 0))
    except (OSError, ValueError):
        return 0


def _address_space() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        used = 0
    return limit - used
