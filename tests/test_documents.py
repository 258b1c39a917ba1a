import bz2
import gzip
import json
import lzma
import os

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


def exchange(i):
    return [dict(role="user", content=f"q{i}"), dict(role="assistant", content=f"a{i}")]


# ---- one in fifty of the corpus, whatever the files


def small_files(folder, texts, kind, each):
    folder.mkdir()
    for start in range(0, len(texts), each):
        some, path = texts[start : start + each], folder / f"{start:05}.{kind}"
        if kind == "txt":
            path.write_text("\n\n".join(text.ljust(4000, ".") for text in some))
        elif kind == "jsonl":
            write_jsonl(path, [dict(text=text) for text in some])
        else:
            write_parquet(path, some, rows_per_group=1)
    return folder


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("each", [1, 2, 49, 51])
def test_one_in_fifty_is_held_out_whatever_the_files(tmp_path, kind, each):
    source = Documents(small_files(tmp_path / "many", TEXTS[:260], kind, each))
    train, val = everything(source, "train"), everything(source, "val")
    assert len(val) == 6 and len(train) == 254
    assert sorted(text.rstrip(".") for text in train + val) == sorted(text.rstrip(".") for text in TEXTS[:260])
    for split in ("train", "val"):
        assert all(source.load(split, unit) for unit in range(source.units(split)))


def test_the_place_in_the_corpus_counts_and_not_that_in_a_block(tmp_path):
    rows = [dict(text=f"text {i}") for i in range(2000)]
    rows.insert(700, dict(text=" \n"))  # blank: counts for nothing
    source = Documents(write_jsonl(tmp_path / "a.jsonl", rows))
    assert everything(source, "val") == [f"text {i}" for i in range(0, 2000, 50)]


# ---- blank texts


