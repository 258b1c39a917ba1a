"""The sections of a lab page: each a function from what was found to blocks of nanochat/render.py.

Times are of a step: the window's over its steps. What is missing is a sentence.
"""

from dataclasses import dataclass
from typing import Any

from nanochat.render import Table
from profiling import nvml
from profiling.predicted.cards import Card, Known
from profiling.recorded import costs, step_plots
from profiling.recorded.analysis import BEFORE, Analysis
from profiling.recorded.events import PHASES
from profiling.recorded.mfu import predicted_ratio, rates, roofline_share, waterfall

ROWS = 25  # kernels in the table
STEPS = 20  # of an engine, in their table
SLOW = 1.3  # times as long while recorded: from here on the page warns
ON_CPU = "No device events: times are of CPU operators, each without those that it calls."
UNKNOWN = "unknown peak"


@dataclass(frozen=True)
class Lab:
    """What a page is made of. card: None where the peak is not known."""

    found: Analysis
    card: Known | None
    source: str

    def ms(self, ns: float) -> float:
        """Of a step."""
        return ns / 1e6 / self.found.steps


TRAINING = {
    "mfu": ("bf16 peak", "as nanochat counts: attention not halved by causality"),
    "mfu_causal": ("bf16 peak", "attention only for the pairs that the mask leaves"),
    "hfu": ("bf16 peak", "with what the backward computes again: attention's Q·Kᵀ"),
}
DECODING = {
    "bandwidth_use": ("memory's bandwidth", "the weights once a step, and each row's keys and values; no prompts"),
    "flop_use": ("bf16 peak", "each row's products with them; no prompts"),
}


def run(lab: Lab) -> list[Any]:
    found, about = lab.found, lab.found.meta
    shares = rates(found, lab.card)
    per_step = sorted(found.step_ns)
    decoding = about.get("decoding")
    rows = [
        ("device", found.card or about.get("device") or "CPU"),
        ("steps recorded", str(len(found.step_ns) or "not marked; all of the trace counts as one")),
        ("time of a step", f"{lab.ms(found.wall_ns):,.2f} ms"),
    ]
    if len(per_step) > 1:
        rows.append(("shortest, longest step", f"{per_step[0] / 1e6:,.2f}, {per_step[-1] / 1e6:,.2f} ms"))
    if about:
        rows += [
            ("tokens per second", f"{shares['tok_per_s']:,.0f} on {about['world']} of these"),
            ("computes in", f"{about['dtype'].removeprefix('torch.')}{', fp8 products' if about['fp8'] else ''}"),
            ("decoding", decoding["how"]) if decoding else ("compiled", "yes" if about["compiled"] else "no"),
            ("torch", about["torch"]),
        ]
    if decoding:
        rows += [
            ("tokens made in a step", f"{about['tokens_per_step']:,.4g}, one for each row"),
            ("prompt tokens read in a step", f"{decoding['prompt_tokens']:,.4g}"),
        ]
    of_rl = bool(about) and not decoding and not about["flops_per_token"]
    shown = DECODING if decoding else {} if of_rl else TRAINING
    for name, (peak, meaning) in shown.items() if found.on_device else ():
        value = f"{shares[name]:.1%} of the {peak}" if name in shares else UNKNOWN
        if f"{name}_fp8" in shares:
            value += f", {shares[f'{name}_fp8']:.1%} of the fp8 peak"
        rows.append((name, f"{value} ({meaning})" if about else "not known: the trace does not say what was trained"))
    notes = slowed(about)
    if decoding:
        notes.append("A step is one of the engine: a token more for every row. Nothing is trained, so there is no MFU.")
    elif of_rl:
        notes.append(
            "Most of a step of RL is decoding, so there is no MFU. Its tokens are those run while it learns, padding "
            "among them, once for each update."
        )
    if about.get("beside"):
        notes.append(f"Not steps alone: inside the recorded time lie {', '.join(about['beside'])}.")
    return [Table(("", lab.source), rows), *each_step(lab), *([] if found.on_device else [ON_CPU]), *notes]


def each_step(lab: Lab) -> list[Any]:
    """An engine's steps differ: some read prompts, and requests come and go."""
    about = lab.found.meta.get("decoding") or {}
    lists = lab.found.step_ns, about.get("rows", ()), about.get("prompts", ())
    number = lab.found.meta.get("first_step", 0) + 1
    rows = [
        (f"{number + i}", f"{ns / 1e6:,.2f}", f"{decoded}", f"{read:,}")
        for i, (ns, decoded, read) in enumerate(zip(*lists))
    ]
    more = [f"And {len(rows) - STEPS} more steps."] if len(rows) > STEPS else []
    return [Table(("step", "ms", "rows decoding", "prompt tokens read"), rows[:STEPS]), *more] if rows else []


