"""nanochat's own code, fetched and in a process of its own: what it saves is evaluated, trained on and chatted with
here, and what we export answers in its chat_cli. Both generations.

Slow, and only where NANOCHAT_UPSTREAM names a clone of karpathy/nanochat with its history. October's code imports
`tokenizers`, which comes with the extra hf.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import exchanged
import pytest
import tiny
import torch

from nanochat.data.documents import Documents
from nanochat.exchange import layout
from nanochat.gpt import GPT
from nanochat.run import Run

UPSTREAM = os.environ.get("NANOCHAT_UPSTREAM", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not UPSTREAM, reason="NANOCHAT_UPSTREAM names no clone of karpathy/nanochat"),
    pytest.mark.skipif(not find_spec("tokenizers"), reason="tokenizers is not installed (the extra hf)"),
]
CODE = {"October 2025": "dfc8833", "today": "92d63d4"}  # their last commits
SIZES = dict(sequence_len=128, vocab_size=exchanged.VOCAB, n_layer=3, n_head=4, n_kv_head=2, n_embd=64)
MAKE = {"October 2025": exchanged.original, "today": exchanged.current}

EAGER = """
import json, os, sys, torch
torch.compile = lambda function=None, **settings: function or (lambda other: other)
"""
TRAIN = """
from nanochat.checkpoint_manager import save_checkpoint
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer
said = json.loads(sys.argv[1])
base = os.environ["NANOCHAT_BASE_DIR"]
tokenizer = RustBPETokenizer.train_from_iterator(iter(said["texts"]), said["sizes"]["vocab_size"])
tokenizer.save(f"{base}/tokenizer")
torch.manual_seed(0)
model = GPT(GPTConfig(**said["sizes"]))
model.init_weights()
made = model.setup_optimizer() if hasattr(model, "setup_optimizer") else model.setup_optimizers()
optimizers = made if isinstance(made, list) else [made]
ids = torch.tensor([[tokenizer.get_bos_token_id(), *tokenizer.encode(text)][:17] for text in said["texts"]])
def step():
    loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return loss.item()
losses = [step() for _ in range(12)]
meta = dict(step=12, val_bpb=losses[-1], model_config=said["sizes"], user_config=said["user_config"],
            device_batch_size=2, max_seq_len=128, total_batch_size=256)
states = [optimizer.state_dict() for optimizer in optimizers]
weights = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
save_checkpoint(f"{base}/base_checkpoints/d3", 12, weights, states if isinstance(made, list) else states[0], meta)
with torch.no_grad():
    logits = model(ids[:, :-1]).float()
