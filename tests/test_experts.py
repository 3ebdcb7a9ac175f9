"""Adapters of expert parameters, written and read by PEFT; every expert against its own dense update."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from loraloom.adapter import Adapter, AdapterMismatch, Factors, UnsupportedKind
from loraloom.experts import as_stored, packed, unpacked
from loraloom.folding import fold
from loraloom.integrations.peft import attached, from_model
from loraloom.layout import settled
from loraloom.ops.compress import compress
from loraloom.ops.merge import merge
from loraloom.ops.prune import prune
from loraloom.serving import export
from loraloom.store import load, save

E, HIDDEN, WIDE = 4, 6, 10


class Experts(nn.Module):
    """Two 3-D parameters, as the fused experts of Transformers have them: (experts, out, in)."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = ((HIDDEN, WIDE), (WIDE, HIDDEN)) if transposed else ((WIDE, HIDDEN), (HIDDEN, WIDE))
        self.gate_up_proj = nn.Parameter(torch.randn(E, *up))
        self.down_proj = nn.Parameter(torch.randn(E, *down))

    def forward(self, x):
        up, down = self.gate_up_proj, self.down_proj
        if not self.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        return torch.stack([x @ u @ d for u, d in zip(up, down, strict=True)]).sum(0)


class Block(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN)
        self.experts = Experts(transposed)

    def forward(self, x):
        return self.experts(self.q_proj(x))


def model(transposed: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(transposed) for _ in range(2)]).double()


UP, DOWN, Q = "experts.gate_up_proj", "experts.down_proj", "q_proj.weight"


def made(folder, seed: int, transposed: bool, rank: int = 2, parameters=(UP, DOWN), **more):
    modules = [] if Q in parameters else ["q_proj"]
    config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=modules, target_parameters=list(parameters), **more)
    live = get_peft_model(model(transposed), config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in live.parameters():
        if parameter.requires_grad:
            parameter.data = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype) - 0.5
    live.save_pretrained(folder)
    return live


def updates(live: nn.Module, transposed: bool) -> dict[str, torch.Tensor]:
    """What merging changes in every base parameter."""
    merged, before = (dict(one.named_parameters()) for one in (live.merge_and_unload(), model(transposed)))
    return {name: merged[name] - before[name] for name in before}


@pytest.fixture(params=[False, True])
def transposed(request):
    return request.param


def reloaded(folder, transposed: bool) -> nn.Module:
    return PeftModel.from_pretrained(model(transposed), folder)


def test_every_expert_is_a_module_with_its_own_update(tmp_path, transposed):
    live = made(tmp_path / "a", 1, transposed)
    adapter = load(tmp_path / "a")
    assert len(adapter.modules) == 2 * (1 + 2 * E)
    assert adapter.shape(f"0.experts[1/{E}]").rank == 2
    wanted = updates(live, transposed)
    for block in range(2):
        for owner in ("experts", "experts.base_layer"):  # one of the two parameters each, told by its sizes
            deltas = torch.stack([adapter.modules[f"{block}.{owner}[{at}/{E}]"].delta() for at in range(E)])
            fits = 0
            for name in ("gate_up_proj", "down_proj"):
                want = wanted[f"{block}.experts.{name}"]
                want = want.transpose(1, 2) if transposed else want
                fits += want.shape == deltas.shape and torch.allclose(deltas, want, atol=1e-10)
            assert fits == 1


def test_a_round_trip_loads_in_peft_and_computes_the_same(tmp_path, transposed):
    from safetensors.torch import load_file

    made(tmp_path / "a", 1, transposed)
    save(load(tmp_path / "a"), tmp_path / "b")
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    x = torch.randn(3, HIDDEN, dtype=torch.float64)
    assert one.keys() == two.keys()
    assert torch.allclose(reloaded(tmp_path / "b", transposed)(x), reloaded(tmp_path / "a", transposed)(x), atol=1e-10)


PATTERNS = {
    "rank": {"rank_pattern": {"gate_up_proj": 1}},
    "as PEFT converts Mixtral": {
        "rank_pattern": {r".*\.experts\.gate_up_proj": 4},
        "alpha_pattern": {r".*\.experts\.gate_up_proj": 12},
    },
    "both parameters": {"alpha_pattern": {r"experts\..*": 1}},
    "the module, which PEFT does not look for": {"alpha_pattern": {"experts": 1}, "rank_pattern": {"experts": 1}},
    "one of two blocks": {"rank_pattern": {"0.experts.gate_up_proj": 1}, "use_rslora": True},
    "alpha": {"alpha_pattern": {"gate_up_proj": 1}},
}


@pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning")
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("parameters", [[UP], [UP, DOWN]])
def test_patterns_are_of_parameters_as_peft_has_it(tmp_path, pattern, parameters):
    wanted = updates(made(tmp_path / "a", 1, False, parameters=parameters, **PATTERNS[pattern]), False)
    if pattern == "alpha" and len(parameters) > 1:
        with pytest.raises(UnsupportedKind, match=r"0\.experts.*: .* do not tell which of 0\.experts\.down_proj, "):
            load(tmp_path / "a")
        return
    adapter = load(tmp_path / "a")
    for parameter in parameters:
        owner = "0.experts.base_layer" if parameter == UP and DOWN in parameters else "0.experts"
        for at in range(E):
            got = adapter.modules[f"{owner}[{at}/{E}]"].delta()
            assert torch.allclose(got, wanted[f"0.{parameter}"][at], atol=1e-10)
    save(adapter, tmp_path / "b")
    again = updates(reloaded(tmp_path / "b", False), False)
    assert all(torch.allclose(again[name], wanted[name], atol=1e-10) for name in wanted)


@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["down_proj", UP], ["down_proj"]])
def test_a_parameter_may_be_named_without_its_module(tmp_path, parameters):
    for seed in (1, 2):
        made(tmp_path / f"bare{seed}", seed, False, parameters=parameters)
        full = [name if "." in name else f"experts.{name}" for name in parameters]
        made(tmp_path / f"full{seed}", seed, False, parameters=full)
    bare, full = ([load(tmp_path / f"{how}{seed}") for seed in (1, 2)] for how in ("bare", "full"))
    for one, other in zip([*bare, merge(bare)], [*full, merge(full)], strict=True):
        assert list(one.modules) == list(other.modules) and f"0.experts[1/{E}]" in one.modules
        assert all(torch.equal(one.modules[n].delta(), other.modules[n].delta()) for n in one.modules)
    save(merge(bare), tmp_path / "m")
    save(prune(bare[0], keep="0"), tmp_path / "p")
    wanted = [updates(reloaded(tmp_path / f"bare{seed}", False), False) for seed in (1, 2)]
    merged, pruned = (updates(reloaded(tmp_path / name, False), False) for name in "mp")
    for name in merged:
        assert torch.allclose(merged[name], (wanted[0][name] + wanted[1][name]) / 2, atol=1e-10)
        kept = wanted[0][name] if name.startswith("0.") else torch.zeros_like(pruned[name])
        assert torch.allclose(pruned[name], kept, atol=1e-10)


SMALLER = {
    "energy": lambda a, b: compress(a, energy=0.5),
    "directions": lambda a, b: prune(a, density=0.4, unit="rank"),
    "merge": lambda a, b: merge([a, b], "ties"),
}


@pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning")  # PEFT's false alarm
@pytest.mark.parametrize("how", SMALLER)
@pytest.mark.parametrize("parameters", [[Q], [Q, UP]])
def test_peft_finds_the_rank_of_a_matrix_that_is_a_parameter(tmp_path, how, parameters):
    for seed in (1, 2):
        made(tmp_path / f"a{seed}", seed, False, 4, parameters=parameters)
    changed = SMALLER[how](*(load(tmp_path / f"a{seed}") for seed in (1, 2)))
    save(changed, tmp_path / "m")
    got = updates(reloaded(tmp_path / "m", False), False)
    for block in range(2):
        name = f"{block}.q_proj"
        want = changed.modules[name].delta() if name in changed.modules else torch.zeros(HIDDEN, HIDDEN).double()
        assert torch.allclose(got[f"{name}.weight"], want, atol=1e-10)


def test_ranks_that_names_do_not_tell_apart_are_not_written():
    config = {"peft_type": "LORA", "target_parameters": ["experts.up_bias", "experts.down_bias"]}
    with pytest.raises(UnsupportedKind, match=r"^0\.experts\.down_bias: .* different ranks$"):
        settled(config, {"0.experts": 2, "0.experts.base_layer": 3}, bake=True, retarget=False)


@pytest.mark.parametrize("method", ["linear", "svd", "tsv_m", "ties"])
def test_merges_are_right_for_every_expert(tmp_path, transposed, method):
    for seed, rank in ((1, 2), (2, 3)):
        made(tmp_path / f"a{seed}", seed, transposed, rank)
    adapters = [load(tmp_path / f"a{seed}") for seed in (1, 2)]
    merged = merge(adapters, method, [0.5, -2.0])
    save(merged, tmp_path / "m")
    live = reloaded(tmp_path / "m", transposed)
    if method == "linear":
        want = {}
        for seed, weight in ((1, 0.5), (2, -2.0)):
            for name, value in updates(reloaded(tmp_path / f"a{seed}", transposed), transposed).items():
                want[name] = want.get(name, 0) + weight * value
        got = updates(live, transposed)
        assert all(torch.allclose(got[name], want[name], atol=1e-10) for name in want)
    again = load(tmp_path / "m")
    for name in merged.modules:
        assert torch.allclose(again.modules[name].delta(), merged.modules[name].delta(), atol=1e-10)


