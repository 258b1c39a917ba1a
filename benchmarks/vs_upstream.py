"""Our training step and decoding beside nanochat's own, on this machine: `--upstream DIR` is a clone of it.

    python -m benchmarks.vs_upstream --upstream ../nanochat

Every contender runs in a process and environment of its own, from the same weights and on the same tokens; they take
turns, a step each, and the medians are reported: tokens per second, peak memory, the loss after all steps. Upstream
runs at its default (float32 on a CPU) and at its best (bfloat16, where the processor has it).
"""

import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.our_step import drawn_weights
from benchmarks.worker import sizes
from nanochat.errors import UserError
from nanochat.flags import flag, listed, number, parse, path, run_script
from nanochat.hardware import cpu_has_bf16, device_name
from nanochat.turns import measure, start
from scripts import infer_bench

ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).parent / "train_worker.py"
PARTS = ("train", "decode")
WARM = 3  # steps that are not timed: on a GPU, the third of ours is captured as a graph


@dataclass
class Flags:
    upstream: str = path("", "a clone of karpathy/nanochat")
    what: str = flag("train,decode", "which of the two, comma-separated")
    depth: int = number(6, 1, 1000, "layers of the model")
    width: int = number(384, 128, 1 << 16, "channels; heads are of 128", multiple=128)
    vocab_size: int = number(32768, 1, 1 << 24, "words of the vocabulary")
    sequence_len: int = number(512, 2, 1 << 20, "tokens of context")
    batch: int = number(16, 1, 1 << 16, "rows of a training step")
    steps: int = number(8, 1, 10_000, "training steps that are timed, after three that compile and warm up")
    compile: bool = flag(True, "torch.compile, as both do by default")
    threads: int = number(0, 0, 4096, "threads of each (0: torch's own choice)")


def contenders(flags: Flags) -> dict[str, tuple[str, str]]:
    """Name → (folder, dtype asked for; "" is its own choice)."""
    found = {"ours": (str(ROOT), ""), "upstream, default": (flags.upstream, "")}
    if not torch.cuda.is_available() and cpu_has_bf16():
        found["upstream, best"] = (flags.upstream, "bfloat16")
    return found


def train(flags: Flags) -> list[dict[str, Any]]:
    """A row per contender: median tok/s, peak memory, the mean loss of the last half of the steps."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {**asdict(flags), "weights_file": drawn_weights(sizes(asdict(flags)), folder)}
        workers = {
            name: start(home, {**settings, "dtype": dtype}, WORKER) for name, (home, dtype) in contenders(flags).items()
        }
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
        try:
            for turn in range(WARM + flags.steps):
                for name, worker in workers.items():
                    runs[name].append(measure(worker, 1))
                    last = runs[name][-1]
                    kind = f"step {turn}" if turn >= WARM else "warming up"
                    print(
                        f"{kind:10} {name:18} {last['tok_per_s']:8.0f} tok/s, loss {last['losses'][0]:.4f}", flush=True
                    )
        finally:
            for worker in workers.values():
                worker.kill()
                worker.wait()
    rows = []
    for name, found in runs.items():
        losses = [run["losses"][0] for run in found]
        row = dict(what="train", who=name, about=found[0]["about"], peak_mb=found[-1]["peak_mb"], losses=losses)
        rate = statistics.median(run["tok_per_s"] for run in found[WARM:])
        rows.append(dict(row, tok_per_s=rate, loss=statistics.mean(losses[-(len(losses) // 2) :])))
    return rows


def decode(flags: Flags) -> list[dict[str, Any]]:
    """The rows of scripts.infer_bench, at each one's default and with both in bfloat16."""
    rows = []
    for dtype in dict.fromkeys(dtype for _, dtype in contenders(flags).values()):
        asked = infer_bench.Flags(flags.depth, flags.width, flags.vocab_size, flags.sequence_len)
        asked.upstream, asked.dtype = flags.upstream, dtype
        rows += [dict(row, what="decode", dtype=dtype or "default") for row in infer_bench.run(asked)["rows"]]
    return rows


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ours is against each other contender in training."""
    found = []
    for other in rows[1:]:
        found.append(
            dict(
                against=other["who"],
                speed=rows[0]["tok_per_s"] / other["tok_per_s"],
                memory=rows[0]["peak_mb"] / other["peak_mb"],
                loss=rows[0]["loss"] / other["loss"],
            )
        )
    return found


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    if not (Path(flags.upstream) / "nanochat" / "gpt.py").is_file():
        raise UserError(f"--upstream {flags.upstream!r}: there is no nanochat/gpt.py in it; clone karpathy/nanochat")
    parts = listed("what", flags.what, PARTS)
    machine = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    shown = {**asdict(flags), "upstream": True}
    result: dict[str, Any] = dict(machine=machine, torch=torch.__version__, flags=shown, train=[], decode=[])
    if "train" in parts:
        result["train"] = train(flags)
        result["ratios"] = ratios(result["train"])
        for row in result["train"]:
            print(
                f"{row['who']:18} {row['tok_per_s']:8.0f} tok/s, peak memory {row['peak_mb']:6.0f} MB, "
                f"loss {row['loss']:.4f}  ({row['about']})"
            )
        for row in result["ratios"]:
            print(
                f"against {row['against']}: {row['speed']:.2f} times its speed, {row['memory']:.2f} of its memory, "
                f"{row['loss']:.4f} of its loss"
            )
    if "decode" in parts:
        result["decode"] = decode(flags)
    print(json.dumps(result))


if __name__ == "__main__":
    run_script(main)
