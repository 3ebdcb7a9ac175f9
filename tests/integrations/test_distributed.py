"""Runs of several processes (gloo, on this CPU) are runs of one: CoTo, LoRI and MokA under DDP and FSDP2.

Accelerate has no FSDP for processors; here it is told that they are accelerators. DeepSpeed is not run here.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import TrainerCallback

import tiny_runs as tiny
from loraloom.calibration import _calibrated
from loraloom.integrations.fit import FitOptions, fit, share
from loraloom.integrations.gates import Gates
from loraloom.integrations.moving import named, numbered
from loraloom.integrations.peft import from_model
from loraloom.integrations.reduction import reduce_gradients
from loraloom.recipe import CalibrateRecipe
from loraloom.strategies.modality import MokA
from loraloom.strategies.progressive import CoTo
from loraloom.strategies.sparse import LoRI, calibrate
from processes import ranks, status_of
from tiny_multimodal import IMAGE, image_batch, lively, tiny_llava
from tiny_vision import recipe_content, tiny_model  # noqa: F401

STEPS = 6
PLAN = CoTo(None, seed=1)


def run(job: Callable[..., Any], world: int, *args: Any) -> list[int]:
    """A job in so many processes; their exit codes."""
    return [status_of(one) for one in ranks(job, world, *args)]


# --- what is trained --------------------------------------------------------------------------------------------------
def sparse() -> torch.nn.Module:
    model = tiny.model()
    generator = torch.Generator().manual_seed(0)
    adapter = from_model(model)
    drawn = {n: torch.rand(adapter.shape(n).out, adapter.shape(n).rank, generator=generator) for n in adapter.modules}
    LoRI(mask=calibrate(drawn, density=0.2), start="fresh").attach(model)
    return model


def moka() -> Any:
    return lively(MokA({"image": 1, "audio": 2}, rank=2, alpha=4, dropout=0.0).wrap(tiny_llava())).train()


# LoRI under FSDP2 is in the test of a run that goes on.
WAYS = [("lora", "ddp"), ("lora", "fsdp"), ("lori", "ddp"), ("moka", "ddp"), ("moka", "fsdp")]
MODELS: dict[str, Callable[[], Any]] = {"lora": tiny.model, "lori": sparse, "moka": moka}


def pictures() -> list[dict[str, Tensor]]:
    made = image_batch(rows=8, seed=0)
    return [{key: value[at] for key, value in made.items()} for at in range(8)]


def stacked(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


class Watch(TrainerCallback):
    """In each step: units whose parameters have a gradient, and units whose parameters the optimizer moved."""

    def __init__(self) -> None:
        self.graded: list[tuple[bool, ...]] = []
        self.moved: list[tuple[bool, ...]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.units = Gates(kwargs["model"]).parameters()
        self.names = list(self.units)
        self.graded.append(tuple(all(w.grad is not None for w in some) for some in self.units.values()))
        none = [all(w.grad is None for w in some) for some in self.units.values()]
        assert none == [not some for some in self.graded[-1]]
        self.before = {unit: [w.detach().clone() for w in some] for unit, some in self.units.items()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pairs = [zip(some, self.before[unit], strict=True) for unit, some in self.units.items()]
        self.moved.append(tuple(any(not torch.equal(now, then) for now, then in some) for some in pairs))


def fitted(rank: int, folder: Path, what: str, how: str, stop: int | None = None) -> None:
    """Train, and write what came of it to ``folder/rankN.pt``; with ``stop`` only until the checkpoint of that step."""
    if how == "fsdp":
        pretend_accelerators()
    model, watch = MODELS[what](), Watch()
    options = FitOptions(
        folder / "run",
        steps=STEPS,
        batch_size=4,
        lr=1e-2,
        seed=0,
        accumulate=2,
        weight_decay=0.1,
        save_every=3,
        resume=True,
        scheduler="constant",
    )
    data, collate = (pictures(), stacked) if what == "moka" else (tiny.sentences(), tiny.collate)
    done = fit(model, data, collate=collate, options=options, plan=PLAN, callbacks=[watch])
    held = from_model(model)
    weights = {f"{n}.{side}": getattr(f, side) for n, f in held.modules.items() for side in ("A", "B")}
    assert done.resumed_from == (0 if stop is None else stop)
    told = {"weights": weights, "graded": watch.graded, "moved": watch.moved, "units": watch.names}
    torch.save(told, folder / f"rank{rank}.pt")


def pretend_accelerators() -> None:
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "RANK": os.environ.get("RANK", "0")}
    os.environ |= {name: os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


def results(folder: Path, world: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.allclose(found[n], wanted[n], atol=1e-5) for n in wanted)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model trained by one process."""
    folders = {what: tmp_path_factory.mktemp(what) for what in MODELS}
    assert [run(fitted, 1, folder, what, "ddp") for what, folder in folders.items()] == [[0]] * len(MODELS)
    return folders


