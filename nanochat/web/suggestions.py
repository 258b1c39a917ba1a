"""What the page says of a model before anything is asked: what to try, and what to expect of each.

A run knows its data. Of the small world it shows a person whom the model was taught about, one it only read of, an
invented name, a sum and a word to spell: who asks about something else learns that it is not of that world.
"""

from typing import Any

from nanochat.data.microworld.conversations import FRAMES, SPELL_FRAMES, question
from nanochat.data.microworld.knowledge import TAUGHT_WORDS
from nanochat.data.microworld.world import ATTRIBUTES, World
from nanochat.errors import UserError
from nanochat.run import Run

DATA = ("microworld conversations", "microworld word_sums")  # of SFT; of RL, which practises on top of that
ABOUT = (
    "It knows an invented world of {people} people, and of this one a few things: capitals, colours, opposites, sums, "
    "how words are spelled. Asked about anything else, it may say that it does not know anyone of that name."
)


def of_the_run(run: Run, stage: str) -> dict[str, Any]:
    """What the page is told about the model of a stage; nothing where its data is not the small world."""
    try:
        data = (run.summary(stage) or {}).get("data", "")
    except UserError:  # damaged: the page does without
        data = ""
    return of_the_world(World()) if data.startswith(DATA) else {}


def of_the_world(world: World) -> dict[str, Any]:
    def ask(kind: str) -> str:
        fact = world.of_kind(kind)[0]
        return question(FRAMES[0], fact.attribute, fact.person)

    asked = (
        (ask("taught"), "It was taught to answer this: it should know."),
        (ask("silent"), "It has only read of this person, and was never asked: it may be wrong."),
        (
            question(FRAMES[0], ATTRIBUTES[0], world.unknown_eval[0]),
            "There is nobody of this name: it should say so.",
        ),
        ("What is 27 + 58?", "It calls its calculator; the call is shown."),
        (SPELL_FRAMES[0].format(w=TAUGHT_WORDS[0]), "Letter by letter, though it reads whole words."),
    )
    suggestions = [dict(text=text, expect=expect) for text, expect in asked]
    return dict(about=ABOUT.format(people=len(world.people)), suggestions=suggestions)
