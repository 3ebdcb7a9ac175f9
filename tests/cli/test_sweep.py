"""``loraloom sweep`` as it is typed."""

from __future__ import annotations

import pytest
import yaml


@pytest.fixture(scope="module")
def table(world):
    asked = {"recipe": "recipe.yaml", "arms": {"CoTo": {}}, "seeds": [0], "rates": [0.01], "limit": 10}
    (world / "sweep.yaml").write_text(yaml.safe_dump({**asked, "measure": {"prune": [{"keep": "low"}]}}))
    return "sweep.yaml"


def test_a_table_becomes_a_page(loraloom, world, table):
    done = loraloom("sweep", table, "-o", "swept")
    assert done.returncode == 0, done.stderr
    assert [line[:5] for line in done.stdout.splitlines()[:3]] == ["[1/3]", "[2/3]", "[3/3]"]
    again = loraloom("sweep", table, "-o", "swept")
    assert (again.returncode, again.stderr) == (
        2,
        "loraloom sweep: swept exists; go on with --resume, or choose another folder\n",
    )
    assert (world / "swept" / "report.html").stat().st_size > 10_000


def test_arms_follow_one_another_in_a_folder(loraloom, world):
    asked = {"recipe": "recipe.yaml", "arms": {"one": {}, "two": {"adapter.rank": 3}}, "seeds": [0], "rates": [0.01]}
    (world / "arms.yaml").write_text(yaml.safe_dump({**asked, "limit": 10}))
    first = loraloom("sweep", "arms.yaml", "-o", "armed", "--arms", "two")
    assert first.returncode == 0 and [line[:5] for line in first.stdout.splitlines()[:2]] == ["[1/2]", "[2/2]"]
    both = loraloom("sweep", "arms.yaml", "-o", "armed", "--resume")
    assert both.returncode == 0 and "one" in both.stdout and len(list((world / "armed" / "adapters").iterdir())) == 2
    read = loraloom("sweep", "arms.yaml", "-o", "read", "--known", "armed")  # nothing is left to run
    assert (read.returncode, read.stdout.splitlines()[:2]) == (
        0,
        [f"{arm} is read from armed" for arm in ("one", "two")],
    )
    assert not (world / "read" / "adapters").exists()
    none = loraloom("sweep", "arms.yaml", "-o", "none", "--known", "nowhere")
    assert (none.returncode, none.stderr.count("\n")) == (2, 1) and "nowhere" in none.stderr
    assert not (world / "none").exists()
    wrong = loraloom("sweep", "arms.yaml", "-o", "armed", "--resume", "--arms", "one,Two")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "there is no arm 'Two'; allowed: one, two" in wrong.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("recipe: recipe.yaml\narms: {a: {}}\nrates: [1e-2]\nseed: [1]\n", "seed is not known (did you mean 'seeds'?)"),
        ("- 1", "a mapping of keys is needed, got list"),
        ("recipe: [", "not YAML"),
    ],
)
def test_a_wrong_table_is_one_line(loraloom, world, text, said):
    (world / "wrong.yaml").write_text(text)
    done = loraloom("sweep", "wrong.yaml", "-o", "wrong")
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (world / "wrong").exists()
