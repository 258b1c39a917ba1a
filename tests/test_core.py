"""CORE's scorer against a plain one: each sequence alone and whole, attention written out; and what is around it."""

import csv
import json
import math
import os
import random
import socket
from dataclasses import replace

import bundles
import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from test_training import home, train  # noqa: F401 (home is a fixture)

from kernels import use
from nanochat.errors import UserError
from nanochat.evaluate import bundle, core, core_batches, core_controls, core_prompts
from nanochat.evaluate.core_batches import OurModel
from nanochat.run import Run
from scripts import base_eval

# ---- a plain scorer


class Written:
    """A `Cache` for one sequence, a batch row a token: attention in float64 from its formula, the smear's input too."""

    def __init__(self, model, ids):
        now = model.embedded(ids)[0]
        self.start = torch.arange(len(ids))
        self.previous = torch.cat((torch.zeros_like(now[:1]), now[:-1]))[:, None]
        self.context = model.config.sequence_len

    def attend(self, layer, q, k, v, window):
        q, k, v = (x[:, 0].transpose(0, 1).double() for x in (q, k, v))  # (heads, T, D)
        k, v = (x.repeat_interleave(q.size(0) // x.size(0), 0) for x in (k, v))
        i, j = self.start[:, None], self.start
        seen = (j <= i) & (j >= i - (self.context if window is None else window))
        scores = (q @ k.transpose(1, 2) * q.size(-1) ** -0.5).masked_fill(~seen, -math.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1)[:, None].float()


@torch.no_grad()
def plain(model, ids, span):
    """(losses of the span's tokens, whether all are the likeliest) of one sequence."""
    ids = torch.tensor(ids)
    logits = model.logits(model.hidden(ids[:, None], Written(model, ids))[:, 0])[:-1]
    losses = F.cross_entropy(logits, ids[1:], reduction="none")
    right = logits.argmax(-1) == ids[1:]
    start, end = span
    return losses[start - 1 : end - 1].tolist(), bool(right[start - 1 : end - 1].all())


def check(model, examples, **settings):
    """Scores of ours and plain ones agree, sequence by sequence."""
    asked = OurModel(model, tiny.tokenizer(), settings.get("budget", 1000))
    found = list(asked.score(iter(examples)))
    assert len(found) == len(examples)
    for example, scores in zip(examples, found):
        assert len(scores) == len(example.ids)
        for ids, span, score in zip(example.ids, example.spans, scores):
            losses, right = plain(model, ids, span)
            assert score.right == right
            torch.testing.assert_close(torch.tensor(score.nats), torch.tensor(losses), rtol=0, atol=2e-5)
            assert losses == [] or score.mean == pytest.approx(sum(losses) / len(losses), abs=2e-5)


def examples_of(task, rows, limit=None, tokenizer=None):
    encode = (tokenizer or tiny.tokenizer()).encode_documents
    return [core_prompts.example(task, rows, i, encode, limit) for i in range(len(rows))]


@pytest.fixture
def small(tmp_path):
    return bundles.made(tmp_path / "bundle")


def everything(found, limit=None):
    return [example for task in found.tasks for example in examples_of(task, core.chosen(task), limit)]


SHORT = dict(sequence_len=512, n_layer=3, window_pattern="SL")  # a short window sees 128 tokens


@pytest.mark.parametrize("budget", [1, 300, 10_000])
def test_scores_are_the_plain_ones_whatever_is_computed_at_a_time(small, budget):
    check(tiny.model(**SHORT), everything(small), budget=budget)


@pytest.mark.parametrize(
    "sizes",
    [dict(sequence_len=32), dict(smear=False, residual_mix=False, value_embeds=False, backout=False, n_kv_head=4)],
)
def test_also_of_prompts_longer_than_the_context_and_without_tricks(small, sizes):
    examples = everything(small)
    assert max(len(ids) for example in examples for ids in example.ids) > 64
    check(tiny.model(**{**SHORT, **sizes}), examples)


def test_within_the_context_the_plain_scorer_is_the_model_itself(small):
    model = tiny.model(**SHORT)
    ids = everything(small)[0].ids[0]
    assert len(ids) > 128  # a short window hides something
    logits = model(torch.tensor([ids]))[0, :-1]
    losses, _ = plain(model, ids, (1, len(ids)))
    torch.testing.assert_close(F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none"), torch.tensor(losses))


def test_cropped_prompts_are_scored_as_what_is_left_of_them(small):
    model = tiny.model(**{**SHORT, "sequence_len": 8})
    examples = everything(small, limit=80)
    assert 0 < sum(example.cropped for example in examples) < len(examples)
    assert all(len(ids) <= 80 for example in examples for ids in example.ids)
    check(model, examples)


def test_no_plan_of_cudnns_is_made_for_a_masks_shape(small, monkeypatch):
    real, asked = F.scaled_dot_product_attention, []

    def noted(*args, **options):
        asked.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    check(tiny.model(**SHORT), everything(small))
    assert asked and not any(asked) and torch.backends.cuda.cudnn_sdp_enabled()


def test_where_a_mask_would_be_too_large_nothing_is_shared(small, monkeypatch):
    monkeypatch.setattr(core_batches, "MASK", 0)
    examples = everything(small)
    assert len(core_batches.apart(examples[0])) == 3
    check(tiny.model(**SHORT), examples)


def test_logits_are_made_some_at_a_time(small, monkeypatch):
    model, rows = tiny.model(**SHORT), []
    plain_logits = model.logits
    monkeypatch.setattr(core_batches, "LOGITS", 3 * 300)
    monkeypatch.setattr(model, "logits", lambda x: rows.append(len(x)) or plain_logits(x))
    list(OurModel(model, tiny.tokenizer(), 10_000).score(everything(small)))
    assert max(rows) == 3 and len(rows) > 10


def test_triton_kernels_give_the_same(small):
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted on a CPU only; on a card the other tests run them")
    examples = [examples_of(task, task.rows())[0] for task in small.tasks[2:]]
    with use("triton"):
        check(tiny.model(**SHORT), examples)


@torch.no_grad()
def test_what_the_model_would_say_itself_is_right():
    model = tiny.model(**SHORT)
    ids = [1, 2, 3]
    for _ in range(4):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    wrong = [*ids[:-1], (ids[-1] + 1) % 300]
    examples = [core_prompts.Example([one], [(3, 7)]) for one in (ids, wrong, ids)]
    check(model, examples)
    found = OurModel(model, tiny.tokenizer(), 100).score(iter(examples))
    assert [scores[0].right for scores in found] == [True, False, True]


def test_odd_sequences(tmp_path):
    """One a beginning of another, all the same, nothing shared but a token, a single one."""
    examples = [
        core_prompts.Example([[1, 2, 3], [1, 2, 3, 4]], [(3, 3), (3, 4)]),
        core_prompts.Example([[1, 2, 3]] * 2, [(1, 3)] * 2),
        core_prompts.Example([[1, 2, 2], [1, 3, 5, 6]], [(1, 3), (1, 4)]),
        core_prompts.Example([[4, 2, 2], [1, 3, 5, 6]], [(1, 3), (1, 4)]),
        core_prompts.Example([[1, 2, 3, 4]], [(2, 4)]),
        core_prompts.Example([[1, 2]] * 3, [(1, 2)] * 3),
    ]
    check(tiny.model(**SHORT), examples)


def test_the_best_is_the_first_of_equals_and_one_without_tokens_only_where_it_is_first(small):
    scores = lambda *means: [core_batches.Score([] if mean is None else [mean], False) for mean in means]
    task = small.tasks[0]
    for means, best in (((2, 1, 1), 1), ((None, 1, 2), 0), ((2, None, 1), 2)):
        assert [core.is_right(task, dict(gold=gold), scores(*means)) for gold in range(3)] == [
            gold == best for gold in range(3)
        ]


# ---- prompts


def test_prompts_show_the_drawn_examples_and_ask(small):
    choice, schema, language = small.tasks
    rows = choice.rows()
    drawn = random.Random(1234 + 5).sample([i for i in range(len(rows)) if i != 5], 3)
    shown = "".join(f"{rows[i]['query']}\nAnswer: {rows[i]['choices'][rows[i]['gold']]}\n\n" for i in drawn)
    asked = core_prompts.prompts(choice, rows, 5)
    assert asked == [f"{shown}{rows[5]['query']}\nAnswer: {one}" for one in rows[5]["choices"]]
    assert core_prompts.prompts(replace(choice, seed=1), rows, 5) != asked
    rows = schema.rows()
    (other,) = random.Random(1234).sample(range(1, len(rows)), 1)
    solved = f"{rows[other]['context_options'][rows[other]['gold']]} {rows[other]['continuation']}\n\n"
    asked = core_prompts.prompts(schema, rows, 0)
    assert asked == [f"{solved}{context} {rows[0]['continuation']}" for context in rows[0]["context_options"]]
    rows = language.rows()
    without, with_answer = core_prompts.prompts(language, rows, 0)
    assert without == rows[0]["context"].strip() and with_answer == f"{without} {rows[0]['continuation']}"


def test_spans_hold_what_is_scored(small):
    tokenizer = tiny.tokenizer()
    for task in small.tasks:
        for row, example in zip(task.rows(), examples_of(task, task.rows())):
            texts = [tokenizer.decode(ids[a:b]) for ids, (a, b) in zip(example.ids, example.spans)]
            whole = [tokenizer.decode(ids[1:]) for ids in example.ids]
            assert all(text and one.endswith(text) for text, one in zip(texts, whole))
            if task.kind == "schema":
                assert len(set(texts)) == 1 and row["continuation"] in texts[0] and example.gold == row["gold"]
            elif task.kind == "language_modeling":
                assert texts == [" " + row["continuation"]] and example.gold == 0


def test_rows_are_shuffled_with_one_seed_before_the_first_are_taken(small):
    rows = small.tasks[0].rows()
    random.Random(1337).shuffle(rows)
    assert core.chosen(small.tasks[0]) == rows and core.chosen(small.tasks[0], 5) == rows[:5]


def test_shared():
    assert core_prompts.shared([[1, 2, 3], [1, 2, 4, 5], [1, 2]]) == 2
    assert core_prompts.shared([[1], [2]]) == 0 and core_prompts.shared([[7, 8]]) == 2


# ---- controls


def test_controls_change_what_they_say_and_always_the_same(small):
    for task in small.tasks:
        rows = task.rows()
        for name, control in core_controls.CONTROLS.items():
            made, changed = control(task, rows)
            assert control(task, rows) == (made, changed) and changed != rows and rows == task.rows()
            assert made.shots == (0 if name == "removed" else task.shots)
            for before, after in zip(rows, changed):
                if name == "labels":
                    differs = {key for key in before if before[key] != after[key]}
                    assert differs <= {"gold", "continuation"}
                elif name == "shuffled" and task.kind == "multiple_choice":
                    assert sorted(before["query"].split()) == sorted(after["query"].split())
    choice, schema, language = small.tasks
    golds = lambda rows: sorted(row["gold"] for row in rows)
    assert golds(core_controls.labels(choice, choice.rows())[1]) == golds(choice.rows())
    answers = lambda rows: sorted(row["continuation"] for row in rows)
    assert answers(core_controls.labels(language, language.rows())[1]) == answers(language.rows())
    alone = core_controls.removed(schema, schema.rows())[1]
    assert alone[0]["context_options"] == ["dog", "house not"]
    mixed = core_controls.shuffled(schema, schema.rows())[1][0]["context_options"]
    assert mixed[0].removesuffix("dog") == mixed[1].removesuffix("house not") != "The dog likes dog because the "
    assert core_prompts.prompts(*core_controls.removed(choice, choice.rows()), 0)[0] == "\nAnswer: dog"


def test_labels_are_dealt_among_rows_with_equally_many_choices(small):
    task = small.tasks[0]
    rows = [dict(query="q", choices=["a", "b"], gold=1)] * 3 + [dict(query="q", choices=list("abcd"), gold=3)] * 3
    assert core_controls.labels(task, rows)[1] == rows


# ---- the whole


def asked(**sizes):
    return OurModel(tiny.model(**{**SHORT, **sizes}), tiny.tokenizer(), 2000)


def test_core_is_the_mean_of_centered_accuracies(small):
    steps = []
    found = core.core(asked(), small, controls=list(core_controls.CONTROLS), on_step=steps.append)
    assert list(found["tasks"]) == list(bundles.TASKS) and set(found["controls"]) == set(core_controls.CONTROLS)
    for label, one in found["tasks"].items():
        baseline = bundles.TASKS[label][3] / 100
        assert one["n"] == 8 and one["cropped"] == 0 and one["baseline"] == baseline
        assert one["centered"] == pytest.approx((one["accuracy"] - baseline) / (1 - baseline))
        assert one["low"] <= one["accuracy"] <= one["high"]
    assert found["core"] == pytest.approx(sum(one["centered"] for one in found["tasks"].values()) / 3)
    assert found["partial"] and "squad" in found["missing"] and not found["failed"]
    assert found["low"] < found["core"] < found["high"]
    assert [step.share for step in steps] == sorted(step.share for step in steps) and steps[-1].share == 1
    assert sum(step.result is not None for step in steps) == steps[-1].of == 12


def test_answers_are_those_of_the_plain_scorer(small):
    model = tiny.model(**SHORT)
    for task in small.tasks:
        rows = core.chosen(task)
        right = []
        for row, example in zip(rows, examples_of(task, rows)):
            scores = [core_batches.Score(*plain(model, ids, span)) for ids, span in zip(example.ids, example.spans)]
            means = [score.mean for score in scores]
            right.append(
                scores[0].right if task.kind == "language_modeling" else means.index(min(means)) == row["gold"]
            )
        assert core.answer(OurModel(model, tiny.tokenizer(), 500), task).right == right


def test_a_task_that_fails_leaves_the_others_and_is_said(small):
    path = small.tasks[1].path
    path.write_text(path.read_text() + "{\n")
    found = core.core(asked(), small)
    assert list(found["tasks"]) == ["arc_easy", "lambada_openai"] and "winograd" in found["missing"]
    assert "winograd.jsonl, line 9 is damaged" in found["failed"]["winograd"] and found["partial"]
    for task in small.tasks:
        task.path.write_text("{\n" * 5)
    with pytest.raises(UserError, match="no CORE task could be scored .*arc_easy.jsonl, line 1"):
        core.core(asked(), small)


def test_files_without_a_row_leave_nothing_to_score(small):
    for task in small.tasks:
        task.path.write_bytes(b"")
    with pytest.raises(UserError, match="no CORE task could be scored .*arc_easy.jsonl has 0 rows, wanted more than"):
        core.core(asked(), small)


def test_a_model_that_fails_is_said_too(small, monkeypatch):
    def broken(model, examples):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(core_batches, "score", broken)
    assert core.answer(asked(), small.tasks[0]) == "RuntimeError: out of memory"


def test_fewer_rows_than_are_shown_are_refused(small):
    with pytest.raises(UserError, match="--max-per-task is 3, wanted at least 4"):
        core.core(asked(), small, max_per_task=3)


def test_a_row_is_cropped_beyond_ten_contexts_and_counted(small):
    found = core.core(asked(sequence_len=8), small)
    assert found["tasks"]["arc_easy"]["cropped"] == 8 and found["tasks"]["lambada_openai"]["cropped"] == 0


# ---- ranks


def work(rank, world, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    found = bundle.load(folder / "bundle")
    shares = [core.share(task, core.chosen(task)) for task in found.tasks]
    result = core.core(asked(), found, controls=["labels"])
    if rank == 1:  # one rank's failure is all ranks'
        found.tasks[0].path.write_text("{\n")
    dist.barrier()
    failed = core.answer(asked(), found.tasks[0])
    (folder / f"rank{rank}.json").write_text(json.dumps(dict(result=result, shares=shares, failed=failed)))
    dist.barrier()  # nobody hangs up while another still talks
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes abort a process that ends the ordinary way


def test_two_ranks_give_what_one_gives(small, tmp_path):
    alone = core.core(asked(), small, controls=["labels"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(work, (2, port, tmp_path), nprocs=2, start_method="spawn")
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["result"] == second["result"] == json.loads(json.dumps(alone))
    for one, other in zip(first["shares"], second["shares"]):
        assert sorted(one + other) == list(range(8)) and len(one) == len(other) == 4
    assert first["failed"] == second["failed"] and "line 1 is damaged" in first["failed"]


# ---- the script


def test_the_script_scores_keeps_and_says(home, tmp_path, capsys):  # noqa: F811
    assert train(home, "a") == 0
    folder = bundles.write(tmp_path / "bundle")
    flags = ["--run=a", f"--bundle={folder}", f"--data={home / 'text.jsonl'}", "--split-tokens=256"]
    capsys.readouterr()
    assert tiny.call("base_eval", *flags, "--controls") == 0
    said = capsys.readouterr().out
    for part in (
        "bits per byte",
        "CORE: 3 tasks, all their rows (--max-per-task asks fewer), and",
        "CORE  3/12",
        "shuffled",
        "partial CORE",
        "missing: hellaswag_zeroshot",
        "→",
        "left",
    ):
        assert part in said, part
    run = Run.open("a")
    found = run.summary("eval")
    assert set(found["core"]) == {"base"} and "val_bpb" in found["base"]
    kept = found["core"]["base"]
    assert kept["step"] == 12 and len(kept["tasks"]) == 3 and len(kept["controls"]["removed"]) == 3
    with open(run.stage("eval") / "base_core.csv") as f:
        rows = list(csv.reader(f))
    assert rows[0] == ["Task", "Accuracy", "Centered"] and float(rows[-1][2]) == pytest.approx(kept["core"], abs=1e-6)
    assert tiny.call("report", "--run=a") == 0
    assert tiny.call("base_eval", *flags, "--eval=core", "--max-per-task=4", "--step=12") == 0
    assert run.summary("eval")["core"]["base"]["max_per_task"] == 4 and "val_bpb" in run.summary("eval")["base"]


def test_core_after_samples_is_of_the_same_weights(home, tmp_path, monkeypatch):  # noqa: F811
    """An engine has all weights in the activations' dtype."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    assert train(home, "a", "base", "--num-iterations=1") == 0
    asked = []
    monkeypatch.setattr(base_eval, "OurModel", lambda model, *_: asked.append(model.resid_lambdas.dtype))
    monkeypatch.setattr(base_eval, "ask_core", lambda *_: None)
    folder = bundles.write(tmp_path / "bundle")
    assert tiny.call("base_eval", "--run=a", "--eval=sample,core", f"--bundle={folder}") == 0
    assert asked == [torch.float32]


def test_wrong_use_is_one_sentence(home, capsys):  # noqa: F811
    assert train(home, "a") == 0
    for flags, said in (
        (["--eval=core,dance"], "--eval names 'dance'"),
        (["--eval=core", "--bundle=/nowhere"], "there is no core.yaml in it"),
        (["--eval=core", "--step=7"], "no checkpoint of base at step 7"),
        ([f"--bundle={bundles.write(home / 'b')}", "--max-per-task=3"], "--max-per-task is 3, wanted at least 4"),
        (["--eval=bpb", "--controls"], "--controls is about CORE, which --eval bpb leaves out"),
        (["--eval=bpb", "--device-batch-size=0"], "wanted 1 to 65536"),
        (["--eval=bpb", "--split-tokens=-3"], "wanted at least 1"),
    ):
        capsys.readouterr()
        assert tiny.call("base_eval", "--run=a", *flags) == 2
        captured = capsys.readouterr()
        assert said in captured.err and "bits per byte" not in captured.out  # before the work


# ---- the real bundle


def test_of_the_real_bundle_scores_are_the_plain_ones(shared):
    model = tiny.model(sequence_len=64, n_layer=2, n_embd=16, n_head=2, n_kv_head=1)
    found = bundle.load(shared / "data" / "eval_bundle")
    tokenizer = tiny.tokenizer()
    for task in found.tasks:
        rows = core.chosen(task, 12)
        check(model, [core_prompts.example(task, rows, 7, tokenizer.encode_documents, 640)])
