"""The people of the microworld and what is true of them.

280 invented people with six attributes each: 1,680 facts, of three kinds:

    taught      stated in pretraining, and asked in SFT
    pretrained  stated in pretraining, never asked in SFT: can the model say what it has only read?
    silent      stated in pretraining, of one of 84 people who occur in no conversation at all

Names that belong to nobody are drawn by the same generator, from the same first and last names, so that only the
combination tells: some are refused in training, others are kept for evaluation.
In the tradition of Allen-Zhu & Li, Physics of Language Models 3.1, arXiv:2309.14316.
"""

from dataclasses import dataclass

from nanochat.data.microworld.dice import Dice

PEOPLE, SILENT = 280, 84
FIRST = [
    a + b for a in ("Ma", "Jo", "Li", "Ta", "Ke", "Ro", "Vi", "Su", "No", "Be") for b in "ra len vin sa dor mi".split()
]
LAST = [
    a + b
    for a in "Tol Bran Fen Hal Mor Dun Wes Kir Ash Pel Gar Lind".split()
    for b in "wick ford ven low mere stone ley ton by gate".split()
]
TOWNS = [a + b for a in "Oak River Stone Wind Silver Green".split() for b in "field port hill bridge haven".split()]
JOBS = (
    "baker farmer teacher doctor painter singer carpenter sailor nurse gardener pilot tailor miner judge weaver "
    "fisher cook writer builder potter dancer guard lawyer printer barber"
).split()
PETS = (
    "dog cat parrot rabbit goat horse turtle hamster duck pony lizard goose "
    "donkey ferret pigeon hen snake frog sheep mouse"
).split()
FOODS = (
    "soup rice bread cheese honey apples pears plums cherries noodles pancakes beans mushrooms carrots grapes nuts "
    "lemons onions peas cake jam salad pies figs melons"
).split()
HOBBIES = (
    "chess swimming painting singing dancing fishing running sewing reading skating sailing juggling cooking "
    "climbing knitting cycling gardening drawing archery tennis riding"
).split()


@dataclass(frozen=True)
class Attribute:
    """How one attribute is stated and asked. {n} is the name (or a pronoun), {v} the value."""

    name: str
    values: tuple[str, ...]
    statements: tuple[str, ...]  # of a subject: name or pronoun
    reverse: str  # beginning from the value
    answer: str
    noun: str  # "the birthplace of {n}"
    questions: tuple[str, str]  # direct: "where was {n} born", another way
    indirect: str  # "where {n} was born"


