"""The laboratory: every experiment's smoke run; resuming, refusing, claims; estimates against known answers."""

import json
import math
import random
import subprocess
import xml.etree.ElementTree as xml
from dataclasses import replace

import pytest
import torch
from test_stated_numbers import numbers
from tiny import call

from experiments.ablations import paths
from experiments.batch_size.declaration import critical, steps_to
from nanochat.cost import parameter_counts
from nanochat.errors import UserError
from nanochat.evaluate import intervals
from nanochat.gpt import GPT
from nanochat.lab import claims, declaration, estimate, plot, runner, table
from nanochat.lab.declaration import Experiment, Findings
from scripts import base_train

NAMES = declaration.names()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """All smoke runs share the tokenizer that is trained there."""
    return tmp_path_factory.mktemp("experiments")


def test_there_are_nine_experiments_and_two_ladders():
    assert len(NAMES) == 11 and {"miniseries", "scaling_laws", "evaluation_noise"} < set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_smoke(name, home, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(home))
    assert call("experiment", name, "--smoke") == 0
    folder = home / "experiments" / name / "smoke"
    experiment = declaration.load(name)
    rows = table.read(folder / "table.csv")
    cells = (*experiment.smoke_cells, *experiment.held_out)
    assert len(rows) == len(cells) * experiment.smoke_seeds
    assert json.loads((folder / "environment.json").read_text()) and list(folder.glob("*.svg"))
    assert not list((home / "runs").glob(f"experiment-{name}-*"))  # nothing stays but the tokenizer
    assert "verdict: " in capsys.readouterr().out


def counting(asked, **changes) -> Experiment:
    """Measures at once; `asked` notes what was run."""

    def run(cell, seed, size):
        asked.append((cell["x"], seed))
        return dict(loss=cell["x"] + seed / 1000)

    of = lambda rows: Findings(
        {"mean": f"{sum(float(row['loss']) for row in rows) / len(rows):.4f}"}, {"a.svg": "<svg/>"}
    )
    cells = (dict(x=1), dict(x=2))
    texts = dict(question="", hypothesis="", refuted_by="", metric="", budget="")
    whole = Experiment(**texts, cells=cells, seeds=(1, 2), run=run, findings=of, size={}, smoke={}, smoke_cells=cells)
    return replace(whole, **changes)


@pytest.fixture(autouse=True)
def not_nice(monkeypatch):
    monkeypatch.setattr("os.nice", lambda more: 0)


def test_a_cell_is_run_once_and_a_stopped_grid_goes_on(tmp_path):
    asked: list = []
    experiment = counting(asked)

    def failing(cell, seed, size):
        if (cell["x"], seed) == (1, 2):
            raise KeyboardInterrupt
        return experiment.run(cell, seed, size)

    with pytest.raises(KeyboardInterrupt):
        runner.go("one", replace(experiment, run=failing), tmp_path, False)
    assert asked == [(1, 1), (2, 1)] and len(table.read(tmp_path / "table.csv")) == 2
    found = runner.go("one", experiment, tmp_path, False)
    assert asked == [(1, 1), (2, 1), (1, 2), (2, 2)] and found.claims["mean"] == "1.5015"
    before = (tmp_path / "table.csv").read_bytes()
    runner.go("one", experiment, tmp_path, False)
    assert len(asked) == 4 and (tmp_path / "table.csv").read_bytes() == before


def test_time_that_is_up_and_a_second_runner_are_told(tmp_path):
    with pytest.raises(UserError, match="4 cells left"):
        runner.go("one", counting([]), tmp_path, False, max_minutes=-1)
    inside: list = []

    def second(cell, seed, size):
        with pytest.raises(UserError, match="being run by"):
            runner.go("one", counting([]), tmp_path, False)
        inside.append(cell)
        return dict(loss=0.0)

    runner.go("one", counting([], run=second), tmp_path, False)
    assert len(inside) == 4


