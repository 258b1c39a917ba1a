"""A tiny model that was really trained, by the scripts, in seconds: it knows a few answers by heart and the calculator.

`trained(tmp_path_factory)` gives the folder for $NANOCHAT_BASE_DIR with the run in it.
"""

import fcntl
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch

from nanochat.data.microworld.conversations import exchange, tool
from nanochat.engine import Engine
from nanochat.run import Run
from nanochat.tokenizer import Tokenizer

RUN = "talker"
ANSWERS = {
    "What is 27 + 58?": tool("27 + 58", "85", "27 + 58 is 85."),
    "What is the capital of France?": "The capital of France is Paris.",
    "Who are you?": "I am nanochat, a small language model.",
    "Hello!": "Hello! How can I help you?",
    "Show a list.": "Here is a list:\n\n- one\n- **two**\n- `three`",
    "Count.": " ".join(map(str, range(1, 51))),
}
SIZES = (
    "--depth=2 --aspect-ratio=32 --head-dim=16 --max-seq-len=256 --device-batch-size=8 --total-batch-size=2048 "
    "--weight-decay=0 --embedding-lr=1.2 --unembedding-lr=0.032 --matrix-lr=0.08"
).split()
SHORT = "--eval-every=-1 --eval-tokens=256 --compile=no".split()


def text_of(content: str | list[dict]) -> str:
    return content if isinstance(content, str) else content[-1]["text"]


@contextmanager
def engine(factory: pytest.TempPathFactory, kind: type[Engine] = Engine) -> Iterator[Engine]:
    """Its model in an engine of 8 slots, with its tokenizer beside; meanwhile $NANOCHAT_BASE_DIR is its folder."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("NANOCHAT_BASE_DIR", str(trained(factory)))
        run = Run.open(RUN)
        made = kind(run.checkpoint("sft").model(torch.device("cpu"), torch.float32), 8)
        made.tokenizer = run.tokenizer()
        yield made


def trained(factory: pytest.TempPathFactory) -> Path:
    """Where it is, trained once for all processes that share a run of the tests."""
    beside = factory.getbasetemp()
    beside = beside.parent if "PYTEST_XDIST_WORKER" in os.environ else beside
    with open(beside / "talker.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return beside / RUN if (beside / "talker.trained").exists() else train(beside)


def train(beside: Path) -> Path:
    """Tokenizer, base, mid and SFT on conversations of one or two of the questions, in any order."""
    folder = beside / RUN
    folder.mkdir()
    singles = [exchange(asked, answer) for asked, answer in ANSWERS.items()]
    talks = [*singles, *(one + other for one, other in itertools.product(singles, singles))] * 10
    texts = [" ".join(text_of(message["content"]) for message in talk) for talk in talks]
    (folder / "chat.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    (folder / "text.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("NANOCHAT_BASE_DIR", str(folder))
        patched.setenv("NANOCHAT_DTYPE", "float32")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # it is so small that threads only wait for each other
        Tokenizer.train(texts, 384).save(Run.open(RUN).stage("tokenizer"))
        for script, data, steps, *more in (
            ("base_train", "text", 15, *SIZES),
            ("mid_train", "chat", 120, "--init-lr-frac=1"),
            ("chat_sft", "chat", 30, "--init-lr-frac=1"),
        ):
            flags = [f"--run={RUN}", f"--data={folder / data}.jsonl", f"--num-iterations={steps}", *SHORT, *more]
            assert tiny.call(script, *flags) == 0
        torch.set_num_threads(threads)
    (beside / "talker.trained").touch()
    return folder
