"""Ways in and out without transformers: what goes out comes back to the bit, and foreign files are one sentence."""

import json
import os
import pickle
import shutil
from pathlib import Path

import exchanged
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from nanochat import checkpoint
from nanochat.data.documents import Documents
from nanochat.exchange import hf_tokenizer, parquet
from nanochat.run import Run


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    return tmp_path


def weights(name: str, stage: str = "sft") -> dict:
    return Run.open(name).checkpoint(stage).tensors("model")


ARCHITECTURES = [exchanged.original(), exchanged.current(), exchanged.current(n_kv_head=4, n_layer=3, smear=False)]


@pytest.mark.parametrize("config", ARCHITECTURES, ids=["original", "current", "without smear"])
def test_out_as_transformers_has_it_and_back(base, config):
    _, gpt = exchanged.run("a", config)
    assert tiny.call("export", "--run=a", f"--out={base / 'out'}") == 0
    said = json.loads((base / "out" / "config.json").read_text())
    assert said["vocab_size"] == exchanged.VOCAB  # the rows that pad ours are cut
    assert tiny.call("import_model", str(base / "out"), "--run=b") == 0
    came = Run.open("b").checkpoint("sft").model("cpu", torch.float32).eval()
    ids = torch.randint(exchanged.VOCAB, (2, 40))
    assert torch.equal(came(ids), gpt(ids))
    assert Run.open("b").tokenizer().fingerprint == Run.open("a").tokenizer().fingerprint


def test_bfloat16_rounds_all_but_the_scalars(base):
    exchanged.run("a", exchanged.current())
    assert tiny.call("export", "--run=a", f"--out={base / 'out'}", "--dtype=bfloat16") == 0
    kinds = {name: tensor.dtype for name, tensor in load_file(base / "out" / "model.safetensors").items()}
    assert {kind for name, kind in kinds.items() if "lambda" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "lambda" not in name} == {torch.bfloat16}


@pytest.mark.parametrize("config, stage", [*zip(ARCHITECTURES, ["sft", "base"])], ids=["original", "current"])
def test_out_as_nanochat_has_it_and_back(base, config, stage):
    exchanged.run("a", config, stage, moments=True)
    assert tiny.call("export", "--run=a", "--to=upstream", f"--out={base / 'out'}") == 0
    (place,) = (base / "out").glob("*_checkpoints/d2")
    assert tiny.call("import_model", str(place), "--run=b") == 0
    made, came = Run.open("a").checkpoint(stage), Run.open("b").checkpoint(stage)
    padded = exchanged.VOCAB  # their October tables have no padding rows, so ours come back as zeros
    cut = lambda tensors: {name: t[:padded] if t.size(0) > padded else t for name, t in tensors.items()}
    exchanged.same(cut(made.tensors("model")), cut(came.tensors("model")))
    assert came.meta["settings"] == made.meta["settings"]
    if config == ARCHITECTURES[1]:
        exchanged.same(made.tensors("optimizer"), came.tensors("optimizer"))
        assert came.meta["rates"] == pytest.approx(exchanged.RATES)


