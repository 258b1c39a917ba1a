"""One training as a cell of a grid: the scripts that a user runs, in this process, in float32 on a CPU.

`tokenizer` and `base` are tok_train and base_train, `chat` is mid_train and chat_sft, `ask` chat_eval. A run's folder
is removed once its numbers are known.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch

from nanochat.calculator import calculate
from nanochat.chat import Tool
from nanochat.chat_stages import ChatFlags, run_chat_stage
from nanochat.engine import Sampling
from nanochat.evaluate.askers import How, of_model
from nanochat.evaluate.chat_tasks import TaskResult, evaluate
from nanochat.hardware import Hardware
from nanochat.hardware import setup as look_at_hardware
from nanochat.log import LOG
from nanochat.run import Run
from nanochat.tasks import Task
from nanochat.tokenizer import Tokenizer
from scripts import base_train, tok_train

# Of a small model trained for some hundred steps: nanochat/presets.py's `small`, with the recipe's decay kept.
RATES = dict(embedding_lr=1.2, unembedding_lr=0.032, matrix_lr=0.08)
# Sizes that experiments have in common: of a smoke run of base training, and of a chain of base, mid and SFT.
SMOKE = dict(depth=2, aspect_ratio=16, head_dim=16, max_seq_len=32, window_pattern="L", device_batch_size=2,
             total_batch_size=64, eval_tokens=64, weight_decay=0.0)  # fmt: skip
CHAIN = dict(depth=3, aspect_ratio=43, head_dim=64, max_seq_len=128, window_pattern="L", device_batch_size=16,
             total_batch_size=4096, eval_tokens=8192, weight_decay=0.0, mid_steps=160, sft_steps=120,
             limit=40)  # fmt: skip
CHAIN_SMOKE = dict(depth=1, aspect_ratio=32, head_dim=32, max_seq_len=64, window_pattern="L", device_batch_size=2,
                   total_batch_size=128, eval_tokens=128, weight_decay=0.0, mid_steps=1, sft_steps=1,
                   limit=3)  # fmt: skip


def hardware(dtype: torch.dtype = torch.float32) -> Hardware:
    """float32 on a CPU, so that small differences are the cells' own; a GPU's own dtype."""
    found = look_at_hardware("")
    return dataclasses.replace(found, dtype=dtype) if found.device.type == "cpu" else found


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """What scripts print is kept apart: the runner has a line a cell."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said


@functools.cache
def tokenizer(vocab_size: int, data: str) -> Tokenizer:
    """All cells of this size have the same one, which stays; also those that patch the microworld later."""
    run = Run.open(f"experiment-tokenizer-{data}-{vocab_size}")
    flags = tok_train.Flags(run=run.name, data=data, vocab_size=vocab_size)
    flags.max_chars = 300_000 if data == "embedded" else -1
    with quiet():
        tok_train.train(flags, run)
    return run.tokenizer()


@contextlib.contextmanager
def base(
    name: str,
    seed: int,
    dtype: torch.dtype = torch.float32,
    vocab_size: int = 512,
    text: str = "",
    data: str = "embedded",
    **flags: Any,
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Trains a base model; gives its run, removed at the end, and its summary.

    data: of the tokenizer, and what is read, unless `text` is that. flags: others of base_train. What a cell that was
    stopped has left behind is begun again.
    """
    run = Run.open(f"experiment-{name}-seed{seed}")
    shutil.rmtree(run.folder, ignore_errors=True)
    tokenizer(vocab_size, data).save(run.stage("tokenizer"))
    given: Mapping[str, Any] = {**RATES, **dict(eval_every=-1, sample_every=-1, compile="no"), **flags}
    asked = base_train.Flags(run=run.name, data=text or data, seed=seed, **given)
    with quiet():
        base_train.train(asked, run, hardware(dtype))
    summary = run.summary("base")
    assert summary is not None
    yield run, summary
    shutil.rmtree(run.folder)


def losses(run: Run) -> list[float]:
    """The training loss of every step, in nats."""
    rows = [json.loads(line) for line in (run.stage("base") / LOG).read_text("utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def chat(run: Run, stage: str, seed: int, **flags: Any) -> None:
    """Trains stage "mid" or "sft" of a run, in float32. flags: of the script."""
    few = dict(eval_every=-1, eval_tokens=1024, compile="no")  # its bits per byte are not looked at
    given: dict[str, Any] = {**few, **flags}
    with quiet(), mock.patch.dict(os.environ, NANOCHAT_DTYPE="float32"):
        run_chat_stage(stage, ChatFlags(run=run.name, seed=seed, **given))


def base_flags(size: Mapping[str, Any]) -> dict[str, Any]:
    """What of a chain's size is base_train's: the rest is `chat_chain`'s, and how many questions are asked (`most`)."""
    return {
        key: value for key, value in size.items() if key not in ("mid_steps", "sft_steps", "most", "limit", "wordings")
    }


def chat_chain(run: Run, seed: int, size: Mapping[str, Any]) -> None:
    """Mid-training and SFT of a base model, in so many steps as the size says."""
    chat(run, "mid", seed, num_iterations=size["mid_steps"], init_lr_frac=0.5)
    chat(run, "sft", seed, num_iterations=size["sft_steps"], init_lr_frac=0.2)


def ask(
    run: Run, stage: str, tasks: list[Task], most: int, limit: int, tool: Tool = calculate
) -> dict[str, TaskResult]:
    """Each task's first `most` questions, answered greedily by the stage's model, in `limit` tokens at most."""
    there = hardware()
    model = run.checkpoint(stage).model(there.device, there.dtype)
    asker, _ = of_model(model, run.tokenizer(), 64, How(Sampling(temperature=0), tool, limit=limit))
    return {task.name: evaluate(task, most, asker, there) for task in tasks}
