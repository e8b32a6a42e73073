"""Package metadata. CI installs with `-c constraints.txt`, which pins what was tested."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="moellava",
    version="0.1.0",
    description="Build LLaVA-style vision-language models in stages, and upcycle them into Mixtures of Experts",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["moellava", "moellava.*"]),
    install_requires=[
        "torch>=2.6",
        "transformers>=5.18",
        "tokenizers",
        "sentencepiece",
        "protobuf",
        "tiktoken",
        "einops",
        "numpy",
        "pillow>=12",
        "peft",
        "accelerate",
        "safetensors",
    ],
    extras_require={
        "train": ["deepspeed>=0.19", "ninja", "tensorboard"],
        "wandb": ["wandb"],
        "video": ["av>=15"],
        "data": ["datasets>=4", "pyarrow", "pyyaml"],
        "quant": ["bitsandbytes>=0.48"],
        "vision": ["torchvision"],
        "smolvlm": ["num2words", "transformers>=5.23"],
        "demo": ["easy-vqa"],
        "test": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "num2words",
            "av>=15",
            "datasets>=4",
            "pyarrow",
            "pyyaml",
            "bitsandbytes>=0.48",
            "ruff",
            "mypy",
            "pre-commit",
        ],
    },
    entry_points={"console_scripts": ["moellava=moellava.cli:main"]},
)
