import dataclasses
import errno
import gzip
import hashlib
import io
import json
import os
import re
import socket
import stat
import sys
import threading
import time
import urllib.parse
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from models.__main__ import main
from models.config import SourceConfig
from models.data import NAMED, download, fetch_named, load, load_interactions
from models.data.download import cache_folder, extract

RATINGS = "1::10::5::30\n1::20::3::10\n2::10::4::20\n"


def archive(entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return buffer.getvalue()


ML_1M = archive({"ml-1m/": "", "ml-1m/ratings.dat": RATINGS, "ml-1m/movies.dat": "10::Title::Drama\n"})
REVIEWS = gzip.compress(
    b"".join(
        json.dumps({"reviewerID": f"A{i % 2}", "asin": f"B{i}", "unixReviewTime": 9 - i}).encode() + b"\n"
        for i in range(4)
    )
)


class Handler(BaseHTTPRequestHandler):
    """Answers as the path asks for: /behaviour/file."""

    def do_GET(self):
        self.server.requests.append(self.path)
        _, behaviour, name = self.path.split("/")
        body = self.server.files.get(name, b"")
        if behaviour == "missing":
            self.send_error(404)
        elif behaviour == "broken":
            self.send_error(500)
        elif behaviour == "hang-up":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif behaviour == "silent":
            self.server.released.wait(10)
        elif behaviour == "moved":
            self.send_response(302)
            self.send_header("Location", f"/whole/{name}")
            self.end_headers()
        else:
            self.send_body(behaviour, body)

    def send_body(self, behaviour, body):
        self.send_response(200)
        if behaviour != "unmeasured":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2
        self.wfile.write(body[:half])
        if behaviour == "stalled":
            self.server.released.wait(10)
        if behaviour == "slow":
            time.sleep(0.8)
        if behaviour in ("whole", "slow"):
            self.wfile.write(body[half:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.released = [], threading.Event()
    server.files = {"ml-1m.zip": ML_1M, "reviews_Beauty_5.json.gz": REVIEWS}
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def offer(server, monkeypatch):
    """Makes a public data set be offered by the local server, which behaves as asked."""

    def offer(name, behaviour="whole", content=None, **changes):
        named = NAMED[name]
        if content is not None:
            server.files[named.file_name] = content
        content = server.files[named.file_name]
        changes = {
            "url": f"{server.url}/{behaviour}/{named.file_name}",
            "md5": named.md5 and hashlib.md5(content).hexdigest(),
            "num_interactions": 4 if named.md5 is None else 3,
        } | changes
        monkeypatch.setitem(NAMED, name, dataclasses.replace(named, **changes))

    return offer


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "not" / "there" / "yet"


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class TestNamedSets:
    def test_movielens(self, offer, server, cache):
        offer("ml-1m")
        data = load("ml-1m", cache_dir=cache)
        assert [data.item_ids[row].tolist() for row in data] == [[20, 10], [10]]
        assert files(cache) == ["ml-1m.zip", "ml-1m/movies.dat", "ml-1m/ratings.dat"]
        assert len(server.requests) == 1
        load_interactions(SourceConfig(data=Path("ml-1m"), cache_dir=cache))
        assert len(server.requests) == 1

    def test_amazon(self, offer, cache):
        offer("amazon-beauty")
        data = load("amazon-beauty", cache_dir=cache)
        assert data.user_ids.tolist() == ["A0", "A1"]
        assert [data.item_ids[row].tolist() for row in data] == [["B2", "B0"], ["B3", "B1"]]
        assert files(cache) == ["reviews_Beauty_5.json.gz"]

    def test_a_file_of_that_name_wins(self, offer, server, tmp_path, monkeypatch):
        offer("ml-1m")
        monkeypatch.chdir(tmp_path)
        Path("ml-1m").write_text("1 2 3\n")
        assert len(load("ml-1m", data_format="s3rec")) == 2
        assert not server.requests

    @pytest.mark.parametrize("name", NAMED)
    def test_public_addresses(self, name):
        named = NAMED[name]
        host = urllib.parse.urlsplit(named.url)
        assert host.scheme == "https"
        assert host.netloc in ("files.grouplens.org", "snap.stanford.edu")
        assert (named.md5 is None) == (named.member is None) == name.startswith("amazon")
        assert named.md5 is None or re.fullmatch("[0-9a-f]{32}", named.md5)

    def test_put_there_by_hand(self, offer, server, cache):
        offer("ml-1m")
        cache.mkdir(parents=True)
        (cache / "ml-1m.zip").write_bytes(ML_1M)
        assert len(load("ml-1m", cache_dir=cache)) == 3
        assert not server.requests

    def test_put_there_by_hand_but_wrong(self, offer, server, cache):
        offer("ml-1m")
        cache.mkdir(parents=True)
        (cache / "ml-1m.zip").write_bytes(ML_1M[:-1])
        with pytest.raises(
            ValueError, match=r"ml-1m.zip has the MD5 digest \w+, but its publisher .*; delete it to fetch"
        ):
            load("ml-1m", cache_dir=cache)
        assert files(cache) == ["ml-1m.zip"]
        assert not server.requests

    def test_other_data_under_that_name(self, offer, cache):
        offer("amazon-beauty", num_interactions=198_502)
        with pytest.raises(
            ValueError, match="holds 4 interactions, but its publisher counts 198,502; delete it to fetch"
        ):
            load("amazon-beauty", cache_dir=cache)
        assert len(load(cache / "reviews_Beauty_5.json.gz")) == 4

    def test_a_folder_of_the_user_is_left_alone(self, offer, cache):
        offer("ml-1m")
        (cache / "ml-1m").mkdir(parents=True)
        (cache / "ml-1m" / "notes.txt").write_text("mine")
        with pytest.raises(FileExistsError, match="is there already, but lacks files; move it away"):
            load("ml-1m", cache_dir=cache)
        assert (cache / "ml-1m" / "notes.txt").read_text() == "mine"

    def test_without_a_network_the_command_line_says_what_to_do(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setenv("SEVO_OPTAX_CACHE", str(tmp_path / "cache"))
        with socket.socket() as unused:  # bound, but nobody listens
            unused.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{unused.getsockname()[1]}/ml-1m.zip"
            monkeypatch.setitem(NAMED, "ml-1m", dataclasses.replace(NAMED["ml-1m"], url=url))
            status = main(["train", "--data", "ml-1m", "--output-dir", str(tmp_path / "out")])
        assert status == 2
        path = tmp_path / "cache" / "ml-1m.zip"
        assert capsys.readouterr().err == (
            f"error: cannot download {url} (Connection refused); download it by other means and put it at {path}\n"
        )


class TestDownload:
    @pytest.mark.parametrize(
        ("behaviour", "reason"),
        [
            ("missing", "HTTP 404 Not Found"),
            ("broken", "HTTP 500 Internal Server Error"),
            ("short", r"IncompleteRead\(\d+ bytes read, \d+ more expected\)"),
            ("hang-up", r"\w.*"),
            ("silent", "no answer for 0.3 s"),
            ("stalled", "no answer for 0.3 s"),
        ],
    )
    def test_what_cannot_be_fetched_leaves_nothing(self, server, cache, behaviour, reason):
        url, path = f"{server.url}/{behaviour}/ml-1m.zip", cache / "ml-1m.zip"
        with pytest.raises(FileNotFoundError) as caught:
            download.download(url, path, timeout=0.3)
        by_hand = re.escape(f"; download it by other means and put it at {path}")
        assert re.fullmatch(rf"cannot download {url} \({reason}\){by_hand}", str(caught.value))
        assert files(cache) == []

    def test_refused(self, cache, monkeypatch):
        monkeypatch.setenv("no_proxy", "*")
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            with pytest.raises(FileNotFoundError, match="Connection refused"):
                download.download(f"http://127.0.0.1:{unused.getsockname()[1]}/x", cache / "x")
        assert files(cache) == []

    def test_no_such_host(self, cache, monkeypatch):
        def nowhere(*_, **__):
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", nowhere)
        monkeypatch.setenv("no_proxy", "*")
        with pytest.raises(FileNotFoundError, match=r"\(Name or service not known\); download it by other means"):
            download.download("http://nowhere.invalid/x", cache / "x")

    def test_wrong_digest(self, offer, cache):
        offer("ml-1m", md5="0" * 32)
        found = hashlib.md5(ML_1M).hexdigest()
        with pytest.raises(
            ValueError, match=f"has the MD5 digest {found}, but its publisher gives {'0' * 32}; it was not"
        ):
            fetch_named("ml-1m", cache)
        assert files(cache) == []

    def test_cut_short_without_a_length_or_a_digest(self, offer, cache):
        offer("amazon-beauty", "unmeasured")
        with pytest.raises(
            ValueError, match=r"came damaged .*; it was not kept; try again, or download it by other means"
        ):
            fetch_named("amazon-beauty", cache)
        assert files(cache) == []

    def test_redirection(self, offer, server, cache):
        offer("ml-1m", "moved")
        assert fetch_named("ml-1m", cache).read_text() == RATINGS
        assert server.requests == ["/moved/ml-1m.zip", "/whole/ml-1m.zip"]

    def test_progress_is_shown(self, offer, cache, capsys):
        offer("ml-1m", "slow")
        fetch_named("ml-1m", cache)
        shown = capsys.readouterr().err
        assert "ml-1m.zip: 100%" in shown

    @pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
    def test_an_interruption_leaves_nothing(self, server, cache, monkeypatch, stop):
        def interrupted(*_):
            raise stop

        monkeypatch.setattr(download.tqdm, "update", interrupted)
        with pytest.raises(stop):
            download.download(f"{server.url}/whole/ml-1m.zip", cache / "ml-1m.zip")
        assert files(cache) == []

    def test_an_older_file_stays_until_the_new_one_is_whole(self, server, cache):
        path = cache / "ml-1m.zip"
        path.parent.mkdir(parents=True)
        path.write_text("old")
        with pytest.raises(FileNotFoundError):
            download.download(f"{server.url}/short/ml-1m.zip", path)
        assert path.read_text() == "old"
        download.download(f"{server.url}/whole/ml-1m.zip", path)
        assert path.read_bytes() == ML_1M

    def test_full_disk(self, server, cache, monkeypatch):
        def full(_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(
            OSError, match=r"^cannot write .*ml-1m.zip \(No space left on device\); give another folder wit"
        ):
            download.download(f"{server.url}/whole/ml-1m.zip", cache / "ml-1m.zip")
        assert files(cache) == []

    def test_a_cache_that_is_a_file(self, offer, tmp_path):
        offer("ml-1m")
        (tmp_path / "cache").write_text("")
        with pytest.raises(
            OSError, match=r"^cannot write .*; give another folder with --cache-dir or SEVO_OPTAX_CACHE"
        ):
            load("ml-1m", cache_dir=tmp_path / "cache")


class TestExtract:
    def unpack(self, tmp_path, content):
        (tmp_path / "cache").mkdir()
        path = tmp_path / "cache" / "ml-1m.zip"
        path.write_bytes(content)
        extract(path, tmp_path / "cache" / "ml-1m")

    @pytest.mark.parametrize(
        "name", ["../evil", "ml-1m/../../evil", "/tmp/evil", "..\\evil", "C:\\evil", "C:evil", "\\\\host\\share\\evil"]
    )
    def test_nothing_leaves_the_folder(self, tmp_path, name):
        with pytest.raises(ValueError, match="which leads out of its folder; nothing was unpacked"):
            self.unpack(tmp_path, archive({"ml-1m/ratings.dat": RATINGS, name: "evil"}))
        assert files(tmp_path) == ["cache/ml-1m.zip"]

    def test_links_are_refused(self, tmp_path):
        link = zipfile.ZipInfo("ml-1m/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr(link, "/etc")
        with pytest.raises(ValueError, match="'ml-1m/link', which leads out of its folder"):
            self.unpack(tmp_path, buffer.getvalue())

    def test_harmless_names_that_look_alike(self, tmp_path):
        self.unpack(tmp_path, archive({"ml-1m/..ratings..dat": "x", "ml-1m/a/b c": "y"}))
        assert files(tmp_path / "cache") == ["ml-1m.zip", "ml-1m/..ratings..dat", "ml-1m/a/b c"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is damaged"),
            (b"no zip", "is damaged"),
            (ML_1M[:-10], "is damaged"),
            (ML_1M.replace(ML_1M[80:90], b"0123456789", 1), "is damaged"),
            (archive({"other/ratings.dat": RATINGS}), "holds no folder 'ml-1m'"),
        ],
    )
    def test_damaged_archives_leave_nothing(self, tmp_path, content, message):
        with pytest.raises(ValueError, match=message + ".*delete it to fetch it again"):
            self.unpack(tmp_path, content)
        assert os.listdir(tmp_path / "cache") == ["ml-1m.zip"]

    def test_another_process_was_faster(self, tmp_path, monkeypatch):
        rename = os.rename

        def late(source, target):
            rename(source, target)
            raise FileExistsError(errno.EEXIST, "File exists", str(target))

        monkeypatch.setattr(os, "rename", late)
        self.unpack(tmp_path, ML_1M)
        assert files(tmp_path / "cache") == ["ml-1m.zip", "ml-1m/movies.dat", "ml-1m/ratings.dat"]


class TestCacheFolder:
    def test_order(self, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
        monkeypatch.setenv("SEVO_OPTAX_CACHE", "/variable")
        assert cache_folder("/given") == Path("/given")
        assert cache_folder() == Path("/variable")
        monkeypatch.delenv("SEVO_OPTAX_CACHE")
        assert cache_folder() == Path("/xdg/sevo-optax")

    def test_where_the_platform_keeps_caches(self, monkeypatch, tmp_path):
        for name in ["XDG_CACHE_HOME", "SEVO_OPTAX_CACHE"]:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        expected = {"linux": ".cache/sevo-optax", "darwin": "Library/Caches/sevo-optax"}.get(sys.platform)
        assert expected is None or cache_folder() == tmp_path / expected
        assert "sevo-optax" in cache_folder().parts
        assert cache_folder("~/x") == tmp_path / "x"
