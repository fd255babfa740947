"""Makes a wheel with the C++ kernels inside, for machines without a compiler, and tries it out.

Usage: python .ci/wheel.py FOLDER

Nothing of Python or torch is compiled in, so that one wheel serves every version of both. Without a
compiler on this machine the wheel is a pure one, whose users build the kernels at first use.
"""

import base64
import hashlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from prefixattn import build

ROOT = Path(__file__).resolve().parent.parent
PURE = "py3-none-any"
INSIDE = f"prefixattn/lib/{build.NAME}"
# The oldest systems that torch's own wheels serve: manylinux_2_28, and the C++ library it promises.
OLDEST_GLIBC = 28
NEWEST_GLIBCXX = 24
# Run where the wheel is the only prefixattn and no compiler is on the PATH.
PROBE = """
import torch, prefixattn
from prefixattn import build, cpu
tensors = [torch.randn(1, 2, 5, 16) for _ in range(5)]
tried = [prefixattn.prefix_attention(*tensors, implementation=way) for way in ("cpu", "reference")]
torch.testing.assert_close(*tried)
print(build.library())
"""


def pure_wheel(folder: Path) -> Path:
    """The wheel that setuptools makes of this checkout, sources of the kernels included."""
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # may hold modules that are gone here
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--wheel-dir", str(folder)]
    subprocess.run([*command, "--no-deps", "--no-build-isolation", "--quiet"], check=True)
    (wheel,) = folder.glob(f"prefixattn-*-{PURE}.whl")
    return wheel


def platform_of(library: Path) -> str:
    """The wheel's platform: the oldest glibc that has all the symbols which `library` asks for."""
    platform = re.sub(r"\W", "_", sysconfig.get_platform())
    versions = re.findall(rb"\0(GLIBC_2|GLIBCXX_3\.4)\.(\d+)", library.read_bytes())
    newest = dict.fromkeys((b"GLIBC_2", b"GLIBCXX_3.4"), 0)
    for kind, number in versions:
        newest[kind] = max(newest[kind], int(number))
    if not newest[b"GLIBC_2"] or newest[b"GLIBCXX_3.4"] > NEWEST_GLIBCXX:
        return platform  # no glibc at all, or more of its compiler's library than can be promised
    glibc = max(newest[b"GLIBC_2"], OLDEST_GLIBC)
    return platform.replace("linux", f"manylinux_2_{glibc}", 1)


def with_library(pure: Path, library: Path) -> Path:
    """A wheel beside `pure`: the same and the library, under the name of its platform."""
    tag = f"py3-none-{platform_of(library)}"
    made = pure.with_name(pure.name.replace(PURE, tag))
    record = []
    with ZipFile(pure) as old, ZipFile(made, "w", ZIP_DEFLATED) as new:
        entries = [(entry, old.read(entry)) for entry in old.infolist()]
        at = next(n for n, (entry, _) in enumerate(entries) if entry.filename.endswith("/RECORD"))
        record_entry, _ = entries.pop(at)
        added = ZipInfo(INSIDE, entries[0][0].date_time)
        added.external_attr = 0o100755 << 16
        for entry, content in [*entries, (added, library.read_bytes())]:
            if entry.filename.endswith(".dist-info/WHEEL"):
                text = content.decode().replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
                content = text.replace(f"Tag: {PURE}", f"Tag: {tag}").encode()
            new.writestr(entry, content, ZIP_DEFLATED)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            record.append(f"{entry.filename},sha256={digest.decode()},{len(content)}")
        record.append(f"{record_entry.filename},,")
        new.writestr(record_entry, "\n".join(record) + "\n", ZIP_DEFLATED)
    return made


def try_out(wheel: Path, folder: Path) -> None:
    """Install the wheel into `folder` and attend with it, with no compiler and nothing to build."""
    site, home = folder / "site", folder / "home"
    home.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(site), str(wheel)], check=True)
    for name in (path.name for path in (ROOT / "csrc").glob("*.[hc]*")):
        assert (site / "prefixattn" / "csrc" / name).is_file(), f"{name} is not in {wheel}"
    env = {"PATH": "", "HOME": str(home), "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    probe = subprocess.run(
        [sys.executable, "-P", "-c", PROBE], env=env, cwd=folder, text=True, stdout=subprocess.PIPE
    )
    assert probe.returncode == 0, f"{wheel} does not work"
    assert Path(probe.stdout.strip()) == site / INSIDE, probe.stdout
    assert list(home.rglob("*.so")) == []


def main(folder: Path) -> None:
    """Make a wheel in `folder` and print its path."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        wheel = pure_wheel(place)
        try:
            library = build.build(place / "build")
        except build.NoCompilerError as error:
            print(f"{error}: a wheel without the C++ kernels")
        else:
            wheel = with_library(wheel, library)
            try_out(wheel, place)
        print(shutil.copy(wheel, folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
