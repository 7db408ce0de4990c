# SPDX-License-Identifier: Apache-2.0
"""Packaging only; the settings of tools are in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

METEOR = ["pycocoevalcap>=1.2"]  # carries METEOR 1.5, which needs Java as well
DEEPSPEED = ["deepspeed>=0.18"]  # 0.18.0 and 0.19.8 pass the tests; 0.16 has another constructor
# A version with a letter lets pip take it, and newer ones of the kind; 4.0.0b36 is what was measured.
FLASH_ATTENTION = ["flash-attn-4>=4.0.0b36"]
# What checks the code, and the outside references (loralib, PEFT, transformers, DeepSpeed) that tests compare with.
TEST = [
    "pytest>=8",
    "pytest-timeout",
    "pytest-xdist>=3.7",
    "hypothesis>=6",
    "ruff>=0.6",
    "mypy>=1.11",
    "types-PyYAML",
    "transformers>=4.44",
    "peft>=0.12",
    "loralib>=0.1.2",
    *DEEPSPEED,
]


def read_version() -> str:
    """The version as `lora_megatron/__init__.py` states it, read as text: importing it would need its dependencies."""
    text = (ROOT / "lora_megatron" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError("lora_megatron/__init__.py states no __version__")
    return found.group(1)


def read_readme() -> str:
    """The long description; empty where only the packages were copied, as in a container's first layer."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


setup(
    name="lora-megatron",
    version=read_version(),
    description="LoRA fine-tuning inside a Megatron-Core GPT: exact under every parallel layout.",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["lora_megatron", "lora_megatron.*", "data_prep", "data_prep.*"]),
    package_data={"": ["*.yaml", "*.yml", "py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        # 0.16.1 is the newest for Python 3.11; later ones need 3.12.
        "megatron-core>=0.16.1,<0.20",
        "numpy",
        "pyarrow>=15",
        "safetensors>=0.4",
        "jinja2>=3.1.6",  # chat templates; older ones have known ways out of the sandbox
        "PyYAML",
        "pydantic>=2.7",
        "rich",
        "matplotlib",
        "tokenizers",
        "tensorboard",
        "sacrebleu>=2.4",
        "rouge-score>=0.1.2",
    ],
    extras_require={"deepspeed": DEEPSPEED, "fa4": FLASH_ATTENTION, "meteor": METEOR, "test": TEST},
    entry_points={"console_scripts": ["lora-megatron = lora_megatron.__main__:main"]},
)
