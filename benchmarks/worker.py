"""What the processes of a side-by-side measurement have in common: the model's sizes, and orders in, answers out."""

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch

PROMPT = 16  # tokens


def sizes(settings: dict[str, Any]) -> dict[str, int]:
    """The arguments of a GPTConfig, ours or upstream's."""
    heads = settings["width"] // 128
    return dict(
        sequence_len=settings["sequence_len"], vocab_size=settings["vocab_size"], n_layer=settings["depth"],
        n_head=heads, n_kv_head=heads, n_embd=settings["width"],
    )  # fmt: skip


def settings(flags: dict[str, Any], weights_file: str) -> dict[str, Any]:
    """What the workers that train and that decode read beside the model's sizes; what is decoded fills the context."""
    train = dict(weights_file=weights_file, dtype="", threads=0, steps=8)
    decode = dict(weights="", prompt_tokens=PROMPT, new_tokens=flags["sequence_len"] - PROMPT, profile=0)
    return {**flags, **train, **decode}


def serve(
    folder: str,
    ours: Callable[[], tuple[Any, str]],
    upstream: Callable[[], tuple[Any, str]],
    measure: Callable[[Any, int], dict[str, Any]],
) -> None:
    """Builds whichever of the two the folder holds, then answers each number on stdin with a JSON line."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed by what we measure is not a reply
    built, about = ours() if os.path.exists(os.path.join(folder, "kernels", "__init__.py")) else upstream()
    for line in sys.stdin:
        reply = measure(built, int(line))
        print(json.dumps(dict(reply, peak_mb=peak() / 2**20, about=about)), file=replies, flush=True)


def peak() -> int:
    """Most bytes in use so far, on the GPU where there is one. On Linux getrusage would count those of the process that
    started this one.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        with open("/proc/self/status") as status:
            return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
