"""CORE by our scorer beside nanochat's own, on this machine: `--upstream DIR` is a clone of it.

    python -m benchmarks.core_eval --upstream ../nanochat --tokenizer DIR --max-per-task 50

Each runs in a process of its own, in float32 on the CPU, with the same weights (all drawn at random: zero projections
would hide differences), tokenizer and rows. They take turns, a task each. Reported: seconds by the clock and of the
CPU, memory above the loaded model, and the rows on which they differ. --tokenizer is a folder with a tokenizer.json.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.environment import environment
from benchmarks.worker import sizes
from nanochat.errors import UserError
from nanochat.evaluate import bundle
from nanochat.flags import MANY, number, parse, path, run_script
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer
from nanochat.turns import measure, start

ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).parent / "core_worker.py"


@dataclass
class Flags:
    upstream: str = path("", "a clone of karpathy/nanochat")
    tokenizer: str = path("", "folder with the tokenizer.json that both use")
    bundle: str = path("", "the evaluation bundle (default: as scripts.base_eval finds it)")
    max_per_task: int = number(50, 1, MANY, "rows of each task (-1: all)", also=-1)
    depth: int = number(6, 1, 1000, "layers of the model")
    width: int = number(384, 128, 1 << 16, "channels; heads are of 128", multiple=128)
    sequence_len: int = number(2048, 2, 1 << 20, "tokens of context")
    budget: int = number(2048, 1, MANY, "tokens that ours computes at a time")
    out: str = path("", "write the result to this JSON file too")


def drawn(config: GPTConfig, seed: int = 0) -> GPT:
    """A model all of whose weights are drawn, none zero."""
    torch.manual_seed(seed)
    model = GPT(config)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def run(flags: Flags, weights: str, config: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """A row per task: seconds and memory of both, and the rows on which they differ."""
    home = str(bundle.find(flags.bundle).resolve())
    settings = dict(asdict(flags), weights_file=weights, config=config, bundle=home, tokenizer=flags.tokenizer)
    workers = {
        who: start(folder, settings, WORKER) for who, folder in (("ours", str(ROOT)), ("upstream", flags.upstream))
    }
    rows = []
    try:
        for number, name in enumerate(names):
            found = {who: measure(worker, number) for who, worker in workers.items()}
            one, two = found["ours"], found["upstream"]
            differ = [i for i, pair in enumerate(zip(one["right"], two["right"], strict=True)) if pair[0] != pair[1]]
            row = dict(task=name, n=len(one["right"]), differ=differ, load=os.getloadavg()[0])
            for who, reply in found.items():
                kept = {key: reply[key] for key in ("seconds", "cpu_seconds", "above_mb")}
                row[who] = dict(accuracy=sum(reply["right"]) / len(reply["right"]), **kept)
            rows.append(row)
            print(
                f"{name:32} ours {one['cpu_seconds']:7.1f} CPU s, {one['above_mb']:5.0f} MB; upstream "
                f"{two['cpu_seconds']:7.1f} CPU s, {two['above_mb']:5.0f} MB; {two['seconds'] / one['seconds']:5.1f} "
                f"times as fast by the clock; {len(differ)} of {row['n']} rows differ",
                flush=True,
            )
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return rows


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    if not (Path(flags.upstream) / "nanochat" / "core_eval.py").is_file():
        raise UserError(
            f"--upstream {flags.upstream!r}: there is no nanochat/core_eval.py in it; clone karpathy/nanochat"
        )
    tokenizer = Tokenizer.load(Path(flags.tokenizer))
    names = [task.label for task in bundle.load(bundle.find(flags.bundle)).tasks]
    config = sizes(dict(asdict(flags), vocab_size=tokenizer.vocab_size))
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "weights.safetensors")
        save_file(drawn(GPTConfig(**config)).state_dict(), weights)
        rows = run(flags, weights, config, names)
    total = {
        key: [sum(row[who][key] for row in rows) for who in ("ours", "upstream")] for key in ("seconds", "cpu_seconds")
    }
    longest = max(rows, key=lambda row: row["upstream"]["above_mb"])
    shown = dict(asdict(flags), upstream=True, tokenizer=tokenizer.fingerprint, bundle=True, out=None)
    result = dict(
        environment=environment(), flags=shown, config=config, rows=rows, **total,
        speed=total["seconds"][1] / total["seconds"][0], cpu_speed=total["cpu_seconds"][1] / total["cpu_seconds"][0],
        memory=longest["ours"]["above_mb"] / longest["upstream"]["above_mb"], memory_of=longest["task"],
        differ=sum(len(row["differ"]) for row in rows),
    )  # fmt: skip
    print(
        f"{result['speed']:.2f} times upstream's speed by the clock, {result['cpu_speed']:.2f} by CPU time, "
        f"{result['memory']:.3f} of its memory on {longest['task']}; "
        f"{result['differ']} rows differ"
    )
    if flags.out:
        Path(flags.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    run_script(main, goes_on=True)
