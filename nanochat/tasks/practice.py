"""What RL practises: questions with known answers to train on, and a task of others by which it is measured."""

from collections.abc import Callable
from dataclasses import dataclass

from nanochat.data.microworld.world import World
from nanochat.tasks import TASKS, gsm8k, word_sums
from nanochat.tasks.task import Question, Task, final_number


@dataclass(frozen=True)
class Practice:
    """`formed` says whether an answer looks like one, right or wrong: a reward that can be had without being right."""

    task: Task  # of held-out questions; it grades the others too
    train: Callable[[], list[Question]]  # in a fixed order
    formed: Callable[[str], bool]
    origin: str  # whose questions: first word of the data's name

    def reward(self, kind: str, question: Question, answer: str) -> float:
        """1 or 0. kind: "right", or "form" for one that can be hacked."""
        if kind == "form":
            return float(self.formed(answer))
        return float(self.task.grade(question, answer) == self.task.wanted)


REWARDS = ("right", "form")
PRACTICE = dict(
    gsm8k=Practice(TASKS["gsm8k"], gsm8k.train_questions, lambda answer: final_number(answer) is not None, "hub"),
    word_sums=Practice(
        TASKS["word_sums"], lambda: word_sums.questions(World(), held_out=False), word_sums.is_sum, "microworld"
    ),
)
