"""Operators on MokA adapters: what they give, on live layers with their attention, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache

import pytest
import torch

import loraloom as ll
from loraloom.adapter import Adapter, AdapterMismatch, UnsupportedKind
from loraloom.integrations.peft import attached, from_model
from loraloom.modalities import plan_of
from loraloom.ops.merge_methods import merge_methods
from loraloom.registry import UnknownName
from loraloom.strategies.modality import MokA
from tiny_multimodal import image_batch, lively, tiny_llava, without

LAYER = "model.language_model.layers.0.self_attn.q_proj"  # in the first layer, so that all see the same input
NAMES = (LAYER, "model.language_model.layers.0.mlp.gate_proj", "model.language_model.layers.1.self_attn.q_proj")
BATCH = without(image_batch(), "labels")


def trained(seed: int, targets: tuple[str, ...] = NAMES, **plan) -> Adapter:
    """A MokA adapter with random factors."""
    return _trained(seed, targets, json.dumps({"modalities": {"image": 1}, "rank": 2, **plan}))


@cache
def _trained(seed: int, targets: tuple[str, ...], plan: str) -> Adapter:
    return from_model(lively(MokA(**json.loads(plan)).wrap(tiny_llava(), list(targets)), seed))


@cache
def base() -> torch.nn.Module:
    return tiny_llava().double()


def update(adapter: Adapter | None) -> torch.Tensor:
    """What the first layer's q_proj gives with the adapter on the model: the base's output and the update."""
    seen = []
    with attached(base(), adapter) as live, torch.no_grad():
        layer = live.get_submodule(("base_model.model." if adapter else "") + LAYER)
        handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
        live(**{key: value.double() if value.is_floating_point() else value for key, value in BATCH.items()})
        handle.remove()
    return seen[0]


def change(adapter: Adapter) -> torch.Tensor:
    return update(adapter) - bare()


@cache
def bare() -> torch.Tensor:
    return update(None)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-6 * float(other.abs().max()))


# Sums ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cat", "linear"])
@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"attention": "uniform"},
        {"attention": "none"},
        {"attention": "text-as-query"},
        {"logits": "official"},
        {"own": "both"},
        {"own": "B"},
        {"weight": 0.3, "keys": "after-last-modality"},
    ],
    ids=str,
)
def test_side_by_side_is_exactly_the_weighted_sum_of_the_updates(plan, method):
    a, b = trained(1, **plan), trained(2, **plan)
    merged = ll.merge([a, b], method=method, weights=[0.7, -0.4])
    asked = 0.7 * change(a) - 0.4 * change(b)
    assert asked.abs().max() > 0.1
    assert close(change(merged), asked)
    assert plan_of(merged.config).width == 4


def test_without_heads_the_sum_would_be_another():
    """The test above can fail: one head over both adapters gives something else."""
    a, b = trained(1), trained(2)
    merged = ll.merge([a, b], method="cat", weights=[1.0, 1.0])
    one_head = Adapter({**merged.config, "moka": {**merged.config["moka"], "heads": 1}}, merged.modules)
    assert plan_of(merged.config).heads == 2
    assert not close(change(one_head), change(a) + change(b))


def test_sums_of_sums_and_of_other_alphas_are_right_and_survive_the_disk(tmp_path):
    a, b, c = trained(1, alpha=2.0), trained(2, alpha=16.0), trained(3, alpha=5.0)
    both = ll.load(ll.save(ll.merge([a, b], method="cat", weights=[1.0, 2.0]), tmp_path / "both"))
    whole = ll.load(ll.save(ll.subtract(both, c, 0.5), tmp_path / "whole"))
    assert plan_of(whole.config).heads == 3
    assert close(change(whole), change(a) + 2 * change(b) - 0.5 * change(c))


def test_where_nothing_is_looked_up_ranks_may_differ():
    a, b = trained(1, rank=2, attention="none"), trained(2, rank=3, attention="none")
    assert close(change(ll.merge([a, b], method="cat", weights=[1.0, 1.0])), change(a) + change(b))


def test_a_layer_that_one_adapter_lacks_counts_as_zero(tmp_path):
    a, b = trained(1, targets=NAMES[:1]), trained(2, targets=NAMES[1:])
    merged = ll.load(ll.save(ll.merge([b, a], method="cat", weights=[1.0, 0.5]), tmp_path / "m"))
    assert close(change(merged), 0.5 * change(a))
    assert {merged.shape(name).rank for name in merged.modules} == {4}
    for name in b.modules:
        assert torch.allclose(merged.modules[name].delta(), b.modules[name].delta(), atol=1e-6)


def test_scaling_and_the_delta_path_are_of_the_update(tmp_path):
    a, b = trained(1), trained(2)
    assert close(change(ll.load(ll.save(ll.scale(a, -3.0), tmp_path / "s"))), -3 * change(a))
    assert close(change(ll.merge([a], weights=[0.25])), 0.25 * change(a))
    assert close(change(ll.interpolate(a, b, at=0.25)), 0.75 * change(a) + 0.25 * change(b))
    assert close(change(ll.interpolate(a, b, at=1.0)), change(b))


# Averages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"modalities": {"image": 1, "audio": 2}, "rank": {"text": 3, "image": 2, "audio": 5}},
        {"own": "both", "rank": {"text": 3, "image": 2}},
        {"own": "B"},
    ],
    ids=str,
)
def test_in_factors_each_a_and_the_shared_b_are_averaged(tmp_path, plan):
    a, b = trained(1, **plan), trained(2, **plan)
    merged = ll.load(ll.save(ll.merge([a, b], weights=[0.3, 0.7], space="factors"), tmp_path / "m"))
    assert plan_of(merged.config).ranks == plan_of(a.config).ranks
    assert plan_of(merged.config).heads == 1
    for name in a.modules:
        one, other, found = (adapter.modules[name] for adapter in (a, b, merged))
        assert torch.allclose(found.A, 0.3 * one.A + 0.7 * other.A, atol=1e-6)
        assert torch.allclose(found.scale * found.B, one.scale * (0.3 * one.B + 0.7 * other.B), atol=1e-5)


def test_other_alphas_go_into_b_and_leave_the_attention_alone():
    a = trained(1, alpha=4.0)
    loud = Adapter({**a.config, "lora_alpha": 32.0}, {name: part.scaled(8.0) for name, part in a.modules.items()})
    merged = ll.merge([a, loud], weights=[0.5, 0.5], space="factors")
    assert close(change(merged), 4.5 * change(a))  # the same A's: nothing but B may differ
    assert close(change(ll.interpolate(a, loud, at=0.5, space="factors")), 4.5 * change(a))


def test_one_adapter_of_weight_one_is_itself():
    a = trained(1)
    for space in ("factors", "delta"):
        merged = ll.merge([a], weights=[1.0], space=space)
        assert merged.modules is a.modules


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in merge_methods if name not in ("linear", "cat")])
def test_every_other_method_is_refused_with_what_is_allowed(method):
    knobs = {"statistics": [{}, {}]} if merge_methods[method].facts.get("statistics") else {}
    with pytest.raises(UnsupportedKind, match=r"cannot merge MokA adapters .*share B.*allowed are merging by linear"):
        ll.merge([trained(1), trained(2)], method=method, **knobs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"space": "core"}, "by linear in core"),
        ({"space": "knots"}, "by linear in knots"),
        ({"rank": 2}, "to a chosen rank"),
        ({"energy": 0.9}, "cannot compress MokA"),
        ({"budget": "0.5x"}, "cannot compress MokA"),
        ({"space": "factors", "weights": [1.0, 1.0]}, "do not add up to 1"),
        ({"space": "factors", "weights": [2.0, -1.0]}, "negative"),
    ],
)
def test_what_a_merge_cannot_give_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ll.merge([trained(1), trained(2)], **options)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"modalities": {"image": 1, "audio": 2}}, "different modalities"),
        ({"weight": 0.5}, "different weight"),
        ({"attention": "none"}, "different attention"),
        ({"keys": "after-last-modality"}, "different keys"),
        ({"own": "both"}, "different own"),
        ({"logits": "official"}, "different logits"),
        ({"rank": 3}, "different ranks"),
    ],
)
@pytest.mark.parametrize("space", ["factors", "delta"])
def test_other_plans_do_not_merge(plan, words, space):
    words = words if space == "factors" or "ranks" not in words else "attend at different ranks"
    with pytest.raises(AdapterMismatch, match=words):
        ll.merge([trained(1), trained(2, **plan)], space=space)


def test_scales_of_official_logits_and_several_ranks_do_not_go_side_by_side():
    loud, quiet = trained(1, logits="official", alpha=2.0), trained(2, logits="official", alpha=4.0)
    with pytest.raises(AdapterMismatch, match=r"logits have other scales do not merge: \[1\.0, 2\.0\]"):
        ll.merge([loud, quiet], method="cat")
    several = [trained(seed, rank={"text": 2, "image": 3}) for seed in (1, 2)]
    with pytest.raises(AdapterMismatch, match="several ranks do not go side by side"):
        ll.merge(several, method="cat")


def test_weights_by_module_must_be_those_of_a_layer():
    a, b = trained(1), trained(2)
    by_layer: Mapping = {name: [0.5, 0.5] if "layers.0" in name else [1.0, 0.0] for name in a.modules}
    assert close(change(ll.merge([a, b], weights=by_layer)), 0.5 * change(a) + 0.5 * change(b))
    torn = {**by_layer, f"{LAYER}[image]": [0.1, 0.9]}
    with pytest.raises(ValueError, match=r"q_proj: the modalities of a layer share B, so they need the same weights"):
        ll.merge([a, b], weights=torn)


def test_moka_and_lora_do_not_merge_and_whole_tensors_do_not_scale():
    from loraloom.modalities import text_only

    a = trained(1)
    with pytest.raises(AdapterMismatch, match="different kinds do not merge: moka, lora"):
        ll.merge([a, text_only(a)])
    with pytest.raises(AdapterMismatch, match="whole tensors"):
        ll.scale(Adapter(a.config, a.modules, {"projector.weight": torch.ones(2)}), 2.0)


@pytest.mark.parametrize(
    ("operator", "words"),
    [
        (lambda a: ll.compress(a, rank=1), "cannot compress MokA adapters"),
        (lambda a: ll.align(a, to=a), "cannot align MokA adapters"),
        (lambda a: ll.prune(a, density=0.5), "cannot prune entries of MokA adapters"),
        (lambda a: ll.prune(a, density=0.5, space="delta"), "cannot prune entries of MokA adapters"),
        (lambda a: ll.prune(a, pattern="2:4"), "cannot prune entries of MokA adapters"),
        (lambda a: ll.prune(a, density=0.5, unit="rank"), "cannot prune directions of MokA adapters"),
        (lambda a: ll.interpolate(a, a, align="orthogonal"), "cannot align MokA adapters"),
        (lambda a: ll.measure(a, "digits"), "cannot measure MokA adapters"),
        (lambda a: ll.learn_weights([a, a], "digits"), "cannot learn weights of MokA adapters"),
        (lambda a: ll.export(a, "out"), r"vLLM loads no moka adapters; .*--text-only"),
    ],
)
def test_operators_that_change_the_gauge_are_refused(operator, words):
    with pytest.raises(UnsupportedKind, match=words):
        operator(trained(1))


# Pruning -------------------------------------------------------------------------------------------------------------


def test_whole_layers_and_projections_are_pruned_with_all_their_modalities(tmp_path):
    a = trained(1)
    kept = ll.load(ll.save(ll.prune(a, keep="every-other"), tmp_path / "k"))  # CoTo's choice of layers
    assert {name.partition("[")[0] for name in kept.modules} == {NAMES[0], NAMES[1]}
    assert torch.equal(update(kept), update(a))
    queries = ll.prune(a, modules="q_proj")
    assert list(queries.modules) == [
        f"{owner}[{group}]" for owner in (NAMES[0], NAMES[2]) for group in ("text", "image")
    ]
    assert list(queries.modules) == list(ll.prune(a, modules="self_attn.q_proj").modules)
    with pytest.raises(UnknownName, match=r"'q_proj\[text\]'.*self_attn\.q_proj"):
        ll.prune(a, modules="q_proj[text]")


@pytest.mark.parametrize("by", ["magnitude", "random"])
def test_by_share_a_layer_stays_or_goes_as_a_whole(by):
    a = trained(1)
    pruned = ll.prune(a, density=0.34, unit="module", by=by)
    assert [name.rpartition("[")[2] for name in pruned.modules] == ["text]", "image]"]
    assert len({name.partition("[")[0] for name in pruned.modules}) == 1
    assert pruned.provenance["record"]["units_before"] == 3
    chosen = ll.prune(a, density=0.34, unit="module", by={name: float(name == NAMES[1]) for name in NAMES})
    assert list(chosen.modules) == [f"{NAMES[1]}[text]", f"{NAMES[1]}[image]"]


# Search --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["adapter", "layer", "projection", "module"])
def test_weights_are_searched_by_layers_not_by_modalities(unit):
    pytest.importorskip("nevergrad")
    a, b = trained(1), trained(2)
    found = ll.search([a, b], lambda merged: -float(merged.modules[f"{LAYER}[text]"].norm()), budget=4, unit=unit)
    assert change(found.adapter).isfinite().all()
    if unit != "adapter":
        assert {name: found.weights[f"{name}[text]"] for name in NAMES} == {
            name: found.weights[f"{name}[image]"] for name in NAMES
        }


def test_connectivity_goes_through_both_spaces():
    a, b = trained(1), trained(2)
    for space in ("delta", "factors"):
        found = ll.connectivity(a, b, lambda merged: float(change(merged).norm()), points=3, space=space)
        assert found.scores[0] == pytest.approx(float(change(a).norm()))
        assert found.scores[2] == pytest.approx(float(change(b).norm()))


# Export --------------------------------------------------------------------------------------------------------------


def test_exported_for_readers_of_r_and_alpha_it_computes_the_same(tmp_path):
    a = trained(1)
    out = ll.load(ll.export(a, tmp_path / "out", target="peft"))
    assert (out.config["peft_type"], out.config["lora_alpha"]) == ("MOKA", out.config["r"])
    assert close(update(out), update(a))
