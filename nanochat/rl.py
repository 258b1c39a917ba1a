"""Reinforcement learning: a step of on-policy policy gradient, in the trainer's loop.

A step: the engine gets the weights and answers Q questions S times each (rollouts.py); policy_gradient.py makes a loss
of the rewards; the optimizer is the one of every stage. `Practising.step` takes the place of step.step in the trainer,
and `Practising.examine` that of bits per byte: pass@1 and pass@k on held-out questions, and greedily. Ranks divide the
questions; a question's samples stay together, so an advantage needs no other rank.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from nanochat.calculator import calculate
from nanochat.chat import Tool
from nanochat.data.loader import LoaderState
from nanochat.data.source import Position
from nanochat.engine import Engine, Sampling
from nanochat.evaluate import generative
from nanochat.evaluate.chat_tasks import Row, TaskResult, evaluate
from nanochat.gpt import GPT
from nanochat.hardware import Hardware
from nanochat.policy_gradient import Mismatch, Objective, Rows, advantages, mismatch_row, rows, token_losses, weights
from nanochat.ranks import any_rank, gathered
from nanochat.rollouts import Asked, Sample, roll_out
from nanochat.step import Outcome, set_rates, update
from nanochat.tasks import Question
from nanochat.tasks.practice import Practice
from nanochat.tokenizer import Tokenizer
from nanochat.trainer import Stage


@dataclass
class Practising:
    """What a stage of RL does instead of training on batches. `engine` has a copy of the model of its own."""

    engine: Engine
    tokenizer: Tokenizer
    practice: Practice
    questions: Callable[[int], list[Question]]  # those of a step, all ranks together
    objective: Objective
    samples: int  # S
    rows: int  # of a micro-batch
    limit: int  # tokens of an answer
    seed: int
    reward: str = "right"
    examined: int = 128  # held-out questions
    examined_samples: int = 8  # of each
    reference: GPT | None = None  # for a KL term
    tool: Tool = calculate

    def step(
        self, stage: Stage, model: Any, data: Iterator, accumulation: int, stop: Callable[[], bool] = lambda: False
    ) -> Outcome:
        """Rolls out and learns: one step, as step.step takes it. There are no batches: all follows from its number."""
        hardware, started = stage.hardware, time.perf_counter()
        stage.state.loader = LoaderState(Position(), [])
        with record_function("rollout"):
            own = self.roll_out(stage)
        middle = time.perf_counter()
        drawn = gathered([(one.place, one.reward, one.learnt, one.ended) for one in own], hardware.world)
        every = sorted(sample for part in drawn for sample in part)
        loss, mismatch, tokens, before = self.learn(stage, model, own, len(every), sum(one[2] for one in every))
        hardware.synchronize()
        learning = time.perf_counter() - middle
        mismatches, seen = zip(*gathered((mismatch, tokens), hardware.world))
        found = numbers(every, self.samples)
        said = f"reward {found['reward']:.3f}  mixed {found['mixed']:.0%}  "
        said += f"rollout {middle - started:.1f} s + learning {learning:.1f} s"
        row = dict(found, **mismatch_row(mismatches), rollout_seconds=middle - started, learning_seconds=learning)
        return Outcome(loss, False, any_rank(stop(), hardware), before, sum(seen), row, said)

    def roll_out(self, stage: Stage) -> list[Sample]:
        """This rank's share of the step's samples, by the weights as they are now."""
        hardware, step = stage.hardware, stage.state.step
        asked = [Asked(place, question) for place, question in enumerate(self.questions(step))]
        self.engine.load(stage.model.state_dict())
        return roll_out(
            self.engine, self.tokenizer, self.practice, self.reward, asked[hardware.rank :: hardware.world],
            self.samples, self.limit, self.seed, step, self.tool,
        )  # fmt: skip

    def learn(
        self, stage: Stage, model: Any, own: list[Sample], samples: int, tokens: int
    ) -> tuple[float, Mismatch, int, bool | None]:
        """Updates the model from this rank's samples; samples, tokens: how many of all ranks are learnt from.

        An update that changes nothing (nanochat/step.py) is the step's last: it would only be the same again, and what
        the trainer asks about the step is the last one. Returns the first update's loss of all ranks, or one that is
        not finite; what this rank measured; how many tokens it ran; and as Outcome.before.
        """
        objective, hardware = self.objective, stage.hardware
        batches, teaching = self.batches(own, samples, tokens, hardware.device)
        teaching = any_rank(teaching or self.drawn_back(stage.model), hardware)
        set_rates(stage)
        before, losses, mismatch = stage.optimizer.finish_step(), [], Mismatch()
        for _ in range(objective.updates):
            total = torch.zeros((), device=hardware.device)
            for batch in batches:
                with record_function("forward"):
                    logp = -model(batch.inputs, batch.targets, loss_reduction="none").float()
                if batch.old is None:
                    batch.old = logp.detach()
                    mismatch.add(batch, objective.truncate)
                    if self.reference:
                        with torch.no_grad():
                            batch.reference = -self.reference(batch.inputs, batch.targets, loss_reduction="none")
                loss = token_losses(logp, batch, objective).sum()
                total += loss.detach()
                with record_function("backward"):
                    loss = loss * hardware.world  # the optimizer takes the mean over ranks
                    (stage.scaler.scale(loss) if stage.scaler else loss).backward()
            if hardware.world > 1:
                dist.all_reduce(total)  # where one rank's is not finite, none updates
            losses.append(total.item())
            with record_function("optimizer"):
                if teaching:  # or momentum alone would move the weights
                    update(stage, losses[-1])
                stage.optimizer.zero_grad(set_to_none=True)
            if not math.isfinite(losses[-1]):
                stage.optimizer.finish_step()  # an update before it does not make the step a good one
                break
            if not teaching or stage.optimizer.found_inf.item():
                break
        said = losses[0] if math.isfinite(losses[-1]) else losses[-1]
        return said, mismatch, len(losses) * sum(batch.inputs.numel() for batch in batches), before

    def batches(self, own: list[Sample], samples: int, tokens: int, device: torch.device) -> tuple[list[Rows], bool]:
        """(micro-batches of the samples that teach something, the longest first; whether one has an advantage).

        Without an advantage a sample's gradient is zero, but for a KL term: it is not run. One at least always is, to
        measure how far engine and trainer agree.
        """
        rewards = torch.tensor([one.reward for one in own], dtype=torch.float64)
        advantage = advantages(rewards.view(-1, self.samples), self.objective.by_std).flatten()
        learnt = torch.tensor([one.learnt for one in own], dtype=torch.float64)
        weight = weights(learnt, self.objective.normalize, self.limit, samples, tokens)
        chosen = [i for i in range(len(own)) if advantage[i] != 0 or self.objective.kl]
        order = sorted(chosen or [0], key=lambda i: -len(own[i].tokens))
        parts = [order[at : at + self.rows] for at in range(0, len(order), self.rows)]
        made = [rows([own[i] for i in part], advantage[part], weight[part], device) for part in parts]
        return made, bool(advantage.any())

    def drawn_back(self, model: GPT) -> bool:
        """Whether a KL term has a gradient. While the policy still is the reference, that would be rounding alone,
        which the optimizer makes as large as any other.
        """
        if self.reference is None:
            return False
        pairs = zip(model.parameters(), self.reference.parameters())
        return any(bool((one != other).any()) for one, other in pairs)

    def examine(self, stage: Stage, stop: Callable[[], bool]) -> tuple[dict[str, Any], str] | None:
        """(numbers for the log, a sentence) about the held-out questions; None when one process is told to stop."""
        self.engine.load(stage.model.state_dict())
        sampled = Sampling(1.0, None, self.seed)
        try:
            drawn = self._asked(stage.hardware, sampled, self.examined_samples, stop)
            best = self._asked(stage.hardware, replace(sampled, temperature=0.0), 1, stop)
        except Stopped:
            return None
        found, greedy = drawn.numbers(), best.numbers()
        passes = found.get("pass") or {"1": {key: found[key] for key in ("rate", "low", "high")}}
        row = dict(
            passes=passes,
            greedy={key: greedy[key] for key in ("rate", "low", "high")},
            questions=drawn.n,
            samples=self.examined_samples,
            temperature=1.0,
            lengths=quartiles([len(self.tokenizer.encode(one["answer"])) for one in drawn.rows]),
            examples=first_of_each(drawn.rows),
        )
        said = ", ".join(f"pass@{k} {one['rate']:.1%}" for k, one in passes.items())
        return row, f"held-out {self.practice.task.name}: {said}, greedy {greedy['rate']:.1%} (n={drawn.n})"

    def _asked(self, hardware: Hardware, sampling: Sampling, samples: int, stop: Callable[[], bool]) -> TaskResult:
        answer = generative.by_engine(self.engine, self.tokenizer, self.tool)

        def tick(done: int) -> None:
            if hardware.world == 1 and stop():  # of several ranks none leaves the others alone
                raise Stopped

        ask = lambda task, asked: generative.answered(answer, task, asked, self.limit, sampling, samples, tick)
        return evaluate(self.practice.task, self.examined, ask, hardware)


class Stopped(Exception):
    """An evaluation was told to stop."""


def numbers(every: list[tuple[int, float, int, str]], samples: int) -> dict[str, Any]:
    """Of a step's samples, (place, reward, tokens that it chose, how it ended), those of a question together."""
    rewards, lengths = [one[1] for one in every], [one[2] for one in every]
    groups = [rewards[at : at + samples] for at in range(0, len(rewards), samples)]
    return dict(
        reward=statistics.fmean(rewards),
        groups=[statistics.fmean(group) for group in groups],
        mixed=statistics.fmean(len(set(group)) > 1 for group in groups),
        lengths=quartiles(lengths),
        unended=statistics.fmean(one[3] == "length" for one in every),
        sampled_tokens=sum(lengths),
    )


def quartiles(values: list[int]) -> list[float]:
    """Least, quartiles, largest."""
    if len(values) < 2:
        return [float(value) for value in values * 5]
    return [float(min(values)), *statistics.quantiles(values, n=4, method="inclusive"), float(max(values))]


def first_of_each(rows: list[Row]) -> dict[str, Row]:
    """The first answer of each kind, by outcome and whether a tool was called."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(f"{row['outcome']}, {'by the tool' if row['python'] else 'without the tool'}", row)
    return found
