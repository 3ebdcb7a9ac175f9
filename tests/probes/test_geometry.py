"""The map of many adapters: groups stay together, the same seed gives the same map, wrong wishes are one line."""

from __future__ import annotations

import math

import pytest
import torch

from loraloom.adapter import Adapter, Factors
from loraloom.probes.geometry import geometry
from loraloom.probing import geometry_report


def adapters(per_group: int = 4) -> list[Adapter]:
    """Two groups around two far points."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for group in range(2):
        middle = torch.randn(6, 2, generator=generator) * 5
        for _ in range(per_group):
            b = middle + 0.1 * torch.randn(6, 2, generator=generator)
            made.append(Adapter({}, {"layers.0.q": Factors(B=b, A=torch.eye(2, 5) + group)}))
    return made


def test_groups_stay_together_and_the_seed_decides():
    found = geometry(adapters(), tsne=True, seed=1)
    assert found.perplexity == pytest.approx(7 / 3)
    assert found.neighbours is not None
    for at, place in enumerate(found.neighbours):
        others = sorted((math.dist(place, other), i) for i, other in enumerate(found.neighbours) if i != at)
        assert {i // 4 for _, i in others[:3]} == {at // 4}
    assert geometry(adapters(), tsne=True, seed=1) == found
    assert geometry(adapters(), tsne=True, seed=2).neighbours != found.neighbours
    assert geometry(adapters()).neighbours is None
    assert geometry([adapters()[0]] * 4, tsne=True).neighbours == ((0.0, 0.0),) * 4


def test_the_page_says_what_a_map_does_not_say():
    names = [f"{group}-{at}" for group in ("lora", "coto") for at in range(4)]
    report = geometry_report(adapters(), names, tsne=True, perplexity=2.0)
    (panel,) = [panel for panel in report.panels if panel.title == "Who is near whom"]
    assert [one.name for one in panel.series] == names
    assert "perplexity 2" in panel.note
    assert "mean nothing" in panel.note
    assert report.records[0]["perplexity"] == 2.0


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (3, {"tsne": True}, "at least 4 adapters, got 3"),
        (8, {"perplexity": 8}, r"perplexity must be in \[1, 7\] for 8 adapters, got 8"),
        (8, {"tsne": True, "perplexity": 0.5}, r"perplexity must be in \[1, 7\]"),
        (8, {"perplexity": math.nan}, r"perplexity must be in \[1, 7\] for 8 adapters, got nan"),
    ],
)
def test_impossible_maps_are_refused_in_one_line(count, options, message):
    with pytest.raises(ValueError, match=message):
        geometry(adapters()[:count], **options)
