"""scale() and subtract()."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from loraloom.adapter import AdapterMismatch, UnsupportedKind
from loraloom.ops.arithmetic import scale, subtract
from loraloom.ops.interpolate import interpolate
from loraloom.ops.merge import merge
from loraloom.store import load, save
from oracles.ops_dense import delta, ensemble, random_adapter

Q, V, FC = "layers.0.q", "layers.0.v", "layers.1.fc"
SIZES = {Q: (6, 5, 2), V: (4, 5, 2)}


@pytest.mark.parametrize("by", [-1.0, 0.0, 0.25, 3.0])
def test_scale(by, tmp_path):
    a = random_adapter(1, SIZES, 2.0)
    again = load(save(scale(a, by), tmp_path / "a"))
    for name in SIZES:
        assert np.allclose(delta(again.modules[name]), by * delta(a.modules[name]))
    assert again.provenance["operation"] == "scale" and again.provenance["arguments"] == {"by": by}


def test_scale_takes_the_bias_along():
    a = random_adapter(1, {Q: SIZES[Q]}, 2.0, lora_bias=True)
    a = replace(a, modules={Q: replace(a.modules[Q], bias=torch.ones(6, dtype=torch.float64))})
    got = scale(a, 3.0).modules[Q].baked()
    assert torch.allclose(got.bias, 6 * torch.ones(6, dtype=torch.float64))


def test_scale_refuses_what_does_not_scale():
    a = random_adapter(1, SIZES)
    for by in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            scale(a, by)
    dora = random_adapter(1, SIZES, use_dora=True)
    assert scale(dora, 1.0).modules[Q] is dora.modules[Q]
    with pytest.raises(UnsupportedKind, match="DoRA"):
        scale(dora, 2.0)
    held = replace(a, extras={"head.weight": torch.ones(2)})
    with pytest.raises(AdapterMismatch, match=r"head\.weight"):
        scale(held, 2.0)
    assert scale(held, 1.0).extras


def test_the_frozen_weight_that_peft_stores_beside_factors_is_no_whole_tensor(tmp_path):
    """PEFT stores the base weight of an adapted embedding or head; nothing but the base is in it."""
    frozen = torch.arange(6.0)
    a, b = (replace(random_adapter(seed, SIZES), extras={f"{Q}.weight": frozen.clone()}) for seed in (1, 2))
    for changed in (scale(a, -1.0), subtract(a, b), interpolate(a, b, 0.5), merge([a, b]), merge([a], "ties")):
        again = load(save(changed, tmp_path / "out", overwrite=True))
        assert list(again.extras) == [f"{Q}.weight"] and torch.equal(again.extras[f"{Q}.weight"], frozen)
    by_module = dict(zip(SIZES, ([0.5, 1.0], [2.0, 1.0]), strict=True))
    assert torch.equal(merge([a, b], weights=by_module).extras[f"{Q}.weight"], frozen)
    trained = replace(b, extras={**b.extras, "head.bias": torch.ones(2)})
    assert list(merge([a, trained]).extras) == list(trained.extras)
    averaged = merge([trained, trained], weights=[1.0, 1.0], extras="average").extras
    assert torch.equal(averaged["head.bias"], torch.ones(2)) and averaged[f"{Q}.weight"] is not None
    with pytest.raises(AdapterMismatch, match=r"head\.bias"):
        subtract(a, trained)
    for other in (frozen + 1, frozen[:5], frozen.double()):
        with pytest.raises(AdapterMismatch, match=rf"2 of 2 adapters hold whole tensors \({Q}\.weight\)"):
            subtract(a, replace(b, extras={f"{Q}.weight": other}))


@pytest.mark.parametrize("weight", [1.0, -0.5, 2.0])
def test_subtract_is_exact(weight):
    a, b = random_adapter(1, SIZES, 2.0), random_adapter(2, {Q: (6, 5, 3), FC: (3, 3, 1)}, 0.5)
    left = subtract(a, b, weight)
    assert list(left.modules) == [Q, V, FC]
    for name in left.modules:
        assert np.allclose(delta(left.modules[name]), ensemble([a, b], [1.0, -weight], name))
    assert left.provenance["operation"] == "subtract"
    nothing = subtract(a, a)
    assert all(np.allclose(delta(nothing.modules[name]), 0) for name in SIZES)


def test_subtract_keeps_whole_tensors_of_the_first_alone():
    a, b = random_adapter(1, SIZES), random_adapter(2, SIZES)
    held = replace(a, extras={"head.weight": torch.ones(2)})
    assert torch.equal(subtract(held, b).extras["head.weight"], torch.ones(2))
    with pytest.raises(AdapterMismatch, match=r"head\.weight"):
        subtract(b, held)