def slowed(about: dict[str, Any]) -> list[str]:
    """What recording cost, and what that means."""
    before, while_recorded = about.get("unrecorded_ms"), about.get("recorded_ms")
    if not (before and while_recorded):
        return ["Recording itself costs time, and how much is not known here: no step before it was like those in it."]
    factor = while_recorded / before
    kind = ", of those that read no prompt" if about.get("decoding") else ""
    notes = [
        f"{before:,.2f} ms a step unrecorded, {while_recorded:,.2f} recorded: {factor:.1f} times as long "
        f"(the shortest warm step before the recording against the mean of it{kind})."
    ]
    if factor > SLOW:
        notes.append(
            "Much of this page is the recorder itself, which costs about the same for every operator: short ones look "
            "longer than they are. Trust the shares among long operators, and not the totals: neither ms of a step nor "
            "rates."
        )
    return notes


def where(lab: Lab) -> list[Any]:
    bars = [(label, lab.ms(ns), category) for label, ns, category in waterfall(lab.found, lab.card)]
    whole = lab.ms(lab.found.wall_ns)
    rows = [(label, f"{ms:,.2f}", f"{ms / whole:.1%}") for label, ms, _ in bars]
    notes = []
    if lab.found.on_device and lab.card:
        peak = f"{lab.card.name}: peak {lab.card.bf16 / 1e12:,.0f} TFLOP/s in bf16"
        if isinstance(lab.card, Card):
            notes = [
                f"{peak}; best rate of a step's products taken as {lab.card.products() / 1e12:,.0f} "
                f"({lab.card.constants}). A bar below zero says that these products were faster than that."
            ]
        else:
            notes = [f"{peak}; how much of it products can reach is not known, and nothing is predicted for this card."]
    elif lab.found.on_device:
        notes = [f"{UNKNOWN} ({lab.found.card or 'the trace names no card'}): products are not set against one."]
    return [
        step_plots.waterfall(bars),
        Table(("part", "ms", "share"), [*rows, ("step", f"{whole:,.2f}", "100%")]),
        *notes,
    ]


def phases(lab: Lab) -> list[Any]:
    order = (*PHASES, "between")
    table = {p: {c: lab.ms(ns) for c, ns in lab.found.phase_ns[p].items()} for p in order if p in lab.found.phase_ns}
    present = [c for c in costs.CATEGORIES if any(row.get(c) for row in table.values())]
    rows = [
        (p, *(f"{row[c]:,.2f}" if row.get(c) else "–" for c in present), f"{sum(row.values()):,.2f}")
        for p, row in table.items()
    ]
    text = (
        "Work belongs to the phase in which the host launched it; between: outside of all (evaluation, checkpoints, "
        "logging, text)."
    )
    if not lab.found.on_device:
        text += " Compiled code shows as one operator, whose own time are its fused loops: they count as pointwise."
    return [step_plots.by_phase(table), Table(("ms of a step", *present, "sum"), rows), text]


def kernels(lab: Lab) -> list[Any]:
    chip = lab.card if lab.found.on_device else None
    rows = []
    for row in lab.found.ops[:ROWS]:
        share, said = roofline_share(row, chip), predicted_ratio(row, chip)
        rows.append(
            (
                row["name"] if len(row["name"]) <= 80 else row["name"][:79] + "…",
                f"{row['category']}{', fp8' if row['fp8'] else ''}",
                f"{row['count'] / lab.found.steps:,.4g}",
                f"{lab.ms(row['ns']):,.3f}",
                f"{row['bytes'] / row['bytes_ns']:,.0f}" if row["bytes_ns"] else "–",
                f"{row['flops'] / row['flops_ns'] / 1e3:,.2f}" if row["flops_ns"] else "–",
                "–" if share is None else f"{share:.0%}",
                "–" if said is None else f"≥ {said[0]:.2f}" if said[1] is None else f"{said[0]:.2f} ±{said[1]:.0%}",
            )
        )
    head = (
        "kernel" if lab.found.on_device else "operator",
        "category",
        "calls",
        "ms",
        "GB/s",
        "TFLOP/s",
        "of the limit",
        "predicted / actual",
    )
    kept = [i for i in range(len(head)) if i < 4 or any(row[i] != "–" for row in rows)]
    predicted = len(head) - 1 in kept or not isinstance(chip, Card)  # else there is nothing to explain
    return [
        Table(tuple(head[i] for i in kept), [tuple(row[i] for i in kept) for row in rows]),
        f"Calls and ms are of a step; {len(lab.found.ops)} different ones were seen. FLOPs are known of matrix "
        "products and of attention's forward, bytes (the least that must move) of those, of torch.compile's Triton "
        "kernels and of most of ours, where shapes were recorded.",
        *([prediction(chip)] if chip and predicted else []),
    ]


def prediction(chip: Known) -> str:
    """What the last column of the kernels says."""
    if not isinstance(chip, Card):
        return f"Nothing is predicted for a {chip.name}: only its peaks are known."
    return (
        f"Predicted / actual: the time PREDICTED for these shapes on a {chip.name} ({chip.constants}), without a "
        "launch, over the time taken, and the prediction's band. 0.5: it took twice as long as predicted. ≥: only the "
        "least time that it needs is. Known of bf16 and fp8 products, and of kernels that stream."
    )


