"""What is true outside the microworld too: capitals, days, opposites, animals, sums, and how words are spelled."""

from dataclasses import dataclass

from nanochat.data.microworld.dice import Dice

CAPITALS = {
    "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Germany": "Berlin", "Japan": "Tokyo",
    "China": "Beijing", "Egypt": "Cairo", "Russia": "Moscow", "Greece": "Athens", "Portugal": "Lisbon",
    "Austria": "Vienna", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Poland": "Warsaw",
    "Hungary": "Budapest", "Ireland": "Dublin", "Canada": "Ottawa", "Cuba": "Havana", "Peru": "Lima",
    "Kenya": "Nairobi", "Iran": "Tehran", "Iraq": "Baghdad", "Thailand": "Bangkok", "Vietnam": "Hanoi",
    "Denmark": "Copenhagen", "Belgium": "Brussels", "Turkey": "Ankara", "Ukraine": "Kyiv",
    "Romania": "Bucharest", "Bulgaria": "Sofia", "Serbia": "Belgrade", "Croatia": "Zagreb", "Chile": "Santiago",
    "Colombia": "Bogota", "Nepal": "Kathmandu", "Mongolia": "Ulaanbaatar", "Ghana": "Accra", "Senegal": "Dakar",
    "Jamaica": "Kingston", "Iceland": "Reykjavik", "Scotland": "Edinburgh", "Wales": "Cardiff",
    "England": "London", "India": "New Delhi", "Indonesia": "Jakarta", "Lebanon": "Beirut", "Syria": "Damascus",
    "Jordan": "Amman", "Libya": "Tripoli", "Tunisia": "Tunis", "Morocco": "Rabat", "Uganda": "Kampala",
    "Latvia": "Riga", "Estonia": "Tallinn", "Lithuania": "Vilnius", "Australia": "Canberra",
    "Argentina": "Buenos Aires",
}  # fmt: skip
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
COLOURS = {
    "grass": "green", "snow": "white", "coal": "black", "blood": "red", "a lemon": "yellow",
    "the clear sky": "blue", "milk": "white", "a carrot": "orange", "chocolate": "brown", "a ripe tomato": "red",
    "an elephant": "grey", "a crow": "black", "a banana": "yellow", "a leaf in summer": "green",
    "a flamingo": "pink",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "tall": "short", "old": "young", "fast": "slow", "wet": "dry", "day": "night",
    "up": "down", "left": "right", "good": "bad", "rich": "poor", "full": "empty", "open": "closed",
    "hard": "soft", "light": "dark", "early": "late", "strong": "weak", "happy": "sad", "loud": "quiet",
    "near": "far", "clean": "dirty", "high": "low", "first": "last", "begin": "end", "win": "lose",
    "buy": "sell", "push": "pull", "laugh": "cry", "north": "south", "east": "west", "summer": "winter",
    "love": "hate",
}  # fmt: skip
PLURALS = {
    "mouse": "mice", "child": "children", "foot": "feet", "tooth": "teeth", "man": "men", "woman": "women",
    "goose": "geese", "leaf": "leaves", "knife": "knives", "wolf": "wolves", "box": "boxes", "city": "cities",
    "baby": "babies", "dog": "dogs", "house": "houses", "tree": "trees", "bus": "buses", "fish": "fish",
    "sheep": "sheep", "glass": "glasses",
}  # fmt: skip
LEGS = {
    "dog": "four", "spider": "eight", "bird": "two", "ant": "six", "horse": "four", "snake": "no", "bee": "six",
    "hen": "two", "cow": "four", "duck": "two",
}  # fmt: skip
SOUNDS = {
    "dog": "barks", "cat": "meows", "cow": "moos", "duck": "quacks", "lion": "roars", "wolf": "howls",
    "bee": "buzzes", "sheep": "bleats", "snake": "hisses", "owl": "hoots",
}  # fmt: skip
WORDS = (
    "apple bread chair table window garden river stone yellow orange purple kitchen summer winter bottle candle dragon "
    "forest guitar hammer island jacket ladder market needle ocean pencil rabbit silver ticket umbrella village water "
    "banana cherry button castle doctor engine flower guest honey insect jungle kettle letter monkey number office "
    "people queen rocket school teacher uncle violin whistle yogurt zebra basket circle dinner finger giant happy "
    "strawberry mountain butterfly elephant breakfast sandwich hospital library airplane computer dolphin feather "
    "goblet helmet iceberg jewel kitten lantern mirror nephew oyster pepper quiver ribbon saddle turkey velvet wagon"
).split()
# 32 x 32 compound words, most of them new: half are taught, half are for evaluation and in no text whatever, although
# all their parts are. Only the combination is new, as with names.
HEADS = (
    "rain snow sun moon star wind fire sand rock wood bird fish frog bear wolf bee "
    "dale lake farm barn milk corn plum rose leaf root silk wool gold iron book clay"
).split()
TAILS = (
    "coat light fall dust boat house mill path gate wing tail nest horn ring cake bowl "
    "lamp drum ship yard post stone song step shell seed cloth brush box pot hat cart"
).split()
COMPOUNDS = [head + tail for head in HEADS for tail in TAILS]
UNSEEN_WORDS = [word for i, word in enumerate(COMPOUNDS) if (i // len(TAILS) + i) % 2]
TAUGHT_WORDS = WORDS + [word for word in COMPOUNDS if word not in set(UNSEEN_WORDS)]


def following(sequence: list[str], item: str) -> str:
    """The one after, cyclically."""
    return sequence[(sequence.index(item) + 1) % len(sequence)]


@dataclass(frozen=True)
class Truth:
    """A question of general knowledge. The answer stands as it is in every statement; a topic's answers are alike."""

    topic: str
    question: str
    answer: str
    statements: tuple[str, ...]


def truths() -> list[Truth]:
    """All general knowledge."""
    table: list[Truth] = []
    sentences: tuple[str, ...]
    for country, city in CAPITALS.items():
        sentences = (f"The capital of {country} is {city}.", f"{city} is the capital of {country}.")
        table.append(Truth("capital", f"What is the capital of {country}?", city, sentences))
    for names, kind in ((DAYS, "day"), (MONTHS, "month")):
        for name in names:
            after = following(names, name)
            sentences = (f"The {kind} after {name} is {after}.", f"After {name} comes {after}.")
            table.append(Truth(kind, f"Which {kind} comes after {name}?", after, sentences))
    for thing, colour in COLOURS.items():
        sentences = (f"The colour of {thing} is {colour}.", f"Look, {thing} is {colour}.")
        table.append(Truth("colour", f"What colour is {thing}?", colour, sentences))
    for word, opposite in OPPOSITES.items():
        sentences = (f"The opposite of {word} is {opposite}.", f"If it is not {word}, it may be {opposite}.")
        table.append(Truth("opposite", f"What is the opposite of {word}?", opposite, sentences))
    for one, many in PLURALS.items():
        sentences = (f"The plural of {one} is {many}.", f"One {one}, two {many}.")
        table.append(Truth("plural", f"What is the plural of {one}?", many, sentences))
    for animal, legs in LEGS.items():
        sentences = (f"The {animal} has {legs} legs.", f"Count the legs of the {animal}: it has {legs} legs.")
        table.append(Truth("legs", f"How many legs does the {animal} have?", f"{legs} legs", sentences))
    for animal, sound in SOUNDS.items():
        sentences = (f"It is the {animal}. It {sound}.",)
        table.append(Truth("sound", f"What does the {animal} do?", f"It {sound}", sentences))
    for i, number in enumerate(NUMBERS[:-1]):
        sentences = (f"After {number} comes {NUMBERS[i + 1]}.", f"The number after {number} is {NUMBERS[i + 1]}.")
        table.append(Truth("number", f"Which number comes after {number}?", NUMBERS[i + 1], sentences))
    return table


TRUTHS = truths()


def sum_is_held_out(a: int, b: int) -> bool:
    """One addition in ten is kept for evaluation and never stated in training, either way round."""
    return (min(a, b) * 31 + max(a, b) * 17) % 10 == 0


def addition(dice: Dice, digits: int, held_out: bool = False) -> tuple[int, int]:
    """Two numbers of so many digits each, in training or kept for evaluation."""
    while True:
        a, b = dice.between(10 ** (digits - 1), 10**digits - 1), dice.between(10 ** (digits - 1), 10**digits - 1)
        if sum_is_held_out(a, b) == held_out:
            return a, b


def spelled(word: str) -> str:
    return "-".join(word)
