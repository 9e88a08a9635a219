"""The set-up (tools/setup_env.py) and the choice of Detectron2 (tools/install_detectron2.py).

The scripts run as a user runs them, in small real environments. In place of the network stand a package named
`pip` that notes how it was called and leaves what the real one would leave, and a command named `git`.
"""

import ast
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
DETECTRON2_MODULES = ("config", "modeling", "data", "engine", "evaluation")


def load(name):
    sys.path.insert(0, str(TOOLS))
    try:
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(TOOLS))


setup_env = load("setup_env")
install_detectron2 = load("install_detectron2")

NO_NETWORK = (
    "WARNING: Retrying after connection broken by 'NewConnectionError(\"HTTPSConnection(host='index.example')"
    ": [Errno -2] Name or service not known\")': https://user:secret@index.example/simple/torch/\n"
    "ERROR: Could not find a version that satisfies the requirement torch (from versions: none)\n"
    "ERROR: No matching distribution found for torch"
)

# A stand-in for pip: notes its arguments in $FAKE_PIP_LOG, then does what the first word of $FAKE_PIP says.
FAKE_PIP = f'''
import json, os, shutil, signal, sys, sysconfig
from pathlib import Path

arguments = sys.argv[1:]
if arguments[-1] == "wheel":  # only to see whether the index can be reached
    offline = os.environ.get("FAKE_PIP") == "offline"
    print({NO_NETWORK!r} if offline else "Saved wheel")
    sys.exit(offline)
with open(os.environ["FAKE_PIP_LOG"], "a") as file:
    held = [Path(arguments[i + 1]).read_text() for i, a in enumerate(arguments) if a == "-c"]
    file.write(json.dumps({{"arguments": arguments, "constraints": "".join(held)}}) + "\\n")
site = Path(sysconfig.get_paths()["purelib"])
behaviour, _, when = os.environ.get("FAKE_PIP", "").partition(" when ")
if when not in " ".join(arguments):
    behaviour = ""

def package(name, version, text="", record=True):
    (site / name).mkdir(exist_ok=True)
    (site / name / "__init__.py").write_text(text)
    info = site / f"{{name}}-{{version}}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {{name}}\\nVersion: {{version}}\\n")
    if record:
        (info / "RECORD").write_text(f"{{name}}/__init__.py,,{{len(text)}}\\n")

if behaviour == "offline":
    print({NO_NETWORK!r})
    sys.exit(1)
if behaviour == "other hash":
    print("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.")
    sys.exit(1)
if behaviour == "killed":
    package("torch", "2.12.1", "broken = ", record=False)
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
text = " ".join(arguments)
if "git+" in text:
    package("detectron2", "0.6")
    if behaviour == "build fails":
        print("  error: command 'c++' failed with exit code 1")
        sys.exit(1)
    for name in {DETECTRON2_MODULES!r}:
        (site / "detectron2" / f"{{name}}.py").write_text("")
elif " download " in f" {{text}} ":
    shutil.copy(os.environ["FAKE_WHEEL"], arguments[arguments.index("--dest") + 1])
elif "build.txt" in text:
    package("setuptools", "81.0.0")
elif "torchvision" in arguments:
    package("torch", "2.12.1", "__version__ = '2.12.1'\\ndef tensor(x): return x\\n")
    package("torchvision", "0.27.1", "__version__ = '0.27.1'\\nclass ops:\\n    def nms(*a): pass\\n")
elif "run.txt" in text:
    package("fvcore", "0.1")
elif "-e" in arguments:
    package("detr_family", "0.1.0")
'''


