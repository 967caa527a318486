"""Install what this machine lacks of the bundle's wheels into its folder `site`; no network, nothing elsewhere."""

import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SITE = HERE / "site"
ALWAYS = ("dsv3_megatron", "megatron_core")  # these versions, whatever the machine has
MODULES = {  # of a wheel, where its name is another
    "antlr4_python3_runtime": "antlr4",
    "hydra_core": "hydra",
    "pyyaml": "yaml",
    "absl_py": "absl",
    "grpcio": "grpc",
    "protobuf": "google.protobuf",
    "transformer_engine_cu13": "transformer_engine",  # the library: only with its Python
}


TE_LIMIT_S = 460


def main() -> int:
    if sys.argv[1:] == ["te"]:
        return build_te()
    if sys.version_info < (3, 12):  # noqa: UP036 (the machine's Python, not ours)
        print(
            f"error: Python {sys.version.split()[0]}: the bundle needs 3.12 or newer; name one: PYTHON=…",
            file=sys.stderr,
        )
        return 2
    for module in ("torch", "triton", "pytest"):
        if not has(module):
            print(
                f"error: {sys.executable} has no {module}, which the bundle does not bring", file=sys.stderr
            )
            return 2
    folders = [HERE / "wheels", *HERE.parent.glob(HERE.name + "_te/wheels")]
    wheels = [wheel for folder in folders for wheel in sorted(folder.glob("*.whl")) if wanted(wheel)]
    names = "\n".join(wheel.name + str(wheel.stat().st_size) for wheel in wheels)
    done = SITE / ("." + hashlib.sha256(names.encode()).hexdigest()[:16])
    if done.exists():
        return 0
    print(f"installing {len(wheels)} wheels into {SITE}", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--upgrade", "--disable-pip-version-check", "--target", str(SITE)]
    status = subprocess.run([*command, *map(str, wheels)], check=False).returncode
    if status == 0:
        done.touch()
    return status


def build_te() -> int:
    """Build Transformer Engine's torch extension from its source, against the CUDA headers of torch's wheels."""
    part = HERE.parent / f"{HERE.name}_te"
    sources = sorted(part.glob("transformer_engine_torch-*.tar.gz"))
    if not sources:
        print(
            f"error: {part} holds no source of transformer_engine_torch; make gpu-bundle TE=1 writes it",
            file=sys.stderr,
        )
        return 2
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    site = Path(torch.origin).parents[1]
    includes = [str(p) for p in site.glob("nvidia/**/include") if p.is_dir()]
    libraries = [str(p) for p in site.glob("nvidia/**/lib") if p.is_dir()]
    env = os.environ | {
        "PYTHONPATH": str(SITE),
        "NVTE_FRAMEWORK": "pytorch",
        "MAX_JOBS": str(os.cpu_count() or 2),
    }
    env["PATH"] = os.pathsep.join([str(SITE / "bin"), os.environ.get("PATH", "")])  # ninja
    for name, found in (
        ("CPLUS_INCLUDE_PATH", includes),
        ("LIBRARY_PATH", libraries),
        ("LD_LIBRARY_PATH", libraries),
    ):
        env[name] = os.pathsep.join([*found, *filter(None, [os.environ.get(name)])])
    print(f"building {sources[-1].name} (at most {TE_LIMIT_S} s)", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation"]
    process = subprocess.Popen(
        [*command, "--target", str(SITE), str(sources[-1])], env=env, start_new_session=True
    )
    try:
        return process.wait(TE_LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        print(f"error: not built within {TE_LIMIT_S} s", file=sys.stderr)
        return 1


def wanted(wheel: Path) -> bool:
    """Whether this machine lacks it, or must have this version."""
    name = wheel.name.split("-")[0].lower()
    return name in ALWAYS or not has(MODULES.get(name, name))


def has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


if __name__ == "__main__":
    sys.exit(main())
