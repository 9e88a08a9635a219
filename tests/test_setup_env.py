"""The set-up (tools/setup_env.py) and the choice of Detectron2 (tools/install_detectron2.py).

The scripts run as a user runs them, in small real environments. In place of the network stand commands named `uv` and
`git` that note how they were called; that `uv` leaves what the real one would leave.
"""

import ast
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"

# A stand-in for uv. FAKE_UV="VERB when WORD": what it does where WORD is among its arguments.
FAKE_UV = """#!{python}
import os, signal, subprocess, sys
from pathlib import Path

arguments = sys.argv[1:]
with open("{log}", "a") as file:
    print(*arguments, file=file)
behaviour, _, when = os.environ.get("FAKE_UV", "").partition(" when ")
if when not in " ".join(arguments):
    behaviour = ""
if arguments[0] == "venv":
    sys.exit(subprocess.call(["{python}", "-m", "venv", "--without-pip", "--clear", arguments[-1]]))
prefix = Path(arguments[arguments.index("--python") + 1]).parents[1]
site = next(prefix.glob("lib/python*/site-packages"))

def package(name, version, text="", folder=site):
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "__init__.py").write_text(text)
    info = folder / f"{{name}}-{{version}}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {{name}}\\nVersion: {{version}}\\n")
    (info / "RECORD").write_text(f"{{name}}/__init__.py,,{{len(text)}}\\n")
    return folder / name

def detectron2(folder=site):
    made = package("detectron2", "0.7.2", "__version__ = '0.7.2'", folder)
    for name in ("config", "modeling", "data", "engine", "evaluation"):
        (made / f"{{name}}.py").write_text("")

if behaviour == "fail":
    sys.exit("error: failed to resolve the name of the index")
if "build.txt" in " ".join(arguments):
    for path in {packing}:  # what repacks the republication
        (site / Path(path).name).exists() or (site / Path(path).name).symlink_to(path)
if "--target" in arguments:
    tree = Path(arguments[arguments.index("--target") + 1])
    detectron2(tree)
    (tree / "detectron2" / "_C.cpython-310-x86_64-linux-gnu.so").write_text("compiled")
    (tree / "tools").mkdir()
    (tree / "detectron2-0.7.2.dist-info").rename(tree / "sal_detectron2-0.7.2.dist-info")
    (tree / "sal_detectron2-0.7.2.dist-info" / "LICENSE").write_text("Apache License")
    listing = Path(arguments[-1]).read_text()
    digest = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
    sys.exit(listing != f"sal-detectron2==0.7.2 --hash=sha256:{{digest}}\\n")
if arguments[-1].startswith("git+"):
    detectron2()
elif arguments[-1].endswith(".whl"):
    subprocess.check_call(["{python}", "-m", "zipfile", "-e", arguments[-1], str(site)])
elif "-e" in arguments:
    package("detr_family", "0.1.0")
elif "torch" in arguments:
    package("torch", "2.12.1", "def tensor(x): return x")
    if behaviour == "be killed":
        (site / "torch" / "__init__.py").write_text("def ten")
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    package("torchvision", "0.27.1", "class ops:\\n    def nms(*a): pass")
    package("fvcore", "0.1")
"""
FAKE_SETUP = """
import os, pathlib, shutil, sys
if shutil.which("c++"):
    pathlib.Path("detr_family/layers/op.abi3.so").write_text("built")
"""


