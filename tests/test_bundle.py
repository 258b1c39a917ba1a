"""The evaluation bundle: what is read of it, what is said of a damaged one, and its download from a local server."""

import hashlib
import http.server
import json
import threading
import zipfile

import bundles
import pytest

from nanochat.errors import UserError
from nanochat.evaluate import bundle


def test_tasks_are_as_the_files_say(tmp_path):
    found = bundles.made(tmp_path / "b")
    assert [(t.label, t.kind, t.shots, t.delimiter, t.baseline) for t in found.tasks] == [
        ("arc_easy", "multiple_choice", 3, "\nAnswer: ", 40.3),
        ("winograd", "schema", 1, " ", 50.0),
        ("lambada_openai", "language_modeling", 0, " ", 0.0),
    ]
    assert [task.rows() for task in found.tasks] == list(bundles.ROWS.values())
    assert len(found.missing) == 19 and "squad" in found.missing and "arc_easy" not in found.missing


def test_a_task_without_its_file_is_missing(tmp_path):
    rows = {label: rows for label, rows in bundles.ROWS.items() if label != "winograd"}
    found = bundle.load(bundles.write(tmp_path / "b", rows))
    assert [task.label for task in found.tasks] == ["arc_easy", "lambada_openai"] and "winograd" in found.missing
    assert bundle.fingerprint(found) != bundle.fingerprint(bundles.made(tmp_path / "c"))


def test_the_real_bundle(shared):
    found = bundle.load(shared / "data" / "eval_bundle")
    assert len(found.tasks) == 18 and found.missing == ["hellaswag_zeroshot", "hellaswag", "squad", "coqa"]
    assert sum(len(task.rows()) for task in found.tasks) == 8545
    assert {task.label: task.baseline for task in found.tasks}["commonsense_qa"] == 40.3


ROW = bundles.ROWS["arc_easy"][0]
TASK = b"icl_tasks:\n- {label: arc_easy, dataset_uri: arc_easy.jsonl, num_fewshot: [3], icl_task_type: multiple_choice}"


@pytest.mark.parametrize(
    "task, line, said",
    [
        ("arc_easy", "{", "it is no JSON"),
        ("arc_easy", "[1]", "it is no JSON object"),
        ("arc_easy", json.dumps({**ROW, "query": 3}), "query is no text"),
        ("arc_easy", json.dumps({**ROW, "choices": ["a"]}), "choices is no list of at least two texts"),
        ("arc_easy", json.dumps({**ROW, "gold": 3}), "gold is 3, wanted the place of one of 3 choices"),
        ("arc_easy", json.dumps({**ROW, "gold": True}), "gold is True"),
        ("winograd", json.dumps(dict(context_options=["a", "b"], continuation=" ", gold=0)), "continuation is empty"),
        ("lambada_openai", json.dumps(dict(context="a")), "continuation is no text"),
    ],
)
def test_a_damaged_row_is_named(tmp_path, task, line, said):
    folder = bundles.write(tmp_path / "b")
    path = folder / "eval_data" / f"{task}.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], "", line, *lines[2:]]))
    with pytest.raises(UserError, match=f"{task}.jsonl, line 4 is damaged: .*{said}"):
        next(one for one in bundle.load(folder).tasks if one.label == task).rows()


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("core.yaml", b"icl_tasks: [", "core.yaml is damaged"),
        ("core.yaml", b"tasks: []", "core.yaml is damaged"),
        ("core.yaml", b"icl_tasks:\n- label: x", "core.yaml is damaged"),
        ("core.yaml", None, "core.yaml is missing"),
        ("eval_meta_data.csv", b"Eval Task,Random baseline\narc_easy,much\n", "eval_meta_data.csv, line 2"),
        ("eval_meta_data.csv", b"Eval Task,Random baseline\n", "no baseline of arc_easy"),
        *(
            (
                "eval_meta_data.csv",
                f"Eval Task,Random baseline\nx,0\narc_easy,{value}\n".encode(),
                "csv, line 3",
            )
            for value in ("100", "-1", "nan", "inf", "1" * 140_000)
        ),
        ("core.yaml", b"icl_tasks: " + b"[" * 5000, "core.yaml is damaged"),
        *(
            ("core.yaml", TASK.replace(b"[3]", shots), "num_fewshot of arc_easy is .*, wanted a whole number")
            for shots in (b"[.inf]", b"[-1]", b"['3']", b"[true]")
        ),
        ("eval_data/arc_easy.jsonl", b"\xff\xfe", "no UTF-8 at byte 0"),
        ("eval_data/arc_easy.jsonl", json.dumps(ROW).encode(), "has 1 rows, wanted more than the 3"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, said):
    folder = bundles.write(tmp_path / "b")
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        bundle.load(folder).tasks[0].rows()


