"""Questions with known answers, one file a subject. TASKS has them all by name, in the order of the report."""

from nanochat.data.microworld.world import World
from nanochat.tasks import arithmetic, facts, words
from nanochat.tasks.task import Question, Task

_WORLD = World()
TASKS: dict[str, Task] = {task.name: task for task in [*facts.tasks(_WORLD), *arithmetic.tasks(), *words.tasks(_WORLD)]}

MICROWORLD = tuple(TASKS)
CHATCORE = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spellingbee")

__all__ = ["CHATCORE", "MICROWORLD", "TASKS", "Question", "Task"]
