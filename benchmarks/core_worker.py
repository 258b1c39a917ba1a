"""Answers CORE's tasks with one implementation, ours or upstream's, in a process of its own: a task's number in, a JSON
line out: whether each row was answered rightly, seconds (by the clock, and of the CPU: what a machine that has other
work too does not change), and memory above the loaded model.

Called by benchmarks/core_eval.py and tests/test_core_upstream.py with the folder from which `nanochat` is imported, and
the settings as JSON: weights and tokenizer (ours, as files), the model's config, the bundle, max_per_task.
"""

import base64
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from worker import serve

folder, settings = sys.argv[1], json.loads(sys.argv[2])
sys.path[0] = folder  # not this file's own folder
Answer = Callable[[int], list[bool]]


def ours() -> tuple[Answer, str]:
    from nanochat.evaluate import bundle, core
    from nanochat.evaluate.core_batches import OurModel
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.tokenizer import Tokenizer

    with torch.device("meta"):
        model = GPT(GPTConfig(**settings["config"]))
    model.to_empty(device="cpu")
    model.load_state_dict(load_file(settings["weights_file"]))
    model.set_dtype(torch.float32)
    asked = OurModel(model, Tokenizer.load(Path(settings["tokenizer"])), settings.get("budget", 2048))
    tasks = bundle.load(Path(settings["bundle"])).tasks

    def answer(number: int) -> list[bool]:
        answers = core.answer(asked, tasks[number], max_per_task=settings["max_per_task"])
        if isinstance(answers, str):
            raise RuntimeError(answers)
        return answers.right

    return answer, "ours"


def upstream() -> tuple[Answer, str]:
    import tiktoken
    import yaml
    from nanochat.core_eval import evaluate_example

    from nanochat.gpt import GPT, GPTConfig
    from nanochat.tokenizer import RustBPETokenizer

    with torch.device("meta"):
        model = GPT(GPTConfig(**settings["config"]))
    model.to_empty(device="cpu")
    model.init_weights()  # the rotary tables
    model.load_state_dict(load_file(settings["weights_file"]))
    model.eval()
    described = json.loads((Path(settings["tokenizer"]) / "tokenizer.json").read_text())
    merges = [base64.b64decode(token) for token in described["merges"]]
    special = {name: len(merges) + i for i, name in enumerate(described["special_tokens"])}
    ranks = {token: i for i, token in enumerate(merges)}
    encoding = tiktoken.Encoding("same", pat_str=described["pattern"], mergeable_ranks=ranks, special_tokens=special)
    tokenizer = RustBPETokenizer(encoding, "<|bos|>")
    home = Path(settings["bundle"])
    tasks = yaml.safe_load((home / "core.yaml").read_text())["icl_tasks"]

    def answer(number: int) -> list[bool]:
        task = tasks[number]
        lines = (home / "eval_data" / task["dataset_uri"]).read_text().strip().split("\n")
        rows = [json.loads(line) for line in lines]
        random.Random(1337).shuffle(rows)
        if settings["max_per_task"] > 0:
            rows = rows[: settings["max_per_task"]]
        how = dict(task_type=task["icl_task_type"], num_fewshot=task["num_fewshot"][0])
        how["continuation_delimiter"] = task.get("continuation_delimiter", " ")
        device = torch.device("cpu")
        return [bool(evaluate_example(i, model, tokenizer, rows, device, how)) for i in range(len(rows))]

    return answer, "upstream"


def memory(name: str) -> float:
    """MiB that Linux counts of this process: VmRSS now, VmHWM the most since it was last reset."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 1024


def measure(answer: Answer, number: int) -> dict[str, Any]:
    """A task's answers. The first call also notes what memory the loaded model takes."""
    global before
    before = before or memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    started, computing = time.perf_counter(), time.process_time()
    right = answer(number)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - computing
    return dict(right=right, seconds=seconds, cpu_seconds=cpu_seconds, above_mb=memory("VmHWM") - before)


before = 0.0
if __name__ == "__main__":
    serve(folder, ours, upstream, measure)
