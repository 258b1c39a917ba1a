"""experiments/rl.md: its numbers are those of experiments/rl/results.json, and what was asked of them holds."""

import json
import re
import statistics
from pathlib import Path

import pytest
from test_stated_numbers import numbers

ROOT = Path(__file__).parent.parent
NOTE = (ROOT / "experiments" / "rl.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
RESULTS = json.loads((ROOT / "experiments" / "rl" / "results.json").read_text())
RUNS, FORM, FORGETS = RESULTS["runs"], RESULTS["form"], RESULTS["chat_eval, greedy"]
SEEDS = ("42", "43", "44")
KINDS = {
    "pass@1, temperature 1": lambda exam: exam["passes"]["1"]["rate"],
    "pass@4": lambda exam: exam["passes"]["4"]["rate"],
    "greedy": lambda exam: exam["greedy"]["rate"],
}
percent = lambda value: f"{value:.1%}"
points = lambda value: f"+{100 * value:.1f}"


def exams(kind, at):
    """Of every seed."""
    return [KINDS[kind](RUNS[seed]["held_out"][at]) for seed in SEEDS]


def gains(kind):
    return [after - before for before, after in zip(exams(kind, 0), exams(kind, -1))]


def mixed(run):
    """Of the first five steps' questions."""
    return statistics.fmean(run["mixed"][:5])


def rollout(run):
    return run["median_rollout_seconds"] / (run["median_rollout_seconds"] + run["median_learning_seconds"])


def rows():
    """The table's, as the note has them."""
    for kind in KINDS:
        for at, when in ((0, "before"), (-1, "after")):
            cells = " | ".join(map(percent, exams(kind, at)))
            gain = f" {points(statistics.fmean(gains(kind)))} points ({points(min(gains(kind)))}) " if at else " "
            yield f"| {kind}, {when} | {cells} |{gain}|"
    for key, what in (
        ("cpu_minutes", "CPU minutes of the whole command"),
        ("wall_minutes", "wall minutes, mostly stopped while others measured"),
    ):
        yield f"| {what} | " + " | ".join(f"{RUNS[seed][key]:.1f}" for seed in SEEDS) + " | |"


def allowed_numbers():
    """Every number with a decimal point or a percent sign that the note may have."""
    values = [value for kind in KINDS for at in (0, -1) for value in exams(kind, at)]
    values += [KINDS[kind](exam) for exam in FORM["held_out"] for kind in KINDS]
    values += [FORGETS[stage][task]["rate"] for stage in FORGETS for task in FORGETS[stage]]
    yield from map(percent, values)
    shares = [*exams("pass@1, temperature 1", 0), *map(mixed, RUNS.values()), *map(rollout, RUNS.values())]
    yield from (f"{value:.0%}" for value in shares)
    yield from (f"{statistics.fmean(exams(kind, at)):.0%}" for kind in KINDS for at in (0, -1))
    yield from (points(value) for kind in KINDS for value in (statistics.fmean(gains(kind)), min(gains(kind))))
    yield from (f"{run[key]:.1f}" for run in RUNS.values() for key in ("cpu_minutes", "wall_minutes"))
    yield from (f"{statistics.fmean(FORM['rewards'][part]):.2f}" for part in (slice(3), slice(-3, None)))
    yield f"{max(run['ratio_largest'] for run in RUNS.values()):.1e}"
    steps = RESULTS["bfloat16, --truncate 1.05"]
    yield f"{max(step['ratio_largest'] for step in steps):.3f}"
    yield f"{statistics.fmean(step['ratio_mean'] for step in steps):.1e}"
    yield percent(statistics.fmean(step["ratio_truncated"] for step in steps))


def test_every_number_of_the_note_is_one_of_the_results():
    known = {number.replace("e-0", "e-") for number in allowed_numbers()}
    assert len(numbers(NOTE)) > 40 and not [number for number in numbers(NOTE) if number not in known]
    for row in rows():
        assert row in NOTE.replace("**", ""), row
    part = README[README.index("**Reinforcement learning.**") : README.index("experiments/rl.md")]
    assert numbers(part) and not [number for number in numbers(part) if number not in known]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_note_shows_runs_of_its_command(seed):
    plan, command = RUNS[seed]["plan"], NOTE[NOTE.index("scripts.chat_rl") :].split("```")[0]
    given = dict(re.findall(r"--([a-z-]+) (\S+)", command))
    for flag in ("questions", "num-samples", "max-new-tokens", "num-iterations"):
        assert int(given[flag]) == plan[flag.replace("-", "_")]
    first = RUNS[seed]["held_out"][0]
    assert int(given["eval-questions"]) == first["questions"] and int(given["eval-samples"]) == first["samples"]
    assert plan["seed"] == int(seed) and plan["reward"] == "right" and RUNS[seed]["steps"] == plan["num_iterations"]


def test_what_was_asked_of_it_holds():
    """15 to 60% at first and 30% of groups mixed; 20 points on average and 15 at least; ten minutes; 1e-3."""
    for seed in SEEDS:
        assert 0.15 <= KINDS["pass@1, temperature 1"](RUNS[seed]["held_out"][0]) <= 0.6 and mixed(RUNS[seed]) >= 0.3
        assert RUNS[seed]["cpu_minutes"] <= 10 and RUNS[seed]["ratio_largest"] <= 1e-3
    for kind in ("pass@1, temperature 1", "greedy"):
        assert statistics.fmean(gains(kind)) >= 0.2 and min(gains(kind)) >= 0.15
