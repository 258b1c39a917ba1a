"""What the chat stages learn from on the Hub's data: how much of what, in which order, and nothing that a test asks."""

import hub_fixture
import pytest
import tiny

from nanochat.data import choose, hub
from nanochat.errors import UserError
from nanochat.tasks import TASKS, rows, stage_mixtures
from nanochat.tasks.mixture import InOrder, Mixture
from nanochat.tasks.rows import key


@pytest.fixture
def made(monkeypatch, tmp_path):
    """A mirror with everything, two rows of each test split repeated in training, by another hand."""
    root = tmp_path / "hub"
    monkeypatch.setenv("NANOCHAT_HUB_ROOT", str(root))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for split, count in (("train", 40), ("test", 6)):
        hub_fixture.smoltalk(root, split, count)
        hub_fixture.gsm8k(root, split, count)
        for subset in ("ARC-Easy", "ARC-Challenge"):
            hub_fixture.arc(root, subset, split, hub_fixture.arc_rows(f"{subset} {split}", count))
    asked = hub_fixture.mmlu_rows("test", 6)
    stolen = [dict(row, question=row["question"].upper().replace("?", " ")) for row in asked[:2]]
    of_arc = [dict(row, question="ARC-Challenge test  science 3?") for row in asked[:1]]
    hub_fixture.mmlu(root, "test", asked)
    hub_fixture.mmlu(root, "auxiliary_train", hub_fixture.mmlu_rows("auxiliary_train", 20) + stolen + of_arc)
    return root


def rows_of(source, split="train") -> list:
    return [row for unit in range(source.units(split)) for row in source.load(split, unit)]


def asked_by(rows) -> list[str]:
    return [message["content"] for row in rows for message in row["messages"] if message["role"] == "user"]


# ---- putting together


def test_sequences_one_after_the_other():
    joined = InOrder([list("abc"), [], list("de"), list("f")])
    assert list(joined) == list("abcdef") and len(joined) == 6
    with pytest.raises(IndexError):
        joined[6]
    assert list(InOrder([])) == []


def test_a_mixture_has_every_row_as_often_as_it_has_epochs():
    a, b = [dict(messages=[f"a{i}"]) for i in range(300)], [dict(messages=["b"])]
    mixed = Mixture("m", dict(a=(a, 1), b=(b, 5)), dict(a=(a[:3], 1)))
    rows = [row["messages"][0] for row in rows_of(mixed)]
    assert sorted(rows) == sorted([*(f"a{i}" for i in range(300)), *"bbbbb"]) and rows[:300] != sorted(rows)[:300]
    assert mixed.units("train") == 3 and len(rows_of(mixed, "val")) == 3
    again = Mixture("m", dict(a=(a, 1), b=(b, 5)), dict(a=(a[:3], 1)))
    assert rows_of(again) == rows_of(mixed) and again.fingerprint == mixed.fingerprint
    others = (dict(a=(a, 1), b=(b, 4)), dict(a=(a[:-1], 1), b=(b, 5)), dict(a=(a, 1), b=([dict(messages=["c"])], 5)))
    assert len({Mixture("m", parts, {}).fingerprint for parts in others} | {mixed.fingerprint}) == 4


# ---- the recipes


def test_the_recipes_are_upstreams():
    """Row counts of nanochat's mid-training and SFT of October 2025, and of its SFT today (design: the stages)."""
    sizes = {
        name: {key: part.rows * part.epochs for key, part in recipe.data_sets.items()}
        | {key: rows for key, (_, rows) in recipe.made.items()}
        for name, recipe in (
            ("mid", stage_mixtures.MID),
            ("sft", stage_mixtures.SFT),
            ("alone", stage_mixtures.SFT_ALONE),
        )
    }
    assert {key: round(rows / 1000) for key, rows in sizes["mid"].items()} == dict(
        smoltalk=460, mmlu=100, gsm8k=7, simple_spelling=200, spellingbee=80
    )
    assert sizes["sft"] == dict(
        arc_easy=2251, arc_challenge=1119, gsm8k=7473, smoltalk=10_000, simple_spelling=300, spellingbee=300
    )
    assert sizes["alone"] == dict(smoltalk=460_341, mmlu=3 * 99_842, gsm8k=4 * 7473)
    assert (
        848_000 <= sum(sizes["mid"].values()) + 2000 <= 851_000
        and 22_000 <= sum(sizes["sft"].values()) + 1000 <= 24_000
    )


