"""Strict broadcasting for the library itself."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def _no_rank_promotion() -> Iterator[None]:
    """An accidental outer product raises."""
    with jax.numpy_rank_promotion("raise"):
        yield
