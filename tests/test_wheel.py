"""The wheel as its user has it: an environment without the checkout, another folder, names in place of files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from detr_family.data.datasets.shapes import write_shapes

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.extension]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packed, so that no build folder is left in the checkout."""
    folder = tmp_path_factory.mktemp("source") / "detr_family"
    left_out = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "build")
    for name in ("detr_family", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    for name in ("setup.py", "build_ext.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    environment = {**os.environ, "CUDA_HOME": "/nowhere", "FORCE_CUDA": "0"}  # the CPU's operator is enough here
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", "dist"]
    run = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert not run.returncode, run.stdout + run.stderr
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel, and with the packages that this interpreter has."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "env", symlinks=True)
    python = folder / "env" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    run = subprocess.run(install, capture_output=True, text=True)
    assert not run.returncode, run.stdout + run.stderr
    # A line in a .pth file adds a folder, but not what the .pth files in that folder add: not this checkout.
    shared = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "shared.pth").write_text("\n".join(shared) + "\n")
    return python.parent


def run(bare: Path, folder: Path, *command: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment.update(OMP_NUM_THREADS="1", FVCORE_CACHE=str(folder / "cache"))
    line = [str(bare / command[0]), *command[1:]]
    result = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    assert not result.returncode, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def test_one_wheel_for_every_python(wheel: Path) -> None:
    assert "-cp310-abi3-" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")]
    configs = {f"detr_family/model_zoo/configs/{file.as_posix()}" for file in files}
    assert configs <= names and len(configs) > 40
    assert {"detr_family/model_zoo/zoo.json", "detr_family/layers/_ms_deform_attn_cpu.abi3.so"} <= names
    assert "detr_family/layers/_winograd_cpu.abi3.so" in names
    assert "detr_family/layers/_outer_products_cpu.abi3.so" in names
    assert not [name for name in names if name.split("/")[0] not in ("detr_family", "detr_family-0.1.0.dist-info")]


def test_the_source_distribution_has_what_a_build_needs(source: Path) -> None:
    pytest.importorskip("build")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", "sdist"]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert not result.returncode, result.stdout + result.stderr
    (path,) = (source / "sdist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"build_ext.py", "configs/detr_r50.yaml", "detr_family/layers/csrc/cpu.cpp"} <= names
    assert "detr_family/model_zoo/zoo.json" in names


def test_train_and_find_by_name_from_another_folder(bare: Path, tmp_path: Path) -> None:
    code = "import detr_family; from detr_family import model_zoo; print(model_zoo.get_config_file('dn_detr_r50'))"
    file = run(bare, tmp_path, "python", "-c", code).strip()
    assert file.startswith(str(bare.parent)) and Path(file).is_file()
    assert "dn_detr_r50 " in run(bare, tmp_path, "detr-family", "zoo", "dn_detr_r50")
    env = run(bare, tmp_path, "detr-family", "env")
    assert str(ROOT) not in env and any(line.split()[-1] == "native" for line in env.splitlines() if "on cpu" in line)

    entries = write_shapes(str(tmp_path / "shapes"), 8, 4)
    data = [
        *("DATASETS.COCO_FORMAT", repr([list(entry) for entry in entries])),
        *("DATASETS.TRAIN", repr((entries[0][0],)), "DATASETS.TEST", repr((entries[1][0],))),
        *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2"),
    ]
    run(bare, tmp_path, "detr-family", "train", "--config-file", "dino_quickstart", *data, "OUTPUT_DIR", "out")
    assert (tmp_path / "out" / "model_final.pth").is_file() and (tmp_path / "out" / "report.html").is_file()

    image = next((tmp_path / "shapes").rglob("*.jpg"), None) or next((tmp_path / "shapes").rglob("*.png"))
    demo = ["--config-file", "dino_quickstart", "--weights", "out/model_final.pth", "--input", str(image)]
    printed = run(bare, tmp_path, "detr-family", "demo", *demo, "--output", "found", "--confidence-threshold", "0")
    assert printed.startswith("1 images, ") and (tmp_path / "found" / "results.json").is_file()

    # A recipe's whole detector with weights drawn at random, by its name.
    code = (
        "import numpy, torch; from detr_family import model_zoo; from detr_family.inference import Predictor\n"
        "from detectron2.modeling import build_model\n"
        "model = build_model(model_zoo.get_config('detr_r50'))\n"
        "torch.save({'model': model.state_dict()}, 'random.pth')\n"
        "found = Predictor.from_config('detr_r50', 'random.pth')(numpy.zeros((60, 80, 3), numpy.uint8))\n"
        "print(len(found), model.num_classes)"
    )
    assert run(bare, tmp_path, "python", "-c", code).split() == ["100", "80"]