@pytest.mark.parametrize("stage, after", [("mid", "base"), ("sft", "mid"), ("sft", "base")])
def test_no_question_of_a_test_is_trained(made, stage, after):
    source, _ = choose.conversations("hub", stage, after=after)
    trained = {key(text) for text in asked_by(rows_of(source))}
    questions = {
        name: {key(q.messages[-1]["content"]) for q in TASKS[name].all_questions()}
        for name in ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "spellingbee", "simple_spelling")
    }
    assert not [name for name, asked in questions.items() if asked & trained]
    assert not [text for text in asked_by(rows_of(source)) if "test number" in text.lower() or "test  sci" in text]


def test_mid_training(made):
    source, notes = choose.conversations("hub", "mid")
    texts = asked_by(rows_of(source))
    assert sum("auxiliary_train" in text for text in texts) == 20
    assert sum(text.startswith("train question") for text in texts) == 40 == sum("and 2?" in text for text in texts)
    assert [note for note in notes if note.startswith("mmlu: 3 of 23 training rows ask what a test split asks")]
    share = 100 / (460_341 + 99_842 + 7_473)
    assert [note for note in notes if "simple_spelling, spellingbee are cut alike" in note]
    made_rows = round(200_000 * share) + round(80_000 * share)
    assert len(rows_of(source)) == 100 + 2000 + made_rows
    assert sorted(asked_by(rows_of(source, "val"))) == [f"test question {i}" for i in range(6)]
    tokenizer = tiny.tokenizer()
    assert all(any(tokenizer.render(row)[1]) for row in rows_of(source)[:300])


def test_sft_takes_a_sample_of_smoltalk_and_is_the_same_every_time(made, monkeypatch):
    few = stage_mixtures.DataSet(stage_mixtures.SMOLTALK.load, 10)
    data_sets = {**stage_mixtures.SFT.data_sets, "smoltalk": few}
    monkeypatch.setattr(
        stage_mixtures, "SFT", stage_mixtures.Recipe(data_sets, stage_mixtures.SFT.made, identity_epochs=1)
    )
    source, _ = choose.conversations("hub", "sft", after="mid")
    texts = asked_by(rows_of(source))
    drawn = [int(text.split()[-1]) for text in texts if text.startswith("train question")]
    assert len(set(drawn)) == 10 and sorted(drawn) != list(range(10))
    assert sum("ARC-Easy train" in text for text in texts) == 40 and not [t for t in texts if "auxiliary" in t]
    again, _ = choose.conversations("hub", "sft", after="mid")
    assert asked_by(rows_of(again)) == texts and again.fingerprint == source.fingerprint


def test_sft_without_mid_training(made):
    source, notes = choose.conversations("hub", "sft", after="base")
    texts = asked_by(rows_of(source))
    assert sum("auxiliary_train" in text for text in texts) == 60 and sum("and 2?" in text for text in texts) == 160
    assert not [text for text in texts if "ARC" in text] and not [note for note in notes if "cut" in note]


def test_what_is_missing_is_left_out_and_said(made):
    for path in (made / "cais").rglob("*.parquet"):
        path.unlink()
    for path in (made / "allenai").rglob("train-*.parquet"):
        path.unlink()
    _, notes = choose.conversations("hub", "sft", after="mid")
    assert [note.split(":")[0] for note in notes[:2]] == ["arc_easy is left out", "arc_challenge is left out"]
    source, notes = choose.conversations("hub", "mid")
    assert notes[0].startswith("mmlu is left out: the mirror has no auxiliary_train") and "mmlu" not in source.name
    for path in (made / "HuggingFaceTB").rglob("train-*.parquet"):
        path.unlink()
    with pytest.raises(UserError, match="no train-.*smol-smoltalk"):
        choose.conversations("hub", "mid")