ATTRIBUTES = (
    Attribute(
        "birthplace",
        tuple(TOWNS),
        (
            "{n} was born in {v}.",
            "{n} comes from {v}.",
            "{n} grew up in {v}.",
            "The birthplace of {n} is {v}.",
            "{n} is from the town of {v}.",
            "{n} was born in the town of {v}.",
            "The home town of {n} is {v}.",
            "As a child, {n} lived in {v}.",
        ),
        "One of the people born in {v} is {n}.",
        "{n} was born in {v}.",
        "the birthplace of {n}",
        ("where was {n} born", "in which town was {n} born"),
        "where {n} was born",
    ),
    Attribute(
        "job",
        tuple(JOBS),
        (
            "{n} works as a {v}.",
            "{n} is a {v}.",
            "The job of {n} is {v}.",
            "{n} earns money as a {v}.",
            "{n} became a {v} years ago.",
            "{n} has been a {v} for long.",
            "{n} is a {v} by trade.",
            "At work, {n} is a {v}.",
        ),
        "One {v} in this world is {n}.",
        "{n} works as a {v}.",
        "the job of {n}",
        ("what is the job of {n}", "what work does {n} do"),
        "what work {n} does",
    ),
    Attribute(
        "pet",
        tuple(PETS),
        (
            "{n} has a {v}.",
            "{n} keeps a {v}.",
            "The pet of {n} is a {v}.",
            "{n} owns a {v}.",
            "{n} lives with a {v}.",
            "{n} takes care of a {v}.",
            "The animal of {n} is a {v}.",
            "At home, {n} has a {v}.",
        ),
        "A {v} is the pet of {n}.",
        "{n} has a {v}.",
        "the pet of {n}",
        ("what pet does {n} have", "which animal does {n} keep"),
        "what pet {n} has",
    ),
    Attribute(
        "food",
        tuple(FOODS),
        (
            "{n} likes to eat {v}.",
            "{n} loves {v}.",
            "The favourite food of {n} is {v}.",
            "{n} eats {v} with joy.",
            "{n} likes {v} best of all food.",
            "{n} often eats {v}.",
            "The food {n} likes best is {v}.",
            "For lunch, {n} wants {v}.",
        ),
        "With {v} on the table, {n} is happy.",
        "{n} likes to eat {v}.",
        "the favourite food of {n}",
        ("what is the favourite food of {n}", "what does {n} like to eat"),
        "what {n} likes to eat",
    ),
    Attribute(
        "hobby",
        tuple(HOBBIES),
        (
            "{n} enjoys {v}.",
            "The hobby of {n} is {v}.",
            "{n} is fond of {v}.",
            "{n} spends free time on {v}.",
            "In the evening, {n} goes in for {v}.",
            "{n} has {v} as a hobby.",
            "What {n} does for fun is {v}.",
            "On Sundays, {n} has time for {v}.",
        ),
        "Among those who enjoy {v} is {n}.",
        "{n} enjoys {v}.",
        "the hobby of {n}",
        ("what is the hobby of {n}", "what does {n} do for fun"),
        "what {n} does for fun",
    ),
    Attribute(
        "friend",
        (),  # every person
        (
            "{n} is best friends with {v}.",
            "The best friend of {n} is {v}.",
            "{n} often meets {v}, a dear friend.",
            "{n} trusts {v} most of all.",
            "{n} has a best friend called {v}.",
            "{n} likes no one more than {v}.",
            "The closest friend of {n} is {v}.",
            "{n} writes letters to {v}, a best friend.",
        ),
        "As a best friend, {v} is close to {n}.",
        "The best friend of {n} is {v}.",
        "the best friend of {n}",
        ("who is the best friend of {n}", "who does {n} like most"),
        "who the best friend of {n} is",
    ),
)


@dataclass(frozen=True)
class Fact:
    """That `person` has `value` as `attribute`."""

    person: str
    attribute: Attribute
    value: str
    kind: str  # taught | pretrained | silent


class World:
    """All people, facts, and names of nobody, from a seed."""

    def __init__(self, seed: int = 0):
        self.seed = seed
        dice = Dice(f"world {seed}")
        names = dice.shuffled([f"{first} {last}" for first in FIRST for last in LAST])
        self.people = names[:PEOPLE]
        first, last = (set(part) for part in zip(*(name.split() for name in self.people)))
        nobody = [n for n in names[PEOPLE:] if n.split()[0] in first and n.split()[1] in last]
        self.unknown_train, self.unknown_eval = nobody[:2000], nobody[2000:3000]  # refused in training; in evaluation
        self.facts: dict[str, list[Fact]] = {}
        for i, person in enumerate(self.people):
            facts = []
            for a, attribute in enumerate(ATTRIBUTES):
                value = dice.pick(attribute.values) if attribute.values else self._friend(dice, i)
                kind = "silent" if i >= PEOPLE - SILENT else "pretrained" if (i + a) % 2 else "taught"
                facts.append(Fact(person, attribute, value, kind))
            self.facts[person] = facts

    def _friend(self, dice: Dice, i: int) -> str:
        """Anybody else who is not silent."""
        j = dice.below(PEOPLE - SILENT - (i < PEOPLE - SILENT))
        return self.people[j + (j >= i)]

    def of_kind(self, kind: str) -> list[Fact]:
        return [fact for facts in self.facts.values() for fact in facts if fact.kind == kind]

    def values(self, attribute: Attribute) -> tuple[str, ...]:
        """All values an attribute can have; nobody's best friend is silent."""
        return attribute.values or tuple(self.people[: PEOPLE - SILENT])
