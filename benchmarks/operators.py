"""Operators on adapters of Llama-3-8B shapes: time, memory, how far from the bound; beside PEFT where it can follow.

    python benchmarks/operators.py                      # about 15 minutes on 2 cores; needs 3 GB of disk
    python benchmarks/operators.py --layers 2 --repeat 1 --only cat,svd
    python benchmarks/operators.py --against OLD/src --only svd,iso   # beside older code, a table of its own

Eight adapters of rank 16 in bfloat16 with random factors are written to a temporary folder. Every row runs in a process
of its own, row after row in each round, so that noise falls on all; times are medians. The bound of a row that only
moves bytes is copying the eight weight files (and bringing the copies to the disk, as ``save`` does). PEFT merges
adapters of a live model, so it is compared on a smaller model (hidden size 1024) that both take in one run. mergekit
merges whole models only and cannot read or write an adapter by itself: there is nothing to set beside it.
With ``--against`` every row runs in turn on the older and on this code, and CPU seconds are compared: they say
something beside other work too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

SHAPES = {  # of one layer of Llama-3-8B: out, in
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
# name: (operation, arguments, share of the layers that it runs on)
ROWS: dict[str, tuple[str, dict[str, Any], float]] = {
    "copy the files": ("copy", {"sync": False}, 1),
    "copy the files, fsync": ("copy", {"sync": True}, 1),
    "cat": ("merge", {"method": "cat"}, 1),
    "linear, factors": ("merge", {"method": "linear", "space": "factors"}, 1),
    "svd, rank 16": ("merge", {"method": "svd"}, 1),
    "linear, energy 0.9": ("merge", {"method": "linear", "energy": 0.9}, 1),
    "linear in core, rank 16": ("merge", {"method": "linear", "space": "core", "rank": 16}, 1),
    "iso_c, rank 16": ("merge", {"method": "iso_c", "rank": 16}, 1),
    "iso_cts, rank 16": ("merge", {"method": "iso_cts", "rank": 16}, 1),
    "tsv_m, rank 16": ("merge", {"method": "tsv_m", "rank": 16}, 1),
    "cart, rank 16": ("merge", {"method": "cart", "rank": 16}, 1),
    "ties in core, rank 16": ("merge", {"method": "ties", "space": "core", "rank": 16}, 1),
    "karcher, rank 16": ("merge", {"method": "karcher", "rank": 16}, 1),
    "linear in knots, rank 16": ("merge", {"method": "linear", "space": "knots", "rank": 16}, 1),
    "ties in knots, rank 16": ("merge", {"method": "ties", "space": "knots", "rank": 16}, 1),
    "compress one to rank 4": ("compress", {"rank": 4}, 1),
    "prune one, density 0.5": ("prune", {"density": 0.5}, 1),
    "ties, dense updates": ("merge", {"method": "ties"}, 1 / 32),
    "dare, dense updates": ("merge", {"method": "dare"}, 1 / 32),
}
PEFT_ROWS = {  # PEFT's combination type: ours that does the same
    "cat": {"method": "cat"},
    "svd": {"method": "svd"},
    "linear": {"method": "linear", "space": "factors"},
    "ties": {"method": "ties", "space": "factors"},
    "magnitude_prune": {"method": "magnitude", "space": "factors"},
    "ties_svd": {"method": "ties", "rank": 16},
}
SMALL = {"layers": 2, "scale": 4, "adapters": 4}


def generate(folder: Path, layers: int, adapters: int, rank: int, scale: int = 1) -> None:
    """PEFT folders with random factors; ``scale`` divides every size."""
    from safetensors.torch import save_file

    for k in range(adapters):
        generator = torch.Generator().manual_seed(k)
        held = {}
        for layer in range(layers):
            for name, (out, in_) in SHAPES.items():
                stem = f"base_model.model.model.layers.{layer}.{name}"
                for part, size in (("A", (rank, in_ // scale)), ("B", (out // scale, rank))):
                    held[f"{stem}.lora_{part}.weight"] = (torch.rand(size, generator=generator) - 0.5).bfloat16()
        (folder / f"a{k}").mkdir(parents=True)
        save_file(held, folder / f"a{k}" / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": "llama"}
        config |= {"target_modules": sorted({name.split(".")[-1] for name in SHAPES})}
        (folder / f"a{k}" / "adapter_config.json").write_text(json.dumps(config))


def ours(operation: str, arguments: dict[str, Any], folder: Path, out: Path) -> None:
    """One row of ours, from files to files."""
    import loraloom as ll

    paths = sorted(folder.glob("a*"))
    if operation == "copy":
        out.mkdir()
        for path in paths:
            copy = shutil.copyfile(path / "adapter_model.safetensors", out / path.name)
            if arguments["sync"]:
                with Path(copy).open("rb") as file:
                    os.fsync(file.fileno())
    elif operation == "merge":
        ll.save(ll.merge([ll.load(path) for path in paths], **arguments), out)
    else:
        ll.save(getattr(ll, operation)(ll.load(paths[0]), **arguments), out)


def theirs(kind: str, folder: Path, out: Path) -> tuple[float, float]:
    """One row of PEFT's: seconds for the merge alone, and with saving it. The model is made before."""
    import warnings

    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file
    from torch import nn

    warnings.simplefilter("ignore")
    paths = sorted(folder.glob("a*"))
    held = [load_file(path / "adapter_model.safetensors") for path in paths]
    model: Any = nn.Module()
    for key in (key for key in held[0] if key.endswith("lora_A.weight")):
        at, names = model, key.removeprefix("base_model.model.").removesuffix(".lora_A.weight").split(".")
        for name in names[:-1]:
            if not hasattr(at, name):
                at.add_module(name, nn.Module())
            at = getattr(at, name)
        out_, in_ = held[0][key.replace("lora_A", "lora_B")].shape[0], held[0][key].shape[1]
        at.add_module(names[-1], nn.Linear(in_, out_, bias=False))
    made = json.loads((paths[0] / "adapter_config.json").read_text())
    config = LoraConfig(r=made["r"], lora_alpha=made["lora_alpha"], target_modules=made["target_modules"])
    peft_model = get_peft_model(model, config, adapter_name="a0")
    for at, tensors in enumerate(held):
        if at:
            peft_model.add_adapter(f"a{at}", config)
        set_peft_model_state_dict(peft_model, {k: v.float() for k, v in tensors.items()}, adapter_name=f"a{at}")
    names = [f"a{at}" for at in range(len(held))]
    more = {"density": 0.2} if kind in ("ties", "ties_svd", "magnitude_prune") else {}
    if "svd" in kind:
        more["svd_rank"] = made["r"]
    start = time.perf_counter()
    weights = [1 / len(names)] * len(names)
    peft_model.base_model.add_weighted_adapter(names, weights, "merged", combination_type=kind, **more)
    merged = time.perf_counter() - start
    peft_model.save_pretrained(out, selected_adapters=["merged"])
    return merged, time.perf_counter() - start


