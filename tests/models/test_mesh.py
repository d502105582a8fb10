"""Meshes of devices: their options, where arrays lie, and training on eight virtual devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from models.__main__ import main
from models.architectures.registry import make_config
from models.mesh import parse_mesh
from models.training.layout import check_mesh, make_layout

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=4,pipeline=2", r"there is no axis 'pipeline'; the axes are data \(batches\) and model \(tables\)"),
        ("8", "there is no axis '8'"),
        ("data=2,data=4", "the axis data is given twice"),
        ("data=0", "data must be a number of devices of at least 1, got '0'"),
        ("model=two", "model must be a number of devices of at least 1, got 'two'"),
        ("model=", "model must be a number of devices of at least 1, got ''"),
    ],
)
def test_what_is_no_mesh_is_refused(text, message):
    with pytest.raises(ValueError, match=f"^mesh: {message}"):
        parse_mesh(text)


@pytest.mark.parametrize(
    ("model", "options", "sizes", "message"),
    [
        (
            "sasrec",
            {"batch_size": 30},
            {"data": 4, "model": 1},
            "batch_size must be a multiple of data=4 .* --batch-size 32",
        ),
        ("sasrec", {"embedding_dim": 6}, {"data": 1, "model": 4}, "embedding_dim must be a multiple of model=4"),
        ("popularity", {}, {"data": 2, "model": 1}, "mesh: popularity is fitted in closed form"),
    ],
)
def test_what_a_mesh_does_not_suit_is_refused(model, options, sizes, message):
    with pytest.raises(ValueError, match=message):
        check_mesh(sizes, make_config(model, **options))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "data=64,model=2"], f"mesh data=64,model=2 needs 128 devices, and there are {jax.device_count()} "),
        (["--table-sharding", "rows"], "table_sharding is not heeded without a mesh, got rows; give --mesh"),
        (["--mesh", "data=1", "--table-sharding", "rows"], "table_sharding is not heeded by mesh data=1, got rows; "),
    ],
)
def test_the_command_line_refuses_in_one_line(arguments, message, tmp_path, capsys):
    assert main(["train", *arguments, "--output-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_rows_are_filled_up_and_it_is_said():
    """The mesh is abstract: only shapes are needed."""
    mesh = jax.sharding.AbstractMesh((1, 4), ("data", "model"))
    config = make_config("bert4rec", embedding_dim=8, num_heads=1)
    layout, notes = make_layout(mesh, "rows", config, num_users=3, num_items=101)
    assert notes == [
        "item_embedding: 103 rows are filled up to 104, a multiple of model=4",
        "output_embedding: 103 rows are filled up to 104, a multiple of model=4",
    ]
    assert make_layout(mesh, "columns", config, num_users=3, num_items=101)[1] == []
    assert layout.spec("moments/mu/item_embedding/embedding/value", (103, 8)) == jax.sharding.PartitionSpec(
        "model", None
    )
    assert layout.spec("output_bias/value", (103,)) == jax.sharding.PartitionSpec()


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="the counted exchanges are those of JAX 0.10 or later")
def test_on_eight_devices(tmp_path_factory):
    """In a process of its own, since the number of devices is fixed when JAX starts."""
    process = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.models.mesh_checks"],
        cwd=ROOT,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.getbasetemp() / "jax-mesh"),
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
