"""The report card's section on reinforcement learning, from the stage's log: what it practised, how often it was right
before and after, curves, how rewards and lengths are spread, how far engine and trainer agree, and samples by rule.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from nanochat.log import LOG, Row, read_log
from nanochat.render import Curve, Figure, Section, Table, svg
from nanochat.run import Run

WINDOW = 10  # steps that are averaged
# What a plan says when a variant is off: nanochat/policy_gradient.py.
PLAIN = dict(by_std=False, normalize="token", clip_low=0.0, clip_high=0.0, kl=0.0, truncate=0.0, updates=1)


def section(run: Run) -> Section:
    """Without content where the run has not practised."""
    summary, rows = run.summary("rl"), read_log(run.stage("rl") / LOG)
    steps, exams = [row for row in rows if "reward" in row], [row for row in rows if "passes" in row]
    if not summary or not steps or not exams:
        return Section("Reinforcement learning", [])
    blocks: list[Any] = [outcome(summary, steps), before_and_after(exams)]
    if len(steps) > 1:
        blocks.append(drawn(f"reward by step (mean of {WINDOW})", smooth(steps), "report_reward.svg"))
    if len(exams) > 1:
        rates = [(row["step"], row["passes"]["1"]["rate"]) for row in exams]
        blocks.append(drawn("held-out pass@1 by step", rates, "report_pass.svg"))
    blocks += [spread(steps), agreement(steps), samples(exams)]
    return Section("Reinforcement learning", blocks)


def drawn(title: str, points: list[tuple[float, float]], file: str) -> Figure:
    return Figure(title, svg(Curve(title, points)), file)


def outcome(summary: dict[str, Any], steps: list[Row]) -> str:
    """In a sentence."""
    plan = summary["plan"]
    variants = [f"{name} {plan[name]}" for name, usual in PLAIN.items() if plan.get(name, usual) != usual]
    rollout, learning = (sum(row[f"{part}_seconds"] for row in steps) for part in ("rollout", "learning"))
    return (
        f"{len(steps)} steps of {plan['questions']} questions with {plan['num_samples']} answers each, of "
        f"{plan['task']}; rewarded: {plan['reward']}; variants: {', '.join(variants) or 'none'}. "
        f"Rollouts took {rollout:.0f} s and learning {learning:.0f} s, on {summary['device']}."
    )


def before_and_after(exams: list[Row]) -> Table:
    """Held-out accuracy at the start and at the end: sampled at temperature 1, and greedily."""
    shown = lambda one: f"{one['rate']:.1%} ({one['low']:.1%} to {one['high']:.1%})"
    first, last = exams[0], exams[-1]
    rows = [(f"pass@{k}, temperature 1", shown(one), shown(last["passes"][k])) for k, one in first["passes"].items()]
    rows.append(("greedy", shown(first["greedy"]), shown(last["greedy"])))
    count = f"held-out questions, n={exams[-1]['questions']}"
    return Table((count, *(f"after {row['step']} steps" for row in (exams[0], exams[-1]))), rows)


def smooth(steps: list[Row]) -> list[tuple[float, float]]:
    """(step, mean reward of the WINDOW steps up to it)."""
    rewards = [row["reward"] for row in steps]
    return [(row["step"], statistics.fmean(rewards[max(0, i + 1 - WINDOW) : i + 1])) for i, row in enumerate(steps)]


def spread(steps: list[Row]) -> Table:
    """Of the first and of the last WINDOW steps: how often a question's answers were right, and how long they were."""
    parts = (steps[:WINDOW], steps[-WINDOW:])
    bins: dict[str, Callable[[float], bool]] = {
        "questions with no answer rewarded": lambda rate: rate == 0,
        "with fewer than half": lambda rate: 0 < rate < 0.5,
        "with half or more": lambda rate: 0.5 <= rate < 1,
        "with all": lambda rate: rate == 1,
    }
    rows = []
    for name, inside in bins.items():
        rates = [[rate for row in part for rate in row["groups"]] for part in parts]
        rows.append((name, *(f"{sum(map(inside, some)) / len(some):.1%}" for some in rates)))
    rows.append(("answers cut off by the limit", *(f"{mean(part, 'unended'):.1%}" for part in parts)))
    for i, name in enumerate(("shortest", "quarter", "median", "three quarters", "longest")):
        lengths = [statistics.fmean(row["lengths"][i] for row in part) for part in parts]
        rows.append((f"tokens of an answer, {name}", *(f"{length:.1f}" for length in lengths)))
    return Table(("rewards and lengths, means of steps", *(f"{p[0]['step']}–{p[-1]['step']}" for p in parts)), rows)


def agreement(steps: list[Row]) -> Table:
    """Of the trainer's probabilities over the engine's, for the same tokens."""
    rows = [
        ("largest |ratio − 1| of any token", f"{max(row['ratio_largest'] for row in steps):.1e}"),
        ("mean |ratio − 1|", f"{mean(steps, 'ratio_mean'):.1e}"),
        ("tokens whose ratio was truncated", f"{mean(steps, 'ratio_truncated'):.2%}"),
    ]
    return Table(("trainer's over engine's probability", f"steps 1–{steps[-1]['step']}"), rows)


def mean(rows: Sequence[Row], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def samples(exams: list[Row]) -> Table:
    """The first answer of each kind, at temperature 1, before and after."""
    rows = []
    for row in (exams[0], exams[-1]):
        for kind, one in sorted(row["examples"].items()):
            tool = f"[python: {'; '.join(one['python'])}] " if one["python"] else ""
            said = f"{tool}{one['answer']}" or "(nothing)"
            rows.append((str(row["step"]), kind, one["question"], said, one["expected"]))
    return Table(("after steps", "the first that is", "question", "answer", "expected"), rows)