def run_row(name: str, folder: Path) -> dict[str, float]:
    """One row in this process; seconds, CPU seconds of all its threads, and peak memory."""
    out = folder / "out"
    if name.startswith("peft "):
        seconds, whole = theirs(name.removeprefix("peft "), folder, out)
        return {"seconds": seconds, "whole": whole, "peak": peak()}
    arguments = PEFT_ROWS[name.removeprefix("ours ")] if name.startswith("ours ") else None
    import loraloom as ll
    from loraloom.ops.merge_methods import merge_methods

    ll.save, ll.load, len(merge_methods)  # imported before the clock starts
    start, used = time.perf_counter(), time.process_time()
    if arguments is not None:
        ours("merge", arguments, folder, out)
    else:
        operation, arguments, _ = ROWS[name]
        ours(operation, arguments, folder, out)
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - used, "peak": peak()}


def peak() -> float:
    """Peak resident memory of this process in MiB, as the operating system counts it.

    Not getrusage: its figure starts at that of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def measured(
    names: list[str], folders: dict[str, Path], repeat: int, source: str | None = None
) -> dict[str, list[dict[str, float]]]:
    """Every row ``repeat`` times, in rounds, each in a process of its own; with the package of another source tree."""
    changed = {**os.environ, "PYTHONPATH": source} if source else None
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(repeat):
        for name in names:
            shutil.rmtree(folders[name] / "out", ignore_errors=True)
            command = [sys.executable, __file__, "--row", name, "--folder", str(folders[name])]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=changed)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name}: {found[name][-1]['seconds']:.2f} s, {found[name][-1]['peak']:.0f} MiB", file=sys.stderr)
        for folder in set(folders.values()):
            shutil.rmtree(folder / "out", ignore_errors=True)
    return found


def flops(layers: float, adapters: int, rank: int) -> float:
    """Of the Gram matrices of all stacked factors, in 1e9: what an SVD of the sum needs at least."""
    width = adapters * rank
    return 2 * layers * sum(out + in_ for out, in_ in SHAPES.values()) * width**2 / 1e9


def table(rows: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> list[str]:
    """The markdown table of the large rows."""
    copied = statistics.median(run["seconds"] for run in rows["copy the files, fsync"])
    lines = [
        "| operation | layers | seconds (median, least, most) | CPU seconds | of copying with fsync | peak MiB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, runs in rows.items():
        seconds = sorted(run["seconds"] for run in runs)
        layers = max(1, round(options.layers * ROWS[name][2]))
        ratio = statistics.median(seconds) / copied * options.layers / layers
        spread = f"{statistics.median(seconds):.2f} ({seconds[0]:.2f}, {seconds[-1]:.2f})"
        cpu = statistics.median(run["cpu"] for run in runs)
        lines.append(
            f"| {name} | {layers} | {spread} | {cpu:.2f} | {ratio:.1f} x | {max(run['peak'] for run in runs):.0f} |"
        )
    return lines


def beside_peft(rows: dict[str, list[dict[str, float]]]) -> list[str]:
    """The markdown table of the rows that PEFT can do too."""
    lines = ["| PEFT's type | ours | PEFT, s | ours, s | ratio |", "|---|---|--:|--:|--:|"]
    for kind, arguments in PEFT_ROWS.items():
        if f"peft {kind}" not in rows:
            continue
        slow = statistics.median(run["whole"] for run in rows[f"peft {kind}"])
        fast = statistics.median(run["seconds"] for run in rows[f"ours {kind}"])
        said = ", ".join(f"{key}={value}" for key, value in arguments.items())
        lines.append(f"| {kind} | {said} | {slow:.2f} | {fast:.2f} | {slow / fast:.1f} x |")
    return lines


def main() -> None:
    """Generate, measure, write the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", default="", help="rows whose names contain one of these, with commas")
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).parent / "results" / "operators")
    parser.add_argument("--against", help="folder that holds the package of older code")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(run_row(options.row, options.folder)))
        return
    only = [part for part in options.only.split(",") if part]
    with tempfile.TemporaryDirectory() as work:
        chosen = [n for n in ROWS if not only or n.startswith("copy") or any(part in n for part in only)]
        pairs = [f"{who} {kind}" for kind in PEFT_ROWS for who in ("peft", "ours") if not only or kind in only]
        folders = {}
        for layers in {max(1, round(options.layers * ROWS[name][2])) for name in chosen}:
            generate(Path(work) / str(layers), layers, options.adapters, options.rank)
            folders |= {
                n: Path(work) / str(layers) for n in chosen if max(1, round(options.layers * ROWS[n][2])) == layers
            }
        if options.against:
            compare(options, [name for name in chosen if not name.startswith("copy")], folders)
            return
        generate(Path(work) / "small", SMALL["layers"], SMALL["adapters"], options.rank, SMALL["scale"])
        folders |= dict.fromkeys(pairs, Path(work) / "small")
        large = measured(chosen, folders, options.repeat)
        small = measured(pairs, folders, options.repeat)
        doubled = growth(Path(work), options) if not only else {}
    write(options, large, small, doubled)


