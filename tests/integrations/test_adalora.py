"""AdaLoRA under CoTo: who sits out a step gets no gradient, does not move, and keeps its importance averages."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model

from loraloom.integrations.gates import Gates
from loraloom.strategies.progressive import CoTo
from tiny import tiny_llama

STEPS = 8


def adapted() -> Any:
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=2, tfinal=2, deltaT=1, total_step=STEPS, target_modules=["q_proj", "v_proj"]
    )
    return get_peft_model(tiny_llama(layers=3), config).train()


def trained(model: Any, draws: list[tuple[bool, ...]] | None, check: Any = None) -> Any:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    gates = Gates(model) if draws is not None else None
    ids = torch.randint(0, 32, (STEPS, 2, 6), generator=torch.Generator().manual_seed(0))
    for step in range(STEPS):
        if gates is not None and draws is not None:
            gates.set(draws[step])
        before = copy.deepcopy(dict(model.named_parameters()))
        averages = copy.deepcopy(model.base_model.rankallocator.exp_avg_ipt)
        model(input_ids=ids[step], labels=ids[step]).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        if check is not None:
            check(gates, draws[step], before, averages, step)
        optimizer.zero_grad()
    if gates is not None:
        gates.open()
    return {name: p.detach() for name, p in model.named_parameters()}


def test_all_on_is_as_peft_has_it() -> None:
    plain, gated = trained(adapted(), None), trained(adapted(), [(True,) * 3] * STEPS)
    assert all(torch.equal(plain[name], gated[name]) for name in plain)


def test_who_sits_out_stands_still() -> None:
    model = adapted()
    draws = [(True, False, True), (False, True, True), *[(True, step % 2 == 0, True) for step in range(2, STEPS)]]

    def check(gates: Gates, active: tuple[bool, ...], before: Any, averages: Any, step: int) -> None:
        allocator = model.base_model.rankallocator
        now = dict(model.named_parameters())
        for unit, on in zip(gates.units, active, strict=True):
            for name in [n for n in now if f".{unit}." in n and now[n].requires_grad]:
                assert (now[name].grad is not None) is on
                if name.split(".lora_")[1][0] != "E":  # masking ranks sets entries of E to 0
                    assert torch.equal(now[name], before[name]) is not on, (step, name)
                if step < STEPS - 2 and not on and name in averages:
                    assert torch.equal(allocator.exp_avg_ipt[name], averages[name])

    trained(model, draws, check)
    kept = model.peft_config["default"].rank_pattern
    assert sum(sum(one) for one in kept.values()) == 2 * 6  # target_r in 6 modules
    for weight in model.parameters():
        weight.grad = None
    ids = torch.ones(1, 4, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()  # the gates are open: everybody has gradients again
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def test_ranks_are_not_taken_from_the_unknown() -> None:
    never = [(True, False, True)] * STEPS
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj has not taken part .* larger tinit"):
        trained(adapted(), never)


def test_a_plan_of_coto_runs_through() -> None:
    coto = CoTo(STEPS, start=0.5, seed=0)
    trained(adapted(), [coto.active(step, 3) for step in range(STEPS)])
