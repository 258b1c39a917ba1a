"""Short stories with a plot: someone wants something, something is in the way, and it ends well or badly."""

from nanochat.data.microworld.dice import Dice

HEROES = [
    "a little fox",
    "an old bear",
    "a young wolf",
    "a grey mouse",
    "a tired donkey",
    "a brave hen",
    "a lazy cat",
    "a small frog",
    "a proud rooster",
    "a shy rabbit",
    "a king",
    "a poor miller",
    "a girl called Anna",
    "a boy called Tom",
    "a witch",
    "a giant",
    "a quiet shepherd",
    "a merry cobbler",
]
WISHES = [
    "a golden key",
    "a warm coat",
    "a red apple",
    "a ring",
    "a boat",
    "a bag of corn",
    "the highest cake",
    "a silver bell",
    "a new hat",
    "a magic stone",
    "a letter from home",
    "a blue feather",
]
PLACES = [
    "in the forest",
    "by the sea",
    "on the hill",
    "near the river",
    "behind the mill",
    "in the old tower",
    "at the market",
    "under the bridge",
]
OBSTACLES = [
    "a storm came up",
    "the door was locked",
    "a dog stood in the way",
    "it was too dark to see",
    "the bridge was broken",
    "nobody knew the way",
    "a thief had been there before",
    "the snow was deep",
]
HELPERS = [
    "a kind bird",
    "an old woman",
    "a clever mouse",
    "a passing merchant",
    "the moon",
    "a friendly goat",
    "two children",
    "a blind man",
]
HELP = [
    "showed another way",
    "lent a lamp",
    "told a secret",
    "opened the gate",
    "gave good advice",
    "carried the load",
    "sang until morning",
    "shared some bread",
]
ENDINGS = [
    "So {it} took {wish} home and was glad.",
    "In the end, {it} gave {wish} away and felt rich.",
    "{wish} was lost, but a friend was found.",
    "That night {it} slept with {wish} close by.",
    "And from then on {it} never wanted anything else.",
]
BEGINNINGS = ["Once upon a time there was", "Long ago there lived", "In a far land there was", "One day there was"]


def story(dice: Dice) -> str:
    """One story of five or six sentences."""
    hero, wish, place, helper = dice.pick(HEROES), dice.pick(WISHES), dice.pick(PLACES), dice.pick(HELPERS)
    short = "the " + hero.split(" called ")[0].split(" ", 1)[1]
    lines = [
        f"{dice.pick(BEGINNINGS)} {hero}.",
        f"More than anything, {short} wanted {wish}.",
        f"It was said to be {place}, so {short} set out in the morning.",
        f"But {dice.pick(OBSTACLES)}.",
        f"Then {helper} {dice.pick(HELP)}.",
    ]
    if dice.chance(50):
        lines.append(f'"Thank you," said {short}.')
    ending = dice.pick(ENDINGS).format(it=short, wish=wish)
    return " ".join([*lines, ending[0].upper() + ending[1:]])
