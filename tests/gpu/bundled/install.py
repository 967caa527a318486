"""Install what this machine lacks of the bundle's wheels into its folder `site`; no network, nothing else is touched."""

import hashlib
import importlib.util
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
}


def main() -> int:
    if sys.version_info < (3, 12):
        print(f"error: Python {sys.version.split()[0]}: the bundle needs 3.12 or newer; name one: PYTHON=…", file=sys.stderr)
        return 2
    for module in ("torch", "triton", "pytest"):
        if not has(module):
            print(f"error: {sys.executable} has no {module}, which the bundle does not bring", file=sys.stderr)
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
