"""Laws that every merge method keeps, over the registry: a new method is covered the moment its file is there.

A method that breaks a law by its nature says so (``breaks=("scaling",)``); then the law must really fail for it.
"""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped

from loraloom.adapter import Adapter, Factors
from loraloom.ops.merge import merge, module_generator
from loraloom.ops.merge_methods import merge_methods
from loraloom.ops.spaces import SPACES
from loraloom.registry import Technique

SIZES = {"layers.0.q": (8, 7), "layers.1.q": (6, 9), "layers.1.fc": (5, 5)}
DELTAS = torch.randn(3, 8, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


def statistic(kind: str, shape, seed: int) -> torch.Tensor:
    """A random valid statistic of one adapter for a module whose updates (or factors, flat) are of a shape."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "gram":
        rows = torch.randn(3 * shape[-1], shape[-1], generator=generator, dtype=torch.float64)
        return rows.T @ rows / len(rows)
    assert kind == "fisher", f"a statistic {kind!r} has no sample here"
    return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1


def call(technique, deltas=DELTAS, weights=WEIGHTS, seed=0, places=None):
    knobs = {}
    if "generator" in inspect.signature(technique.function).parameters:
        knobs["generator"] = torch.Generator().manual_seed(seed)
    if technique.facts.get("statistics") and deltas.any():
        held = [statistic(technique.facts["statistics"], deltas.shape[1:], at) for at in places or range(len(deltas))]
        knobs["statistics"] = torch.stack(held)
    return technique(deltas, weights, **knobs)


def statistics_of(technique, adapters, space):
    """Statistics for merge(), the same for every adapter of a place."""
    kind = technique.facts.get("statistics")
    if not kind:
        return None
    held = []
    for at, _ in enumerate(adapters):
        rank = adapters[0].config["r"]
        shapes = {n: ((out + in_) * rank,) if space == "factors" else (out, in_) for n, (out, in_) in SIZES.items()}
        held.append({name: statistic(kind, shape, at) for name, shape in shapes.items()})
    return held


def adapter(seed: int, rank: int, scale: float) -> Adapter:
    modules = {}
    for name, (out, in_) in SIZES.items():
        generator = module_generator(seed, name)
        b, a = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((out, rank), (rank, in_)))
        modules[name] = Factors(B=b, A=a, scale=scale)
    return Adapter({"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank}, modules)


def spaces(technique) -> list[str]:
    return list(technique.facts.get("spaces", SPACES))


def deltas_of(merged: Adapter) -> dict[str, torch.Tensor]:
    return {name: merged.modules[name].delta() for name in merged.modules}


def same(left: dict, right: dict) -> None:
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert torch.allclose(tensor, right[name], rtol=1e-7, atol=1e-7), name


# ---- the function by itself ----


def source(technique):
    """It says where it comes from, shows an example, and has the name of its file; its knobs have defaults."""
    assert technique.paper.startswith("https://")
    assert "Example:" in (technique.function.__doc__ or "")
    assert technique.function.__name__ == technique.name == technique.function.__module__.split(".")[-1]
    first, second, *knobs = inspect.signature(technique.function).parameters.values()
    assert (first.name, second.name) == ("deltas", "weights")
    for knob in knobs:
        assert knob.kind is knob.KEYWORD_ONLY
        assert knob.name == "generator" or knob.default is not knob.empty


def inputs(technique):
    """It leaves its inputs alone and gives a new tensor of one update's size and type."""
    deltas, weights = DELTAS.clone(), WEIGHTS.clone()
    result = call(technique, deltas, weights)
    assert torch.equal(deltas, DELTAS) and torch.equal(weights, WEIGHTS)
    assert result.shape == DELTAS.shape[1:] and result.dtype == DELTAS.dtype
    checked = replace(technique, function=jaxtyped(typechecker=beartype)(technique.function))
    assert torch.equal(call(checked), result)


def order(technique):
    """Updates and weights in another order give the same."""
    turned = torch.tensor([2, 0, 1])
    other = call(technique, DELTAS[turned], WEIGHTS[turned], places=turned.tolist())
    assert torch.allclose(call(technique), other)


def single(technique):
    """One update of weight 1 is itself."""
    assert torch.allclose(call(technique, DELTAS[:1], torch.ones(1, dtype=torch.float64)), DELTAS[0])


def scaling(technique):
    """Twice the weights, twice the result."""
    assert torch.allclose(call(technique, weights=2 * WEIGHTS), 2 * call(technique))


def zero(technique):
    """Zeros merge to zeros."""
    assert not call(technique, torch.zeros_like(DELTAS)).any()
    assert not call(technique, torch.zeros(1, 4, 3), torch.ones(1)).any()


def seeded(technique):
    """Chance comes from the generator alone."""
    before = torch.get_rng_state()
    assert torch.equal(call(technique, seed=3), call(technique, seed=3))
    assert torch.equal(before, torch.get_rng_state())


def linear(technique):
    """If it says that it is linear, it is a sum with coefficients that it shows on the unit vectors."""
    if technique.facts.get("linear"):
        share = call(technique, torch.eye(3, dtype=torch.float64))
        assert torch.allclose(call(technique), torch.tensordot(share, DELTAS, 1))
        assert torch.allclose(call(technique, -5 * DELTAS), torch.tensordot(share, -5 * DELTAS, 1))


# ---- through merge() ----


def whole(technique, method):
    """Whole adapters, in every space: sizes as promised, finite, inputs untouched, the same again in any order."""
    for space in spaces(technique):
        adapters = [adapter(seed, 2, 2.0) for seed in (1, 2)]
        known = {"space": space, "statistics": statistics_of(technique, adapters, space)}
        merged = merge(adapters, method, **known)
        assert list(merged.modules) == list(SIZES)
        for name in reversed(SIZES):
            assert merged.modules[name].shape == merged.shape(name)
            assert torch.isfinite(merged.modules[name].delta()).all()
        same(deltas_of(merged), deltas_of(merge([adapter(seed, 2, 2.0) for seed in (1, 2)], method, **known)))
        same(deltas_of(adapters[0]), deltas_of(adapter(1, 2, 2.0)))


def gauge(technique, method):
    """Other factors of the same updates give the same, in every space that does not say it depends on the gauge."""
    for space in spaces(technique):
        if SPACES[space].gauge:
            continue
        adapters = [adapter(1, 2, 2.0), adapter(2, 3, 0.5)]
        turned = []
        for one in adapters:
            rank = one.config["r"]
            p = torch.randn(rank, rank, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
            p = p + 3 * torch.eye(rank, dtype=torch.float64)
            modules = {n: replace(f, B=f.B @ p.inverse(), A=p @ f.A) for n, f in one.modules.items()}
            turned.append(replace(one, modules=modules))
        known = {"space": space, "statistics": statistics_of(technique, adapters, space)}
        same(deltas_of(merge(adapters, method, **known)), deltas_of(merge(turned, method, **known)))


def absent(technique, method):
    """In every space but ``factors`` a module that an adapter lacks counts as a zero update."""
    for space in spaces(technique):
        if SPACES[space].same:
            continue
        one, two = adapter(1, 2, 2.0), adapter(2, 2, 2.0)
        lacking = replace(two, modules={n: f for n, f in two.modules.items() if n != "layers.0.q"})
        zeros = replace(two, modules={**two.modules, "layers.0.q": two.modules["layers.0.q"].scaled(0.0)})
        # At full rank, so that what is compared is not where the rank is cut.
        known = {"space": space, "statistics": statistics_of(technique, [one, two], space), "rank": 9}
        same(*(deltas_of(merge([one, other], method, **known)) for other in (lacking, zeros)))


def knobs(technique, method):
    """A knob that is given acts on one adapter of weight 1 as on one of almost 1."""
    takes = inspect.signature(technique.function).parameters.values()
    for knob in [p for p in takes if p.kind is p.KEYWORD_ONLY and p.name not in ("generator", "statistics")]:
        one, known = [adapter(1, 3, 2.0)], {knob.name: another(knob.default)}
        known["statistics"] = statistics_of(technique, one, technique.facts.get("space", "delta"))
        same(*(deltas_of(merge(one, method, [weight], **known)) for weight in (1.0, 1.0 + 1e-9)))


def idle(technique, method):
    """An adapter of weight 0 changes nothing, in any place and in any module."""
    for space in spaces(technique):
        adapters = [adapter(seed, 2, 2.0) for seed in (1, 2, 3)]
        known = statistics_of(technique, adapters, space)
        for weights in ([0.4, 0.0, 0.6], [0.0, 1.0, 0.0]):
            used = [at for at, weight in enumerate(weights) if weight]
            few = known and [known[at] for at in used]
            alone = merge(
                [adapters[at] for at in used], method, [weights[at] for at in used], space=space, statistics=few
            )
            for given in (weights, dict.fromkeys(SIZES, weights)):
                same(deltas_of(alone), deltas_of(merge(adapters, method, given, space=space, statistics=known)))
        if not SPACES[space].same:  # a module that those of weight 0 alone have
            lacking = replace(adapters[1], modules={"layers.1.q": adapters[1].modules["layers.1.q"]})
            few = known and known[:2]
            merged = merge([adapters[0], lacking], method, [0.0, 1.0], space=space, statistics=few)
            assert not merged.modules["layers.0.q"].delta().any()


def another(default):
    """A value of a knob that is not its default."""
    if isinstance(default, str):
        return "iso_c"
    return 1 if default is None else default // 2 if isinstance(default, int) else default / 2


OF_FUNCTIONS = {law.__name__: law for law in (source, inputs, order, single, scaling, zero, seeded, linear)}
OF_ADAPTERS = {law.__name__: law for law in (whole, gauge, absent, knobs, idle)}
LAWS = {**OF_FUNCTIONS, **OF_ADAPTERS}


def check(law: str, technique: Technique) -> None:
    """The law holds, or is declared as broken and is."""
    arguments = (technique,) if law in OF_FUNCTIONS else (technique, technique.name)
    if law not in technique.breaks:
        LAWS[law](*arguments)
        return
    with pytest.raises((AssertionError, RuntimeError)):
        LAWS[law](*arguments)


@pytest.mark.parametrize("method", merge_methods)
@pytest.mark.parametrize("law", LAWS)
def test_law(law, method):
    check(law, merge_methods[method])


@pytest.mark.parametrize("method", merge_methods)
def test_only_known_laws_are_declared_broken(method):
    assert set(merge_methods[method].breaks) <= set(LAWS)
    assert set(spaces(merge_methods[method])) <= set(SPACES)


@pytest.mark.parametrize("method", [name for name in merge_methods if "lacks" in merge_methods[name].facts])
def test_it_says_why_it_lacks_a_space(method):
    why = merge_methods[method].facts["lacks"]
    lacking = why.partition(":")[0].split(", ")
    assert {*lacking, *spaces(merge_methods[method])} >= {name for name in SPACES if not SPACES[name].gauge}
    for space in lacking:
        with pytest.raises(ValueError, match=f"has no space '{space}'") as caught:
            merge([adapter(1, 2, 2.0)], method, space=space)
        assert str(caught.value).endswith(f"({why})")


# ---- the laws themselves: each of these methods breaks one ----


def _sum(deltas, weights):
    return torch.tensordot(weights, deltas, 1)


def _writes(deltas, weights):
    result = _sum(deltas, weights)
    deltas.zero_()
    return result


def _by_place(deltas, weights):
    return _sum(deltas, weights * torch.arange(1, len(weights) + 1))


def _mean(deltas, weights):
    return _sum(deltas, weights / weights.sum())


def _offset(deltas, weights):
    return _sum(deltas, weights) + 1


def _global_draw(deltas, weights):
    return _sum(deltas, weights) * (torch.rand(deltas.shape[1:]) < 0.5)


def _largest(deltas, weights):
    weighted = deltas * weights.reshape(-1, *[1] * (deltas.ndim - 1))
    return weighted.gather(0, weighted.abs().argmax(0, keepdim=True))[0]


def _halved(deltas, weights):
    return _sum(deltas, weights) / 2


BROKEN = [
    ("source", _sum, {}),
    ("inputs", _writes, {}),
    ("order", _by_place, {}),
    ("single", _halved, {}),
    ("scaling", _mean, {}),
    ("zero", _offset, {}),
    ("seeded", _global_draw, {}),
    ("linear", _largest, {"linear": True}),
]


@pytest.mark.parametrize(("law", "function", "facts"), BROKEN)
def test_a_law_can_fail(law, function, facts):
    with pytest.raises((AssertionError, RuntimeError)):
        check(law, Technique("sample", function, facts=facts))
    check(law, Technique("sample", function, facts=facts, breaks=(law,)))


def test_laws_of_adapters_can_fail(monkeypatch):
    state = iter(range(1000))

    def drifting(deltas, weights, *, knob: float = 1.0):
        return _sum(deltas, weights) * (1 + next(state))

    technique = Technique("drifting", drifting)
    monkeypatch.setattr("loraloom.ops.merge.merge_methods", {"drifting": technique})
    for law in OF_ADAPTERS:
        with pytest.raises(AssertionError):
            check(law, technique)


@pytest.mark.parametrize("law", [law for law in LAWS if law != "source"])
def test_a_method_that_is_not_linear_can_keep_them_all(law, monkeypatch):
    technique = Technique("largest", _largest)
    monkeypatch.setattr("loraloom.ops.merge.merge_methods", {"largest": technique})
    check(law, technique)