def write(path: Path, text: str, executable: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if executable:
        path.chmod(0o755)
    return path


class Clone:
    """A copy of this folder as far as the set-up needs it, with fakes on PATH, and the calls that they got."""

    def __init__(self, folder: Path):
        self.root, self.path, self.log = folder / "a clone", folder / "bin", folder / "calls"
        for name in ("tools", "requirements"):
            shutil.copytree(ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "Makefile", "build_ext.py"):
            shutil.copy(ROOT / name, self.root / name)
        write(self.root / "setup.py", FAKE_SETUP)
        write(self.root / "detr_family" / "layers" / "csrc" / "cpu.cpp", "// one")
        packing = [str(Path(importlib.util.find_spec(name).origin).parent) for name in ("wheel", "packaging")]
        fake = FAKE_UV.format(python=sys.executable, log=self.log, packing=packing)
        write(self.path / "uv", fake, executable=True)
        self.command("git", "exit 128")
        self.variables = {"PATH": str(self.path), "HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}

    def command(self, name: str, script: str = "exit 0") -> Path:
        return write(self.path / name, f'#!/bin/sh\necho {name} "$@" >> "{self.log}"\n{script}\n', executable=True)

    def calls(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines

    def run(self, *command: object, **variables: str) -> subprocess.CompletedProcess:
        environment = {**self.variables, **variables}
        return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=300)

    def set_up(self, *arguments: str, before: str = "", **variables: str) -> subprocess.CompletedProcess:
        code = f"import sys; sys.path.insert(0, {str(self.root / 'tools')!r}); import setup_env\n{before}\n"
        code += f"sys.argv[1:] = {list(arguments)!r}; sys.exit(setup_env.main())"
        return self.run(sys.executable, "-c", code, **variables)

    @property
    def site(self) -> Path:
        return next((self.root / ".venv").glob("lib/python*/site-packages"))


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


COMPLETE = "Environment: .venv is complete.\n"


def test_first_try_and_repeat(clone: Clone):
    result = clone.set_up()
    assert result.returncode == 0, result.stderr + result.stdout
    calls = clone.calls()
    assert [call.split()[0] for call in calls] == ["venv", "pip", "pip", "pip", "pip", "pip"]
    assert "torch torchvision" in calls[1] and f"-c {clone.root}/requirements/constraints.txt" in calls[1]
    assert "torch==2.12.1\n" in (clone.root / "requirements" / "constraints.txt").read_text()
    assert "--no-deps --no-build-isolation -e" in calls[-1]
    assert "not from its repository: there is no C++ compiler" in result.stdout
    repeat = clone.set_up()
    assert (repeat.returncode, repeat.stdout, clone.calls()) == (0, COMPLETE, [])


def test_what_changes_is_noticed(clone: Clone):
    assert clone.set_up().returncode == 0
    clone.command("c++")  # a compiler that was not there before
    assert clone.set_up().stdout != COMPLETE
    assert (clone.root / "detr_family" / "layers" / "op.abi3.so").exists()
    assert clone.set_up().stdout == COMPLETE
    for path in ("detr_family/layers/csrc/cpu.cpp", "requirements/constraints.txt"):
        write(clone.root / path, (clone.root / path).read_text() + "\n")
        result = clone.set_up()
        assert "Detectron2: taken as it already is: 0.7.2" in result.stdout
        assert clone.set_up().stdout == COMPLETE
    shutil.rmtree(clone.site / "fvcore")
    assert clone.set_up().stdout != COMPLETE
    (clone.root / "detr_family" / "layers" / "op.abi3.so").unlink()
    assert clone.set_up().stdout != COMPLETE


def test_an_extra_is_added_and_stays(clone: Clone):
    assert clone.set_up().returncode == 0
    clone.calls()
    assert clone.set_up("--extras", "parity").returncode == 0
    assert "parity.txt" in clone.calls()[0]
    assert clone.set_up().stdout == COMPLETE
    assert clone.set_up("--extras", "parity").stdout == COMPLETE
    result = clone.set_up("--extras", "nonsense")
    assert result.returncode == 1
    assert "no extra named 'nonsense'" in result.stderr and "Traceback" not in result.stderr


def test_a_failure_is_in_uvs_words_and_the_next_try_goes_on(clone: Clone):
    result = clone.set_up(FAKE_UV="fail when torchvision")
    assert result.returncode == 1
    assert "failed to resolve the name of the index" in result.stderr
    assert "set-up stopped. Installing the packages failed" in result.stderr and "Traceback" not in result.stderr
    result = clone.set_up()
    assert result.returncode == 0, result.stderr
    assert "Making .venv" not in result.stdout


def test_a_try_that_was_killed_is_repaired(clone: Clone):
    assert clone.set_up(FAKE_UV="be killed when torchvision").returncode == -9
    assert "def ten" in (clone.site / "torch" / "__init__.py").read_text()
    result = clone.set_up(FAKE_UV="fail when torchvision")
    assert "An earlier try was interrupted; again: torch\n" in result.stdout
    assert not list(clone.site.glob("torch-*.dist-info"))  # so that uv takes it for missing
    assert clone.set_up().returncode == 0


@pytest.mark.parametrize("half", ["no python", "python gone", "moved", "too old"])
def test_a_venv_that_cannot_be_used_is_made_again(clone: Clone, half: str):
    if half == "no python":
        write(clone.root / ".venv" / "pyvenv.cfg", "version = 3.11.7\n")
    else:
        assert clone.set_up().returncode == 0
    if half == "python gone":
        (clone.root / ".venv" / "bin" / "python").unlink()
    elif half == "moved":
        clone.root = clone.root.rename(clone.root.with_name("moved"))
    elif half == "too old":
        write(clone.root / ".venv" / "bin" / "old", "#!/bin/sh\necho 3 9 1\n", executable=True).replace(
            clone.root / ".venv" / "bin" / "python"
        )
    result = clone.set_up()
    assert result.returncode == 0, result.stderr
    why = {"moved": "in another folder", "too old": "has Python 3.9.1"}.get(half, "does not start")
    assert "Making .venv with Python 3." in result.stdout and why in result.stdout
    assert clone.set_up().stdout == COMPLETE


def test_the_python_that_is_named_is_used(clone: Clone):
    assert clone.set_up().returncode == 0
    other = "setup_env.sys.version_info = (3, 99, 0)"
    assert clone.set_up(before=other).stdout == COMPLETE
    result = clone.set_up("--exact-python", before=other)
    assert "Making .venv with Python 3.99.0 again: the one here has Python 3." in result.stdout


def test_without_uv_pip_brings_the_pinned_one(clone: Clone):
    uv = (clone.path / "uv").rename(clone.path.with_name("uv"))
    pip = f"import shutil, sys\nopen({str(clone.log)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
    pip += f"shutil.copy({str(uv)!r}, sys.prefix + '/bin/uv')\n"
    modules = clone.path.with_name("modules")
    write(modules / "pip" / "__main__.py", pip)
    write(modules / "pip" / "_internal" / "cli" / "main.py", "")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(clone.root / ".venv")], check=True)
    result = clone.set_up(PYTHONPATH=str(modules))
    assert result.returncode == 0, result.stderr + result.stdout
    assert clone.calls()[0].startswith("install -q --retries 2 uv -c")
    assert "\nuv==" in (ROOT / "requirements" / "constraints.txt").read_text()