def write(path, text, executable=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if executable:
        path.chmod(0o755)
    return path


def fake_pip(folder):
    write(folder / "pip" / "__init__.py", "__version__ = '26.3'\n")
    write(folder / "pip" / "__main__.py", FAKE_PIP)
    write(folder / "pip-26.3.dist-info" / "METADATA", "Metadata-Version: 2.1\nName: pip\nVersion: 26.3\n")
    write(folder / "pip-26.3.dist-info" / "RECORD", "pip/__init__.py,,\n")


def fake_detectron2(folder, version="0.7.2", init=""):
    write(folder / "detectron2" / "__init__.py", f"{init}\n__version__ = '{version}'\n")
    for name in DETECTRON2_MODULES:
        write(folder / "detectron2" / f"{name}.py", "")


class Environment:
    """An environment with fakes in it, and the calls of pip and git that were made."""

    def __init__(self, folder):
        self.folder = folder
        self.pip_log = folder / "pip.log"
        self.git_log = folder / "git.log"
        self.path = folder / "bin"
        self.path.mkdir(parents=True)
        self.variables = {
            "PATH": str(self.path), "HOME": str(folder), "FAKE_PIP_LOG": str(self.pip_log),
            "TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip

    def command(self, name, script="exit 0"):
        write(self.path / name, f'#!/bin/sh\necho "$@" >> "{self.git_log}"\n{script}\n', executable=True)

    def calls(self):
        lines = self.pip_log.read_text().splitlines() if self.pip_log.exists() else []
        return [json.loads(line) for line in lines]

    def run(self, *command, **variables):
        return subprocess.run(
            [str(part) for part in command],
            env={**self.variables, **variables}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip


# ---------------------------------------------------------------- Detectron2


@pytest.fixture(scope="module")
def bare_venv(tmp_path_factory):
    """A new environment without anything in it, to be copied."""
    prefix = tmp_path_factory.mktemp("template") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True)
    return prefix


@pytest.fixture
def bare(tmp_path, bare_venv):
    """An environment with torch (a fake), a compiler, git and a wheel to download, without Detectron2."""
    environment = Environment(tmp_path / "bare env")
    prefix = environment.folder / "venv"
    shutil.copytree(bare_venv, prefix, symlinks=True)
    environment.python = prefix / "bin" / "python"
    environment.site = next(prefix.glob("lib/python*/site-packages"))
    fake_pip(environment.site)
    write(environment.site / "torch.py", "")
    environment.command("c++")
    environment.command("git")
    source = tmp_path / "wheel"
    fake_detectron2(source)
    write(source / "detectron2" / "_C.cpython-310-x86_64-linux-gnu.so", "compiled")
    write(source / "detectron2" / "model_zoo" / "configs" / "base.yaml", "VERSION: 2\n")
    write(source / "tools" / "__init__.py", "")
    write(source / "sal_detectron2-0.7.2.dist-info" / "LICENSE", "Apache License")
    write(source / "sal_detectron2-0.7.2.dist-info" / "METADATA", "Name: sal-detectron2\n")
    wheel = tmp_path / "sal_detectron2-0.7.2-cp310-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in sorted(source.rglob("*")):
            archive.write(path, path.relative_to(source))
    environment.wheel = wheel
    environment.variables["FAKE_WHEEL"] = str(wheel)
    environment.sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return environment


def run_install(environment, sha256=None, more="", **variables):
    code = (
        f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import install_detectron2 as module\n"
        f"module.SHA256 = {sha256!r} or module.SHA256\n{more}\nsys.exit(module.main())"
    )
    return environment.run(environment.python, "-c", code, **variables)


def pip_list(environment):
    code = "import importlib.metadata as m; d = m.metadata('detectron2'); print(d['Version'], d['License'])"
    return environment.run(environment.python, "-c", code).stdout.strip()


def test_an_existing_detectron2_is_left_as_it_is(bare):
    fake_detectron2(bare.site, version="0.6")
    before = {path: path.read_bytes() for path in bare.site.rglob("*") if path.is_file()}
    result = run_install(bare)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    assert "taken as it already is: 0.6" in result.stdout
    assert bare.calls() == []
    assert not bare.git_log.exists()
    assert {path: path.read_bytes() for path in bare.site.rglob("*") if path.is_file()} == before


def test_an_existing_detectron2_that_does_not_import_is_named_and_left(bare):
    fake_detectron2(bare.site, init="import fvcore")
    result = run_install(bare)
    assert result.returncode == 1
    assert result.stdout == ""
    assert "No module named 'fvcore'" in result.stderr
    assert (bare.site / "detectron2" / "__init__.py").is_file()
    assert bare.calls() == []


def test_a_reachable_repository_is_built_at_the_pinned_commit(bare):
    result = run_install(bare)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    assert "built from its repository at commit e0ec4e189d43" in result.stdout
    (call,) = bare.calls()
    assert call["arguments"][-4:] == [
        "install", "--no-build-isolation", "--no-deps",
        "git+https://github.com/facebookresearch/detectron2.git@e0ec4e189d438848521aee7926f9900e114229f5",
    ]  # fmt: skip
    assert not list(bare.site.glob(".detectron2-*"))


def test_an_unreachable_repository_gives_the_python_part_of_the_wheel(bare):
    bare.command("git", "exit 128")
    result = run_install(bare, bare.sha256)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    assert "sal-detectron2 0.7.2" in result.stdout
    assert "repository cannot be reached" in result.stdout
    (call,) = bare.calls()
    for expected in ("download", "--no-deps", "--only-binary=:all:", "--require-hashes"):
        assert expected in call["arguments"]
    assert (bare.site / "detectron2" / "model_zoo" / "configs" / "base.yaml").is_file()
    assert not list(bare.site.rglob("_C*"))
    assert not (bare.site / "tools").exists()
    assert not list(bare.site.glob(".detectron2-*"))
    assert pip_list(bare) == "0.7.2 Apache-2.0"
    metadata = bare.site / "detectron2-0.7.2.dist-info"
    assert (metadata / "LICENSE").read_text() == "Apache License"
    recorded = {line.split(",")[0] for line in (metadata / "RECORD").read_text().splitlines()}
    present = {
        path.relative_to(bare.site).as_posix()
        for folder in (metadata, bare.site / "detectron2")
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert recorded == present
    assert setup_env.remove_damage(str(bare.site)) == []


def test_the_real_wheel_is_asked_for_by_its_hash(bare):
    bare.command("git", "exit 128")
    keep = "import pathlib, shutil; real = module.Pip.run\n" + (
        "def run(self, *a):\n"
        "    shutil.copy(a[a.index('--requirement') + 1], pathlib.Path.home() / 'asked.txt')\n"
        "    return real(self, *a)\n"
        "module.Pip.run = run"
    )
    run_install(bare, more=keep)
    pinned = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
    assert (bare.folder / "asked.txt").read_text() == f"sal-detectron2==0.7.2 --hash=sha256:{pinned}\n"


@pytest.mark.parametrize("behaviour", ["", "other hash"])
def test_a_wheel_with_another_hash_is_refused(bare, behaviour):
    bare.command("git", "exit 128")
    result = run_install(bare, FAKE_PIP=behaviour)
    assert result.returncode == 1
    assert result.stdout == ""
    assert "sal-detectron2 0.7.2 is refused" in result.stderr
    assert "sha256" in result.stderr
    assert not list(bare.site.glob("*detectron2*"))


@pytest.mark.parametrize("missing, reason", [("c++", "no C++ compiler"), ("git", "no git")])
def test_without_compiler_or_git_the_wheel_is_taken(bare, missing, reason):
    (bare.path / missing).unlink()
    result = run_install(bare, bare.sha256)
    assert result.returncode == 0, result.stderr
    assert reason in result.stdout
    assert (bare.site / "detectron2" / "modeling.py").is_file()
    assert not bare.git_log.exists()


def test_a_build_that_fails_gives_the_wheel_and_leaves_no_half(bare):
    result = run_install(bare, bare.sha256, FAKE_PIP="build fails when git+")
    assert result.returncode == 0, result.stderr
    assert "building it failed (error: command 'c++' failed" in result.stdout
    assert pip_list(bare) == "0.7.2 Apache-2.0"
    assert not list(bare.site.glob(".detectron2-*"))


def test_a_git_that_hangs_is_given_up(bare):
    helper = bare.folder / "helper.pid"
    bare.command("git", f'/bin/sleep 600 &\necho $! > "{helper}"\nwait')
    start = time.time()
    result = run_install(bare, bare.sha256, more="module.REACH_SECONDS = 1")
    assert time.time() - start < 300
    assert result.returncode == 0, result.stderr
    assert "did not answer" in result.stdout
    ps = shutil.which("ps")
    for attempt in range(100 if ps else 0):  # the helper that git had started ends too
        state = bare.run(ps, "-o", "stat=", "-p", helper.read_text().strip()).stdout.strip()
        if state in ("", "Z"):
            break
        assert attempt < 99, "the helper still runs"
        time.sleep(0.1)


def test_without_network_there_is_one_message_without_addresses(bare):
    bare.command("git", "exit 128")
    result = run_install(bare, FAKE_PIP="offline")
    assert result.returncode == 1
    assert result.stdout == ""
    assert "cannot be reached: its name cannot be resolved" in result.stderr
    assert "index.example" not in result.stderr and "secret" not in result.stderr
    assert len(result.stderr.strip().splitlines()) < 8


def test_what_an_interrupted_try_left_is_taken_out(bare):
    bare.command("git", "exit 128")
    write(bare.site / ".detectron2-unfinished", "")
    write(bare.site / ".detectron2-abc" / "detectron2" / "__init__.py", "half")
    write(bare.site / "detectron2" / "__init__.py", "this is half of a file that pip was copying (")
    write(bare.site / "detectron2-0.6.dist-info" / "METADATA", "Name: detectron2\n")
    result = run_install(bare, bare.sha256)
    assert result.returncode == 0, result.stderr
    assert "sal-detectron2" in result.stdout
    left = sorted(path.name for path in bare.site.glob("*detectron2*"))
    assert left == ["detectron2", "detectron2-0.7.2.dist-info"]


def test_an_interruption_while_unpacking_leaves_nothing_importable(bare, monkeypatch):
    real, done = os.rename, []

    def interrupted(source, target):
        if done:
            raise KeyboardInterrupt
        done.append(real(source, target))

    monkeypatch.setattr(install_detectron2.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        install_detectron2.unpack_republication(bare.wheel, bare.site)
    monkeypatch.setattr(install_detectron2.os, "rename", real)
    assert not (bare.site / "detectron2").exists()
    install_detectron2.unpack_republication(bare.wheel, bare.site)
    assert (bare.site / "detectron2" / "__init__.py").is_file()
    assert pip_list(bare) == "0.7.2 Apache-2.0"


def test_torch_has_to_be_there_first(bare):
    (bare.site / "torch.py").unlink()
    result = run_install(bare)
    assert result.returncode == 1
    assert "torch is not installed" in result.stderr


# ---------------------------------------------------------------- the set-up


@pytest.fixture
def clone(tmp_path):
    """A fresh clone in a folder with a space in its name, and a fake pip that its .venv will use."""
    environment = Environment(tmp_path / "a clone")
    environment.root = environment.folder / "detr family"
    for name in ("tools", "requirements"):
        shutil.copytree(ROOT / name, environment.root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, environment.root / name)
    write(environment.root / "detr_family" / "__init__.py", "")
    write(environment.root / "detr_family" / "csrc" / "op.cpp", "// one")
    modules = environment.folder / "modules"
    fake_pip(modules)
    fake_detectron2(modules)
    environment.variables["PYTHONPATH"] = str(modules)
    return environment


def run_setup(environment, *arguments, before="", **variables):
    script = environment.root / "tools" / "setup_env.py"
    code = (
        f"import sys; sys.path.insert(0, {str(script.parent)!r}); import setup_env\n"
        f"setup_env.VENV_COMMAND.append('--without-pip')\n{before}\n"
        f"sys.exit(setup_env.main({list(arguments)!r}))"
    )
    return environment.run(sys.executable, "-c", code, **variables)


def steps_called(environment, since=0):
    marks = {"build.txt": "build", "torchvision": "torch", "run.txt": "packages", "parity.txt": "parity"}
    found = []
    for call in environment.calls()[since:]:
        last = " ".join(call["arguments"]).replace(str(environment.root), "")
        found.append(next((name for mark, name in marks.items() if mark in last), "package"))
        assert found[-1] != "package" or "-e" in call["arguments"]
    return found


def test_first_try_and_repeat(clone):
    result = run_setup(clone)
    assert result.returncode == 0, result.stderr + result.stdout
    assert steps_called(clone) == ["build", "torch", "packages", "package"]
    assert "Detectron2: taken as it already is" in result.stdout
    assert "native operator: not built (there is no C++ compiler)" in result.stdout
    for call in clone.calls()[:3]:
        assert "torch==2.12.1\n" in call["constraints"]  # nothing may move it
    repeat = run_setup(clone)
    assert repeat.returncode == 0
    assert repeat.stdout == "Environment: .venv is complete.\n"
    assert len(clone.calls()) == 4


def test_a_changed_source_repeats_only_the_package(clone):
    assert run_setup(clone).returncode == 0
    write(clone.root / "detr_family" / "csrc" / "op.cpp", "// two")
    assert run_setup(clone).returncode == 0
    assert steps_called(clone, since=4) == ["package"]
    clone.command("c++")  # a compiler that was not there before
    assert run_setup(clone).returncode == 0
    assert steps_called(clone, since=5) == ["package"]
    constraints = clone.root / "requirements" / "constraints.txt"
    constraints.write_text(constraints.read_text().replace("ruff==", "ruff==99."))
    assert run_setup(clone).returncode == 0
    assert steps_called(clone, since=6) == ["build", "packages"]


def test_an_extra_is_added_and_stays(clone):
    assert run_setup(clone).returncode == 0
    assert run_setup(clone, "--extras", "parity").returncode == 0
    assert steps_called(clone, since=4) == ["parity"]
    assert run_setup(clone).stdout == "Environment: .venv is complete.\n"
    assert run_setup(clone, "--extras", "parity").stdout == "Environment: .venv is complete.\n"
    result = run_setup(clone, "--extras", "nonsense")
    assert result.returncode == 1
    assert "no extra named 'nonsense'" in result.stderr


def test_no_network_is_said_once_and_the_next_try_goes_on(clone):
    result = run_setup(clone, FAKE_PIP="offline when torchvision")
    assert result.returncode == 1
    assert "The package index cannot be reached: its name cannot be resolved." in result.stderr
    assert "Tried:" in result.stderr and "Needed:" in result.stderr
    assert len(result.stderr.strip().splitlines()) < 8
    everything = result.stdout + result.stderr + (clone.root / ".venv" / ".setup" / "pip.log").read_text()
    assert "index.example" not in everything and "secret" not in everything
    result = run_setup(clone)
    assert result.returncode == 0, result.stderr
    assert steps_called(clone) == ["build", "torch", "torch", "packages", "package"]


def test_a_first_try_killed_in_pip_is_repaired(clone):
    assert run_setup(clone, FAKE_PIP="killed when torchvision").returncode == -9
    result = run_setup(clone)
    assert result.returncode == 0, result.stderr
    assert "an earlier try was interrupted; again: torch" in result.stdout
    assert steps_called(clone) == ["build", "torch", "torch", "packages", "package"]


@pytest.mark.parametrize("half", ["no python", "no pip", "python gone"])
def test_a_broken_venv_is_made_again(clone, half):
    venv = clone.root / ".venv"
    if half == "no python":
        write(venv / "pyvenv.cfg", "version = 3.11.7\n")
    elif half == "no pip":
        modules = Path(clone.variables.pop("PYTHONPATH"))
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
        code = "import importlib.util as u; print(u.find_spec('pip'))"
        assert clone.run(venv / "bin" / "python", "-c", code).stdout == "None\n"
        result = run_setup(clone)  # still without a pip that it could use
        assert "Making .venv" in result.stdout and "the one here is incomplete" in result.stdout
        clone.variables["PYTHONPATH"] = str(modules)
    else:
        assert run_setup(clone).returncode == 0
        for path in (venv / "bin").glob("python*"):
            path.unlink()
        (venv / "bin" / "python").symlink_to(clone.folder / "removed")
    result = run_setup(clone)
    assert result.returncode == 0, result.stderr
    assert "Making .venv" in result.stdout or half == "no pip"
    assert run_setup(clone).stdout == "Environment: .venv is complete.\n"


def test_a_moved_clone_gets_a_venv_of_its_own(clone):
    assert run_setup(clone).returncode == 0
    clone.root = clone.root.rename(clone.folder / "moved")
    result = run_setup(clone)
    assert result.returncode == 0, result.stderr
    assert "made in another folder" in result.stdout


def test_what_was_uninstalled_is_installed_again(clone):
    assert run_setup(clone).returncode == 0
    shutil.rmtree(next((clone.root / ".venv").glob("lib/python*/site-packages")) / "fvcore")
    assert run_setup(clone).returncode == 0
    assert steps_called(clone, since=4) == ["packages"]


def fake_distribution(site, name, version, text=""):
    write(site / name / "__init__.py", f"__version__ = '{version}'\n{text}")
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    write(site / f"{name}-{version}.dist-info" / "METADATA", metadata)


def own_torch(folder, torch="2.11.0", vision="0.26.0"):
    fake_distribution(folder, "torch", torch, "def tensor(x): return x\n")
    fake_distribution(folder, "torchvision", vision, "class ops:\n    def nms(*a): pass\n")


def test_a_venv_with_a_torch_of_the_users_own_keeps_it(clone):
    venv = clone.root / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    own_torch(next(venv.glob("lib/python*/site-packages")))
    result = run_setup(clone)
    assert result.returncode == 0, result.stderr
    assert "kept as they are: torch 2.11.0, torchvision 0.26.0" in result.stdout
    assert steps_called(clone) == ["build", "packages", "package"]
    assert "torch==2.11.0\n" in clone.calls()[1]["constraints"]
    assert "torch==2.12.1" not in clone.calls()[1]["constraints"]


def test_here_adds_only_what_is_missing(clone, bare):
    own_torch(bare.site)
    (bare.site / "torch.py").unlink()
    fake_detectron2(bare.site)
    script = clone.root / "tools" / "setup_env.py"
    result = bare.run(bare.python, script, "--here")
    assert result.returncode == 0, result.stderr + result.stdout
    assert not (clone.root / ".venv").exists()
    bare.root = clone.root
    assert steps_called(bare) == ["build", "packages", "package"]
    assert "torch==2.11.0\n" in bare.calls()[1]["constraints"]
    assert "dev.txt" not in str(bare.calls())


@pytest.mark.parametrize("torch, vision", [("2.6.0", "0.21.0"), ("2.12.1", "0.26.0")])
def test_here_does_not_touch_a_torch_that_does_not_fit(clone, bare, torch, vision):
    own_torch(bare.site, torch, vision)
    (bare.site / "torch.py").unlink()
    bare.root = clone.root
    result = bare.run(bare.python, clone.root / "tools" / "setup_env.py", "--here")
    assert result.returncode == 1
    assert f"torch {torch} and torchvision {vision}" in result.stderr
    assert "not changed" in result.stderr
    assert steps_called(bare) == ["build"]


# ---------------------------------------------------------------- Python, messages, small parts


def test_an_old_python_can_read_the_script():
    for name in ("setup_env.py",):
        ast.parse((TOOLS / name).read_text(), feature_version=(3, 6))
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse((TOOLS / "setup_env.py").read_text()))
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert imported <= sys.stdlib_module_names


def test_a_python_that_is_too_old_is_named_and_nothing_is_made(clone):
    result = run_setup(clone, before="setup_env.sys.version_info = (3, 8, 1, 'final', 0)")
    assert result.returncode == 1
    assert "Python 3.8.1 is too old: detr_family needs Python 3.10 or newer." in result.stderr
    assert "PYTHON=" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (clone.root / ".venv").exists()
    clone.command("python3.12")
    result = run_setup(clone, before="setup_env.sys.version_info = (3, 8, 1, 'final', 0)")
    assert "PYTHON=python3.12" in result.stderr


def test_a_missing_venv_module_names_the_package_to_install(clone):
    result = run_setup(clone, before="sys.modules['ensurepip'] = None")
    assert result.returncode == 1
    assert f"sudo apt install python3.{sys.version_info[1]}-venv" in result.stderr
    assert not (clone.root / ".venv").exists()


def test_the_python_that_is_named_is_used(clone):
    assert run_setup(clone).returncode == 0
    other = "setup_env.sys.version_info = (3, 99, 0)"
    assert run_setup(clone, before=other).stdout == "Environment: .venv is complete.\n"
    result = run_setup(clone, "--exact-python", before=other)
    assert "Making .venv with Python 3.99.0 again: the one here has Python 3." in result.stdout


@pytest.mark.parametrize(
    "output, expected",
    [
        ("ConnectTimeoutError(...)", "does not answer in time"),
        ("ProxyError('Cannot connect to proxy.')", "the configured proxy does not answer"),
        ("SSLError(SSLCertVerificationError(1, 'CERTIFICATE_VERIFY_FAILED'))", "certificate is not accepted"),
        ("NewConnectionError: [Errno 111] Connection refused", "the connection is refused"),
        ("ERROR: No matching distribution found for torch==2.12.1", "offers no file of torch==2.12.1"),
        ("OSError: [Errno 28] No space left on device", "The disk is full"),
        ("ERROR: Failed building wheel for x", "Failed building wheel for x"),
    ],
)
def test_pip_failures_are_explained(output, expected):
    assert expected in setup_env.explain_pip_failure("torch", output)


def test_addresses_lose_their_hosts():
    text = "Looking in: https://me:key@pip.example:80/simple; HTTPSConnectionPool(host='pip.example', port=1)"
    assert "pip.example" not in setup_env.without_hosts(text)
    assert "key" not in setup_env.without_hosts(text)


@pytest.mark.parametrize(
    "torch, vision, fits",
    [
        ("2.12.1+cu130", "0.27.1+cu130", True),
        ("2.10.0", "0.25.0", True),
        ("2.9.1", "0.24.1", False),
        ("2.12.1", "0.26.0", False),
        ("2.12.1", "", False),
        ("", "", False),
    ],
)
def test_the_torch_pair(torch, vision, fits):
    assert setup_env.torch_pair_fits({"torch": torch, "torchvision": vision}) is fits


def test_damage_is_found_by_the_record(tmp_path):
    fake_distribution(tmp_path, "whole", "1.0")
    write(tmp_path / "whole-1.0.dist-info" / "RECORD", "whole/__init__.py,sha256=x,20\nwhole/a.pyc,,\n")
    fake_distribution(tmp_path, "cut", "1.0")
    write(tmp_path / "cut-1.0.dist-info" / "RECORD", "cut/__init__.py,sha256=x,21\n")
    fake_distribution(tmp_path, "lost", "1.0")
    write(tmp_path / "lost-1.0.dist-info" / "RECORD", "lost/other.py,sha256=x,20\n")
    fake_distribution(tmp_path, "unrecorded", "1.0")
    write(tmp_path / "~ldname" / "x.py", "")
    assert setup_env.remove_damage(str(tmp_path)) == ["cut", "lost", "unrecorded"]
    assert sorted(path.name for path in tmp_path.glob("*-info")) == ["whole-1.0.dist-info"]
    assert not (tmp_path / "~ldname").exists()


def test_make_says_when_there_is_no_such_python(clone):
    make = shutil.which("make")
    if make is None:
        pytest.skip("there is no make")
    result = subprocess.run(
        [make, "-C", str(clone.root), "test", "PYTHON=python3.999"], capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "There is no python3.999 on PATH" in result.stderr


@pytest.mark.slow
def test_a_real_environment_from_nothing(tmp_path):
    """The whole set-up with the real pip, in a folder with a space in its name; then again, at once."""
    root = tmp_path / "fresh clone"
    command = ["git", "ls-files", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    try:
        command = ["make", "setup", f"PYTHON={getattr(sys, '_base_executable', sys.executable)}"]
        result = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if "The package index cannot be reached" in result.stderr:
            pytest.skip("needs a package index: " + result.stderr.strip().splitlines()[0])
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        assert result.stdout.count("Detectron2: ") == 1
        start = time.time()
        repeat = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        assert time.time() - start < 5
        assert repeat.stdout == "Environment: .venv is complete.\n"
        shutil.rmtree(root / ".venv" / "bin")
        repaired = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        assert "the one here is incomplete" in repaired.stdout
    finally:
        shutil.rmtree(root, ignore_errors=True)  # some GB