def test_a_forecast_is_committed_before_what_it_forecasts_runs(tmp_path):
    git = lambda *words: subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True
    )
    git("init", "-q")
    asked: list = []
    experiment = counting(asked, held_out=(dict(x=9),), forecast=lambda rows, size: dict(value=len(rows)))
    for _ in range(2):
        with pytest.raises(UserError, match="not committed"):
            runner.go("one", experiment, tmp_path, False)
    assert len(asked) == 4 and json.loads((tmp_path / "forecast.json").read_text()) == dict(value=4)
    git("add", "forecast.json")
    git("commit", "-qm", "forecast")
    (tmp_path / "forecast.json").write_text("{}")  # changed after it was registered
    with pytest.raises(UserError, match="not committed"):
        runner.go("one", experiment, tmp_path, False)
    git("checkout", "forecast.json")
    runner.go("one", experiment, tmp_path, False)
    assert asked[4:] == [(9, 1), (9, 2)]


def test_a_note_that_says_something_else_fails(tmp_path):
    experiment, note = counting([]), tmp_path / "README.md"
    note.write_text('It is [1.5015](table.csv "mean"), see [the\ntable](table.csv).')
    runner.go("one", experiment, tmp_path, False)
    note.write_text('It is [1.503](table.csv "mean") and [3](table.csv "other").')
    with pytest.raises(UserError, match="'mean' is '1.503' in the note and '1.5015' in .*nothing called 'other'"):
        runner.go("one", experiment, tmp_path, False)


def test_an_unknown_experiment_is_one_sentence(capsys):
    assert call("experiment", "alchemy") == 2
    assert "there is no experiment 'alchemy'" in capsys.readouterr().err
    assert call("experiment") == 0 and "ablations: What is each trick" in capsys.readouterr().out


# ---- what is committed

MEASURED = [name for name in NAMES if (declaration.FOLDER / name / "table.csv").exists()]


def test_every_number_of_the_notes_is_what_the_tables_say():
    known = {}
    for name in MEASURED:
        folder = declaration.FOLDER / name
        findings = runner.found(declaration.load(name), table.read(folder / "table.csv"))
        known[f"{name}/table.csv"] = findings.claims
        assert not claims.wrong(folder / "README.md", {"table.csv": findings.claims}), name
        assert all((folder / file).read_text() == svg for file, svg in findings.plots.items()), name
    assert not claims.wrong(declaration.FOLDER / "README.md", known)


def test_tables_are_of_declared_cells():
    for name in MEASURED:
        experiment = declaration.load(name)
        cells = (*experiment.cells, *experiment.held_out)
        rows = table.read(declaration.FOLDER / name / "table.csv")
        for row in rows:
            assert row["seed"] in experiment.seeds and any(table.matches(row, cell) for cell in cells), (name, row)
        assert len({(row["seed"], *(str(row[key]) for key in cells[0])) for row in rows}) == len(rows), name


# Per note: settings, rates, targets and criteria, which no table measures; the criteria and the kind of intervals.
STATED = {
    "ablations": "0.03 0.003 0.01 0.0025",
    "arithmetic": "90%",
    "batch_size": "2.6",
    "data_repetition": "0.5 0.33",
    "depth_scaling": "0.4 1.5 0.75",
    "evaluation_noise": "95% 0.05",
    "knowledge": "0.7 1.0",
    "numerics": "0.01",
    "": "95% 90% 0.01",
}


@pytest.mark.parametrize("name", [*MEASURED, ""])
def test_a_note_has_no_number_but_its_tables_and_what_is_stated(name):
    said = numbers(claims.CLAIM.sub("", (declaration.FOLDER / name / "README.md").read_text("utf-8")))
    if not name:
        assert (size := f"({sizes()} million parameters)") in (declaration.FOLDER / "README.md").read_text(), size
        said = [number for number in said if number not in sizes().split()]
    assert not set(said) - set(STATED.get(name, "").split()), name


