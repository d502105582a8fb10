"""How programs are compiled in all tests: those of both packages, of docstrings, notebooks and processes of their own.

Compiling takes most of the tests' time, so each program is compiled once, into a folder that all test processes and
those that tests start share, without the costly passes, and by the emitters that compile fastest. Variables do this
rather than calls: they must be there before JAX is imported, and children inherit them.
"""

import gc
import os
import subprocess
import sys
import tempfile

# JAX makes objects by the million as it traces, hardly any of them in cycles: looking for those at every 700th object
# took a tenth of the time of tests that trace much.
gc.set_threshold(200_000, 20, 20)

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a developer's folder, kept between runs, or that of a parent
    # Removed when Python exits.
    _COMPILED = tempfile.TemporaryDirectory(prefix="compiled-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


def _accepts(flags: str) -> bool:
    """Whether this jaxlib starts with these flags: it ends the process over one that it does not know."""
    start = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(start, env=environment, capture_output=True, check=False).returncode == 0


# The newer emitters of jaxlib 0.10 take 5 s of a core to compile an epoch of SASRec, the older ones 1.5 s; those of
# 0.12 take 3 s and leave no choice. Programs stay in parts that are compiled side by side: as one they take 8% less,
# but operations are then joined across them, and equal formulas are no longer equal to the last bit.
_OLDER = "--xla_cpu_use_fusion_emitters=false"
_FLAGS = os.environ.get("XLA_FLAGS", "")
if _OLDER not in _FLAGS and _accepts(f"{_FLAGS} {_OLDER}"):
    os.environ["XLA_FLAGS"] = f"{_FLAGS} {_OLDER}"
