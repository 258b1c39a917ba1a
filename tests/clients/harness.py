"""lm-evaluation-harness: multiple choice and rolling tasks by token lists, generation by chat; tasks of its own files.

Prints every log-likelihood that it summed, so that they can be held against the model's own.
"""

import json
import os
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

folder = Path(os.environ["FOLDER"])


def task(name, rows, **about):
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = [dict(metric=about.pop("metric"), aggregation=about.pop("mean", "mean"), higher_is_better=True)]
    given = dict(task=name, dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(data))),
                 test_split="test", num_fewshot=0, metric_list=metrics, **about)  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(given))  # JSON is YAML
    return name


names = ["Paris", "Rome", "Berlin", "Madrid"]
choices = [dict(q=f"The capital of {land} is", choices=names, gold=i) for i, land in enumerate(("France", "Italy"))]
texts = [dict(text="The capital of France is Paris. " * n) for n in (1, 3)]
sums = [dict(q="What is 27 + 58?", a="85"), dict(q="What is 11 + 12?", a="23")]
chosen = task("choices", choices, output_type="multiple_choice", doc_to_text="{{q}}", doc_to_choice="{{choices}}",
              doc_to_target="{{gold}}", metric="acc")  # fmt: skip
rolled = task("rolled", texts, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
              metric="bits_per_byte", mean="bits_per_byte")  # fmt: skip
until = dict(until=["\n\n"], do_sample=False, temperature=0)
chatted = task("chatted", sums, output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{a}}",
               generation_kwargs=until, metric="exact_match")  # fmt: skip
server, manager = os.environ["BASE_URL"], TaskManager(include_path=str(folder), include_defaults=False)
about = f"model={os.environ['MODEL']},max_length={os.environ['CONTEXT']},max_gen_toks=64"
likelihoods = simple_evaluate(
    "local-completions", model_args=f"{about},base_url={server}/completions,num_concurrent=2", tasks=[chosen, rolled],
    task_manager=manager, batch_size=4, log_samples=True, bootstrap_iters=0,
)  # fmt: skip
chat = simple_evaluate(
    "local-chat-completions", model_args=f"{about},base_url={server}/chat/completions", tasks=[chatted],
    task_manager=manager, log_samples=True, bootstrap_iters=0, apply_chat_template=True,
)  # fmt: skip
print(
    json.dumps(
        dict(
            choices=[[float(one[0][0]) for one in s["resps"]] for s in likelihoods["samples"]["choices"]],
            greedy=[[bool(one[0][1]) for one in s["resps"]] for s in likelihoods["samples"]["choices"]],
            rolled=[float(s["resps"][0][0][0] if isinstance(s["resps"][0][0], (list, tuple)) else s["resps"][0][0])
                    for s in likelihoods["samples"]["rolled"]],
            accuracy=likelihoods["results"]["choices"]["acc,none"],
            chat=[s["resps"][0][0] for s in chat["samples"]["chatted"]],
        )
    )
)  # fmt: skip
