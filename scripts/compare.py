"""Puts runs side by side: each evaluation's mean and spread, as for one recipe with several seeds, or two models on the
same questions.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.evaluate.intervals import mean
from nanochat.evaluate.paired import adjusted, paired, taker
from nanochat.files import write_atomically
from nanochat.flags import flag, parse, path, run_script
from nanochat.run import TRAINED, Run
from nanochat.tasks import TASKS


@dataclass
class Flags:
    runs: str = flag("speedrun", "names of the runs, comma-separated")
    paired: bool = flag(False, "compare two models question by question: RUN:STAGE,RUN:STAGE (or server:MODEL)")
    write: str = path("", "also write the numbers of each run, and of all, to this JSON file")


KNOWN = ("facts_taught", "facts_pretrained")


def numbers(run: Run) -> dict[str, dict[str, float]]:
    """{stage: {what: value}} of a run: rates by task, refusals of known facts, ChatCORE, CORE, bits per byte."""
    found: dict[str, dict[str, float]] = {}
    done = run.summary("eval") or {}
    chat = done.get("chat", {})
    for stage in TRAINED:
        summary, results = run.summary(stage), chat.get(stage, {})
        results = {name: one for name, one in results.items() if one["n"]}  # older versions kept empty ones
        values = {name: results[name]["rate"] for name in TASKS if name in results}
        for name in KNOWN:
            if name in results:
                values[f"{name} refused"] = results[name]["counts"]["refused"] / results[name]["n"]
        for what, key, name in (("ChatCORE", "chatcore", "score"), ("CORE", "core", "core")):
            if score := done.get(key, {}).get(stage):
                without = f", without {', '.join(score['missing'])}" if score["partial"] else ""
                values[what + without] = score[name]
        if summary and summary["val_bpb"] is not None:
            values["validation bits per byte"] = summary["val_bpb"]
        if values:
            found[stage] = values
    if not found:
        raise UserError(f"run {run.name!r} has no results in {run.folder}; train it with speedrun.sh --run {run.name}")
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Mean, lowest and highest, and the 95% interval of the mean where there are several (Student's t)."""
    found = dict(mean=statistics.fmean(values), low=min(values), high=max(values))
    if len(values) > 1:
        _, found["mean_low"], found["mean_high"] = mean(values)
    return found


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    names = [name for name in flags.runs.split(",") if name]
    if not names:
        raise UserError(f"--runs is {flags.runs!r}, wanted names of runs, comma-separated")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--runs names {twice[0]!r} twice; a run beside itself says nothing of its spread: name others")
    content = two(names) if flags.paired else several(names)
    if flags.write:
        write_atomically(Path(flags.write), json.dumps(content, indent=1).encode())


def several(names: list[str]) -> dict[str, Any]:
    """Prints the runs' means; returns the numbers."""
    each = {name: numbers(Run.open(name)) for name in names}
    first = each[names[0]]
    together: dict[str, dict[str, Any]] = {}
    for stage in first:
        for what in first[stage]:
            if all(what in run.get(stage, {}) for run in each.values()):
                together.setdefault(stage, {})[what] = spread([run[stage][what] for run in each.values()])
    if not together:
        has = "; ".join(
            f"{name} has {', '.join(f'{what} of {stage}' for stage in run for what in run[stage])}"
            for name, run in each.items()
        )
        raise UserError(f"these runs have no result in common: {has}; evaluate them alike")
    interval = "; then the 95% interval of the mean, by Student's t" if len(names) > 1 else ""
    print(f"Mean of {len(names)} runs ({', '.join(names)}), in brackets the lowest and the highest{interval}.\n")
    print(f"| | {' | '.join(together)} |\n|---|{'---|' * len(together)}")
    for what in dict.fromkeys(what for values in together.values() for what in values):
        cells = [shown(what, values.get(what)) for values in together.values()]
        print(f"| {what} | {' | '.join(cells)} |")
    return dict(runs=each, together=together)


def shown(what: str, value: dict[str, float] | None) -> str:
    if value is None:
        return "–"
    rate = "bits" not in what and "CORE" not in what
    form = ".1%" if rate else ".4f"
    text = f"{value['mean']:{form}} ({value['low']:{form}} to {value['high']:{form}})"
    if "mean_low" not in value:
        return text
    low, high = value["mean_low"], value["mean_high"]
    low, high = (max(0.0, low), min(1.0, high)) if rate else (low, high)
    return f"{text}; {low:{form}} to {high:{form}}"


def two(names: list[str]) -> dict[str, Any]:
    """Prints the paired comparison of two models; returns the numbers."""
    if len(names) != 2:
        raise UserError(f"--paired compares two, RUN:STAGE,RUN:STAGE, and --runs names {len(names)}")
    a, b = (taker(name) for name in names)
    found, left_out = paired(a, b)
    holm = adjusted({task: one.p for task, one in found.items()})
    print(f"{a.name} and {b.name} on the same questions: McNemar's exact test, and with Holm's correction for")
    print(f"{len(found)} tasks; the difference is the first's rate minus the second's, with its 95% interval.\n")
    print(
        f"| task | n | only {a.name} | only {b.name} | difference | p | p, corrected |\n|---|---|---|---|---|---|---|"
    )
    rows = {}
    for task, one in found.items():
        low, high = one.interval
        difference = f"{one.difference:+.1%} ({low:+.1%} to {high:+.1%})"
        print(f"| {task} | {one.n} | {one.only_a} | {one.only_b} | {difference} | {one.p:.3g} | {holm[task]:.3g} |")
        rows[task] = dict(
            n=one.n, only_a=one.only_a, only_b=one.only_b, difference=one.difference, low=low, high=high, p=one.p,
            corrected=holm[task],
        )  # fmt: skip
    for why in left_out:
        print(f"left out: {why}")
    return dict(a=a.name, b=b.name, tasks=rows, left_out=left_out)


if __name__ == "__main__":
    run_script(main, goes_on=True)
