"""Spelling, counting letters, and multiple choice with shuffled letters."""

from nanochat.data.microworld.conversations import SPELL_FRAMES, Conversations, choice_prompt, general_choice
from nanochat.data.microworld.dice import Dice
from nanochat.data.microworld.knowledge import TAUGHT_WORDS, TRUTHS, UNSEEN_WORDS, spelled
from nanochat.data.microworld.world import World
from nanochat.tasks.task import Question, Task, ask, is_only


def spelling_task(name: str, description: str, words: list[str]) -> Task:
    """Each word once."""

    def all_questions() -> list[Question]:
        dice = Dice(f"task {name}")
        return [Question(ask(dice.pick(SPELL_FRAMES).format(w=word)), spelled(word)) for word in dice.shuffled(words)]

    return Task(name, description, all_questions)


def choice_task(world: World) -> Task:
    """500 questions of general knowledge and of taught facts, options drawn anew."""

    def all_questions() -> list[Question]:
        dice, talks = Dice("task choice"), Conversations("sft")
        facts = world.of_kind("taught")
        asked = []
        for i in range(500):
            text, right, others = (
                general_choice(dice, dice.pick(TRUTHS)) if i % 2 else talks.fact_choice(dice, dice.pick(facts))
            )
            options = dice.shuffled([right, *others])
            letters = tuple("ABCD"[: len(options)])
            asked.append(Question(ask(choice_prompt(text, options)), letters[options.index(right)], letters=letters))
        return asked

    return Task("choice", "multiple choice", all_questions, is_right=is_only, chance=0.25)


def tasks(world: World) -> list[Task]:
    return [
        spelling_task("spelling", "spelling a word", TAUGHT_WORDS),
        spelling_task("spelling_new", "spelling a compound that no text spells, nor has", UNSEEN_WORDS),
        choice_task(world),
    ]
