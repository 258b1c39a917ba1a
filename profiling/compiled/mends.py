"""What makes the step move less beside our ops, each taken back and counted: `python -m profiling mends`, a minute.

As ablate.py counts a step without an op, for a case and a card of its: for the ledger, which has its counts beside
these. Nothing of the model is switched by a flag: a child replaces a function before it builds the step.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanochat.files import write_atomically
from nanochat.flags import parse
from profiling.compiled import ablate
from profiling.compiled.lower import ask, child_case

FILE = Path(__file__).with_name("mends.json")
CARD = "h100"


def cast_at_every_use() -> None:
    from nanochat.gpt import GPT

    GPT.keep_shadows = lambda self, optimizer: None  # type: ignore[method-assign]


def weight_gradients_from_autograd() -> None:
    from nanochat import gpt

    gpt.kept = lambda *layers: ()


def input_gradients_from_autograd() -> None:
    from kernels.linears import linears
    from nanochat import gpt

    def each(x: Any, *weights: Any, gradients: Any = ()) -> tuple[Any, ...]:
        return tuple(linears(x, weight, gradients=gradients[i : i + 1])[0] for i, weight in enumerate(weights))

    gpt.linears = each


MENDS: dict[str, Callable[[], None]] = {
    "weights cast once a step, and all that follows from it": cast_at_every_use,
    "weights' gradients added to in their products": weight_gradients_from_autograd,
    "gradients of the input of q, k and v summed in their products": input_gradients_from_autograd,
}


def answer() -> None:
    """What a child does: ablate.py's sums, with what the case names taken back."""
    case, _ = child_case()
    if case.without:
        MENDS[case.without]()
    ablate.answer()


def counted(without: str = "") -> dict[str, int]:
    """ablate.py's sums of its step, "" as it is. Raises as lower.ask."""
    case = replace(ablate.case("step"), without=without)
    return ask("profiling.compiled.mends", case, CARD)  # type: ignore[no-any-return]


@dataclass
class Flags:
    pass


def main() -> None:
    parse(Flags, __doc__ or "")
    found = {name: counted(name) for name in ("", *MENDS)}
    write_atomically(FILE, (ablate.text(found, 1) + "\n").encode())
    print(json.dumps(dict(written=str(FILE))))


if __name__ == "__main__":
    answer()
