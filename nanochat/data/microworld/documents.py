"""Pretraining text of the microworld: biographies, general knowledge, stories, arithmetic, spelling.

Unit u of a split is 128 documents and a pure function of (world, draw, split, u): unlimited text without a file.
Another world has other people; another draw tells of the same people in other words and another order.
"""

import hashlib

from nanochat.data.microworld.dice import Dice
from nanochat.data.microworld.knowledge import NUMBERS, TAUGHT_WORDS, TRUTHS, addition, spelled
from nanochat.data.microworld.stories import story
from nanochat.data.microworld.world import World

VERSION = 2  # counts changes of the generator; part of the fingerprint
UNITS = {"train": 100_000, "val": 8}
ITEMS = 128


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def drawn(draw: int, split: str) -> str:
    """Training text differs from draw to draw; what is validated on stays the same, so that runs can be compared."""
    return f"{split} {draw}" if split == "train" else split


class Documents:
    """A source of text (see nanochat/data/source.py)."""

    name = "microworld"

    def __init__(self, world: int = 0, draw: int = 42):
        self.arguments = dict(world=world, draw=draw)
        self.world, self.draw = World(world), draw
        text = "\n".join(self.load("train", 0) + self.load("val", 0))
        self.fingerprint = hashlib.sha256(f"{VERSION}\0{text}".encode()).hexdigest()[:16]

    def units(self, split: str) -> int:
        return UNITS[split]

    def load(self, split: str, unit: int) -> list[str]:
        """The documents of one unit."""
        dice = Dice(f"documents {self.world.seed} {drawn(self.draw, split)} {unit}")
        kinds = ((60, self.biography), (12, general), (6, story), (12, arithmetic), (10, spelling))
        return [dice.weighted(kinds)(dice) for _ in range(ITEMS)]

    def biography(self, dice: Dice) -> str:
        """All that is true of a person, in any order and many wordings; sometimes of two people."""
        people = dice.sample(self.world.people, 2) if dice.chance(15) else [dice.pick(self.world.people)]
        return " ".join(self._about(dice, person) for person in people)

    def _about(self, dice: Dice, person: str) -> str:
        sentences: list[str] = []
        clear = False  # whether "this person" can only mean this one: not at first, nor after a friend was named
        for fact in dice.shuffled(self.world.facts[person]):
            attribute = fact.attribute
            if fact.kind == "taught" and dice.chance(8):
                asked = capital(attribute.questions[dice.below(2)]).format(n=person)
                sentences.append(f"{asked}? {capital(fact.value)}.")
            elif dice.chance(10):
                sentences.append(attribute.reverse.format(n=person, v=fact.value))
            else:
                subject = "this person" if clear and dice.chance(30) else person
                sentences.append(capital(dice.pick(attribute.statements).format(n=subject, v=fact.value)))
            clear = attribute.name != "friend"
        return " ".join(sentences)


def general(dice: Dice) -> str:
    """A few general truths; one in three as question and answer."""
    sentences = []
    for truth in dice.sample(TRUTHS, dice.between(3, 6)):
        asked = f"{truth.question} {capital(truth.answer)}."
        sentences.append(asked if dice.chance(33) else dice.pick(truth.statements))
    return " ".join(sentences)


def arithmetic(dice: Dice) -> str:
    """A few sums, differences and products, and counting."""
    sentences = []
    for _ in range(dice.between(3, 6)):
        a, b = addition(dice, dice.between(1, 3))
        small, large = dice.between(2, 9), dice.between(2, 12)
        sentence_forms = (
            f"{a} + {b} = {a + b}.",
            f"{a} plus {b} is {a + b}.",
            f"If you add {b} to {a}, you get {a + b}.",
            f"{a + b} - {b} = {a}.",
            f"{a + b} minus {a} is {b}.",
            f"{small} * {large} = {small * large}.",
            f"{small} times {large} is {small * large}.",
        )
        sentences.append(dice.pick(sentence_forms))
    if dice.chance(20):
        start = dice.below(len(NUMBERS) - 4)
        sentences.append("Count: " + ", ".join(NUMBERS[start : start + 5]) + ".")
    return " ".join(sentences)


def spelling(dice: Dice) -> str:
    """Words, how they are spelled, and how many letters they have."""
    sentences = []
    for word in [dice.pick(TAUGHT_WORDS) for _ in range(dice.between(2, 4))]:
        letter = dice.pick(word)
        sentence_forms = (
            f"The word {word} is spelled {spelled(word)}.",
            f"How do you spell {word}? {spelled(word)}.",
            f"{capital(word)} has {len(word)} letters: {spelled(word)}.",
            f"There {'is' if word.count(letter) == 1 else 'are'} {word.count(letter)} {letter} in {spelled(word)}.",
        )
        sentences.append(dice.pick(sentence_forms))
    return " ".join(sentences)
