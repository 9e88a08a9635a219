"""Install Detectron2 into the environment that runs this script; it is not on PyPI under its name.

    python tools/install_detectron2.py    once torch is there; other packages that it needs are added if missing

1. Where Detectron2 is already there, it stays as it is.
2. Else it is built from its own repository at a pinned commit, where that answers and there is a C++ compiler.
3. Else its Python part comes from a republication on PyPI, refused unless its sha256 is the pinned one. The compiled
   part in it is for another torch and is left out: what needs it (rotated boxes, Detectron2's own deformable
   convolution, the fast COCO evaluation) is not available then.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = "https://github.com/facebookresearch/detectron2.git"
COMMIT = "e0ec4e189d438848521aee7926f9900e114229f5"
REPUBLICATION, VERSION = "sal-detectron2", "0.7.2"
SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
REACH_SECONDS = 20
NEEDS = [Path(__file__).parents[1] / "requirements" / name for name in ("build.txt", "run.txt")]
FIND = """
import importlib.util
if importlib.util.find_spec("detectron2"):
    import detectron2, detectron2.config, detectron2.modeling, detectron2.data, detectron2.engine
    print(getattr(detectron2, "__version__", "of an unknown version"), "in", detectron2.__path__[0])
"""


def find_detectron2() -> str:
    """'version in folder' of the Detectron2 here, '' if there is none; ends the program if it does not import."""
    with tempfile.TemporaryDirectory() as elsewhere:  # so that no folder of that name nearby is taken for it
        result = subprocess.run([sys.executable, "-c", FIND], cwd=elsewhere, capture_output=True, text=True)
    if result.returncode:
        error = (result.stderr.strip().splitlines() or ["no message"])[-1]
        sys.exit(f"Detectron2 is here but does not import, and is left as it is: {error}")
    return result.stdout.strip()


def why_not_from_repository() -> str:
    """Why Detectron2 cannot be built from its repository here, '' where it can."""
    if not any(map(shutil.which, os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"])):
        return "there is no C++ compiler"
    if shutil.which("git") is None:
        return "there is no git"
    environment = dict(os.environ, GIT_TERMINAL_PROMPT="0", GIT_ASKPASS="true")
    command = ["git", "ls-remote", REPOSITORY, "HEAD"]
    try:
        nothing = subprocess.DEVNULL
        if subprocess.call(command, env=environment, stdout=nothing, stderr=nothing, timeout=REACH_SECONDS) != 0:
            return "its repository cannot be reached"
    except subprocess.TimeoutExpired:
        return f"its repository did not answer in {REACH_SECONDS} s"
    return ""


def repack(tree: Path, folder: Path) -> Path:
    """A wheel named detectron2 in `folder`, of the unpacked republication in `tree` without its compiled part."""
    info = folder / "wheel" / f"detectron2-{VERSION}.dist-info"
    shutil.copytree(tree / "detectron2", info.with_name("detectron2"), ignore=shutil.ignore_patterns("_C.*"))
    info.mkdir()
    for licence in tree.glob("*.dist-info/LICENSE*"):
        shutil.copy(licence, info)
    needs = [f"Requires-Dist: {line}\n" for line in NEEDS[1].read_text().splitlines() if not line.startswith("#")]
    header = f"Metadata-Version: 2.1\nName: detectron2\nVersion: {VERSION}\nLicense: Apache-2.0\n"
    summary = f"Summary: Detectron2, the Python part of {REPUBLICATION} {VERSION} from PyPI\n"
    (info / "METADATA").write_text(header + summary + "".join(needs))
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    subprocess.check_output([sys.executable, "-m", "wheel", "pack", str(info.parent), "-d", str(folder)])
    return next(folder.glob("*.whl"))


def install(uv: str | None, *arguments: object) -> bool:
    """Run `pip install ARGUMENTS` in this environment; returns whether that went well."""
    here = [uv, "pip", "install", "--python", sys.executable] if uv else [sys.executable, "-m", "pip", "install"]
    return subprocess.run([*here, "-q", *map(str, arguments)], stdout=sys.stderr).returncode == 0


def main() -> None:
    """Install Detectron2 where it is missing; one line on standard output says from where, and why from there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--uv", help="a uv to install with (default: pip, or the uv on PATH where there is no pip)")
    uv = parser.parse_args().uv or (None if importlib.util.find_spec("pip") else shutil.which("uv"))
    if found := find_detectron2():
        return print(f"Detectron2: taken as it already is: {found}")
    if importlib.util.find_spec("torch") is None:
        sys.exit("Detectron2 needs torch first. `pip install -e .` brings it; `make setup` installs everything.")
    if not install(uv, *(f"-r{path}" for path in NEEDS)):
        sys.exit("Detectron2 is not installed: packages that it needs could not be, for the reason above.")
    reason = why_not_from_repository()
    if not reason:
        print("Building Detectron2 from its repository (some minutes)", file=sys.stderr)
        if install(uv, "--no-build-isolation", "--no-deps", f"git+{REPOSITORY}@{COMMIT}"):
            return print(f"Detectron2: built from its repository at commit {COMMIT[:12]} (there was none here)")
        reason = "building it failed, see above"
    with tempfile.TemporaryDirectory() as name:
        tree, listing = Path(name, "tree"), Path(name, "requirements.txt")
        listing.write_text(f"{REPUBLICATION}=={VERSION} --hash=sha256:{SHA256}\n")
        exact = ["--no-deps", "--only-binary", ":all:", "--python-version", "3.10", "--require-hashes"]
        had = install(uv, "--target", tree, *exact, "-r", listing)
        if not had or not install(uv, "--no-deps", repack(tree, Path(name))):
            sys.exit(f"Detectron2 is not installed: {REPUBLICATION} {VERSION} could not be, for the reason above.")
    if not find_detectron2():
        sys.exit("Detectron2 was installed but this Python does not find it.")
    source = f"the Python part of {REPUBLICATION} {VERSION} from PyPI, sha256 as pinned"
    print(f"Detectron2: {source} (not from its repository: {reason})")


if __name__ == "__main__":
    main()
