"""Small things that several tests need: a text, a tokenizer, a model, scripts in this process, what a card lacks."""

import functools
import gc
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from kernels import architectures, triton_utils, tuned
from nanochat import interrupt, launch
from nanochat.flags import run_script
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer

WORDS = (
    "the a small big red old river house dog cat sees likes finds near under and then not it was is to of in".split()
)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Nonsense in few words, the same on every run."""
    return list(_sentences(count, seed))


@functools.cache
def _sentences(count: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(count):
        length = int(torch.randint(5, 40, (1,), generator=generator))
        picks = torch.randint(len(WORDS), (length,), generator=generator)
        texts.append(" ".join(WORDS[i] for i in picks).capitalize() + ".")
    return texts


def tokenizer(vocab_size: int = 300) -> Tokenizer:
    return Tokenizer.train(sentences(200), vocab_size)


def model(vocab_size: int = 300, seed: int = 0, **sizes) -> GPT:
    """A GPT of 2 layers whose every parameter is random, so that nothing is zero."""
    defaults = dict(sequence_len=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL")
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(vocab_size=vocab_size, **{**defaults, **sizes}))
    gpt.init_weights()
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return gpt


def live_on(handlers: dict) -> None:
    """What ends a script's process after a signal does not end this one, which gets back its handlers."""
    if interrupt.ending:
        interrupt.ending.cancel()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def call(script: str, *argv: str) -> int:
    """Runs `python -m scripts.NAME argv` in this process; returns the exit code."""
    return call_module(f"scripts.{script}", *argv)


def call_module(name: str, *argv: str) -> int:
    """Runs `python -m NAME argv`, whose `main` is run by run_script, in this process; returns the exit code."""
    module = importlib.import_module(name)
    before, sys.argv = sys.argv, [name, *argv]
    handlers = {number: signal.getsignal(number) for number in launch.SIGNALS}
    try:
        return called(module.main)
    finally:
        sys.argv = before
        live_on(handlers)


def called(main: Callable[[], None]) -> int:
    """Runs it as a script's main; returns the exit code."""
    with pytest.raises(SystemExit) as ended, pytest.MonkeyPatch.context() as patched:
        patched.setattr(gc, "collect", lambda: 0)  # half a second a training, most of it for what other tests have left
        run_script(main)
    code = ended.value.code
    return code if isinstance(code, int) else 1


def refused(op: str, dtype: torch.dtype = torch.float32) -> str:
    """Why the card that tests run on has no kernels of this op; "" where it has, and on a CPU, where all are run."""
    if not torch.cuda.is_available():
        return ""
    return architectures.refused(op, tuned.architecture(0), dtype)


def skip_refused(op: str, dtype: torch.dtype = torch.float32) -> None:
    """Skips the test, saying why, where the card has no kernels of this op."""
    if why := refused(op, dtype):
        pytest.skip(f"{op}: {why}")


def interpreted_elsewhere(request: pytest.FixtureRequest) -> None:
    """Runs this test again in a process that sees no card, so that kernels are interpreted. Fails with what it said."""
    first_two = lambda package: tuple(int(part) for part in package.__version__.split(".")[:2])
    if first_two(np) >= (2, 4) and first_two(triton_utils.triton) < (3, 7):
        pytest.skip(f"the interpreter of Triton before 3.7 does not take numpy {np.__version__}, only up to 2.3")
    path, _, name = request.node.nodeid.partition("::")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"{request.node.path}::{name}"]
    where = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # tests/conftest.py then has Triton interpret
    made = subprocess.run(command, env=where, cwd=request.config.rootpath, capture_output=True, text=True)
    assert made.returncode == 0 and "1 passed" in made.stdout, f"{path}: {made.stdout[-3000:]}{made.stderr[-3000:]}"
