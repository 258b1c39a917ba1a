"""The page about a compiled program: sums, two side by side; memory; what is suspect; every launch in order."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from nanochat.render import Curve, Section, Table
from profiling.compiled.launches import COMMUNICATION, COPIES, INDUCTOR, NOT_STREAMING, is_template
from profiling.compiled.lint import STREAMS, exempt, violations
from profiling.predicted.cards import Card
from profiling.predicted.predict import time_text

LINES = 40  # rows of a table of sums
Found = dict[str, Any]  # what report.py's `measured` gives


def micro_step(found: Found) -> list[dict[str, Any]]:
    """Of a training step one forward and one backward, the second micro-batch's, in which gradients are added to those
    of the first; of another program all.
    """
    training = any(row["phase"] == "optimizer" or row["phase"].endswith("2") for row in found["launches"])
    return [row for row in found["launches"] if not training or row["phase"].endswith("2")]


def updates(found: Found) -> list[dict[str, Any]]:
    """The optimizer's launches, with what ranks send."""
    return [row for row in found["launches"] if row["phase"] == "optimizer"]


def totals(found: Found) -> dict[str, float]:
    """Of a forward and a backward, or a decode step: launches, bytes (streaming: all but products and attention), FLOPs
    and time; the same of the optimizer's updates; and the most memory that is allocated at a time.
    """
    sums = counted(micro_step(found))
    if rows := updates(found):
        sums |= {f"optimizer_{name}": value for name, value in counted(rows).items()}
    return dict(sums, peak_gib=max(phase["peak"] for phase in found["memory"].values()) / 2**30)


def counted(rows: list[dict[str, Any]]) -> dict[str, float]:
    local = [row for row in rows if row["category"] != COMMUNICATION]
    sent = sum(row["bytes"] for row in rows) - sum(row["bytes"] for row in local)
    return dict(
        launches=len(rows),
        gigabytes=sum(row["bytes"] for row in local) / 1e9,
        streaming_gigabytes=sum(row["bytes"] for row in local if row["category"] not in NOT_STREAMING) / 1e9,
        teraflops=sum(row["flops"] for row in rows) / 1e12,
        predicted_ms=1e3 * sum(row["predicted_s"] for row in rows),
    ) | (dict(sent_gigabytes=sent / 1e9) if sent else {})