step()
torch.save(dict(ids=ids, logits=logits, after=model.state_dict(), losses=losses), f"{base}/seen.pt")
"""
GO_ON = """
from nanochat.checkpoint_manager import load_model, load_optimizer_state
model, tokenizer, meta = load_model("base", torch.device("cpu"), "train")
optimizer = model.setup_optimizer()
optimizer.load_state_dict(load_optimizer_state("base", torch.device("cpu"), 0))
ids = torch.load(os.environ["NANOCHAT_BASE_DIR"] + "/ids.pt")
model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).backward()
optimizer.step()
torch.save(model.state_dict(), os.environ["NANOCHAT_BASE_DIR"] + "/after.pt")
"""
READ = """
import json
from nanochat.dataset import parquets_iter_batched
texts = lambda split: [text for rows in parquets_iter_batched(split) for text in rows]
print(json.dumps({split: texts(split) for split in ("train", "val")}))
"""


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "ours"))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    return tmp_path


@pytest.fixture(scope="module")
def clones(tmp_path_factory) -> dict[str, Path]:
    """Their files by generation."""
    found = {}
    for name, commit in CODE.items():
        found[name] = tmp_path_factory.mktemp(commit)
        packed = subprocess.run(["git", "-C", UPSTREAM, "archive", commit], capture_output=True)
        if packed.returncode:
            pytest.skip(f"{UPSTREAM} has no commit {commit}: it is no clone with history")
        subprocess.run(["tar", "x", "-C", str(found[name])], input=packed.stdout, check=True)
    return found


def theirs(clone: Path, base: Path, *words: str) -> str:
    """What a process of theirs prints."""
    where = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"}
    where.pop("PYTHONPATH", None)
    made = subprocess.run([sys.executable, *words], cwd=clone, env=where, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-3000:]
    return made.stdout


@pytest.mark.parametrize("code", CODE)
def test_what_they_save_goes_on_here(base, clones, code, capsys):
    away = base / "theirs"
    away.mkdir()
    sizes = dict(SIZES, **(dict(window_pattern="SL") if code == "today" else {}))
    texts = [f"{text} {text}" for text in tiny.sentences(200) if len(text) > 60]
    theirs(
        clones[code],
        away,
        "-c",
        EAGER + TRAIN,
        json.dumps(dict(sizes=sizes, texts=texts, user_config=dict(matrix_lr=0.02))),
    )
    place = away / "base_checkpoints" / "d3"
    assert tiny.call("import_model", str(place), "--run=a") == 0
    said = capsys.readouterr().out
    assert code.replace("today", "2026") in said and "carried over too: the optimizer's moments" in said
    seen = torch.load(away / "seen.pt")
    assert seen["losses"][-1] < seen["losses"][0]
    found = Run.open("a").checkpoint("base")
    gpt = found.model("cpu", torch.float32).eval()
    assert gpt.config == MAKE[code](**sizes)
    if code != "today":  # their tables are in bfloat16
        near = gpt(seen["ids"][:, :-1])
        assert (near - seen["logits"]).abs().max() < 0.1
        gpt.cos, gpt.sin = gpt.cos.bfloat16().float(), gpt.sin.bfloat16().float()
    with torch.no_grad():
        assert (gpt(seen["ids"][:, :-1]) - seen["logits"]).abs().max() < 1e-4
    words = Run.open("a").tokenizer()
    assert [words.bos, *words.encode(texts[0])][:17] == seen["ids"][0].tolist()
    if code == "today":  # the same step as theirs after the same moments
        gpt.train()
        optimizer = gpt.setup_optimizer()
        optimizer.load_full_state(found.tensors("optimizer"))
        one_step(gpt, optimizer, seen["ids"])
        for name, tensor in seen["after"].items():
            torch.testing.assert_close(gpt.state_dict()[name], tensor, rtol=0, atol=1e-5)
    assert tiny.call("base_eval", "--run=a", "--eval=bpb,sample", "--split-tokens=4096", "--device-batch-size=4") == 0
    flags = "--num-iterations=3 --compile=no --eval-every=-1 --eval-tokens=256".split()
    assert tiny.call("mid_train", "--run=a", *flags) == 0
    assert tiny.call("chat_sft", "--run=a", *flags) == 0
    assert tiny.call("chat_eval", "--run=a", "-a=facts_taught", "--max-problems=4") == 0
    assert tiny.call("chat_cli", "--run=a", "-p", "Hello!", "-m=8") == 0
    assert tiny.call("report", "--run=a") == 0
    assert "Imported from a checkpoint of nanochat" in (Run.open("a").folder / "report.md").read_text()


def one_step(gpt: GPT, optimizer, ids: torch.Tensor) -> None:
    gpt(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).backward()
    optimizer.step()


def test_their_training_goes_on_with_our_moments(base, clones):
    run, gpt = exchanged.run("a", exchanged.current(), "base", moments=True)
    out = base / "out"
    assert tiny.call("export", "--run=a", "--to=upstream", f"--out={out}") == 0
    ids = torch.randint(exchanged.VOCAB, (2, 17))
    torch.save(ids, out / "ids.pt")
    theirs(clones["today"], out, "-c", EAGER + GO_ON)
    found = run.checkpoint("base")
    gpt = found.model("cpu", torch.float32)
    # loading sets their learning rates to those that were saved
    optimizer = gpt.setup_optimizer(**exchanged.RATES)
    optimizer.load_full_state(found.tensors("optimizer"))
    one_step(gpt, optimizer, ids)
    for name, tensor in torch.load(out / "after.pt").items():
        near = 2e-3 if layout.is_scalar(name) else 1e-5  # their learning rates are up to 0.5, and AdamW divides
        torch.testing.assert_close(gpt.state_dict()[name], tensor, rtol=0, atol=near)


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("stage", ["sft", "mid"])
def test_their_chat_answers_with_our_model(base, clones, code, stage):
    answer = "the dog sees the old river and likes it."
    exchanged.taught("a", MAKE[code](), stage, "the cat?", answer)
    out = base / "out"
    assert tiny.call("export", "--run=a", "--to=upstream", f"--out={out}") == 0
    source = stage if code != "today" else "sft"
    said = theirs(
        clones[code], out, "-m", "scripts.chat_cli", f"-i={source}", "-p", "the cat?", "-t=0", "--device-type=cpu"
    )
    assert answer in said


def test_they_read_our_parquet(base, clones):
    texts = tiny.sentences(300)
    (base / "text.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    out = base / "out"
    assert tiny.call("export", "--to=parquet", f"--data={base / 'text.jsonl'}", f"--out={out}") == 0
    read = json.loads(theirs(clones["today"], out, "-c", READ).strip().splitlines()[-1])
    source = Documents(base / "text.jsonl")
    for split in ("train", "val"):
        assert read[split] == [text for unit in range(source.units(split)) for text in source.load(split, unit)]
