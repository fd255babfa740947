"""The `prefixattn` command."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
import typer
from rich.console import Console
from rich.table import Table

from prefixattn.choose import IMPLEMENTATIONS

app = typer.Typer(
    help="Prefix attention: a prefix and a sequence in one softmax, with no copies.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
PACKAGES = ("prefixattn", "torch", "triton", "transformers", "peft")


@app.callback()
def main() -> None:
    """Hold the subcommands together."""


@app.command()
def info() -> None:
    """Say what runs on this machine, and why the rest does not."""
    console = Console()
    machine = Table("machine", "", title="This machine", title_justify="left")
    machine.add_row("python", platform.python_version())
    for package in PACKAGES:
        machine.add_row(package, _version(package))
    machine.add_row("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")
    machine.add_row("instructions", torch.backends.cpu.get_cpu_capability())
    machine.add_row("gpu", _gpu())
    console.print(machine)
    chosen = next(name for name, obstacle, _ in IMPLEMENTATIONS if obstacle() is None)
    table = Table(
        "implementation", "runs here", "why", title="Implementations", title_justify="left"
    )
    for name, obstacle, _ in IMPLEMENTATIONS:
        reason = obstacle()
        why = reason or ('what implementation="auto" takes' if name == chosen else "by name")
        table.add_row(name, "no" if reason else "yes", why)
    console.print(table)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that this torch can use"
    return ", ".join(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count()))
