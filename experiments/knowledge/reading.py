"""What the answers of a row say about confidence: calibration, and answering only the surest questions.

A row has, of all greedy answers to questions about facts only read, silent people and names of nobody, sorted by the
probability of the answer's text: `ranked`, two letters an answer (the kind's first; r right, w wrong, x refused), and
`confidence`.
"""

import statistics

from experiments.knowledge.variants import NO_REFUSALS, USUAL
from nanochat.lab.declaration import Rows
from nanochat.lab.estimate import rate
from nanochat.lab.plot import Point
from nanochat.lab.table import Values

Answer = tuple[str, str, float]  # kind's letter, outcome's letter, confidence
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def pool(row: Values) -> list[Answer]:
    """The surest first."""
    letters, numbers = str(row["ranked"])[1:], str(row["confidence"])[1:].split()
    return [(kind, outcome, float(p)) for kind, outcome, p in zip(letters[::2], letters[1::2], numbers)]


def calibration(row: Values) -> tuple[float, float, float]:
    """(mean confidence, share right, expected calibration error in ten bins of equal size) of the answers that are no
    refusals, about people who exist (Naeini et al., AAAI 2015).
    """
    given = [(p, float(outcome == "r")) for kind, outcome, p in pool(row) if kind != "u" and outcome != "x"]
    if not given:
        return 0.0, 0.0, 0.0
    error = 0.0
    for part in tenths(given):
        sure, right = (statistics.fmean(column) for column in zip(*part))
        error += abs(sure - right) * len(part) / len(given)
    return statistics.fmean(p for p, _ in given), statistics.fmean(right for _, right in given), error


def tenths(given: list[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    ends = [len(given) * i // 10 for i in range(11)]
    return [given[a:b] for a, b in zip(ends, ends[1:]) if b > a]


def kept(rows: Rows) -> dict[int, tuple[float, float]]:
    """By seed, the share of the facts only read that are answered right: (by the model with taught refusals; by the one
    without, that stays silent below the confidence at which it answers as many unknown names).
    """
    by = {
        variant: {int(row["seed"]): pool(row) for row in rows if row["variant"] == variant}
        for variant in (USUAL, NO_REFUSALS)
    }
    both = {}
    for seed in by[USUAL].keys() & by[NO_REFUSALS].keys():
        one, other = by[USUAL][seed], by[NO_REFUSALS][seed]
        allowed = sum(kind == "u" and outcome != "x" for kind, outcome, _ in one)
        through, right = 0, 0
        for kind, outcome, _ in other:
            through += kind == "u" and outcome != "x"
            if through > allowed:
                break
            right += kind == "r" and outcome == "r"
        asked = max(1, sum(kind == "r" for kind, _, _ in one))
        both[seed] = sum(kind == outcome == "r" for kind, outcome, _ in one) / asked, right / asked
    return dict(sorted(both.items()))


def risks(rows: Rows) -> list[Point]:
    """Risk and coverage (El-Yaniv and Wiener, JMLR 11, 2010): answers wrong of those given, when the surest are."""
    points = []
    for share in SHARES:
        some, given = [], []
        for row in rows:
            answers = pool(row)
            said = [outcome for _, outcome, _ in answers if outcome != "x"]
            first = said[: max(1, round(len(answers) * share))]
            if first:
                some.append(sum(outcome == "w" for outcome in first) / len(first))
                given.append(len(first) / len(answers))
        if some:
            points.append((statistics.fmean(given), *rate(some)))
    return list(dict.fromkeys(points))


def selective(rows: Rows) -> dict[str, list[Point]]:
    """By variant, share right against confidence in tenths of the answers about people who exist, of all seeds; and
    where both are alike, as far as the answers reach.
    """
    found: dict[str, list[Point]] = {}
    for variant in dict.fromkeys(str(row["variant"]) for row in rows):
        every = [one for row in rows if row["variant"] == variant for one in pool(row)]
        given = sorted((p, float(outcome == "r")) for kind, outcome, p in every if kind != "u" and outcome != "x")
        points = []
        for part in tenths(given):
            sure, right = (statistics.fmean(column) for column in zip(*part))
            points.append((sure, right, right, right))
        found[variant] = points
    end = max(value for points in found.values() for point in points for value in point[:2])
    return {"perfect": [(end * i / 20,) * 4 for i in range(21)], **found}
