"""Several devices: shardings chosen by the compiler and shardings that are part of the types."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sevo_optax import sevo, smooth
from tests.sevo_optax import reference


def test_explicit_mesh_of_one_device():
    """The code path of many devices, where it can be seen by a debugger."""
    rng = np.random.default_rng(0)
    weights = reference.random_weights(rng, 12)
    x = rng.normal(size=(12, 4)).astype(np.float32)
    mesh = jax.make_mesh((1,), ("a",), axis_types=(AxisType.Explicit,))
    for spec in (P("a", None), P(None, "a")):
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        tx = sevo(weights)
        for update in (tx.update, jax.jit(tx.update)):
            updates, _ = update(placed, tx.init(x))
            assert updates.sharding == placed.sharding
            np.testing.assert_allclose(updates, smooth(x, weights), rtol=1e-6)
        text = jax.jit(tx.update).lower(placed, tx.init(x)).as_text()
        assert "csr_sparse_dense" in text


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="tables that are split over several devices need JAX 0.10 or later"
)
def test_on_four_devices():
    """In a process of its own, since the number of devices is fixed when JAX starts."""
    process = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.sevo_optax.sharded_checks"],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",  # how much is communicated is read off the finished program
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stderr
