"""The `prefixattn` command."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from prefixattn import build
from prefixattn.bench.cli import app as bench
from prefixattn.choose import IMPLEMENTATIONS, choose
from prefixattn.layers import Positions
from prefixattn.vllm import CACHE_BYTES, kv_transfer_config

app = typer.Typer(
    help="Prefix attention: a prefix and a sequence in one softmax, with no copies.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
MIB = 2**20
DEMO_NEEDS = ("transformers", "peft", "tokenizers", "matplotlib", "psutil")
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
    machine.add_row("C++ kernels", build.state())
    chosen = choose("auto")
    machine.add_row("their instruction set", _instruction_set())
    machine.add_row("gpu", _gpu())
    console.print(machine)
    table = Table(
        "implementation", "runs here", "why", title="Implementations", title_justify="left"
    )
    for found in IMPLEMENTATIONS:
        reason = found.obstacle(True)
        taken = found.name == chosen
        why = reason or ('what implementation="auto" takes' if taken else "by name")
        table.add_row(found.name, "no" if reason else "yes", why)
    console.print(table)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A folder, or a cartridge's .pt file.")],
    target: Annotated[Path, typer.Argument(help="What to write; it must not be there yet.")],
    to: Annotated[str, typer.Option("--to", help="The format to write.")],
    format: Annotated[
        str | None, typer.Option("--from", help="The format of SOURCE; recognised if not given.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="The base model's folder, where a format needs it.")
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="shift or keep: move the keys, as the model turns them.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace TARGET.")] = False,
) -> None:
    """Write a prefix in another format, whole or not at all; refuse to lose anything of it.

    Formats: prefixattn, peft, peft-cartridge, adaption-prompt (read only), adapterhub, cartridge,
    ptuning-v2, attached-model (read only).
    """
    from prefixattn.checkpoints import convert as convert_files

    policies: tuple[Positions, ...] = ("shift", "keep")
    policy = next((each for each in policies if each == positions), None)
    if positions != policy:
        raise typer.BadParameter(f"--positions: expected {' or '.join(policies)}, got {positions}")
    try:
        base = None if model is None else _base_model(model)
        name, prefix = convert_files(
            source, target, to, format=format, model=base, positions=policy, overwrite=overwrite
        )
    except (OSError, TypeError, ValueError, NotImplementedError) as error:
        Console(stderr=True).print(f"convert: {error}", style="red", markup=False)
        raise typer.Exit(1) from error
    Console().print(f"{source}: {name}, a {type(prefix).__name__}", markup=False, highlight=False)
    Console().print(f"{target}: {to}", markup=False, highlight=False)


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="The same seed gives the same numbers.")] = 0,
    output: Annotated[
        Path, typer.Option(help="Folder for the adapter, the curves and the report.")
    ] = Path("prefixattn-demo"),
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder for the tokenizer and base model.", show_default="user cache"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all")] = None,
) -> None:
    """Prefix-tune a small language model on this Python's library, beside stock PEFT."""
    from prefixattn.demo.run import run
    from prefixattn.demo.settings import Settings

    options: dict[str, Any] = {"seed": seed, "output": output, "threads": threads}
    if cache is not None:
        options["cache"] = cache
    try:
        settings = Settings(**options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    missing = [package for package in DEMO_NEEDS if find_spec(package) is None]
    if missing:
        typer.echo(f"the demo needs {', '.join(missing)}: pip install 'prefixattn[demo]'", err=True)
        raise typer.Exit(1)
    try:
        run(settings)
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. What was finished is kept, and the next run goes on from it.")
        raise typer.Exit(130) from None


@app.command()
def vllm(
    adapters: Annotated[Path, typer.Argument(help="A folder of folders, one for each adapter.")],
    cache_mib: Annotated[
        int, typer.Option(min=0, help="MiB of loaded adapters that each worker keeps.")
    ] = CACHE_BYTES // MIB,
    placeholder_token_id: Annotated[
        int | None, typer.Option(min=0, help="The token that stands for a prefix in prompts.")
    ] = None,
) -> None:
    """Print what `vllm serve --kv-transfer-config` takes; say of each adapter whether it loads."""
    console = Console(stderr=True)
    from prefixattn.vllm.folder import examine

    if not adapters.is_dir():
        raise typer.BadParameter(f"ADAPTERS: {adapters} is not a folder")
    damaged = False
    for name, found in examine(adapters):
        damaged |= isinstance(found, Exception)
        words = found if isinstance(found, Exception) else f"{found} prefix tokens"
        console.print(f"{name}: {words}", markup=False, highlight=False, soft_wrap=True)
    config = kv_transfer_config(
        adapters, cache_bytes=cache_mib * MIB, placeholder_token_id=placeholder_token_id
    )
    typer.echo(json.dumps(config))
    raise typer.Exit(int(damaged))


def _base_model(folder: Path) -> Any:
    """The model in ``folder``, by the class that its configuration names."""
    import transformers

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {folder}")
    config = transformers.AutoConfig.from_pretrained(folder)
    for name in config.architectures or []:
        found: Any = getattr(transformers, str(name), None)
        if hasattr(found, "from_pretrained"):
            return found.from_pretrained(folder)
    return transformers.AutoModel.from_pretrained(folder)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _instruction_set() -> str:
    """What the C++ kernels compute with here."""
    if build.obstacle() is not None:
        return "none"
    from prefixattn import cpu

    refused = "; the processor has AMX, which the system does not let this process use"
    return cpu.instructions() + (refused if cpu.tiles_refused() else "")


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that this torch can use"
    return ", ".join(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count()))