def sizes() -> str:
    """The smallest and the largest model of all whole grids, in millions of parameters."""
    counts = []
    for name in MEASURED:
        experiment = declaration.load(name)
        for cell in (*experiment.cells, *experiment.held_out):
            of = {**experiment.size, **cell}
            shape = {key: of[key] for key in ("max_seq_len", "aspect_ratio", "head_dim", "window_pattern")}
            config = base_train.model_config(int(of["depth"]), 512, **shape)
            counts.append(parameter_counts(config)["total"] / 1e6)
    return f"{min(counts):.2f} to {max(counts):.2f}"


def test_every_experiment_is_on_the_page_of_findings():
    page = (declaration.FOLDER / "README.md").read_text("utf-8")
    assert all(f"]({name}/" in page for name in NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if declaration.load(name).forecast])
def test_the_registered_forecast_is_older_than_its_result(name):
    folder = declaration.FOLDER / name
    experiment = declaration.load(name)
    rows = [r for r in table.read(folder / "table.csv") if any(table.matches(r, cell) for cell in experiment.held_out)]
    forecast = table.git(folder, "log", "-1", "--format=%H", "--", "forecast.json")
    if not rows or not forecast:
        pytest.skip("the held-out depth was not run, or this is no git checkout with its history")
    for row in rows:
        measured = str(row["commit"]).rstrip("+")
        assert subprocess.run(["git", "merge-base", "--is-ancestor", forecast, measured], cwd=folder).returncode == 0


# ---- estimates


def test_a_compute_multiplier_of_a_known_curve():
    curve = [(c, 5.0 - math.log2(c)) for c in (1.0, 2.0, 8.0)]
    assert estimate.compute_for(3.0, curve) == pytest.approx(4.0)
    assert estimate.compute_for(1.0, curve) == pytest.approx(16.0)  # beyond the end, as the last stretch goes on
    assert estimate.compute_for(6.0, curve) == pytest.approx(0.5)
    curves = {1: curve, 2: curve}
    assert estimate.multiplier(curves, 2.0, {1: 3.0, 2: 3.0}) == pytest.approx((2.0, 2.0, 2.0))


def test_paired_differences_have_less_noise_than_the_seeds():
    noise = {seed: random.Random(seed).gauss(0, 1) for seed in range(8)}
    value, low, high = estimate.paired({s: n + 0.1 for s, n in noise.items()}, {**noise, 99: 1e6})
    assert value == pytest.approx(0.1) and high - low < 1e-9


def test_a_power_law_is_found_again_and_its_interval_covers_it():
    law = estimate.PowerLaw(1.1, 40.0, 0.3)
    x = [1e3, 3e3, 1e4, 3e4, 1e5]
    found = estimate.power_law(x, [law(v) for v in x])
    assert (found.floor, found.exponent) == pytest.approx((1.1, 0.3), rel=0.1)
    assert found(1e6) == pytest.approx(law(1e6), rel=0.01)
    dice = random.Random(0)
    groups = [[law(v) * (1 + dice.gauss(0, 0.005)) for _ in range(5)] for v in x]
    fit = lambda drawn: estimate.power_law(x, [sum(g) / len(g) for g in drawn], floor=1.1)(1e6)
    value, low, high = estimate.of_groups(groups, fit)
    assert low < law(1e6) < high and low < value < high and estimate.of_groups(groups, fit) == (value, low, high)


def test_the_critical_batch_is_found_again():
    points = [(b, 50 * (1 + 1000 / b)) for b in (128, 512, 2048, 8192)]
    assert critical(points) == pytest.approx((50, 1000), rel=0.05)
    assert steps_to([4, 3, 2, 1], 2.5, 2) == 3 and steps_to([4, 3], 1.0, 1) == -1


