"""Two models on the same questions, question by question: which of them is better, and how sure that is.

Most of a rate's noise is in the questions, which both had; only those that one got and the other did not tell them
apart. `Taker` names whose results: a run's stage, or a model behind a server.
"""

from dataclasses import dataclass
from typing import Any

from nanochat.errors import UserError
from nanochat.evaluate.chat_tasks import SIGNS
from nanochat.evaluate.intervals import McNemar
from nanochat.evaluate.results import evaluated
from nanochat.run import Run

STAGES = ("rl", "sft", "mid", "base", "server")  # of those that were evaluated, the first is meant


@dataclass(frozen=True)
class Taker:
    name: str
    results: dict[str, dict[str, Any]]  # by task, as TaskResult.numbers has them


def taker(name: str) -> Taker:
    """Of "RUN", "RUN:STAGE" (without a stage, the last one evaluated), or "server:MODEL". Raises UserError."""
    before, _, after = name.partition(":")
    served = before == "server" and after
    run, stage = (Run.served(after), "server") if served else (Run.open(before), after)
    chat = {one: tasks for one, tasks in evaluated(run)[0].get("chat", {}).items() if tasks}
    stage = stage or next((one for one in STAGES if one in chat), "")
    if stage not in chat:
        there = ", ".join(chat) or "nothing"
        raise UserError(
            f"{name!r} has no results of chat tasks in {run.folder} (evaluated there: {there}); run chat_eval"
        )
    return Taker(f"{before}:{after or stage}", chat[stage])


def paired(a: Taker, b: Taker) -> tuple[dict[str, McNemar], list[str]]:
    """(the comparison in each task that both took, why others are left out). Raises UserError where no task is left.

    Wanted outcomes are compared: of questions that nobody can know, refusals.
    """
    found, left_out = {}, []
    for task in a.results:
        if task not in b.results:
            left_out.append(f"{task}: {b.name} has no result")
            continue
        one, two = a.results[task], b.results[task]
        if not all(result.get(key) for result in (one, two) for key in ("outcomes", "asked")):
            left_out.append(f"{task}: an older version wrote its result, without each question's; evaluate again")
        elif one["asked"] != two["asked"]:
            left_out.append(f"{task}: not the same questions ({one['n']} and {two['n']}); evaluate both alike")
        else:
            sign = SIGNS[one["wanted"]]
            pairs = [(x == sign, y == sign) for x, y in zip(one["outcomes"], two["outcomes"], strict=True)]
            found[task] = McNemar(len(pairs), pairs.count((True, False)), pairs.count((False, True)))
    left_out += [f"{task}: {a.name} has no result" for task in b.results if task not in a.results]
    if not found:
        raise UserError(f"{a.name} and {b.name} have no task with the same questions: {'; '.join(left_out)}")
    return found, left_out


def adjusted(p: dict[str, float]) -> dict[str, float]:
    """Each p as if the other tasks had not been looked at too (Holm, Scandinavian Journal of Statistics 6, 1979): of
    twenty comparisons of equals, one has p < 0.05.
    """
    found, least = {}, 0.0
    for i, task in enumerate(sorted(p, key=lambda task: p[task])):
        least = found[task] = max(least, min(1.0, p[task] * (len(p) - i)))
    return {task: found[task] for task in p}
