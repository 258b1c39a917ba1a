import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from nanochat.data.conversations import ConversationFiles
from nanochat.data.documents import Documents
from nanochat.errors import UserError


def everything(source, split):
    return [item for unit in range(source.units(split)) for item in source.load(split, unit)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path, texts, column="text", rows_per_group=50):
    pq.write_table(pa.table({column: texts}), path, row_group_size=rows_per_group)
    return path


TEXTS = tiny.sentences(1300)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_document_is_in_exactly_one_split(tmp_path, kind):
    if kind == "jsonl":
        path = write_jsonl(tmp_path / "a.jsonl", [dict(text=t) for t in TEXTS])
    else:
        path = write_parquet(tmp_path / "a.parquet", TEXTS)
    source = Documents(path)
    train, val = everything(source, "train"), everything(source, "val")
    assert len(val) >= len(TEXTS) // 50
    assert sorted(train + val) == sorted(TEXTS)
    assert Documents(path).fingerprint == source.fingerprint


def test_files_named_val_are_the_validation_split(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS[:100])
    write_jsonl(tmp_path / "val.jsonl", [dict(text=t) for t in TEXTS[100:110]])
    source = Documents(tmp_path)
    assert everything(source, "train") == TEXTS[:100]
    assert everything(source, "val") == TEXTS[100:110]


def test_plain_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(TEXTS))
    source = Documents(path)
    documents = everything(source, "train") + everything(source, "val")
    assert sum(document.count(".") for document in documents) == len(TEXTS)
    assert max(map(len, documents)) <= 4000


def test_the_fingerprint_follows_the_content(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [dict(text=t) for t in TEXTS[:100]])
    before = Documents(path).fingerprint
    write_jsonl(path, [dict(text=t) for t in TEXTS[:99] + [TEXTS[99].upper()]])
    assert Documents(path).fingerprint != before


def bad(tmp_path, name, content):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    return path


GOOD = '{"text": "one"}\n'


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("none.txt", None, "does not exist"),
        ("a.csv", "text\nhello", "not of a kind"),
        ("a.jsonl", "", "is empty"),
        ("a.txt", "\n \n\n", "blank lines"),
        ("a.jsonl", GOOD * 3 + "{not json}\n", r"a\.jsonl, line 4: not valid JSON"),
        ("a.jsonl", GOOD * 600 + '{"txt": "x"}\n', r'line 601: wanted an object with a string "text"'),
        ("a.jsonl", GOOD + '{"text": 5}\n', "line 2: wanted"),
        ("a.jsonl", GOOD, "one document only"),
        ("a.txt", b"good\nbad \xff\xfe\n", "line 2: not UTF-8"),
        ("a.parquet", b"PAR1 this is none", "no readable parquet"),
        ("val.jsonl", GOOD * 3, "validation files only"),
    ],
)
def test_bad_input_is_named(tmp_path, name, content, complaint):
    with pytest.raises(UserError, match=complaint):
        Documents(bad(tmp_path, name, content))


def test_bad_parquet_is_named(tmp_path):
    with pytest.raises(UserError, match="no `text` column; its columns are body"):
        Documents(write_parquet(tmp_path / "a.parquet", ["x"], column="body"))
    with pytest.raises(UserError, match="holds int64"):
        Documents(write_parquet(tmp_path / "b.parquet", [1, 2]))
    with pytest.raises(UserError, match="no rows"):
        Documents(write_parquet(tmp_path / "c.parquet", pa.array([], pa.string())))
    path = write_parquet(tmp_path / "d.parquet", ["x", None, "y"] * 40)
    with pytest.raises(UserError, match="row 1 of row group 0: the text is null"):
        Documents(path)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has no \.parquet"):
        Documents(tmp_path)


def test_a_row_group_that_went_bad_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    source = Documents(path)
    content = bytearray(path.read_bytes())
    content[4:3000] = bytes(2996)
    path.write_bytes(content)
    with pytest.raises(UserError, match="row group 0: damaged"):
        source.load("train", 0)


# ---- conversations


def exchange(i):
    return [dict(role="user", content=f"q{i}"), dict(role="assistant", content=f"a{i}")]


def test_conversations_in_both_forms(tmp_path):
    rows = [exchange(i) if i % 2 else dict(messages=exchange(i)) for i in range(300)]
    source = ConversationFiles(write_jsonl(tmp_path / "chat.jsonl", rows))
    both = everything(source, "train") + everything(source, "val")
    assert sorted(c["messages"][0]["content"] for c in both) == sorted(f"q{i}" for i in range(300))
    assert len(everything(source, "val")) == 6


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{", "line 3: not valid JSON"),
        ('{"messages": []}', "line 3: wanted a list"),
        (json.dumps(exchange(1)[::-1]), "line 3: message 1 is from 'assistant'"),
    ],
)
def test_a_bad_conversation_is_named_by_line(tmp_path, line, complaint):
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join([json.dumps(exchange(0)), "", line, ""]))
    with pytest.raises(UserError, match=complaint):
        ConversationFiles(path)
