"""Which of our ops pay in the compiled step: it is counted with each of them off, or on, and all others as they are.

    python -m profiling ablate [--card h100,a100]      a quarter of a minute a step, a step for each op

The counts go to ablations.json, and what follows from them for `auto` to kernels/tuned/counts.json, which decides where
no card of an architecture was measured. A step is lowered for its card (lower.py): a shallow model of the width of
depth 24, forward and backward, or the updates where they are what is switched; no kernel is compiled. Where all our
kernels make the same step of another card, its ops are not counted again: hardly any code differs from card to card.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kernels import measured, tuned
from kernels.architectures import NO_FP8
from nanochat.errors import UserError
from nanochat.files import json_of, write_atomically
from nanochat.flags import flag, parse
from nanochat.recipe import model_config
from profiling.compiled import launches, memory, null_cards
from profiling.compiled.case import Case
from profiling.compiled.launches import NOT_STREAMING
from profiling.compiled.lower import ask, child_case, child_ends, prepared

FILE = Path(__file__).with_name("ablations.json")
DEPTH, LAYERS, ROWS, T, VOCABULARY = 24, 4, 16, 2048, 32768  # the width of a depth; rows of T tokens
CARDS = ("h100", "a100", "4090", "b200", "5090", "mi300x")  # one of each architecture
MICRO = ("forward 2", "backward 2")  # phases of the micro-step that is counted
SAME = 1e-4  # by so much of a card's bytes another's may differ for its counts to be the first one's
Counts = dict[str, dict[str, dict[str, dict[str, int]]]]  # card → program → op, or "" → sums
# All kernels of ours, but the products that must be measured to be faster.
OURS = ",".join(["triton", *(f"{op}=torch" for op in tuned.UNPROVEN)])


@dataclass(frozen=True)
class Program:
    """What is lowered: fields of Case, and the ops that are switched in it."""

    case: dict[str, Any]
    ops: tuple[str, ...]


PROGRAMS = {
    "step": Program(
        dict(optimizer=False),
        ("rms_norm", "mix_rms_norm", "add_rms_norm", "qk_norm_rotary", "flash_attention", "linear_cross_entropy",
         "embedding", "mlp_relu2"),
    ),
    "update": Program({}, ("polar_express", "muon_momentum_", "muon_update_", "adamw_")),
    "fp8": Program(
        dict(optimizer=False, fp8="current"), ("fp8_linear", "fp8_mlp_relu2", "fp8_mix_rms_norm", "fp8_add_rms_norm")
    ),
}  # fmt: skip


def answer() -> None:
    """What a child does: the sums of a case."""
    case = child_case()
    found, events = launches.recorded(prepared(case))
    child_ends(sums(case, found.launches, memory.report(events)))


def sums(case: Case, found: list[launches.Launch], phases: dict[str, Any]) -> dict[str, int]:
    """Of a micro-step whose gradients are added to another's, or of the updates.

    peak: with what forward saves for backward counted for as many layers as the depth has: most of a deep model's peak.
    """
    wanted = ("optimizer",) if case.optimizer else MICRO
    saved = 0 if case.optimizer else phases["forward 2"]["after"].get("saved", 0)
    rows = [row for row in found if row.phase in wanted]
    most = max(phases[name]["peak"] for name in wanted)
    return dict(
        launches=len(rows),
        streaming=sum(row.bytes for row in rows if row.category not in NOT_STREAMING),
        bytes=sum(row.bytes for row in rows),
        flops=sum(row.flops for row in rows),
        peak=most + saved * (DEPTH - LAYERS) // LAYERS,
    )


def case(program: str, setting: str = "") -> Case:
    """A program to be counted, with exceptions from OURS in the setting."""
    config = asdict(replace(model_config(DEPTH, VOCABULARY, T), n_layer=LAYERS))
    kernels = ",".join(filter(None, (OURS, setting)))
    return Case(config, ROWS, kernels=kernels, **PROGRAMS[program].case)  # type: ignore[arg-type]


def settings(program: str) -> dict[str, str]:
    """What is counted of a program: "" and each of its ops → the exception from OURS that switches it."""
    switch = {op: f"{op}={'triton' if op in tuned.UNPROVEN else 'torch'}" for op in PROGRAMS[program].ops}
    return {"": "", **switch}


def programs(card: str) -> list[str]:
    """Those that a card runs."""
    target = null_cards.card(card).target
    return [name for name, program in PROGRAMS.items() if "fp8" not in program.case or target not in NO_FP8]


def measured_rows(target: str) -> bool:
    """Whether a table of block sizes has one that was measured on such a card."""
    lists = [rows for rows in tuned.table(target).values() if isinstance(rows, list)]
    return any("ms" in row for rows in lists for row in rows)


def alike(base: dict[str, int], other: dict[str, int]) -> bool:
    """Whether two cards' steps with all kernels of ours are the same but for what a few multiprocessors more change."""
    return all(abs(base[what] - other[what]) <= SAME * other[what] for what in tuned.COUNTED)


def of_like(base: dict[str, int], program: str, counts: Counts) -> dict[str, dict[str, int]]:
    """A program's counts for a card whose step with all our kernels is the same; empty where none was counted."""
    known = (of_card.get(program, {}) for of_card in counts.values())
    return next((cells for cells in known if len(cells) > 1 and alike(base, cells[""])), {})


def rows(counts: Counts) -> dict[str, dict[str, dict[str, float]]]:
    """kernels/tuned/counts.json from ablations.json: architecture → op → shares, with its kernels / without them.

    None for an architecture of which a card was measured: there what ran then stays, but where a measurement says more.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for card, of_card in counts.items():
        target = null_cards.card(card).target
        if measured_rows(target):
            continue
        cells = found.setdefault(target, {})
        for name, own in of_card.items():
            program = own if len(own) > 1 else of_like(own[""], name, counts)
            for op in filter(None, program):
                on, off = program[""], program[op]
                if op in tuned.UNPROVEN:
                    on, off = off, on
                cells[op] = {what: round(on[what] / off[what], 3) if off[what] else 1.0 for what in tuned.COUNTED}
    return found


def text(counts: Any, depth: int) -> str:
    """JSON with a line for each value at so many levels."""
    if not depth:
        return json.dumps(counts)
    lines = [f"{json.dumps(key)}: {text(value, depth - 1)}" for key, value in counts.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


@dataclass
class Flags:
    card: str = flag(",".join(CARDS), "comma-separated cards of null_cards.py to count for; of others all stays")


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    known = json_of(FILE.read_bytes()) if FILE.exists() else {}
    for card in flags.card.split(","):
        if card not in CARDS:
            raise UserError(f"--card names {card!r}, wanted some of {', '.join(CARDS)}")
        known.pop(card, None)
        made: dict[str, Any] = {}
        for program in programs(card):
            cells = made[program] = {}
            for op, setting in settings(program).items():
                if op and of_like(cells[""], program, known):
                    break
                cells[op] = ask("profiling.compiled.ablate", case(program, setting), card)
                print(f"{card} {program} {setting or 'all ours'}: {cells[op]}", file=sys.stderr, flush=True)
        known = {name: made if name == card else known[name] for name in CARDS if name in {card, *known}}
        write_atomically(FILE, (text(known, 3) + "\n").encode())
    path = tuned.FOLDER / "counts.json"
    measured.replace(path, text(rows(known), 2) + "\n")
    print(json.dumps(dict(written=[str(FILE), str(path)])))


if __name__ == "__main__":
    answer()
