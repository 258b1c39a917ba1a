"""Optional packages: something else that has the name, and Weights & Biases that cannot be used or gives up."""

import os
import subprocess
import sys
import types

import pytest
import torch
from test_training import ROOT, home, train  # noqa: F401 (home is a fixture)

from nanochat import optional, progress
from nanochat.data import hub, parquet
from nanochat.errors import UserError
from nanochat.evaluate import core_hf


@pytest.mark.parametrize("name, needed", [("wandb", "init"), ("datasets", "load_dataset"), ("nothing_like_it", "x")])
def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch, name, needed):
    if name != "nothing_like_it":
        (tmp_path / name).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # where the package itself is not installed
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=f"something else, at {tmp_path}/{name}|No module named"):
        optional.package(name, needed)
    monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("said", ["numpy.dtype size changed", "module 'x' has no attribute 'y'\nat all"])
def test_one_that_cannot_be_imported_is_as_good_as_missing(tmp_path, monkeypatch, said):
    for name in ("rich", "pyarrow", "transformers", "datasets"):
        (tmp_path / f"{name}.py").write_text(f"raise AttributeError({said!r})")
        for module in [other for other in sys.modules if other.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert progress.live_bar() is None
    message = f"AttributeError: {said.split()[0]}"
    with pytest.raises(UserError, match=f"{message}.*pip install pyarrow"):
        parquet.pyarrow_module()
    with pytest.raises(UserError, match=f"{message}.*pip install transformers"):
        core_hf.load("gpt2", torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match=f"{message}.*pip install datasets"):
        hub.dataset("a/b", None, "train")


@pytest.mark.parametrize(
    "broken", ["raise ValueError('numpy.dtype size changed')", "raise ModuleNotFoundError('no x')"]
)
def test_a_server_that_cannot_be_imported_is_one_sentence(tmp_path, broken):
    (tmp_path / "fastapi.py").write_text(broken)
    where = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    made = subprocess.run(
        [sys.executable, "-m", "scripts.chat_web"], env=where, cwd=tmp_path, capture_output=True, text=True
    )
    assert made.returncode == 2 and made.stderr.count("\n") == 1 and "pip install -U fastapi" in made.stderr, (
        made.stderr
    )


def test_who_asks_for_it_says_so_in_one_sentence(home, monkeypatch, capsys):  # noqa: F811
    for name in ("wandb", "datasets"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    assert train(home, "a", "base", "--wandb") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "something else" in said and "pip install wandb" in said
    with pytest.raises(UserError, match="something else.*pip install datasets"):
        hub.dataset("a/b", None, "train")


def test_weights_and_biases_that_refuses_is_one_sentence(home, monkeypatch, capsys):  # noqa: F811
    def init(**given):
        raise RuntimeError("api_key not configured (no-tty).\ncall wandb.login(key=[your_api_key])")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    assert train(home, "a", "base", "--wandb") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --wandb: ") and said.count("\n") == 1 and "api_key not configured" in said


def test_that_its_service_ends_does_not_end_a_training(home, monkeypatch, capsys):  # noqa: F811
    rows = []

    def log(row, step):
        if step > 3:
            raise ConnectionResetError(104, "Connection reset by peer")
        rows.append(step)

    monkeypatch.setitem(
        sys.modules, "wandb", types.SimpleNamespace(init=lambda **given: types.SimpleNamespace(log=log))
    )
    assert train(home, "a", "base", "--wandb") == 0
    assert rows == [1, 2, 3] and capsys.readouterr().err.count("Weights & Biases gets no more rows") == 1
