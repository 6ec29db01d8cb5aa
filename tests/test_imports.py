"""Who may import whom: the dependency rules of docs/architecture.md, kept by reading every import
in the tree.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("conf", "kernels", "compiler", "runtime", "bench")
SHIPPED = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))

# package prefix -> what no file under it may import
FORBIDDEN = {
    "conf": {"torch", "transformers", "triton", "kernels", "compiler", "runtime", "bench"},
    "kernels": {"conf", "compiler", "runtime", "bench", "transformers"},
    "kernels/ops": {"triton", "cutlass"},
    "kernels/cpu": {"torch", "triton", "cutlass"},
    "kernels/cuda": {"torch"},
    "compiler": {"bench", "runtime.engine", "runtime.http", "runtime.core"},
    "runtime": {"compiler", "kernels", "bench", "torch", "triton", "transformers", "cutlass"},
    "bench": set(),
}
ONLY_IN = {
    "hydra": {"conf/load.py"},
    "omegaconf": {"conf/load.py"},
    "cuda": {"runtime/device/cuda.py"},
    # In a process of its own: neither the engine nor the HTTP process loads it.
    "llguidance": {f"runtime/grammar/{n}.py" for n in ("cache", "compiler", "trial", "worker")},
}
NEVER = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def matches(name: str, rule: str) -> bool:
    return name == rule or name.startswith(rule + ".")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_dependency_rules(path: Path) -> None:
    relative = str(path.relative_to(ROOT))
    names = imports(path)
    for prefix, rules in FORBIDDEN.items():
        if relative.startswith(prefix + "/"):
            broken = {n for n in names for r in rules if matches(n, r)}
            assert not broken, f"{relative} must not import {sorted(broken)}"
    for module, allowed in ONLY_IN.items():
        if any(matches(n, module) for n in names):
            assert relative in allowed, f"only {sorted(allowed)} may import {module}"
    if not relative.startswith("bench/"):
        assert not any(matches(n, "bench") for n in names), "bench is imported by nobody"
    assert not {n for n in names for r in NEVER if matches(n, r)}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_dynamic_code(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec", "compile", "__import__"}, node.lineno
            if isinstance(node.func, ast.Attribute):
                called = ast.unparse(node.func)
                assert called not in {"torch.load", "torch.jit.load"}, node.lineno
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant) and node.value.value is False


def loaded_modules(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint('\\n'.join(sorted(sys.modules)))"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(out.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import runtime; runtime.Engine",
        "import runtime.core.worker",
        "import runtime.serve, runtime.http.app",
        "import runtime.device.cpu",
        "import runtime.device.cuda, runtime.device.launcher",
    ],
)
def test_runtime_loads_no_compiler(statement: str) -> None:
    top = {m.split(".")[0] for m in loaded_modules(statement)}
    assert not top & {"torch", "triton", "transformers", "kernels", "compiler", "bench", "pandas"}


def test_worker_is_lean() -> None:
    """Module count is steadier than milliseconds; the worker's imports are on the start-up path."""
    assert len(loaded_modules("import runtime.core.worker, runtime.device.cpu")) < 350


def test_kernels_package_is_empty() -> None:
    """transformers probes an optional dependency of the same name and must find nothing to run."""
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""
