"""Our compiled step against the frozen plain one: the README's table, the files that it is from, their bars."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from nanochat.recipe import model_config
from profiling.compiled import lower, null_device, sections
from profiling.compiled.case import Case
from profiling.predicted import ledger, simulate

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "profiling" / "compiled"
# Setting → its summary beside plain's: what `auto` takes on an H100; with what needs a measurement.
FILES = {"auto": "against_plain.json", "auto,mlp_relu2=triton": "against_plain_all.json"}
ROWS = {
    "streaming_gigabytes": ("GB that are streamed: all but products and attention", "{:.1f}"),
    "peak_gib": ("GiB of memory at the peak", "{:.1f}"),
    "launches": ("launches", "{:.0f}"),
}
MOST = {
    "auto": dict(streaming_gigabytes=0.90, peak_gib=0.80, launches=0.85),
    "auto,mlp_relu2=triton": dict(streaming_gigabytes=0.75, peak_gib=0.80, launches=0.85),
}
AGAIN = "python -m profiling compiled --depth 24 --rows 16 --against plain --kernels {}; copy its summary.json there"


def summary(kernels):
    return json.loads((FOLDER / FILES[kernels]).read_text())


def table():
    """As the README has it."""
    usual, every = map(summary, FILES)
    head = ("forward and backward of 16 rows", "plain", "ours", "ours / plain", "with relu² in the product", "/ plain")
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|---|---|"]
    for what, (said, form) in ROWS.items():
        cells = [said, form.format(usual["sums"]["plain"][what])]
        for name, found in zip(FILES, (usual, every)):
            cells += [form.format(found["sums"][name][what]), f"{found['ratios'][what]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.parametrize("kernels", FILES)
def test_the_committed_files_are_of_the_step_that_is_named(kernels):
    found = summary(kernels)
    assert (found["depth"], found["card"], found["rows"], found["fp8"]) == (24, "H100", 16, False)
    assert found["kernels"] == kernels and found["sums"]["plain"] == summary("auto")["sums"]["plain"]
    assert found["ratios"] == sections.ratios(found["sums"][kernels], found["sums"]["plain"])


def test_the_readme_has_the_ratios_of_the_committed_files():
    assert table() in (ROOT / "README.md").read_text(), f"the README wants\n{table()}"


def test_inductors_template_counts_as_our_product_does():
    found = json.loads((FOLDER / "against_plain_template.json").read_text())
    made, ours = found["sums"]["auto,mlp_relu2=inductor"], summary("auto,mlp_relu2=triton")["sums"]
    assert found["sums"]["plain"] == ours["plain"]
    assert {what: made[what] for what in ROWS} == {what: ours["auto,mlp_relu2=triton"][what] for what in ROWS}


@pytest.mark.parametrize("variant, kernels", [("plain", "plain"), ("ours", "auto"), ("relu2", "auto,mlp_relu2=triton")])
def test_what_is_taken_from_few_layers_is_nearly_the_whole_depth(variant, kernels):
    """The simulator and the ledger count four and six layers, the README all 24."""
    streaming, launches = simulate.streamed(ledger.job(variant))
    whole = summary("auto" if kernels == "plain" else kernels)["sums"][kernels]
    assert streaming == pytest.approx(1e9 * whole["streaming_gigabytes"], rel=0.02)
    assert launches == pytest.approx(whole["launches"], rel=0.02)


@pytest.mark.parametrize("what", ROWS)
@pytest.mark.parametrize("kernels", FILES)
def test_the_ratios_keep_their_bars(kernels, what):
    assert summary(kernels)["ratios"][what] <= MOST[kernels][what]


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [*FILES, "plain"])
def test_the_committed_sums_are_those_of_the_code(kernels):
    pytest.importorskip("triton", reason="Triton is not installed")
    if reason := null_device.obstacle():
        pytest.skip(reason)
    sums = summary("auto" if kernels == "plain" else kernels)["sums"][kernels]
    case = Case(asdict(model_config(24, 32768)), rows=16, kernels=kernels)
    found = lower.ask("tests.null_device.small_step", case, "h100")
    launches = [row | dict(predicted_s=0) for row in found["launches"]]
    made = sections.totals(dict(launches=launches, memory=found["phases"]))
    again = AGAIN.format("auto" if kernels == "plain" else kernels)
    assert {what: made[what] for what in ROWS} == pytest.approx({what: sums[what] for what in ROWS}), again
