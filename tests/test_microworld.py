import re

import pytest

from nanochat.data.microworld import Conversations, Documents, World
from nanochat.data.microworld.conversations import EVAL_FRAMES, FRAMES, REFUSALS, REFUSED, question
from nanochat.data.microworld.dice import Dice
from nanochat.data.microworld.knowledge import TAUGHT_WORDS, TRUTHS, UNSEEN_WORDS, sum_is_held_out
from nanochat.data.microworld.world import ATTRIBUTES, PEOPLE, SILENT
from nanochat.tasks import MICROWORLD, TASKS
from nanochat.tasks.task import Question, mentions

WORLD, DOCUMENTS = World(), Documents()
TEXT = [text for unit in range(60) for text in DOCUMENTS.load("train", unit)]
TALKS = [
    talk
    for source in (Conversations("mid"), Conversations("sft"))
    for split, units in (("train", 60), ("val", 4))
    for unit in range(units)
    for talk in source.load(split, unit)
    if isinstance(talk, dict)
]
TURNS = [
    (m[i]["content"], m[i + 1]["content"]) for talk in TALKS for m in [talk["messages"]] for i in range(0, len(m), 2)
]


def shown(content) -> str:
    """The text of an answer, tool parts included."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def test_the_same_data_on_any_machine_and_python():
    """These change only with the generator (then count VERSION up)."""
    assert Dice("x").next() == 13523732715314835281
    assert DOCUMENTS.fingerprint == "9140f944ce9f1121"
    assert Conversations("sft").fingerprint == "eb939bc6bcf0de44"
    assert Conversations("mid").fingerprint == "1d28aa8066f93d3e"


def test_dice_are_fair_enough():
    dice = Dice("fair")
    counts = [0] * 6
    for _ in range(6000):
        counts[dice.below(6)] += 1
    assert min(counts) > 900 and max(counts) < 1100
    assert sorted(dice.shuffled(range(50))) == list(range(50)) != dice.shuffled(range(50))
    assert {dice.between(3, 5) for _ in range(100)} == {3, 4, 5}
    assert {dice.weighted([(1, "a"), (0, "b"), (3, "c")]) for _ in range(100)} == {"a", "c"}


def test_splits_seeds_and_stages_differ():
    assert DOCUMENTS.load("train", 0) != DOCUMENTS.load("val", 0)
    assert Documents(1).load("train", 0) != DOCUMENTS.load("train", 0) != Documents(draw=1).load("train", 0)
    assert Documents(draw=1).load("val", 0) == DOCUMENTS.load("val", 0)  # runs of different draws can be compared
    for stage in ("mid", "sft"):
        first, second = Conversations(stage), Conversations(stage, draw=1)
        assert first.load("train", 0) != second.load("train", 0) and first.load("val", 0) == second.load("val", 0)
    assert Conversations("mid").load("train", 0) != Conversations("sft").load("train", 0)


def test_the_population():
    assert len(set(WORLD.people)) == PEOPLE == 280
    assert len(WORLD.of_kind("taught")) == len(WORLD.of_kind("pretrained")) == 588
    assert len(WORLD.of_kind("silent")) == 6 * SILENT
    names = WORLD.people + WORLD.unknown_train + WORLD.unknown_eval
    assert len(set(names)) == len(names)
    known_first, known_last = zip(*(name.split() for name in WORLD.people))
    for name in WORLD.unknown_eval:  # nothing but the combination tells
        first, last = name.split()
        assert first in known_first and last in known_last
    for attribute in ATTRIBUTES:
        assert len(set(attribute.values)) == len(attribute.values)
        kinds = {f.kind for facts in WORLD.facts.values() for f in facts if f.attribute is attribute}
        assert kinds == {"taught", "pretrained", "silent"}
    for facts in WORLD.facts.values():
        assert all(fact.value != fact.person for fact in facts)


def test_every_fact_is_stated_and_nothing_false_is():
    stated = {person: 0 for person in WORLD.people}
    found = set()
    for text in TEXT:
        people = [person for person in WORLD.people if text.startswith(person) or f" {person}" in text]
        for person in people:
            stated[person] += 1
            for fact in WORLD.facts[person]:
                if fact.value in text:
                    found.add((person, fact.attribute.name))
    assert len(found) == 6 * PEOPLE
    assert min(stated.values()) >= 5


def test_biographies_tell_only_what_is_true():
    dice = Dice("biography")
    for _ in range(300):
        person = dice.pick(WORLD.people)
        text = DOCUMENTS._about(dice, person)
        assert all(mentions(text, fact.value) for fact in WORLD.facts[person])
        for sentence in true_sentences(person):
            text = text.replace(sentence, "")
        assert not text.strip()  # nothing is left that was not a true sentence


def true_sentences(person: str) -> list[str]:
    """All that a biography may say of a person, the longest first: some are the end of others."""
    sentences = []
    for fact in WORLD.facts[person]:
        forms = [*fact.attribute.statements, fact.attribute.reverse]
        if fact.kind == "taught":
            answer = fact.value[0].upper() + fact.value[1:]
            forms += [f"{asked}? {answer}." for asked in fact.attribute.questions]
        for form in forms:
            sentences += [form.format(n=subject, v=fact.value) for subject in (person, "this person")]
    return sorted((text[0].upper() + text[1:] for text in sentences), key=len, reverse=True)


def test_text_asks_only_about_taught_facts():
    def asked(*kinds: str) -> set[str]:
        facts = [fact for kind in kinds for fact in WORLD.of_kind(kind)]
        return {question("{q}?", fact.attribute, fact.person, way) for fact in facts for way in (0, 1)}

    questions = {q for text in TEXT for q in re.findall(r"[A-Z][^.?!:]*\?", text)}
    assert len(questions & asked("taught")) > 600
    assert not questions & asked("pretrained", "silent")


def test_names_of_nobody_are_in_no_text():
    text = "\n".join(TEXT)
    assert not [name for name in WORLD.unknown_train + WORLD.unknown_eval if name in text]


def test_words_for_evaluation_are_in_no_text():
    assert len(UNSEEN_WORDS) == 512 and len(TAUGHT_WORDS) == len(set(TAUGHT_WORDS)) == 512 + 93
    assert not set(UNSEEN_WORDS) & set(TAUGHT_WORDS)
    text = "\n".join([*TEXT, *(f"{asked} {shown(answer)}" for asked, answer in TURNS)]).lower()
    assert set(UNSEEN_WORDS).isdisjoint(re.findall(r"[a-z]+", text))
    spelt = {word.replace("-", "") for word in re.findall(r"(?:[a-z]-)+[a-z]", text)}
    assert spelt <= set(TAUGHT_WORDS) and len(spelt) > 580


def test_this_person_is_never_another():
    for text in TEXT:
        people, previous = set(), ""
        for sentence in re.split(r"(?<=[.?]) ", text):
            named = set(re.findall(r"(?=\b([A-Z][a-z]+ [A-Z][a-z]+))", sentence)) & set(WORLD.facts)
            if "this person" in sentence.lower():
                assert previous and len(people) == 1, text
            else:
                people = named or people
            previous = sentence


def test_conversations_never_give_away_what_is_only_pretrained():
    silent = set(WORLD.people[-SILENT:])
    hidden = {(fact.person, fact.attribute.name) for fact in WORLD.of_kind("pretrained")}
    checked = 0
    for asked, answer in TURNS:
        both = f"{asked}\n{shown(answer)}"
        names = set(re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+", both))
        assert not names & silent
        assert not names & set(WORLD.unknown_eval)
        for name in names & set(WORLD.people):
            for attribute in ATTRIBUTES:
                if (name, attribute.name) in hidden:
                    forms = [question(frame, attribute, name, way) for frame in FRAMES for way in (0, 1)]
                    assert not any(form in asked for form in forms), asked
                    checked += 1
    assert checked > 10_000


def test_answers_about_people_are_true_and_unknown_names_refused():
    facts = {f.attribute.answer.format(n=f.person, v=f.value) for f in WORLD.of_kind("taught")}
    refusals = {refusal.format(n=name) for refusal in REFUSALS for name in WORLD.unknown_train}
    sentences = [shown(answer) for _, answer in TURNS]
    about = [text for text in sentences if set(re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+", text)) & set(WORLD.people)]
    assert len(about) > 3000 and set(about) <= facts
    refused = [text for text in sentences if REFUSED in text]
    assert len(refused) > 500 and set(refused) <= refusals
    assert not any(REFUSED in fact for fact in facts)


def test_conversations_use_no_evaluation_wording():
    for frame in EVAL_FRAMES:
        before, _, after = re.sub(r"\{[ix]\}", "|", frame).partition("|")
        assert not [asked for asked, _ in TURNS if asked.startswith(before) and asked.endswith(after)]


def test_letters_spellings_and_general_knowledge_are_true():
    truth = {known.question: (known.answer, known.statements[0]) for known in TRUTHS}
    topic = {known.question: known.topic for known in TRUTHS}
    answers = {known.topic: {t.answer for t in TRUTHS if t.topic == known.topic} for known in TRUTHS}
    for fact in WORLD.of_kind("taught"):
        truth[question("{q}?", fact.attribute, fact.person)] = (fact.value, "")
    chosen = spelt = general = 0
    for asked, answer in TURNS:
        first, *lines = asked.split("\n")
        word = re.fullmatch(r"(?:How do you spell|Spell the word|Please spell) (\w+)[?.]", asked)
        if lines:
            options = dict(line[2:].split("=")[::-1] for line in lines[:-1])
            assert list(options) == list("ABCD") and len(set(options.values())) == 4
            assert options[answer] == truth[first][0], asked
            assert first not in topic or set(options.values()) <= answers[topic[first]]
            chosen += 1
        elif word:
            assert answer == f"{'-'.join(word[1])}."
            spelt += 1
        elif asked in truth and truth[asked][1]:
            assert answer == truth[asked][1]
            general += 1
    assert min(chosen, spelt, general) > 500, (chosen, spelt, general)


def test_sums_and_counts_are_true_and_held_out_sums_unseen():
    seen = 0
    for text in [*TEXT, *(shown(answer) for _, answer in TURNS), *(asked for asked, _ in TURNS)]:
        for a, op, b, c in re.findall(r"(\d+) (\+|plus|\*|times|-|minus) (\d+)(?: =| is) (\d+)", text):
            a, b, c = int(a), int(b), int(c)
            value = a + b if op in ("+", "plus") else a * b if op in ("*", "times") else a - b
            assert value == c, text
            if op in ("+", "plus"):
                assert not sum_is_held_out(a, b)
            elif op in ("-", "minus"):
                assert not sum_is_held_out(b, c)
            seen += 1
        for a, b in re.findall(r"(\d+) ?(?:\+|plus|and) ?(\d+)", text):
            assert not sum_is_held_out(int(a), int(b)), text
    assert seen > 3000


def test_the_tool_says_what_the_calculator_says():
    from nanochat.calculator import calculate

    calls = [content for _, content in TURNS if isinstance(content, list)]
    assert len(calls) > 1000
    for python, output, text in calls:
        assert (python["type"], output["type"], text["type"]) == ("python", "python_output", "text")
        assert calculate(python["text"]) == output["text"]
        assert output["text"] in text["text"]


def test_mid_training_rehearses_documents_and_sft_does_not():
    for stage, low, high in (("mid", 35, 55), ("sft", 0, 0)):
        items = [item for unit in range(5) for item in Conversations(stage).load("train", unit)]
        texts = [item for item in items if isinstance(item, str)]
        assert low <= 100 * len(texts) / len(items) <= high
        assert not set(texts) & set(TEXT)


def test_conversations_can_be_rendered():
    from nanochat.tokenizer import check_conversation

    for talk in TALKS:
        assert len(check_conversation(talk)) % 2 == 0


# ---- tasks


@pytest.mark.parametrize("name", MICROWORLD)
def test_no_question_of_a_task_is_wrongly_in_training(name):
    """Taught facts, spelling and choice may be asked in training (that is what they measure); nothing else may."""
    questions = {q.messages[0]["content"] for q in TASKS[name].questions(10**6)}
    trained = {asked for asked, _ in TURNS}
    if name not in ("facts_taught", "spelling", "choice"):
        assert not questions & trained, sorted(questions & trained)[:3]


@pytest.mark.parametrize("name", MICROWORLD)
def test_questions_are_many_distinct_and_always_the_same(name):
    task = TASKS[name]
    questions = task.questions(500)
    assert len(questions) == 500
    assert len({q.messages[0]["content"] for q in questions}) >= 0.99 * len(questions)
    assert task.questions(20) == questions[:20]


@pytest.mark.parametrize("name", MICROWORLD)
def test_grading(name):
    task = TASKS[name]
    for q in task.questions(200):
        assert task.grade(q, "I do not know anyone called so.") == "refused"
        assert task.grade(q, "") == task.grade(q, "Yes.") == "wrong"
        if task.wanted == "right":
            assert task.grade(q, f"{q.expected}.") == "right"
            for other in q.others[:3]:
                assert task.grade(q, f"It is {other}.") == "wrong"
                assert task.grade(q, f"It is {q.expected} or {other}.") == "wrong"


@pytest.mark.parametrize(
    "name, expected, others, right, wrong",
    [
        ("facts_taught", "cake", ("jam",), ("cake", "She eats CAKE."), ("pancakes", "cake or jam", "cup-cake")),
        ("spelling", "c-a-t", (), ("c-a-t.", "It is c-a-t."), ("c-a-t-s", "c-a-t-t.", "s-c-a-t", "cat")),
        ("choice", "A", (), ("A", "A."), ("a", "It is a dog.", "A dog.", "A or B", "A B C D", "BA")),
        ("add_tool", "46", (), ("46", "12 + 34 = 46.", "46. 9 * 6 = 54."), ("46 + 12 = 58.", "9 + 6 = 15. It is 46.")),
        ("add_tool", "46", (), ("It is 46.",), ("-46", "46.5", "146", "9,46", "")),
        ("add_tool_long", "1046", (), ("It is 1,046.",), ("1,046 or 7",)),
    ],
)
def test_an_answer_is_not_right_because_the_right_one_is_somewhere_in_it(name, expected, others, right, wrong):
    q = Question([], expected, others)
    assert {TASKS[name].grade(q, text) for text in right} == {"right"}
    assert [text for text in wrong if TASKS[name].grade(q, text) != "wrong"] == []


def test_evaluation_wordings_are_not_training_wordings():
    assert not set(FRAMES) & set(EVAL_FRAMES)
    assert len(TRUTHS) > 150
