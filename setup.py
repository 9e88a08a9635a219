"""Packaging of detr_family. The version and the ranges of what it needs stand here and nowhere else.

The libraries with C++ and CUDA are optional: see build_ext.py.
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).parent))  # pip runs this file without its folder on the path
from build_ext import BuildExt, extensions

CONFIGS = "detr_family.model_zoo.configs"

setup(
    name="detr_family",
    version="0.1.0",
    description="DETR, Conditional DETR, DAB-DETR, DN-DETR, DINO as ordinary Detectron2 meta-architectures",
    license="Apache-2.0",
    # configs/ goes into the package as data; a checkout, or an installation in editable mode, uses the folder itself.
    packages=[*find_packages(include=["detr_family", "detr_family.*"]), CONFIGS],
    package_dir={CONFIGS: "configs"},
    package_data={
        "detr_family.layers": ["csrc/*"],
        "detr_family.model_zoo": ["zoo.json"],
        "detr_family.visualization": ["report.html.j2"],
        CONFIGS: ["*.yaml", "*/*.yaml"],
    },
    entry_points={"console_scripts": ["detr-family = detr_family.commands.main:main"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    python_requires=">=3.10",
    # Detectron2 is needed too; it is not on PyPI under its name (see README.md).
    install_requires=[
        "torch>=2.10",
        "torchvision>=0.25",
        "scipy>=1.10",
        "pycocotools>=2.0.7",
        "matplotlib>=3.7",
        "fvcore>=0.1.5",
        "iopath>=0.1.9",
        "jinja2>=3.0",
        "numpy",
        "pillow",
        "pyyaml",
        "tabulate",
        "tqdm",
        "typing_extensions>=4.4",
        "safetensors>=0.4",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-xdist>=3"],
        "parity": ["transformers>=4.40"],
        "onnx": ["onnx>=1.19", "onnxscript>=0.5", "onnxruntime>=1.22"],  # to export to ONNX, and to run such files
        "openvino": ["openvino>=2025.2", "onnx>=1.19", "onnxscript>=0.5"],  # the same for OpenVINO
        "int8": ["nncf>=3.0", "openvino>=2025.2", "onnx>=1.19", "onnxscript>=0.5"],  # for --precision int8
        "hub": ["huggingface_hub>=0.30"],  # for hf:// addresses
        "timm": ["timm>=1.0.20"],  # for build_timm_backbone and build_vit_backbone
        "video": ["opencv-python-headless>=4.5"],  # for demo.py on videos
        "parquet": ["pyarrow>=14"],  # for tools/predict.py --parquet
        "wandb": ["wandb>=0.17"],  # LOGGERS, each by its name
        "mlflow": ["mlflow-skinny>=2.14"],
        "clearml": ["clearml>=1.16"],
        "fast-eval": ["faster-coco-eval>=1.6"],  # for evaluations many times as fast
        "serve": ["fastapi>=0.110", "uvicorn>=0.30"],  # for projects/serving
        "lint": ["ruff>=0.6", "mypy>=1.10"],
    },
)
