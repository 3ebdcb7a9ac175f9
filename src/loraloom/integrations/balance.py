"""What training does to each adapted module: norms of gradient and update and the distance from the start, as it runs.

All of it stays on the device until it is asked for, and no matrix of out x in is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from loraloom.integrations.gates import Gates
from loraloom.integrations.trainer import Extended
from loraloom.probes.balance import WHAT, Balance

FILE = "balance.safetensors"


class BalanceMeter:
    """Notes the balance of a model in training, in any loop.

    Keeps a copy of the trained adapter weights: the start, from which the distance counts. A measurement takes some
    small products of factors, in float64, and waits for nothing; :attr:`result` does.

    Of DoRA the update is that of its factors alone; its magnitudes count for gradient and distance. Parameters that
    several modules share (VeRA and the like) count in each. Whole modules beside the adapter are not looked at.

    Args:
        model: a model with PEFT adapters, wrapped (DDP, torch.compile) or not.

    Raises:
        ValueError: it has no PEFT layers, none of them is trained, or they are sharded over devices.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"], r=1))
        >>> meter = BalanceMeter(model)
        >>> meter.note(0)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> meter.note(1)                           # after the step, before its gradients are cleared
        >>> [round(row[0], 3) for row in meter.result.distance]
        [0.0, ...]
    """

    def __init__(self, model: nn.Module) -> None:
        gates = Gates(model, "module")
        self._weights = {name: list(weights) for name, weights in gates.parameters().items() if weights}
        if not self._weights:
            raise ValueError("no adapter of the model is trained: all of its parameters are frozen")
        for name, weights in self._weights.items():
            if any(hasattr(weight, "device_mesh") or hasattr(weight, "ds_id") for weight in weights):
                raise ValueError(
                    f"{name} is sharded over devices (FSDP, ZeRO-3): its balance cannot be told; allowed: DDP"
                )
        self._layers = {name: gates.layers(name) for name in self._weights}
        self._moved_base = gates.moved_base
        self._start = {name: [w.detach().clone() for w in weights] for name, weights in self._weights.items()}
        self._gradient: Tensor | None = None
        self._rows: list[tuple[int, Tensor]] = []
        self._host: list[tuple[int, list[list[float]]]] = []
        self._since = 0

    @torch.no_grad()
    def gradients(self) -> None:
        """Take the gradients' norms now; the next :meth:`note` files them."""
        self._gradient = self._vector(self._norms_of([[w.grad for w in held] for held in self._weights.values()]))

    @torch.no_grad()
    def note(self, step: int) -> None:
        """File the norms after ``step`` optimizer steps; gradients are those that are there, unless taken before."""
        if self._gradient is None:
            self.gradients()
        moved = []
        for name, held in self._weights.items():
            moved.append([w.detach() - start for w, start in zip(held, self._start[name], strict=True)])
        updates = [None if self._moved_base else _update(self._layers[name]) for name in self._weights]
        rows = [self._gradient, self._vector(updates), self._vector(self._norms_of(moved))]
        self._rows.append((step, torch.stack(rows)))  # type: ignore[arg-type]
        self._gradient = None

    @property
    def result(self) -> Balance:
        """All that was noted so far; waits for the device."""
        self._host += [(step, values.tolist()) for step, values in self._rows]
        self._rows = []
        rows = {
            what: tuple(tuple(x if math.isfinite(x) else None for x in values[at]) for _, values in self._host)
            for at, what in enumerate(WHAT)
        }
        return Balance(tuple(step for step, _ in self._host), tuple(self._weights), since=self._since, **rows)

    @property
    def last(self) -> int:
        """The step noted last; -1 before the first."""
        return self._rows[-1][0] if self._rows else self._host[-1][0] if self._host else -1

    def save(self, path: str | Path) -> None:
        """Write the start and all that was noted, to go on from."""
        found = self.result
        held = {f"start/{name}/{i}": w for name, some in self._start.items() for i, w in enumerate(some)}
        held |= {f"noted/{step}": torch.tensor(values, dtype=torch.float64) for step, values in self._host}
        told = {"since": str(found.since), "modules": "\n".join(found.modules)}
        save_file({name: tensor.contiguous().cpu() for name, tensor in held.items()}, path, metadata=told)

    def load(self, path: str | Path) -> None:
        """Go on from what :meth:`save` wrote.

        Raises:
            ValueError: it is of other modules or of parameters of another size.
        """
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            if told.get("modules") != "\n".join(self._weights):
                raise ValueError(f"{path} is of other modules than this model trains")
            for name, some in self._start.items():
                for i, start in enumerate(some):
                    held = file.get_tensor(f"start/{name}/{i}")
                    if held.shape != start.shape:
                        raise ValueError(f"{path}: {name} starts as {tuple(held.shape)}, not {tuple(start.shape)}")
                    start.copy_(held)
            steps = sorted(int(key.partition("/")[2]) for key in file.keys() if key.startswith("noted/"))  # noqa: SIM118
            self._host = [(step, file.get_tensor(f"noted/{step}").tolist()) for step in steps]
        self._rows, self._since = [], int(told["since"])

    def start_at(self, step: int) -> None:
        """Note the weights as they are now, after ``step`` steps, as those from which the distance counts."""
        self._since = step
        self.note(step)

    def _norms_of(self, tensors: list[list[Any]]) -> list[Tensor | None]:
        """The norm of each list as one vector, all of them in one go; None where a list has no tensor."""
        flat = [t for some in tensors for t in some if t is not None]
        kind = reduce(torch.promote_types, (t.dtype for t in flat), torch.float32)
        norms = iter(torch._foreach_norm(flat, dtype=kind) if flat else ())
        found: list[Tensor | None] = []
        for some in tensors:
            own = [next(norms) for t in some if t is not None]
            found.append(torch.linalg.vector_norm(torch.stack(own)) if len(own) > 1 else own[0] if own else None)
        return found

    def _vector(self, values: list[Tensor | None]) -> Tensor:
        """One tensor of scalars; NaN is None."""
        device = next(iter(self._weights.values()))[0].device
        known = [torch.full((), math.nan, device=device) if value is None else value.to(device) for value in values]
        return torch.stack([value.float() for value in known])


