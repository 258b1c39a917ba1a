"""What can be known about every kernel without a GPU: `python -m profiling static`, one page and one JSON file.

Every op with a kernel, at its cases d12 and d24, is compiled for every target and read (launches.py); a card stands
for each target, and how long a call should take there is predicted, with its band (predict.py). The page is
sections.py's. What was compiled once is remembered: a second call takes seconds.
"""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels import OPS, readme, targets, tuned
from kernels.architectures import TARGETS
from kernels.triton_utils import INSTALLED, INTERPRETED, triton
from nanochat.errors import UserError
from nanochat.files import base_dir, write_atomically
from nanochat.flags import flag, number, parse, path
from nanochat.render import page
from profiling.predicted.cards import Card, card, target_of
from profiling.predicted.predict import Prediction, predict
from profiling.static import launches, sections

SHAPES = ["d12", "d24"]
CARDS = ("A100", "RTX 3090", "RTX 4090", "H100", "B200", "RTX 5090", "MI300X")  # what a target is predicted for
PREDICTED = list(dict.fromkeys(map(target_of, CARDS)))


@dataclass
class Flags:
    op: str = flag("", "ops, comma-separated (default: all that have a kernel)")
    target: str = flag("", f"targets, comma-separated, of {', '.join(PREDICTED)} (default: five)")
    card: str = flag("", "cards, comma-separated, to predict for, and their targets (default: one a target)")
    out: str = path("", "folder for static.json and static.html (default: static/ beside the runs)")
    jobs: int = number(0, 1, 1024, "compilers at a time (default: one a processor)")
    peers: bool = flag(False, "compile Liger-Kernel's kernels too, beside ours")


def chosen(said: str, there: list[str], default: list[str], name: str) -> list[str]:
    """A comma-separated flag. Raises UserError for a word that is not among those there are."""
    words = [word for word in said.split(",") if word] or default
    for word in words:
        if word not in there:
            raise UserError(f"--{name} names {word!r}; there are {', '.join(there)}")
    return list(dict.fromkeys(words))


def asked_bytes() -> dict[str, float]:
    """Op → bytes its kernels ask for, of the least there are, as kernels/README.md has it: counted interpreted."""
    try:
        text = readme.PATH.read_text("utf-8")
    except OSError:
        return {}
    table = text.partition("## Bytes asked for")[2].partition("\n## ")[0]
    return {op: float(ratio) for op, ratio in re.findall(r"^\| (\w+) \| [\d,]+ \| [\d,]+ \| ([\d.]+) \|", table, re.M)}


def predictions(
    rows: list[dict[str, Any]], calls: list[dict[str, Any]], cards: dict[str, Card]
) -> dict[tuple[str, str, str], Prediction]:
    """(op, shape, target) → the forward's; none where a kernel of it did not compile, or where the op does not run."""
    made = {}
    for call in calls:
        for target, chip in cards.items():
            where = (call["op"], call["shape"], target)
            kernels = [
                row for row in rows
                if (row["op"], row["shape"], row["target"]) == where and row["way"] == "forward"
            ]  # fmt: skip
            if kernels and not any(row["error"] for row in kernels):
                made[where] = predict(chip, call["op"], call["bytes"], call["flops"], kernels, call["asked"])
    return made


def build(ops: list[str], cards: dict[str, Card], jobs: int, peers: bool) -> tuple[dict[str, Any], dict]:
    """(the report, its predictions)."""
    started = time.perf_counter()
    folder = base_dir() / "static-cache"
    rows, compiled = launches.collect(ops, SHAPES, list(cards), folder, jobs, peers)
    asked = asked_bytes()
    calls = [
        dict(op=op, shape=shape, bytes=OPS[op].bytes(OPS[op].cases[shape], launches.DTYPE),
             flops=OPS[op].flops(OPS[op].cases[shape]), asked=asked.get(op))
        for op in ops
        for shape in dict.fromkeys(targets.case_of(OPS[op], name, launches.DTYPE) for name in SHAPES)
    ]  # fmt: skip
    made = predictions(rows, calls, cards)
    said = [
        dict(op=op, shape=shape, target=target, card=cards[target].name, predicted=True, seconds=one.seconds,
             low=one.low, high=None if one.lower_bound else one.high, usual=one.usual, band=one.band,
             lower_bound=one.lower_bound, bound=one.bound, parts=one.parts, calibrated=one.calibrated)
        for (op, shape, target), one in made.items()
    ]  # fmt: skip
    report = dict(
        triton=triton.__version__, dtype=str(launches.DTYPE)[6:], shapes=SHAPES, compiled_now=compiled,
        took_s=round(time.perf_counter() - started, 1), calls=calls, predictions=said, rows=rows,
    )  # fmt: skip
    return report, made


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    ops = chosen(flags.op, tuned.ops(), tuned.ops(), "op")
    asked = [card(name) for name in flags.card.split(",") if name]
    default = [chip.target for chip in asked] or [target for target in PREDICTED if target in TARGETS]
    wanted = chosen(flags.target, PREDICTED, default, "target")
    chips = [*map(card, CARDS), *asked]
    cards = {target: chip for target in wanted for chip in chips if chip.target == target}
    if not INSTALLED or INTERPRETED:
        raise UserError(
            "compiling needs Triton (pip install triton)"
            if not INSTALLED
            else "TRITON_INTERPRET is set, and nothing can be compiled then: unset it"
        )
    if flags.peers:
        try:
            import liger_kernel  # noqa: F401
        except ImportError:
            raise UserError("--peers needs Liger-Kernel: pip install '.[peers]'") from None
    report, made = build(ops, cards, flags.jobs or launches.processors(), flags.peers)
    html = page("Kernels without a GPU", sections.sections(report, cards, made))
    out = Path(flags.out) if flags.out else base_dir() / "static"
    write_atomically(out / "static.json", (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(out / "static.html", html.encode())
    rows = report["rows"]
    wrong = [row for row in rows if row["faults"] and row["whose"] == "ours"]
    for (op, shape, target), said in made.items():
        if shape == "d24" or (op, "d24", target) not in made:
            print(f"{op:24} {shape:10} {cards[target].name:9} {said}")
    for row in wrong:
        print(f"fault: {row['kernel']} of {row['op']} at {row['shape']} on {row['target']}: {'; '.join(row['faults'])}")
    print(f"\n{out / 'static.html'}: {len(rows)} launches, {report['compiled_now']} compiled now, {report['took_s']} s")
    print(json.dumps(dict(page=str(out / "static.html"), launches=len(rows), compiled_now=report["compiled_now"],
                          took_s=report["took_s"], faults=len(wrong), errors=sum(bool(row["error"]) for row in rows),
                          float64=sum(row["float64_instructions"] or 0 for row in rows),
                          predictions=len(made))))  # fmt: skip
