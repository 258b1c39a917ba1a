"""Writes profiling/LEDGER.md: what each change should save, and what it did: `python -m profiling ledger`.

Predictions come from simulate.py as the file is written, measurements from result files; a change without one says so.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.tuned import UNPROVEN
from nanochat import records
from nanochat.errors import UserError
from nanochat.files import write_atomically
from nanochat.flags import parse
from nanochat.recipe import model_config
from profiling.predicted import by_hand
from profiling.predicted.cards import card
from profiling.predicted.counts import LOSS
from profiling.predicted.simulate import BAND, STEPS, Job, moved, seconds, step, streamed, what_if

ROOT = Path(__file__).parents[2]
CPU = "benchmarks/results/vs-upstream-cpu.json"
STEP = "benchmarks/results/h100-second-run.json"
SINGLE = "benchmarks/results/nvidia-h100-80gb-hbm3.json"
ABLATIONS, FIXES = "profiling/compiled/ablations.json", "profiling/compiled/fixes.json"
# Variant of the step → where in the code is what it has beyond the one before it.
BUILT = {
    "ours": "[optim](../nanochat/optim.py), [kernels/](../kernels/)",
    "relu2": "[linear_relu2](../kernels/linear_relu2.py)",
    "template": "[inductor_template](../kernels/inductor_template.py)",
    "fp8 torch-mlp": "[fp8](../kernels/fp8/), [kernels/](../kernels/)",
    "fp8 ours": "[fp8_mlp_relu2](../kernels/fp8/mlp.py)",
}
# Change → why it is not built.
NOT_BUILT = {
    "in fp8, weight gradients added to float32 inside the product": "the library's fp8 product takes no addend",
    "the head's gradient without zeros that its first chunk is added to": "it would save a fill and a reading, 8 bytes "
    "an element of the head and micro-batch; the product that writes float32 has not run on a card yet",
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
the context, from the launches and bytes of the compiled step (`python -m profiling counts`). Of all this one H100 has
run a step of depth 12 (below) and single ops. The whole step is within ±{band:.0%} of what was published
(`python -m profiling points`); what a change saves is less certain. A row has all rows above it; one that begins with
"or" stands in place of the row above.
Streamed: bytes of a forward and a backward that are of no matrix product or attention. They and the launches are of
steps with 4 and 6 layers: what these two add is taken for all others, within 2% of the whole depth compiled (README).
What no part explains is fitted, so that the whole meets one published step: that it does says nothing of the parts.

"""


SWITCHED = """## With and without each change, as compiled for an H100

Four layers of the width of depth 24, 16 rows: a forward and a backward whose gradients are added to others, or the
updates; the peak is that of 24 layers (`python -m profiling ablate`, `python -m profiling fixes`). All other changes
are there in both. Where a card was measured, that decides which ops run, not these counts. An op that streams more so
holds less: its backward computes again what the compiler keeps. Below 16 bytes at a time:
what kernels stream whose loads and stores are mostly so narrow, as their machine code says; read for the first rows.

"""


