"""The evaluation bundle of the CORE metric, in nanochat's layout: which tasks there are, and their rows.

    core.yaml            label, file, number of examples shown, kind and delimiter of each task
    eval_meta_data.csv   the baseline of each: what blind guessing scores, in percent
    eval_data/           one JSON object a line

`there` says where one is; `find` downloads it where there is none. A bundle may hold some of the tasks only: `load`
says which are missing. The metric: Li et al., DataComp-LM, arXiv:2406.11794; the bundle and its address: nanochat.
"""

import csv
import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import optional
from nanochat.data import hub
from nanochat.errors import UserError
from nanochat.files import base_dir, encodable, json_of, sha256
from nanochat.locks import turn

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
SHA256 = "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200"
CORE = (
    "hellaswag_zeroshot", "jeopardy", "bigbench_qa_wikidata", "arc_easy", "arc_challenge", "copa", "commonsense_qa",
    "piqa", "openbook_qa", "lambada_openai", "hellaswag", "winograd", "winogrande", "bigbench_dyck_languages",
    "agi_eval_lsat_ar", "bigbench_cs_algorithms", "bigbench_operators", "bigbench_repeat_copy_logic", "squad", "coqa",
    "boolq", "bigbench_language_identification",
)  # fmt: skip
FEW_SHOT_SEED = 1234
KINDS = ("multiple_choice", "schema", "language_modeling")
Row = dict[str, Any]


@dataclass(frozen=True)
class CoreTask:
    """One task. baseline: percent; shots: solved examples shown before each question, drawn with `seed` + its index."""

    label: str
    kind: str
    path: Path
    shots: int
    delimiter: str
    baseline: float
    seed: int = FEW_SHOT_SEED

    def rows(self) -> list[Row]:
        """All rows in the file's order, checked. Raises UserError with file and line."""
        lines = enumerate(_text(self.path).split("\n"), 1)  # not splitlines: a row may hold U+2028
        rows = [_row(self.kind, line, f"{self.path}, line {number}") for number, line in lines if line.strip()]
        if len(rows) <= self.shots:
            raise UserError(f"{self.path} has {len(rows)} rows, wanted more than the {self.shots} shown as examples")
        return rows


@dataclass(frozen=True)
class Bundle:
    """The tasks whose data are there, in the order of core.yaml, and the labels of the CORE tasks that are not."""

    folder: Path
    tasks: list[CoreTask]
    missing: list[str]


def load(folder: Path) -> Bundle:
    """Reads core.yaml and the baselines. Raises UserError for what is damaged."""
    try:
        yaml = optional.package("yaml", "safe_load")
    except ImportError:
        raise UserError("an evaluation bundle is described in YAML: pip install pyyaml") from None

    config, baselines, tasks = folder / "core.yaml", _baselines(folder / "eval_meta_data.csv"), []
    try:
        listed = yaml.safe_load(_text(config))["icl_tasks"]
        for entry in listed:
            label = str(entry["label"])
            path = folder / "eval_data" / entry["dataset_uri"]
            kind, shots = entry["icl_task_type"], entry["num_fewshot"][0]
            if kind not in KINDS:
                raise UserError(f"{config}: {label} is of kind {kind!r}, wanted one of {', '.join(KINDS)}")
            if type(shots) is not int or shots < 0:
                raise UserError(f"{config}: num_fewshot of {label} is {shots!r}, wanted a whole number, 0 or more")
            if label not in baselines:
                raise UserError(f"{folder / 'eval_meta_data.csv'} has no baseline of {label}, which core.yaml lists")
            delimiter = str(entry.get("continuation_delimiter", " "))
            tasks.append(CoreTask(label, kind, path, shots, delimiter, baselines[label]))
    except (yaml.YAMLError, KeyError, TypeError, ValueError, IndexError, RecursionError) as problem:
        said = " ".join(str(problem).split())
        raise UserError(f"{config} is damaged ({type(problem).__name__}: {said}); get the bundle again") from None
    there = [task for task in tasks if task.path.is_file()]
    labels = [task.label for task in there]
    gone = [task.label for task in tasks if task not in there and task.label not in CORE]
    return Bundle(folder, there, [label for label in CORE if label not in labels] + gone)


def there(path: str = "") -> Path | None:
    """The bundle's folder, where there is one: `path` where one is given, else in $NANOCHAT_BASE_DIR, else beside the
    mirror that NANOCHAT_HUB_ROOT names. Raises UserError where `path` is none.
    """
    if path:
        folder = Path(path).expanduser()
        if not (folder / "core.yaml").is_file():
            raise UserError(f"--bundle {path}: there is no core.yaml in it; wanted a folder laid out as nanochat's")
        return folder
    mirror = hub.mirror()
    folders = [base_dir() / "eval_bundle", *([mirror.with_name("eval_bundle")] if mirror else [])]
    return next((folder for folder in folders if (folder / "core.yaml").is_file()), None)


