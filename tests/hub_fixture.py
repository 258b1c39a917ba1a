"""A mirror of the Hub's chat data made by the tests: the columns of the real data sets, and a few rows."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SUBJECTS = ("astronomy", "virology", "world_religions")


def write(root: Path, repo: str, subset: str, split: str, rows: list[dict]) -> None:
    path = root / repo / subset / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def smoltalk(root: Path, split: str, count: int) -> None:
    rows = [
        dict(
            messages=[
                dict(role="system", content="Be brief."),
                dict(role="user", content=f"{split} question {i}"),
                dict(role="assistant", content=f"answer {i}"),
            ],
            source="tests",
        )
        for i in range(count)
    ]
    write(root, "HuggingFaceTB/smol-smoltalk", "data", split, rows)


def mmlu_rows(split: str, count: int) -> list[dict]:
    return [
        dict(
            question=f"{split} number {i}?",
            subject="" if split == "auxiliary_train" else SUBJECTS[i % len(SUBJECTS)],
            choices=[f"{word} {i}" for word in ("one", "two", "three", "four")],
            answer=i % 4,
        )
        for i in range(count)
    ]


def mmlu(root: Path, split: str, rows: list[dict]) -> None:
    write(root, "cais/mmlu", "all", split, rows)


def arc_rows(split: str, count: int) -> list[dict]:
    return [
        dict(
            id=f"{split}_{i}",
            question=f"{split} science {i}?",
            choices=dict(text=[f"{word} {i}" for word in ("red", "green", "blue")], label=["A", "B", "C"]),
            answerKey="ABC"[i % 3],
        )
        for i in range(count)
    ]


def arc(root: Path, subset: str, split: str, rows: list[dict]) -> None:
    write(root, "allenai/ai2_arc", subset, split, rows)


def gsm8k(root: Path, split: str, count: int) -> None:
    rows = [
        dict(question=f"{split}: what is {i} and 2?", answer=f"{i}+2 = <<{i}+2={i + 2}>>{i + 2}.\n#### {i + 2}")
        for i in range(count)
    ]
    write(root, "openai/gsm8k", "main", split, rows)
