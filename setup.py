from pathlib import Path

from setuptools import find_packages, setup

version = {}
exec(Path("megatron_policysplit/__init__.py").read_text(), version)

setup(
    name="megatron_policysplit",
    version=version["__version__"],
    description="Policy Split reinforcement learning of language models on Megatron-Core",
    long_description=Path("README.md").read_text() if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_policysplit*", "checkpoints_conv*"]),
    install_requires=[
        "torch>=2.8",
        "megatron-core>=0.16,<0.20",
        "transformers>=4.51",
        "safetensors>=0.4",
        "omegaconf>=2.3",
        "typer>=0.12",
        "aiohttp>=3.10",
        "rich>=13",
        "numpy>=1.26",
        "psutil>=5.9",
        "pyarrow>=15",
        "matplotlib>=3.8",
        "tensorboard>=2.15",
        "jinja2>=3.1",
        "math-verify>=0.7",
        "reasoning-gym>=0.1.19",
        "pebble>=5.0",
    ],
    extras_require={
        "wandb": ["wandb>=0.19"],
        # What a GPU uses beside torch, and what builds Transformer Engine's part for torch without
        # pip's build isolation (docs/gpu.md). That part is not here: pip would compile it against
        # a torch of its own choice, and the result would not import.
        "gpu": ["triton>=3.4", "setuptools", "wheel", "ninja", "pybind11", "packaging"],
        "gguf": ["gguf>=0.10"],
        "quantize": ["nvidia-modelopt>=0.47"],
        # triton: its interpreter runs the GPU kernels' tests on a CPU.
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.6",
            "mbridge==0.15.1",
            "einops>=0.7",
            "wandb>=0.19",
            "triton>=3.4",
            "nvidia-modelopt>=0.47",
        ],
    },
    entry_points={"console_scripts": ["policysplit=megatron_policysplit.cli.main:main"]},
)
