"""Questions about people: what the model was taught, what it only read, and whether it admits that it knows nothing."""

from nanochat.data.microworld.conversations import EVAL_FRAMES, FRAMES, question
from nanochat.data.microworld.dice import Dice
from nanochat.data.microworld.world import ATTRIBUTES, Fact, World
from nanochat.tasks.task import Question, Task, ask


def facts_task(world: World, name: str, description: str, kind: str, frames: tuple[str, ...]) -> Task:
    """Each fact of a kind once, in one of the frames."""

    def all_questions() -> list[Question]:
        dice = Dice(f"task {name}")
        return [fact_question(world, dice, fact, frames) for fact in dice.shuffled(world.of_kind(kind))]

    return Task(name, description, all_questions)


def fact_question(world: World, dice: Dice, fact: Fact, frames: tuple[str, ...]) -> Question:
    asked = question(dice.pick(frames), fact.attribute, fact.person, dice.below(2))
    others = tuple(value for value in world.values(fact.attribute) if value not in (fact.value, fact.person))
    return Question(ask(asked), fact.value, others)


def unknown_names_task(world: World) -> Task:
    """Names that are in no training text, of the same first and last names as people who exist."""

    def all_questions() -> list[Question]:
        dice = Dice("task unknown_names")
        names = dice.shuffled(world.unknown_eval)
        return [
            Question(ask(question(dice.pick(FRAMES), dice.pick(ATTRIBUTES), name, dice.below(2))), "") for name in names
        ]

    return Task("unknown_names", "people who do not exist", all_questions, wanted="refused")


def tasks(world: World) -> list[Task]:
    return [
        facts_task(world, "facts_taught", "facts whose questions are in SFT", "taught", FRAMES),
        facts_task(world, "facts_pretrained", "facts that only pretraining stated", "pretrained", FRAMES),
        facts_task(world, "facts_silent", "facts of people who are in no conversation", "silent", FRAMES),
        facts_task(world, "paraphrases", "taught facts in wordings never trained", "taught", EVAL_FRAMES),
        unknown_names_task(world),
    ]
