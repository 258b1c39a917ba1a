"""Writes profiling/LEDGER.md: what each lever should save, and what it did: `python -m profiling ledger`.

Predictions come from simulate.py as the file is written. A GPU measurement goes into MEASURED with the file
that holds it; a lever without one says so.
"""

from pathlib import Path
from typing import Any

from nanochat import records
from nanochat.errors import UserError
from nanochat.files import write_atomically
from nanochat.recipe import model_config
from profiling.predicted.cards import card
from profiling.predicted.simulate import BAND, LEVERS, Job, step, what_if

ROOT = Path(__file__).parents[2]
CPU = "benchmarks/results/vs-upstream-cpu.json"
STEP = "benchmarks/results/h100-second-run.json"
SINGLE = "benchmarks/results/nvidia-h100-80gb-hbm3.json"
ON = frozenset({"norms", "weights", "embeddings", "optimizer", "head"})  # levers that the measured step ran with

# Lever → where it is in the code.
BUILT = {
    "relu2": "[linear_relu2](../kernels/linear_relu2.py)",
    "norms": "[rms_norm](../kernels/rms_norm.py), [rotary](../kernels/rotary.py)",
    "weights": "[MuonAdamW.shadow](../nanochat/optim.py), on GPUs",
    "embeddings": "[embedding](../kernels/embedding.py), on GPUs",
    "optimizer": "[MuonAdamW](../nanochat/optim.py)",
    "head": "[linear_cross_entropy](../kernels/linear_cross_entropy.py)",
    "fp8_glue": "[fp8](../kernels/fp8/)",
}
# Lever, or part of one → why it is not built.
NOT_BUILT = {
    "weight gradients added to float32 inside the product": "needs a product with a float32 result and an addend for "
    "every op that has a weight; as it is built, the sum is a pass of its own",
}
# What the step's parts do not show: built, and where.
UNSEEN = {
    "no waiting for the loss": "it is asked for after the last forward and read while the backward runs, when "
    "the GPU has work in line; that a rank was told to stop travels with it ([ranks](../nanochat/ranks.py))",
    "a step replayed as CUDA graphs": "a host that launches a thousand kernels and more is slower than the GPU is "
    "([replay](../nanochat/replay.py)); measured: above, and with fp8 in GPU.md",
    "batches in pinned memory, made by a thread": "others published that it saves 7 s of a run "
    "([loader](../nanochat/data/loader.py))",
    "the garbage collector frozen after the first step": "others published pauses of 500 ms "
    "([trainer](../nanochat/trainer.py))",
}
HEAD = """# The ledger: what each change should save, and what it did

Predicted by `python -m profiling simulate` for depth 24 on 8 H100, 524,288 tokens a step, windows SSSL of a quarter of
the context. Of all this one H100 has run a step of depth 12 (below) and single ops. The whole step is within
±{band:.0%} of what was published (`python -m profiling points`); a lever's own saving is less certain. Each row has
all rows above it switched on.
What no part explains is fitted, so that the whole meets one published step: that it does says nothing of the parts.

"""


