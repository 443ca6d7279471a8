"""Shards behind urls: a cache of whole copies, verified, filled once, resumed, and of use without a network."""

import base64
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from mmpre.command_line.cli import main
from mmpre.data import remote
from mmpre.data.index import ShardError, expand_shards, open_shards
from mmpre.data.mixture import sources
from mmpre.data.remote import Remote, StorageError, public
from mmpre.data.shards import ShardReader, shard_writer


class Handler(BaseHTTPRequestHandler):
    """Serves `files` by path; `faults` are taken one for each request: a status, or a number of bytes to stop after."""

    def do_GET(self):
        server = self.server
        server.asked.append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        fault = server.faults.pop(0) if server.faults else None
        content = server.files.get(self.path.partition("?")[0])
        if content is None or fault in (403, 503):
            self.send_error(fault or 404)
            return
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")[1]) if server.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{hash(content)}"')
        self.end_headers()
        self.wfile.write(content[start:] if fault is None else content[start : start + fault])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    serving = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    serving.files, serving.faults, serving.asked, serving.ranges = {}, [], [], True
    serving.url = f"http://127.0.0.1:{serving.server_port}"
    thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield serving
    serving.shutdown()
    serving.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMPRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_verified", set())
    monkeypatch.setattr(Remote, "__init__", _quick)
    return tmp_path / "cache"


_plain = Remote.__init__


def _quick(self, folder=None, **more):
    _plain(self, folder, **({"tries": 3, "wait_s": 0.01} | more))


def shard(folder, word, count=5):
    with shard_writer(folder, prefix="a") as sink:
        for i in range(count):
            sink.write({"__key__": f"k{i}", "txt": f"{word} {i}"})
    return sink.paths[0].read_bytes()


def texts(urls):
    shards = open_shards(urls)
    return [ShardReader(shards).read(i)["txt"].decode() for i in range(len(shards))]


def forget():
    """As a new process would begin."""
    remote._verified.clear()


def test_shards_of_one_name_from_two_places_are_fetched_once_and_never_confused(server, tmp_path):
    for name in ("one", "two"):
        server.files[f"/{name}/a-000.tar"] = shard(tmp_path / name, name)
    urls = [f"{server.url}/{{one,two}}/a-000.tar"]
    wanted = [f"{name} {i}" for name in ("one", "two") for i in range(5)]
    assert texts(urls) == wanted
    assert len({path.parent for path in expand_shards(urls)}) == 2
    before = list(server.asked)
    forget()
    assert texts(urls) == wanted
    assert sum(answer[0].endswith(".tar") for answer in server.asked[len(before) :]) == 2  # headers alone are read
    assert len(remote.entries()) == 2


def test_a_replaced_shard_is_another_entry(server, tmp_path):
    server.files["/a.tar"] = shard(tmp_path / "x", "old")
    assert texts(f"{server.url}/a.tar")[0] == "old 0"
    server.files["/a.tar"] = shard(tmp_path / "y", "new")  # of the same size
    assert texts(f"{server.url}/a.tar")[0] == "new 0"
    assert len(remote.entries()) == 2


def test_a_damaged_copy_is_met_before_it_is_used_and_fetched_again(server, tmp_path):
    server.files["/a.tar"] = shard(tmp_path / "x", "good")
    (path,) = expand_shards([f"{server.url}/a.tar"])
    with path.open("r+b") as file:
        file.seek(600)
        file.write(b"?")
    forget()
    assert texts(f"{server.url}/a.tar") == [f"good {i}" for i in range(5)]
    assert path.read_bytes() == server.files["/a.tar"]


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_fill_goes_on_or_begins_again(server, tmp_path, ranges):
    server.files["/a.tar"], server.ranges = shard(tmp_path / "x", "whole"), ranges
    server.faults = [3000]
    (path,) = expand_shards([f"{server.url}/a.tar"])
    assert path.read_bytes() == server.files["/a.tar"]
    assert server.asked[-1][1] == "bytes=3000-"
    assert not list(path.parent.glob("*.part")) and not list(path.parent.glob(".part"))


def test_a_server_that_fails_for_a_while_is_asked_again_and_one_that_stays_away_is_named(server, tmp_path):
    server.files["/a.tar"] = shard(tmp_path / "x", "late")
    server.faults = [503, 503]
    url = server.url.replace("//", "//me:secret@") + "/a.tar?token=secret"
    assert texts(url)[0] == "late 0"
    server.faults = [503] * 3
    other = url.replace("a.tar", "b.tar")
    with pytest.raises(
        StorageError, match=r"/b.tar: fetching failed 3 times: the server answers 503 .*check the net"
    ) as e:
        open_shards(other)
    assert "secret" not in str(e.value) and server.url in str(e.value)
    assert server.asked[-1][2] == "Basic " + base64.b64encode(b"me:secret").decode()


