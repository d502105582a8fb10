"""Settings and fixtures that every test shares."""

from collections.abc import Iterator

import hypothesis
import pytest

from tests.jax_names import enable_x64

# The same examples in every run, so that a failure is a change of the code; the first example pays for compiling.
hypothesis.settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("default")


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs the test in double precision."""
    with enable_x64(True):
        yield
