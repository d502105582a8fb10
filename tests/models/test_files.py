import contextlib
import errno
import json
import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest

from models import plots
from models.files import append_text, claim, read_json, write_bytes, write_json, write_text, writing
from models.training.files import read_history, refuse_run_file, refuse_same


@contextlib.contextmanager
def small_files(limit=1000):
    """The nearest thing to a full disk that needs no disk of its own: files may not grow."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestWriting:
    def test_whole_or_not_at_all(self, tmp_path):
        path = tmp_path / "file"
        path.write_bytes(b"before")
        with pytest.raises(ZeroDivisionError), writing(path) as file:  # noqa: PT012
            file.write(b"half of it")
            file.flush()
            assert path.read_bytes() == b"before"
            1 / 0  # noqa: B018
        assert path.read_bytes() == b"before"
        assert list(tmp_path.iterdir()) == [path]

    def test_is_on_the_disk_before_it_has_its_name(self, tmp_path, monkeypatch):
        done = []
        monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(stat.S_ISREG(os.fstat(descriptor).st_mode)))
        replace = os.replace

        def noting(source, target):
            assert Path(source).read_bytes() == b"all"
            done.append("named")
            replace(source, target)

        monkeypatch.setattr(os, "replace", noting)
        write_text(tmp_path / "file", "all")
        assert done == [True, "named", False]  # the file, then its folder

    def test_two_at_once_do_not_meet(self, tmp_path):
        path = tmp_path / "file"
        with writing(path) as first:
            with writing(path) as second:
                second.write(b"second")
            first.write(b"first")
            assert path.read_bytes() == b"second"
        assert path.read_bytes() == b"first"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("there", [True, False])
    def test_follows_links(self, tmp_path, there):
        target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
        target.parent.mkdir()
        if there:
            target.write_text("before")
        link.symlink_to("elsewhere/target")
        write_text(link, "after")
        assert link.is_symlink()
        assert target.read_text() == "after"

    def test_permissions_stay(self, tmp_path):
        path = tmp_path / "file"
        path.write_text("before")
        path.chmod(0o640)
        write_text(path, "after")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        before = os.umask(0o027)
        try:
            write_text(tmp_path / "new", "text")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640

    @pytest.mark.parametrize(
        "write", [write_text, lambda path, text: write_bytes(path, lambda file: np.savez(file, x=1))]
    )
    def test_a_fifo_stays_one(self, tmp_path, write):
        path = tmp_path / "fifo"
        os.mkfifo(path)
        received = []
        reader = threading.Thread(target=lambda: received.append(path.read_bytes()))
        reader.start()
        write(path, "text")
        reader.join(10)
        assert received[0].startswith((b"text", b"PK"))
        assert path.is_fifo()
        assert list(tmp_path.iterdir()) == [path]

    def test_a_device_stays_one(self, tmp_path):
        path = tmp_path / "full"
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 7))  # a copy of /dev/full
            path.open("wb").close()
        except OSError:
            pytest.skip("devices cannot be made here")
        with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
            write_text(path, "text")
        assert path.is_char_device()

    def test_what_the_shell_redirects_is_not_replaced(self, tmp_path):
        kept = os.dup(1)
        with (tmp_path / "log").open("wb") as log:
            os.dup2(log.fileno(), 1)
            try:
                write_text(Path("/dev/stdout"), "first ")
                os.lseek(1, 0, os.SEEK_END)
                os.write(1, b"second")
            finally:
                os.dup2(kept, 1)
                os.close(kept)
        assert (tmp_path / "log").read_bytes() == b"first second"

    def test_errors_name_the_file(self, tmp_path):
        with pytest.raises(IsADirectoryError, match=str(tmp_path)):
            write_text(tmp_path, "text")
        with pytest.raises(FileNotFoundError) as missing:
            write_text(tmp_path / "none" / "file", "text")
        assert missing.value.filename == str(tmp_path / "none" / "file")
        path = tmp_path / "file"
        path.write_text("before")
        for write in (write_text, append_text):
            with pytest.raises(OSError, match="File too large") as full, small_files():
                write(path, "x" * 10_000)
            assert (full.value.errno, full.value.filename) == (errno.EFBIG, str(path))
        assert path.read_text() == "before"

    def test_other_errors_keep_their_names(self, tmp_path):
        with pytest.raises(FileNotFoundError) as caught, writing(tmp_path / "file"):
            (tmp_path / "input").read_text()
        assert caught.value.filename == str(tmp_path / "input")

    def test_a_picture_that_does_not_fit(self, tmp_path):
        path = tmp_path / "curve.png"
        with pytest.raises(OSError, match="File too large") as caught, small_files():
            plots.validation_curves({"adamw": [[(1, 0.1), (2, 0.2)]]}, path)
        assert caught.value.filename == str(path)
        assert not list(tmp_path.iterdir())

    def test_what_is_no_json_leaves_what_was_there(self, tmp_path):
        write_json(tmp_path / "a.json", {"kept": 1})
        with pytest.raises(TypeError):
            write_json(tmp_path / "a.json", {"not json": object()})
        assert read_json(tmp_path / "a.json") == {"kept": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "it is empty"),
        (b"{", "it is not JSON"),
        (b'{"a": "\xff"}', "it is not JSON"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b"[]", "it holds a list, not an object"),
    ],
)
def test_what_is_no_json_object(tmp_path, text, message):
    path = tmp_path / "file.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_json(path)


def test_one_claim_at_a_time(tmp_path):
    path = tmp_path / "file.lock"
    with claim(path) as first:
        with claim(path) as second:
            assert (first, second) == (True, False)
        with claim(path) as third:  # the second has not freed what it did not have
            assert not third
    with claim(path) as again:
        assert again


def test_a_history(tmp_path):
    path = tmp_path / "history.jsonl"
    lines = [json.dumps({"epoch": i, "loss": 1.0}) for i in (1, 2, 3)]
    path.write_text("\n".join(lines) + "\n")
    assert [record["epoch"] for record in read_history(path)] == [1, 2, 3]
    path.write_text(lines[0] + "\n" + lines[1] + '\n{"epoch": 3, "lo')  # killed while it wrote
    assert [record["epoch"] for record in read_history(path, 2)] == [1, 2]
    assert [record["epoch"] for record in read_history(path)] == [1, 2]
    for second in ("", "[]", '{"epoch": 3, "loss": 1.0}', '{"epoch": 2}', '{"epoch": 2, "loss": "low"}', "\x00" * 9):
        path.write_text(lines[0] + "\n" + second + "\n" + lines[2] + "\n")
        with pytest.raises(ValueError, match=r"history\.jsonl is damaged: its line 2 is no record of epoch 2"):
            read_history(path)


def test_files_that_are_read_and_other_outputs_are_no_outputs(tmp_path):
    read, link, new = tmp_path / "read.csv", tmp_path / "link.csv", tmp_path / "new.csv"
    read.write_text("mine")
    link.symlink_to(read)
    for path, other in ((read, read), (link, read), (new, tmp_path / "." / "new.csv")):
        with pytest.raises(ValueError, match=r"output: .* is the file of data as well; give another file"):
            refuse_same("output", path, {"titles": None, "data": other})
    refuse_same("output", new, {"data": read})
    refuse_same("output", None, {"data": read})


@pytest.mark.parametrize("name", ["items.npz", "run.json", "result.json", "checkpoints/9.npz", "tensorboard/new"])
def test_files_of_a_run_are_no_outputs(tmp_path, name):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "items.npz").write_bytes(b"ids")
    (tmp_path / "other").symlink_to(run)
    for path in (run / name, tmp_path / "other" / name, run / "checkpoints" / ".." / name):
        with pytest.raises(ValueError, match=r"output: .* is a file of the run in .*; give another file"):
            refuse_run_file("output", path, run)
    (tmp_path / "hard").hardlink_to(run / "items.npz")
    with pytest.raises(ValueError, match="is a file of the run"):
        refuse_run_file("output", tmp_path / "hard", run)
    for path in (None, run / "model.jaxexport", tmp_path / "items.npz", tmp_path / name.replace("/", "-")):
        refuse_run_file("output", path, run)
