"""Several gloo processes on one machine, each of which runs one function of a test module."""

from __future__ import annotations

import os
import runpy
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 60  # seconds


def launch(work: Callable[[], Any], world: int) -> list[Any]:
    """What `work()` returns on each rank; an exception comes back as its text.

    `work` stands at the top of its file, which every process reads anew.
    """
    place = work.__code__.co_filename, work.__name__
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_run, args=(place, rank, world, port, results))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(2 * PATIENCE)
        if process.is_alive():
            process.kill()
    found: dict[int, Any] = {}
    while not results.empty():
        rank, result = results.get()
        found[rank] = result
    return [found.get(rank, "died") for rank in range(world)]


def _run(place: tuple[str, str], rank: int, world: int, port: int, results: Any) -> None:
    named = {"MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(x) for name, x in named.items()}}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE)
    )
    try:
        results.put((rank, runpy.run_path(place[0])[place[1]]()))
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        results.put((rank, text if str(error) else traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