def october(folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """A checkpoint in the form of October 2025 with moments of both its optimizers; returns the moments of Muon."""
    _, gpt = exchanged.run("made", exchanged.original())
    assert tiny.call("export", "--run=made", "--to=upstream", f"--out={folder}") == 0
    (path,) = folder.rglob("model_*.pt")
    torch.save({prefix + name: tensor for name, tensor in torch.load(path).items()}, path)
    meta = path.with_name("meta_000003.json")
    said = json.loads(meta.read_text())
    said.update(user_config={}, val_bpb=0.9)
    meta.write_text(json.dumps({key: value for key, value in said.items() if key != "total_batch_size"}))
    tables = (exchanged.VOCAB, 64)
    adamw = {i: dict(step=torch.tensor(7.0), exp_avg=torch.rand(tables), exp_avg_sq=torch.rand(tables)) for i in (0, 1)}
    matrices = {name: p for name, p in gpt.named_parameters() if name.startswith("transformer.h")}
    buffers = {name: torch.rand_like(p) for name, p in matrices.items()}
    sizes = sorted({p.numel() for p in matrices.values()}, reverse=True)
    order = [[name for name, p in matrices.items() if p.numel() == size] for size in sizes]
    numbers = iter(range(len(matrices)))
    groups = [dict(params=[next(numbers) for _ in names]) for names in order]
    flat = [name for names in order for name in names]
    muon = {i: dict(momentum_buffer=buffers[name]) for i, name in enumerate(flat)}
    first = dict(state=adamw, param_groups=[dict(params=[0]), dict(params=[1])])
    torch.save([first, dict(state=muon, param_groups=groups)], path.with_name("optim_000003.pt"))
    return buffers


def test_october_2025_comes_in_with_its_moments_and_trains_on(base, capsys):
    buffers = october(base / "out", "_orig_mod.")
    assert tiny.call("import_model", str(base / "out" / "chatsft_checkpoints" / "d2"), "--run=b", "--stage=base") == 0
    said = capsys.readouterr().out
    assert "October 2025" in said and "moments" in said and "bfloat16" in said
    came = Run.open("b").checkpoint("base")
    assert came.config == exchanged.original() and came.meta["rates"]["embedding_lr"] == 0.2
    gpt = came.model("cpu", torch.float32)
    optimizer = gpt.setup_optimizer(**came.meta["rates"])
    optimizer.load_full_state(came.tensors("optimizer"))
    for group in optimizer.param_groups[2:]:
        kept = optimizer.state[group["params"][0]]["momentum_buffer"]
        names = {id(p): name for name, p in gpt.named_parameters()}
        for param, own in zip(group["params"], kept):
            assert torch.equal(own, buffers[names[id(param)]])
    ids = torch.randint(exchanged.VOCAB, (2, 17))
    before = gpt(ids[:, :-1], ids[:, 1:])
    before.backward()
    optimizer.step()
    assert optimizer.finish_step() and gpt(ids[:, :-1], ids[:, 1:]) != before


@pytest.mark.slow
def test_a_stage_follows_on_an_import_without_moments(base):
    exchanged.run("a", exchanged.current(), "base")
    assert tiny.call("export", "--run=a", f"--out={base / 'out'}") == 0
    assert tiny.call("import_model", str(base / "out"), "--run=b") == 0
    flags = "--run=b --num-iterations=2 --compile=no --eval-every=-1 --eval-tokens=64 --total-batch-size=128".split()
    assert tiny.call("chat_sft", *flags, "--device-batch-size=2") == 0
    assert tiny.call("chat_cli", "--run=b", "-p", "Hello!", "-m=4") == 0
    assert tiny.call("report", "--run=b") == 0
    assert "NanochatKernelsForCausalLM" in Run.open("b").folder.joinpath("report.md").read_text()


def test_text_goes_out_as_parquet_of_which_the_last_file_validates(base, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS", 8)
    monkeypatch.setattr(parquet, "CHARACTERS", 1000)
    texts = tiny.sentences(100)
    (base / "text.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    flags = ["--to=parquet", f"--data={base / 'text.jsonl'}", f"--out={base / 'out'}"]
    assert tiny.call("export", *flags) == 0
    files = sorted((base / "out" / parquet.FOLDER).glob("*.parquet"))
    assert len(files) > 3 and [path.name for path in files] == [f"shard_{i:05d}.parquet" for i in range(len(files))]
    read = lambda paths: [row for path in paths for row in pq.read_table(path)["text"].to_pylist()]
    source = Documents(base / "text.jsonl")
    assert read(files[:-1]) == source.load("train", 0) and read(files[-1:]) == source.load("val", 0)
    assert pq.ParquetFile(files[0]).metadata.row_group(0).num_rows == 8
    assert Documents(files[0].parent).load("train", 0)


# ---- what must not be trusted


class Evil:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def outside(folder: Path, name: str) -> None:
    """Moves a file away and leaves a link to it."""
    away = folder.parent / f"away-{name}"
    os.rename(folder / name, away)
    (folder / name).symlink_to(away)


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def other_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(hf_tokenizer.as_json(exchanged.tokenizer(300))))


def tokenizer_json(folder: Path, change) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))


def without_a_byte(content) -> None:
    """Its token becomes "!!!!"."""
    vocab = content["model"]["vocab"]
    vocab["!!!!"] = vocab.pop("!")


def no_dimensions(path: Path) -> None:
    save_file({**load_file(path), "model.embed_tokens.weight": torch.zeros(())}, path)


