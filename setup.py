"""Packaging. `pip install .` brings what the data commands need; the extras bring the rest."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "jllm/__init__.py").read_text()).group(1)

DATA = [
    "click>=8.1",
    "fastokens>=0.3.5",
    "fsspec>=2024.6",
    "jinja2>=3.1",
    "numpy>=1.26",
    "orjson>=3.10",
    "pyarrow>=20",
    "tokenizers>=0.22",
    "transformers>=5.17,<6",
    "zstandard>=0.22",
]
TRAIN = [
    "deepspeed>=0.19.3,<0.20",
    "ninja>=1.11",
    "safetensors>=0.5",
    "tensorboard>=2.17",
    "torch>=2.11",
]
SPARK = ["pandas>=2.2", "pyspark>=4.0"]
DEMO = [*TRAIN, "accelerate>=1", "gguf>=0.17", "sentencepiece>=0.2"]  # transformers reads GGUF files with them
ADAPTERS = ["accelerate>=1", "bitsandbytes>=0.50", "gguf>=0.17", "peft>=0.21"]  # LoRA, and models in 4 and 8 bits
OPTIMIZERS = ["bitsandbytes>=0.50", "schedulefree>=1.4", "torch-optimi>=0.3"]  # of --optimizer
FP8 = ["torchao>=0.17"]  # --fp8
GPU = [*ADAPTERS, *FP8, *OPTIMIZERS, "liger-kernel>=0.6"]
PLOT = ["matplotlib>=3.8"]  # PNGs of `jllm plot`
REPORT = ["mlflow-skinny>=3", "trackio>=0.40", "wandb>=0.31"]  # --report_to
DEV = [
    *ADAPTERS,
    *DEMO,
    *FP8,
    *OPTIMIZERS,
    *SPARK,
    "duckdb>=1.3",
    "hypothesis>=6.100",
    "mypy>=1.15",
    "polars>=1.30",
    "psutil>=6",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.11",
    "tiktoken>=0.9",
    "types-psutil>=7",
]

setup(
    name="jllm",
    version=VERSION,
    description="Token-id shards, a global shuffle, and a pipeline-parallel trainer for language models",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["jllm", "jllm.*"]),
    package_data={"jllm": ["**/*.json", "**/*.jinja"]},
    install_requires=DATA,
    extras_require={
        "train": TRAIN,
        "adapters": ADAPTERS,
        "optimizers": OPTIMIZERS,
        "fp8": FP8,
        "spark": SPARK,
        "gpu": GPU,
        "demo": DEMO,
        "plot": PLOT,
        "report": REPORT,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["jllm=jllm.cli:main"]},
)
