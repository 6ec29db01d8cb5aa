"""The wheels a bare GPU machine lacks: fetched where there is a network, installed where there is
none.

`fetch` walks pyproject's requirements through the environment it runs in and downloads, for the
other machine's Python, everything but what comes with torch there. `python -m bench.gpu.wheels
<bundle> <site> <cache>`, run on that machine by nothing but its own Python, installs what its
packages do not satisfy into the folder `site`, for PYTHONPATH, and unpacks built kernels into the
cache. A wheel is taken only where the machine's own version does not do, so that packages that were
made to fit each other stay together.
"""

from __future__ import annotations

import email
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ("compile", "cuda", "cutlass", "bench")  # to compile, serve and measure on a GPU
# Large, and there wherever torch for GPUs is.
MACHINE = ("torch", "triton", "cuda-bindings", "numpy", "pandas", "matplotlib", "transformers")
TOOLKIT = ("nvidia-cuda-cccl", "nvidia-cuda-nvcc", "nvidia-cuda-runtime")  # the machine's own does
HEADERS = ("nvidia-cutlass",)  # only its headers are used, nothing it asks for
WHEELS, KERNELS = "wheels", "kernels.tar.xz"  # of a bundle
GLIBC = range(39, 16, -1)  # manylinux_2_<n> wheels that the machine takes


class WheelError(Exception):
    """One line: what is missing and what to do."""


def packaging() -> Any:
    """`packaging`, or the copy every pip has: this runs before anything is installed."""
    try:
        import packaging.requirements as requirements
        import packaging.utils as utils
    except ImportError:
        from pip._vendor.packaging import requirements, utils  # type: ignore[no-redef]
    return requirements, utils


def wanted() -> list[str]:
    """pyproject's requirements, and those of EXTRAS."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found: list[str] = list(project["dependencies"])
    for extra in EXTRAS:
        found += project["optional-dependencies"][extra]
    return found


def closure(
    wanted: Iterable[str],
    requires: Callable[[Any], list[str]],
    environment: dict[str, str],
) -> list[str]:
    """Names of all distributions that `wanted` leads to. `requires(requirement)`: what that one
    asks for in turn; raises `StopIteration` where the walk ends and nothing is to be taken."""
    requirements, utils = packaging()
    found: dict[str, set[str]] = {}
    todo = [(text, "") for text in wanted]
    while todo:
        text, extra = todo.pop(0)
        requirement = requirements.Requirement(text)
        marker = requirement.marker
        if marker is not None and not marker.evaluate({**environment, "extra": extra}):
            continue
        name = utils.canonicalize_name(requirement.name)
        extras = {"", *requirement.extras} - found.get(name, set())
        if not extras:
            continue
        try:
            more = requires(requirement)
        except StopIteration:
            continue
        found.setdefault(name, set()).update(extras)
        todo += [(text, e) for text in more for e in extras]
    return list(found)


# --- where there is a network -----------------------------------------------------------------


def needed_here(requirement: Any) -> list[str]:
    """What a package of this environment asks for, for `closure`."""
    _, utils = packaging()
    name = utils.canonicalize_name(requirement.name)
    if name in (*MACHINE, *TOOLKIT):
        raise StopIteration
    if name in HEADERS:
        return []
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        raise WheelError(
            f"{requirement} is not installed here, so what it needs is not known; make setup"
        ) from None


def fetch(folder: Path, python: str) -> list[Path]:
    """Downloads into `folder` (emptied first) for x86-64 Linux and Python `python`."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()

    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    names = closure(wanted(), needed_here, environment)
    exact = [_exact(name) for name in names]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda text: _fetch_one(text, folder, python), exact))
    return sorted(folder.glob("*.whl"))


def _exact(name: str) -> str:
    """The version in use here; of what is not, that which pyproject asks for."""
    requirements, utils = packaging()
    try:
        return f"{name}=={metadata.version(name)}"
    except metadata.PackageNotFoundError:
        parsed = map(requirements.Requirement, wanted())
        return str(next(r for r in parsed if utils.canonicalize_name(r.name) == name))


