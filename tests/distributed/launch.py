"""Several gloo processes on one machine, each of which runs one function of a test module."""

from __future__ import annotations

import os
import runpy
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from patience import PATIENCE


def launch(work: Callable[[], Any], world: int) -> list[Any]:
    """What `work()` returns on each rank; an exception comes back as its text.

    `work` stands at the top of its file, which every process reads anew.
    """
    place = work.__code__.co_filename, work.__name__
    context = mp.get_context("spawn")
    ranks = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(place, rank, world, folder, theirs))
            process.start()
            theirs.close()
            ranks.append((process, ours))
        found = [_told(ours) for _, ours in ranks]
        for process, _ in ranks:
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()
    return found


def _told(pipe: Connection) -> Any:
    """What a rank says, or that it says nothing any more."""
    try:
        return pipe.recv() if pipe.poll(PATIENCE) else f"not done in {PATIENCE} s"
    except EOFError:
        return "died"


def _run(place: tuple[str, str], rank: int, world: int, folder: str, pipe: Connection) -> None:
    # DeepSpeed wants an address to be named, and connects to none: the group is there before.
    named = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0, "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {name: str(x) for name, x in (named | {"WORLD_SIZE": world}).items()}
    torch.set_num_threads(1)
    # The ranks meet in a file: a port that was free may be somebody else's by now.
    store = dist.FileStore(str(Path(folder, "store")), world)
    limit = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    try:
        pipe.send(runpy.run_path(place[0])[place[1]]())
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        pipe.send(text if str(error) else traceback.format_exc())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
