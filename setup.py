"""Package metadata of dsv3_megatron; tool configuration is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# Of `dsv3 serve`: HTTP, and the messages of Megatron's coordinator.
SERVE = ["quart", "hypercorn", "pyzmq", "msgpack"]

# Of rewards: generated tasks, and steps of proofs.
REWARDS = ["reasoning-gym>=0.1.25", "z3-solver"]

setup(
    name="dsv3_megatron",
    version="0.1.0",
    description="Train DeepSeek-V3-class models with Megatron-LM: MLA, MoE, MTP, DualPipe, fine-grained FP8",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["dsv3_megatron", "dsv3_megatron.*"]),
    package_data={"dsv3_megatron": ["conf/**/*.yaml", "arguments/*.toml", "py.typed"]},
    install_requires=[
        "megatron-core[training]>=0.19,<0.20",
        "torch>=2.11",
        "hydra-core>=1.3",
        "tokenizers",
        "einops",
        "sympy",
        "matplotlib",
        "tensorboard",
    ],
    extras_require={
        # NVIDIA's apex is not on PyPI (the package of that name there is another one): it is detected, never
        # installed.
        "te": ["transformer-engine[pytorch]>=2.8"],
        "serve": SERVE,
        "test": [
            "pytest>=8",
            "pytest-xdist",
            "hypothesis",
            "transformers>=4.53",
            "safetensors",
            *SERVE,
            *REWARDS,
        ],
        "rewards": REWARDS,
        "dev": ["ruff", "mypy", "pre-commit", "types-PyYAML", "import-linter>=2.4"],
    },
    entry_points={
        "console_scripts": ["dsv3 = dsv3_megatron.cli:main", "dsv3-doctor = dsv3_megatron.doctor:main"],
        # Called by a Megatron-LM with patches/ applied, so that it understands `--spec dsv3`.
        "megatron.plugins": ["dsv3 = dsv3_megatron.arguments.entry:complete_command_line"],
    },
)
