"""What damage has brought to light in journals, scores, sweeps, data sets and what they hold, each as it was found."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import loraloom as ll
from fuzz.folders import json_lines, read
from fuzz.journals import HARNESS, TABLE, probe_journal, read_probe_journal, read_sweep_journal, sweep_journal, table
from fuzz.readers import adapter
from loraloom.integrations.lm_eval import _asked
from loraloom.probing import scores_in
from loraloom.report import Series
from loraloom.sweep import plan
from loraloom.sweep.table import Sweep
from loraloom.sweep.work import Journal
from loraloom.tasks import media
from loraloom.tasks.hub import HubTask, _answer


def one_line(said: str, read: Callable[..., object], *given: Any) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        read(*given)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500


WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"scores": None}, "no scores"),
    ({"scores": []}, "no scores"),
    ({"scores": {"train": "1"}}, "scores of test must be a text of 0 and 1, got None"),
    ({"scores": {"test": 1011}}, "must be a text of 0 and 1, got 1011"),
    ({"broken": None}, "broken must be true or false, got None"),
    ({"took": math.nan}, "took must be a number, got nan"),
    ({"seconds": "x"}, "seconds must be a number, got 'x'"),
)


def test_what_a_job_of_a_sweep_found(tmp_path: Path) -> None:
    sweep_journal(tmp_path)
    job = list(chain(*plan.phases(table(), lambda cell: 0.01)))[-1]
    file = tmp_path / "journal" / f"{job.key}.json"
    whole = json.loads(file.read_text())
    for change, said in WRONG:
        file.write_text(json.dumps(whole | change))
        one_line(said, Journal(file.parent).get, job)
    file.write_text(json.dumps(whole | {"scores": {"test": "10"}}))
    one_line(r"damaged: 2 scores of test; remove it", read_sweep_journal, tmp_path)
    file.unlink()
    one_line(rf"{job.key}\.json is gone; go on with --resume", Journal(file.parent).correct, job, "test")


def test_what_a_probe_has_scored(tmp_path: Path) -> None:
    file = tmp_path / "out.json.part"
    for line in (b'{"of": "x", "score": NaN}', b'{"of": "x", "score": 1e999}', b'{"of": [], "score": 1}', b"[" * 9999):
        probe_journal(tmp_path)
        whole = file.read_bytes()
        file.write_bytes(whole + line + b"\n")
        one_line("is damaged; remove it", read_probe_journal, tmp_path)
        assert file.read_bytes() == whole + line + b"\n"
        file.write_bytes(whole)
    file.unlink()
    file.symlink_to("/dev/zero")
    one_line("is damaged: no file", read_probe_journal, tmp_path)


def test_scores_beyond_floats() -> None:
    one_line("score of a is .*; scores must be finite numbers", scores_in, {"a": 10**400}, "s.json")
    one_line(r"score of 'a\\nb' is 'x", scores_in, {"a\nb": "x" * 900}, "s.json")
    one_line("unit 'xxx.* is not known", lambda: ll.compress(adapter(), budget="0.5x", scores={"x" * 900: 1.0}))


@pytest.mark.parametrize("task", ["*a", "!!python/tuple [1]", "!!bool x", "{"])
def test_tasks_of_the_harness(tmp_path: Path, task: str) -> None:
    (tmp_path / "t.yaml").write_text(f"task: {task}\nmetric: acc\n")
    one_line(r"task .*t\.yaml: not YAML", _asked, f"lm_eval:{tmp_path / 't.yaml'}")
    (tmp_path / "t.yaml").write_text(json.dumps(HARNESS))
    one_line("has a line `task: NAME`", _asked, f"lm_eval:{tmp_path / 't.yaml'}")


LARGE: dict[str, tuple[dict[str, Any], str]] = {
    "runs": ({"axes": {name: list(range(99)) for name in "abc"}}, "make 15524784 runs; at most 100000"),
    "draws": ({"measure": {"coalitions": {"draws": 2**40}}}, "jobs; at most 1000000"),
    "jobs": ({"measure": {"interpolate": {"at": [at / 90_000 for at in range(90_000)]}}}, "jobs; at most 1000000"),
    "threads": ({"threads": 2**40}, "threads"),
    "rates": ({"rates": [math.inf]}, "rates.0"),
    "seeds": ({"seeds": [2**64, 0]}, "seeds.0"),
}


@pytest.mark.parametrize(("change", "said"), LARGE.values(), ids=LARGE)
def test_sweeps_that_would_never_end(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sweep.model_validate(TABLE | change)


def test_a_choice_that_a_row_has_not(tmp_path: Path) -> None:
    json_lines(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    rows[1]["choices"]["text"].pop()
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one_line("label 'B' is not among yes", read(choices="choices"), tmp_path)
    for choices in ({"text": None}, {"text": ["yes"], "label": 3}, "yes", None):
        task = HubTask("here", choices="choices")
        one_line("label 'B' is not among", _answer, task, {"label": "B", "choices": choices}, (), False)
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 1}\n{"text": ')
    one_line("cannot be read: .*JSON", read(choices="choices"), tmp_path)


def test_media_that_are_torn_or_none(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1\0\0\0\1\0\0\x08\2\0\0\0")
    one_line(r"image .*a\.png cannot be read", media.image, {"bytes": None, "path": str(file)})
    one_line("audio of a data set cannot be read", media.audio, {"bytes": b"RIFF\0\0\0\0WAVEfmt ", "path": None})
    for path in ("/dev/zero", str(tmp_path), None, ""):
        one_line("names a file that is none", media.image, {"bytes": None, "path": path})
    one_line("names a file that is none: None", media.digest, None)


def test_pictures_beyond_all_screens() -> None:
    import io

    from PIL import Image

    held = io.BytesIO()
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(held, "bmp")
    data = bytearray(held.getvalue())
    data[18:26] = (9000).to_bytes(4, "little") * 2
    one_line("9000 x 9000 pixels; at most", media.image, {"bytes": bytes(data), "path": None})


def test_modalities_that_are_a_number_and_numbers_that_are_a_long_list() -> None:
    active: Any = 3
    one_line("active must be names of modalities, got 3", lambda: ll.MokA({"image": 1}, active=active))
    long: Any = ["a"] * 2000
    one_line("is not a number", lambda: Series("a", ("x",), (long,)))


def test_masks_that_are_none() -> None:
    mask: Any = {"fc": torch.ones(2, 2, dtype=torch.bool)}
    one_line("a mask is a Mask, as calibrate or Mask.of makes one, got dict", lambda: ll.LoRI(mask=mask))
    one_line("got dict", lambda: ll.LoRI(protect=(mask,)))
