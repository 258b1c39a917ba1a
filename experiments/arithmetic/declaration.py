"""Sums in the head and by the tool, up to longer ones than any that training has."""

from collections.abc import Mapping
from typing import Any

from experiments import training
from nanochat.data.microworld.conversations import SUM_FRAMES
from nanochat.evaluate.intervals import wilson
from nanochat.lab.declaration import Experiment, Findings, Rows
from nanochat.lab.estimate import Interval, formatted, rate
from nanochat.lab.plot import curves
from nanochat.lab.table import Value, Values
from nanochat.tasks.arithmetic import sums_task

MOST = 100  # sums of each length, where there are so many
DIGITS = (1, 2, 3, 4, 5, 6)
HEAD = ("What is {a} + {b}? Do it in your head.",)
WAYS = ("tool", "head", "no tool")  # allowed; asked to do without; called, and nothing answers


def run(cell: Values, seed: int, size: Mapping[str, Any]) -> dict[str, Value]:
    with training.base("arithmetic", seed, **training.base_flags(size), num_iterations=cell["steps"]) as (made, _):
        training.chat_chain(made, seed, size)
        tasks = {
            way: [sums_task(str(d), "", (d,), HEAD if way == "head" else SUM_FRAMES) for d in DIGITS] for way in WAYS
        }
        asked = {way: {"tool": lambda call: None} if way == "no tool" else {} for way in WAYS}
        found = {way: training.ask(made, "sft", tasks[way], size["most"], size["limit"], **asked[way]) for way in WAYS}
    return {f"{way}_{digits}": round(result.rate, 4) for way in WAYS for digits, result in found[way].items()}


def there(digits: int) -> int:
    """Sums of so many digits that are asked at the declared size: those held out, of which there may be few."""
    return len(sums_task(str(digits), "", (digits,), SUM_FRAMES).questions(MOST))


def right(shares: list[float], digits: int) -> Interval:
    """Over the seeds; of the questions of one, by Wilson, where all seeds have the same share."""
    if min(shares) < max(shares):
        return rate(shares)
    return shares[0], *wilson(shares[0] * there(digits), there(digits))


def findings(rows: Rows) -> Findings:
    rates = {(way, d): right([float(row[f"{way}_{d}"]) for row in rows], d) for way in WAYS for d in DIGITS}
    claims = {f"{way}, {d} digits": formatted(found, ".1%") for (way, d), found in rates.items()}
    claims |= {f"declared sums of {d} digits": str(there(d)) for d in DIGITS}
    each = [f"{float(row['tool_3']):.0%}" for row in rows]
    claims["tool, 3 digits: seeds"] = ", ".join(each)
    held = rates["tool", 3][0] > 0.9 and rates["head", 3][0] < 0.5 and rates["tool", 5][0] < 0.5
    claims["verdict"] = "held" if held else "refuted"
    series = {way: [(float(d), *rates[way, d]) for d in DIGITS] for way in WAYS}
    picture = curves("Sums", "digits of both numbers (trained: 1 to 3)", "share right", series, log_x=False)
    return Findings(claims, {"sums.svg": picture})


EXPERIMENT = Experiment(
    question="Does a tool let a micro-model add, and how far beyond the lengths it was trained on?",
    hypothesis="By the tool sums of 3 digits are right in more than 9 of 10 cases, in the head in fewer than half; "
    "at 5 digits "
    "the tool does not help: the model no longer copies the numbers.",
    refuted_by="90% or less by the tool, half or more in the head at 3 digits, or half or more by the tool at 5.",
    metric="share of 100 held-out sums answered right, by digits (of one digit there are only 9, which was found after "
    "the run); by the tool, asked to do it in the head, and with a tool that does not answer",
    budget="3 chains of base, mid and SFT of about 5 minutes on one core",
    cells=(dict(steps=300),),
    seeds=(1, 2, 3),
    run=run,
    findings=findings,
    size=dict(training.CHAIN, most=MOST),
    smoke=dict(training.CHAIN_SMOKE, most=1),
    smoke_cells=(dict(steps=2),),
)
