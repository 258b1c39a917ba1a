"""What scripts.export writes, in stock transformers on a CPU: logits, cached greedy answers, ids and masks are ours.

NANOCHAT_DTYPE does not matter here: all is float32. The grids are slow; a small case of each runs by default.
"""

import importlib.util
import random
from pathlib import Path

import exchanged
import hypothesis
import pytest
import tiny
import torch
from hypothesis import strategies

from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed (the extra hf)"
)
CLOSE = 1e-4  # logits; two that are no farther apart may come in either order


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path


def out(base: Path, name: str, dtype: str = "float32") -> Path:
    folder = base / f"{name}-{dtype}"
    assert tiny.call("export", f"--run={name}", f"--out={folder}", f"--dtype={dtype}") == 0
    return folder


def loaded(folder: Path, **more):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **more).eval()


def words(folder: Path, **more):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True, **more)


def double(gpt: GPT) -> GPT:
    """The same in float64: the reference."""
    made = GPT(gpt.config)
    made.load_state_dict(gpt.state_dict())
    made.double()
    made.set_dtype(torch.float64)
    return made.eval()


@torch.no_grad()
def same_logits(gpt: GPT, theirs, length: int) -> None:
    ids = torch.randint(gpt.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    exact, ours, found = double(gpt).hidden(ids), gpt(ids), theirs(ids).logits
    head = double(gpt).lm_head(exact)[..., : gpt.config.vocab_size]
    exact = gpt.config.softcap * torch.tanh(head / gpt.config.softcap)  # `logits` makes float32
    assert found.shape == ours.shape
    assert (found - ours).abs().max() < CLOSE
    assert (found - exact).abs().max() <= 2 * (ours - exact).abs().max() + 1e-7


@torch.no_grad()
def same_greedy(gpt: GPT, theirs, prompt: list[int], count: int) -> None:
    """Its cached answer is ours, but where two logits are within CLOSE of each other."""
    row = torch.tensor([prompt])
    answer = theirs.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=count, do_sample=False, **NO_STOP)
    tokens = answer[0].tolist()
    assert len(tokens) == len(prompt) + count
    logits = gpt(answer[:, :-1])[0, len(prompt) - 1 :]
    for at, (token, row) in enumerate(zip(tokens[len(prompt) :], logits)):
        assert row.max() - row[token] < CLOSE, f"token {at}"


NO_STOP = dict(eos_token_id=[], temperature=None, top_k=None)


@pytest.mark.parametrize("make", [exchanged.original, exchanged.current], ids=["original", "now"])
def test_logits_and_greedy_answers(base, make):
    config = make(sequence_len=512)  # windows of 128
    _, gpt = exchanged.run("a", config)
    theirs = loaded(out(base, "a"))
    assert type(theirs).__name__ == ("NanoChat" if config.qk_scale == 1 else "NanochatKernels") + "ForCausalLM"
    same_logits(gpt, theirs, 200)
    same_greedy(gpt, theirs, list(range(120)), 24)


GRID = [
    make(**sizes)
    for make in (exchanged.original, exchanged.current)
    for sizes in (
        dict(sequence_len=640, n_layer=1, n_head=2, n_kv_head=2, n_embd=64),
        dict(sequence_len=640, n_layer=3, n_head=4, n_kv_head=1, n_embd=128),
        dict(sequence_len=640, n_layer=5, n_head=6, n_kv_head=3, n_embd=192),
    )
]
GRID += [
    exchanged.current(sequence_len=640, n_layer=4, window_pattern="SSSL"),
    exchanged.current(smear=False),
    exchanged.current(value_embeds=False, backout=False),
    exchanged.current(residual_mix=False, window_pattern="L"),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["untrained", "random", "trained"])
@pytest.mark.parametrize("config", GRID, ids=str)
def test_grid_of_architectures(base, config, kind):
    run, gpt = exchanged.run("a", config, kind=kind)
    theirs = loaded(out(base, "a"))
    length = config.sequence_len
    same_logits(gpt, theirs, min(400, length))
    same_greedy(gpt, theirs, list(range(30)), 200 if length > 240 else length - 30)


