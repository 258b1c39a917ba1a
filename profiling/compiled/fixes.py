"""What makes the step move less beside our ops, each taken back and counted: `python -m profiling fixes`, minutes.

As ablate.py counts a step without an op, for a case and a card of its: for the ledger, which has its counts beside
these. And how much of what streams is touched less than 16 bytes at a time, read in the kernels' machine code. Nothing
of the model is switched by a flag: a child replaces a function before it builds the step.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from nanochat.files import write_atomically
from nanochat.flags import parse
from profiling.compiled import ablate, launches, memory, null_cards
from profiling.compiled.launches import NOT_STREAMING
from profiling.compiled.lower import ask, child_case, child_ends, prepared

FILE = Path(__file__).with_name("fixes.json")
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
        inputs = (x[..., : weight.size(1)] for weight in weights)
        return tuple(linears(h, w, gradients=gradients[i : i + 1])[0] for i, (h, w) in enumerate(zip(inputs, weights)))

    gpt.linears = each


def gradients_made_anew() -> None:
    from nanochat.gpt import GPT

    shadows = GPT.keep_shadows

    def but_the_heads(self: Any, optimizer: Any) -> None:
        shadows(self, optimizer)
        self.lm_head.shadow = None  # or its gradient would be made in 16 bits

    GPT.keep_gradients = lambda self, optimizer: optimizer.keep_gradients()  # type: ignore[method-assign]
    GPT.keep_shadows = but_the_heads  # type: ignore[method-assign]


def rows_kept_for_backward() -> None:
    import torch.nn.functional as F

    lookup = import_module("kernels.embedding")._Lookup  # the package has the function of that name
    note = lookup.forward

    def looked_up(ctx: Any, tokens: Any, weight: Any, gradient: Any, fused: bool) -> Any:
        note(ctx, tokens, weight, gradient, fused)
        return F.embedding(tokens, weight)

    lookup.forward = staticmethod(looked_up)


def gates_apart() -> None:
    from nanochat import gpt

    together = gpt.together

    def apart(x: Any, *layers: Any) -> tuple[Any, ...]:
        gates = [layer for layer in layers if layer.in_features < x.size(-1)]
        whole = [layer for layer in layers if layer not in gates]
        return *together(x, *whole), *(together(x[..., : gate.in_features], gate)[0] for gate in gates)

    gpt.together = apart


def views_of_lambdas() -> None:
    from nanochat import gpt

    mix = gpt.mix_rms_norm

    def of_views(x: Any, x0: Any, a: Any, b: Any, delta: Any, index: int) -> tuple[Any, Any]:
        return mix(x, x0, a[index], b[index], delta)

    gpt.mix_rms_norm = of_views  # type: ignore[assignment]


def sums_before_the_norm() -> None:
    from nanochat import gpt

    mix = gpt.mix_rms_norm

    def of_sum(x: Any, x0: Any, a: Any, b: Any, delta: Any, index: int) -> tuple[Any, Any]:
        return mix(x if delta is None else x + delta, x0, a, b, None, index)

    gpt.mix_rms_norm = of_sum  # type: ignore[assignment]


FIXES: dict[str, Callable[[], None]] = {
    "weights cast once a step, and all that follows from it": cast_at_every_use,
    "weights' gradients added to in their products": weight_gradients_from_autograd,
    "gradients of the input of q, k and v summed in their products": input_gradients_from_autograd,
    "gradients of head and tables added where they are kept, not to zeros": gradients_made_anew,
    "value embeddings gated straight from their tables, again in backward": rows_kept_for_backward,
    "a gate's gradient added to the channels it reads, not padded with zeros": gates_apart,
    "what the MLP returns added in the next layer's mix and norm": sums_before_the_norm,
    "a layer's lambdas passed as vectors and an index, not as views": views_of_lambdas,
}


def answer() -> None:
    """What a child does: ablate.py's sums, with what the case names taken back, and narrow's."""
    from profiling.compiled import generated

    case = child_case()
    if case.without:
        FIXES[case.without]()
    found, events, rows = generated.recorded(prepared(case), null_cards.card(CARD).target)
    sums = ablate.sums(case, found.launches, memory.report(events))
    child_ends(sums | dict(narrow=narrow(found.launches, rows)))


def narrow(found: list[launches.Launch], kernels: dict[str, dict[str, Any]]) -> int:
    """Bytes that kernels stream in a micro-step while most of what they move is touched less than 16 bytes at a time.

    kernels: Launch.kernel → its machine code.
    """
    streaming = (row for row in found if row.phase in ablate.MICRO and row.category not in NOT_STREAMING)
    return sum(row.bytes for row in streaming if 0 < (kernels.get(row.kernel, {}).get("access_bytes") or 0) < 16)


def counted(without: str = "") -> dict[str, int]:
    """ablate.py's sums of its step and `narrow`, "" as it is. Raises as lower.ask."""
    case = replace(ablate.case("step"), without=without)
    return ask("profiling.compiled.fixes", case, CARD)  # type: ignore[no-any-return]


@dataclass
class Flags:
    pass


def main() -> None:
    parse(Flags, __doc__ or "")
    found = {name: counted(name) for name in ("", *FIXES)}
    write_atomically(FILE, (ablate.text(found, 1) + "\n").encode())
    print(json.dumps(dict(written=str(FILE))))


if __name__ == "__main__":
    answer()
