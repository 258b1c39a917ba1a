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
OTHERS = ("rustbpe", "pyarrow", "datasets", "rich", "fastapi", "uvicorn", "starlette", "prometheus_client", "pynvml",
          "matplotlib", "hypothesis", "openai", "httpx", "playwright", "wandb", "liger_kernel")  # fmt: skip
ABSENT = f"import sys\nfor name in {OTHERS}:\n    sys.modules[name] = None\n"  # importing them is an ImportError


def run(code, home, *words):
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # those installed here want hypothesis and more
    command = [sys.executable, "-c", ABSENT + code, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def script(name, home, *words):
    code = f"import runpy\nsys.argv = ['{name}', *sys.argv[1:]]\nrunpy.run_module('{name}', run_name='__main__')\n"
    return run(code, home, *words)


def test_the_embedded_world_is_learnt(tmp_path):
    made = script("scripts.tok_train", tmp_path, "--run=a", "--vocab-size=512", "--max-chars=200000")
    assert made.returncode == 0, made.stderr
    sizes = ("--depth=1", "--head-dim=16", "--max-seq-len=32", "--device-batch-size=2", "--total-batch-size=64")
    made = script(
        "scripts.base_train", tmp_path, "--run=a", "--num-iterations=2", "--eval-tokens=64", "--compile=no", *sizes
    )
    assert made.returncode == 0, made.stderr
    assert "bits per byte" in made.stdout


def test_kernels_tools_and_benchmarks_start(tmp_path):
    assert script("kernels", tmp_path).returncode == 0
    for name in ("kernels", "benchmarks", "profiling.calibrate"):
        made = script(name, tmp_path, "--help")
        assert made.returncode == 0, (name, made.stderr)
    refused = script("kernels", tmp_path, "tune")
    assert refused.returncode == 2 and "tuning needs a CUDA device" in refused.stderr


def test_tests_of_kernels_are_collected(tmp_path):
    files = [f"tests/test_{name}.py" for name in ("ops", "triton", "probing", "any_shape", "attention", "fp8")]
    made = run("import pytest\nsys.exit(pytest.main(sys.argv[1:]))", tmp_path, "--collect-only", "-q", *files)
    assert made.returncode == 0, made.stdout[-2000:]


def test_parquet_without_pyarrow_is_one_sentence(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.parquet").write_bytes(b"PAR1")
    made = script("scripts.tok_train", tmp_path, "--run=a", f"--data={tmp_path / 'mine'}")
    assert made.returncode == 2 and "parquet files need pyarrow: pip install pyarrow" in made.stderr


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
