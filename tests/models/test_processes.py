"""Two processes that train one model: they save together, resume bit by bit, and notice when one is killed."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from models.__main__ import main

ROOT = Path(__file__).parents[2]
TRAIN = ["train", "--model", "mf-bpr", "--loss", "ce", "--embedding-dim", "8", "--batch-size", "64"]
TRAIN += ["--eval-every", "1", "--learning-rate", "0.01"]
pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="meshes need JAX 0.10 or later")


def free_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    rng = np.random.default_rng(0)
    rows = [f"{user},{item},{time}" for user in range(40) for time, item in enumerate(rng.permutation(50)[:6])]
    (folder / "data.csv").write_text("\n".join(["user,item,time", *rows]))
    return folder


def start(folder, *options, processes=1):
    """Starts processes of the command line that train in ``folder / "run"``."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "jax")}
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1"
    arguments = [*TRAIN, "--data", str(folder / "data.csv"), "--output-dir", str(folder / "run"), *options]
    if processes > 1:
        arguments += ["--mesh", f"data={processes}", "--coordinator", f"127.0.0.1:{free_port()}"]
        arguments += ["--num-processes", str(processes), "--join-timeout", "240"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "models", *arguments, *(["--process-id", str(i)] if processes > 1 else [])],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


def history(folder):
    path = folder / "run" / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def numbers(record):
    return record["loss"], record["validation"]


def newest(folder):
    return max(int(path.name) for path in (folder / "run" / "checkpoints").iterdir() if path.name.isdecimal())


def back_to_the_one_before(folder):
    (folder / "run" / "result.json").unlink(missing_ok=True)  # or the run is finished, and nothing trains
    shutil.rmtree(folder / "run" / "checkpoints" / str(newest(folder)))


def test_two_processes(folder):
    first, second = start(folder, "--epochs", "100000", processes=2)
    try:
        deadline = time.monotonic() + 400
        while len(history(folder)) < 4 or newest(folder) < 3:
            ended = [process.communicate()[1] for process in (first, second) if process.poll() is not None]
            assert not ended
            assert time.monotonic() < deadline
            time.sleep(0.2)
        second.send_signal(signal.SIGKILL)
        output, error = first.communicate(timeout=60)
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    assert first.returncode == 2
    assert "40 users, 50 items" in output
    told = [line for line in error.splitlines() if not line.startswith("sevo-adamw: epoch ")]
    assert told == ["error: another of the processes has ended; start all of them again with --resume"]
    epoch = newest(folder)
    before = history(folder)[epoch - 1]

    # The epoch of the newest checkpoint once more, from the one before: the same to the last bit.
    back_to_the_one_before(folder)
    pair = start(folder, "--epochs", str(epoch), "--resume", processes=2)
    (output, error), (silent, other) = (process.communicate(timeout=400) for process in pair)
    assert [process.returncode for process in pair] == [0, 0], error + other
    assert silent == other == ""
    assert "best epoch" in output
    pair_record = history(folder)[-1]
    assert numbers(pair_record) == numbers(before)
    assert pair_record["seconds"] != before["seconds"]  # it is a new one

    # And on one device, to rounding.
    back_to_the_one_before(folder)
    (alone,) = start(folder, "--epochs", str(epoch), "--resume", "--quiet")
    _, error = alone.communicate(timeout=400)
    assert alone.returncode == 0, error
    record = history(folder)[-1]
    np.testing.assert_allclose(record["loss"], before["loss"], rtol=1e-6)
    assert record["seconds"] != pair_record["seconds"]


def test_an_unreachable_coordinator_is_told_with_address_and_timeout(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    arguments = ["--mesh", "data=2", "--coordinator", address, "--num-processes", "2", "--process-id", "1"]
    process = subprocess.run(
        [sys.executable, "-m", "models", *TRAIN, *arguments, "--join-timeout", "3", "--output-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 2
    assert re.fullmatch(rf"error: the coordinator {address} was not reached within 3 s; .*\n", process.stderr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coordinator", "127.0.0.1:1"], "coordinator is not heeded without a mesh"),
        (["--mesh", "data=2", "--num-processes", "2"], "num_processes is not heeded without a coordinator"),
        (["--mesh", "data=2", "--join-timeout", "9"], "join_timeout is not heeded without a coordinator, got 9; give"),
        (["--mesh", "data=2", "--coordinator", "here"], "coordinator must be HOST:PORT, got 'here'"),
        (["--mesh", "data=2", "--coordinator", "here:1"], "num_processes must be given with a coordinator"),
        (
            ["--mesh", "data=2", "--coordinator", "here:1", "--num-processes", "2", "--process-id", "2"],
            "process_id must be smaller than num_processes, 2, got 2",
        ),
    ],
)
def test_options_are_refused_in_one_line(options, message, tmp_path, capsys, monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    assert main([*TRAIN, *options, "--output-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
