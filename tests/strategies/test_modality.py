"""The MokA plan: what it refuses and how, and what it becomes as JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loraloom.strategies.modality import MokA

TWO = {"image": 1, "audio": 2}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"modalities": {}}, r"modalities must number .* from 1 on, got \{\}"),
        ({"modalities": {"image": 2}}, r"from 1 on, got \{'image': 2\}"),
        ({"modalities": {"image": 0}}, "from 1 on"),
        ({"modalities": {"image": 1.0}}, "from 1 on"),
        ({"modalities": {"image": True}}, "from 1 on"),
        ({"modalities": ["image"]}, r"from 1 on, got \['image'\]"),
        ({"modalities": {"text": 1}}, "any name but 'text'"),
        ({"modalities": {"a.b": 1}}, r"without any of \. \+ \[ \], got 'a\.b'"),
        ({"modalities": {"": 1}}, "any name"),
        ({"attention": "crss"}, r"attention 'crss' is not known \(did you mean 'cross'\?\); allowed: cross, none"),
        ({"keys": "all"}, "keys 'all' is not known"),
        ({"logits": "sharp"}, "logits 'sharp' is not known"),
        ({"own": "C"}, "own 'C' is not known; allowed: A, B, both"),
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"rank": 2.0}, "rank must be a whole number"),
        ({"rank": True}, "rank must be a whole number"),
        ({"rank": {"image": 2, "audio": 2}}, "rank must be a number, or one for each of text, image, audio"),
        ({"rank": {"text": 2, "image": 2, "audio": 0}}, "rank must be a whole number"),
        ({"weight": float("nan")}, "weight must be finite, got nan"),
        ({"weight": "1"}, "weight must be finite"),
        ({"weight": {"image": 1.0}}, "weight must be a number, or one for each of image, audio"),
        ({"weight": {"image": 1.0, "audio": float("inf")}}, "weight must be finite"),
        ({"modalities": {"image": 1, "video": 1}, "weight": {"image": 1, "video": 2}}, "video shares its A with image"),
        (
            {"modalities": {"image": 1, "video": 1}, "rank": {"text": 1, "image": 1, "video": 2}},
            "video shares its A with image, so their rank must be the same",
        ),
        ({"alpha": 0}, "alpha must be finite and above 0, got 0"),
        ({"alpha": "16"}, "alpha must be finite"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"heads": 3}, "heads must divide the rank 4, got 3"),
        ({"heads": 0}, "heads must divide"),
        ({"rank": {"text": 2, "image": 4, "audio": 4}, "heads": 2}, "several ranks need an A for each"),
        ({"rank": {"text": 2, "image": 4, "audio": 4}, "own": "B"}, "several ranks need an A for each"),
        ({"keys": "span"}, "span must be two different ids"),
        ({"span": (3, 3)}, "span must be two different ids"),
        ({"span": (3,)}, "span must be two different ids"),
        ({"span": (3, 4, 3)}, "span must be two different ids"),
        ({"span": 3}, "span must be two different ids"),
        ({"tokens": {"smell": 3}}, "tokens: modality 'smell' is not known; allowed: image, audio"),
        ({"tokens": {"image": "3"}}, "tokens must be ids by name"),
        ({"tokens": 3}, "tokens must be ids by name"),
        ({"active": ("smell",)}, "active: modality 'smell' is not known; allowed: text, image, audio"),
        ({"modalities": {"image": 1, "video": 1}, "active": ("image",)}, r"all or none of image\+video"),
    ],
)
def test_what_is_not_allowed_is_told(told: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        MokA(**{"modalities": TWO, **told})
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        MokA.from_json({"modalities": TWO, **told})


@pytest.mark.parametrize(
    "plan",
    [
        MokA({"image": 1}),
        MokA({"point cloud": 2, "видео": 1, "a-b/c": 2}, tokens={"видео": 9}, keys="span", span=(5, 6)),
        MokA({f"m{i}": i for i in range(1, 12)}, rank={"text": 3, **{f"m{i}": i for i in range(1, 12)}}, own="both"),
        MokA(TWO, alpha=7.5, dropout=0, weight={"image": 0.05, "audio": -1}, active=["text", "audio"], heads=2),  # type: ignore[arg-type]
        MokA({"image": 1, "video": 1}, attention="uniform", keys="explicit", own="B", logits="official", active=()),
    ],
)
def test_json_and_back(plan: MokA) -> None:
    told = plan.to_json()
    assert json.loads(json.dumps(told)) == told
    assert MokA.from_json(json.loads(json.dumps(told))) == plan


def test_damaged_json_is_told() -> None:
    with pytest.raises(ValueError, match=r"moka: key 'rnak' is not known \(did you mean 'rank'\?\)"):
        MokA.from_json({"modalities": {"image": 1}, "rnak": 4})
    with pytest.raises(ValueError, match="modalities must number"):
        MokA.from_json({"rank": 4})


def test_what_names_share_they_share() -> None:
    plan = MokA(
        {"image": 1, "audio": 2, "video": 1},
        rank={"text": 2, "image": 3, "audio": 1, "video": 3},
        weight={"image": 0.5, "audio": 2, "video": 0.5},
        alpha=6,
    )
    assert plan.groups == ("text", "image+video", "audio")
    assert (plan.ranks, plan.weights, plan.width, plan.rows) == ((2, 3, 1), (1.0, 0.5, 2.0), 3, 6)
    assert plan.columns == 3 and plan.scale == 2.0


@pytest.mark.parametrize(("own", "rows", "columns"), [("A", 12, 4), ("B", 4, 12), ("both", 12, 12)])
def test_sizes_by_what_each_modality_owns(own: str, rows: int, columns: int) -> None:
    plan = MokA(TWO, own=own)
    assert (plan.rows, plan.columns) == (rows, columns)


def test_a_plan_does_not_change_with_what_it_was_made_of() -> None:
    told = {"image": 1}
    plan = MokA(told)
    told["audio"] = 2
    assert plan.groups == ("text", "image") and plan == MokA({"image": 1})
