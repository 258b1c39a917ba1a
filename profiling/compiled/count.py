"""Writes profiling/predicted/counts.json, which counts.py there reads: `python -m profiling counts`, some minutes.

Every step is lowered in a child, half a minute each; what was lowered from the code as it is now stays.
"""

import ast
import hashlib
import json
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kernels import tuned
from nanochat.files import write_atomically
from nanochat.flags import flag, listed, parse
from nanochat.recipe import model_config
from profiling.compiled import launches, memory
from profiling.compiled.case import Case
from profiling.compiled.launches import COPIES, Launch
from profiling.compiled.lower import ROOT, ask, child_case, child_ends, prepared
from profiling.predicted import counts
from profiling.predicted.counts import (
    ATTENTION,
    DEPTH,
    FIRST,
    FP8_PRODUCTS,
    GLUE,
    LATER,
    LAYERS,
    LOSS,
    NORMS,
    OPTIMIZER,
    ORTHOGONAL,
    PRODUCTS,
    RELU2,
    ROWS,
    SUMS,
    TABLES,
    UPDATE,
    VARIANTS,
    VOCABULARY,
    T,
    key,
)

KEPT = ("steps", "code")  # of counts.json, by step: what was lowered, and a fingerprint of the code that was
CARD = "h100"  # for which all is lowered: hardly anything of it differs from card to card
# Of kernels/, what changes nothing of a step: commands, compilers, readers of machine code.
NOT_LOWERED = ("__main__", "before_torch", "child_compile", "machine_code", "readme", "targets", "tuning")
# A streaming kernel of forward or backward belongs to the first part whose pattern its name has. Inductor's are named
# after what is fused in them; relu²'s backward takes the root of what was saved.
NAMED = {
    LOSS: r"tanh|cross_entropy|log_softmax|nll_loss",
    RELU2: r"relu|threshold|(?<!r)sqrt",
    GLUE: r"fp8|quantize|amax|e4m3|e5m2|float8",
    SUMS: r"^(add_|addcmul_|div|mul)$",
    TABLES: r"embedding|index|sort",
}


def part(launch: Launch) -> str:
    """What a launch belongs to."""
    if launch.phase == "optimizer":
        return ORTHOGONAL if launch.category == launches.PRODUCTS else OPTIMIZER
    if launch.category == launches.PRODUCTS:
        return FP8_PRODUCTS if launch.fp8 else PRODUCTS
    if launch.category in (ATTENTION, LOSS):
        return launch.category
    name = launch.name.partition(":")[0]
    found = next((of for of, pattern in NAMED.items() if re.search(pattern, name)), None)
    return found or (SUMS if launch.category == COPIES else NORMS)


def answer() -> None:
    """What a child does: the sums of a case, and the most bytes that are allocated in it."""
    case = child_case()
    found, events = launches.recorded(prepared(case))
    sums: dict[str, dict[str, Counter[str]]] = {}
    for launch in found.launches:
        phase = UPDATE if launch.phase == "optimizer" else FIRST if launch.phase.endswith("1") else LATER
        cell = sums.setdefault(phase, {}).setdefault(part(launch), Counter())
        cell.update(launches=1, bytes=launch.bytes, flops=launch.flops)
    made = {
        phase: {name: [cell["launches"], cell["bytes"], cell["flops"]] for name, cell in parts.items()}
        for phase, parts in sums.items()
    }
    peak = max(phase["peak"] for phase in memory.report(events).values())
    child_ends(dict(sums=made, peak=peak))


def code() -> str:
    """A fingerprint of what is lowered: the model, the optimizer, the kernels and their rows, and the lowering."""
    compiled = ("case", "count", "forked", "launches", "lower", "memory", "null_bindings", "null_cards", "null_device",
                "plain", "programs", "provenance", "work")  # fmt: skip
    files = [path for ending in ("py", "json") for path in (ROOT / "kernels").rglob(f"*.{ending}")]
    files = [path for path in files if path.stem not in NOT_LOWERED]
    files += [Path(__file__).with_name(f"{name}.py") for name in compiled]
    files += [ROOT / "nanochat" / f"{name}.py" for name in ("gpt", "optim", "recipe", "trainer")]
    text = "\n".join(bare(path) for path in sorted(files) if path != tuned.FOLDER / "counts.json")  # for other cards
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def bare(path: Path) -> str:
    """A file's text; Python's without docstrings, comments and empty lines."""
    text = path.read_text("utf-8")
    if path.suffix != ".py":
        return text
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def wanted() -> dict[str, tuple[str, str, int]]:
    """Key in the file → (setting, fp8, layers)."""
    return {key(name, layers): (*how, layers) for name, how in VARIANTS.items() for layers in LAYERS}


def lowered(setting: str, fp8: str, layers: int, depth: int = DEPTH, rows: int = ROWS) -> dict[str, Any]:
    """{"sums", "peak"} of a step of so many layers of a depth's width. Raises as lower.ask."""
    config = asdict(replace(model_config(depth, VOCABULARY, T), n_layer=layers))
    return ask("profiling.compiled.count", Case(config, rows, kernels=setting, fp8=fp8), CARD)  # type: ignore[no-any-return]


def read() -> dict[str, Any]:
    """counts.json, or what it is before anything was lowered. Raises UserError where it is damaged."""
    counts.table.cache_clear()
    return counts.table() if counts.FILE.exists() else {part: {} for part in KEPT}


def text(known: dict[str, Any]) -> str:
    """counts.json, a line a step; of steps that are no longer wanted nothing is kept."""
    about = dict(torch=torch.__version__, card=CARD, width=64 * DEPTH, rows=ROWS)
    parts = [f'"about": {json.dumps(about)}']
    for part in KEPT:
        lines = [f"  {json.dumps(name)}: {json.dumps(known[part][name])}" for name in wanted() if name in known[part]]
        parts.append(f'"{part}": {{\n' + ",\n".join(lines) + "\n }")
    return "{\n " + ",\n ".join(parts) + "\n}\n"


@dataclass
class Flags:
    only: str = flag("", "comma-separated variants to lower again, whatever the file has")


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    again = listed("only", flags.only, VARIANTS) if flags.only else []
    now = code()
    known = read()
    todo = {
        name: how
        for name, how in wanted().items()
        if name.partition(",")[0] in again or (not again and known["code"].get(name) != now)
    }
    for i, (name, how) in enumerate(todo.items(), 1):
        made = lowered(*how)
        known = read()  # another may have written to it meanwhile
        known["steps"][name], known["code"][name] = made, now
        write_atomically(counts.FILE, text(known).encode())
        print(f"{i} of {len(todo)}: {name}", file=sys.stderr, flush=True)
    print(json.dumps(dict(file=str(counts.FILE), lowered=list(todo))))


if __name__ == "__main__":
    answer()
