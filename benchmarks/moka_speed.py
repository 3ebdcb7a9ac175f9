"""What MokA costs: forward and training-step time beside PEFT's plain LoRA of equal rank, on the same model and tokens.

    python benchmarks/moka_speed.py                  # three minutes on 2 cores; results/moka_speed.{json,md}
    python benchmarks/moka_speed.py --dtypes float32,bfloat16    # where the processor has bfloat16; else it takes long
    python benchmarks/moka_speed.py --device cuda --out FOLDER

A Llama-like language model (hidden 512, 12 layers) in LLaVA with a tiny vision tower; 4 rows of 128 tokens, 64 of them
image (with two modalities besides text: 32 and 32). All linear layers of the language model, r = 4, no dropout.
Variants take turns in one process, in 15 rounds (7 for other types than float32). Figures are medians over rounds of
the ratio to LoRA in the same round, with the first and third quartile, of wall time and of CPU time (which other work
on the machine disturbs less).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from loraloom.strategies.modality import MokA

HERE = Path(__file__).parent
RANK, ALPHA = 4, 16
ROWS, TOKENS, IMAGE = 4, 128, 64
IMAGE_ID, AUDIO_ID = 998, 999
VARIANTS = ("LoRA", "MokA, 2 modalities", "MokA, 3 modalities")


def llava(dtype: torch.dtype, device: str) -> Any:
    """Twelve layers that are random; the same each time."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
        use_cache=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID)
    return LlavaForConditionalGeneration(config).to(device=device, dtype=dtype)


def adapted(variant: str, dtype: torch.dtype, device: str) -> nn.Module:
    """A model with the adapters of a variant, their factors in float32 as PEFT has them."""
    model = llava(dtype, device)
    if variant == "LoRA":
        # every linear layer of the language model, named as MokA names them
        targets = r".*language_model\..*\.(q|k|v|o|gate|up|down)_proj"
        peft_model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    else:
        names = {"image": 1} if "2" in variant else {"image": 1, "audio": 2}
        peft_model = MokA(names, rank=RANK, alpha=ALPHA, dropout=0.0).wrap(model)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    return peft_model.train()


def inputs(variant: str, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The same tokens for all; MokA of three modalities takes half of the image tokens for audio."""
    chance = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 900, (ROWS, TOKENS), generator=chance)
    ids[:, 1 : 1 + IMAGE] = IMAGE_ID
    labels = ids.clone()
    labels[:, : TOKENS - 16] = -100
    batch = {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(ROWS, 3, 32, 32, generator=chance).to(dtype),
    }
    if "3" in variant:
        types = (ids == IMAGE_ID).long()
        types[:, 1 : 1 + IMAGE // 2] = 2
        batch["modality_ids"] = types
    return {name: value.to(device) for name, value in batch.items()}


def timed(work: Callable[[], None], device: str) -> tuple[float, float]:
    """Wall and CPU seconds."""
    started, used = time.perf_counter(), time.process_time()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - used


def measured(dtype: torch.dtype, device: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of the table: each variant in turn, so many rounds."""
    models = {variant: adapted(variant, dtype, device) for variant in VARIANTS}
    batches = {variant: inputs(variant, dtype, device) for variant in VARIANTS}

    def forward(variant: str) -> None:
        with torch.no_grad():
            models[variant](**batches[variant])

    def step(variant: str) -> None:
        models[variant](**batches[variant]).loss.backward()

    found = []
    for name, work in (("forward", forward), ("forward and backward", step)):
        times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
        for at in range(-1, rounds):  # the first warms up
            turn = VARIANTS[at % len(VARIANTS) :] + VARIANTS[: at % len(VARIANTS)]
            for variant in turn:
                one = timed(partial(work, variant), device)
                if at >= 0:
                    times[variant].append(one)
        found += [row(name, str(dtype).removeprefix("torch."), variant, times) for variant in VARIANTS]
    return found


def row(name: str, dtype: str, variant: str, times: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """One variant beside LoRA."""
    told: dict[str, Any] = {"what": name, "dtype": dtype, "variant": variant, "rounds": len(times[variant])}
    for at, kind in enumerate(("wall", "cpu")):
        own, lora = ([one[at] for one in times[which]] for which in (variant, VARIANTS[0]))
        ratios = [mine / theirs for mine, theirs in zip(own, lora, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        told[kind] = {"ms": 1e3 * statistics.median(own), "ratio": middle, "from": low, "to": high}
    return told


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    machine = ", ".join(f"{key} {value}" for key, value in report["made"].items())
    lines = [
        "# MokA beside LoRA: time of a forward pass and of a training step",
        *(__doc__ or "").split("\n\n")[2:],
        f"Made with: {machine}.\n",
        "| | numbers | variant | wall ms | of LoRA's (quartiles) | CPU ms | of LoRA's (quartiles) |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for one in report["rows"]:
        cells = [one["what"], one["dtype"], one["variant"]]
        for kind in ("wall", "cpu"):
            had = one[kind]
            cells += [f"{had['ms']:.1f}", f"{had['ratio']:.3f} ({had['from']:.3f} to {had['to']:.3f})"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def processor() -> str:
    """Its name, where the system tells."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    on_cpu = asked.device == "cpu"
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    made = {
        "device": asked.device if on_cpu else torch.cuda.get_device_name(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory GB": round(pages, 1),
        "threads": asked.threads,
        "torch": torch.__version__,
    }
    report: dict[str, Any] = {"made": made, "rows": []}
    asked.out.mkdir(parents=True, exist_ok=True)
    for dtype in asked.dtypes.split(","):
        rounds = asked.rounds if dtype == "float32" else max(7, asked.rounds // 2)
        report["rows"] += measured(getattr(torch, dtype), asked.device, rounds)
        (asked.out / "moka_speed.json").write_text(json.dumps(report, indent=1) + "\n")
        (asked.out / "moka_speed.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