def measured(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Lever → what was measured of it on a GPU. rows: of a result of `python -m benchmarks run`."""
    ms = {
        row["contender"]: row["median_ms"] for row in rows
        if (row["op"], row["case"], row["way"], row["status"]) == ("mlp_relu2", "d24", "both", "timed")
    }  # fmt: skip
    text = f"a layer's MLP on one H100, in bfloat16: ours {ms['triton']:.2f} ms, torch.compile's {ms['compiled']:.2f}"
    return {"relu2": f"{text} ([ops](../{SINGLE}))"}


def predicted(fp8: bool, known: dict[str, str]) -> str:
    """The table of one precision; known: by lever, what was measured."""
    changes = what_if(Job(model_config(24, 32768), card("H100"), fp8=fp8))
    names = {text: lever for lever, text in LEVERS.items()}
    text = f"## {'fp8' if fp8 else 'bf16'}\n\n| change | predicted step | saves | measured | in the code |\n"
    text += "|---|---|---|---|---|\n"
    for i, (what, now) in enumerate(changes):
        lever = names.get(what.removeprefix("+ "), "")
        saves = f"{1e3 * (changes[i - 1][1] - now):.1f} ms" if i else ""
        found = known.get(lever, "not measured") if i else ""
        text += f"| {what} | {1e3 * now:.1f} ms | {saves} | {found} | {BUILT.get(lever, 'not built') if i else ''} |\n"
    return text + "\n"


def on_gpu(result: dict[str, Any]) -> str:
    """A step's parts, predicted and measured."""
    found, where = result["training_step"], result["environment"]
    job = Job(
        model_config(found["depth"], found["vocab_size"], found["sequence_len"]), card("H100"), gpus=1,
        batch=found["rows"], total=found["rows"] * found["sequence_len"], levers=ON,
    )  # fmt: skip
    parts = {name: 1e3 * took for name, took in step(job).items()}
    text = f"## One H100: depth {found['depth']}, {found['rows']} rows, our kernels, without FlashAttention\n\n"
    text += f"{where['machine']}, torch {where['torch']}, Triton {where['triton']} ([numbers](../{STEP})): "
    text += f"{found['tok_per_s']:,.0f} tokens/s, {found['peak_gib']:.2f} GiB allocated at most (predicted: "
    text += f"{found['predicted_peak_gib']:.2f}), replayed as CUDA graphs; launched one by one it took "
    text += f"{found['launched']['step_ms']:.1f} ms. The prediction's attention is FlashAttention 3's, not ours. "
    other = result["upstream_step"]["tok_per_s"]
    text += f"Upstream's step there, with PyTorch's attention: {other:,.0f} tokens/s.\n\n"
    text += "| part | predicted | measured |\n|---|---|---|\n"
    rest = sum(parts.values()), found["step_ms"]
    for names, ms in found["parts_ms"].items():
        if set(names.split(" + ")) <= parts.keys():
            predicted = sum(parts[name] for name in names.split(" + "))
            text += f"| {names} | {predicted:.1f} ms | {ms:.1f} ms |\n"
            rest = rest[0] - predicted, rest[1] - ms
    text += f"| the rest, gaps | {rest[0]:.1f} ms | {rest[1]:.1f} ms |\n"
    return text + f"| step | {sum(parts.values()):.1f} ms | {found['step_ms']:.1f} ms |\n\n"


def on_cpu(result: dict[str, Any]) -> str:
    """What was measured on a CPU beside upstream."""
    text = f"## Measured on a CPU\n\n{result['machine']}, torch {result['torch']} ([numbers](../{CPU})).\n\n"
    text += "| training step | tokens/s | peak memory | loss |\n|---|---|---|---|\n"
    for row in result["train"]:
        text += f"| {row['who']} ({row['about']}) | {row['tok_per_s']:,.0f} | {row['peak_mb']:,.0f} MB "
        text += f"| {row['loss']:.4f} |\n"
    return text


def listed(title: str, rows: dict[str, str]) -> str:
    """A section of sentences."""
    return f"\n## {title}\n\n" + "".join(f"- {what}: {why}.\n" for what, why in rows.items())


def read(name: str) -> dict[str, Any]:
    """A result file. Raises UserError where it is missing or damaged."""
    result = records.read(ROOT / name, "take it from the repository again")
    if result is None:
        raise UserError(f"{name} is missing; take it from the repository again")
    return result


def written() -> str:
    """The whole file. Raises UserError where a result file is missing or damaged."""
    results = {name: read(name) for name in (CPU, STEP, SINGLE)}
    known = measured(results[SINGLE]["rows"])
    text = HEAD.format(band=BAND) + predicted(False, known) + predicted(True, {})
    text += on_gpu(results[STEP]) + on_cpu(results[CPU])
    text += listed("Built, between the parts: nothing of it is predicted", UNSEEN)
    return text + listed("Not built, and why", NOT_BUILT)


def main() -> None:
    text = written()
    write_atomically(ROOT / "profiling" / "LEDGER.md", text.encode())
    print(text)
