"""Adapters of grouped convolutions, written and read by PEFT; every group against what the live layer computes."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from loraloom.adapter import AdapterMismatch, UnsupportedKind
from loraloom.folding import fold
from loraloom.integrations.peft import attached, from_model
from loraloom.ops.compress import compress
from loraloom.ops.merge import merge
from loraloom.ops.prune import prune
from loraloom.store import load, save
from loraloom.strategies.sparse import calibrate
from test_checkpoint import single

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor"),  # PEFT takes the biases of B for torn files
]
IN, OUT, G = 8, 12, 4
X = torch.randn(2, IN, 5, 5, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(IN, OUT, 3, padding=1, groups=G)
        self.head = nn.Linear(OUT, 3)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


def made(folder, seed: int, rank: int = 8, **more) -> nn.Module:
    config = LoraConfig(r=rank, lora_alpha=3, target_modules=["conv", "head"], rank_pattern={"head": 2}, **more)
    live = get_peft_model(Model(), config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in live.named_parameters():
        if "lora_" in name:
            parameter.data = torch.rand(parameter.shape, generator=generator) - 0.5
    live.save_pretrained(folder)
    return live


def update(live: nn.Module) -> torch.Tensor:
    """What the adapted convolution of a live model adds to the plain one."""
    conv = live.base_model.model.conv
    return conv(X) - conv.base_layer(X)


def of_groups(adapter) -> torch.Tensor:
    """The same from our modules: every group an ordinary convolution that sees all input."""
    parts = [adapter.modules[name] for name in (f"conv[{at}/{G}]" for at in range(G))]
    weight = torch.cat([part.delta().view(-1, *part.kernel) for part in parts])
    bias = torch.cat([part.scale * part.bias for part in parts]) if parts[0].bias is not None else None
    return nn.functional.conv2d(X, weight, bias, padding=1)


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_every_group_is_a_module_with_its_own_update(tmp_path, bias):
    live = made(tmp_path / "a", 1, lora_bias=bias)
    adapter = load(tmp_path / "a")
    assert list(adapter.modules) == [*(f"conv[{at}/{G}]" for at in range(G)), "head"]
    assert adapter.shape("conv[1/4]") == (OUT // G, IN * 9, 2) == adapter.modules["conv[1/4]"].shape
    assert close(of_groups(adapter), update(live))
    save(adapter, tmp_path / "b")
    again = PeftModel.from_pretrained(Model(), tmp_path / "b").eval()
    assert close(again(X), live(X)) and close(update(again), update(live))
    with attached(Model(), from_model(live)) as third:
        assert close(third(X), live(X))


@pytest.mark.parametrize("method", ["linear", "svd", "tsv_m", "ties"])
def test_merges_are_right_for_every_group(tmp_path, method):
    lives = [made(tmp_path / f"a{seed}", seed, rank) for seed, rank in ((1, 8), (2, 4))]
    merged = merge([load(tmp_path / f"a{seed}") for seed in (1, 2)], method, [0.5, -2.0])
    again = PeftModel.from_pretrained(Model(), save(merged, tmp_path / "m")).eval()
    assert close(update(again), of_groups(merged))
    if method == "linear":
        assert close(update(again), 0.5 * update(lives[0]) - 2 * update(lives[1]))


def test_groups_of_other_ranks_and_pruned_ones_are_filled_up(tmp_path):
    made(tmp_path / "a", 1)
    adapter = load(tmp_path / "a")
    small = compress(adapter, energy=0.6)
    again = PeftModel.from_pretrained(Model(), save(small, tmp_path / "s")).eval()
    assert close(update(again), of_groups(small))
    few = prune(adapter, unit="module", density=0.5)
    tensors = load_file(save(few, tmp_path / "p") / "adapter_model.safetensors")
    stored = load(tmp_path / "p")
    assert tensors["base_model.model.conv.lora_B.weight"].shape[0] == OUT
    for name in adapter.modules:
        want = few.modules[name].delta() if name in few.modules else torch.zeros(adapter.shape(name)[:2])
        assert close(stored.modules[name].delta() if name in stored.modules else 0 * want, want)


def test_what_cannot_be_is_refused(tmp_path):
    made(tmp_path / "a", 1)
    base = single(tmp_path / "base", Model().state_dict())
    with pytest.raises(AdapterMismatch, match="conv"):  # the update sees all input, the weight only its group's
        fold([load(tmp_path / "a")], base, tmp_path / "f")
    live = get_peft_model(Model(), LoraConfig(r=4, target_modules=["conv"], use_dora=True))
    live.save_pretrained(tmp_path / "d")
    with pytest.raises(UnsupportedKind, match="grouped convolution with DoRA"):
        load(tmp_path / "d")


def test_a_mask_is_of_the_entries_of_b(tmp_path):
    live = made(tmp_path / "a", 1)
    adapter = load(tmp_path / "a")
    mask = calibrate(adapter, density=0.5, scope="module")
    stored = live.base_model.model.conv.lora_B["default"].weight.detach().flatten(1)
    assert mask.shapes == {"conv": tuple(stored.shape), "head": (3, 2)}
    kept = stored.abs() >= stored.abs().flatten().sort(descending=True).values[stored.numel() // 2 - 1]
    assert torch.equal(mask["conv"], kept)
    assert not (mask["conv"] & calibrate(adapter, density=0.5, scope="module", exclude=mask)["conv"]).any()
