"""What a chat model knows, makes up and denies: facts taught, only read, and of people in no conversation."""

import functools
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from experiments import training
from experiments.evaluation_noise.declaration import WORDINGS
from experiments.knowledge import variants
from experiments.knowledge.measures import GROUPS, WARM, asked_all, completed
from experiments.knowledge.reading import calibration, kept, risks, selective
from experiments.knowledge.variants import NO_REFUSALS, REMEDY, USUAL
from nanochat.lab.declaration import Experiment, Findings, Rows
from nanochat.lab.estimate import by_seed, formatted, paired, rate
from nanochat.lab.plot import curves, forest
from nanochat.lab.table import Value, Values
from nanochat.run import Run

DIFFERENCES = {  # of two rates of one variant, paired by seed
    "completed, most told against least": (USUAL, "base_completed_3", "base_completed_0"),
    "answered, most told against least": (USUAL, "sft_read_right_3", "sft_read_right_0"),
    "answered without refusals, most told against least": (NO_REFUSALS, "sft_read_right_3", "sft_read_right_0"),
    "silent against read: refused": (USUAL, "sft_silent_refused", "sft_read_refused"),
    "silent against read, without refusals: right": (NO_REFUSALS, "sft_silent_right", "sft_read_right"),
    "unknown, greedy against 1.0: refused": (USUAL, "sft_unknown_refused", "t1.0_unknown_refused"),
    "completed against answered: read": (USUAL, "sft_completed_read", "sft_read_right"),
}
COMPARED = ("sft_silent_right", "sft_silent_refused", "sft_unknown_refused", "sft_read_right")


@functools.lru_cache(maxsize=1)
def trained(seed: int, size: tuple[tuple[str, Any], ...]) -> tuple[TemporaryDirectory, dict[str, Value]]:
    """A base model, for all cells of this seed: (where its run lies, what was measured of it)."""
    place = TemporaryDirectory()
    with training.base("knowledge", seed, **training.base_flags(dict(size))) as (made, summary):
        found: dict[str, Value] = {"val_bpb": summary["val_bpb"], **completed(made, "base", dict(size)["wordings"])}
        exposures = variants.exposures(seed, summary["documents"])
        shutil.copytree(made.folder, Path(place.name, "run"))
    return place, found | {f"exposures_{g}": round(exposures[g], 1) for g in GROUPS}


def run(cell: Values, seed: int, size: Mapping[str, Any]) -> dict[str, Value]:
    training.tokenizer(512, "embedded")  # before the patches: all experiments share it
    with variants.world(), variants.conversations(str(cell["variant"])):
        place, found = trained(seed, tuple(size.items()))
        made = Run.open(f"experiment-knowledge-seed{seed}")
        shutil.copytree(Path(place.name, "run"), made.folder, dirs_exist_ok=True)
        training.chat_chain(made, seed, size)
        stages = [completed(made, stage, size["wordings"]) | asked_all(made, stage, size) for stage in ("mid", "sft")]
        shutil.rmtree(made.folder)
    return found | stages[0] | stages[1]