def shards(folder: Path) -> None:
    """Two shards of which the second is gone."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:5]}, folder / "model-1.safetensors")
    place = {name: f"model-{1 if i < 5 else 2}.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=place)))
    (folder / "model.safetensors").unlink()


HF = {
    "no config": (lambda f: (f / "config.json").unlink(), "neither config.json nor"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "no JSON"),
    "another model": (lambda f: edit(f / "config.json", model_type="llama"), "'llama' model"),
    "another size": (lambda f: edit(f / "config.json", hidden_size=128), "width 64, and its configuration says"),
    "a million layers": (lambda f: edit(f / "config.json", num_hidden_layers=10**6), "one word a layer"),
    "a model type of a list": (lambda f: edit(f / "config.json", model_type=[]), "holds a [] model"),
    "a class that is no list": (lambda f: edit(f / "config.json", architectures=1), "model (1)"),
    "half a token of context": (lambda f: edit(f / "config.json", max_position_embeddings=1.5), "sequence_len is 1.5"),
    "a context beyond memory": (lambda f: edit(f / "config.json", max_position_embeddings=10**30), "wanted a whole"),
    "no rotary base": (lambda f: edit(f / "config.json", rope_base=0), "rope_base is 0, wanted a number above 0"),
    "a softcap of NaN": (lambda f: edit(f / "config.json", softcap=float("nan")), "softcap is nan"),
    "an embedding without dimensions": (lambda f: no_dimensions(f / "model.safetensors"), "layers of width 0"),
    "a tokenizer without a byte": (
        lambda f: tokenizer_json(f, without_a_byte), "not every byte",
    ),
    "a tokenizer that lowers letters": (
        lambda f: tokenizer_json(f, lambda c: c.update(normalizer=dict(type="Lowercase"))), "changes text before",
    ),
    "another window": (lambda f: edit(f / "config.json", sliding_window=40), "sliding_window is 40"),
    "a tokenizer that merges in another order": (
        lambda f: tokenizer_json(f, lambda c: c["model"]["merges"].reverse()), "merges in another order",
    ),
    "a tokenizer of another size": (other_tokenizer, "its tokenizer has 300 tokens, and its model 340"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "a missing shard": (shards, "model-2.safetensors is missing"),
    "half a file": (lambda f: os.truncate(f / "model.safetensors", 9000), "cannot be read"),
    "a link out": (lambda f: outside(f, "model.safetensors"), "symbolic link"),
    "a link out, of the tokenizer": (lambda f: outside(f, "tokenizer.json"), "symbolic link"),
    "an index that leads out": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}'),
        "leads out",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("NANOCHAT_BASE_DIR", str(folder))
        exchanged.run("a", exchanged.current(window_pattern="SL", n_layer=2))
        assert tiny.call("export", "--run=a", f"--out={folder / 'hf'}") == 0
        assert tiny.call("export", "--run=a", "--to=upstream", f"--out={folder / 'upstream'}") == 0
    return folder


def refused(base: Path, path: Path, words: str, capsys, *flags: str) -> None:
    capsys.readouterr()
    assert tiny.call("import_model", str(path), "--run=b", *flags) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (base / "runs" / "b").exists() and not (base / "ran").exists()


def test_a_folder_that_names_no_rotary_base_has_the_usual_one(base):
    exchanged.run("a", exchanged.original())
    assert tiny.call("export", "--run=a", f"--out={base / 'out'}") == 0
    edit(base / "out" / "config.json", rope_parameters=None)
    assert tiny.call("import_model", str(base / "out"), "--run=b") == 0
    assert Run.open("b").checkpoint("sft").config == exchanged.original()


@pytest.mark.parametrize("case", HF)
def test_damaged_folders_of_transformers(base, exported, capsys, case):
    spoil, words = HF[case]
    shutil.copytree(exported / "hf", base / "in")
    spoil(base / "in")
    refused(base, base / "in", words, capsys)


def pickled(content) -> callable:
    """Replaces the tokenizer by a pickle of something else, made of the folder."""
    return lambda f: (f / "tokenizer.pkl").write_bytes(pickle.dumps(content(f)))


def state_of(f: Path, **values):
    encoding = pickle.loads((f / "tokenizer.pkl").read_bytes())
    for name, value in values.items():
        setattr(encoding, name, value)
    return encoding


UPSTREAM = {
    "a pickle that runs code": (pickled(lambda f: Evil(f.parent / "ran")), "asks for posix.mkdir"),
    "a pickle of a list": (pickled(lambda f: [1]), "holds no tokenizer"),
    "another pattern": (pickled(lambda f: state_of(f, _pat_str=r"\S+|\s+")), "another pattern"),
    "other special tokens": (pickled(lambda f: state_of(f, _special_tokens={"<|bos|>": 331})), "other special tokens"),
    "tokens without a number": (pickled(lambda f: state_of(f, _mergeable_ranks=None)), "holds no tokenizer"),
    "tokens in a list": (pickled(lambda f: state_of(f, _mergeable_ranks=[1, 2])), "holds no tokenizer"),
    "half a pickle": (lambda f: os.truncate(f / "tokenizer.pkl", 400), "no readable pickle"),
    "weights that run code": (lambda f: torch.save(Evil(f.parent / "ran"), f / "model_000003.pt"), "nothing was run"),
    "moments that run code": (lambda f: torch.save(Evil(f.parent / "ran"), f / "optim_000003_rank0.pt"), "not read"),
    "weights of a list": (lambda f: torch.save([1], f / "model_000003.pt"), "no tensors by name"),
    "weights without values": (
        lambda f: torch.save({"a": torch.zeros(1, device="meta")}, f / "model_000003.pt"), "no tensors by name"
    ),
    "half the weights": (lambda f: os.truncate(f / "model_000003.pt", 5000), "nothing was run"),
    "no metadata": (lambda f: (f / "meta_000003.json").unlink(), "meta_000003.json is missing"),
    "a million layers": (
        lambda f: edit(f / "meta_000003.json", model_config=dict(exchanged.SIZES, n_layer=10**6)), "2 layers of width"
    ),
    "a context beyond memory": (
        lambda f: edit(f / "meta_000003.json", model_config=dict(exchanged.SIZES, sequence_len=10**30)), "whole number"
    ),
    "no sizes": (lambda f: edit(f / "meta_000003.json", model_config={}), "no model_config"),
    "no tokenizer": (lambda f: (f / "tokenizer.pkl").unlink(), "there is no tokenizer.pkl"),
    "a link out": (lambda f: outside(f, "tokenizer.pkl"), "symbolic link"),
    "a link out, of the weights": (lambda f: outside(f, "model_000003.pt"), "symbolic link"),
    "code in between": (
        lambda f: torch.save({k: v for k, v in torch.load(f / "model_000003.pt").items() if "smear" not in k},
                             f / "model_000003.pt"), "code in between",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UPSTREAM)
def test_damaged_and_hostile_folders_of_nanochat(base, exported, capsys, case):
    spoil, words = UPSTREAM[case]
    shutil.copytree(exported / "upstream" / "chatsft_checkpoints" / "d2", base / "in")
    shutil.copy(exported / "upstream" / "tokenizer" / "tokenizer.pkl", base / "in")
    spoil(base / "in")
    refused(base, base / "in", words, capsys)


def test_a_run_that_has_the_stage_is_left_as_it_is(base, exported, capsys):
    assert tiny.call("import_model", str(exported / "hf"), "--run=b") == 0
    before = weights("b")
    assert tiny.call("import_model", str(exported / "hf"), "--run=b") == 2
    assert "has a sft model already" in capsys.readouterr().err
    exchanged.same(before, weights("b"))
    assert tiny.call("import_model", str(exported / "hf"), "--run=b", "--stage=base") == 0
    assert tiny.call("import_model", str(exported / "hf"), "--run=c", "--stage=rl9") == 2
    assert tiny.call("import_model", str(exported), "--run=c") == 2 and tiny.call("import_model", "--run=c") == 2


def test_flags_that_would_do_nothing_are_refused(base, exported, capsys):
    exchanged.run("a", exchanged.current())
    for argv, said in (
        (["import_model", str(exported / "hf"), "--run=b", "--step=3"], "are for folders of nanochat's"),
        (["export", "--run=a", "--to=upstream", "--dtype=bfloat16"], "--dtype goes with --to hf only"),
        (["export", "--run=a", "--max-chars=9"], "--max-chars goes with --to parquet only"),
    ):
        assert tiny.call(*argv, *([f"--out={base / 'out'}"] if argv[0] == "export" else [])) == 2
        assert said in capsys.readouterr().err
    assert not (base / "out").exists() and not (base / "runs" / "b").exists()


def test_what_fails_while_writing_leaves_nothing(base, exported, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "somewhere")

    exchanged.run("a", exchanged.current())
    monkeypatch.setattr(checkpoint, "write_tensors", full)
    assert tiny.call("export", "--run=a", f"--out={base / 'out'}") == 2
    assert tiny.call("import_model", str(exported / "hf"), "--run=b") == 2
    (base / "runs" / "a" / "mid").mkdir()
    (base / "runs" / "a" / "mid" / "log.jsonl").touch()
    for stage in ("mid", "base"):
        assert tiny.call("import_model", str(exported / "hf"), "--run=a", f"--stage={stage}") == 2
    assert sorted(path.name for path in (base / "runs" / "a").iterdir()) == ["mid", "sft", "tokenizer"]
    assert (base / "runs" / "a" / "mid" / "log.jsonl").exists()
    assert not [path for path in base.iterdir() if "out" in path.name]
    assert [path.name for path in (base / "runs").iterdir()] == ["a"]
    (base / "taken").mkdir()
    (base / "taken" / "file").touch()
    capsys.readouterr()
    assert tiny.call("export", "--run=a", f"--out={base / 'taken'}") == 2
    assert "exists already" in capsys.readouterr().err


def test_nanochat_has_no_code_for_some_architectures(base, capsys):
    exchanged.run("a", exchanged.current(smear=False))
    assert tiny.call("export", "--run=a", "--to=upstream", f"--out={base / 'out'}") == 2
    assert "no code for this architecture" in capsys.readouterr().err
