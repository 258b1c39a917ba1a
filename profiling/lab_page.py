"""The page about recorded steps of training or decoding: `write(trace, folder)` makes profile.html and profile.json.

A section that fails says so in a sentence, and the rest of the page still comes. The sections are in lab_parts.py, the
numbers in analysis.py and mfu.py.
"""

import json
from pathlib import Path

from nanochat import render
from nanochat.files import write_atomically
from nanochat.render import Section
from profiling import lab_parts, trace
from profiling.analysis import Analysis, analyse
from profiling.cards import by_driver, card
from profiling.lab_parts import Lab

PARTS = (
    ("The run", lab_parts.run),
    ("Where a step goes", lab_parts.where),
    ("By phase and category", lab_parts.phases),
    ("Top kernels or operators", lab_parts.kernels),
    ("Roofline", lab_parts.roofline),
    ("Idle", lab_parts.idle),
    ("Communication", lab_parts.communication),
    ("Memory", lab_parts.memory),
    ("The card", lab_parts.sensors),
    ("How to read on", lab_parts.further),
)


def write(path: Path, folder: Path, card_name: str = "") -> tuple[Path, Lab]:
    """Analyses a trace and writes page and JSON; (the page's path, what it shows).

    card_name: a short name, or the driver's. Raises UserError for what is no trace, and for a card that is not known.
    """
    chip = (by_driver(card_name) or card(card_name)) if card_name else None
    found = analyse(trace.read(path))
    lab = Lab(found, chip or by_driver(found.card or ""), path.name)
    where = folder / "profile.html"
    write_atomically(folder / "profile.json", json.dumps(found.json(), indent=1).encode())
    write_atomically(where, render.page(title(found), sections(lab)).encode())
    return where, lab


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
