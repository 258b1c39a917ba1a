"""What mid-training and SFT learn from with `--data hub`: nanochat's mixtures, row by row. Look at the three recipes.

What a mirror or the Hub lacks is left out and said; what our own code makes is then cut by the same share, so that
spelling does not outgrow conversation. Malformed rows are passed over and said (rows.py). Rows of question sets (MMLU,
GSM8K, ARC) that a test split asks too are left out, counted and said; SmolTalk is not searched for them. Validation is
SmolTalk's test split alone: no question that the model is later graded on, so that nothing is tuned on those.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nanochat.data import hub
from nanochat.errors import UserError
from nanochat.tasks import arc, gsm8k, identity, mmlu, smoltalk
from nanochat.tasks.mixture import Mixture
from nanochat.tasks.rows import Rendered, keys
from nanochat.tasks.spellingbee import count_train, spell_train


@dataclass(frozen=True)
class DataSet:
    """A training split on the Hub, of which at most `rows` are taken: all, where that is its size."""

    load: Callable[[], Rendered]
    rows: int
    epochs: int = 1


@dataclass(frozen=True)
class Recipe:
    """Parts by name. `made`: (what makes so many conversations, how many)."""

    data_sets: dict[str, DataSet]
    made: dict[str, tuple[Callable[[int], Sequence[dict]], int]]
    identity_epochs: int


SMOLTALK = DataSet(lambda: smoltalk.conversations("train"), 460_341)
MMLU = DataSet(mmlu.train, 99_842)
GSM8K = DataSet(gsm8k.train, 7_473)

# nanochat's mid-training, October 2025 (scripts/mid_train.py there): 848 thousand rows.
MID = Recipe(
    dict(smoltalk=SMOLTALK, mmlu=MMLU, gsm8k=GSM8K),
    dict(simple_spelling=(spell_train, 200_000), spellingbee=(count_train, 80_000)),
    identity_epochs=2,
)
# nanochat's SFT after mid-training, October 2025 (scripts/chat_sft.py there): 23 thousand rows.
SFT = Recipe(
    dict(
        arc_easy=DataSet(lambda: arc.train("ARC-Easy"), 2_251),
        arc_challenge=DataSet(lambda: arc.train("ARC-Challenge"), 1_119),
        gsm8k=GSM8K,
        smoltalk=DataSet(SMOLTALK.load, 10_000),
    ),
    dict(simple_spelling=(spell_train, 300), spellingbee=(count_train, 300)),
    identity_epochs=1,
)
# nanochat's SFT right after base training, July 2026; the identity is ours, or the model would not know its name.
SFT_ALONE = Recipe(
    dict(smoltalk=SMOLTALK, mmlu=DataSet(MMLU.load, MMLU.rows, 3), gsm8k=DataSet(GSM8K.load, GSM8K.rows, 4)),
    {},
    identity_epochs=1,
)
TESTS = (arc.EASY, arc.CHALLENGE, mmlu.TEST, gsm8k.TEST)


def mixture(stage: str, after: str) -> tuple[Mixture, list[str]]:
    """(the source for stage "mid" or "sft" that follows stage `after`, what is to be said about it).

    Raises UserError without SmolTalk, since there is nothing to validate on, and when a data set that exists cannot be
    loaded: the mixture does not depend on the network's luck.
    """
    recipe = MID if stage == "mid" else SFT if after == "mid" else SFT_ALONE
    val = replace(smoltalk.conversations("test"), name="smoltalk, test")
    if not len(val):
        raise UserError("there is nothing to validate on: the test split of smoltalk is empty")
    val[0]  # or there is none
    found: dict[str, Rendered] = {}
    notes: list[str] = []
    for name, data_set in recipe.data_sets.items():
        try:
            found[name] = replace(data_set.load(), name=f"{name}, train")
        except hub.Lacks as error:
            if name == "smoltalk":
                raise
            notes.append(f"{name} is left out: {error}")
    asked = asked_in_tests()
    train: dict[str, tuple[Sequence[dict], int]] = {}
    for name, rows in found.items():
        kept = rows.unasked(asked)
        if len(kept) < len(rows):
            notes.append(
                f"{name}: {len(rows) - len(kept):,} of {len(rows):,} training rows ask what a test split asks, and are "
                "left out"
            )
        if len(kept):
            train[name] = (kept.sample(recipe.data_sets[name].rows), recipe.data_sets[name].epochs)
    have = sum(len(rows) for rows, _ in train.values())
    share = min(1.0, have / sum(data_set.rows for data_set in recipe.data_sets.values()))
    if recipe.made and share < 0.99:
        notes.append(f"{share:.1%} of the rows that come from the Hub are here; {', '.join(recipe.made)} are cut alike")
    for name, (make, rows_made) in recipe.made.items():
        train[name] = (make(max(1, round(rows_made * share))), 1)
    train["identity"] = (identity.conversations(), recipe.identity_epochs)
    sizes = ", ".join(
        f"{name} {len(rows):,}" + (f" x {epochs}" if epochs > 1 else "") for name, (rows, epochs) in train.items()
    )
    return Mixture(f"hub ({stage}: {sizes})", train, {"smoltalk": (val, 1)}), notes


def asked_in_tests() -> set[str]:
    """The questions of all test splits that are there: what is not is not evaluated here either."""
    asked: set[str] = set()
    for split in TESTS:
        try:
            asked |= keys(hub.dataset(*split))
        except hub.Lacks:
            continue
    return asked
