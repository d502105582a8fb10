"""How programs are compiled in all tests: those of both packages, of docstrings, notebooks and processes of their own.

Compiling takes most of the tests' time, so each program is compiled once, into a folder that all test processes and
those that tests start share, without the costly passes, and by the emitters that compile fastest. Variables do this
rather than calls: they must be there before JAX is imported, and children inherit them.
"""

import importlib.util
import mmap
import os
import tempfile
from pathlib import Path

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a developer's folder, kept between runs, or that of a parent
    # Removed when Python exits.
    _COMPILED = tempfile.TemporaryDirectory(prefix="compiled-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


def _jaxlib_knows(flag: str) -> bool:
    """Whether this jaxlib has a flag: it ends the process over one that it does not know."""
    (folder,) = importlib.util.find_spec("jaxlib").submodule_search_locations
    for library in Path(folder).glob("*.so"):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(flag.encode()) >= 0:
                return True
    return False


# XLA's newer emitters take 5 s of a core to compile an epoch of SASRec, the older ones 1.5 s.
_FLAG = "--xla_cpu_use_fusion_emitters"
if _FLAG not in os.environ.get("XLA_FLAGS", "") and _jaxlib_knows(_FLAG.removeprefix("--")):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=false"
