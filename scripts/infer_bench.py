"""Measure inference: time to first token, tokens per second by batch, memory; --upstream DIR puts nanochat's beside it.

Each row also says what a step must read and compute, over its time, as shares of the card's peaks (of a CPU: of what a
copy and a product reach here). Weights are random. Each engine has a process for each batch; they take turns, and
medians are reported.
"""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat.engine import weights
from nanochat.engine.rates import used
from nanochat.errors import UserError
from nanochat.evaluate import rounding
from nanochat.flags import flag, number, parse, path, run_script
from nanochat.gpt import GPTConfig
from nanochat.hardware import DTYPES, device_name, has_gpu, setup
from nanochat.run import Run
from nanochat.turns import Worker, measure, start

WORKER = Path(__file__).parent.parent / "benchmarks" / "decode_worker.py"


@dataclass
class Flags:
    depth: int = number(6, 1, 1000, "layers of the model")
    width: int = number(384, 128, 1 << 16, "channels; heads are of 128", multiple=128)
    vocab_size: int = number(32768, 1, 1 << 24, "words of the vocabulary")
    sequence_len: int = number(512, 2, 1 << 20, "tokens of context")
    batch_sizes: str = flag("1,8,32", "how many sequences at a time, comma-separated")
    prompt_tokens: int = number(32, 1, 1 << 20, "length of the prompts")
    new_tokens: int = number(64, 2, 1 << 20, "tokens made per sequence")
    repeats: int = number(5, 1, 10_000, "runs of each, in turns")
    dtype: str = flag("", "float32 | bfloat16 (default: each engine's own choice)")
    weights: str = flag("", "int8: weights of 8 bits too, on a CPU (default: in the compute dtype alone)")
    run: str = flag("", "with --weights int8: scores of this run's model with and without, kept for its report")
    upstream: str = path("", "a clone of karpathy/nanochat to run beside ours")
    profile: int = number(0, 0, 10_000, "warm steps of ours to record in $NANOCHAT_BASE_DIR/infer_bench/ (0: none)")


def profile(worker: Worker, batch: int) -> None:
    try:
        print(measure(worker, -batch)["said"], flush=True)
    except UserError as problem:  # what was measured stays
        print(f"infer_bench, batch {batch}: not recorded: {problem}", flush=True)


def run(flags: Flags) -> dict[str, Any]:
    """Measures, and prints a line for each engine and batch. Raises UserError for flags that make no sense."""
    try:
        batches = [int(size) for size in flags.batch_sizes.split(",")]
    except ValueError:
        raise UserError(f"--batch-sizes is {flags.batch_sizes!r}, wanted numbers separated by commas") from None
    if not all(1 <= batch <= 4096 for batch in batches):
        raise UserError(f"--batch-sizes is {flags.batch_sizes!r}, wanted each of 1 to 4096")
    if flags.prompt_tokens + flags.new_tokens > flags.sequence_len:
        raise UserError("prompt and new tokens must fit --sequence-len")
    if flags.dtype not in ("", "float32", "bfloat16"):
        raise UserError(f"--dtype is {flags.dtype!r}, wanted float32 or bfloat16")
    weights.check(flags.weights, device := torch.device("cuda" if has_gpu() else "cpu"))
    if flags.upstream and not (Path(flags.upstream) / "nanochat" / "engine.py").is_file():
        raise UserError(f"--upstream {flags.upstream}: there is no nanochat/engine.py in it")
    if flags.run and not flags.weights:
        raise UserError("--run is for the scores of int8 weights: give --weights int8 too")
    scored = Run.open(flags.run) if flags.run else None
    from profiling.recorded import record

    record.check(flags.profile, flags.new_tokens, f"a run here has {flags.new_tokens}", "make more (--new-tokens)")
    here, given = str(Path(__file__).parent.parent), asdict(flags)
    hows = dict(ours=(here, given | dict(weights="")), int8=(here, given), upstream=(flags.upstream, given))
    names = ["ours", *(["int8"] if flags.weights else []), *(["upstream"] if flags.upstream else [])]
    heads = flags.width // 128
    config = GPTConfig(flags.sequence_len, flags.vocab_size, flags.depth, heads, heads, flags.width)
    keys = [flags.prompt_tokens + flags.new_tokens // 2]
    result: dict[str, Any] = dict(machine=device_name(device), torch=torch.__version__, rows=[])
    result["flags"] = given | dict(upstream=bool(flags.upstream))
    for batch in batches:
        workers = {name: start(*hows[name], WORKER) for name in names}  # anew: its memory is that of this batch alone
        try:
            turns = [{name: measure(worker, batch) for name, worker in workers.items()} for _ in range(flags.repeats)]
            for name in names:
                runs = [turn[name] for turn in turns]
                medians = {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "about"}
                row: dict[str, Any] = dict(engine=name, batch=batch, about=runs[0]["about"], **medians)
                how = DTYPES[row["about"].split(", ")[1]], result["machine"], int(row["weight_bytes"])
                row.update(used(config, keys * batch, row["token_ms"] / 1e3, *how))
                result["rows"].append(row)
                shares = f" ({row['bandwidth_use']:.0%}, {row['flop_use']:.0%})" if "flop_use" in row else ""
                print(
                    f"{name:9} batch {batch:3}: first token {row['first_ms']:7.1f} ms, {row['tok_per_s']:8.1f} tok/s, "
                    f"{row['token_ms']:6.2f} ms a step, {row['gb_per_s']:.1f} GB/s and {row['gflop_per_s']:.0f} GFLOP/s"
                    f"{shares}, peak memory {row['peak_mb']:6.0f} MB  ({row['about']})",
                    flush=True,
                )
            *mine, last = result["rows"][-len(names) :]
            for row in mine:
                print(f"          {row['engine']} / {last['engine']}: {row['tok_per_s'] / last['tok_per_s']:.2f}")
            if flags.profile:  # last: what was recorded once runs slower
                profile(workers["int8" if flags.weights else "ours"], batch)
        finally:
            for worker in workers.values():
                worker.kill()
    return result | (dict(scores=rounding.compare(scored, setup("cpu"))) if scored else {})


def main() -> None:
    print(json.dumps(run(parse(Flags, __doc__ or ""))))


if __name__ == "__main__":
    run_script(main)
