"""`python -m profiling compiled`: a program as Inductor would run it on a card that is not here; a page and JSON.

Every launch in order, with its bytes, FLOPs, machine code and PREDICTED time; sums by category, module and line of the
model; memory over the step; what is suspect. The program is the training step (also what one rank of several does), or
the engine's decode step or prefill. With --against, another setting of our kernels beside it, or the plain baseline.
Look at `measured` first: what one setting gives. The page is sections.py's.
"""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nanochat import presets
from nanochat.errors import UserError
from nanochat.files import base_dir, write_atomically
from nanochat.flags import flag, number, parse, path
from nanochat.recipe import model_config
from nanochat.render import page
from profiling.compiled import null_cards, sections
from profiling.compiled.case import PARTS, PLAIN, Case
from profiling.compiled.launches import ATTENTION, COMMUNICATION, PRODUCTS
from profiling.compiled.lower import ask, check_kernels, child_case, child_ends, prepared, triton_version
from profiling.compiled.null_device import torch_version
from profiling.predicted.cards import Card, all_reduce, card
from profiling.predicted.predict import BACKWARD, FITTED, predict


@dataclass
class Flags:
    depth: int = number(24, 1, 1000, "layers of the model; width and heads follow")
    card: str = flag("H100", "which card")
    rows: int = number(0, 0, 1 << 16, "of a micro-batch, or requests that run; 0: what the card's preset has, or 16")
    kernels: str = flag("auto", "as NANOCHAT_KERNELS")
    against: str = flag("", "what stands beside it: another setting of the kernels, as torch; or plain, the baseline")
    fp8: bool = flag(False, "multiply in fp8")
    gpus: int = number(1, 1, 8, "ranks of the training step; what the first does is shown")
    part: str = flag("step", "the training step, or the engine's decode step or prefill", choices=PARTS)
    out: str = path("", "folder for compiled.json, summary.json and compiled.html (default: compiled/ beside the runs)")


def measured(case: Case, chip: Card) -> dict[str, Any]:
    """What a child on the null device finds of a program, with times predicted. Raises as lower.ask."""
    found = ask("profiling.compiled.report", case, chip.driver)
    for row in found["launches"]:
        row.update(predicted(row, case, chip, found["kernels"].get(row["kernel"], {})))
    return found


def predicted(row: dict[str, Any], case: Case, chip: Card, kernel: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a launch with their bands, and what bounds it; of a kernel that loops, and is no product, the least.

    kernel: keys of targets.UNREAD; empty: a library's.
    """
    if row["category"] == COMMUNICATION:
        whole = row["bytes"] * case.gpus // (case.gpus - 1)
        seconds = all_reduce(chip, whole / 2 if row["name"] == "allreduce_" else whole, case.gpus)
        seconds /= 1 if row["name"] == "allreduce_" else 2
        return dict(predicted_s=seconds, usual=FITTED[0], band=FITTED[1], bound="link", lower_bound=False)
    bare = "fp8_" if row["fp8"] else ATTENTION if row["category"] == ATTENTION else ""
    slower = BACKWARD if bare == ATTENTION and "backward" in row["name"] else 1
    said = predict(chip, bare, row["bytes"], row["flops"] / slower)
    looped = bool(kernel.get("looped")) and row["category"] != PRODUCTS
    return dict(predicted_s=said.seconds, usual=said.usual, band=said.band, bound=said.bound,
                lower_bound=said.lower_bound or looped)  # fmt: skip


def answer() -> None:
    """What the child does: two steps on fake tensors, the second noted; all kernels compiled for the card."""
    from profiling.compiled import generated, memory, null_device

    case = child_case()
    target = null_cards.Machine.of(os.environ[null_device.SETTING]).card.target
    found, events, rows = generated.recorded(prepared(case), target)
    made = dict(launches=[asdict(launch) for launch in found.launches], kernels=rows, memory=memory.report(events),
                curve=memory.curve(events))  # fmt: skip
    child_ends(made)


def case_of(flags: Flags, chip: Card) -> Case:
    """Raises UserError for what cannot be run."""
    plain = PLAIN in (flags.kernels, flags.against)
    if flags.against == flags.kernels:
        raise UserError(f"--against {flags.against} is what --kernels says already; name another setting, or {PLAIN}")
    if chip.driver not in null_cards.CARDS:
        raise UserError(f"--card {flags.card!r}: the null device has no such card")
    if flags.fp8 and not chip.fp8:
        raise UserError(f"--fp8: the {chip.name} has no fp8 units")
    if plain and (flags.fp8 or flags.part != "step" or flags.gpus > 1):
        raise UserError("the plain baseline is a training step in bfloat16 on one GPU: no --fp8, --part or --gpus")
    if flags.part != "step" and (flags.fp8 or flags.gpus > 1):
        raise UserError(f"--part {flags.part}: the engine runs on one GPU, and multiplies in fp8 nowhere")
    rows = flags.rows or 16
    if not flags.rows and flags.part == "step":
        memory = null_cards.card(chip.driver).memory / 2**30
        rows = int(presets.gpu(memory, flags.gpus, flags.depth).base["device_batch_size"])
    return Case(asdict(model_config(flags.depth, 32768)), rows, fp8="current" if flags.fp8 else "",
                kernels=flags.kernels, part=flags.part, gpus=flags.gpus)  # fmt: skip


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    chip = card(flags.card)
    check_kernels(*{flags.kernels, flags.against} - {PLAIN, ""})
    case = case_of(flags, chip)
    triton = triton_version()
    started = time.perf_counter()
    names = list(filter(None, (flags.kernels, flags.against)))
    print(
        f"{' and '.join(names)}: lowered and compiled for {chip.name}, minutes at depth 24", file=sys.stderr, flush=True
    )
    with ThreadPoolExecutor(len(names)) as pool:
        found = pool.map(lambda name: measured(replace(case, kernels=name), chip), names)
        variants = dict(zip(names, found))
    took = round(time.perf_counter() - started, 1)
    what = dict(step="training step", decode="decode step", prefill="prefill")[flags.part]
    title = f"d{flags.depth} on {chip.name}: {what}, {'fp8' if flags.fp8 else 'bf16'}"
    title += f", {case.rows} row{'s' * (case.rows > 1)}"
    title += f", one of {flags.gpus} GPUs" if flags.gpus > 1 else ""
    out = Path(flags.out) if flags.out else base_dir() / "compiled"
    sums = {name: sections.totals(found) for name, found in variants.items()}
    said = {**vars(flags), "out": "", "rows": case.rows, "predicted": True, "torch": torch_version()[0],
            "triton": triton, "sums": sums}  # fmt: skip
    if flags.against:
        said["ratios"] = sections.ratios(*sums.values())
    write_atomically(out / "compiled.json", json.dumps(dict(said, took_s=took, variants=variants)).encode())
    write_atomically(out / "summary.json", (json.dumps(said, indent=1) + "\n").encode())
    write_atomically(out / "compiled.html", page(title, sections.sections(variants, chip)).encode())
    for name, found in [*sums.items(), *([("ratio", said["ratios"])] if flags.against else [])]:
        print(f"{name:8} " + ", ".join(f"{what} {value:,.4g}" for what, value in found.items()))
    print(json.dumps(dict(page=str(out / "compiled.html"), took_s=took, **said)))


if __name__ == "__main__":
    answer()
