"""What was reached of the card's peaks: the three MFUs, or decoding's two shares; a step's waterfall, a kernel's limit.

And of what was predicted. All are None or left out where the card is not known: a wrong peak is worse than none.
"""

from dataclasses import replace
from typing import Any

from profiling.predicted.cards import Card, Known
from profiling.predicted.predict import predict
from profiling.recorded import costs
from profiling.recorded.analysis import Analysis
from profiling.recorded.costs import COMMUNICATION, PRODUCTS


def rates(found: Analysis, chip: Known | None) -> dict[str, float]:
    """Tokens per second, and the shares of the peak where FLOPs and peak are known: of bf16, and of fp8 in fp8 runs.

    Of decoding: the shares of bandwidth and bf16 peak that making the tokens needs, prompts not counted.
    """
    about = found.meta
    if not about:
        return {}
    seconds = found.wall_ns / 1e9 / found.steps
    rate = about["tokens_per_step"] / seconds
    shares: dict[str, float] = dict(step_s=seconds, tok_per_s=rate)
    if chip is None or not found.on_device:
        return shares
    for name, flops in about["flops_per_token"].items():
        shares[name] = flops * rate / about["world"] / chip.bf16
        if about["fp8"] and chip.fp8:
            shares[f"{name}_fp8"] = flops * rate / about["world"] / chip.fp8
    if decoding := about.get("decoding"):
        shares["bandwidth_use"] = decoding["bytes"] / seconds / chip.memory
        shares["flop_use"] = decoding["flops"] / seconds / chip.bf16
    return shares


def waterfall(found: Analysis, chip: Known | None) -> list[tuple[str, int, str]]:
    """(label, ns, category) that add up to the wall time exactly: from the peak down to what was reached.

    What products lose is in two bars where it is known what they can reach on this card.
    """
    products, left = found.products, dict(found.category_ns)
    bars = []
    if chip and found.on_device and products["known_ns"] and (chip.fp8 or not products["fp8_flops"]):
        plain, small = products["flops"], products["fp8_flops"]
        at_peak = round(1e9 * (plain / chip.bf16 + (small / chip.fp8 if small else 0)))
        bars = [("matrix products, at the peak", at_peak, PRODUCTS)]
        if isinstance(chip, Card):
            at_best = round(1e9 * (plain / chip.products() + (small / chip.products(True) if small else 0)))
            bars += [
                ("… lost to the best rate of this card", at_best - at_peak, PRODUCTS),
                ("… lost by these shapes", products["known_ns"] - at_best, PRODUCTS),
            ]
        else:
            bars += [("… lost by this card and these shapes", products["known_ns"] - at_peak, PRODUCTS)]
        left[PRODUCTS] = products["unknown_ns"]
    for name in (PRODUCTS, costs.ATTENTION, costs.STREAMING, costs.LOSS, costs.OTHER, costs.OPTIMIZER, COMMUNICATION):
        label = "communication, exposed" if name == COMMUNICATION else name
        label = "matrix products of unknown shape" if bars and name == PRODUCTS else label
        bars += [(label, left[name], name)] if left.get(name) else []
    bars += [(costs.COPIES, left[costs.COPIES], costs.COPIES)] if left.get(costs.COPIES) else []
    return [*bars, ("idle" if found.on_device else "outside of operators", found.idle_ns, "idle")]


def roofline_share(row: dict[str, Any], chip: Known | None) -> float | None:
    """The share of the card's limits: the least time that FLOPs and bytes need, over the time taken."""
    if chip is None or not (row["flops_ns"] or row["bytes_ns"]):
        return None
    peak = chip.fp8 if row["fp8"] else chip.bf16
    computing = row["flops"] / peak / row["flops_ns"] if row["flops_ns"] and peak else 0.0
    moving = row["bytes"] / chip.memory / row["bytes_ns"] if row["bytes_ns"] else 0.0
    return 1e9 * max(computing, moving)


# What predicted/predict.py is to take a category for: of these it says a lower bound only.
_LOOPED = {costs.LOSS: "cross_entropy", costs.ATTENTION: "attention"}


def predicted_ratio(row: dict[str, Any], chip: Known | None) -> tuple[float, float | None] | None:
    """(PREDICTED time over the time taken, the band of the prediction, None for a lower bound) of a row of `ops`.

    Of its calls whose shapes are known, without launches: a kernel's time in a trace has none in it. None where nothing
    can be predicted.
    """
    if not isinstance(chip, Card) or not row["shapes"] or (row["fp8"] and not chip.fp8):
        return None
    bare, op = replace(chip, launch=0.0), "fp8_" if row["fp8"] else _LOOPED.get(row["category"], "")
    made = [(predict(bare, op, shape["bytes"], shape["flops"]), shape["count"]) for shape in row["shapes"]]
    lower = row["name"].startswith("triton_red_") or any(said.lower_bound for said, _ in made)
    ratio = 1e9 * sum(said.seconds * count for said, count in made) / sum(shape["ns"] for shape in row["shapes"])
    return ratio, None if lower else max(said.band for said, _ in made)