@pytest.mark.parametrize(("what", "how"), WAYS)
def test_two_processes_are_one(tmp_path: Path, alone: dict[str, Path], what: str, how: str) -> None:
    assert run(fitted, 2, tmp_path, what, how) == [0, 0]
    first, second = results(tmp_path, 2)
    (one,) = results(alone[what], 1)
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    assert same(first["weights"], one["weights"])
    # gradients of switched-off adapters are absent; were they zero, AdamW would move and decay these
    drawn = [replace(PLAN, total_steps=STEPS).active(step, one["units"]) for step in range(STEPS)]
    assert not all(map(all, drawn))
    for result in (first, second, one):
        assert result["graded"] == result["moved"] == drawn


@pytest.mark.parametrize(
    ("what", "begun", "ends"),
    [("lora", ("ddp", 1), [("ddp", 2), ("fsdp", 2)]), ("lori", ("fsdp", 2), [("fsdp", 1), ("ddp", 1)])],
)
def test_a_run_goes_on_with_more_or_fewer_processes_and_as_another_kind(
    tmp_path: Path, alone: dict[str, Path], what: str, begun: tuple[str, int], ends: list[tuple[str, int]]
) -> None:
    wanted = results(alone[what], 1)[0]["weights"]
    whole = alone[what] / "run"
    if begun != ("ddp", 1):
        whole = tmp_path / "begun" / "run"
        whole.parent.mkdir()
        assert run(fitted, begun[1], whole.parent, what, begun[0]) == [0] * begun[1]
    for how, processes in ends:
        folder = tmp_path / f"{how}{processes}"
        shutil.copytree(whole, folder / "run")
        shutil.rmtree(folder / "run" / f"checkpoint-{STEPS}")
        assert run(fitted, processes, folder, what, how, 3) == [0] * processes
        assert all(same(result["weights"], wanted) for result in results(folder, processes))