def _update(layers: list[Any]) -> Tensor | None:
    """Norm of the update of a module; None where it is no plain product of two factors."""
    if len(layers) != 1 or len(layers[0].active_adapters) != 1:
        return None
    parts = _factors(layers[0], layers[0].active_adapters[0])
    return torch.stack([_norm(b, a) * scale for b, a, scale in parts]).norm() if parts else None


def _norm(b: Tensor, a: Tensor) -> Tensor:
    """Frobenius norm of ``b @ a``: the root of tr((B^T B)(A A^T)), in float64 where the device has it."""
    kind = torch.float32 if b.device.type == "mps" else torch.float64
    b, a = b.detach().to(kind), a.detach().to(kind)
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()


def _factors(layer: Any, adapter: str) -> list[tuple[Tensor, Tensor, float]] | None:
    """B (out x r), A (r x in) and scale of an adapter of a layer; of MokA one a modality."""
    for a_name, b_name in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"), ("hira_A", "hira_B")):
        held = getattr(layer, a_name, {})
        if adapter not in held or getattr(layer, "num_experts", 1) > 1:
            continue
        a, b = (getattr(one, "weight", one) for one in (held[adapter], getattr(layer, b_name)[adapter]))
        if b[0].numel() != len(a) and not hasattr(layer, "plan"):
            return None  # a convolution in groups
        scale = layer.scaling[adapter] if hasattr(layer, "scaling") else 1.0
        b, a = b.reshape(len(b), -1), a.reshape(len(a), -1)
        return [(one_b, one_a, scale) for one_b, one_a in _by_modality(layer, b, a)]
    return None


