"""The operators' commands as they are typed: merges of every method, compress, align, fold, measure, search, ..."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import loraloom as ll
from loraloom.cli import app
from loraloom.ops.merge_methods import merge_methods


@pytest.fixture
def run(world: Path, monkeypatch: pytest.MonkeyPatch):
    from typer.testing import CliRunner

    monkeypatch.chdir(world)
    monkeypatch.setenv("COLUMNS", "200")
    runner = CliRunner()
    return lambda *words: runner.invoke(app, list(words), prog_name="loraloom")


def close(left: ll.Adapter, right: ll.Adapter, factor: float = 1.0) -> bool:
    return list(left.modules) == list(right.modules) and all(
        torch.allclose(left.modules[n].delta(), factor * right.modules[n].delta(), atol=1e-5) for n in right.modules
    )


@pytest.mark.parametrize("method", [name for name in merge_methods if "statistics" not in merge_methods[name].facts])
def test_every_method_merges_from_the_command_line(run, tmp_path, method):
    done = run("merge", "a", "b", "-o", str(tmp_path / "m"), "--method", method, "--rank", "2", "--seed", "3", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["error"] >= 0
    same = ll.merge([ll.load("a"), ll.load("b")], method, rank=2, seed=3)
    assert close(ll.load(tmp_path / "m"), same)


def test_sizes_knobs_weights_and_the_certificate_on_the_screen(run, tmp_path):
    done = run("merge", "a", "b", "-o", str(tmp_path / "e"), "--energy", "0.9")
    assert done.exit_code == 0 and "error 0." in done.stdout and "worst_module" in done.stdout
    small = run("merge", "a", "b", "-o", str(tmp_path / "s"), "--budget", "0.3x", "--json")
    assert small.exit_code == 0, small.output
    done = run(
        "merge", "a", "b", "-o", str(tmp_path / "d"), "--method", "della", "--density", "0.6", "--set", "epsilon=0.1"
    )
    assert done.exit_code == 0, done.output
    assert ll.load(tmp_path / "d").provenance["arguments"]["epsilon"] == 0.1
    names = list(ll.load("a").modules)
    (tmp_path / "w.json").write_text(json.dumps({name: [1.0, 0.0] for name in names}))
    done = run("merge", "a", "b", "-o", str(tmp_path / "w"), "--weights", str(tmp_path / "w.json"))
    assert done.exit_code == 0 and close(ll.load(tmp_path / "w"), ll.load("a"))


def test_compress_align_scale_subtract_interpolate(run, tmp_path):
    out = lambda name: str(tmp_path / name)  # noqa: E731
    assert run("compress", "a", "-o", out("c"), "--rank", "1").exit_code == 0
    assert ll.load(tmp_path / "c").config["r"] == 1
    assert run("align", "b", "--to", "a", "-o", out("al"), "--by", "orthogonal").exit_code == 0
    assert close(ll.load(tmp_path / "al"), ll.load("b"))
    assert run("scale", "a", "--by", "-2", "-o", out("sc")).exit_code == 0
    assert close(ll.load(tmp_path / "sc"), ll.load("a"), -2)
    assert run("subtract", "a", "b", "-o", out("su")).exit_code == 0
    assert close(ll.load(tmp_path / "su"), ll.merge([ll.load("a"), ll.load("b")], weights=[1.0, -1.0]))
    words = ["--at", "0.25", "--via", out("sc"), "--space", "factors", "--align", "invertible"]
    done = run("interpolate", "a", "b", "-o", out("i"), *words)
    assert done.exit_code == 0, done.output


def test_saved_heads_are_interpolated_on_request(run, tmp_path):
    for name, value in (("one", 1.0), ("two", 3.0)):
        ll.save(replace(ll.load("a"), extras={"head.weight": torch.full((2, 2), value)}), tmp_path / name)
    words = ["interpolate", str(tmp_path / "one"), str(tmp_path / "two"), "-o", str(tmp_path / "out"), "--at", "0.75"]
    refused = run(*words)
    assert refused.exit_code == 2 and "extras='average'" in refused.stderr
    done = run(*words, "--extras", "average")
    assert done.exit_code == 0, done.output
    assert float(ll.load(tmp_path / "out").extras["head.weight"].mean()) == 2.5


def test_the_density_may_be_said_either_way(run, tmp_path):
    words = ["merge", "a", "b", "--method", "ties", "--rank", "2"]
    assert run(*words, "-o", str(tmp_path / "o"), "--density", "0.5").exit_code == 0
    done = run(*words, "-o", str(tmp_path / "s"), "--set", "density=0.5")
    assert done.exit_code == 0 and close(ll.load(tmp_path / "o"), ll.load(tmp_path / "s")), done.output


def test_prune_by_unit_scope_pattern_and_scores(run, tmp_path):
    out = lambda name: str(tmp_path / name)  # noqa: E731
    done = run("prune", "a", "-o", out("r"), "--density", "0.5", "--unit", "rank", "--scope", "module", "--json")
    assert done.exit_code == 0 and ll.load(tmp_path / "r").config["r"] == 1, done.output
    assert json.loads(done.stdout)["directions_kept"] == json.loads(done.stdout)["directions"] / 2
    done = run("prune", "a", "-o", out("p"), "--pattern", "2:4", "--json")
    assert done.exit_code == 0 and 0.5 <= json.loads(done.stdout)["density"] < 1, done.output
    record = ll.load(tmp_path / "p").provenance["record"]
    assert record["entries_kept"] == sum(record["kept"].values()) == json.loads(done.stdout)["entries_kept"]
    assert (
        run("prune", "a", "-o", out("b"), "--density", "0.5", "--space", "balanced", "--scope", "layer").exit_code == 0
    )
    layers = [row["layer"] for row in ll.summary(ll.load("a"))["layers"]]
    (tmp_path / "s.json").write_text(json.dumps({"units": layers, "values": list(range(len(layers)))}))
    words = ["--density", "0.25", "--unit", "layer", "--by", str(tmp_path / "s.json")]
    assert run("prune", "a", "-o", out("s"), *words).exit_code == 0
    assert {row["layer"] for row in ll.summary(ll.load(tmp_path / "s"))["layers"]} == {layers[-1]}


def test_dora_is_interpolated_on_its_base(run, tmp_path, tiny_model):
    plain = ll.load("a")
    magnitude = {name: one.B.norm(dim=1) + 1 for name, one in plain.modules.items()}
    for name, factor, end in (("one", 1.0, -1), ("other", 2.0, None)):  # the second has a module that the first lacks
        paths = list(plain.modules)[:end]
        modules = {path: replace(plain.modules[path], magnitude=factor * magnitude[path]) for path in paths}
        ll.save(replace(plain, config={**plain.config, "use_dora": True}, modules=modules), tmp_path / name)
    words = ["interpolate", str(tmp_path / "one"), str(tmp_path / "other"), "-o", str(tmp_path / "out")]
    refused = run(*words)
    assert refused.exit_code == 2 and "cannot merge DoRA adapters" in refused.stderr
    assert run(*words, "--at", "0.25", "--base", str(tiny_model)).exit_code == 0
    ends = [ll.load(tmp_path / name) for name in ("one", "other")]
    merged = ll.merge(ends, weights=[0.75, 0.25], space="delta", base=ll.base_weights(tiny_model, *ends))
    assert len(ends[0].modules) + 1 == len(merged.modules)
    assert close(ll.load(tmp_path / "out"), merged)


def test_fold_extract_export(run, tmp_path, tiny_model):
    base, out = str(tiny_model), lambda name: str(tmp_path / name)
    done = run("fold", "a", "b", "--base", base, "-o", out("f"), "--weights", "1,0.5")
    assert done.exit_code == 0, done.output
    done = run("extract", out("f"), "--base", base, "-o", out("x"), "--rank", "4")
    assert done.exit_code == 0, done.output
    want = ll.merge([ll.load("a"), ll.load("b")], weights=[1.0, 0.5])
    got = ll.load(tmp_path / "x")
    assert set(got.modules) == set(want.modules)
    assert all(torch.allclose(got.modules[n].delta(), want.modules[n].delta(), atol=1e-5) for n in want.modules)
    done = run("export", "a", "--for", "vllm", "-o", out("v"), "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["rank"] == 8, done.output
    assert close(ll.load(tmp_path / "v"), ll.load("a"))


def test_measure_and_the_methods_that_need_it(run, tmp_path):
    for kind, method in (("gram", "regmean"), ("fisher", "fisher")):
        files = []
        for name in ("a", "b"):
            files.append(str(tmp_path / f"{kind}-{name}.safetensors"))
            done = run("measure", name, "--task", "digits", "--kind", kind, "--limit", "16", "-o", files[-1])
            assert done.exit_code == 0, done.output
        given = [word for file in files for word in ("--statistics", file)]
        done = run("merge", "a", "b", "-o", str(tmp_path / method), "--method", method, *given)
        assert done.exit_code == 0, done.output
        assert ll.load(tmp_path / method).modules


def test_search_and_soup(run, tmp_path):
    words = ["--task", "digits", "--budget", "4", "--limit", "20", "--json"]
    done = run("search", "a", "b", "-o", str(tmp_path / "s"), *words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["evaluations"] <= 4 and len(json.loads(found["weights"])) == 2
    done = run("soup", "a", "b", "-o", str(tmp_path / "p"), "--task", "digits", "--steps", "2", "--limit", "16")
    assert done.exit_code == 0, done.output
    assert list(ll.load(tmp_path / "p").modules) == list(ll.load("a").modules)


WRONG = {
    "energy and rank": (["merge", "a", "b", "-o", "x", "--rank", "1", "--energy", "0.5"], "at most one"),
    "a knob that is none": (["merge", "a", "b", "-o", "x", "--set", "epsilon"], "name=value"),
    "a knob of another method": (["merge", "a", "b", "-o", "x", "--set", "epsilon=1"], "epsilon"),
    "a knob that is merge's own": (["merge", "a", "b", "-o", "x", "--set", "space=core"], "takes no 'space'"),
    "a knob of search": (["search", "a", "b", "-o", "x", "--task", "digits", "--set", "seed=1"], "takes no 'seed'"),
    "a knob twice": (
        ["merge", "a", "b", "-o", "x", "--method", "ties", "--density", "0.5", "--set", "density=0.2"],
        "density is given twice",
    ),
    "a word for a number": (
        ["merge", "a", "b", "-o", "x", "--method", "breadcrumbs", "--set", "gamma=abc"],
        "gamma must be a finite number, got 'abc'",
    ),
    "a share for a number": (
        ["merge", "a", "b", "-o", "x", "--method", "ctm", "--set", "size=1.5"],
        "size must be a whole number or none, got 1.5",
    ),
    "half a step": (["merge", "a", "b", "-o", "x", "--method", "karcher", "--set", "steps=1.5"], "a whole number"),
    "truth for a step": (
        ["merge", "a", "b", "-o", "x", "--method", "karcher", "--set", "steps=true"],
        "a whole number",
    ),
    "a device that is not here": (["merge", "a", "b", "-o", "x", "--device", "cuda:77"], "device 'cuda:77': "),
    "compress nowhere": (["compress", "a", "-o", "x", "--rank", "1", "--device", "cudda"], "device 'cudda': "),
    "interpolate nowhere": (["interpolate", "a", "b", "-o", "x", "--device", "cudda"], "device 'cudda': "),
    "extract nowhere": (["extract", "a", "--base", "a", "-o", "x", "--device", "cudda"], "device 'cudda': "),
    "a device that is none": (["merge", "a", "b", "-o", "x", "--device", "cudda"], "device 'cudda': "),
    "a device that holds no numbers": (["merge", "a", "b", "-o", "x", "--device", "meta"], "device 'meta': "),
    "statistics missing": (["merge", "a", "b", "-o", "x", "--method", "regmean"], "loraloom measure"),
    "statistics that are none": (["merge", "a", "-o", "x", "--method", "regmean", "--statistics", "a"], "a"),
    "a base for LoRA": (["merge", "a", "b", "-o", "x", "--base", "."], "."),
    "no weights file": (["merge", "a", "b", "-o", "x", "--weights", "w.json"], "w.json"),
    "a budget of words": (["compress", "a", "-o", "x", "--budget", "small"], "10MB"),
    "nothing asked": (["compress", "a", "-o", "x"], "rank, energy and budget"),
    "scale by nothing finite": (["scale", "a", "-o", "x", "--by", "nan"], "finite"),
    "fold into nowhere": (["fold", "a", "-o", "x", "--base", "nowhere"], "nowhere"),
    "extract from nowhere": (["extract", "nowhere", "--base", "a", "-o", "x"], "nowhere"),
    "export too small": (["export", "a", "-o", "x", "--max-rank", "4"], "4"),
    "a pattern that is none": (["prune", "a", "-o", "x", "--pattern", "4:2"], "N:M"),
    "scores that are none": (
        ["prune", "a", "-o", "x", "--density", "1", "--unit", "layer", "--by", "s.json"],
        "s.json",
    ),
    "measure an unknown task": (["measure", "a", "--task", "digist", "-o", "x"], "digits"),
}


@pytest.mark.parametrize(("words", "named"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_request_is_one_line_and_status_2(run, world, words, named):
    before = sorted(path.name for path in world.iterdir())
    done = run(*words)
    assert done.exit_code == 2, done.output
    lines = done.stderr.strip().split("\n")
    assert len(lines) == 1 and lines[0].startswith(f"loraloom {words[0]}: ") and named in lines[0], done.stderr
    assert sorted(path.name for path in world.iterdir()) == before