def stopped(rank: int, folder: Path) -> None:
    """Ctrl-C in the second process alone, twice at once, as launchers pass it on; the first one minds none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN if rank == 0 else signal.default_int_handler)  # whatever was inherited

    class CtrlC(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if rank == 1 and state.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    options = FitOptions(folder / "run", steps=STEPS, batch_size=8, lr=1e-2, seed=0, resume=True)
    went: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        fit(tiny.model(), tiny.sentences(), collate=tiny.collate, options=options, callbacks=[CtrlC(), Steps(went)])
    assert went == [1, 2, 3, 4]
    fit(tiny.model(), tiny.sentences(), collate=tiny.collate, options=options, callbacks=[Steps(went)])
    assert went == [1, 2, 3, 4, 5, 6]


class Steps(TrainerCallback):
    """Notes the steps."""

    def __init__(self, into: list[int]) -> None:
        self.into = into

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.into.append(state.global_step)


def test_ctrl_c_stops_all_after_the_same_step_with_a_checkpoint(tmp_path: Path) -> None:
    assert run(stopped, 2, tmp_path) == [0, 0]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-4"]


def test_a_checkpoint_of_another_kind_of_run_is_refused(tmp_path: Path) -> None:
    options = FitOptions(tmp_path, steps=4, batch_size=4, lr=1e-2, seed=0, save_every=2, resume=True)
    fit(tiny.model(), tiny.sentences(), collate=tiny.collate, options=options)
    shutil.rmtree(tmp_path / "checkpoint-4")
    for name, said in (
        ("pytorch_model_fsdp_0/0", r"checkpoint-2 is in parts \(SHARDED_STATE_DICT\), which only FSDP reads"),
        ("global_step2/rank_0_optim_states.pt", "was written under DeepSpeed, this run is of DDP or one process"),
    ):
        file = tmp_path / "checkpoint-2" / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
        with pytest.raises(ValueError, match=said):
            fit(tiny.model(), tiny.sentences(), collate=tiny.collate, options=options)
        shutil.rmtree(file.parent)


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    state = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1).state_dict()
    for groups in ([["a", "b"]], [["a"], ["b"]], [[]]):
        with pytest.raises(ValueError, match="checkpoint-2: its optimizer is of other parameters than the model's"):
            named(state, groups, "checkpoint-2")
    with pytest.raises(ValueError, match="is of other parameters"):
        numbered(named(state, [["a"]]), [["b"]])


def test_the_examples_of_a_step_are_shared() -> None:
    for processes, most, accumulate in [(1, 6, 4), (2, 4, 2), (4, 1, 8), (3, 2, 9), (8, 16, 1)]:
        each, passes = share(most * accumulate, most, processes)
        assert each * passes * processes == most * accumulate and each <= most
    assert share(24, 6, 1) == (6, 4)
    with pytest.raises(ValueError, match="= 6 examples a step cannot be split over 4 processes"):
        share(6, 2, 4)


# --- a gradient that only some processes have -------------------------------------------------------------------------
def uneven(rank: int, folder: Path) -> None:
    """The first parameter has a gradient in both, the second in the second process, the third nowhere."""
    torch.distributed.init_process_group("gloo")
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    weights[0].grad = torch.tensor([1.0, 2.0]) * (rank + 1)
    if rank == 1:
        weights[1].grad = torch.tensor([4.0, 8.0])
    reduce_gradients(weights)
    assert weights[2].grad is None
    torch.save([weight.grad for weight in weights[:2]], folder / f"rank{rank}.pt")


def pictures_for_some(step: int, part: slice) -> dict[str, Tensor]:
    """Four rows; in the first step the second process has no images, in the last nobody has."""
    made = image_batch(rows=4, seed=step)
    ids, images = made["input_ids"][part], made.pop("pixel_values")
    bare = torch.zeros(4, dtype=torch.bool)
    bare[1::2] = step == 0
    bare[:] |= step == 2
    ids = torch.where((ids == IMAGE) & bare[part][:, None], 7, ids)
    mine = {"input_ids": ids, "labels": made["labels"][part], "attention_mask": made["attention_mask"][part]}
    kept = images[part][~bare[part]]
    return {**mine, "pixel_values": kept} if len(kept) else mine


def descended(rank: int, folder: Path, world: int) -> None:
    """MokA in a plain loop; with two processes under DDP as it is."""
    inner = wrapped = moka()
    if world > 1:
        torch.distributed.init_process_group("gloo")
        wrapped = torch.nn.parallel.DistributedDataParallel(inner)
    optimizer = torch.optim.SGD([p for p in inner.parameters() if p.requires_grad], lr=0.3)
    for step in range(3):
        wrapped(**pictures_for_some(step, slice(rank, None, world))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    held = {name: p.detach() for name, p in inner.named_parameters() if p.requires_grad}
    torch.save({"weights": held}, folder / f"rank{rank}.pt")


def test_gradients_that_only_some_have(tmp_path: Path) -> None:
    assert run(uneven, 2, tmp_path) == [0, 0]
    for rank in (0, 1):
        both, one = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert both.tolist() == [1.5, 3.0] and one.tolist() == [2.0, 4.0]


def test_images_that_only_some_have(tmp_path: Path) -> None:
    descended(0, tmp_path, 1)
    (alone,) = results(tmp_path, 1)
    assert run(descended, 2, tmp_path, 2) == [0, 0]
    first, second = results(tmp_path, 2)
    assert same(first["weights"], alone["weights"]) and same(second["weights"], first["weights"])
    start = {name: p for name, p in moka().named_parameters() if p.requires_grad}
    assert not any(torch.equal(alone["weights"][name], start[name]) for name in start)


# --- the command line -------------------------------------------------------------------------------------------------
def commanded(rank: int, folder: Path, words: list[str], how: str = "ddp", fails: int | None = None) -> None:
    """``loraloom`` as a launcher starts it in each process; the data of process ``fails`` go bad in batch three."""
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.argv = ["loraloom", *words]
    if how == "fsdp":
        pretend_accelerators()
    if rank == fails:
        from loraloom.integrations.scoring import Bench

        seen, collate = [], Bench.collate

        def bad(bench: Bench, examples: Any) -> Any:
            seen.append(1)
            if len(seen) == 3:
                raise ValueError("a bad row")
            return collate(bench, examples)

        Bench.collate = bad
    from loraloom.cli import main

    main()


def said(folder: Path, name: str) -> list[str]:
    """What the command said in both processes; torch has warnings of its own, but nobody a traceback."""
    lines = [line for rank in (0, 1) for line in (folder / f"{name}{rank}").read_text().splitlines()]
    assert not any("Traceback" in line for line in lines)
    return [line for line in lines if line.startswith(("loraloom", "adapter"))]


def test_the_command_line_writes_and_says_things_once(tmp_path: Path, recipe_content: dict) -> None:  # noqa: F811
    from loraloom.store import load

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_content))
    words = ["train", "recipe.yaml", "--set", "strategy.ramp=1.0"]
    assert run(commanded, 1, tmp_path, [*words, "--set", "output=one"]) == [0]
    assert run(commanded, 2, tmp_path, words) == [0, 0]
    assert len(said(tmp_path, "out")) == 1 and said(tmp_path, "out")[0].startswith("adapter a")
    assert run(commanded, 2, tmp_path, [*words, "--set", "output=parts"], "fsdp") == [0, 0]
    wanted = load(tmp_path / "one")
    for name in ("a", "parts"):
        found = load(tmp_path / name)
        assert all(torch.allclose(found.modules[n].B, wanted.modules[n].B, atol=1e-5) for n in wanted.modules)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["a", "one", "parts"]

    assert run(commanded, 2, tmp_path, words) == [2, 2]
    assert said(tmp_path, "err") == ["loraloom train: output a exists; choose another or add --overwrite"]
    assert run(commanded, 2, tmp_path, [*words, "--set", "output=c"], "ddp", 1) == [2, 2]
    assert said(tmp_path, "err") == ["loraloom train: a bad row"]


def test_a_mask_is_not_calibrated_on_a_base_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none: Any = None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="needs the whole base again afterwards"):
        _calibrated(CalibrateRecipe(), none, none, none, none, tmp_path)


@pytest.mark.parametrize("name", ["ddp", "ddp-cpu", "fsdp2", "zero2", "zero3"])
def test_accelerate_reads_its_files(name: str) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = Path(__file__).parents[2] / "recipes" / "accelerate" / f"{name}.yaml"
    words = ["--config_file", str(file), "-m", "loraloom", "train", "recipe.yaml"]
    asked = launch_command_parser().parse_args(words)
    asked, *_ = _validate_launch_command(asked)
    told = {"fsdp2": {"FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}}
    assert asked.num_processes == 2 and asked.use_cpu is (name == "ddp-cpu") and not asked.cpu
    # with none of the three Accelerate starts one process, whatever num_processes says
    kinds = (asked.multi_gpu, asked.use_fsdp, asked.use_deepspeed)
    assert kinds == (name.startswith("ddp"), name == "fsdp2", name.startswith("zero"))
    if asked.use_deepspeed:
        assert (asked.zero_stage, asked.gradient_accumulation_steps) == (int(name[-1]), "auto")
    if asked.use_fsdp:
        environment = prepare_multi_gpu_env(asked)
        assert told["fsdp2"].items() <= environment.items()