def test_without_a_network_a_full_cache_serves_and_an_empty_one_says_so(server, tmp_path):
    server.files["/a.tar"] = shard(tmp_path / "x", "kept")
    url = f"{server.url}/a.tar"
    expand_shards([url])
    server.shutdown()
    server.server_close()
    forget()
    assert texts(url)[0] == "kept 0"
    with pytest.raises(StorageError, match=r"fetching failed 3 times: .*refused"):
        open_shards(f"{server.url}/b.tar")


def test_shards_that_are_not_there_or_may_not_be_read_are_listed_together(server, tmp_path):
    server.files["/a.tar"] = shard(tmp_path / "x", "x")
    server.faults = [403]
    with pytest.raises(ShardError, match="may not be read"):
        open_shards(f"{server.url}/a.tar?sig=secret")
    with pytest.raises(ShardError) as caught:
        open_shards([f"{server.url}/{{b,c}}.tar", f"{server.url}/a.tar"])
    assert [what for _, what in caught.value.problems] == [
        "is not there (the server answers 404 Not Found); check the url"
    ] * 2


FILLER = """
import sys
from mmpre.data.remote import Remote
print(Remote().fetch(sys.argv[1]))
"""


def test_two_processes_that_fill_one_entry_do_it_once(server, tmp_path, cache):
    server.files["/a.tar"] = shard(tmp_path / "x", "shared", count=50)
    fillers = [
        subprocess.Popen([sys.executable, "-c", FILLER, f"{server.url}/a.tar"], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {filler.communicate(timeout=60)[0].strip() for filler in fillers}
    assert len(paths) == 1 and Path(paths.pop()).read_bytes() == server.files["/a.tar"]
    assert len(remote.entries()) == 1


def test_other_systems_are_read_through_fsspec_and_unknown_ones_refused(tmp_path):
    content = shard(tmp_path / "x", "memory")
    with fsspec.open("memory://bucket/a.tar", "wb") as file:
        file.write(content)
    assert texts("memory://bucket/a.tar") == [f"memory {i}" for i in range(5)]
    with pytest.raises(ShardError, match=r"memory://bucket/b.tar: is not there"):
        open_shards("memory://bucket/b.tar")
    with pytest.raises(ShardError, match="nosuch: urls are not known; give http"):
        open_shards("nosuch://bucket/a.tar")
    with pytest.raises(ShardError, match="has a pattern, which only local paths may have; name the shards with braces"):
        open_shards("memory://bucket/*.tar")


def test_variables_that_rewrite_urls_are_not_looked_at(server, tmp_path, monkeypatch):
    server.files["/a.tar"] = shard(tmp_path / "x", "true")
    server.files["/evil.tar"] = shard(tmp_path / "y", "evil")
    monkeypatch.setenv("GOPEN_REWRITE", f"{server.url}/a.tar={server.url}/evil.tar")
    assert texts(f"{server.url}/a.tar")[0] == "true 0"


def test_a_shard_that_does_not_fit_is_refused_before_it_is_fetched(server, tmp_path, monkeypatch):
    server.files["/a.tar"] = shard(tmp_path / "x", "big")
    monkeypatch.setenv("MMPRE_CACHE_GB", "0.000001")
    with pytest.raises(StorageError, match=r"/a.tar: its 10,240 bytes would not fit .*limits to 0.000001 GB; raise it"):
        open_shards(f"{server.url}/a.tar")
    monkeypatch.delenv("MMPRE_CACHE_GB")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5))
    with pytest.raises(StorageError, match=r"needs 10,240 bytes, .* has 5; make room"):
        open_shards(f"{server.url}/a.tar")


def test_the_cache_is_shown_and_cleared(server, tmp_path, capsys, cache):
    server.files["/a.tar"] = shard(tmp_path / "x", "x")
    expand_shards([f"{server.url}/a.tar?token=secret"])
    main(["data", "cache", "--json"])
    (told,) = json.loads(capsys.readouterr().out)
    assert told["url"] == f"{server.url}/a.tar" and told["size"] == 10240
    main(["data", "cache"])
    assert "1 shards, 10,240 bytes in" in capsys.readouterr().out
    main(["data", "cache", "--clear"])
    assert "10,240 bytes removed" in capsys.readouterr().out and not remote.entries()


def test_what_is_written_down_of_a_named_source_is_the_source_without_its_secrets():
    words = [
        "wiki@3=shards/wiki",
        "books@1=https://me:word@host:8443/books-{000..009}.tar?token=x",
        "https://a@b/c.tar",
    ]
    shown = public({"data": words})["data"]
    assert shown == ["wiki@3=shards/wiki", "books@1=https://host:8443/books-{000..009}.tar", "https://b/c.tar"]
    assert public(shown) == shown  # as often as a record is written
    assert sources(shown[:2])["books"].data == ("https://host:8443/books-{000..009}.tar",)
