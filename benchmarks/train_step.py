"""What a training step costs beside the frozen model: PEFT's own code and the fast paths, with and without CoTo.

    python benchmarks/train_step.py                       # about 25 minutes on 2 cores; results/train_step.{json,md}
    python benchmarks/train_step.py --models llama --kinds lora dora hira --rounds 2
    python benchmarks/train_step.py --models llama --kinds lora moka --hidden 256 --layers 4 --rounds 2 --only-compiled
    python benchmarks/train_step.py --models llama --dtypes bfloat16 --hidden 256 --layers 3 --rows 2 --rounds 1
    python benchmarks/train_step.py --dtypes float32 bfloat16 --checkpointing --compile --device cuda --out FOLDER

Random weights; adapters on all linear layers, rank 16, no dropout; factors in float32, as PEFT has them. A step is the
forward and the backward pass (no optimizer), with the drawing of gates where there are any. The floor is the frozen
model alone: its forward, and the backward through all of its activations. Each round walks a whole CoTo schedule of
STEPS steps; at each step every variant runs once, in an order of its own, all in one process. A figure is the median
over rounds of the ratio of sums over the schedule, with the lowest and the highest round. Time is that of the process
on its processors (on a GPU: wall time between synchronisations), which other work on the machine disturbs less.
Peak memory is what the step holds beyond the weights, followed tensor by tensor (on a GPU: as the allocator says), at
the schedule's end, where all adapters are on; the gradients of the adapters are in it, and of MokA's there are more.

Compiled rows compare with the compiled floor and with PEFT's compiled model; each kind has a floor of its own, measured
with it. They have no peak on a CPU, where the buffers of compiled code are not followed.

"snippet" is CoTo as its authors' README shows it, a draw a layer that rises from 0.1 to 1 over three quarters of the
run, by PEFT's own switch on PEFT's own code. MokA's PEFT variant is PEFT's LoRA of equal rank.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import statistics
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from peft import HiraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, ViTConfig, ViTModel

import loraloom as ll
from loraloom.integrations.gates import Gates

HERE = Path(__file__).parent
RANK, ALPHA, STEPS = 16, 32, 12
LINEAR = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "bert": ["query", "key", "value", "dense"],
    "vit": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
}
KINDS = ("lora", "rslora", "dora", "hira", "lori", "moka")
VARIANTS = ("PEFT", "PEFT, snippet", "ours", "ours, CoTo")


def bare(family: str, size: argparse.Namespace) -> nn.Module:
    """A random model of a family; the same each time."""
    torch.manual_seed(0)
    form: dict[str, Any] = {
        "hidden_size": size.hidden,
        "intermediate_size": 8 * size.hidden // 3 if family == "llama" else 4 * size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": max(1, size.hidden // 64),
    }
    if family == "llama":
        return LlamaModel(LlamaConfig(**form, vocab_size=100, use_cache=False))
    if family == "bert":
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertModel(BertConfig(**form, **still, vocab_size=100), add_pooling_layer=False)
    side = round(size.tokens**0.5)
    return ViTModel(ViTConfig(**form, image_size=8 * side, patch_size=8), add_pooling_layer=False)


def config(kind: str, targets: list[str]) -> Any:
    """The configuration of PEFT's variant."""
    if kind == "hira":
        return HiraConfig(r=RANK, target_modules=targets)
    more = {"use_dora": kind == "dora", "use_rslora": kind == "rslora"}
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **more)


def adapted(family: str, kind: str, variant: str, size: argparse.Namespace) -> nn.Module:
    """The model of a variant: frozen, with PEFT's adapters, or with ours."""
    model = bare(family, size).to(size.dtype)
    if variant == "floor":
        return model.requires_grad_(False)
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [path for path in linear if path.rpartition(".")[2] in LINEAR[family]]
    if kind == "moka" and variant.startswith("ours"):
        plan = ll.MokA({"image": 1}, rank=RANK, alpha=ALPHA, dropout=0.0)
        model = plan.wrap(model, target_modules=targets, task_type=None)
    else:
        model = get_peft_model(model, config(kind, targets))
    for name, weight in model.named_parameters():
        if "lora_B" in name or "hira_B" in name:
            nn.init.normal_(weight, std=0.02)
    if kind == "lori":
        ll.LoRI(mask=ll.Mask.of(sparse(model)), start="fresh", seed=0).attach(model)
    return ll.fast(model) if variant.startswith("ours") else model