@pytest.mark.slow
@pytest.mark.parametrize("config", [exchanged.original(), exchanged.current(sequence_len=512)], ids=["original", "now"])
def test_batches_with_padding_beams_and_one_forward_pass_in_chunks(base, config):
    _, gpt = exchanged.run("a", config)
    folder = out(base, "a")
    theirs, tokenizer = loaded(folder), words(folder, padding_side="left")
    texts = ["The dog and the", "The old house is near the river and the cat"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    answers = theirs.generate(**batch, max_new_tokens=12, do_sample=False, **NO_STOP)[:, -12:].tolist()
    assert answers == [list(gpt.generate(tokenizer.encode(text), 12, temperature=0)) for text in texts]
    beams = dict(max_new_tokens=12, num_beams=3, do_sample=False, **NO_STOP)
    assert torch.equal(theirs.generate(**batch, **beams), theirs.generate(**batch, **beams, use_cache=False))
    ids = torch.randint(exchanged.VOCAB, (1, 60))
    with torch.no_grad():
        first = theirs(ids[:, :40], use_cache=True)
        name = "cache" if "cache" in first else "past_key_values"
        rest = theirs(ids[:, 40:], **{name: first[name]}).logits
        torch.testing.assert_close(rest, theirs(ids).logits[:, 40:], rtol=0, atol=CLOSE)
        loss, ours = theirs(ids, labels=ids).loss, gpt(ids[:, :-1], ids[:, 1:])
        torch.testing.assert_close(loss, ours, rtol=0, atol=CLOSE)


@pytest.mark.slow
def test_bfloat16_is_near(base):
    run, gpt = exchanged.run("a", exchanged.current(sequence_len=512))
    theirs = loaded(out(base, "a", "bfloat16"), dtype="auto")
    assert theirs.dtype == torch.bfloat16 and theirs.model.scalars.resid_lambdas.dtype == torch.float32
    ours = run.checkpoint("sft").model("cpu", torch.bfloat16).eval()
    ids = torch.randint(exchanged.VOCAB, (1, 50))
    with torch.no_grad():
        exact, near = gpt(ids), ours(ids)
        assert (theirs(ids).logits - exact).abs().mean() < 2 * (near - exact).abs().mean()


def test_without_trust_nothing_of_the_folder_runs(base):
    import transformers

    exchanged.run("a", exchanged.current())
    folder = out(base, "a")
    (folder / "modeling_nanochat_kernels.py").write_text("raise SystemExit(3)")
    with pytest.raises((ValueError, OSError)):
        transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_stop_tokens_and_special_tokens(base):
    for stage, stops in (("base", [331]), ("sft", [335, 331])):
        exchanged.run(stage, exchanged.original(), stage)
        folder = out(base, stage)
        theirs, tokenizer = loaded(folder), words(folder)
        assert theirs.generation_config.eos_token_id == stops
        assert (theirs.generation_config.bos_token_id, theirs.generation_config.pad_token_id) == (331, 331)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (331, stops[0], 331)
        assert theirs.get_input_embeddings().padding_idx is None  # or <|bos|> would never learn
        assert len(tokenizer) == theirs.config.vocab_size == exchanged.VOCAB


# ---- ids


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our tokenizer, learnt from text of many kinds, and the stock one of the exported folder."""
    from nanochat.data import choose
    from nanochat.exchange import hf_tokenizer
    from nanochat.tokenizer import Tokenizer

    text = choose.documents("embedded", 0).load("train", 0)
    more = [
        "don't WON'T I'll we've 12 345 6789 x == y;\n\n\tif (a[0] != b) { return 'é'; }  \r\n",
        "日本語 текст 🎉🎉 ſ's",
    ]
    ours = Tokenizer.train([*text, *more * 50], 1200)
    folder = tmp_path_factory.mktemp("words")
    for name, content in hf_tokenizer.files(ours, 1 << 20, "<|assistant_end|>").items():
        (folder / name).write_bytes(content)
    return ours, words(folder)


ALPHABET = " \n\t\r'abcDEst123_<|>.,!?éßſ日本🎉\u0301\u200b\u00a0\u2028xyz"


def some_text(dice: random.Random, longest: int = 60) -> str:
    """Letters, digits, spaces, unicode, any code point, what looks like special tokens."""
    parts = []
    for _ in range(dice.randrange(1, 8)):
        kind = dice.randrange(5)
        if kind == 0:
            parts.append(dice.choice(SPECIAL_TOKENS + ("<|", "|>", "<|bos", "<|endoftext|>", "<")))
        elif kind == 1:
            parts.append("".join(dice.choices(ALPHABET, k=dice.randrange(longest))))
        elif kind == 2:
            parts.append(" ".join(dice.choices(["the", "Paris", "don't", "capital", "of", "12", "9999"], k=6)))
        elif kind == 3:
            points = (dice.randrange(0x30000) for _ in range(6))
            parts.append("".join(chr(c) for c in points if not 0xD800 <= c < 0xE000 and c not in (0xFDD0, 0xFDD1)))
        else:
            parts.append(dice.choice([" ", "\n", "\n\n", "  ", "\t"]))
    return "".join(parts)


def stock_ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(strategies.text().filter(lambda text: not {"\ufdd0", "\ufdd1"} & set(text)))
def test_ids_of_any_text(both, text):
    ours, theirs = both
    assert stock_ids(theirs, text) == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text


@pytest.mark.slow
def test_ids_of_every_code_point_and_of_much_text(both):
    from nanochat.data import choose

    ours, theirs = both
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and c not in (0xFDD0, 0xFDD1)]
    lines = ["".join(points[at : at + 16]) for at in range(0, len(points), 16)]
    lines += [f"a{c}b 1{c}2 {c} {c}{c}'s{c}" for c in points[::37]]
    lines += [some_text(random.Random(i)) for i in range(20_000)]
    lines += choose.documents("embedded", 0).load("train", 3)
    for line, found in zip(lines, theirs(lines, add_special_tokens=False, split_special_tokens=True)["input_ids"]):
        assert found == ours.encode(line), line


def conversation(dice: random.Random, free: bool) -> list[dict]:
    """With tools, a system message, unicode, empty turns. free: the assistant's parts in any order."""
    messages = [dict(role="system", content=some_text(dice))] if dice.random() < 0.3 else []
    for _ in range(dice.randrange(1, 4)):
        messages.append(dict(role="user", content=some_text(dice) if dice.random() < 0.9 else ""))
        if dice.random() < 0.5:
            messages.append(dict(role="assistant", content=some_text(dice)))
            continue
        parts = []
        for _ in range(dice.randrange(4)):
            call = [dict(type="python", text=some_text(dice)), dict(type="python_output", text=some_text(dice))]
            part = dict(type=dice.choice(["text", "python", "python_output"]), text=some_text(dice))
            parts += [part] if free else [dict(type="text", text=some_text(dice)), *call]
        messages.append(dict(role="assistant", content=parts))
    if dice.random() < 0.3:
        messages.append(dict(role="user", content=some_text(dice)))
    return messages


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_the_chat_template_renders_our_ids_and_masks(both, count):
    import transformers

    ours, theirs = both
    free = int(transformers.__version__.split(".")[1]) > 0  # 5.0 ends a mask early within an emoji before an output
    for i in range(count):
        messages = conversation(random.Random(i), free)
        ids, mask = ours.render(dict(messages=messages))
        found = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        assert found["input_ids"] == ids and list(found["assistant_masks"]) == mask, messages
        if messages[-1]["role"] == "user":
            asked = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            assert asked["input_ids"] == ours.render_for_completion(messages)


def test_the_chat_template_refuses_what_it_cannot_render(both):
    _, theirs = both
    user, assistant = dict(role="user", content="a"), dict(role="assistant", content="b")
    parts = dict(role="user", content=[dict(type="text", text="a")])  # as servers hand it on
    assert theirs.apply_chat_template([parts], tokenize=False) == theirs.apply_chat_template([user], tokenize=False)
    for messages in (
        [assistant], [user, user], [dict(role="system", content="a")], [dict(role="tool", content="a")],
        [dict(role="user", content="a\ufdd0b")], [dict(role="user", content=[dict(type="image", url="x")])],
        [user, dict(role="assistant", content=[dict(type="call", text="x")])],
    ):  # fmt: skip
        with pytest.raises(Exception, match="message|content|part|conversation"):
            theirs.apply_chat_template(messages, tokenize=False)


# ---- beside each other, and training there


@pytest.mark.slow
def test_transformers_and_ours_in_one_process(base):
    """And the package `kernels` of Hugging Face's, where it is installed, does not take our name from us."""
    import transformers  # noqa: F401

    import kernels

    assert Path(kernels.__file__).is_relative_to(Path(__file__).parent.parent)
    exchanged.run("a", exchanged.current())
    theirs = loaded(out(base, "a"))
    row = torch.zeros(1, 4, dtype=torch.int64)
    theirs.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=2)


