"""`python -m profiling COMMAND`: the performance lab.

python -m profiling trace FILE [--card H100] [--out DIR]   the page about a trace that torch.profiler recorded
python -m profiling diff A.json B.json                     what got slower or faster between two profile.json
python -m profiling simulate …                             a training step predicted; --help lists the flags
python -m profiling points | ledger | static | calibrate …  the other modules of this folder

A training script records itself with --profile N.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

from nanochat import render
from nanochat.errors import UserError
from nanochat.flags import run_script
from profiling import diff, lab_page
from profiling.mfu import rates

MODULES = ("simulate", "points", "ledger", "static", "calibrate")


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in MODULES:
        return forward(sys.argv[1])
    parser = argparse.ArgumentParser(
        prog="python -m profiling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("trace", help="the page about a recorded trace")
    one.add_argument("file", type=Path, help="a .json or .json.gz of torch.profiler")
    one.add_argument(
        "--card", default="", help="which card it was, where the trace does not say: H100, or the driver's name"
    )
    one.add_argument("--out", type=Path, help="folder of page and JSON (default: the trace's)")
    two = commands.add_parser("diff", help="two profile.json side by side")
    two.add_argument("a", type=Path)
    two.add_argument("b", type=Path)
    for name in MODULES:
        commands.add_parser(name, help=f"as python -m profiling.{name}", add_help=False)
    flags = parser.parse_args()
    if flags.command == "trace":
        show(flags.file, flags.out or flags.file.parent, flags.card)
    else:
        compare(flags.a, flags.b)


def forward(name: str) -> None:
    """Runs another module of this folder as if it had been called by its own name."""
    try:
        module = importlib.import_module(f"profiling.{name}")
    except ModuleNotFoundError as missing:
        raise UserError(f"`{name}` cannot run here: there is no module {missing.name}") from None
    sys.argv[:2] = [f"profiling.{name}"]
    module.main()


def show(path: Path, folder: Path, card: str) -> None:
    where, lab = lab_page.write(path, folder, card)
    found = lab.found
    print(f"{where}: {found.wall_ns / 1e6:,.2f} ms in {found.steps} steps, {found.idle_ns / found.wall_ns:.1%} idle")
    parts = {name: lab.ms(ns) for name, ns in found.category_ns.items()}
    print(json.dumps(dict(page=str(where), on_device=found.on_device, card=lab.card.name if lab.card else None,
                          step_ms=lab.ms(found.wall_ns), idle_ms=lab.ms(found.idle_ns), category_ms=parts,
                          beside=found.meta.get("beside", []), **rates(found, lab.card))))  # fmt: skip


def compare(first: Path, second: Path) -> None:
    changes = diff.compare(diff.load(first), diff.load(second))
    print(render.markdown(f"A: {first}, B: {second}", diff.sections(changes)))
    print(json.dumps(changes))


if __name__ == "__main__":
    run_script(main, goes_on=True)