class Subject:
    """A model with adapters (none: the floor) and what a step of it is."""

    def __init__(self, family: str, kind: str, variant: str, size: argparse.Namespace) -> None:
        self.model = adapted(family, kind, variant, size).to(size.device).train()
        if size.checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if variant.startswith("PEFT"):
                self.model.enable_input_require_grads()  # as a Trainer does
        drawn = variant.endswith(("snippet", "CoTo"))
        self.gates = Gates(self.model) if drawn else None
        self.start = 0.1 if variant.endswith("snippet") else 0.0
        if size.compile:
            for module in list(self.model.modules()):
                for layer in module if isinstance(module, nn.ModuleList) else ():
                    layer.compile()
        self.inputs = inputs(family, kind, variant, size)

    def prepare(self, step: int, turn: int) -> None:
        """The state of a step, outside of what is timed but for the gates."""
        self.plan = ll.CoTo(STEPS, start=self.start, seed=turn)
        self.step = step

    def run(self) -> None:
        """Forward and backward."""
        if self.gates is not None:
            self.plan.apply(self.gates, self.step)
        self.model(**self.inputs).last_hidden_state.float().square().mean().backward()

    def clear(self) -> None:
        """No gradients."""
        self.model.zero_grad(set_to_none=True)
        for value in self.inputs.values():
            value.grad = None  # the floor's


