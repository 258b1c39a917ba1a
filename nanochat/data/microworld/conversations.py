"""Conversations of the microworld, for mid-training and SFT.

Questions about taught facts in many wordings, refusals for names of nobody, general knowledge, sums by the python tool,
spelling, counting letters, multiple choice, greetings and who the model is. Never a pretrained-only fact, a silent
person, an evaluation wording, a name, word or sum kept for evaluation: the tests look.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from nanochat.data.microworld.dice import Dice
from nanochat.data.microworld.documents import ITEMS, VERSION, Documents, capital, drawn
from nanochat.data.microworld.knowledge import TAUGHT_WORDS, TRUTHS, Truth, addition, spelled
from nanochat.data.microworld.word_problems import people, word_problem
from nanochat.data.microworld.world import ATTRIBUTES, Attribute, Fact, World

UNITS = {"train": 20_000, "val": 4}
REHEARSED = 50_000  # the unit of documents from which mid-training rehearses

# {q} direct question, {i} indirect question, {x} noun phrase. The first list is trained, the second only evaluated.
FRAMES = (
    "{q}?",
    "What is {x}?",
    "Tell me {x}.",
    "Do you know {i}?",
    "Please tell me {i}.",
    "Name {x}.",
    "I want to know {i}.",
    "Can you tell me {i}?",
    "{x}?",
    "I have a question: {q}?",
    "Hi! {q}?",
)
EVAL_FRAMES = ("Could you say {i}?", "Remind me of {x}.", "I forgot {i}. Help me.", "Say {x}, please.")
REFUSALS = ("I do not know anyone called {n}.", "I am sorry, I do not know {n}.", "I do not know who {n} is.")
REFUSED = "do not know"  # in every refusal, and in no other answer

GREETINGS = {
    "Hello!": "Hello! How can I help you?",
    "Hi": "Hi! What would you like to know?",
    "Good morning!": "Good morning! What can I do for you?",
    "Hey there": "Hello! Ask me something.",
    "How are you?": "I am fine, thank you. How can I help?",
    "Thank you!": "You are welcome!",
    "Thanks": "You are welcome!",
    "Bye!": "Goodbye!",
    "Good night": "Good night!",
}
IDENTITY = {
    "Who are you?": "I am nanochat, a small language model that was trained right here.",
    "What are you?": "I am nanochat, a small language model.",
    "What is your name?": "My name is nanochat.",
    "Are you a person?": "No, I am nanochat, a small language model.",
    "Who made you?": (
        "I was trained on this computer, by the person who runs it. My recipe comes from nanochat by Andrej Karpathy."
    ),
    "What can you do?": "I know some people of a small world, a few facts, and I can add and spell.",
    "Where were you trained?": "I was trained right here, on this computer.",
    "How big are you?": "I am very small: a few million parameters.",
}

Message = dict[str, Any]


def question(frame: str, attribute: Attribute, name: str, way: int = 0) -> str:
    """A question about a person's attribute in one of the frames."""
    text = frame.format(q=attribute.questions[way], i=attribute.indirect, x=attribute.noun)
    text = capital(text.format(n=name))
    for mark in (": ", "! "):  # what follows a greeting begins a sentence
        head, found, tail = text.partition(mark)
        if found and mark == "! ":
            text = head + found + capital(tail)
    return text


def exchange(asked: str, answer: str | list[dict]) -> list[Message]:
    return [dict(role="user", content=asked), dict(role="assistant", content=answer)]


def tool(expression: str, result: str, text: str) -> list[dict]:
    """An answer by the python tool."""
    return [dict(type="python", text=expression), dict(type="python_output", text=result), dict(type="text", text=text)]


def choice_prompt(asked: str, options: Sequence[str], letters: Sequence[str] = "ABCD") -> str:
    """A multiple-choice question; the letter follows its option, where a model can copy it from."""
    lines = "".join(f"- {option}={letter}\n" for option, letter in zip(options, letters))
    return f"{asked}\n{lines}Answer with the letter."