def compare(options: argparse.Namespace, names: list[str], folders: dict[str, Path]) -> None:
    """Older and present code in turn, row by row: CPU seconds, and what is left of them."""
    command = "python benchmarks/operators.py " + " ".join(sys.argv[1:]).replace(options.against, "OLD/src")
    page = [
        "# Operators, before and after",
        "",
        f"Made by `{command}`; CPU seconds of all threads from files to files, medians of {options.repeat}, older and"
        f" present code in turn; {options.adapters} adapters of rank {options.rank}, {options.layers} layers.",
        "",
        "| operation | before | after | left | peak MiB before, after |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in names:
        runs: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
        for _ in range(options.repeat):
            for held, source in zip(runs, (options.against, None), strict=True):
                held.extend(measured([name], folders, 1, source)[name])
        before, after = (statistics.median(run["cpu"] for run in held) for held in runs)
        peaks = ", ".join(f"{max(run['peak'] for run in held):.0f}" for held in runs)
        page.append(f"| {name} | {before:.1f} | {after:.1f} | {after / before:.2f} | {peaks} |")
    out = options.out.with_name(options.out.name + "_before.md")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(page) + "\n")
    print("\n".join(page))


def growth(work: Path, options: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Peak memory of a merge as the number of modules is doubled."""
    generate(work / "double", 2 * options.layers, options.adapters, options.rank)
    found: dict[str, dict[int, float]] = {}
    for name in ("cat", "svd, rank 16"):
        for layers, folder in ((options.layers, work / str(options.layers)), (2 * options.layers, work / "double")):
            found.setdefault(name, {})[layers] = measured([name], {name: folder}, 1)[name][0]["peak"]
    return found


def write(options: argparse.Namespace, large: dict, small: dict, doubled: dict) -> None:
    """The markdown page and the JSON."""
    import peft
    import transformers

    versions = {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.machine()}"
    command = "python benchmarks/operators.py " + " ".join(sys.argv[1:])
    baseline = statistics.median(run["peak"] for run in large["copy the files"])
    page = [
        "# Operators on adapters of Llama-3-8B shapes",
        "",
        f"Made by `{command.strip()}` on {machine}; {', '.join(f'{k} {v}' for k, v in versions.items())}.",
        f"{options.adapters} adapters of rank {options.rank} in bfloat16, 7 projections, from files to files. Rows on"
        " fewer layers are scaled up in the ratio only. Importing and copying alone takes"
        f" {baseline:.0f} MiB. An SVD of all sums needs at least"
        f" {flops(options.layers, options.adapters, options.rank):.0f} GFLOP (Gram matrices of the stacked factors, in"
        " float64).",
        "",
        *table(large, options),
        "",
        f"Beside PEFT's `add_weighted_adapter`: {SMALL['adapters']} adapters, {SMALL['layers']} layers, every size"
        f" divided by {SMALL['scale']}. PEFT merges in memory and saves; ours reads, merges and saves. Making PEFT's"
        " model is not counted.",
        "",
        *beside_peft(small),
    ]
    if doubled:
        page += [
            "",
            "Peak MiB as the number of layers is doubled:",
            "",
            "| operation | layers | peak MiB |",
            "|---|--:|--:|",
        ]
        page += [
            f"| {name} | {layers} | {size:.0f} |" for name, sizes in doubled.items() for layers, size in sizes.items()
        ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".md").write_text("\n".join(page) + "\n")
    found = {
        "command": command,
        "machine": machine,
        "versions": versions,
        "large": large,
        "small": small,
        "doubled": doubled,
    }
    options.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(page))


if __name__ == "__main__":
    main()