def test_an_old_python_can_read_the_script_and_is_named(clone: Clone):
    ast.parse((TOOLS / "setup_env.py").read_text(), feature_version=(3, 6))
    old = "setup_env.sys.version_info = (3, 8, 1, 'final', 0)"
    result = clone.set_up(before=old)
    assert result.returncode == 1
    assert "Python 3.8.1 is too old: detr_family needs Python 3.10 or newer." in result.stderr
    assert "PYTHON=" in result.stderr and "Traceback" not in result.stderr
    assert not (clone.root / ".venv").exists()
    clone.command("python3.12")
    assert "Try again with PYTHON=python3.12" in clone.set_up(before=old).stderr


def test_make_says_when_there_is_no_such_python(clone: Clone):
    make = shutil.which("make")
    if make is None:
        pytest.skip("there is no make")
    command = [make, "-C", str(clone.root), "test", "PYTHON=python3.999"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert "There is no python3.999 on PATH" in result.stderr


# ---------------------------------------------------------------- Detectron2


@pytest.fixture
def bare(clone: Clone) -> Clone:
    """A clone with an environment that has torch (a fake), a compiler and git, and no Detectron2."""
    clone.python = clone.root / ".venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(clone.root / ".venv")], check=True)
    write(clone.site / "torch.py", "")
    clone.command("c++")
    return clone


def install(bare: Clone, before: str = "", **variables: str) -> subprocess.CompletedProcess:
    code = f"import sys; sys.path.insert(0, {str(bare.root / 'tools')!r}); import install_detectron2 as module\n"
    return bare.run(bare.python, "-c", f"{code}{before}\nmodule.main()", **variables)


@pytest.mark.parametrize("init, status", [("", 0), ("import nothing_of_that_name", 1)])
def test_an_existing_detectron2_is_left_as_it_is(bare: Clone, init: str, status: int):
    for name in ("__init__", "config", "modeling", "data", "engine"):
        write(bare.site / "detectron2" / f"{name}.py", f"{init}\n__version__ = '0.6'\n")
    result = install(bare)
    assert result.returncode == status
    expected = "does not import, and is left as it is: ModuleNotFoundError" if status else "taken as it already is: 0.6"
    assert expected in result.stdout + result.stderr
    assert bare.calls() == [] and (bare.site / "detectron2" / "config.py").exists()


def test_a_reachable_repository_is_built_at_the_pinned_commit(bare: Clone):
    bare.command("git")
    result = install(bare)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1 and "at commit e0ec4e189d43" in result.stdout
    source = "git+https://github.com/facebookresearch/detectron2.git@e0ec4e189d438848521aee7926f9900e114229f5"
    assert bare.calls()[-1].endswith(f"--no-build-isolation --no-deps {source}")


@pytest.mark.parametrize(
    "reason", ["C++ compiler", "no git", "cannot be reached", "did not answer", "building it failed"]
)
def test_else_the_python_part_of_the_republication_is_taken(bare: Clone, reason: str):
    if reason in ("C++ compiler", "no git"):
        (bare.path / {"C++ compiler": "c++", "no git": "git"}[reason]).unlink()
    elif reason == "did not answer":
        bare.command("git", "exec /bin/sleep 600")
    elif reason == "building it failed":
        bare.command("git")
    start = time.time()
    result = install(bare, "module.REACH_SECONDS = 1", FAKE_UV="fail when git+")
    assert time.time() - start < 120
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    assert "sal-detectron2 0.7.2 from PyPI, sha256 as pinned" in result.stdout and reason in result.stdout
    assert not list(bare.site.rglob("_C*")) and not (bare.site / "tools").exists()
    (found,) = importlib.metadata.distributions(name="detectron2", path=[str(bare.site)])
    assert (found.version, found.metadata["License"]) == ("0.7.2", "Apache-2.0")
    assert found.read_text("licenses/LICENSE") or found.read_text("LICENSE") == "Apache License"
    assert "iopath" in (found.requires or [])
    assert all((bare.site / path).is_file() for path in found.files or [])


@pytest.mark.parametrize("what", ["--require-hashes", "run.txt"])
def test_what_cannot_be_had_is_said(bare: Clone, what: str):
    result = install(bare, FAKE_UV=f"fail when {what}")
    assert result.returncode == 1 and result.stdout == ""
    assert "Detectron2 is not installed" in result.stderr and "Traceback" not in result.stderr
    assert not (bare.site / "detectron2").exists()


@pytest.mark.slow
def test_a_real_environment_from_nothing(tmp_path: Path):
    """The whole set-up in a folder with a space in its name, without nvcc; then again, at once."""
    root = tmp_path / "fresh clone"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    environment = dict(os.environ, CUDA_HOME=str(tmp_path))
    environment.pop("PYTHONPATH", None)
    command = ["make", "setup", f"PYTHON={getattr(sys, '_base_executable', sys.executable)}"]
    try:
        result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        if "Failed to fetch" in result.stderr or "NewConnectionError" in result.stderr:
            pytest.skip("needs a package index")
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        assert result.stdout.count("Detectron2: ") == 1
        start = time.time()
        repeat = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
        assert time.time() - start < 5
        assert repeat.stdout == COMPLETE
    finally:
        shutil.rmtree(root, ignore_errors=True)  # some GB