def test_blank_stretches_are_passed_over_and_blank_files_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [dict(text="a")] + [dict(text=" ")] * 2000 + [dict(text="b")])
    assert everything(Documents(path), "train") == ["b"] and everything(Documents(path), "val") == ["a"]
    write_jsonl(tmp_path / "val.jsonl", [dict(text="\n")] * 5)
    with pytest.raises(UserError, match=r"val\.jsonl has nothing but blank texts"):
        Documents(tmp_path)
    for name in ("blank.parquet", "blank.jsonl", "blank.txt"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        write_jsonl(folder / "val.jsonl", [dict(text=t) for t in TEXTS[:5]])
        if name.endswith("parquet"):
            write_parquet(folder / name, [" ", "\t"] * 60)
        elif name.endswith("jsonl"):
            write_jsonl(folder / name, [dict(text="")] * 600)
        else:
            (folder / name).write_text(" \n" * 5)
        with pytest.raises(UserError, match=f"{name} has nothing but blank texts"):
            Documents(folder)


# ---- what is not data


def test_hidden_files_and_editors_copies_are_left_out_and_said(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", [dict(text=t) for t in TEXTS[:100]])
    once = Documents(tmp_path).fingerprint
    assert not capsys.readouterr().err
    for name in (".ipynb_checkpoints/a-checkpoint.jsonl", "._a.jsonl", ".DS_Store", "a.jsonl~", "#a.jsonl#",
                 ".a.jsonl.swp", "__MACOSX/a.jsonl", "~$a.txt", "deep/.cache/more/b.txt", "a~.txt",
                 "_delta_log/1.parquet", "@eaDir/a.jsonl", "$RECYCLE.BIN/a.txt", "lost+found/a.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\x00\xff no text")
    source = Documents(tmp_path)
    assert source.fingerprint == once and len(everything(source, "train")) == 98
    assert f"note: 14 files or folders are left out of {tmp_path}: hidden, a system's, " in capsys.readouterr().err


def test_files_of_other_kinds_are_left_out_and_said(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", [dict(text=t) for t in TEXTS[:100]])
    for name in ("b.jsonl.gz", "c.txt.zst", "d.csv"):
        (tmp_path / name).write_bytes(b"x")
    assert len(everything(Documents(tmp_path), "train")) == 98
    wanted = "note: 3 files or folders are left out of {}: not .parquet, .jsonl, .txt (b.jsonl.gz, …)\n"
    assert capsys.readouterr().err == wanted.format(tmp_path)


def test_what_a_user_means_is_not_passed_over(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [dict(text=t) for t in TEXTS[:100]])
    (tmp_path / "b.txt").symlink_to(tmp_path / "none.txt")
    with pytest.raises(UserError, match="b.txt is a link to nothing"):
        Documents(tmp_path)
    (tmp_path / "b.txt").unlink()
    os.mkfifo(tmp_path / "b.txt")
    with pytest.raises(UserError, match="b.txt is no file"):
        Documents(tmp_path)
    with pytest.raises(UserError, match="neither a file nor a folder"):
        Documents(tmp_path / "b.txt")


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", [dict(text=t) for t in TEXTS[:100]])
    (tmp_path / "closed").mkdir()
    plain = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="closed"):
        Documents(tmp_path)
    (tmp_path / "closed").rename(tmp_path / ".closed")
    assert len(everything(Documents(tmp_path), "train")) == 98


def test_links_are_followed_and_a_file_is_read_once(tmp_path, capsys):
    folder, other = tmp_path / "data", tmp_path / "other"
    for place in (folder, other):
        place.mkdir()
    write_jsonl(folder / "a.jsonl", [dict(text=t) for t in TEXTS[:100]])
    write_jsonl(other / "b.jsonl", [dict(text=t) for t in TEXTS[100:200]])
    (folder / "more").symlink_to(other)
    (folder / "loop").symlink_to(folder)
    (folder / "again.jsonl").symlink_to(folder / "a.jsonl")
    os.link(folder / "a.jsonl", folder / "twice.jsonl")
    assert len(everything(Documents(folder), "train")) == 196
    assert "2 files or folders are left out" in capsys.readouterr().err


VALIDATION = ("val.jsonl", "VAL_0.jsonl", "valid-1.jsonl", "validation-00000-of-00001.jsonl", "val/b.jsonl",
              "data/validation/b.jsonl", "val2.jsonl", "val.en.jsonl")  # fmt: skip


@pytest.mark.parametrize("name", VALIDATION)
def test_what_is_called_validation_validates(tmp_path, name):
    write_jsonl(tmp_path / "a.jsonl", [dict(text=t) for t in TEXTS[:100]])
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(tmp_path / name, [dict(text=TEXTS[100])])
    assert everything(Documents(tmp_path), "val") == [TEXTS[100]]
    write_jsonl(tmp_path / name, [exchange(1)])
    write_jsonl(tmp_path / "a.jsonl", [exchange(0)] * 3)
    assert len(everything(ConversationFiles(tmp_path), "train")) == 3


ODD = [
    b"a\nb.jsonl",
    b"\xff\xfe.jsonl",
    b"\x1b[2J.jsonl",
    b" .jsonl",
    b"-rf.jsonl",
    b"'\"$(x)`.jsonl",
    b"a\xe2\x80\xa8.JSONL",
]


@pytest.mark.parametrize("name", ODD)
def test_a_file_may_be_called_anything(tmp_path, name, capsys):
    path = tmp_path / os.fsdecode(name)
    write_jsonl(path, [dict(text=t) for t in TEXTS[:100]])
    (tmp_path / os.fsdecode(name + b"~")).write_text("left out")
    assert len(everything(Documents(tmp_path), "train")) == len(everything(Documents(path), "train")) == 98
    path.write_text("{")

    def main():
        Documents(tmp_path)

    assert tiny.called(main) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 3 and not any(letter in said for letter in "\x1b\u2028"), said


def test_thousands_of_files_are_sorted_out_at_once(tmp_path, monkeypatch):
    """Comparing each with each took longer than reading them."""
    for i in range(400):
        write_jsonl(tmp_path / f"{'val' if i % 2 else 'a'}_{i}.jsonl", [dict(text=f"text {i}")])
    compared, plain = [], type(tmp_path).__eq__
    monkeypatch.setattr(type(tmp_path), "__eq__", lambda self, other: compared.append(1) or plain(self, other))
    source = Documents(tmp_path)
    assert source.units("train") == source.units("val") == 200 and len(compared) < 10_000


@pytest.mark.parametrize("name", ["Valencia.jsonl", "values.jsonl", "valéry.jsonl", "valley/a.jsonl", "eval.jsonl"])
def test_what_begins_with_these_letters_otherwise_does_not(tmp_path, name):
    write_jsonl(tmp_path / "a.jsonl", [dict(text=t) for t in TEXTS[:100]])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write_jsonl(tmp_path / name, [dict(text=TEXTS[100])])
    source = Documents(tmp_path)
    assert len(everything(source, "val")) == 3 and len(everything(source, "train")) == 98


def test_the_path_above_the_data_names_no_split(tmp_path):
    folder = tmp_path / "val"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [dict(text=t) for t in TEXTS[:100]])
    assert len(everything(Documents(folder), "train")) == len(everything(Documents(folder / "a.jsonl"), "train")) == 98


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.txt"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    path = bad(tmp_path, name, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(UserError, match="a pointer of git LFS"):
        Documents(path)


# ---- text without blank lines, and text that is none


LONG = {"lines": "\n".join(f"name{i}" for i in range(20_000)), "old Mac": "x" * 3000 + "\r" + "y" * 200_000,
        "words": "word " * 60_000, "nothing": "é春🙂" * 60_000}  # fmt: skip


@pytest.mark.parametrize("kind", LONG)
def test_long_paragraphs_are_cut_and_nothing_is_lost(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("nanochat.data.documents.TEXT_UNIT", 10_001)
    path = bad(tmp_path, "a.txt", LONG[kind].encode())
    source = Documents(path)
    train, val = everything(source, "train"), everything(source, "val")
    assert max(map(len, train + val)) <= 8000 and len(val) == -(-(len(val) + len(train)) // 50)
    if kind in ("lines", "words"):
        assert sum(document[-1] in "\n " for document in train + val) >= 0.8 * len(train + val)
    assert sum(map(len, train + val)) == len(LONG[kind])


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-16", "utf-32", "nul"])
def test_what_is_no_text_is_named(tmp_path, encoding):
    text = "one\n\ntwo\n" * 3
    content = (text + "\0" * 100).encode() if encoding == "nul" else text.encode(encoding)
    line = 10 if encoding == "nul" else 1
    with pytest.raises(UserError, match=f"line {line}: .*UTF-16"):
        Documents(bad(tmp_path, "a.txt", content))


def test_a_key_that_is_there_twice_is_named(tmp_path):
    path = bad(tmp_path, "a.jsonl", GOOD * 5 + '{"text": "a", "text": "b"}\n')
    with pytest.raises(UserError, match='line 6: .*"text" twice'):
        Documents(path)
    twice = f'{{"messages": [], "messages": {json.dumps(exchange(0))}}}\n'
    with pytest.raises(UserError, match='line 1: .*"messages" twice'):
        ConversationFiles(bad(tmp_path, "b.jsonl", twice))
    path = bad(tmp_path, "c.jsonl", GOOD * 5 + '{"text": "\\"text\\": \\"text\\"", "more": {"text": "b"}}\n')
    assert len(everything(Documents(path), "train")) == 5


def test_a_byte_order_mark_before_a_text_is_not_of_it(tmp_path):
    texts = ["\ufeffone", "\ufeff\ufefftwo", "\ufeff"] + ["x"] * 3
    for path in (
        write_jsonl(tmp_path / "a.jsonl", [dict(text=t) for t in texts]), write_parquet(tmp_path / "a.parquet", texts)
    ):  # fmt: skip
        source = Documents(path)
        assert everything(source, "val") + everything(source, "train") == ["one", "two", "x", "x", "x"]
    answer = dict(role="assistant", content=[dict(type="text", text="\ufeffa")])
    row = [dict(role="user", content="\ufeffq"), answer]
    found = everything(ConversationFiles(write_jsonl(tmp_path / "b.jsonl", [row, row])), "train")
    assert "\ufeff" not in str(found) and found[0]["messages"][0]["content"] == "q"


def test_a_folder_may_itself_be_hidden_and_a_file_that_is_named_is_read(tmp_path, capsys):
    folder = tmp_path / ".cache" / "corpus"
    folder.mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", [dict(text=t) for t in TEXTS[:100]])
    write_jsonl(folder / ".b.jsonl", [dict(text=t) for t in TEXTS[:3]])
    assert len(everything(Documents(folder), "train")) == 98
    assert len(everything(Documents(folder / ".b.jsonl"), "train")) == 2


# ---- what encodings do


def test_byte_order_marks_are_no_text(tmp_path):
    path = bad(tmp_path, "a.jsonl", b"\xef\xbb\xbf" + b'{"text": "one"}\r\n\xef\xbb\xbf{"text": "two"}\n')
    assert everything(Documents(path), "val") + everything(Documents(path), "train") == ["one", "two"]
    path = bad(tmp_path, "a.txt", "\ufeff" + "one".ljust(4000, ".") + "\n\n" + "\ufefftwo".ljust(4000, "."))
    source = Documents(path)
    assert "\ufeff" not in "".join(everything(source, "val") + everything(source, "train"))
    assert everything(source, "train")[0].startswith("two")
    path = bad(tmp_path, "chat.jsonl", b"\xef\xbb\xbf" + "".join(json.dumps(exchange(i)) + "\n" for i in "ab").encode())
    assert len(everything(ConversationFiles(path), "train")) == 1


@pytest.mark.parametrize("before", ["\n", "\r\n\t", " ", "\ufeff\n \ufeff \ufeff", "\u3000\n", "\x0b\n\f\n"])
@pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet", "chat"])
def test_marks_after_blanks_are_no_text_either(tmp_path, kind, before):
    before += "\ufeff"
    if kind == "chat":
        exchanges = json.dumps(exchange(0)), json.dumps([dict(role="user", content=before + "q"), exchange(1)[1]])
        path = bad(tmp_path, "a.jsonl", (before + "\n".join(exchanges)).encode())
        assert everything(ConversationFiles(path), "train")[0]["messages"][0]["content"] == "q"
        return
    if kind == "jsonl":
        path = bad(tmp_path, "a.jsonl", (before + GOOD + json.dumps(dict(text=before + "two"))).encode())
    elif kind == "txt":
        path = bad(tmp_path, "a.txt", (before + "one".ljust(4000, ".") + "\n\n" + "two".ljust(4000, ".")).encode())
    else:
        path = write_parquet(tmp_path / "a.parquet", [before + "one", before + "two"])
    texts = everything(Documents(path), "val") + everything(Documents(path), "train")
    assert [text.strip(". \r\n\t\u3000\x0b\f") for text in texts] == ["one", "two"]


NOTHING = ["\u200b", "\u200b \u2060\n\u00ad", "\ufeff \ufeff", "\u3164\u115f", "\u2800", "\x07\x1b", "\u202e\u200f"]


@pytest.mark.parametrize("nothing", NOTHING)
def test_a_text_of_which_nothing_is_seen_is_blank(tmp_path, nothing):
    texts = ["one", nothing, f"{nothing}two", nothing, *(["x"] * 60)]
    paths = [write_jsonl(tmp_path / "a.jsonl", [dict(text=text) for text in texts])]
    paths.append(write_parquet(tmp_path / "a.parquet", texts))
    for path in paths:
        found = everything(Documents(path), "val") + everything(Documents(path), "train")
        assert len(found) == 62 and [text for text in found if "two" in text] and nothing not in found
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="nothing but blank texts"):
        Documents(write_jsonl(tmp_path / "b" / "b.jsonl", [dict(text=nothing)] * 3))


def test_zero_bytes_are_no_blank_line(tmp_path):
    with pytest.raises(UserError, match="line 3: not valid JSON"):
        Documents(bad(tmp_path, "a.jsonl", (GOOD * 2 + "\0" * 100 + "\n").encode()))


PACKERS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda text: b"\x28\xb5\x2f\xfd" + text,
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
@pytest.mark.parametrize("packer", PACKERS)
def test_a_packed_file_is_named(tmp_path, name, packer):
    path = bad(tmp_path, name, PACKERS[packer](GOOD.encode() * 10))
    with pytest.raises(UserError, match="is packed, .*unpack it first: "):
        Documents(path)
    if name == "a.jsonl":
        with pytest.raises(UserError, match="is packed"):
            ConversationFiles(path)


DIGITS, DEEP = "1" * 5000, "[" * 5000 + "]" * 5000
STRANGE = {
    '{"text": "half \\ud83d of it"}': "half a surrogate pair",
    '{"text": "the other \\uDE00 half"}': "half a surrogate pair",
    f'{{"text": "x", "n": {DIGITS}}}': "more digits than Python reads",
    f'{{"text": "x", "n": {DEEP}}}': "nested too deep",
    DEEP: "nested too deep",
    "[" * 900 + "]" * 900: 'a string "text"',
}


@pytest.mark.parametrize("line", STRANGE, ids=range(len(STRANGE)))
def test_strange_json_is_named_by_line(tmp_path, line):
    path = bad(tmp_path, "a.jsonl", GOOD * 600 + line + "\n")
    with pytest.raises(UserError, match=f"line 601: .*{STRANGE[line]}"):
        Documents(path)


@pytest.mark.parametrize(
    "line, complaint",
    [
        (json.dumps(exchange("\ud83d")), "half a surrogate pair"),
        (json.dumps([dict(role="system", content="\udc00"), *exchange(1)]), "half a surrogate pair"),
        (
            json.dumps([exchange(1)[0], dict(role="assistant", content=[dict(type="python", text="\ud800")])]),
            "surrogate",
        ),
        (f'{{"messages": {DEEP}}}', "nested too deep"),
        (f'{{"messages": [{DIGITS}]}}', "more digits"),
        ("[" * 900 + "]" * 900, "wanted an object with role and content"),
    ],
)
def test_strange_conversations_are_named_by_line(tmp_path, line, complaint):
    path = bad(tmp_path, "chat.jsonl", json.dumps(exchange(0)) + "\n" + line + "\n")
    with pytest.raises(UserError, match=f"line 2: .*{complaint}"):
        ConversationFiles(path)


def test_whole_surrogate_pairs_are_characters(tmp_path):
    path = bad(tmp_path, "a.jsonl", '{"text": "\\ud83d\\ude00"}\n{"text": "b", "other": "\\ud83d"}\n')
    assert everything(Documents(path), "val") == ["😀"] and everything(Documents(path), "train") == ["b"]


# ---- parquet


KINDS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]


@pytest.mark.parametrize("kind", [*KINDS, "categories"], ids=str)
def test_strings_of_any_kind(tmp_path, kind):
    texts = pa.array(TEXTS[:100] + ["", "é春🙂"])
    column = texts.dictionary_encode() if kind == "categories" else texts.cast(kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=30)
    source = Documents(tmp_path / "a.parquet")
    assert sorted(everything(source, "val") + everything(source, "train")) == sorted([*TEXTS[:100], "é春🙂"])


@pytest.mark.parametrize("kind", [*KINDS, "categories"], ids=str)
@pytest.mark.parametrize("wrong, complaint", [(b"\xff\xfe", "UTF-?8"), (None, "the text is null")])
def test_what_is_wrong_in_a_late_row_group_is_found_before_training(tmp_path, kind, wrong, complaint):
    column = pa.array([b"good"] * 100 + [wrong] + [b"good"] * 20, pa.binary())
    if kind == "categories":
        bytes_ = pa.array([b"good", wrong or b"x"], pa.binary())
        words = pa.Array.from_buffers(pa.string(), 2, bytes_.buffers())
        places = [0] * 100 + [1 if wrong else None] + [0] * 20
        column = pa.DictionaryArray.from_arrays(pa.array(places, pa.int32()), words)
    elif kind in (pa.string(), pa.large_string()):
        column = column.cast(pa.binary() if kind == pa.string() else pa.large_binary())
        column = pa.Array.from_buffers(kind, len(column), column.buffers())
    elif kind == pa.string_view():
        column = column.cast(pa.binary_view())
        column = pa.Array.from_buffers(kind, len(column), column.buffers())
    else:
        column = column.cast(kind)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column}), path, row_group_size=50)
    with pytest.raises(UserError, match=f"row 0 of row group 2: .*{complaint}"):
        Documents(path)


def test_a_null_that_a_shard_notes_is_found_without_reading_it(tmp_path):
    path = tmp_path / "shard.parquet"
    texts = pa.array(["good"] * 100 + [None])
    pq.write_table(pa.table({"other": texts, "text": texts}), path, row_group_size=50)
    good = write_parquet(tmp_path / "good.parquet", TEXTS[:10])
    with pytest.raises(UserError, match="row group 2: a text is null"):
        Documents(tmp_path, train=[path], val=[good])
    other = write_parquet(tmp_path / "other.parquet", TEXTS[:12])
    assert len(everything(Documents(tmp_path, train=[other], val=[good]), "train")) == 12


def test_two_text_columns_are_named(tmp_path):
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="several columns called `text`"):
        Documents(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("none.txt", None, "does not exist"),
        ("a.csv", "text\nhello", "not of a kind"),
        ("a.jsonl", "", "is empty"),
        ("a.txt", "\n \n\n", "blank texts"),
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
