"""Questions with known answers, one file a subject. TASKS has them all by name, in the order of the report.

The microworld's are made by our code; the others are read from the Hub, or a mirror, when their questions are asked
for. The files of the Hub's data sets have their training conversations too; stage_mixtures.py puts those together.
"""

from nanochat.data import hub
from nanochat.data.microworld.world import World
from nanochat.tasks import arc, arithmetic, facts, gsm8k, humaneval, mmlu, spellingbee, word_sums, words
from nanochat.tasks.task import Question, Task

_WORLD = World()
_MICROWORLD = [*facts.tasks(_WORLD), *arithmetic.tasks(), *words.tasks(_WORLD)]
_OTHERS = [*arc.tasks(), *mmlu.tasks(), *gsm8k.tasks(), *humaneval.tasks(), *spellingbee.tasks()]
_PRACTISED = [word_sums.task(_WORLD)]  # by RL, and asked where that was run: practice.py
TASKS: dict[str, Task] = {task.name: task for task in [*_MICROWORLD, *_PRACTISED, *_OTHERS]}
MICROWORLD = tuple(task.name for task in _MICROWORLD)
CHATCORE = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spellingbee")
_SPLITS = dict(
    arc_easy=arc.EASY, arc_challenge=arc.CHALLENGE, mmlu=mmlu.TEST, gsm8k=gsm8k.TEST, humaneval=humaneval.TEST
)


def available() -> list[str]:
    """ChatCORE's tasks whose data can be had: all, but for what a mirror lacks."""
    return [name for name in CHATCORE if name not in _SPLITS or hub.has(*_SPLITS[name])]


__all__ = ["CHATCORE", "MICROWORLD", "TASKS", "Question", "Task", "available"]