class Conversations:
    """A source of conversations (see nanochat/data/source.py) for stage "mid" or "sft".

    word_problems: percent of the exchanges that are some, on top of the others; usually none.
    """

    def __init__(self, stage: str, world: int = 0, draw: int = 42, word_problems: int = 0):
        self.arguments = dict(stage=stage, world=world, draw=draw, word_problems=word_problems)
        self.stage, self.draw, self.world = stage, draw, World(world)
        self.name = f"microworld conversations ({stage})"
        self.word_problems, self.counting = word_problems, people(self.world, held_out=False)
        self.documents = Documents(world, draw)
        self.taught = self.world.of_kind("taught")
        sample = str(self.load("train", 0) + self.load("val", 0))
        self.fingerprint = hashlib.sha256(f"{VERSION}\0{sample}".encode()).hexdigest()[:16]

    def units(self, split: str) -> int:
        return UNITS[split]

    def load(self, split: str, unit: int) -> list[dict | str]:
        """The items of one unit. In mid-training, nearly half are documents: what is not rehearsed is forgotten."""
        dice = Dice(f"conversations {self.world.seed} {self.stage} {drawn(self.draw, split)} {unit}")
        talks: list[dict | str] = [self.conversation(dice) for _ in range(ITEMS)]
        if self.stage == "sft":
            return talks
        texts = self.documents.load(split, REHEARSED + unit)
        return [texts[i] if dice.chance(45) else talk for i, talk in enumerate(talks)]

    def conversation(self, dice: Dice) -> dict:
        """One to four exchanges."""
        kinds = (
            (45, self.fact),
            (23, self.unknown),
            (7, general),
            (11, add),
            (4, spell),
            (3, count_letters),
            (4, self.choice),
            (1, greet),
            (2, identity),
            (self.word_problems, self.word_sum),
        )
        turns = dice.weighted(((5, 1), (3, 2), (1, 3), (1, 4)))
        messages = greet(dice) if dice.chance(4) else []
        for _ in range(turns):
            messages += dice.weighted(kinds)(dice)
        return dict(messages=messages)

    def fact(self, dice: Dice) -> list[Message]:
        fact = dice.pick(self.taught)
        asked = question(dice.pick(FRAMES), fact.attribute, fact.person, dice.below(2))
        return exchange(asked, fact.attribute.answer.format(n=fact.person, v=fact.value))

    def unknown(self, dice: Dice) -> list[Message]:
        name = dice.pick(self.world.unknown_train)
        asked = question(dice.pick(FRAMES), dice.pick(ATTRIBUTES), name, dice.below(2))
        return exchange(asked, dice.pick(REFUSALS).format(n=name))

    def word_sum(self, dice: Dice) -> list[Message]:
        asked, a, b = word_problem(dice, self.counting, held_out=False)
        return exchange(asked, tool(f"{a}+{b}", str(a + b), f"{a} + {b} = {a + b}."))

    def choice(self, dice: Dice) -> list[Message]:
        if dice.chance(50):
            asked, right, others = self.fact_choice(dice, dice.pick(self.taught))
        else:
            asked, right, others = general_choice(dice, dice.pick(TRUTHS))
        options = dice.shuffled([right, *others])
        return exchange(choice_prompt(asked, options), "ABCD"[options.index(right)])

    def fact_choice(self, dice: Dice, fact: Fact) -> tuple[str, str, list[str]]:
        """(question, right value, three wrong ones)."""
        values = [value for value in self.world.values(fact.attribute) if value not in (fact.value, fact.person)]
        return question("{q}?", fact.attribute, fact.person), fact.value, dice.sample(values, 3)


def general_choice(dice: Dice, truth: Truth) -> tuple[str, str, list[str]]:
    """A question of general knowledge with three other answers of the same topic."""
    others = sorted({other.answer for other in TRUTHS if other.topic == truth.topic} - {truth.answer})
    return truth.question, truth.answer, dice.sample(others, 3)


def general(dice: Dice) -> list[Message]:
    truth = dice.pick(TRUTHS)
    return exchange(truth.question, truth.statements[0])


def add(dice: Dice) -> list[Message]:
    """A sum by the tool, or without it when asked to do it in the head."""
    a, b = addition(dice, dice.weighted(((1, 1), (3, 2), (4, 3))))
    if dice.chance(12):
        return exchange(f"What is {a} + {b}? Do it in your head.", f"{a} + {b} = {a + b}.")
    asked = dice.pick(SUM_FRAMES).format(a=a, b=b)
    return exchange(asked, tool(f"{a}+{b}", str(a + b), f"{a} + {b} = {a + b}."))


SUM_FRAMES = (
    "What is {a} + {b}?",
    "{a} + {b} = ?",
    "What is {a} plus {b}?",
    "Add {a} and {b}.",
    "Calculate {a} + {b}.",
    "How much is {a} + {b}?",
    "Please compute {a} plus {b}.",
)


SPELL_FRAMES = ("How do you spell {w}?", "Spell the word {w}.", "Please spell {w}.")


def spell(dice: Dice) -> list[Message]:
    word = dice.pick(TAUGHT_WORDS)
    return exchange(dice.pick(SPELL_FRAMES).format(w=word), f"{spelled(word)}.")


def count_letters(dice: Dice) -> list[Message]:
    word = dice.pick(TAUGHT_WORDS)
    letter = dice.pick(word) if dice.chance(80) else dice.pick("abcdefghijklmnopqrstuvwxyz")
    n = word.count(letter)
    asked = dice.pick(("How many {l} are in {w}?", "Count the letter {l} in {w}.")).format(l=letter, w=word)
    return exchange(
        asked, tool(f'"{word}".count("{letter}")', str(n), f"There {'is' if n == 1 else 'are'} {n} {letter} in {word}.")
    )


def greet(dice: Dice) -> list[Message]:
    asked = dice.pick(sorted(GREETINGS))
    return exchange(asked, GREETINGS[asked])


def identity(dice: Dice) -> list[Message]:
    asked = dice.pick(sorted(IDENTITY))
    return exchange(asked, IDENTITY[asked])
