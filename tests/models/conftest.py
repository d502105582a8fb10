"""Settings for the tests of the models."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def _compile_once(tmp_path_factory):
    """Compiling takes most of the tests' time: once each program, into a folder, and without the costly passes."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.getbasetemp() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_disable_most_optimizations", True)
