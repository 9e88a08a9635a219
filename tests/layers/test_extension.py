"""Building and loading the operator's libraries; those that compile carry the marker `extension`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from detr_family import collect_env
from detr_family.layers import deformable_attention_ops as ops
from detr_family.layers import outer_products, winograd

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build_ext.py"
in_checkout = pytest.mark.skipif(not BUILD.exists(), reason="not in a checkout of the sources")
sys.path.insert(0, str(ROOT))


def copy_sources(target: Path) -> None:
    for name in ("setup.py", "build_ext.py", "pyproject.toml"):
        shutil.copy(ROOT / name, target)
    shutil.copytree(ROOT / "detr_family", target / "detr_family", ignore=shutil.ignore_patterns("*.so", "__pycache__"))


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@in_checkout
def test_building_never_fails_for_want_of_tools(tmp_path: Path):
    copy_sources(tmp_path)
    result = build(tmp_path, CXX="no-such-compiler", CUDA_HOME="/no/such/folder", FORCE_CUDA="0")
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("detr_family: ")]
    assert len(said) == 4
    assert "ms_deform_attn on CPU" in said[0] and "no C++ compiler found; install g++" in said[0]
    assert "no nvcc in CUDA_HOME=/no/such/folder; install the CUDA toolkit" in said[1]
    assert "3x3 convolutions on CPU" in said[2] and "no C++ compiler found; install g++" in said[2]
    assert "training on CPU" in said[3] and "no C++ compiler found; install g++" in said[3]
    assert not list(tmp_path.rglob("*.so"))
    code = (
        "import torch, warnings; warnings.simplefilter('error', RuntimeWarning); import detr_family.layers as l; "
        "warnings.simplefilter('always'); v = torch.ones(1, 6, 1, 2); "
        "x, w = torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1); "
        "print(l.ms_deform_attn(v, [(2, 3)], [0], x, w))"
    )
    used = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "tensor([[[1., 1.]]])" in used.stdout, used.stderr
    assert used.stderr.count("slow pure-torch path: the cpu library was not built") == 1


@in_checkout
def test_force_cuda_makes_it_an_error(tmp_path: Path):
    copy_sources(tmp_path)
    result = build(tmp_path, CXX="no-such-compiler", CUDA_HOME="/no/such/folder", FORCE_CUDA="1")
    assert result.returncode != 0
    assert "FORCE_CUDA is set, but: no nvcc in CUDA_HOME=/no/such/folder" in result.stderr


@in_checkout
def test_a_build_in_isolation_finds_the_torch_of_its_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import build_ext

    here = build_ext.torch_folder()
    monkeypatch.setattr(build_ext, "find_spec", lambda _: None)
    assert build_ext.torch_folder().samefile(here)
    monkeypatch.setattr(build_ext.sysconfig, "get_path", lambda _: "/nowhere")
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(build_ext.Missing, match="torch is not there while building"):
        build_ext.torch_folder()
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    site.mkdir(parents=True)
    (site / "torch").symlink_to(here)
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    assert build_ext.torch_folder().samefile(here)


@in_checkout
def test_arch_list(monkeypatch: pytest.MonkeyPatch):
    import build_ext

    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert build_ext.cuda_arches() == ["7.5", "8.0", "9.0+PTX"]
    assert build_ext.arch_flags(["8.0", "9.0+PTX"])[1::2] == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90,code=sm_90",
        "arch=compute_90,code=compute_90",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a")
    assert build_ext.cuda_arches() == ["8.6", "9.0a"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.0f;12.0+PTX")
    assert build_ext.cuda_arches() == ["10.0f", "12.0+PTX"]
    assert build_ext.arch_flags(build_ext.cuda_arches())[1::2] == [
        "arch=compute_100f,code=sm_100f",
        "arch=compute_120,code=sm_120",
        "arch=compute_120,code=compute_120",
    ]
    for wrong in ("90", "9.0x", "9.0af", "9.0+ptx"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wrong)
        with pytest.raises(build_ext.Missing, match="is no architecture"):
            build_ext.cuda_arches()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(build_ext.Missing, match="'Hopper' is no architecture"):
        build_ext.cuda_arches()


@in_checkout
@pytest.mark.extension
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler")
def test_cpu_library_builds(tmp_path: Path):
    copy_sources(tmp_path)
    result = build(tmp_path, CUDA_HOME="/no/such/folder", FORCE_CUDA="0")
    assert result.returncode == 0, result.stderr
    for library in ("_ms_deform_attn_cpu", "_winograd_cpu", "_outer_products_cpu"):
        assert len(list((tmp_path / "detr_family" / "layers").glob(f"{library}*.so"))) == 1
    code = (
        "from detr_family.layers import deformable_attention_ops as o, outer_products as p, winograd as w; "
        "print(o.library_file('cpu'), w.library_file(), p.library_file(), o.cpu_instructions())"
    )
    used = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    *files, instructions = used.stdout.split()
    assert all(file.startswith(str(tmp_path)) for file in files) and instructions in ("generic", "avx2", "avx512")


@in_checkout
@pytest.mark.extension
@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()), reason="no CUDA toolkit")
def test_cuda_library_builds_and_loads_without_a_driver(tmp_path: Path):
    copy_sources(tmp_path)
    result = build(tmp_path, FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
    assert result.returncode == 0, result.stderr
    code = "from detr_family.layers import deformable_attention_ops as o; print(o._loaded['cuda'][1], o.cuda_arches())"
    used = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert used.stdout.split() == ["['9.0']"]


@pytest.mark.extension
@pytest.mark.skipif(ops.library_file("cuda") is None, reason="the CUDA library is not built")
def test_cuda_library_is_loaded_and_registered():
    with ops.cuda_variants("combine", "heads"):
        assert ops._choose_variants(["heads"]) == ["combine", "heads"]
    for name in ("forward", "backward", "fused_forward", "fused_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"detr_family::ms_deform_attn_{name}", "CUDA")
    assert ops.cuda_arches()


@pytest.mark.extension
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm of binutils")
@pytest.mark.parametrize("kind", [*ops.LIBRARIES, "winograd", "outer products"])
def test_a_library_asks_torch_for_its_stable_abi_and_python_for_nothing(kind: str):
    """So that it serves any Python, and torch 2.10 and later, whichever it was built beside."""
    others = {"winograd": winograd, "outer products": outer_products}
    file = others[kind].library_file() if kind in others else ops.library_file(kind)
    if file is None:
        pytest.skip(f"the {kind} library is not built")
    listed = subprocess.run(["nm", "-D", "--undefined-only", file], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    of_torch = [name for name in names if "torch" in name or "c10" in name or name.startswith("_ZN2at")]
    assert of_torch and all(name.startswith(("aoti_torch_", "torch_")) for name in of_torch), of_torch
    assert not [name for name in names if name.startswith(("Py", "_Py"))]


def test_variants_of_the_cuda_kernels(monkeypatch: pytest.MonkeyPatch):
    """Taken inside, and those before again after it, whatever happens there."""
    taken = [1]

    def choose(bits: int) -> int:
        taken.append(bits)
        return taken[-2]

    monkeypatch.setitem(ops._loaded, "cuda", (SimpleNamespace(detr_family_cuda_variants=choose), ""))
    with ops.cuda_variants("heads"):
        assert taken[-1] == 2
        with pytest.raises(RuntimeError, match="inside"), ops.cuda_variants("heads", "combine"):
            assert taken[-1] == 3
            raise RuntimeError("inside")
        assert taken[-1] == 2
    assert taken[-1] == 1
    with pytest.raises(ValueError, match="no variant 'tile'; there are combine, heads"), ops.cuda_variants("tile"):
        pass
    monkeypatch.setitem(ops._loaded, "cuda", (None, "was not built"))
    with ops.cuda_variants():
        pass
    with pytest.raises(ValueError, match="no variant 'combine' without a cuda library of this version"):
        ops._choose_variants(["combine"])


def test_collect_env():
    lines = collect_env.collect_env()
    assert lines["torch"].startswith(torch.__version__)
    assert "ms_deform_attn on CPU" in lines and "ms_deform_attn on CUDA" in lines and "detectron2" in lines
    native = winograd.library_file() is not None
    assert lines["3x3 convolutions on CPU"].startswith(
        "Winograd's in C++" if native else "without Winograd's in C++: the winograd"
    )
    native = outer_products.library_file() is not None
    assert lines["gradients of weights on CPU"].startswith(
        "in C++, too" if native else "torch's alone: the outer products"
    )
    native = ops.library_file("cpu") is not None
    assert lines["path taken on cpu"].startswith("native" if native else "pure torch, slow: the cpu library")