def test_nineteen_of_twenty_intervals_of_a_fit_cover_what_is_true(monkeypatch):
    """A table as batch_size has it: five batches, two seeds, 3% of noise. Drawing the seeds again covered 41 of 60."""
    monkeypatch.setattr(estimate, "DRAWS", 80)
    batches, dice, covered = (256, 512, 1024, 2048, 4096), random.Random(1), 0
    fit = lambda drawn: critical([(b, steps) for b, group in zip(batches, drawn) for steps in group])[1]
    for _ in range(200):
        groups = [[14 * (1 + 3800 / b) * math.exp(dice.gauss(0, 0.03)) for _ in range(2)] for b in batches]
        _, low, high = estimate.of_groups(groups, fit)
        covered += low <= 3800 <= high
    assert 0.88 < covered / 200 < 0.99


def test_an_interval_of_one_group_is_student_s(monkeypatch):
    monkeypatch.setattr(estimate, "DRAWS", 100_000)
    values = [1.00, 1.02, 1.05]
    found = estimate.of_groups([values], lambda groups: math.prod(groups[0]) ** (1 / 3))
    assert [math.log(x) for x in found] == pytest.approx(intervals.mean([math.log(v) for v in values]), rel=0.05)
    assert estimate.of_groups([[1.0], [2.0]], lambda groups: groups[0][0])[1:] == (-math.inf, math.inf)


# ---- the reference paths of the ablations


def trained(trick: str) -> torch.Tensor:
    """All parameters after two steps on one batch, the model's and the optimizer's code as in a training."""
    with paths.without(trick) as flags:
        config = base_train.model_config(2, 64, 256, 16, 16, flags.get("window_pattern", "SSL"))
        torch.manual_seed(0)
        model = GPT(config)
        model.init_weights()
        optimizer = model.setup_optimizer(weight_decay=flags.get("weight_decay", 0.5))
        ids = torch.randint(64, (1, 257))
        for _ in range(3):
            model(ids[:, :-1], ids[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return torch.cat([p.detach().flatten() for p in model.transformer["h"].parameters()])


def test_every_trick_can_be_taken_off_and_is_back_afterwards():
    whole = trained(paths.WHOLE)
    for trick in paths.TRICKS:
        without = trained(trick)
        assert without.shape != whole.shape or not torch.equal(without, whole), trick
        assert without.isfinite().all(), trick
    assert torch.equal(trained(paths.WHOLE), whole)


def test_paths_of_the_optimizer():
    torch.manual_seed(0)
    p, x = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)
    moved = p.clone()
    paths.without_variance_(moved, x, torch.zeros(2, 1, 6), 0.1, 0.0, 0.9)
    assert torch.allclose((p - moved).norm(dim=(1, 2)), torch.full((2,), 0.1 * 2.0, dtype=torch.float64))
    decayed = p.clone()
    paths.decay_all_(decayed, torch.zeros_like(x), torch.ones(2, 1, 6, dtype=torch.float64), 0.1, 0.5, 0.9)
    assert torch.allclose(decayed, p * 0.95)
    buffer = torch.zeros_like(p)
    assert torch.allclose(paths.momentum_only_(x, buffer, 0.9, torch.float64), x * 0.1 + 0.9 * 0.1 * x)
    assert torch.allclose(buffer, 0.1 * x)


def test_numbers_of_an_axis_are_plain():
    assert [plot.short(x) for x in (0.25, 6144, 262144, 1048576, 5.64e9)] == [
        "0.25",
        "6,144",
        "262,144",
        "1.05 M",
        "5.64 G",
    ]


def test_a_rate_stays_between_nothing_and_all():
    assert estimate.rate([1.0, 1.0, 0.1]) == (pytest.approx(0.7), 0.0, 1.0)


def test_a_plot_is_xml_that_follows_light_and_dark():
    for svg in (
        plot.forest("a < b", [("one", (0.1, -math.inf, 0.2)), ("two & three", (-0.1, -0.2, 0.0))]),
        plot.curves("c", "x", "y", {"d": [(1.0, 2.0, 1.5, 2.5), (10.0, 1.0, -math.inf, math.inf)]}, log_y=True),
    ):
        assert xml.fromstring(svg).tag.endswith("svg")
        assert "prefers-color-scheme:dark" in svg and "inf" not in svg and "nan" not in svg
