"""SpellingBee: how often a letter is in a word; and SimpleSpelling, the hard part of it: which letters there are.

A model sees tokens, not letters. It learns to write the letters down, one a line, counting as it goes, and to check the
count with the python tool; the answer is the number after "####". Every letter begins its line, so that it is the same
token wherever it stands in a word: " a", "-a" and "a" are different ones.
Both are nanochat's ideas (October 2025); words, wordings and answers are our own (see wordlist.py).
"""

from nanochat.data.microworld.dice import Dice
from nanochat.tasks.rows import Rendered, conversation
from nanochat.tasks.task import Question, Task, ask, ends_with_mark
from nanochat.tasks.wordlist import HELD_OUT, TRAINED

COUNT_FRAMES = (
    "How often does {l} occur in {w}?",
    "How often is {l} used in the word {w}?",
    "In {w}, how many of the letters are {l}?",
    "Count every {l} in {w}.",
    "{w}: how many {l}?",
    "Please count {l} in {w} for me.",
    "What number of {l} is there in {w}?",
    "Look at {w}. How many {l} can you find?",
    "Is there any {l} in {w}? How many?",
    "If I write {w}, how many times do I write {l}?",
    "Find all {l} in {w} and count them.",
    "Take {w} apart: how many {l}?",
    "I need the number of {l} in {w}.",
    "Spell {w} and count {l}.",
    "The word is {w}, the letter is {l}. How many?",
    "My word: {w}. My letter: {l}. Count it.",
    "How many {l} are there in {w} altogether?",
    "Tell me how frequent {l} is in {w}.",
    "Could you check how many {l} are inside {w}?",
    "Count {l} in {w}",
    "Wie oft steht {l} im Wort {w}?",
    "Combien y a-t-il de {l} dans le mot {w} ?",
    "¿Cuántas veces está {l} en la palabra {w}?",
    "Quante {l} ci sono nella parola {w}?",
    "Hoeveel keer staat {l} in {w}?",
)
SPELL_FRAMES = (
    "Spell {w}.",
    "How is {w} spelled?",
    "Write {w} letter by letter.",
    "What are the letters of {w}?",
    "Letters of {w}?",
    "Please spell out {w}.",
)
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
QUOTES = ("{}", "'{}'", '"{}"')


def count_train(size: int) -> Rendered:
    """So many conversations that count a letter of a word."""
    return Rendered(range(size), _count)


def spell_train(size: int) -> Rendered:
    """So many conversations that spell a word."""
    return Rendered(range(size), _spell)


def _count(index: int) -> dict:
    dice = Dice(f"spellingbee {index}")
    word = dice.pick(TRAINED)
    letter = a_letter(dice, word)
    return conversation(count_question(dice, word, letter), counting(word, letter))


def _spell(index: int) -> dict:
    dice = Dice(f"simple spelling {index}")
    word = dice.pick(TRAINED)
    return conversation(dice.pick(SPELL_FRAMES).format(w=word), "\n".join(word))


def a_letter(dice: Dice, word: str) -> str:
    """Nearly always one that the word has."""
    return dice.pick(word) if dice.chance(90) else dice.pick(ALPHABET)


def count_question(dice: Dice, word: str, letter: str) -> str:
    """In one of the frames; as people write, now and then without capitals or marks."""
    w, l = dice.pick(QUOTES).format(word), dice.pick(QUOTES).format(letter)
    text = dice.pick(COUNT_FRAMES).format(w=w, l=l)
    text = text.lower() if dice.chance(30) else text
    return text.rstrip(" .?") if dice.chance(30) else text


def counting(word: str, letter: str) -> list[dict]:
    """The answer: the letters, counted by hand, and the tool's count."""
    lines, found = [word], 0
    for each in word:
        found += each == letter
        lines.append(f"{each} {found}" if each == letter else each)
    lines.append(f"I count {found} and check it: ")
    return [
        dict(type="text", text="\n".join(lines)),
        dict(type="python", text=f'"{word}".count("{letter}")'),
        dict(type="python_output", text=str(found)),
        dict(type="text", text=f"\n#### {found}"),
    ]


def count_questions() -> list[Question]:
    """Each held-out word once."""
    dice = Dice("task spellingbee")
    asked = []
    for word in dice.shuffled(HELD_OUT):
        letter = a_letter(dice, word)
        asked.append(
            Question(
                ask(count_question(dice, word, letter)), str(word.count(letter)), id=f"spellingbee/{word}/{letter}"
            )
        )
    return asked


def spell_questions() -> list[Question]:
    """Each held-out word once."""
    dice = Dice("task simple_spelling")
    return [
        Question(ask(dice.pick(SPELL_FRAMES).format(w=word)), "\n".join(word), id=f"simple_spelling/{word}")
        for word in dice.shuffled(HELD_OUT)
    ]


def spells(question: Question, answer: str) -> bool:
    """The letters in their order, whatever stands between them, and nothing else: the word itself spells nothing."""
    between = "".join(each if each.isalnum() else " " for each in answer.lower())
    return between.split() == question.expected.split()


def tasks() -> list[Task]:
    return [
        Task(
            "spellingbee",
            "a letter counted in a word never trained",
            count_questions,
            is_right=ends_with_mark,
            limit=256,
        ),
        Task("simple_spelling", "a word never trained, letter by letter", spell_questions, is_right=spells),
    ]
