"""Puts runs side by side: each evaluation's mean and spread, as for one recipe with several seeds."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.files import write_atomically
from nanochat.flags import flag, parse, run_script
from nanochat.run import TRAINED, Run
from nanochat.tasks import TASKS


@dataclass
class Flags:
    runs: str = flag("speedrun", "names of the runs, comma-separated")
    write: str = flag("", "also write the numbers of each run, and of all, to this JSON file")


KNOWN = ("facts_taught", "facts_pretrained")


def numbers(run: Run) -> dict[str, dict[str, float]]:
    """{stage: {what: value}} of a run: rates by task, refusals of known facts, bits per byte."""
    found: dict[str, dict[str, float]] = {}
    chat = (run.summary("eval") or {}).get("chat", {})
    for stage in TRAINED:
        summary, results = run.summary(stage), chat.get(stage, {})
        values = {name: results[name]["rate"] for name in TASKS if name in results}
        for name in KNOWN:
            if name in results:
                values[f"{name} refused"] = results[name]["counts"]["refused"] / results[name]["n"]
        if summary and summary["val_bpb"] is not None:
            values["validation bits per byte"] = summary["val_bpb"]
        if values:
            found[stage] = values
    if not found:
        raise UserError(f"run {run.name!r} has no results in {run.folder}; train it with speedrun.sh --run {run.name}")
    return found


def spread(values: list[float]) -> dict[str, float]:
    return dict(mean=statistics.fmean(values), low=min(values), high=max(values))


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    names = [name for name in flags.runs.split(",") if name]
    each = {name: numbers(Run.open(name)) for name in names}
    first = each[names[0]]
    together: dict[str, dict[str, Any]] = {}
    for stage in first:
        for what in first[stage]:
            if all(what in run.get(stage, {}) for run in each.values()):
                together.setdefault(stage, {})[what] = spread([run[stage][what] for run in each.values()])
    print(f"Mean of {len(names)} runs ({', '.join(names)}), in brackets the lowest and the highest.\n")
    print(f"| | {' | '.join(together)} |\n|---|{'---|' * len(together)}")
    for what in dict.fromkeys(what for values in together.values() for what in values):
        cells = [shown(what, values.get(what)) for values in together.values()]
        print(f"| {what} | {' | '.join(cells)} |")
    if flags.write:
        write_atomically(Path(flags.write), json.dumps(dict(runs=each, together=together), indent=1).encode())


def shown(what: str, value: dict[str, float] | None) -> str:
    if value is None:
        return "–"
    form = ".4f" if "bits" in what else ".1%"
    return f"{value['mean']:{form}} ({value['low']:{form}} to {value['high']:{form}})"


if __name__ == "__main__":
    run_script(main)
