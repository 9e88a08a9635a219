"""Make or complete `.venv`, this folder's working environment, with uv.

    python3 tools/setup_env.py                   what `make` does first
    python3 tools/setup_env.py --extras parity   also install requirements/parity.txt

A complete .venv has a file .setup.json with a hash of all that it depends on, so that a repeat with nothing changed
ends at once. Else each step looks for itself at what is left to do: uv at the packages, build_ext.py at the libraries.
It runs under the system's Python, back to 3.6, to be able to say that this one is too old: hence quoted annotations.
"""

import argparse
import csv
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STATE = VENV / ".setup.json"
CONSTRAINTS = ROOT / "requirements" / "constraints.txt"
OPERATOR = ROOT / "detr_family" / "layers"
CHECK = """
import torch, torchvision, detectron2.modeling, detectron2.engine, detectron2.evaluation, detr_family
torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
"""


def run(what: str, *command: object) -> None:
    """Run a command, its output as it is; ends the program where it fails."""
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", UV_PYTHON_DOWNLOADS="never")
    if subprocess.call([*map(str, command)], cwd=str(ROOT), env=environment) != 0:
        sys.exit(f"\nset-up stopped. {what} failed, see above. What is done stays; the same command goes on from here.")


def requirements(extras: "list[str]") -> "list[Path]":
    """The files of what .venv shall hold; ends the program for an extra that there is not."""
    for name in extras:
        if not (ROOT / "requirements" / f"{name}.txt").is_file():
            sys.exit(f"\nset-up stopped. There is no extra named {name!r}: no file requirements/{name}.txt")
    return [ROOT / "requirements" / f"{name}.txt" for name in ["build", "run", "dev", *extras]]


def digest(extras: "list[str]") -> str:
    """A hash of all that a complete .venv depends on."""
    variables = ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "NVCC_FLAGS")
    found = [shutil.which(name) for name in ("c++", "g++", "clang++", "nvcc")] + [*map(os.environ.get, variables)]
    files = [CONSTRAINTS, *requirements(extras), *sorted(OPERATOR.glob("csrc/*")), Path(__file__)]
    files += [ROOT / name for name in ("tools/install_detectron2.py", "setup.py", "build_ext.py", "pyproject.toml")]
    contents = [(str(path), path.read_text(encoding="utf-8")) for path in files if path.is_file()]
    return hashlib.sha256(json.dumps([found, contents]).encode()).hexdigest()


