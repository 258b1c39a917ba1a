"""The laboratory: every experiment's smoke run; resuming, refusing, claims; estimates against known answers."""

import json
import math
import random
import subprocess
import xml.etree.ElementTree as xml
from dataclasses import replace

import pytest
import torch
from tiny import call

from experiments.ablations import paths
from experiments.batch_size.declaration import critical, steps_to
from nanochat.errors import UserError
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
    monkeypatch.setattr("gc.collect", lambda: 0)  # once a training, of all that other tests have left: seconds
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


def test_a_power_law_is_found_again_and_its_bootstrap_covers_it():
    law = estimate.PowerLaw(1.1, 40.0, 0.3)
    x = [1e3, 3e3, 1e4, 3e4, 1e5]
    found = estimate.power_law(x, [law(v) for v in x])
    assert (found.floor, found.exponent) == pytest.approx((1.1, 0.3), rel=0.1)
    assert found(1e6) == pytest.approx(law(1e6), rel=0.01)
    dice = random.Random(0)
    groups = [[law(v) * (1 + dice.gauss(0, 0.005)) for _ in range(5)] for v in x]
    fit = lambda drawn: estimate.power_law(x, [sum(g) / len(g) for g in drawn], floor=1.1)(1e6)
    value, low, high = estimate.bootstrap(groups, fit)
    assert low < law(1e6) < high and low < value < high and estimate.bootstrap(groups, fit) == (value, low, high)


def test_the_critical_batch_is_found_again():
    points = [(b, 50 * (1 + 1000 / b)) for b in (128, 512, 2048, 8192)]
    assert critical(points) == pytest.approx((50, 1000), rel=0.05)
    assert steps_to([4, 3, 2, 1], 2.5, 2) == 3 and steps_to([4, 3], 1.0, 1) == -1


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


def test_a_plot_is_xml_that_follows_light_and_dark():
    for svg in (
        plot.forest("a < b", [("one", (0.1, -math.inf, 0.2)), ("two & three", (-0.1, -0.2, 0.0))]),
        plot.curves("c", "x", "y", {"d": [(1.0, 2.0, 1.5, 2.5), (10.0, 1.0, -math.inf, math.inf)]}, log_y=True),
    ):
        assert xml.fromstring(svg).tag.endswith("svg")
        assert "prefers-color-scheme:dark" in svg and "inf" not in svg and "nan" not in svg
