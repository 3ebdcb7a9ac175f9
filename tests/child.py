"""Work in a forked child, which may be limited, hang, be killed or kill itself; what it tells comes through a pipe."""

from __future__ import annotations

import faulthandler
import os
import resource
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

tqdm.monitor_interval = 0  # or a thread looks after its bars, in a process that is to fork


class Child:
    """A forked process that runs ``work(tell)``; lines it tells can be read while it runs.

    Args:
        work: called with a function that tells one line; its output and its signals are the child's own.
        memory: bytes of address space beyond those of now.
    """

    def __init__(self, work: Callable[[Callable[[str], None]], object], *, memory: int | None = None) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        assert threading.active_count() == 1, f"a fork may wait for a lock of {threading.enumerate()}"
        out, into = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._live(work, into, memory)
        os.close(into)
        self._pipe, self._rest, self.status = out, b"", None

    @staticmethod
    def _live(work: Callable[[Callable[[str], None]], object], pipe: int, memory: int | None) -> None:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            faulthandler.register(signal.SIGUSR1, file=2)
            if memory is not None:
                used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
                resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
            work(lambda line: os.write(pipe, (line.replace("\n", "\\n") + "\n").encode("utf-8", "backslashreplace")))
            code = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)

    def line(self, seconds: float) -> str | None:
        """The next line; None at the end.

        Raises:
            TimeoutError: none came in that time; where the child stands is on its standard error.
        """
        while b"\n" not in self._rest:
            if not select.select([self._pipe], [], [], seconds)[0]:
                os.kill(self.pid, signal.SIGUSR1)
                time.sleep(1)
                raise TimeoutError(f"nothing from the child in {seconds} seconds")
            got = os.read(self._pipe, 1 << 16)
            if not got:
                return None
            self._rest += got
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode("utf-8", "replace")

    def lives(self, seconds: float) -> bool:
        """Whether it still runs after so many seconds (less, if it ends before); for work that tells nothing."""
        return not select.select([self._pipe], [], [], seconds)[0]

    def end(self, kill: bool = False) -> int:
        """Wait for its end (or bring it about): the exit status, or minus the signal."""
        if self.status is None:
            if kill:
                os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._pipe)
        return self.status


def status_of(work: Callable[[], object]) -> int:
    """Run it in a child: 0, 1 after an exception, or minus the signal that killed it."""
    return Child(lambda tell: work()).end()


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A temporary folder in memory where the system has one: nothing waits for a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)