def read_state() -> "dict":
    """What the last try has written, if it came to its end."""
    try:
        return dict(json.loads(STATE.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {"folder": str(ROOT), "digest": "", "extras": [], "there": []}


def why_make_venv(exact_python: bool) -> "str | None":
    """Why .venv has to be made anew, None where the one that is there can be completed."""
    if not os.path.lexists(str(VENV)):
        return ""
    try:
        code = "import sys; print('%d %d %d' % sys.version_info[:3])"
        version = tuple(map(int, subprocess.check_output([str(PYTHON), "-I", "-S", "-c", code]).split()))
    except (OSError, subprocess.CalledProcessError):
        return " again: the Python of the one here does not start"
    if version < (3, 10) or (exact_python and version[:2] != tuple(sys.version_info[:2])):
        return " again: the one here has Python {}.{}.{}".format(*version)
    return None if read_state()["folder"] == str(ROOT) else " again: the one here was made in another folder"


def is_complete(extras: "list[str]", exact_python: bool) -> bool:
    """Whether nothing is left to do."""
    state = read_state()
    done = set(extras) <= set(state["extras"]) and state["digest"] == digest(state["extras"])
    return done and all(map(os.path.exists, state["there"])) and why_make_venv(exact_python) is None


def make_venv(why: str) -> None:
    """Make .venv with the Python that runs this; ends the program where that is too old."""
    version = "{}.{}.{}".format(*sys.version_info)
    if sys.version_info < (3, 10):  # noqa: UP036 - older ones read this file to say so
        newer = [name for name in map("python3.{}".format, range(13, 9, -1)) if shutil.which(name)]
        hint = f"Try again with PYTHON={newer[0]}" if newer else "Install one and name it, as in PYTHON=python3.12"
        sys.exit(f"\nset-up stopped. Python {version} is too old: detr_family needs Python 3.10 or newer. {hint}")
    print(f"Making .venv with Python {version}{why}", flush=True)
    uv = shutil.which("uv")
    own, new = [uv, "venv", "--quiet", "--clear", "--python", sys.executable], [sys.executable, "-m", "venv", "--clear"]
    run("Making .venv", *(own if uv else new), VENV)


def find_uv() -> str:
    """The path of uv: on PATH, else in .venv, where pip puts it first if it is not there."""
    uv = shutil.which("uv") or shutil.which(str(VENV / "bin" / "uv"))
    if uv is None:
        print("Installing uv, which installs the rest", flush=True)
        if subprocess.call([str(PYTHON), "-c", "import pip._internal.cli.main"], stderr=subprocess.DEVNULL) != 0:
            run("Installing pip", PYTHON, "-m", "ensurepip", "--upgrade")  # making .venv was interrupted
        run("Installing uv", PYTHON, "-m", "pip", "install", "-q", "--retries", "2", "uv", "-c", CONSTRAINTS)
    return uv or str(VENV / "bin" / "uv")


def remove_halves(site: Path) -> None:
    """Make uv install again what an interrupted try left half copied: files missing or of another size."""
    for folder in site.glob("*.dist-info"):
        try:
            with open(str(folder / "RECORD"), encoding="utf-8", newline="") as file:
                whole = all(not size or (site / name).stat().st_size == int(size) for name, _, size in csv.reader(file))
        except (OSError, ValueError):
            whole = False
        if not whole:
            print("An earlier try was interrupted; again: " + folder.name.split("-")[0])
            shutil.rmtree(str(folder))
    if not list(site.glob("detectron2-*.dist-info")):
        shutil.rmtree(str(site / "detectron2"), ignore_errors=True)


def set_up(extras: "list[str]", exact_python: bool) -> None:
    """Do what is left to do; ends the program where something is missing."""
    start = time.time()
    why = why_make_venv(exact_python)
    if why is not None:
        make_venv(why)
    site = next(VENV.glob("lib/python*/site-packages"))
    extras = sorted({*extras, *read_state()["extras"]})
    if STATE.exists():
        STATE.unlink()
    else:
        remove_halves(site)
    uv = find_uv()
    install = [uv, "pip", "install", "--python", PYTHON, "-c", CONSTRAINTS, "--build-constraints", CONSTRAINTS]
    files = [word for path in requirements(extras) for word in ("-r", path)]
    run("Installing the packages", *install, "torch", "torchvision", *files)
    run("Installing Detectron2", PYTHON, ROOT / "tools" / "install_detectron2.py", "--uv", uv)
    print("Building the native libraries, about a minute where there is a compiler and something changed", flush=True)
    run("Building the native libraries", PYTHON, "setup.py", "-q", "build_ext", "--inplace", "-j", "2")
    run("Installing detr_family", *install, "-q", "--no-deps", "--no-build-isolation", "-e", ROOT)
    run("Importing what was installed", PYTHON, "-c", CHECK)
    there = [site / name / "__init__.py" for name in ("torch", "torchvision", "fvcore", "detectron2")]
    there += OPERATOR.glob("*.so")
    state = {"folder": str(ROOT), "digest": digest(extras), "extras": extras, "there": [*map(str, there)]}
    STATE.write_text(json.dumps(state), encoding="utf-8")
    print(f"Environment: .venv is complete ({time.time() - start:.0f} s).")


def main() -> None:
    """Parse the command line, run the set-up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--extras", default="", help="further sets of packages: names of requirements/NAME.txt")
    parser.add_argument("--exact-python", action="store_true", help="make .venv anew where its Python is another")
    options = parser.parse_args()
    extras = options.extras.replace(",", " ").split()
    try:
        with open(__file__, encoding="utf-8") as lock:
            if not is_complete(extras, options.exact_python):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    print("Another set-up is at work in this folder; waiting for it to end.", flush=True)
                    fcntl.flock(lock, fcntl.LOCK_EX)
            if is_complete(extras, options.exact_python):
                print("Environment: .venv is complete.")
            else:
                set_up(extras, options.exact_python)
    except KeyboardInterrupt:
        print("\nset-up interrupted; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
