"""With torch, Triton, numpy, safetensors, tiktoken and pytest alone: what a machine without a network can do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from nanochat import bpe, tokenizer
from nanochat.data import choose

ROOT = Path(__file__).parent.parent
OTHERS = ("pydantic", "huggingface_hub", "rustbpe", "pyarrow", "datasets", "rich", "fastapi", "uvicorn", "starlette",
          "prometheus_client", "pynvml",
          "matplotlib", "hypothesis", "openai", "httpx", "playwright", "wandb", "liger_kernel")  # fmt: skip


def hidden(folder):
    """A folder that, on PYTHONPATH, hides the other packages: importing one is an ImportError, in children too."""
    folder.mkdir(exist_ok=True)
    for name in OTHERS:
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError('{name} is hidden', name='{name}')\n")
    return str(folder)


def script(name, home, *words):
    """On the CPU: what measures a GPU would do so."""
    return run(home, sys.executable, "-m", name, *words, CUDA_VISIBLE_DEVICES="")


def run(home, *command, **more):
    path = os.pathsep.join([hidden(home / "hidden"), str(ROOT)])
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(home), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # those installed here want hypothesis and more
    return subprocess.run(command, cwd=ROOT, env={**environment, **more}, capture_output=True, text=True)


def test_what_is_hidden_cannot_be_imported(tmp_path):
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    try: importlib.import_module(name)\n"
    code += "    except ImportError: continue\n    print(name)\n"
    where = {**os.environ, "PYTHONPATH": hidden(tmp_path / "hidden")}
    made = subprocess.run([sys.executable, "-c", code, *OTHERS], env=where, capture_output=True, text=True)
    assert made.returncode == 0 and made.stdout == "", made.stdout + made.stderr


@pytest.mark.slow
def test_the_embedded_world_is_learnt_and_recorded(tmp_path):
    """Steps 3, 7 and 8 of GPU.md, small."""
    command = ("bash", "speedrun.sh", "--dry-run", "--data=embedded")
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    made = run(tmp_path, *command, NANOCHAT_PYTHON="python", PATH=here)  # as GPU.md has it
    assert made.returncode == 0 and "bits per byte" in made.stdout and "installing" not in made.stdout, made.stderr
    made = script("scripts.tok_train", tmp_path, "--run=a", "--vocab-size=512", "--max-chars=200000")
    assert made.returncode == 0, made.stderr
    sizes = ("--depth=1", "--head-dim=16", "--max-seq-len=32", "--device-batch-size=2", "--total-batch-size=64")
    short = ("--num-iterations=7", "--eval-tokens=64", "--eval-every=-1", "--compile=no", "--profile=1")
    made = script("scripts.base_train", tmp_path, "--run=a", *short, *sizes)
    assert made.returncode == 0, made.stderr
    assert "bits per byte" in made.stdout and "1 steps recorded" in made.stdout
    folder = tmp_path / "runs" / "a" / "base" / "profile"
    page = (folder / "profile.html").read_text()
    assert "A plot is missing here" in page and "could not be made" not in page
    trace = next(path for path in folder.iterdir() if "trace" in path.name)
    for words in (("trace", str(trace)), ("diff", str(folder / "profile.json"), str(folder / "profile.json"))):
        made = script("profiling", tmp_path, *words)
        assert made.returncode == 0, made.stderr
    for name, more in (
        ("tok_eval", ["--data=embedded"]),
        ("base_eval", ["--eval=bpb", "--split-tokens=64", "--data=embedded"]),
    ):
        made = script(f"scripts.{name}", tmp_path, "--run=a", *more)
        assert made.returncode == 0, (name, made.stderr)
    made = script("scripts.chat_eval", tmp_path, "--run=a", "--source=base", "--max-problems=2", "--max-new-tokens=2")
    assert made.returncode == 0, made.stderr
    made = script("scripts.report", tmp_path, "--run=a")
    assert made.returncode == 0, made.stderr


@pytest.mark.slow
def test_what_measures_works(tmp_path):
    """Steps 4 and 9 of GPU.md, small; 5 and 6 refuse a CPU."""
    made = script("benchmarks", tmp_path, "run", "--op=rotary", f"--out={tmp_path / 'first.json'}")
    assert made.returncode == 0 and (tmp_path / "first.html").is_file(), made.stderr
    sizes = "--depth=1 --width=128 --vocab-size=64 --prompt-tokens=3 --new-tokens=8 --batch-sizes=1 --repeats=1"
    made = script("scripts.infer_bench", tmp_path, *sizes.split(), "--profile=1")
    assert made.returncode == 0 and "first token" in made.stdout and "not recorded" not in made.stdout, made
    for name, words, why in (
        ("kernels", ["tune"], "tuning needs a CUDA device"),
        ("profiling", ["calibrate"], "torch sees no CUDA device"),
    ):
        made = script(name, tmp_path, *words)
        assert made.returncode == 2 and why in made.stderr and "Traceback" not in made.stderr, made.stderr


@pytest.mark.slow
def test_the_oldest_torch_and_triton(tmp_path):
    """The tests of kernels, a compiled training and the benchmarks, with another Python that has the packages above."""
    other = os.environ.get("NANOCHAT_OTHER_PYTHON")
    if not other:
        pytest.skip("NANOCHAT_OTHER_PYTHON names no Python with torch 2.11 and Triton 3.6 (say) to run this with")

    def there(*words):
        made = run(tmp_path, other, "-m", *words)
        assert made.returncode == 0, (words, made.stdout[-3000:], made.stderr[-3000:])
        return made.stdout

    files = [f"tests/test_{name}.py" for name in ("ops", "triton", "probing", "dispatch", "attention", "fp8", "optim")]
    there("pytest", "-q", "-p", "no:cacheprovider", *files)
    there("benchmarks", "run", "--op=rotary", f"--out={tmp_path / 'first.json'}")
    there("scripts.tok_train", "--run=a", "--vocab-size=512", "--max-chars=200000")
    sizes = "--depth=2 --head-dim=16 --max-seq-len=32 --device-batch-size=2 --total-batch-size=64 --eval-tokens=64"
    assert ", compiled" in there("scripts.base_train", "--run=a", "--num-iterations=4", *sizes.split())


def test_what_needs_more_says_so(tmp_path):
    made = script("scripts.chat_web", tmp_path, "--run=a")
    assert made.returncode == 2 and "pip install" in made.stderr and "Traceback" not in made.stderr, made.stderr
    made = script("scripts.tok_train", tmp_path, "--run=a", "--data=hub")
    assert made.returncode == 2 and "Traceback" not in made.stderr, made.stderr


@pytest.mark.slow
def test_kernels_tools_and_benchmarks_start(tmp_path):
    assert script("kernels", tmp_path).returncode == 0
    for words in (["kernels"], ["benchmarks"], ["profiling"], ["profiling", "calibrate"]):
        made = script(words[0], tmp_path, *words[1:], "--help")
        assert made.returncode == 0, (words, made.stderr)


@pytest.mark.slow
def test_tests_of_kernels_are_collected(tmp_path):
    files = [f"tests/test_{name}.py" for name in ("ops", "triton", "probing", "any_shape", "attention", "fp8")]
    made = script("pytest", tmp_path, "--collect-only", "-q", *files)
    assert made.returncode == 0, made.stdout[-2000:]


def test_parquet_without_pyarrow_is_one_sentence(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.parquet").write_bytes(b"PAR1")
    made = script("scripts.tok_train", tmp_path, "--run=a", f"--data={tmp_path / 'mine'}")
    assert made.returncode == 2 and "parquet files need pyarrow (pyarrow" in made.stderr
    assert "pip install pyarrow" in made.stderr


@pytest.mark.parametrize("texts", [["aaaa aaaa", "ab ab ba"], tiny.sentences(300), ["héé 日本日本 12345 12"], [""]])
def test_merges_are_those_of_rustbpe(texts):
    pytest.importorskip("rustbpe", reason="rustbpe is not installed, so there is nothing to compare with")
    found = bpe.learn(texts, 400, tokenizer.SPLIT_PATTERN)
    assert found == tokenizer._learn(texts, 400)


def test_merges_of_the_embedded_world_are_those_of_rustbpe():
    pytest.importorskip("rustbpe", reason="rustbpe is not installed, so there is nothing to compare with")
    source = choose.documents("embedded", 0)
    texts = [text for unit in range(20) for text in source.load("train", unit)]
    assert bpe.learn(texts, 1500, tokenizer.SPLIT_PATTERN) == tokenizer._learn(texts, 1500)
