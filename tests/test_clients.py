"""Published clients, unmodified, against the server with a model that was really trained. Run by name:

    python -m pytest tests/test_clients.py --full -k langchain

Each gets a folder of its own with what pip or npm installs there, which takes a network and up to a minute; with
$NANOCHAT_CLIENTS the folders stay in that one. What a client does is a program in tests/clients/.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import talker
import tiny
import torch
from test_api import CALLS, TwoSums
from test_web import serving

pytestmark = pytest.mark.slow
PROGRAMS = Path(__file__).parent / "clients"
MODEL = "tiny"  # as test_web.serving calls it
SUM = "27 + 58 is 85."
CALL = [dict(type="python", text="27 + 58"), dict(type="python_output", text="85")]
NODE = ("openai", "ai", "@ai-sdk/openai-compatible")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with talker.engine(tmp_path_factory) as made:
        yield made


@pytest.fixture(scope="module")
def address(engine):
    with serving(engine, engine.tokenizer, engine.config.sequence_len) as (found, _):
        yield found


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return Path(os.environ.get("NANOCHAT_CLIENTS") or tmp_path_factory.mktemp("clients"))


def called(words, folder=None, **environment):
    """What a program says. pip and npm come by the same way: where they fail, the test is skipped with their words."""
    made = subprocess.run(
        [str(word) for word in words], cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )
    return made.returncode, made.stdout, made.stderr


def installed(folder, *words):
    code, _, errors = called(words, folder)
    if code:
        pytest.skip(f"cannot be installed here: {' '.join(map(str, words[-3:]))}: {errors.strip().splitlines()[-1]}")


def python_with(home, *packages, ours=False):
    """The Python of an environment with these packages; ours: where they do not bring them, those of the tests too."""
    folder = home / "-".join("".join(c for c in package if c.isalnum() or c in "._=") for package in packages)
    program = folder / "bin" / "python"
    if not (folder / "installed").exists():
        assert not called([sys.executable, "-m", "venv", "--clear", folder])[0]
        if ours:
            own = next(folder.glob("lib/python*/site-packages"))
            (own / "ours.pth").write_text(sysconfig.get_path("purelib"))
        installed(home, program, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages)
        (folder / "installed").touch()
    return program


def node_with(home):
    """A folder with the packages for Node."""
    if shutil.which("npm") is None:
        pytest.skip("there is no npm here (Debian: apt-get install npm)")
    folder = home / "node"
    if not (folder / "node_modules").exists():
        folder.mkdir(exist_ok=True)
        (folder / "package.json").write_text("{}")
        installed(folder, "npm", "install", "--silent", *NODE)
    return folder


def answered(address, words, folder, **more):
    """The last line of what a client's program prints, as JSON."""
    where = dict(BASE_URL=f"{address}/v1", MODEL=MODEL, OPENAI_API_KEY="any", FOLDER=str(folder), CONTEXT="256")
    code, out, errors = called(words, folder, **where, **more)
    assert code == 0, errors[-3000:]
    print(out.splitlines()[-1])
    return json.loads(out.splitlines()[-1])


def run(address, home, folder, program, *packages, ours=False, **more):
    return answered(address, [python_with(home, *packages, ours=ours), PROGRAMS / program], folder, **more)


@pytest.mark.parametrize("version", ["openai==1.109.1", "openai"])
def test_openai_python(address, home, tmp_path, version):
    found = run(address, home, tmp_path, "openai_python.py", version)
    assert found["text"] == found["streamed"] == SUM and found["whole_events"] == CALL
    assert found["events"] == [dict(one, index=i) for i, one in enumerate(CALL)]
    assert found["indices"] == [0, 1, 2, 3] and found["own"] and found["first"] is None
    assert found["echoed"].startswith("One two")


def test_openai_node(address, home, tmp_path):
    folder = node_with(home)
    shutil.copy(PROGRAMS / "openai_node.mjs", folder)
    found = answered(address, ["node", folder / "openai_node.mjs"], tmp_path)
    assert found["text"] == found["streamed"] == found["deltas"] == SUM and found["indices"] == [0, 1]
    assert found["events"] == [dict(one, index=i) for i, one in enumerate(CALL)]
    tokenizer = tiny.tokenizer()
    with serving(TwoSums(tokenizer, 2), tokenizer, 500) as (twice, _):
        found = answered(twice, ["node", folder / "openai_node.mjs"], tmp_path)
    assert [(one["type"], one["text"]) for one in found["events"]] == CALLS


