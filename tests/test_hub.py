"""Promise 1 over the network: a hub that drops, stalls and refuses requests gives the same shards, of one commit."""

import contextlib
import gzip
import hashlib
import json
import random
import re
import socket
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import refused, run

from core.data import sources

SOURCE = "hf://datasets/owner/name/data/*.parquet"
FAULTS = ("drop", "stall", 503, 429)


class Hub(ThreadingHTTPServer):
    """The hub's endpoints that list and read the files of a data set; each range fails once with `fault`."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Request)
        self.folder, self.commit, self.fault = folder, "a" * 40, None
        self.failed, self.served, self.paths = set(), 0, []
        Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_):
        """A closed connection is part of the test."""

    def facts(self, path):
        if (self.folder / path).is_dir():
            return {"type": "directory", "oid": "d" * 40, "path": path}
        size, digest = (
            (self.folder / path).stat().st_size,
            hashlib.sha256((self.folder / path).read_bytes()).hexdigest(),
        )
        lfs = {"oid": digest, "size": size, "pointerSize": 130}
        return {"type": "file", "oid": digest[:40], "size": size, "path": path, "lfs": lfs}


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", sent=None, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body[:sent])

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self):
        form = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.json([self.server.facts(path) for path in form["paths"] if (self.server.folder / path).exists()])

    def do_GET(self):
        server, path = self.server, self.path.split("?")[0]
        server.paths.append(path)
        if re.fullmatch(r"/api/datasets/owner/name(/revision/[^/]+)?", path):
            self.json({"id": "owner/name", "sha": server.commit, "siblings": []})
        elif found := re.fullmatch(r"/api/datasets/owner/name/tree/[^/]+/?(.*)", path):
            entries = sorted((server.folder / found[1]).iterdir())
            self.json([server.facts(str(entry.relative_to(server.folder))) for entry in entries])
        elif found := re.fullmatch(r"/datasets/owner/name/resolve/[^/]+/(.*)", path):
            self.file(server.folder / found[1])
        else:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")

    def file(self, path):
        server, (first, last) = self.server, map(int, re.findall(r"\d+", self.headers["Range"]))
        body = path.read_bytes()[first : last + 1]
        key = (path.name, first, last)
        fault = server.fault if key not in server.failed else None
        server.failed.add(key)
        if fault == "drop":
            self.answer(206, body, sent=len(body) // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "stall":
            time.sleep(2)
        elif fault:
            self.answer(fault, Retry_After=0)
        else:
            server.served += len(body)
            self.answer(206, body)


@pytest.fixture
def hub(tmp_path):
    rng = random.Random(3)
    (tmp_path / "hub/data").mkdir(parents=True)
    for number in range(2):
        texts = [" ".join(rng.choices(("Ana", "took", "the", "lamp"), k=rng.randint(1, 60))) for _ in range(60)]
        padding = [rng.randbytes(20_000).hex() for _ in texts]
        table = pa.table({"padding": padding, "text": texts})
        pq.write_table(table, tmp_path / f"hub/data/{number:03d}_00000.parquet", row_group_size=20)
    with Hub(tmp_path / "hub") as server:
        yield server
        server.shutdown()


def prepare(world, hub, out, source=SOURCE, check=True, workers=2):
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(hub.folder / "home"),
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    settings = ("--encoding", "data/stories", "--shard-tokens", 800, "--val-tokens", 500, "--workers", workers)
    return run("fineweb.py", "--source", source, "--out", out, *settings, cwd=world, check=check, **environment)


def shards(out):
    return {path.name: path.read_bytes() for path in Path(out).glob("*.npy")}


def manifest(out):
    return json.loads((out / "manifest.json").read_text())


@pytest.fixture
def local(world, hub, tmp_path):
    prepare(world, hub, tmp_path / "local", hub.folder / "data/*.parquet")
    return tmp_path / "local"


def test_the_hubs_files_give_the_shards_of_local_files_and_the_commit_is_recorded(world, hub, local, tmp_path):
    prepare(world, hub, tmp_path / "out")
    assert shards(tmp_path / "out") == shards(local)
    source, expected = manifest(tmp_path / "out").pop("source"), manifest(local)
    assert manifest(tmp_path / "out") | {"source": None} == expected | {"source": None}
    assert (source["name"], source["revision"]) == (SOURCE, hub.commit)
    assert [file["fingerprint"] for file in source["files"]] == [
        hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted((hub.folder / "data").iterdir())
    ]
    resolved = [path for path in hub.paths if "/resolve/" in path]
    assert resolved
    assert all(f"/resolve/{hub.commit}/" in path for path in resolved)


def test_only_the_text_is_downloaded_and_only_the_shards_are_kept(world, hub, tmp_path):
    prepare(world, hub, tmp_path / "out")
    assert hub.served < sum(file.stat().st_size for file in (hub.folder / "data").iterdir()) / 4
    other = [path for path in tmp_path.rglob("*") if path.suffix == ".parquet" and path.parent != hub.folder / "data"]
    assert not other
    names = {"manifest.json", "tokenizer.json", "tokenizer_config.json", ".lock"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | set(shards(tmp_path / "out"))


@pytest.mark.parametrize("fault", FAULTS)
def test_each_request_for_a_range_can_fail_once(world, hub, local, tmp_path, fault):
    hub.fault = fault
    prepare(world, hub, tmp_path / "out", workers=6)
    assert shards(tmp_path / "out") == shards(local)


def test_each_range_of_a_large_compressed_file_can_fail_once(world, hub, tmp_path):
    """The main process decompresses it as one stream, of which it can't repeat a part."""
    texts = [random.Random(number).randbytes(200).hex() for number in range(300)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (hub.folder / "data/a.jsonl.gz").write_bytes(gzip.compress(lines))
    prepare(world, hub, tmp_path / "local", hub.folder / "data/*.gz")
    for fault in ("drop", 425):  # huggingface_hub does not repeat a request after 425
        hub.fault = fault
        hub.failed.clear()
        prepare(world, hub, tmp_path / str(fault), "hf://datasets/owner/name/data/*.gz")
        assert hub.failed
        assert shards(tmp_path / str(fault)) == shards(tmp_path / "local")


def test_a_finished_folder_needs_no_hub_and_ignores_a_new_commit(world, hub, tmp_path):
    prepare(world, hub, tmp_path / "out")
    hub.commit = "b" * 40
    hub.paths.clear()
    assert "already finished" in prepare(world, hub, tmp_path / "out").stdout
    assert not [path for path in hub.paths if "owner" in path]


def test_a_failed_run_resumes_at_its_commit(world, hub, local, tmp_path):
    hub.fault = 403
    assert "_00000.parquet" in refused(prepare(world, hub, tmp_path / "out", check=False))
    hub.fault, hub.commit = None, "b" * 40
    prepare(world, hub, tmp_path / "out")
    assert manifest(tmp_path / "out")["source"]["revision"] == "a" * 40
    assert shards(tmp_path / "out") == shards(local)


def test_a_source_that_is_not_on_the_hub_is_a_one_line_error(world, hub, tmp_path):
    for source in ("hf://datasets/owner/other/*.parquet", "hf://datasets/owner/name/data/*.jsonl"):
        message = refused(prepare(world, hub, tmp_path / "out", source, check=False))
        assert source in message


def fails(times, error):
    """A read that fails `times` times and then returns its number of calls, and the list of calls."""
    calls = []

    def read():
        calls.append(1)
        if len(calls) <= times:
            raise error
        return len(calls)

    return read, calls


class HttpError(Exception):
    def __init__(self, status):
        self.response = type("Response", (), {"status_code": status})


@pytest.mark.parametrize("error", [TimeoutError("slow"), ConnectionError("gone"), HttpError(429), HttpError(503)])
def test_a_remote_read_is_retried_until_the_last_pause(monkeypatch, error):
    monkeypatch.setattr(sources, "PAUSES", (0.001, 0.001, 0.001))
    assert sources.retry(fails(3, error)[0], "hf://datasets/a/b/c.parquet") == 4
    with pytest.raises(OSError, match=r"hf://datasets/a/b/c.parquet can't be read"):
        sources.retry(fails(4, error)[0], "hf://datasets/a/b/c.parquet")


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("hf://datasets/a/b/c.parquet", HttpError(403)),
        ("hf://datasets/a/b/c.parquet", FileNotFoundError("c")),
        ("hf://datasets/a/b/c.parquet", IsADirectoryError("c")),
        ("hf://datasets/a/b/c.parquet", NotADirectoryError("c")),
        ("zip://in/c.parquet::a.zip", TimeoutError("slow")),
        ("hf://datasets/a/b/c.parquet", ValueError("damaged")),
        ("folder/c.parquet", TimeoutError("slow")),
    ],
)
def test_a_permanent_error_is_not_retried(monkeypatch, url, error):
    monkeypatch.setattr(sources, "PAUSES", (0.001,))
    read, calls = fails(1, error)
    with contextlib.suppress(OSError, ValueError):
        sources.retry(read, url)
    assert len(calls) == 1