def ratios(ours: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """Of two `totals`, ours / the other's, where there is something to divide by."""
    return {what: ours[what] / value for what, value in other.items() if value and what in ours}


def sections(variants: dict[str, Found], chip: Card) -> list[Section]:
    """variants: setting of the kernels → what it gives; one or two."""
    made = [summary(variants, chip), kept(variants)]
    made += [sums(f"By {key}", key, variants, micro_step) for key in ("category", "module", "line")]
    if any(map(updates, variants.values())):
        made += [sums(f"The updates by {key}", key, variants, updates) for key in ("category", "module")]
    made += [memory_differences(variants)] if len(variants) == 2 else []
    for name, found in variants.items():
        made += [memory(name, found), suspects(name, found), launches(name, found)]
    return made


def summary(variants: dict[str, Found], chip: Card) -> Section:
    sides = {name: totals(found) for name, found in variants.items()}
    parts = ratios(*sides.values()) if len(sides) == 2 else {}
    rows = []
    least = {name: any(row["lower_bound"] for row in found["launches"]) for name, found in variants.items()}
    for what in dict.fromkeys(what for side in sides.values() for what in side):
        mark = {name: "≥ " if what.endswith("predicted_ms") and least[name] else "" for name in sides}
        cells = [f"{mark[name]}{side[what]:,.4g}" if what in side else "–" for name, side in sides.items()]
        rows.append(
            (
                what.replace("_", " ").replace("gib", "GiB"),
                *cells,
                *([f"{parts[what]:.2f}" if what in parts else "–"] if parts else []),
            )
        )
    most = max(side["peak_gib"] for side in sides.values())
    fits = (
        []
        if most < chip.capacity / 2**30
        else [f"That does not fit: the {chip.name} has {chip.capacity / 2**30:.0f} GiB."]
    )
    names = (row["name"] for found in variants.values() for row in found["launches"])
    searched = (
        ["Inductor's templates have the block sizes of kernels/tuned: nothing was searched."]
        if any(map(is_template, names))
        else []
    )
    updated = any(map(updates, variants.values()))
    of = "A forward and a backward, and the updates" if updated else "All of it"
    compiled = any(row["who"] == INDUCTOR for found in variants.values() for row in found["launches"])
    return Section(of, [
        f"{'The code of Inductor' if compiled else 'What the engine launches'} for the {chip.name}, run on fake "
        f"tensors; no card was involved. Times are PREDICTED ({chip.constants}): bytes over bandwidth or FLOPs over "
        "the rate of products, and a launch each, of which a replayed CUDA graph saves a part; of a kernel that loops "
        "that is the least (≥); what runs beside something else, as communication does, is counted as if it did not.",
        Table(("", *sides, *([" / ".join(sides)] if parts else [])), rows),
        *fits,
        *searched,
    ])  # fmt: skip


def kept(variants: dict[str, Found]) -> Section:
    """What no kernel should do, and which do it."""
    rows = []
    for name, found in variants.items():
        for (kernel, fault), (size, times) in violations(found).items():
            rows.append((name, kernel, fault, exempt(kernel, fault, size) or "–", f"{times}", f"{size / 1e6:,.1f}"))
    checked = sum(len({row["kernel"] for row in found["launches"] if row["kernel"]}) for found in variants.values())
    said = (
        f"Of {checked} kernels, Inductor's and ours, compiled for the card: none may spill, compute in float64, or "
        f"access memory in less than 16 bytes where it streams {STREAMS / 1e6:.0f} MB and more."
    )
    head = ("", "kernel", "fault", "accepted because", "launches", "MB")
    return Section("What no kernel should do", [said, Table(head, rows) if rows else "None does."])


def sums(title: str, key: str, variants: dict[str, Found], part: Callable[[Found], list[dict[str, Any]]]) -> Section:
    """Launches, bytes and predicted time of a part by category, module or line; with two, the bytes between. Of more
    lines than LINES those with most bytes, and the rest together.
    """
    tables: dict[str, dict[str, Counter[str]]] = {}
    for name, found in variants.items():
        for row in part(found):
            cell = tables.setdefault(row[key] or "not known", {}).setdefault(name, Counter())
            cell.update(launches=1, bytes=row["bytes"], ns=round(1e9 * row["predicted_s"]))
    ordered = sorted(tables.items(), key=lambda item: -max(cell["bytes"] for cell in item[1].values()))
    if len(ordered) > LINES:
        rest = {name: Counter[str]() for name in variants}
        for _, cells in ordered[LINES:]:
            for name, cell in cells.items():
                rest[name].update(cell)
        ordered = [*ordered[:LINES], ("the rest", rest)]
    rows = []
    for label, cells in ordered:
        numbers, sides = [label], [cells.get(name, Counter()) for name in variants]
        for cell in sides:
            numbers += [f"{cell['launches']}", f"{cell['bytes'] / 1e9:,.2f}", f"{cell['ns'] / 1e6:,.2f}"]
        rows.append(numbers + [f"{(sides[0]['bytes'] - side['bytes']) / 1e9:+,.2f}" for side in sides[1:]])
    names = list(variants)
    head = [key, *(f"{name}: {what}" for name in names for what in ("launches", "GB", "predicted ms"))]
    return Section(title, [Table([*head, *(f"GB, {names[0]} − {name}" for name in names[1:])], rows)])


def memory_differences(variants: dict[str, Found]) -> Section:
    """Of two: the most of each phase; and what is alive when the most is, by kind, and by kind and size of a block."""

    def gib(a: int, b: int) -> list[str]:
        return [f"{a / 2**30:,.2f}", f"{b / 2**30:,.2f}", f"{(a - b) / 2**30:+,.2f}"]

    one, two = ({phase: of["peak"] for phase, of in found["memory"].items()} for found in variants.values())
    phases = [[phase, *gib(one.get(phase, 0), two.get(phase, 0))] for phase in {**one, **two}]
    most = [at_peak(found)[1] for found in variants.values()]
    first, second = (Counter(at["kinds"]) for at in most)
    kinds = [[kind, *gib(first[kind], second[kind])] for kind, _ in (first | second).most_common()]
    counts: list[Counter[tuple[str, int]]] = [Counter(), Counter()]
    for side, at in zip(counts, most):
        for size, count, kind, _ in at["blocks"]:
            side[kind, size // count] += count
    more = {key: counts[0][key] - counts[1][key] for key in counts[0] | counts[1]}
    largest = sorted((key for key in more if more[key]), key=lambda key: -abs(key[1] * more[key]))[:LINES]
    blocks = [
        [kind, f"{size / 2**20:,.0f}", *(f"{side[kind, size]}" for side in counts),
         f"{size * more[kind, size] / 2**30:+,.2f}"]
        for kind, size in largest
    ]  # fmt: skip
    names = list(variants)
    difference = f"{names[0]} − {names[1]}, GiB"
    sides = (*(f"{name}, GiB" for name in names), difference)
    return Section("Memory side by side", [
        Table(("the most in", *sides), phases),
        Table(("alive when the most is", *sides), kinds),
        Table(("kind of a block", "MiB each", *(f"{name}, blocks" for name in names), difference), blocks),
    ])  # fmt: skip


def at_peak(found: Found) -> tuple[str, dict[str, Any]]:
    """The phase in which the most is allocated, and what is then."""
    return max(found["memory"].items(), key=lambda item: item[1]["peak"])


def memory(name: str, found: dict[str, Any]) -> Section:
    phase, at = at_peak(found)
    kinds = [(kind, f"{size / 2**30:,.2f}") for kind, size in at["kinds"].items()]
    blocks = [(f"{size / 2**30:,.2f}", f"{count}", kind, line) for size, count, kind, line in at["blocks"][:LINES]]
    curve = found["curve"]
    begun = ", ".join(f"{of} from {at}" for of, at in curve["phases"].items())
    return Section(f"Memory: {name}", [
        f"The most is allocated in {phase}: {at['peak'] / 2**30:,.2f} GiB.",
        Curve(f"GiB allocated, call by call: {begun}", [(i, size / 2**30) for i, size in enumerate(curve["bytes"])]),
        Table(("alive then", "GiB"), kinds),
        Table(("GiB", "blocks", "kind", "made by"), blocks),
    ])  # fmt: skip


def suspects(name: str, found: Found) -> Section:
    """Of the whole program: what computes nothing, what is accessed narrowly, and what does not compile."""
    rows: Counter[tuple[str, str, str]] = Counter()
    moved: Counter[tuple[str, str, str]] = Counter()
    for row in found["launches"]:
        kernel = found["kernels"].get(row["kernel"], {})
        width = kernel.get("access_bytes") or 16
        why = "computes nothing" if row["category"] == COPIES else ""
        if width < 16 and row["category"] not in NOT_STREAMING:
            why = f"{why}, {width} bytes at a time".removeprefix(", ")
        if error := kernel.get("error"):
            why = f"does not compile: {error}"
        if why:
            rows[row["name"], why, row["line"]] += 1
            moved[row["name"], why, row["line"]] += row["bytes"]
    lines = [(*key, f"{rows[key]}", f"{size / 1e9:,.3f}") for key, size in moved.most_common(LINES)]
    table = Table(("launch", "why", "line", "times", "GB"), lines)
    return Section(f"Suspects: {name}", [table if lines else "None."])


def launches(name: str, found: dict[str, Any]) -> Section:
    """All of the step, in order."""
    rows = []
    for row in found["launches"]:
        kernel = found["kernels"].get(row["kernel"], {})
        time = f"≥ {time_text(row['predicted_s'])}" if row["lower_bound"] else time_text(row["predicted_s"])
        rows.append((
            row["phase"], row["name"], row["line"], row["category"], f"{row['bytes'] / 1e6:,.1f}",
            f"{row['flops'] / 1e9:,.1f}" if row["flops"] else "–", row["bound"],
            f"{time} ±{row['band']:.0%}", f"{kernel.get('registers') or '–'}", f"{kernel.get('spill_bytes') or 0}",
            f"{kernel.get('access_bytes') or '–'}",
        ))  # fmt: skip
    head = (
        "phase",
        "launch",
        "line",
        "category",
        "MB",
        "GFLOP",
        "bound",
        "predicted",
        "registers",
        "spilled",
        "bytes at a time",
    )
    return Section(f"Every launch: {name}", [Table(head, rows)])
