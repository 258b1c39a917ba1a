"""The page about recorded steps of training or decoding: `write(trace, folder)` makes profile.html and profile.json.
`python -m profiling trace X.json.gz` calls them X.profile.html and X.profile.json.

A section that fails says so in a sentence, and the rest of the page still comes. The sections are in
step_sections.py, the numbers in analysis.py and mfu.py.
"""

import argparse
import json
from pathlib import Path

from nanochat import render
from nanochat.errors import UserError, one_line
from nanochat.files import STREAMS, write_atomically
from nanochat.render import Section
from profiling.predicted.cards import by_driver, card
from profiling.recorded import step_sections, trace
from profiling.recorded.analysis import Analysis, analyse
from profiling.recorded.mfu import rates
from profiling.recorded.step_sections import Lab

PARTS = (
    ("The run", step_sections.run),
    ("Where a step goes", step_sections.where),
    ("By phase and category", step_sections.phases),
    ("Top kernels or operators", step_sections.kernels),
    ("Roofline", step_sections.roofline),
    ("Idle", step_sections.idle),
    ("Communication", step_sections.communication),
    ("Memory", step_sections.memory),
    ("The card", step_sections.sensors),
    ("How to read on", step_sections.further),
)


def write(path: Path, folder: Path, card_name: str = "", name: str = "profile") -> tuple[Path, Lab]:
    """Analyses a trace and writes page and JSON, NAME.html and NAME.json; (the page's path, what it shows).

    card_name: a short name, or the driver's; in float32 none of its limits is used. Raises UserError for what is no
    trace, for a card that is not known, and where the trace would be written over.
    """
    where, numbers = folder / f"{name}.html", folder / f"{name}.json"
    for made in (where, numbers):
        if path.exists() and made.exists() and made.samefile(path):
            raise UserError(f"{made} is the trace itself, which would be written over; give another folder with --out")
    chip = (by_driver(card_name) or card(card_name)) if card_name else None
    found = analyse(trace.read(path))
    wide = "float32" in found.meta.get("dtype", "")  # a card's peaks are of 16 bits and fewer
    lab = Lab(found, None if wide else chip or by_driver(found.card or ""), one_line(path.name))
    write_atomically(numbers, json.dumps(found.json(), indent=1).encode())
    write_atomically(where, render.page(title(found), sections(lab)).encode())
    return where, lab


def name_of(path: Path) -> str:
    """What the page and the JSON about a trace are called, without their endings."""
    return f"{path.name.removesuffix('.gz').removesuffix('.json')}.profile"


def home_of(path: Path) -> Path:
    """The folder of a trace; of what is no file, as /dev/stdin, the one that the user stands in."""
    stream = str(path.absolute().parent) in STREAMS or (path.exists() and not path.is_file())
    return Path() if stream else path.parent


def title(found: Analysis) -> str:
    about = found.meta
    what = f"{about['stage']}, steps {about['first_step'] + 1} to {about['first_step'] + found.steps}" if about else ""
    return "Profile of " + (what or "a recorded trace")


def sections(lab: Lab) -> list[Section]:
    made = []
    for heading, make in PARTS:
        try:
            blocks = make(lab)
        except Exception as problem:  # noqa: BLE001  # a part that fails must not take the page with it
            blocks = [f"This part could not be made: {problem}"]
        made.append(Section(heading, blocks))
    return made


def main() -> None:
    """`python -m profiling trace`."""
    parser = argparse.ArgumentParser(description="The page about a recorded trace.")
    parser.add_argument("file", type=Path, help="X.json or X.json.gz of torch.profiler")
    parser.add_argument(
        "--card", default="", help="which card it was, where the trace does not say: H100, or the driver's name"
    )
    where = "folder of X.profile.html and X.profile.json (default: the trace's; of a pipe, this one)"
    parser.add_argument("--out", type=Path, help=where)
    flags = parser.parse_args()
    made, lab = write(flags.file, flags.out or home_of(flags.file), flags.card, name_of(flags.file))
    found = lab.found
    print(f"{made}: {found.wall_ns / 1e6:,.2f} ms in {found.steps} steps, {found.idle_ns / found.wall_ns:.1%} idle")
    parts = {name: lab.ms(ns) for name, ns in found.category_ns.items()}
    print(json.dumps(dict(page=str(made), on_device=found.on_device, card=lab.card.name if lab.card else None,
                          step_ms=lab.ms(found.wall_ns), idle_ms=lab.ms(found.idle_ns), category_ms=parts,
                          beside=found.meta.get("beside", []), **rates(found, lab.card))))  # fmt: skip
