"""Optional packages: something else that has the name, and Weights & Biases that cannot be used or gives up."""

import sys
import types

import pytest
from test_training import home, train  # noqa: F401 (home is a fixture)

from nanochat import optional
from nanochat.data import hub
from nanochat.errors import UserError


@pytest.mark.parametrize("name, needed", [("wandb", "init"), ("datasets", "load_dataset"), ("nothing_like_it", "x")])
def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch, name, needed):
    if name != "nothing_like_it":
        (tmp_path / name).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # where the package itself is not installed
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=f"something else, at {tmp_path}/{name}|No module named"):
        optional.package(name, needed)
    monkeypatch.delitem(sys.modules, name, raising=False)


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