def test_ai_sdk(address, home, tmp_path):
    folder = node_with(home)
    shutil.copy(PROGRAMS / "ai_sdk.mjs", folder)
    found = answered(address, ["node", folder / "ai_sdk.mjs"], tmp_path)
    assert found["text"] == SUM and found["reason"] == found["reasonStreamed"] == "stop"
    assert found["chunks"] and found["usage"]["outputTokens"] > 0


def test_langchain(address, home, tmp_path):
    found = run(address, home, tmp_path, "with_langchain.py", "langchain-openai")
    assert found["text"] == found["streamed"] == SUM and found["history"]
    assert found["plain"] == found["chunks"] == found["batch"][0] != found["batch"][1]


def test_litellm(address, home, tmp_path):
    found = run(address, home, tmp_path, "with_litellm.py", "litellm", LITELLM_LOCAL_MODEL_COST_MAP="True")
    assert found["text"] == found["streamed"] == SUM and found["plain"] and found["tokens"] > 5


def test_llm(address, home, tmp_path):
    found = run(address, home, tmp_path, "with_llm.py", "llm", LLM_USER_PATH=str(tmp_path / "llm"))
    assert found["text"] == found["streamed"] == f"{SUM}\n" and found["more"].strip()


def test_llama_index(address, home, tmp_path):
    found = run(address, home, tmp_path, "llamaindex.py", "llama-index-llms-openai-like")
    assert found["text"] == found["streamed"] == SUM and found["plain"] == found["chunks"]


def test_inspect_ai(address, home, tmp_path):
    where = dict(MINE_BASE_URL=f"{address}/v1", MINE_API_KEY="any", LOGS=str(tmp_path))
    found = run(address, home, tmp_path, "inspect_task.py", "inspect_ai", "openai", **where)
    assert found["status"] == "success" and len(found["answers"]) == 2 and all(found["answers"])


def test_lm_evaluation_harness(address, home, tmp_path, engine):
    """Chat, multiple choice and rolling tasks; the sums are the model's own."""
    found = run(address, home, tmp_path, "harness.py", "lm-eval[api]", ours=True, HF_HOME=str(tmp_path / "hf"))
    encode, bos = engine.tokenizer.encode, engine.tokenizer.bos

    @torch.inference_mode()
    def own(ids, start):
        logp = torch.log_softmax(engine.model(torch.tensor([ids]))[0], -1)
        return sum(logp[i - 1, ids[i]].item() for i in range(start, len(ids)))

    for land, sums in zip(("France", "Italy"), found["choices"]):
        asked = f"The capital of {land} is"
        wanted = [own(encode(f"{asked} {city}"), len(encode(asked))) for city in ("Paris", "Rome", "Berlin", "Madrid")]
        assert sums == pytest.approx(wanted, abs=1e-4)
    texts = ["The capital of France is Paris. " * n for n in (1, 3)]
    assert found["rolled"] == pytest.approx([own([bos, *encode(text)], 1) for text in texts], abs=1e-4)
    assert found["greedy"][0] == [True, False, False, False] and found["chat"][0] == SUM


def test_guidellm(address, home, tmp_path):
    python = python_with(home, "guidellm", ours=True)
    (tmp_path / "asked.jsonl").write_text('{"prompt": "What is 27 + 58?"}\n{"prompt": "Hello!"}\n' * 6)
    words = [
        python.parent / "guidellm", "run", "--backend", f"kind=openai_http,target={address},model={MODEL}",
        "--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=12", "--data",
        "kind=json_file,path=asked.jsonl", "--output", "kind=json,path=found.json", "--disable-console",
    ]  # fmt: skip
    code, _, errors = called(words, tmp_path)
    assert code == 0, errors[-3000:]
    requests = json.loads((tmp_path / "found.json").read_text())["benchmarks"][0]["requests"]
    assert len(requests["successful"]) == 12 and not requests["errored"]