def _fetch_one(exact: str, folder: Path, python: str) -> None:
    """One wheel; made from the sources where only they are published (then it must be pure
    Python)."""
    platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in GLIBC]
    target = [f"--python-version={python}", "--implementation=cp", "--platform=linux_x86_64"]
    target += [*platforms, "--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", *target, "-d", str(folder)]
    done = subprocess.run([*command, exact], capture_output=True, text=True, check=False)
    if not done.returncode:
        return
    with tempfile.TemporaryDirectory() as made:
        command = [*pip, "wheel", "--no-deps", "-w", made, exact]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        pure = list(Path(made).glob("*-none-any.whl"))
        if built.returncode or not pure:
            reason = (built.stderr if built.returncode else done.stderr).strip().splitlines()
            raise WheelError(
                f"{exact}: no wheel for Python {python} and none can be made: "
                f"{reason[-1] if reason else 'its wheel is not pure Python'}"
            )
        (folder / pure[0].name).write_bytes(pure[0].read_bytes())


# --- where there is none ----------------------------------------------------------------------


def install(folder: Path, site: Path) -> list[str]:
    """Unpacks what this machine's packages do not satisfy into `site`. Once: a second call finds
    the same wheels listed there and does nothing. Names of what was taken."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise WheelError(f"{folder} has no wheels; make gpu-bundle fetches them")
    listed = "\n".join([sys.version, *(path.name for path in wheels)])
    stamp = site / ".installed"
    if stamp.exists() and stamp.read_text("utf-8") == listed:
        return []
    needed = choose(wheels)
    if needed:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        options = ["--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(site)]
        done = subprocess.run(
            [*pip, *options, *map(str, needed)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise WheelError(f"pip cannot install the bundle: {done.stderr.strip()[-500:]}")
    site.mkdir(parents=True, exist_ok=True)
    stamp.write_text(listed, "utf-8")
    return [path.name.split("-")[0] for path in needed]


def choose(wheels: Iterable[Path], version: Callable[[str], str] = metadata.version) -> list[Path]:
    """The wheels that pyproject's requirements lead to where `version` (of the machine's packages)
    does not satisfy them. WheelError names what neither has."""
    _, utils = packaging()
    have = {utils.canonicalize_name(path.name.split("-")[0]): path for path in wheels}
    missing: dict[str, str] = {}

    def requires(requirement: Any) -> list[str]:
        name = utils.canonicalize_name(requirement.name)
        if name in TOOLKIT:
            raise StopIteration
        try:
            found = version(requirement.name)
        except metadata.PackageNotFoundError:
            found = ""
        if found and requirement.specifier.contains(found, prereleases=True):
            raise StopIteration
        if name not in have:
            missing[name] = f"{requirement} ({f'here {found}' if found else 'not here'})"
            raise StopIteration
        return [] if name in HEADERS else _requires(have[name])

    names = closure(wanted(), requires, {})
    # What a machine usually has is told but stops nothing: not everything needs all of it.
    for name in [name for name in missing if name in MACHINE]:
        print(f"# this machine does not satisfy {missing.pop(name)}", file=sys.stderr)
    if missing:
        raise WheelError(
            f"neither this machine nor the bundle has {', '.join(sorted(missing.values()))}; "
            "make gpu-bundle for this machine's Python"
        )
    return [have[name] for name in names]


def _requires(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (inside,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(inside)).get_all("Requires-Dist") or []


def unpack(archive: Path, cache: Path) -> int:
    """Puts built kernels into the cache; how many were new. Entries are named by all they depend
    on, so one that other tools or sources would make is merely not found."""
    cache.mkdir(parents=True, exist_ok=True)
    new = 0
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and not (cache / member.name).exists():
                tar.extract(member, cache, filter="data")
                new += 1
    return new


def main(bundle: Path, site: Path, cache: Path) -> None:
    taken = install(bundle / WHEELS, site)
    if taken:
        print(f"installed {len(taken)} packages into {site}", file=sys.stderr)
    if (bundle / KERNELS).exists() and (new := unpack(bundle / KERNELS, cache)):
        print(f"unpacked {new} files into {cache}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main(*(Path(word).expanduser() for word in sys.argv[1:]))
    except WheelError as error:
        sys.exit(f"error: {error}")
