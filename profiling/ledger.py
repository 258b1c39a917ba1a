"""Writes profiling/LEDGER.md: what each lever should save, and what it did: `python -m profiling.ledger`.

Predictions come from profiling/simulate.py as the file is written. A GPU measurement goes into MEASURED with the file
that holds it; a lever without one says so.
"""

from pathlib import Path
from typing import Any

from nanochat import records
from nanochat.errors import UserError
from nanochat.files import write_atomically
from nanochat.flags import run_script
from nanochat.recipe import model_config
from profiling.cards import card
from profiling.simulate import BAND, LEVERS, Job, what_if

ROOT = Path(__file__).parent.parent
CPU = "benchmarks/results/vs-upstream-cpu.json"

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
    "batches in pinned memory, made by a thread": "others published that it saves 7 s of a run "
    "([loader](../nanochat/data/loader.py))",
    "the garbage collector frozen after the first step": "others published pauses of 500 ms "
    "([trainer](../nanochat/trainer.py))",
}
MEASURED: dict[str, str] = {}  # lever → ms saved, and the result file

HEAD = """# The ledger: what each change should save, and what it did

Predicted by `python -m profiling.simulate` for depth 24 on 8 H100, 524,288 tokens a step, windows SSSL of a quarter of
the context: **no GPU of ours has run any of it.** The whole step is within ±{band:.0%} of what was published
(`python -m profiling.points`); a lever's own saving is less certain. Each row has all rows above it switched on.
What no part explains is fitted, so that the whole meets one published step: that it does says nothing of the parts.

"""


def predicted(fp8: bool) -> str:
    """The table of one precision."""
    changes = what_if(Job(model_config(24, 32768), card("H100"), fp8=fp8))
    names = {text: lever for lever, text in LEVERS.items()}
    text = f"## {'fp8' if fp8 else 'bf16'}\n\n| change | predicted step | saves | measured | in the code |\n"
    text += "|---|---|---|---|---|\n"
    for i, (what, now) in enumerate(changes):
        lever = names.get(what.removeprefix("+ "), "")
        saves = f"{1e3 * (changes[i - 1][1] - now):.1f} ms" if i else ""
        measured = MEASURED.get(lever, "no GPU has run it") if i else ""
        text += (
            f"| {what} | {1e3 * now:.1f} ms | {saves} | {measured} | {BUILT.get(lever, 'not built') if i else ''} |\n"
        )
    return text + "\n"


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


def main() -> None:
    result = records.read(ROOT / CPU, "take it from the repository again")
    if result is None:
        raise UserError(f"{CPU} is missing; take it from the repository again")
    text = HEAD.format(band=BAND) + predicted(False) + predicted(True) + on_cpu(result)
    text += listed("Built, between the parts: nothing of it is predicted", UNSEEN) + listed(
        "Not built, and why", NOT_BUILT
    )
    write_atomically(ROOT / "profiling" / "LEDGER.md", text.encode())
    print(text)


if __name__ == "__main__":
    run_script(main)
