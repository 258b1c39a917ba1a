"""Spelling, counting letters, and multiple choice with shuffled letters."""

from nanochat.data.microworld.conversations import Conversations, choice_prompt, general_choice
from nanochat.data.microworld.dice import Dice
from nanochat.data.microworld.knowledge import WORDS, spelled, word_is_held_out
from nanochat.data.microworld.world import World
from nanochat.tasks.task import Question, Task, ask, is_only

SPELL_FRAMES = ("How do you spell {w}?", "Spell the word {w}.", "Please spell {w}.")


def spelling_task() -> Task:
    """Every word in every wording; one word in five was never spelled in a conversation."""

    def all_questions() -> list[Question]:
        asked = [Question(ask(frame.format(w=word)), spelled(word)) for word in WORDS for frame in SPELL_FRAMES]
        return Dice("task spelling").shuffled(asked)

    return Task("spelling", "spelling a word", all_questions)


def new_spelling_task() -> Task:
    def all_questions() -> list[Question]:
        words = [word for word in WORDS if word_is_held_out(word)]
        asked = [Question(ask(frame.format(w=word)), spelled(word)) for word in words for frame in SPELL_FRAMES]
        return Dice("task spelling_new").shuffled(asked)

    return Task("spelling_new", "spelling a word that no conversation spelled", all_questions)


def choice_task(world: World) -> Task:
    """500 questions of general knowledge and of taught facts, options drawn anew."""

    def all_questions() -> list[Question]:
        dice, talks = Dice("task choice"), Conversations("sft")
        facts = world.of_kind("taught")
        asked = []
        for i in range(500):
            text, right, others = general_choice(dice) if i % 2 else talks.fact_choice(dice, dice.pick(facts))
            options = dice.shuffled([right, *others])
            asked.append(Question(ask(choice_prompt(text, options)), "ABCD"[options.index(right)]))
        return asked

    return Task("choice", "multiple choice", all_questions, is_right=is_only)


def tasks(world: World) -> list[Task]:
    return [spelling_task(), new_spelling_task(), choice_task(world)]
