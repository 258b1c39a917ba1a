"""A small evaluation bundle of made-up rows: a task of each kind, and the functions that write it."""

import json
from pathlib import Path

from nanochat.evaluate.bundle import Bundle, load

THINGS = ("dog", "cat", "house", "river", "big dog", "small cat", "old house", "red river")
ROWS = {
    "arc_easy": [
        dict(query=f"Question: the {a} is near the {b}. What is near?", choices=[a, b, f"{a} and {b}"], gold=i % 3)
        for i, (a, b) in enumerate(zip(THINGS, THINGS[3:] + THINGS[:3]))
    ],
    "winograd": [
        dict(context_options=[f"The dog likes {a} because the {a}", f"The dog likes {a} because the {b} not"],
             continuation=f"is {THINGS[-1 - i]}.", gold=i % 2)
        for i, (a, b) in enumerate(zip(THINGS, THINGS[2:] + THINGS[:2]))
    ],
    "lambada_openai": [
        dict(context=f" The {a} sees the {b} under the {a} and likes the ", continuation=b)
        for a, b in zip(THINGS, THINGS[1:] + THINGS[:1])
    ],
}  # fmt: skip
TASKS = {  # label: (kind, examples shown, delimiter, baseline in percent)
    "arc_easy": ("multiple_choice", 3, "\nAnswer: ", 40.3),
    "winograd": ("schema", 1, " ", 50),
    "lambada_openai": ("language_modeling", 0, " ", 0),
}


def write(folder: Path, rows=ROWS, tasks=TASKS) -> Path:
    """The bundle's files; core.yaml lists all tasks, and a task without rows has no file."""
    (folder / "eval_data").mkdir(parents=True)
    lines = ["icl_tasks:"]
    for label, (kind, shots, delimiter, _) in tasks.items():
        lines += [f"- label: {label}", f"  dataset_uri: {label}.jsonl", f"  num_fewshot: [{shots}]"]
        lines += [
            f"  icl_task_type: {kind}",
            *([] if delimiter == " " else [f"  continuation_delimiter: {json.dumps(delimiter)}"]),
        ]
        if label in rows:
            text = "".join(json.dumps(row) + "\n" for row in rows[label])
            (folder / "eval_data" / f"{label}.jsonl").write_text(text)
    (folder / "core.yaml").write_text("\n".join(lines) + "\n")
    table = ["Eval Task,Task Category,Random baseline", *(f"{label},x,{one[3]}" for label, one in tasks.items())]
    (folder / "eval_meta_data.csv").write_text("\n".join(table) + "\n")
    return folder


def made(folder: Path) -> Bundle:
    return load(write(folder))
