"""The Hub's client code, for real: against a local mirror, and a server on this machine that speaks its protocol."""

import hashlib
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from huggingface_hub.errors import LocalEntryNotFoundError

from nanochat.data import choose, hub
from nanochat.errors import UserError

ROOT = Path(__file__).parent.parent


def shard(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(text=tiny.sentences(400, seed))), path, row_group_size=100, compression="none")
    return path


# ---- a mirror


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_HUB_ROOT", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_the_last_shard_of_a_mirror_validates(mirror):
    for i in range(3):
        shard(mirror / hub.BASE_REPO / hub.shard_name(i), i)
    source = hub.base_documents(100)
    assert source.units("train") == 8 and source.units("val") == 4
    assert source.load("val", 0) == tiny.sentences(400, 2)[:100]


def test_a_mirror_without_what_is_needed_says_so(mirror):
    with pytest.raises(UserError, match="at least two"):
        hub.base_documents(1)
    with pytest.raises(UserError, match="the mirror has no test"):
        choose.conversations("hub", "sft")


def test_a_mirror_that_is_no_folder(monkeypatch):
    monkeypatch.setenv("NANOCHAT_HUB_ROOT", "/no/such/folder")
    with pytest.raises(UserError, match="no folder"):
        hub.reachable()


# ---- a hub


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Serves files under self.server.root as the Hub does; the first transfer of each file breaks off in the middle."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _path(self) -> Path | None:
        prefix = f"/datasets/{hub.BASE_REPO}/resolve/main/"
        path = self.server.root / self.path.removeprefix(prefix)
        return path if self.path.startswith(prefix) and path.is_file() else None

    def _head(self, path: Path, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Accept-Ranges", "bytes")

    def _missing(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self):  # noqa: N802
        path = self._path()
        if path is None:
            return self._missing()
        self._head(path, 200, path.stat().st_size)
        self.end_headers()

    def do_GET(self):  # noqa: N802
        path = self._path()
        if path is None:
            return self._missing()
        content = path.read_bytes()
        wanted = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")
        start = int(wanted[0])
        self.server.requests.append((path.name, start))
        self._head(path, 206 if start else 200, len(content) - start)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        first = [name for name, _ in self.server.requests].count(path.name) == 1
        self.wfile.write(content[start : start + len(content) // 2] if first else content[start:])
        self.wfile.flush()
        if first:
            self.connection.close()


@pytest.fixture
def fake_hub(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.root, server.requests = tmp_path / "hub", []
    for number in (0, hub.LAST_SHARD):
        shard(server.root / hub.shard_name(number), number)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def with_hub(endpoint: str, cache: Path, code: str) -> subprocess.CompletedProcess:
    """Runs code in a process of its own: the client reads its settings when it is imported."""
    environment = dict(os.environ, HF_ENDPOINT=endpoint, HF_HOME=str(cache), HF_HUB_DISABLE_XET="1")
    for name in ("NANOCHAT_HUB_ROOT", "HF_HUB_OFFLINE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        environment.pop(name, None)
    settings = "import time; time.sleep = lambda s: None; from huggingface_hub import constants"
    code = f"{settings}; constants.DOWNLOAD_CHUNK_SIZE = 2000\n{code}"  # small files: break off after some chunks
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_shards_are_downloaded_whole_although_every_transfer_breaks_once(fake_hub, tmp_path):
    endpoint = f"http://127.0.0.1:{fake_hub.server_port}"
    code = "from nanochat.data import hub; s = hub.base_documents(1); print(s.load('val', 0)[0])"
    done = with_hub(endpoint, tmp_path / "cache", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == tiny.sentences(400, hub.LAST_SHARD)[0]
    resumed = [start for _, start in fake_hub.requests if start > 0]
    assert len(resumed) == 2, fake_hub.requests
    count = len(fake_hub.requests)
    assert with_hub(endpoint, tmp_path / "cache", code).returncode == 0
    assert len(fake_hub.requests) == count  # nothing is downloaded twice


def test_a_shard_that_is_not_there_is_named(fake_hub, tmp_path):
    code = (
        "from nanochat.data import hub\nfrom nanochat.errors import UserError\n"
        "try: hub.fetch_shards([5])\nexcept UserError as e: print(e)"
    )
    done = with_hub(f"http://127.0.0.1:{fake_hub.server_port}", tmp_path / "cache", code)
    assert "on the Hub has no shard_00005.parquet" in done.stdout, done.stderr


def test_whoever_interrupts_does_not_wait_for_what_is_downloaded(tmp_path):
    code = (
        "import os, signal, threading\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from nanochat.data import hub\n"
        "hub._fetch = lambda name: threading.Event().wait(600)\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "try: hub.fetch_shards(range(9))\nexcept KeyboardInterrupt: print('interrupted')"
    )
    assert with_hub("http://127.0.0.1:1", tmp_path / "cache", code).stdout == "interrupted\n"


@pytest.fixture
def loading(monkeypatch):
    """loading(*problems): a package `datasets` that raises these, one a call, and then has a data set; its calls."""
    paused = []
    monkeypatch.setattr(hub.time, "sleep", paused.append)

    def fake(*problems):
        calls, left = [], [*problems]

        def load_dataset(*given, **named):
            calls.append(given)
            if left:
                raise left.pop(0)
            return "loaded"

        monkeypatch.delenv("NANOCHAT_HUB_ROOT", raising=False)
        made = SimpleNamespace(
            disable_progress_bars=lambda: None, load_dataset=load_dataset, exceptions=datasets.exceptions
        )
        monkeypatch.setitem(sys.modules, "datasets", made)
        return calls

    fake.paused = paused
    return fake


def test_a_data_set_is_asked_for_several_times(loading):
    """What a network refuses once must not decide what a model is trained on."""
    calls = loading(TimeoutError(), ConnectionError("reset"))
    assert hub.dataset("openai/gsm8k", "main", "test") == "loaded" and len(calls) == 3
    assert loading.paused == [1, 2]


@pytest.mark.parametrize("kind", [TimeoutError, FileNotFoundError, LocalEntryNotFoundError])
def test_a_data_set_whose_error_says_nothing(loading, kind):
    """A Hub that is down looks, to `datasets`, like a file that is not found."""
    calls = loading(*[kind("")] * 9)
    words = rf"openai/gsm8k \(main, test\) could not be loaded \({kind.__name__}\)"
    with pytest.raises(UserError, match=words) as raised:
        hub.dataset("openai/gsm8k", "main", "test")
    assert len(calls) == hub.TRIES and not isinstance(raised.value, hub.Lacks)


@pytest.mark.parametrize("failures, reached", [(2, True), (3, False)])
def test_the_hub_is_asked_several_times_whether_it_is_there(loading, monkeypatch, failures, reached):
    """What it says decides what a GPU trains on, for good."""
    loading()
    left = [TimeoutError()] * failures
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    answer = lambda *given, **named: (_ for _ in ()).throw(left.pop()) if left else None
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: SimpleNamespace(dataset_info=answer))
    assert hub.reachable()[0] == reached


def test_a_data_set_that_the_hub_has_not_is_asked_for_once(loading):
    calls = loading(datasets.exceptions.DatasetNotFoundError("gone"))
    with pytest.raises(hub.Lacks, match="the Hub has no openai/gsm8k"):
        hub.dataset("openai/gsm8k", "main", "test")
    assert len(calls) == 1


def test_shards_in_the_cache_are_not_downloaded(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub.to_download(2) == 3 and hub.cache() == tmp_path  # and the one that validates
    there = tmp_path / f"datasets--{hub.BASE_REPO.replace('/', '--')}"
    (there / "refs").mkdir(parents=True)
    (there / "refs" / "main").write_text("abc")
    (there / "snapshots" / "abc").mkdir(parents=True)
    for number in (0, hub.LAST_SHARD, 7):
        (there / "snapshots" / "abc" / hub.shard_name(number)).write_text("")
    assert hub.to_download(2) == 1


def test_without_a_network_it_says_what_to_do(tmp_path):
    code = (
        "from nanochat.data import hub\nfrom nanochat.errors import UserError\nprint(hub.reachable())\n"
        "try: hub.fetch_shards([0])\nexcept UserError as e: print(e)"
    )
    done = with_hub("http://127.0.0.1:9", tmp_path / "cache", code)
    assert "(False, 'the Hub does not answer" in done.stdout
    assert "could not be downloaded" in done.stdout and "--data embedded" in done.stdout, done.stderr