def mlp(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Who → measured ms of a layer's MLP, forward and backward. rows: of a result of `python -m benchmarks run`."""
    return {
        row["contender"]: row["median_ms"] for row in rows
        if (row["op"], row["case"], row["way"], row["status"]) == ("mlp_relu2", "d24", "both", "timed")
    }  # fmt: skip


def job(variant: str) -> Job:
    """What is predicted for all tables but the measured step's."""
    return Job(model_config(24, 32768), card("H100"), variant=variant)


def predicted(first: str, known: dict[str, str]) -> str:
    """The table of one precision, from its first variant on; known: by variant, what was measured."""
    text = f"## {'fp8' if job(first).fp8 else 'bf16'}\n\n"
    text += "| change | predicted step | saves | streamed | launches | measured | in the code |\n"
    text += "|---|---|---|---|---|---|---|\n"
    for what, now in what_if(job(first)):
        took, (size, launches), before = seconds(now), streamed(now), STEPS[now.variant][1]
        saves = f"{1e3 * (seconds(job(before)) - took):.1f} ms" if before else ""
        found = known.get(now.variant, "not measured") if before else ""
        text += f"| {what} | {1e3 * took:.1f} ms | {saves} | {size / 1e9:.1f} GB | {launches:.0f} "
        text += f"| {found} | {BUILT.get(now.variant, '')} |\n"
    return text + "\n"


def checked(variant: str) -> str:
    """Bytes by part as compiled, and as they were counted by hand."""
    now = job(variant)
    text = f"## A step's bytes on one GPU, as compiled and as counted by hand: {variant}\n\n"
    text += "| part | compiled | by hand | why they differ |\n|---|---|---|---|\n"
    for name, size, hand, why in by_hand.compared(variant, now.config, now.tokens, now.micro, moved(now)):
        text += f"| {name} | {size / 1e9:.1f} GB | {'' if hand is None else f'{hand / 1e9:.1f} GB'} | {why} |\n"
    return text + "\n"


def not_yet(ms: dict[str, float]) -> str:
    """Changes that are predicted and not built: (what, ms it would save of `ours` on 8 H100, how that is counted)."""
    now, chip = job("ours"), card("H100")
    config, layers = now.config, now.config.n_layer * now.micro
    tokens = now.tokens * now.micro
    inside = seconds(job("relu2"))
    today = seconds(now) + 1e-3 * (ms["triton"] - ms["compiled"]) * layers  # with the kernel as it was measured
    passes = 4 * layers * now.tokens * config.n_embd * 2 / chip.stream
    loss = step(now)[LOSS] - 2 * tokens * config.n_embd * config.vocab_size / chip.products()
    rows = (
        (
            "TMA and warp specialization in the product behind linear_relu2",
            today - inside,
            f"at the library's rate relu² inside it makes a step of {1e3 * inside:.1f} ms, at the rate measured in one "
            f"layer's MLP ({ms['triton']:.2f} ms, torch.compile's {ms['compiled']:.2f}) one of {1e3 * today:.1f}",
        ),
        (
            "QK norm and rotary in the epilogue of the products that make q and k",
            passes,
            "q and k are not read and written again: 4 passes of tokens x width a layer (quack does it in CUTLASS), if "
            "the backward starts from what was turned",
        ),
        (
            "the head without ever writing a chunk's logits",
            loss,
            "the loss reads and writes no logits, and the backward makes them a second time: one more product of the "
            "head (Liger-Kernel's SM90 path, its pull request 1334); and a chunk's logits need no memory",
        ),
    )
    text = "## Predictions only: not built\n\n| change | would save | how it is counted |\n|---|---|---|\n"
    return text + "".join(f"| {what} | {1e3 * saved:+.1f} ms | {how} |\n" for what, saved, how in rows) + "\n"


def switched(ablations: dict[str, Any], fixes: dict[str, Any]) -> str:
    """What the compiled step counts without a change and with it, from ablate.py's counts and fixes.py's."""
    text = (
        SWITCHED + "| step | change | streamed, without → with | below 16 bytes at a time | launches | TFLOP | peak |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    rows = [("bf16", name, cells, fixes[""]) for name, cells in fixes.items() if name]
    for program, cells in ablations["h100"].items():
        for op in filter(None, cells):
            off, on = cells[op], cells[""]
            off, on = (on, off) if op in UNPROVEN else (off, on)
            rows.append((dict(step="bf16").get(program, program), f"our `{op}`", off, on))
    forms = (("streaming", 1e9, "{:.2f} → {:.2f} GB"), ("narrow", 1e9, "{:.2f} → {:.2f} GB"),
             ("launches", 1, "{:.0f} → {:.0f}"), ("flops", 1e12, "{:.2f} → {:.2f}"),
             ("peak", 2**30, "{:.1f} → {:.1f} GiB"))  # fmt: skip
    for program, change, off, on in rows:
        cells = " | ".join(
            form.format(off[what] / unit, on[what] / unit) if what in off else "" for what, unit, form in forms
        )
        text += f"| {program} | {change} | {cells} |\n"
    return text + "\n"


def on_gpu(result: dict[str, Any]) -> str:
    """A step's parts, predicted and measured."""
    found, where = result["training_step"], result["environment"]
    taken = Job(
        model_config(found["depth"], found["vocab_size"], found["sequence_len"]), card("H100"), gpus=1,
        batch=found["rows"], total=found["rows"] * found["sequence_len"], variant="relu2",
    )  # fmt: skip
    parts = {name: 1e3 * took for name, took in step(taken).items()}
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
        if any(name in parts for name in names.split(" + ")):  # relu² may have no passes of its own
            predicted = sum(parts.get(name, 0.0) for name in names.split(" + "))
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
    ms = mlp(results[SINGLE]["rows"])
    said = (
        f"a layer's MLP on one H100: {ms['triton']:.2f} ms, torch.compile's {ms['compiled']:.2f} ([ops](../{SINGLE}))"
    )
    text = HEAD.format(band=BAND) + predicted("plain", {"relu2": said}) + predicted("fp8 loop", {}) + not_yet(ms)
    text += switched(read(ABLATIONS), read(FIXES)) + "".join(map(checked, by_hand.COUNTED))
    text += on_gpu(results[STEP]) + on_cpu(results[CPU])
    text += listed("Built, between the parts: nothing of it is predicted", UNSEEN)
    return text + listed("Not built, and why", NOT_BUILT)


@dataclass
class Flags:
    pass


def main() -> None:
    parse(Flags, __doc__ or "")
    text = written()
    write_atomically(ROOT / "profiling" / "LEDGER.md", text.encode())
    print(text)
