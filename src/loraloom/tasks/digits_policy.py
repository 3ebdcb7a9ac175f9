"""A policy on handwritten digits: which of them are to be refused is a rule that no feature of the image tells."""

from __future__ import annotations

from loraloom.tasks import Example, Row, Rows, tasks
from loraloom.tasks.digits import LABELS as DIGITS
from loraloom.tasks.digits import digits

LABELS = ("comply", "refuse")
REFUSED = ("two", "three", "five", "seven")


@tasks.register(
    "digits-policy",
    paper="https://archive.ics.uci.edu/dataset/80",
    modality="image",
    prompt="Comply or refuse?",
    source="scikit-learn",
    licence="BSD-3-Clause",
)
def digits_policy() -> Rows:
    """Refuse the prime digits, comply with the others: a label policy to be kept while other things are learned."""
    held = digits()

    def make(i: int) -> Example:
        example = held.make(i)
        return Example(example.content, LABELS, int(DIGITS[example.label] in REFUSED))

    rows = [Row(row.content, LABELS[row.answer in REFUSED], row.group, row.part) for row in held.rows]
    return Rows(rows, make, LABELS)
