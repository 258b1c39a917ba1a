"""Our compiled step against the frozen plain one: the figures of the README, their file, what they may not exceed."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from nanochat.recipe import model_config
from profiling.compiled import lower, null_device, sections

ROOT = Path(__file__).parent.parent
FILE = ROOT / "profiling" / "compiled" / "against_plain.json"
ROWS = {
    "streaming_gigabytes": ("GB that are streamed: all but products and attention", "{:.1f}"),
    "peak_gib": ("GiB of memory at the peak", "{:.1f}"),
    "launches": ("launches", "{:.0f}"),
}
MOST = dict(streaming_gigabytes=0.90, peak_gib=0.80, launches=0.85)
AGAIN = "python -m profiling compiled --depth 24 --rows 16 --against plain, and copy its summary.json there"


def table(summary):
    """As the README has it."""
    lines = ["| forward and backward of 16 rows | ours | plain | ours / plain |", "|---|---|---|---|"]
    for what, (said, form) in ROWS.items():
        ours, plain = (form.format(summary["sums"][name][what]) for name in ("auto", "plain"))
        lines.append(f"| {said} | {ours} | {plain} | {summary['ratios'][what]:.2f} |")
    return "\n".join(lines)


def test_the_readme_has_the_ratios_of_the_committed_file():
    summary = json.loads(FILE.read_text())
    assert (summary["depth"], summary["card"], summary["rows"], summary["fp8"]) == (24, "H100", 16, False)
    assert summary["ratios"] == sections.ratios(summary["sums"]["auto"], summary["sums"]["plain"])
    assert table(summary) in (ROOT / "README.md").read_text(), f"the README wants\n{table(summary)}"


@pytest.mark.parametrize("what", ROWS)
def test_the_ratios_keep_their_bars(what):
    assert json.loads(FILE.read_text())["ratios"][what] <= MOST[what]


@pytest.mark.slow
def test_the_committed_sums_are_those_of_the_code():
    pytest.importorskip("triton", reason="Triton is not installed")
    if reason := null_device.obstacle():
        pytest.skip(reason)
    summary = json.loads(FILE.read_text())
    for kernels, sums in summary["sums"].items():
        case = lower.Case(asdict(model_config(24, 32768)), rows=16, kernels=kernels)
        found = lower.ask("tests.null_device.small_step", case, "h100")
        launches = [row | dict(predicted_s=0) for row in found["launches"]]
        made = sections.totals(dict(launches=launches, memory=found["phases"]))
        assert {what: made[what] for what in ROWS} == pytest.approx({what: sums[what] for what in ROWS}), AGAIN
