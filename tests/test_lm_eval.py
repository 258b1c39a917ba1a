"""lm-evaluation-harness beside ours, on task files made from the evaluation bundle: the same sums, token for token.

Needs lm_eval, transformers and accelerate: in a venv of their own with a .pth file that names our site-packages, say;
slow. The harness tokenizes and scores through its own HFLM; our scorers are given the ids that it used.
"""

import importlib.util
import json

import hf_models
import pytest
import torch

from nanochat.evaluate import bundle, core
from nanochat.evaluate.core_batches import OurModel
from nanochat.evaluate.core_hf import HubModel
from nanochat.evaluate.core_prompts import Example
from nanochat.gpt import GPT, GPTConfig

pytestmark = [
    pytest.mark.slow,
    *(
        pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")
        for name in ("lm_eval", "transformers", "accelerate")
    ),
]
TASKS = ("arc_easy", "arc_challenge", "piqa", "boolq", "copa", "lambada_openai")
ROWS = 30  # of each task
V = 512


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level BPE of transformers', learnt from the bundle."""
    import tiny
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(tiny.sentences(500), V - 1, special_tokens=["<end>"])
    end = "<end>"
    return PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, bos_token=end, eos_token=end, pad_token=end)


def ours_original():
    torch.manual_seed(0)
    model = GPT(GPTConfig.original(sequence_len=4096, vocab_size=V, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def write_task(task, folder):
    """A task file of the harness and its rows."""
    rows = core.chosen(task, max(ROWS, task.shots + 1))[:ROWS]
    data = folder / f"{task.label}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = dict(task=f"core_{task.label}", dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(data))))
    about.update(test_split="test", num_fewshot=0, target_delimiter=task.delimiter.rstrip("\n") or " ")
    if task.kind == "language_modeling":
        about.update(output_type="loglikelihood", doc_to_text="{{context|trim}}", doc_to_target="{{continuation}}")
        metrics = ["acc"]
    else:
        about.update(output_type="multiple_choice", doc_to_text="{{query}}", doc_to_choice="choices")
        about.update(doc_to_target="gold")
        metrics = ["acc", "acc_norm"]
    about["metric_list"] = [dict(metric=name, aggregation="mean", higher_is_better=True) for name in metrics]
    (folder / f"{task.label}.yaml").write_text(json.dumps(about))  # JSON is YAML
    return about["task"]


@pytest.mark.parametrize("kind", ["gpt2", "nanochat"])
def test_sums_and_accuracies_are_the_harness_own(shared, tmp_path, monkeypatch, tokenizer, kind):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    original = ours_original()
    model = hf_models.gpt2(V, 4096) if kind == "gpt2" else hf_models.nanochat(original)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu", max_length=4096)
    tasks = [task for task in bundle.load(shared / "data" / "eval_bundle").tasks if task.label in TASKS]
    assert len(tasks) == len(TASKS)
    names = [write_task(task, tmp_path) for task in tasks]
    found = simple_evaluate(
        harness, tasks=names, task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        log_samples=True, bootstrap_iters=0, batch_size=8,
    )  # fmt: skip
    askers = [HubModel(model, tokenizer)]
    if kind == "nanochat":
        wrapped = hf_models.Wrapped.__new__(hf_models.Wrapped)  # never called: the harness has tokenized
        wrapped.encode_documents = None
        askers.append(OurModel(original, wrapped, 4000))
    worst, count = 0.0, 0
    for task, name in zip(tasks, names):
        samples = found["samples"][name]
        assert len(samples) == ROWS
        examples = []
        for sample in samples:
            pairs = [harness._encode_pair(*request) for request in arguments(sample)]
            ids, spans = [a + b for a, b in pairs], [(len(a), len(a) + len(b)) for a, b in pairs]
            examples.append(Example(ids, spans))
        for asker in askers:
            right, norm_right = [], []
            for sample, scores in zip(samples, asker.score(iter(examples)), strict=True):
                sums = [-sum(score.nats) for score in scores]
                theirs = [float(response[0][0]) for response in sample["resps"]]
                for mine, other in zip(sums, theirs, strict=True):
                    worst, count = max(worst, abs(mine - other) / max(1.0, abs(other))), count + 1
                    assert mine == pytest.approx(other, rel=1e-5, abs=1e-4), (task.label, sample["doc_id"])
                if task.kind == "language_modeling":
                    right.append(scores[0].right)
                    continue
                doc = sample["doc"]
                right.append(sums.index(max(sums)) == doc["gold"])
                by_character = [one / len(choice) for one, choice in zip(sums, doc["choices"])]
                norm_right.append(by_character.index(max(by_character)) == doc["gold"])
            result = found["results"][name]
            assert sum(right) / ROWS == pytest.approx(result["acc,none"])
            if norm_right:
                assert sum(norm_right) / ROWS == pytest.approx(result["acc_norm,none"])
    print(f"{kind}: {count} sums, the largest relative difference {worst:.1e}")


def arguments(sample):
    """(context, continuation) of each of a sample's requests."""
    found = sample["arguments"]
    if isinstance(found, dict):
        return [(one["arg_0"], one["arg_1"]) for one in found.values()]
    return [tuple(one[:2]) for one in found]
