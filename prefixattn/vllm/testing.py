"""vLLM's own server in a process of its own: for tests and benchmarks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

COMMAND = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


PATIENCE = 1800
"""Seconds after which a server that does not answer counts as hung."""


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class Server:
    """A server that answers; as a context manager it is ended, with all its processes.

    Attributes:
        url: where it answers.
        process: the first of its processes; the others are of the same group.
    """

    def __init__(
        self,
        options: Sequence[object],
        log: Path,
        *,
        command: Sequence[object] = COMMAND,
        port: int | None = None,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        seconds: float = PATIENCE,
    ) -> None:
        """Starts ``command`` with ``options``; RuntimeError with the log's end where it fails."""
        port = port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        with log.open("w") as written:
            self.process = subprocess.Popen(
                [str(word) for word in (*command, *options, "--port", port)],
                cwd=cwd,
                env=os.environ | ENV | (env or {}),
                stdout=written,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        end = time.monotonic() + seconds
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > end:
                self.close()
                raise RuntimeError(f"no server at {self.url}:\n{log.read_text()[-6000:]}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:  # also where the status is another
            return False

    def close(self) -> None:
        """End it, and whatever it started."""
        for way, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, 30)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, way)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=seconds)
                return

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