def findings(rows: Rows) -> Findings:
    there = list(dict.fromkeys(str(row["variant"]) for row in rows))
    of = lambda variant, name: statistics.fmean(by_seed(rows, dict(variant=variant), name).values())
    numbers = [name for name, value in rows[0].items() if isinstance(value, int | float) and name != "seed"]
    claims = {
        f"{variant}: {name}": f"{of(variant, name):.1%}"
        for variant in there
        for name in numbers
        if name.split("_")[0] in ("base", "mid", "sft", *(f"t{temperature}" for temperature in WARM))
    }
    claims |= {f"exposures {g}": f"{of(USUAL, f'exposures_{g}'):.0f}" for g in GROUPS}
    claims["bits per byte"] = f"{of(USUAL, 'val_bpb'):.3f}"
    effects = []
    for variant in there[1:]:
        for name in COMPARED:
            effect = paired(by_seed(rows, dict(variant=variant), name), by_seed(rows, dict(variant=USUAL), name))
            claims[f"{variant}: effect on {name}"] = formatted(effect, "+.1%")
            effects.append((f"{variant}: {name.removeprefix('sft_')}", effect))
    for variant in there:
        found = [calibration(row) for row in rows if row["variant"] == variant]
        claims[f"{variant}: said sure"] = f"{statistics.fmean(sure for sure, _, _ in found):.1%}"
        claims[f"{variant}: is right"] = f"{statistics.fmean(right for _, right, _ in found):.1%}"
        claims[f"{variant}: calibration error"] = f"{statistics.fmean(error for _, _, error in found):.1%}"
    both = kept(rows) if NO_REFUSALS in there else {0: (0.0, 0.0)}
    share = tuple(statistics.fmean(column) for column in zip(*both.values()))
    claims |= {"kept by refusals": f"{share[0]:.1%}", "kept by confidence": f"{share[1]:.1%}"}
    claims["kept: seeds"] = ", ".join(f"{100 * one:.0f} → {100 * other:.0f}" for one, other in both.values())
    refused, confident = ({seed: pair[i] for seed, pair in both.items()} for i in (0, 1))
    claims["kept: difference"] = formatted(paired(confident, refused), "+.1%")
    for name, (variant, one, other) in DIFFERENCES.items():
        if variant in there:
            values = [by_seed(rows, dict(variant=variant), what) for what in (one, other)]
            claims[f"difference: {name}"] = formatted(paired(*values), "+.1%")
    denied = of(USUAL, "sft_silent_refused") > 0.5
    cured = lambda: of(REMEDY, "sft_silent_right") >= 2 * of(USUAL, "sft_silent_right")
    verdicts = {
        "verdict": denied and cured() if REMEDY in there else None,
        "verdict: exposures": of(USUAL, "base_completed_3") > 2 * of(USUAL, "base_completed_0"),
        "verdict: extraction": of(USUAL, "sft_read_right") < of(USUAL, "sft_completed_read"),
        "verdict: temperature": of(USUAL, "t1.0_unknown_refused") < of(USUAL, "sft_unknown_refused"),
        "verdict: confidence": share[1] >= share[0] / 2 if NO_REFUSALS in there else None,
    }
    words = {True: "held", False: "refuted", None: "open"}  # where what it compares did not run
    claims |= {name: words[held] for name, held in verdicts.items()}
    at = lambda name, g: (
        of(USUAL, f"exposures_{g}"),
        *rate(list(by_seed(rows, dict(variant=USUAL), name(g)).values())),
    )
    lines = {
        "completed, base": [at("base_completed_{}".format, g) for g in GROUPS],
        "completed, SFT": [at("sft_completed_{}".format, g) for g in GROUPS],
        "answered, SFT (only read)": [at("sft_read_right_{}".format, g) for g in GROUPS],
    }
    risky = {variant: risks([row for row in rows if row["variant"] == variant]) for variant in there}
    axes = "share of questions that are answered", "share of answers that are wrong"
    plots = {
        "effects.svg": forest("Change of a rate against the usual conversations", effects or [(USUAL, (0.0,) * 3)]),
        "exposures.svg": curves("Recall", "times told in pretraining", "share of facts", lines),
        "selective.svg": curves("Answering the surest first", *axes, risky, log_x=False),
        "calibration.svg": curves(
            "Sure and right", "probability of the answer", "share right", selective(rows), log_x=False
        ),
    }
    return Findings(claims, plots)


EXPERIMENT = Experiment(
    question="Why does a chat model deny people whom it has read about, and does one asked fact of each cure that?",
    hypothesis="People in no conversation are refused more often than not, since SFT teaches who is asked about, "
    "not what is known; one taught fact of each at least doubles the share of their other facts that is answered. "
    "Beside that: (exposures) people of whom pretraining tells eight times as often are completed more than twice as "
    "often; (extraction) of the facts only read fewer are answered in the chat than the same model completes; "
    "(temperature) at 1.0 fewer unknown names are refused than greedily; (confidence) without taught refusals, a "
    "threshold on the answer's probability that lets as many unknown names through keeps at least half of the right "
    "answers.",
    refuted_by="Half of the silent facts or fewer refused, or less than twice as many answered with the remedy. Each "
    "of the others by the contrary.",
    metric="outcomes (right, wrong, refused) of 100 questions a kind, greedily and at other "
    "temperatures; share of facts completed in the words of pretraining, by stage and by how often they were told",
    budget="3 base models of half a minute, 9 chains of mid and SFT of half a minute, on one core",
    cells=tuple(dict(variant=variant) for variant in (USUAL, REMEDY, NO_REFUSALS)),
    seeds=(1, 2, 3),
    run=run,
    findings=findings,
    size=dict(
        training.CHAIN,
        depth=2,
        aspect_ratio=32,
        head_dim=32,
        total_batch_size=2048,
        num_iterations=450,
        mid_steps=130,
        sft_steps=110,
        most=100,
        wordings=WORDINGS,
    ),
    smoke=dict(training.CHAIN_SMOKE, num_iterations=2, most=2, wordings=1),
    smoke_cells=tuple(dict(variant=variant) for variant in (USUAL, NO_REFUSALS)),
)
