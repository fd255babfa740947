"""Run PEFT's own tests of prefixes twice: on stock PEFT, and with our attention in every model.

What passes on stock PEFT must pass with ours. The tests are those of the installed version: its
source archive comes from the package index, and the models, which they ask the hub for, are built
here (`hub.py`). Everything is kept in ``build/peft-tests``.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

import hub  # noqa: E402
from expected import EXPECTED  # noqa: E402

FILES = (
    "test_decoder_models test_encoder_decoder_models test_feature_extraction_models "
    "test_seq_classifier test_cartridge test_initialization"
).split()
SELECTED = "prefix or cartridge"


def fetch(folder: Path) -> Path:
    """The unpacked source of the installed PEFT."""
    version = importlib.metadata.version("peft")
    source = folder / f"peft-{version}"
    if (source / "tests" / "__init__.py").exists():
        return source
    print(f"fetching the source of peft {version}")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
    subprocess.run([*pip, f"peft=={version}", *options], check=True, timeout=1800)
    with tarfile.open(folder / f"{source.name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    (source / "tests" / "__init__.py").touch()  # last; their imports are relative
    return source


def run(source: Path, folder: Path, workers: int, *, ours: bool) -> dict[str, str]:
    """What comes of each test."""
    outcomes = folder / f"{'ours' if ours else 'stock'}.json"
    outcomes.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-q", "--no-header", "--tb=short"]
    command += ["-n", str(workers), "-k", SELECTED, "--outcomes", str(outcomes)]
    command += [
        "-c",
        os.devnull,
        "--rootdir",
        str(source),
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
    ]
    command += ["--prefixattn"] if ours else []
    command += [f"tests/{name}.py" for name in FILES]
    environment = os.environ | {
        "PYTHONPATH": str(HERE),
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }
    log = outcomes.with_suffix(".log")
    with log.open("w") as output:
        subprocess.run(
            command, cwd=source, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    if not outcomes.exists():
        raise SystemExit(f"PEFT's tests did not run; {log} says why")
    found: dict[str, str] = json.loads(outcomes.read_text())
    return found


def differences(stock: dict[str, str], ours: dict[str, str]) -> list[str]:
    """What speaks against us, in words: tests that only we fail, and reasons that are none now."""
    wrong = []
    for name, before in sorted(stock.items()):
        after = ours.get(name, "did not run")
        reason = next((r for part, r in EXPECTED.items() if part in name), None)
        if before == "passed" and after != "passed" and reason is None:
            wrong.append(f"{name}: {after}")
    for part in EXPECTED:
        named = [name for name in stock if part in name and stock[name] == "passed"]
        if not any(ours.get(name) != "passed" for name in named):
            wrong.append(f"expected.py names {part!r}, and all such tests pass")
    return wrong


def summary(outcomes: dict[str, str]) -> str:
    kinds = [outcome.split(":")[0] for outcome in outcomes.values()]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "peft-tests")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    source = fetch(folder)
    hub.build(folder / "hub" / "hub")
    stock = run(source, folder, arguments.workers, ours=False)
    print(f"stock PEFT: {summary(stock)}")
    ours = run(source, folder, arguments.workers, ours=True)
    print(f"prefixattn: {summary(ours)}")
    wrong = differences(stock, ours)
    print("\n".join(wrong) or "what passes on stock PEFT passes with prefixattn")
    if "passed" not in stock.values() or wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
