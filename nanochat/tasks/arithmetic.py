"""Sums that were never stated in training: within the trained lengths and beyond, by the tool and in the head."""

from nanochat.data.microworld.conversations import SUM_FRAMES
from nanochat.data.microworld.dice import Dice
from nanochat.data.microworld.knowledge import addition
from nanochat.tasks.task import Question, Task, ask, ends_with_number


def sums_task(name: str, description: str, digits: tuple[int, ...], frames: tuple[str, ...]) -> Task:
    """600 held-out sums of two numbers of so many digits each."""

    def all_questions() -> list[Question]:
        dice = Dice(f"task {name}")
        pairs = [addition(dice, dice.pick(digits), held_out=True) for _ in range(600)]
        return [Question(ask(dice.pick(frames).format(a=a, b=b)), str(a + b)) for a, b in dict.fromkeys(pairs)]

    return Task(name, description, all_questions, is_right=ends_with_number)


def tasks() -> list[Task]:
    in_head = ("What is {a} + {b}? Do it in your head.",)
    return [
        sums_task("add_tool", "2- and 3-digit sums, tool allowed", (2, 3), SUM_FRAMES),
        sums_task("add_tool_long", "4- and 5-digit sums, longer than trained", (4, 5), SUM_FRAMES),
        sums_task("add_head", "2- and 3-digit sums without the tool", (2, 3), in_head),
    ]
