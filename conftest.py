"""How programs are compiled in all tests: those of both packages, of docstrings, notebooks and processes of their own.

Compiling takes most of the tests' time, so each program is compiled once, into a folder that all test processes and
those that tests start share, and without the costly passes. Variables do this rather than calls: they must be there
before JAX is imported, and children inherit them.
"""

import os
import tempfile

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a developer's folder, kept between runs, or that of a parent
    # Removed when Python exits.
    _COMPILED = tempfile.TemporaryDirectory(prefix="compiled-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