def _by_modality(layer: Any, b: Tensor, a: Tensor) -> list[tuple[Tensor, Tensor]]:
    plan = getattr(layer, "plan", None)
    if plan is None:
        return [(b, a)]
    found, row = [], 0
    for at, rank in enumerate(plan.ranks):
        rows = a if plan.own == "B" else a[row : row + rank]
        column = 0 if plan.own == "A" else at * plan.width
        found.append((b[:, column : column + rank], rows))
        row += rank
    return found


class BalanceCallback(TrainerCallback):
    """Note the balance of training in HF Trainer and its kin: ``Trainer(..., callbacks=[BalanceCallback(every=10)])``.

    CoTo's claim is about it (arXiv 2506.05713): plain LoRA trains its upper layers most. Noted are the start, every
    so many optimizer steps, and the end: norms by module of the gradient as the optimizer gets it (averaged over
    micro-batches and processes, divided by the loss scale, clipped), of the update and of the way from the start
    (:class:`loraloom.probes.balance.Balance`). :attr:`result` has them all; the training log and its reporters get
    ``balance/gradient/<layer>``, ``balance/update/<layer>``, ``balance/distance/<layer>`` and ``balance/top_third``,
    the share of the squared update that the upper third of the layers has. Nothing waits for the device before that.

    Checkpoints hold what was noted (``balance.safetensors``), and a run resumed from its own output folder goes on with
    it. Where a checkpoint has none, the distance counts from there, and ``result.since`` says so. Processes of DDP
    have equal numbers; the main one writes and logs.

    Args:
        every: optimizer steps between measurements.

    Raises:
        ValueError: ``every`` is below 1. When training begins: as :class:`BalanceMeter`, or with fp16 without
            clipping, where gradients would still be multiplied by the loss scale.
    """

    def __init__(self, every: int = 10) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a whole number of optimizer steps, at least 1, got {every!r}")
        self.every = every
        self._meter: BalanceMeter | None = None
        self._trainer = Extended(self)
        self._told = -1

    @property
    def result(self) -> Balance:
        """What was noted.

        Raises:
            ValueError: no training has begun.
        """
        return self._begun().result

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the start, from the checkpoint of a run that is resumed."""
        if args.fp16 and not args.max_grad_norm:
            raise ValueError("fp16 without max_grad_norm leaves gradients multiplied by the loss scale; allowed: bf16")
        self._meter, self._told = BalanceMeter(kwargs["model"]), -1
        kept = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
        if state.global_step and kept.is_file():
            self._meter.load(kept)
        else:
            self._meter.start_at(state.global_step)
        self._trainer.attach(log=self._log)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are whole, and clipped."""
        if self._due(state.global_step + 1, state):
            self._begun().gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Weights are new."""
        if self._due(state.global_step, state):
            self._begun().note(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What was noted goes into the checkpoint."""
        if args.should_save:
            self._begun().save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The end; a run that stopped early has no gradient there."""
        if self._begun().last < state.global_step:
            self._begun().note(state.global_step)
        self._trainer.detach()

    def _due(self, step: int, state: Any) -> bool:
        return step % self.every == 0 or step == state.max_steps

    def _begun(self) -> BalanceMeter:
        if self._meter is None:
            raise ValueError("no training has begun, so there is no balance of it")
        return self._meter

    def _log(self, before: Callable[..., None]) -> Callable[..., None]:
        def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs and self._begun().last > self._told:  # the training log; evaluation has eval_loss
                logs.update(self._numbers())
            before(logs, *args, **kwargs)

        return log

    def _numbers(self) -> Mapping[str, float]:
        """The newest measurement, by layer."""
        found = self.result
        self._told = found.steps[-1]
        numbers: dict[str, float] = {}
        for what in WHAT:
            units, rows = found.by(what)
            values = zip(units, rows[-1], strict=True)
            numbers |= {f"balance/{what}/{unit}": value for unit, value in values if value is not None}
        spread = found.spread()[-1]
        if spread is not None and spread.top_third is not None:
            numbers["balance/top_third"] = spread.top_third
        return numbers