def conversations(count: int) -> list[dict]:
    return [
        dict(messages=[dict(role="user", content=f"{a} + {b}?"), dict(role="assistant", content=f"It is {a + b}.")])
        for a in range(count)
        for b in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("config", [exchanged.original(), exchanged.current()], ids=["original", "now"])
@pytest.mark.parametrize("kind", ["Trainer", "TRL"])
def test_five_steps_of_training_there_and_back(base, config, kind):
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
    exchanged.run("a", config)
    folder = out(base, "a")
    model, tokenizer = loaded(folder), words(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    where = dict(output_dir=str(base / "trained"), max_steps=5, per_device_train_batch_size=2, report_to="none")
    more = dict(learning_rate=1e-2, use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1)
    trainer = (with_trainer if kind == "Trainer" else with_trl)(model, tokenizer, {**where, **more})
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 5 and losses[-1] < losses[0]
    trainer.save_model(str(base / "trained"))
    tokenizer.save_pretrained(base / "trained")
    after = trainer.model.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name].cpu())]
    assert len(changed) == len(before), set(before) - set(changed)
    assert tiny.call("import_model", str(base / "trained"), "--run=back") == 0
    from nanochat.run import Run

    gpt = Run.open("back").checkpoint("sft").model("cpu", torch.float32).eval()
    same_logits(gpt, trainer.model.eval(), 40)
    assert tiny.call("chat_cli", "--run=back", "-p", "1 + 1?", "-m=4") == 0