def find(path: str = "") -> Path:
    """The bundle's folder; it is downloaded where there is none. Raises UserError."""
    if found := there(path):
        return found
    own = base_dir() / "eval_bundle"
    with turn(base_dir() / ".eval_bundle.lock"):
        if not (own / "core.yaml").is_file():  # another process may have been first
            download(own)
    return own


def download(folder: Path, url: str = URL, digest: str = SHA256) -> None:
    """Fetches and unpacks the bundle; the folder is whole or not there. A transfer goes on where one broke off.

    Raises UserError where there is no network, or what came is not the file whose SHA-256 is known.
    """
    try:
        from huggingface_hub.file_download import http_get
    except ImportError:
        raise UserError(
            "downloading the evaluation bundle needs huggingface_hub: pip install huggingface_hub"
        ) from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name("eval_bundle.zip.part")
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        raise UserError(f"there is no evaluation bundle at {folder}, and HF_HUB_OFFLINE forbids to download one")
    if not (part.exists() and sha256(part) == digest):
        try:
            with open(part, "ab") as f:  # http_get tries again where a transfer breaks, and checks the size
                http_get(url, f, resume_size=f.tell(), displayed_filename="eval_bundle.zip")
        except Exception as problem:  # the network in all its forms
            if isinstance(problem, OSError) and problem.errno is not None:
                raise
            raise UserError(
                f"the evaluation bundle could not be downloaded from {url} ({type(problem).__name__}); connect and "
                f"call again (it goes on where it stopped), put one at {folder}, name one with --bundle, or "
                "leave core out of --eval"
            ) from None
    if (found := sha256(part)) != digest:
        part.unlink()
        raise UserError(f"{url} gave a file with SHA-256 {found[:16]}…, wanted {digest[:16]}…; nothing of it is used")
    temporary = folder.with_name(f".eval_bundle-{os.getpid()}")
    try:
        with zipfile.ZipFile(part) as archive:
            archive.extractall(temporary)
        os.rename(temporary / "eval_bundle", folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    part.unlink()


def fingerprint(bundle: Bundle) -> str:
    """Of the tasks' files and how they are asked: two scores may be compared where it is the same."""
    digest = hashlib.sha256()
    for task in bundle.tasks:
        digest.update(
            f"{task.label} {task.kind} {task.shots} {task.seed} {task.delimiter!r} {task.baseline}\n".encode()
        )
        digest.update(sha256(task.path).encode())
    return digest.hexdigest()[:16]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; get the evaluation bundle again") from None
    except UnicodeDecodeError as problem:
        raise UserError(f"{path} is damaged: it is no UTF-8 at byte {problem.start}; get the bundle again") from None


def _baselines(path: Path) -> dict[str, float]:
    found, lines = {}, csv.DictReader(io.StringIO(_text(path)))
    try:
        for row in lines:
            found[row["Eval Task"]] = baseline = float(row["Random baseline"])
            if not 0 <= baseline < 100:  # NaN too
                raise ValueError
    except csv.Error as problem:
        raise UserError(f"{path}, line {lines.line_num + 1} is damaged ({problem}); get the bundle again") from None
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path}, line {lines.line_num}: wanted columns Eval Task and Random baseline, from 0 to below 100 percent"
        ) from None
    return found


def _row(kind: str, line: str, where: str) -> Row:
    """A row that a task of this kind can be asked with. Raises UserError with `where` it is."""
    try:
        row = json_of(line)
        if "\\u" in line:
            encodable(json.dumps(row, ensure_ascii=False))
    except ValueError as problem:
        raise UserError(f"{where} is damaged: it is no JSON ({problem}); get the bundle again") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is damaged: it is no JSON object")
    text: Callable[[Any], bool] = lambda value: isinstance(value, str)
    options = {"multiple_choice": "choices", "schema": "context_options"}.get(kind)
    wanted = {
        "multiple_choice": ["query"],
        "schema": ["continuation"],
        "language_modeling": ["context", "continuation"],
    }
    for key in wanted[kind]:
        if not text(row.get(key)):
            raise UserError(f"{where} is damaged: {key} is no text")
    if kind != "multiple_choice" and not row["continuation"].strip():
        raise UserError(f"{where} is damaged: its continuation is empty")
    if options:
        given, gold = row.get(options), row.get("gold")
        if not isinstance(given, list) or len(given) < 2 or not all(map(text, given)):
            raise UserError(f"{where} is damaged: {options} is no list of at least two texts")
        if type(gold) is not int or not 0 <= gold < len(given):
            raise UserError(f"{where} is damaged: gold is {gold!r}, wanted the place of one of {len(given)} {options}")
    return row
