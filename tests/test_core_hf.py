"""Models of the Hugging Face Hub beside ours: the same scores as their own whole forward pass gives, one by one."""

import importlib.util
from pathlib import Path

import bundles
import hf_models
import pytest
import tiny
import torch
import torch.nn.functional as F
from test_core import examples_of

from nanochat.errors import UserError
from nanochat.evaluate import core, core_hf
from nanochat.evaluate.core_batches import OurModel
from nanochat.evaluate.core_prompts import Example
from nanochat.gpt import GPT, GPTConfig
from nanochat.run import Run

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed (the extra hf)"
)


@torch.no_grad()
def check(model, examples):
    asked = core_hf.HubModel(model, hf_models.Wrapped(tiny.tokenizer()))
    for example, scores in zip(examples, asked.score(iter(examples)), strict=True):
        for ids, (start, end), score in zip(example.ids, example.spans, scores, strict=True):
            logits = model(torch.tensor([ids])).logits[0, start - 1 : end - 1].float()
            wanted = torch.tensor(ids[start:end], dtype=torch.int64)
            losses = F.cross_entropy(logits, wanted, reduction="none")
            torch.testing.assert_close(torch.tensor(score.nats), losses, rtol=0, atol=5e-5)
            assert score.right == bool((logits.argmax(-1) == wanted).all())


@needs_transformers
@pytest.mark.parametrize("limit", [600, 90])
def test_scores_are_those_of_the_whole_forward_pass(tmp_path, limit):
    model = hf_models.gpt2()
    examples = [one for task in bundles.made(tmp_path / "b").tasks for one in examples_of(task, task.rows(), limit)]
    assert any(example.cropped for example in examples) == (limit == 90)
    check(model, examples)
    odd = [
        Example([[1, 2, 3], [1, 2, 3, 4]], [(3, 3), (3, 4)]),
        Example([[1, 2, 3]] * 2, [(1, 3)] * 2),
        Example([[4, 2, 2], [1, 3, 5, 6]], [(1, 3), (2, 4)]),
        Example([[1, 2]], [(1, 2)]),
    ]
    check(model, odd)


@needs_transformers
def test_nanochats_own_class_gives_our_scores(tmp_path):
    torch.manual_seed(0)
    config = GPTConfig.original(sequence_len=600, vocab_size=320, n_layer=2, n_head=4, n_kv_head=2, n_embd=64)
    ours = GPT(config)
    ours.init_weights()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    tokenizer = tiny.tokenizer(320)
    theirs = core_hf.HubModel(hf_models.nanochat(ours), hf_models.Wrapped(tokenizer))
    asked = OurModel(ours, tokenizer, 2000)
    assert theirs.encode(["the dog"]) == asked.encode(["the dog"])
    for task in bundles.made(tmp_path / "b").tasks:
        examples = examples_of(task, task.rows(), tokenizer=tokenizer)
        for one, other in zip(asked.score(iter(examples)), theirs.score(iter(examples)), strict=True):
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(torch.tensor(a.nats), torch.tensor(b.nats), rtol=0, atol=5e-5)
                assert a.right == b.right
        assert core.answer(asked, task) == core.answer(theirs, task)


def test_two_folders_of_one_name_are_two_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("x/model", "y/model"):
        Path(path).mkdir(parents=True)
    assert core_hf.label("x/model") == core_hf.label(f"{tmp_path}/x/model/") != core_hf.label("y/model")
    assert core_hf.label("x/model").startswith("model-") and core_hf.label("org/model") == "org/model"


@needs_transformers
def test_the_script_asks_a_folder(tmp_path, monkeypatch, capsys):
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "home"))
    words = {word: i for i, word in enumerate(["[UNK]", "<end>", *sorted({*" ".join(tiny.sentences(50)).split()})])}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>").save_pretrained(tmp_path / "model")
    hf_models.gpt2(len(words) + 9).save_pretrained(tmp_path / "model")
    folder = bundles.write(tmp_path / "b")
    assert tiny.call("base_eval", f"--hf={tmp_path / 'model'}", f"--bundle={folder}") == 0
    said = capsys.readouterr().out
    assert "partial CORE" in said and str(tmp_path / "model") in said and "Not kept: there is no run 'speedrun'" in said
    assert not (tmp_path / "home").exists() or not list((tmp_path / "home").rglob("*"))

    run = Run.open("a")
    run.stage("base").mkdir(parents=True)
    assert tiny.call("base_eval", "--run=a", f"--hf={tmp_path / 'model'}", f"--bundle={folder}") == 0
    assert "Not kept" not in capsys.readouterr().out
    (label, kept), *_ = run.summary("eval")["core_hf"].items()
    assert label == core_hf.label(str(tmp_path / "model"))
    file = run.stage("eval") / f"hf_{label}_core.csv"
    assert kept["partial"] and kept["bundle"] and file.read_text().startswith("Task,")
    assert tiny.call("report", "--run=a") == 0
    assert f"CORE, {label} (Hugging Face)](" in (run.folder / "report.md").read_text()

    assert tiny.call("base_eval", f"--hf={tmp_path / 'model'}", "--eval=bpb") == 2
    assert "--hf is about CORE, which --eval bpb leaves out" in capsys.readouterr().err
    assert tiny.call("base_eval", f"--hf={tmp_path / 'none'}", f"--bundle={folder}") == 2
    assert "could not be loaded" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("transformers") is not None, reason="transformers is installed")
def test_without_transformers_it_says_what_to_install():
    with pytest.raises(UserError, match=r"--hf needs the package transformers \(.*pip install"):
        core_hf.load("gpt2", torch.device("cpu"), torch.float32)