def with_trainer(model, tokenizer, flags):
    import transformers

    rows = []
    for talk in conversations(4):
        found = tokenizer.apply_chat_template(**talk_of(talk), return_assistant_tokens_mask=True, return_dict=True)
        labels = [i if own else -100 for i, own in zip(found["input_ids"], found["assistant_masks"])]
        rows.append(dict(input_ids=found["input_ids"], attention_mask=found["attention_mask"], labels=labels))
    collate = transformers.DataCollatorForSeq2Seq(tokenizer)
    settings = transformers.TrainingArguments(**flags)
    return transformers.Trainer(model, settings, train_dataset=rows, data_collator=collate)


def talk_of(talk: dict) -> dict:
    return dict(conversation=talk["messages"])


def with_trl(model, tokenizer, flags):
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    import datasets

    settings = trl.SFTConfig(**flags, max_length=64, assistant_only_loss=True, bf16=False)
    data = datasets.Dataset.from_list(conversations(4))
    return trl.SFTTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer)


def test_configurations_are_all_there():
    """Each field of ours that changes what is computed is one of theirs."""
    from nanochat.exchange import layout

    written = layout.to_hf(exchanged.current())
    lacking = set(vars(GPTConfig())) - set(written)
    assert lacking == {"sequence_len", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern", "original_init"}