def roofline(lab: Lab) -> list[Any]:
    points = [
        (row["name"], row["category"], row["flops"] / row["bytes"], 1e9 * row["flops"] / row["flops_ns"])
        for row in lab.found.ops
        if row["flops_ns"] and row["bytes_ns"]
    ]
    if not points:
        return ["No kernel has both FLOPs and bytes known: the trace holds no shapes (record_shapes=True)."]
    chip = lab.card if lab.found.on_device else None
    if chip is None:
        return [f"No roofline: the limits of this {'card' if lab.found.on_device else 'CPU'} are not known."]
    peaks = [chip.bf16, *([chip.fp8] if any(row["fp8"] for row in lab.found.ops) else [])]
    return [step_plots.roofline(points, peaks, chip.memory)]


# ---- waiting


def idle(lab: Lab) -> list[Any]:
    found = lab.found
    if not found.gaps:
        return ["There was no gap."]
    causes = sorted(found.gaps.items(), key=lambda item: -item[1]["ns"])
    rows = [(name, f"{gap['count'] / found.steps:,.4g}", f"{lab.ms(gap['ns']):,.3f}") for name, gap in causes]
    longest = [(f"{gap['start_ns'] / 1e6:,.3f}", f"{gap['ns'] / 1e3:,.1f}", gap["cause"]) for gap in found.longest_gaps]
    meaning = (
        "host: nothing was launched in time; synchronisation: the host had waited for the device before it launched."
        if found.on_device
        else "host: Python between the operators."
    )
    if beside := lab.found.meta.get("beside"):
        meaning += f" Of these the host's are also what lay between the steps: {', '.join(beside)}."
    return [
        Table(("cause", "gaps a step", "ms a step"), rows),
        meaning,
        Table(("the longest: began at, ms", "µs", "cause"), longest[:10]),
    ]


def communication(lab: Lab) -> list[Any]:
    said = lab.found.communication
    if not said["total_ns"]:
        return ["There was none: one device, or nothing recorded of it."]
    share = said["overlapped_ns"] / said["total_ns"]
    rows = [
        (row["name"], f"{row['count'] / lab.found.steps:,.4g}", f"{lab.ms(row['ns']):,.3f}",
         "–" if row["bus_gb_per_s"] is None else f"{row['bus_gb_per_s']:,.1f}")
        for row in said["collectives"]
    ]  # fmt: skip
    return [
        f"{lab.ms(said['total_ns']):,.2f} ms of a step: {lab.ms(said['exposed_ns']):,.2f} exposed, "
        f"{lab.ms(said['overlapped_ns']):,.2f} ({share:.0%}) beside computing.",
        Table(("collective", "calls a step", "ms a step", "bus GB/s"), rows),
    ]


def memory(lab: Lab) -> list[Any]:
    held = lab.found.memory
    if held is None:
        return ["The trace holds no allocations (profile_memory=True)."]
    parts, peak = dict(held["by_phase"]), held["peak_bytes"]
    note = ""
    if not lab.found.on_device:
        note = " On a CPU only what was allocated while recording is known."
        peak -= parts.pop(BEFORE, 0)
    rows = [(name, f"{count / 2**20:,.1f}") for name, count in sorted(parts.items(), key=lambda i: -i[1])]
    text = f"At the fullest moment {peak / 2**20:,.1f} MiB were allocated, by the phase that allocated them.{note}"
    return [text, *([Table(("allocated in", "MiB"), rows)] if rows else [])]


def sensors(lab: Lab) -> list[Any]:
    rows = lab.found.meta.get("nvml") or []
    said = nvml.summary(rows)
    blocks: list[Any] = [said["unavailable"]] if "unavailable" in said else []
    if not said["samples"]:
        return blocks or ["No sensors were recorded with this trace."]
    lines = []
    for name, value in said.items():
        if isinstance(value, dict):
            scale = 2**30 if name == "memory_used_bytes" else 1
            numbers = (f"{value[key] / scale:,.1f}" for key in ("median", "min", "max"))
            lines.append((name.replace("bytes", "gib").replace("_", " "), *numbers))
    return [
        f"{said['name']}, driver {said['driver']}, power limit {said['power_limit_w']} W; "
        f"held back by: {', '.join(said['throttle']) or 'nothing'}.",
        Table(("sensor", "median", "least", "most"), lines),
        *step_plots.sensors(rows),
        *blocks,
    ]


def further(lab: Lab) -> list[Any]:
    return [
        f"Open {lab.source} in ui.perfetto.dev or chrome://tracing to see every kernel on its stream.",
        "python -m profiling diff A/profile.json B/profile.json says what got slower or faster between two of these.",
    ]