def sparse(model: nn.Module) -> dict[str, Tensor]:
    """A mask of a tenth of each B, at random."""
    from peft.tuners.lora.layer import LoraLayer

    draw = torch.Generator().manual_seed(0)
    layers = {path: m for path, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    shapes = {path: layer.lora_B["default"].weight.shape for path, layer in layers.items()}
    return {path: torch.rand(shape, generator=draw) < 0.1 for path, shape in shapes.items()}


def inputs(family: str, kind: str, variant: str, size: argparse.Namespace) -> dict[str, Tensor]:
    """The same for all variants; the floor's backward goes down to the embeddings, which need no gradient otherwise."""
    draw = torch.Generator().manual_seed(1)
    if family == "vit":
        side = 8 * round(size.tokens**0.5)
        batch = {"pixel_values": torch.randn(size.rows, 3, side, side, generator=draw)}
    else:
        batch = {"inputs_embeds": torch.randn(size.rows, size.tokens, size.hidden, generator=draw)}
    batch = {name: value.to(size.device, size.dtype) for name, value in batch.items()}
    if variant == "floor":
        for value in batch.values():
            value.requires_grad_()
    if kind == "moka" and variant.startswith("ours"):
        ids = torch.zeros(size.rows, size.tokens, dtype=torch.long)
        ids[:, : size.tokens // 2] = 1
        batch |= {"modality_ids": ids.to(size.device), "question_mask": (1 - ids).to(size.device)}
    return batch


def timed(work: Callable[[], None], device: str) -> float:
    """Seconds of the processor; of the wall on a device, with all of its work done."""
    if device == "cpu":
        started = time.process_time()
        work()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


class Followed(TorchDispatchMode):
    """Bytes of the storages that operations make, from there until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.held: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        outs = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for out in tree_leaves(outs):
            if isinstance(out, Tensor):
                storage = out.untyped_storage()
                key = storage._cdata
                if key not in self.held and key not in given:
                    self.held[key] = weakref.ref(storage, partial(self.freed, key, storage.nbytes()))
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
        return outs

    def freed(self, key: int, size: int, _: Any) -> None:
        self.now -= size
        self.held.pop(key, None)


def peak(subject: Subject, device: str) -> int:
    """Bytes at the most that a step holds, beyond what is there before and after it."""
    subject.prepare(STEPS - 1, 0)
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        subject.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with Followed() as memory:
        subject.run()
    return memory.most


def measured(family: str, size: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one model: each variant of each kind beside the floor."""
    names = [("", "floor"), *((kind, variant) for kind in size.kinds for variant in VARIANTS)]
    if family != "llama":
        names = [(kind, variant) for kind, variant in names if kind != "moka"]
    if size.compile:  # else the compiler would give up in silence, and the rest would run as it is
        torch._dynamo.reset()
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        torch._dynamo.config.recompile_limit = 16 * len(names)
        torch._inductor.config.compile_threads = 1  # its own workers each take long to start
    subjects = {name: Subject(family, *name, size) for name in names}
    order, sums = random.Random(0), []
    for turn in range(size.rounds + 1):  # the first warms up
        spent = dict.fromkeys(names, 0.0)
        for step in range(STEPS) if turn or size.compile else (0, STEPS // 2, STEPS - 1):
            for name in order.sample(names, len(names)):
                subject = subjects[name]
                subject.prepare(step, turn)
                spent[name] += timed(subject.run, size.device)
                subject.clear()
        sums.append(spent)
    memory, learned = {}, {}
    for name, subject in subjects.items():
        memory[name] = peak(subject, size.device) if not size.compile or size.device != "cpu" else 0
        learned[name] = sum(w.grad.nbytes for w in subject.model.parameters() if w.grad is not None)
        subject.clear()
    return [{**row(family, name, sums[1:], memory, size), "gradients": learned[name]} for name in names]


def row(family: str, name: tuple[str, str], sums: list[dict], memory: dict, size: argparse.Namespace) -> dict[str, Any]:
    """One variant of one kind."""
    kind, variant = name

    def over(other: tuple[str, str]) -> list[float]:
        ratios = sorted(spent[name] / spent[other] for spent in sums)
        return [statistics.median(ratios), ratios[0], ratios[-1]]

    return {
        "model": family,
        "kind": kind,
        "variant": variant,
        "dtype": str(size.dtype).removeprefix("torch."),
        "checkpointing": size.checkpointing,
        "compile": size.compile,
        "ms": 1e3 * statistics.median(spent[name] for spent in sums) / STEPS,
        "over_floor": over(("", "floor")),
        "faster_than_peft": None if variant == "floor" else [1 / x for x in over((kind, "PEFT"))],
        "peak": memory[name],
    }


def bound(kind: str, coto: bool, family: str, size: argparse.Namespace) -> float:
    """Floating-point operations of the linear layers over those of the floor's, by the counts in loraloom.fused.

    With CoTo: the mean over its schedule, with the backward pass ending at the lowest active layer; attention and the
    passes over outputs are left out on both sides.
    """
    h, n, r = size.hidden, size.rows * size.tokens, RANK
    wide = 8 * h // 3 if family == "llama" else 4 * h
    shapes = [(h, h)] * 4 + ([(h, wide)] * 2 if family == "llama" else [(h, wide)]) + [(wide, h)]
    floor = sum(4 * n * i * o for i, o in shapes)
    extra = {
        "dora": lambda i, o: 6 * n * r * (i + o) + 2 * r * i * o,
        "hira": lambda i, o: 2 * n * i * o + 8 * r * i * o,
    }
    extra["lori"] = lambda i, o: 4 * n * r * (i + o)
    each = sum(extra.get(kind, lambda i, o: 6 * n * r * (i + o))(i, o) for i, o in shapes)
    if not coto:
        return 1 + each / floor
    total = 0.0
    for step in range(STEPS):
        draws = [ll.CoTo(STEPS, start=0.0, seed=turn).active(step, size.layers) for turn in range(200)]
        lowest = statistics.fmean(draw.index(True) for draw in draws) / size.layers
        share = statistics.fmean(sum(draw) for draw in draws) / size.layers
        total += 1 - lowest / 2 + share * each / floor
    return total / STEPS


def page(rows: list[dict[str, Any]], size: argparse.Namespace, machine: str) -> str:
    """The tables."""
    told = [" ".join(part.split()) for part in (__doc__ or "").strip().split("\n\n")]
    lines = [f"# {told[0].rstrip('.')}", ""]
    for part in (*told[2:], f"{machine}."):
        lines += [part, ""]
    form = f"Hidden {size.hidden}, {size.layers} layers, {size.rows} x {size.tokens} tokens, {size.rounds} rounds."
    ops = "The bound is the floating-point operations of the linear layers over the floor's (`bound` in the script)."
    lines += [f"{form} {ops}", ""]
    for key in dict.fromkeys((r["model"], r["dtype"], r["checkpointing"], r["compile"]) for r in rows):
        own = [r for r in rows if (r["model"], r["dtype"], r["checkpointing"], r["compile"]) == key]
        extra = [name for name, on in (("checkpointing", key[2]), ("torch.compile by layer", key[3])) if on]
        lines += [f"## {', '.join([key[0], key[1], *extra])}", ""]
        most = f", peak {own[0]['peak'] / 2**20:.1f} MiB" if own[0]["peak"] else ""
        lines += [f"Floor: {own[0]['ms']:.0f} ms a step{most}.", ""]
        lines += [
            "| | variant | over the floor | bound | faster than PEFT's | peak over PEFT's |",
            "|---|---|--:|--:|--:|--:|",
        ]
        for one in own:
            if one["variant"] == "floor":  # when compiled, each kind has one
                continue
            theirs = next(r for r in own if (r["kind"], r["variant"]) == (one["kind"], "PEFT"))
            least = bound(one["kind"], one["variant"].endswith("CoTo"), key[0], size)
            over, by = one["over_floor"], one["faster_than_peft"]
            peak_ratio = f"{one['peak'] / theirs['peak']:.2f}" if theirs["peak"] else ""
            shown = f"{least:.2f}" if one["variant"].startswith("ours") else ""
            gain = "" if one["variant"] == "PEFT" else f"{by[0]:.2f} ({by[2]:.2f} to {by[1]:.2f})"
            cells = [
                one["kind"],
                one["variant"],
                f"{over[0]:.2f} ({over[1]:.2f} to {over[2]:.2f})",
                shown,
                gain,
                peak_ratio,
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure, then write the JSON and the page."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--models", nargs="+", default=["llama", "bert", "vit"], choices=list(LINEAR))
    options.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    options.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    options.add_argument("--rounds", type=int, default=3)
    for name, default in (("hidden", 512), ("layers", 12), ("rows", 4), ("tokens", 64)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--checkpointing", action="store_true", help="also with gradient checkpointing")
    options.add_argument("--compile", action="store_true", help="also with torch.compile, layer by layer")
    options.add_argument("--only-compiled", action="store_true", help="nothing but that")
    options.add_argument("--device", default="cpu")
    options.add_argument("--out", type=Path, default=HERE / "results")
    chosen = options.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    device = torch.cuda.get_device_name() if chosen.device != "cpu" else f"{cpu}, {torch.get_num_threads()} thread(s)"
    machine = f"{device}, torch {torch.__version__}, {platform.system()}"
    plain = [] if chosen.only_compiled else [(False, False)] + [(True, False)] * chosen.checkpointing
    ways = plain + [(False, True)] * (chosen.compile or chosen.only_compiled)
    rows: list[dict[str, Any]] = []
    form = {name: vars(chosen)[name] for name in ("hidden", "layers", "rows", "tokens", "rounds")}
    for dtype, family, (checkpointing, compiled) in itertools.product(chosen.dtypes, chosen.models, ways):
        for kinds in [[kind] for kind in chosen.kinds] if compiled else [chosen.kinds]:  # graphs of a kind at a time
            way = {"dtype": getattr(torch, dtype), "checkpointing": checkpointing, "compile": compiled, "kinds": kinds}
            rows += measured(family, argparse.Namespace(**{**vars(chosen), **way}))
            told = json.dumps({"machine": machine, "size": form, "rows": rows}, indent=1)
            (chosen.out / "train_step.json").write_text(told + "\n")
            (chosen.out / "train_step.md").write_text(page(rows, chosen, machine))
            print(family, dtype, checkpointing, compiled, *kinds, "done", flush=True)


if __name__ == "__main__":
    main()