def test_a_byte_order_mark_is_no_damage(tmp_path):
    folder = bundles.write(tmp_path / "b")
    for path in (folder / "eval_meta_data.csv", folder / "core.yaml", folder / "eval_data" / "arc_easy.jsonl"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert bundle.load(folder).tasks[0].rows() == bundles.ROWS["arc_easy"]


def test_an_unknown_kind_is_named(tmp_path):
    with pytest.raises(UserError, match="arc_easy is of kind 'riddle'"):
        bundle.load(bundles.write(tmp_path / "b", tasks={"arc_easy": ("riddle", 0, " ", 25)}))


# ---- where it is


def test_a_path_comes_first_then_the_base_folder_then_what_stands_beside(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "home"))
    (tmp_path / "mirror" / "hub").mkdir(parents=True)
    monkeypatch.setenv("NANOCHAT_HUB_ROOT", str(tmp_path / "mirror" / "hub"))
    beside = bundles.write(tmp_path / "mirror" / "eval_bundle")
    given = bundles.write(tmp_path / "given")
    assert bundle.find() == beside
    own = bundles.write(tmp_path / "home" / "eval_bundle")
    assert bundle.find() == own and bundle.find(str(given)) == given
    with pytest.raises(UserError, match="there is no core.yaml in it"):
        bundle.find(str(tmp_path))


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one file; the first transfer breaks off in the middle."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):  # noqa: N802
        content, asked = self.server.content, self.server.asked
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        asked.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        breaks = len(asked) <= self.server.breaks
        self.wfile.write(content[start : start + len(content) // 2] if breaks else content[start:])
        if breaks:
            self.wfile.flush()
            self.connection.close()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)  # a small file: break off after some
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 1)  # seconds until a break is noticed
    folder = bundles.write(tmp_path / "src" / "eval_bundle")
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(tmp_path / "src"))
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    made.content, made.asked, made.breaks = (tmp_path / "made.zip").read_bytes(), [], 0
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def fetched(server, folder, digest=None):
    digest = digest or hashlib.sha256(server.content).hexdigest()
    bundle.download(folder, f"http://127.0.0.1:{server.server_port}/eval_bundle.zip", digest)


def test_a_download_that_breaks_goes_on_and_is_whole(server, tmp_path):
    server.breaks = 1
    fetched(server, tmp_path / "home" / "eval_bundle")
    assert server.asked[0] == 0 < server.asked[1]
    assert len(bundle.load(tmp_path / "home" / "eval_bundle").tasks) == 3
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["eval_bundle"]


def test_a_second_call_goes_on_where_the_first_stopped(server, tmp_path):
    half = len(server.content) // 2
    part = tmp_path / "home" / "eval_bundle.zip.part"
    part.parent.mkdir()
    part.write_bytes(server.content[:half])
    fetched(server, tmp_path / "home" / "eval_bundle")
    assert server.asked == [half] and (tmp_path / "home" / "eval_bundle" / "core.yaml").is_file()


def test_what_is_whole_already_is_not_asked_for_again(server, tmp_path):
    part = tmp_path / "home" / "eval_bundle.zip.part"
    part.parent.mkdir()
    part.write_bytes(server.content)
    fetched(server, tmp_path / "home" / "eval_bundle")
    assert server.asked == [] and (tmp_path / "home" / "eval_bundle" / "core.yaml").is_file()


def test_another_file_than_the_known_one_is_refused(server, tmp_path):
    with pytest.raises(UserError, match="gave a file with SHA-256 .* nothing of it is used"):
        fetched(server, tmp_path / "home" / "eval_bundle", "0" * 64)
    assert list((tmp_path / "home").iterdir()) == []


def test_without_a_network_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(UserError, match="could not be downloaded .* name one with --bundle, or leave core out"):
        bundle.download(tmp_path / "eval_bundle", "http://127.0.0.1:9/eval_bundle.zip")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids"):
        bundle.download(tmp_path / "eval_bundle")
