"""`python -m profiling compiled`: the training step as Inductor would run it on a card that is not here; page and JSON.

Every launch of the step in order, with its bytes, FLOPs, machine code and PREDICTED time; sums by category and by line
of the model; memory over the step; what is suspect. With --against, two settings of our kernels side by side.
Look at `measured` first: what one setting gives. The page is sections.py's.
"""

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.files import base_dir, write_atomically
from nanochat.flags import flag, number, parse
from nanochat.recipe import model_config
from nanochat.render import page
from profiling.compiled import null_cards, sections
from profiling.compiled.lower import Case, ask, child_case, prepared
from profiling.predicted.cards import Card, card
from profiling.predicted.predict import predict
from profiling.static.launches import processors


@dataclass
class Flags:
    depth: int = number(24, 1, 1000, "layers of the model; width and heads follow")
    card: str = flag("H100", "which card")
    rows: int = number(16, 1, 1 << 16, "of a micro-batch")
    kernels: str = flag("auto", "as NANOCHAT_KERNELS")
    against: str = flag("", "a second setting of the kernels, to stand beside: torch")
    fp8: bool = flag(False, "multiply in fp8")
    optimizer: bool = flag(False, "its updates too")
    out: str = flag("", "folder for compiled.json and compiled.html (default: compiled/ beside the runs)")


def measured(case: Case, chip: Card) -> dict[str, Any]:
    """What a child on the null device finds of a step, with times predicted. Raises as lower.ask."""
    found = ask("profiling.compiled.report", case, chip.driver)
    for row in found["launches"]:
        bare = "fp8_" if row["fp8"] else "attention" if row["category"] == "attention" else ""
        said = predict(chip, bare, row["bytes"], row["flops"])
        row.update(predicted_s=said.seconds, usual=said.usual, band=said.band, bound=said.bound,
                   lower_bound=said.lower_bound)  # fmt: skip
    return found


def answer() -> None:
    """What the child does: two steps on fake tensors, the second noted; all kernels compiled for the card."""
    from profiling.compiled import generated, launches, memory, null_device

    case, path = child_case()
    ready = prepared(case)
    found, events = launches.recorded(ready)
    target = null_cards.Machine.of(os.environ[null_device.SETTING]).card.target
    rows = generated.collect(found, target, base_dir() / "static-cache", processors())
    made = dict(launches=[asdict(launch) for launch in found.launches], kernels=rows, memory=memory.report(events),
                curve=memory.curve(events))  # fmt: skip
    path.write_text(json.dumps(made))


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    chip = card(flags.card)
    if chip.driver not in null_cards.CARDS:
        raise UserError(f"--card {flags.card!r}: the null device has no such card")
    if flags.fp8 and not chip.fp8:
        raise UserError(f"--fp8: a {chip.name} has no fp8 units")
    try:
        import triton  # noqa: F401
    except ImportError:
        raise UserError(
            "the step's kernels are compiled by Triton, which is not installed: pip install triton"
        ) from None
    config = asdict(model_config(flags.depth, 32768))
    case = Case(config, flags.rows, fp8="current" if flags.fp8 else "", kernels=flags.kernels,
                optimizer=flags.optimizer)  # fmt: skip
    started = time.perf_counter()
    variants = {flags.kernels: measured(case, chip)}
    if flags.against:
        variants[flags.against] = measured(replace(case, kernels=flags.against), chip)
    title = (
        f"d{flags.depth} on {chip.name}, {'fp8' if flags.fp8 else 'bf16'}, {flags.rows} rows, compiled without a card"
    )
    out = Path(flags.out) if flags.out else base_dir() / "compiled"
    report = dict(vars(flags), predicted=True, took_s=round(time.perf_counter() - started, 1), variants=variants)
    write_atomically(out / "compiled.json", json.dumps(report).encode())
    write_atomically(out / "compiled.html", page(title, sections.sections(variants, chip)).encode())
    sums = {name: sections.totals(found) for name, found in variants.items()}
    for name, found in sums.items():
        print(f"{name:8} " + ", ".join(f"{what} {value:,.4g}" for what, value in found.items()))
    print(json.dumps(dict(page=str(out / "compiled.html"), took_s=report["took_s"], predicted=True, sums=sums)))


if __name__ == "__main__":
    answer()