@pytest.mark.parametrize("places", [(0, 1), (1, 0)])
@pytest.mark.parametrize("method", ["linear", "svd"])
def test_an_adapter_without_experts_merges_in_any_order(tmp_path, transposed, method, places):
    made(tmp_path / "a0", 1, transposed, parameters=())
    made(tmp_path / "a1", 2, transposed)
    merged = merge([load(tmp_path / f"a{at}") for at in places], method, [1.0, 1.0])
    again = load(save(merged, tmp_path / "m"))
    assert set(again.modules) == set(load(tmp_path / "a1").modules)
    for name in merged.modules:
        assert torch.allclose(again.modules[name].delta(), merged.modules[name].delta(), atol=1e-10)
    assert torch.isfinite(reloaded(tmp_path / "m", transposed)(torch.ones(1, HIDDEN).double())).all()


@pytest.mark.parametrize(("one", "two"), [([UP], [DOWN]), ([UP], [UP, DOWN]), ([UP, DOWN], [f"0.{DOWN}"])])
def test_different_parameters_of_one_module_do_not_merge(tmp_path, one, two):
    for name, parameters in (("a", one), ("b", two)):
        made(tmp_path / name, 1, False, parameters=parameters)
    with pytest.raises(AdapterMismatch, match=r"0\.experts: adapter . of 2 adapts the parameters \w+ of it") as caught:
        merge([load(tmp_path / name) for name in "ab"])
    assert "\n" not in str(caught.value)


def test_parameters_of_different_modules_merge(tmp_path, transposed):
    for at in range(2):
        made(tmp_path / f"a{at}", at, transposed, parameters=[f"{at}.{UP}"])
    adapters = [load(tmp_path / f"a{at}") for at in range(2)]
    merged = load(save(merge(adapters, weights=[1.0, 1.0]), tmp_path / "m"))
    for at, adapter in enumerate(adapters):
        name = f"{at}.experts[1/{E}]"
        assert torch.allclose(merged.modules[name].delta(), adapter.modules[name].delta(), atol=1e-10)
    assert torch.isfinite(reloaded(tmp_path / "m", transposed)(torch.ones(1, HIDDEN).double())).all()


def test_pruned_experts_become_zero_and_ranks_are_unified(tmp_path, transposed):
    made(tmp_path / "a", 1, transposed)
    adapter = load(tmp_path / "a")
    pruned = prune(adapter, density=0.5, unit="module")
    save(pruned, tmp_path / "p")
    again = load(tmp_path / "p")
    for name in adapter.modules:
        want = pruned.modules[name].delta() if name in pruned.modules else 0 * adapter.modules[name].delta()
        if name in again.modules:
            assert torch.allclose(again.modules[name].delta(), want, atol=1e-12)
    small = load(save(compress(adapter, energy=0.8), tmp_path / "c"))
    assert torch.isfinite(reloaded(tmp_path / "c", transposed)(torch.ones(1, HIDDEN).double())).all()
    assert set(small.modules) == set(adapter.modules)


def test_live_models(tmp_path, transposed):
    live = made(tmp_path / "a", 1, transposed)
    x = torch.randn(3, HIDDEN, dtype=torch.float64)
    snapshot, base = from_model(live), model(transposed)
    with attached(base, snapshot) as peft_model:
        assert torch.allclose(peft_model(x), live(x), atol=1e-6)
    assert torch.equal(base(x), model(transposed)(x))


def test_packing():
    generator = torch.Generator().manual_seed(0)
    parts = [
        Factors(torch.randn(5, r, generator=generator), torch.randn(r, 3, generator=generator), 2.0) for r in (1, 3, 2)
    ]
    pair = packed([*parts, None], 3)
    assert pair.B.shape == (5, 12) and pair.A.shape == (12, 3) and pair.experts == 4
    for at, part in enumerate(parts):
        assert torch.allclose(unpacked(pair, at, 4).delta(), part.delta(), atol=1e-6)
    assert not unpacked(pair, 3, 4).delta().any()
    plain = Adapter({}, {"layers.0.q": parts[0]})
    assert as_stored(plain) is plain


def test_what_holds_experts_neither_folds_nor_goes_to_vllm(tmp_path, transposed):
    made(tmp_path / "a", 1, transposed)
    (tmp_path / "base").mkdir()
    held = {name: one.detach().clone() for name, one in model(transposed).named_parameters()}
    save_file(held, tmp_path / "base" / "model.safetensors")
    with pytest.raises(UnsupportedKind, match=r"cannot fold 0\.experts.*merge_and_unload"):
        fold([load(tmp_path / "a")], tmp_path / "base", tmp_path / "out")
    with pytest.raises(UnsupportedKind, match=r"^0\.experts.*linear layers only.*merge_and_unload"):
        export(load(tmp_path / "a"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
