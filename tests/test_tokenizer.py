import json

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.errors import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer, check_conversation

TOKENIZER = tiny.tokenizer()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_text_comes_back_from_its_ids(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.sampled_from(SPECIAL_TOKENS), st.text(max_size=10))
def test_a_user_cannot_type_a_special_token(name, text):
    ids = TOKENIZER.encode(text + name + text)
    assert max(ids) < len(TOKENIZER.merges)


def test_special_tokens_follow_the_merges_in_their_order():
    first = len(TOKENIZER.merges)
    assert [TOKENIZER.special[name] for name in SPECIAL_TOKENS] == list(range(first, first + 9))
    assert TOKENIZER.vocab_size == 300 == first + 9


def test_numbers_are_split_by_two_digits_and_words_keep_their_space():
    text = "12345 dog"
    trained = Tokenizer.train([text] * 50, 270)  # merges enough to make each pre-token one token
    assert [trained.decode([token]) for token in trained.encode(text)] == ["12", "34", "5", " dog"]


def test_documents_are_encoded_alike_by_threads_and_without():
    tokenizer = tiny.tokenizer()
    short, long = tiny.sentences(20), [" ".join(tiny.sentences(100, seed)) for seed in range(3)]
    assert min(map(len, long)) > 2000 > max(map(len, short))
    for texts in ([], short, long, short + long, ["<|bos|>", ""]):
        assert tokenizer.encode_documents(texts) == [[tokenizer.bos, *tokenizer.encode(text)] for text in texts]


def test_token_bytes_sum_to_the_text_and_leave_out_specials():
    text = "the small dog, naïve"
    sizes = TOKENIZER.token_bytes()
    assert sizes[TOKENIZER.encode(text)].sum() == len(text.encode())
    assert sizes[-9:].sum() == 0


def test_saved_as_json_and_loaded_the_same(tmp_path):
    TOKENIZER.save(tmp_path)
    assert isinstance(json.loads((tmp_path / "tokenizer.json").read_text()), dict)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == TOKENIZER.fingerprint
    assert again.encode("the red house 42") == TOKENIZER.encode("the red house 42")


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"pattern": 1}'])
def test_a_damaged_file_is_named(tmp_path, damage):
    TOKENIZER.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(UserError, match="tokenizer.json"):
        Tokenizer.load(tmp_path)


def test_training_twice_gives_the_same_merges():
    assert tiny.tokenizer().fingerprint == TOKENIZER.fingerprint


def test_vocabulary_beyond_the_text_is_refused_with_what_is_possible():
    with pytest.raises(
        UserError,
        match=r"of [\d,]+ only, not 5,000; give more text, or scripts.tok_train a --vocab-size of \d+ or less",
    ):
        Tokenizer.train(["one two three"], 5000)
    with pytest.raises(UserError, match="at least 265"):
        Tokenizer.train(["one two three"], 200)


# ---- conversations


def test_rendering_and_mask():
    parts = [
        dict(type="text", text="hm "),
        dict(type="python", text="1+2"),
        dict(type="python_output", text="3"),
        dict(type="text", text="3."),
    ]
    conversation = dict(messages=[dict(role="user", content="add"), dict(role="assistant", content=parts)])
    ids, mask = TOKENIZER.render(conversation)
    special = {token: name[2:-2] for name, token in TOKENIZER.special.items()}
    shown = [(special.get(i) or TOKENIZER.decode([i]), m) for i, m in zip(ids, mask)]
    merged = []
    for text, m in shown:
        if merged and text not in special.values() and merged[-1][0] not in special.values() and merged[-1][1] == m:
            merged[-1] = (merged[-1][0] + text, m)
        else:
            merged.append((text, m))
    assert merged == [
        ("bos", 0),
        ("user_start", 0),
        ("add", 0),
        ("user_end", 0),
        ("assistant_start", 0),
        ("hm ", 1),
        ("python_start", 1),
        ("1+2", 1),
        ("python_end", 1),
        ("output_start", 0),
        ("3", 0),
        ("output_end", 0),
        ("3.", 1),
        ("assistant_end", 1),
    ]


def test_a_system_message_joins_the_first_user_message():
    turn = [dict(role="user", content="u"), dict(role="assistant", content="a")]
    with_system = TOKENIZER.render([dict(role="system", content="s"), *turn])
    joined = TOKENIZER.render([dict(role="user", content="s\n\nu"), turn[1]])
    assert with_system == joined


def test_completion_ends_with_assistant_start():
    ids = TOKENIZER.render_for_completion([dict(role="user", content="hi")])
    assert ids[0] == TOKENIZER.bos and ids[-1] == TOKENIZER.special["<|assistant_start|>"]


@pytest.mark.parametrize(
    "conversation, complaint",
    [
        ({}, "list of messages"),
        ([], "list of messages"),
        ("hello", "list of messages"),
        ([dict(role="user")], "role and content"),
        (["hello"], "role and content"),
        ([dict(role="assistant", content="a")], "should be from 'user'"),
        ([dict(role="user", content="a"), dict(role="user", content="b")], "alternate"),
        ([dict(role="system", content="s")], "alone"),
        ([dict(role="system", content=1), dict(role="user", content="a")], "system message"),
        ([dict(role="user", content=["a"])], "wanted a string"),
        ([dict(role="user", content="a"), dict(role="assistant", content=3)], "wanted a string"),
        ([dict(role="user", content="a"), dict(role="assistant", content=[dict(type="image", text="")])], "a part"),
    ],
)
def test_a_malformed_conversation_is_told_apart(conversation, complaint):
    with pytest.raises(ValueError, match=complaint):
        check_conversation(conversation)


@pytest.mark.parametrize("blank", [" ", "\t", "\u00a0", "\n \n", "\x1c"])
def test_a_million_blanks_do_not_end_it(blank):
    """The splitter's stack is full then, and what it raises is no Exception."""
    made, text = tiny.tokenizer(), "the house" + blank * 1_200_000 + "the dog"
    ids = made.encode(text)
    assert made.decode(ids) == text
    assert made.encode_documents(["the " * 3000, text])[1] == [made.bos, *ids]
    assert made.encode_documents(["the", "a"]) == [[made.bos, *made.encode(word)] for word in ("the", "a")]


def test_nor_the_training():
    assert Tokenizer.train([" " * 1_200_000, *tiny.sentences(200)], 300).vocab_size == 300