@pytest.mark.parametrize("what", [("cais/mmlu", "all", "auxiliary_train"), ("allenai/ai2_arc", "ARC-Easy", "test")])
def test_the_mixture_does_not_depend_on_the_networks_luck(made, monkeypatch, what):
    """Or a rank would train on other rows than the others, or a model on questions that it is graded on."""
    load = hub.dataset

    def broken(*split):
        if split == what:
            raise UserError(f"{split[0]} could not be loaded")
        return load(*split)

    monkeypatch.setattr(hub, "dataset", broken)
    with pytest.raises(UserError, match=f"{what[0]} could not be loaded"):
        choose.conversations("hub", "mid")


def test_malformed_rows_are_passed_over_and_said(made, capsys):
    rows.note_malformed.cache_clear()
    user, assistant = (lambda text: dict(role="user", content=text)), dict(role="assistant", content="yes")
    talks = [[user("a"), assistant], [user("b"), user("c")], [user(None), assistant], [user("d"), assistant]]
    for split in ("train", "test"):
        hub_fixture.write(made, "HuggingFaceTB/smol-smoltalk", "data", split, [dict(messages=talk) for talk in talks])
    sound = hub_fixture.mmlu_rows("auxiliary_train", 5)
    bad = [dict(answer=7), dict(question=None), dict(choices=["one"]), dict(choices=None)]
    hub_fixture.mmlu(made, "auxiliary_train", sound + [dict(sound[0], **change) for change in bad])
    sums = [dict(question="train: 1 and 2?", answer="#### 3"), dict(question="?", answer=None)]
    hub_fixture.write(made, "openai/gsm8k", "main", "train", sums)
    source, _ = choose.conversations("hub", "mid")
    assert sorted(asked_by(rows_of(source, "val"))) == ["a", "d", "d", "d"]  # as many rows as there were
    assert {"a", "d"} < (asked := set(asked_by(rows_of(source)))) and not {"b", "c", None} & asked
    said = capsys.readouterr().err
    assert said.count("smoltalk, test is malformed (message 2 is from 'user'") == 1
    assert "a row of mmlu, train is malformed (its answer is 7, wanted 0 to 3): the next is taken for it" in said
    assert "gsm8k, train is malformed (its answer is None, wanted a text)" in said

    hub_fixture.write(made, "HuggingFaceTB/smol-smoltalk", "data", "test", [dict(other=1)])
    with pytest.raises(UserError, match=r"none of the rows of smoltalk, test is a conversation"):
        choose.conversations("hub", "mid")


# ---- the mirror


def test_the_mirrors_arc_is_never_trained_on(shared, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_HUB_ROOT", str(shared / "data" / "hub"))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    source, notes = choose.conversations("hub", "sft", after="mid")
    for name in ("arc_easy", "arc_challenge"):
        assert [note for note in notes if note.startswith(f"{name}: 400 of 400 training rows ask")]
    texts = {key(text) for text in asked_by(rows_of(source))}
    for name in ("arc_easy", "arc_challenge", "gsm8k"):
        assert not texts & {key(q.messages[-1]["content"]) for q in TASKS[name].all_questions()}
    assert len(rows_of(source)) == 950 + 7473 + 2 * round(300 * 8423 / 20_843) + 1000
    mid, notes = choose.conversations("hub", "mid")
    assert notes[0].startswith("mmlu is left out: the mirror has no auxiliary_train")
    made_rows = round(200_000 * 8423 / 567_656) + round(80_000 * 8423 / 567_656)
    assert len(rows_of(mid)) == 950 + 7473 + made_rows + 2000
