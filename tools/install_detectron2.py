"""Install Detectron2 into the environment that runs this script.

    python tools/install_detectron2.py

1. Where Detectron2 is already there, it stays as it is.
2. Else it is built from its own repository at a pinned commit, where that can be reached and there is a C++
   compiler.
3. Else its Python part comes from a republication on PyPI (sal-detectron2), refused unless its sha256 is the
   pinned one. The compiled part in it is for another torch and is left out: what needs it (rotated boxes,
   Detectron2's own deformable convolution, the fast COCO evaluation) is not available then.

One line on standard output says which of the three it was, and why. torch and the packages that Detectron2
imports (requirements/run.txt) have to be there first.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

from setup_env import (
    Pip,
    Progress,
    SetupError,
    explain_pip_failure,
    find_compiler,
    network_reason,
    without_hosts,
)

REPOSITORY = "https://github.com/facebookresearch/detectron2.git"
COMMIT = "e0ec4e189d438848521aee7926f9900e114229f5"
REPUBLICATION, REPUBLISHED_VERSION = "sal-detectron2", "0.7.2"
SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
REACH_SECONDS = 20
TEMPORARY = ".detectron2-"  # what an interrupted try may leave in site-packages starts so
MODULES = tuple(f"detectron2.{name}" for name in ("config", "modeling", "data", "engine", "evaluation"))
REQUIREMENTS = (
    "cloudpickle", "fvcore", "hydra-core>=1.1", "iopath", "matplotlib", "omegaconf>=2.1", "packaging",
    "Pillow>=7.1", "pycocotools>=2.0.2", "tabulate", "tensorboard", "termcolor>=1.1", "tqdm>4.29.0",
    "yacs>=0.1.8",
)  # fmt: skip


def find_detectron2() -> tuple[str, str] | None:
    """(version, folder) of the Detectron2 that this interpreter imports, or None where there is none.

    Raises SetupError where there is one that does not import.
    """
    code = (
        "import importlib.util, json\n"
        "spec = importlib.util.find_spec('detectron2')\n"
        "origin = spec.origin if spec else None\n"
        "print(json.dumps(origin))\n"
        "if origin:\n"
        "    import importlib, detectron2\n"
        f"    for name in {MODULES!r}: importlib.import_module(name)\n"
        "    print(json.dumps(getattr(detectron2, '__version__', 'of an unknown version')))\n"
    )
    with tempfile.TemporaryDirectory() as elsewhere:  # so that no folder of that name nearby is taken for it
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=elsewhere)
    lines = result.stdout.splitlines()
    origin = json.loads(lines[0]) if lines else None
    if result.returncode != 0:
        error = (result.stderr.strip().splitlines() or ["unknown error"])[-1]
        raise SetupError(
            f"The one in {Path(origin).parent if origin else 'this environment'} does not import: {error}\n"
            "  It is left as it is. Where a package is missing: pip install -r requirements/run.txt"
        )
    return (json.loads(lines[-1]), str(Path(origin).parent)) if origin else None


def why_not_from_repository() -> str | None:
    """Why Detectron2 cannot be built from its repository here, None where it can."""
    if find_compiler() is None:
        return "there is no C++ compiler"
    if shutil.which("git") is None:
        return "there is no git"
    environment = dict(os.environ, GIT_TERMINAL_PROMPT="0", GIT_ASKPASS="true")
    nothing = subprocess.DEVNULL
    command = ["git", "ls-remote", REPOSITORY, "HEAD"]
    process = subprocess.Popen(
        command, stdin=nothing, stdout=nothing, stderr=nothing, env=environment, start_new_session=True
    )
    try:
        return None if process.wait(REACH_SECONDS) == 0 else "its repository cannot be reached"
    except subprocess.TimeoutExpired:
        return f"its repository did not answer in {REACH_SECONDS} s"
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # git and the helper that it waits for
            process.wait()


def build_from_repository(pip: Pip, site: Path) -> str | None:
    """Build and install the pinned commit; returns why that failed, None where it did not.

    A mark in site-packages stands while pip is at work: by it `clear_leftovers` knows half of an install.
    """
    mark = site / f"{TEMPORARY}unfinished"
    mark.touch()
    pip.progress.say("      building it from its repository (some minutes)")
    status, output = pip.run("install", "--no-build-isolation", "--no-deps", f"git+{REPOSITORY}@{COMMIT}")
    if status == 0:
        mark.unlink()
        return None
    clear_leftovers(site)
    if network_reason(output) or re.search(r"unable to access|git (?:clone|fetch)\b.* did not run", output):
        return "its repository could not be read"
    errors = [line.strip() for line in output.splitlines() if re.search(r"\b\w*[Ee]rror: ", line)]
    return f"building it failed ({errors[0][:120]})" if errors else "building it failed"


def clear_leftovers(site: Path) -> None:
    """Take out of site-packages what an interrupted try has left."""
    if (site / f"{TEMPORARY}unfinished").exists():
        for path in [site / "detectron2", *site.glob("detectron2-*.dist-info")]:
            shutil.rmtree(path, ignore_errors=True)
    for path in site.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def download_republication(pip: Pip, folder: Path) -> Path:
    """Fetch the republished wheel into a folder. Raises SetupError where it is not the pinned file."""
    name = f"{REPUBLICATION} {REPUBLISHED_VERSION}"
    listing = folder / "requirements.txt"
    listing.write_text(f"{REPUBLICATION}=={REPUBLISHED_VERSION} --hash=sha256:{SHA256}\n")
    status, output = pip.run(
        "download", "--no-deps", "--only-binary=:all:", "--python-version", "3.10", "--require-hashes",
        "--dest", str(folder), "--requirement", str(listing),
    )  # fmt: skip
    if status != 0:
        raise SetupError(explain_pip_failure(name, output, pip.log))
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1 or hashlib.sha256(wheels[0].read_bytes()).hexdigest() != SHA256:
        raise SetupError(f"{name} is refused: the downloaded file has another sha256 than the pinned one.")
    return wheels[0]


def record_line(path: Path, root: Path) -> str:
    """The line of a RECORD for one file."""
    content = path.read_bytes()
    checksum = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{path.relative_to(root).as_posix()},sha256={checksum},{len(content)}\n"


def unpack_republication(wheel: Path, site: Path) -> None:
    """Put the `detectron2` folder of a wheel, without its compiled part, and its licence into site-packages.

    All is prepared in a folder beside and then renamed, the importable folder last: an interruption leaves no
    half of it. pip lists the result as detectron2 and can uninstall it.
    """
    metadata_name = f"detectron2-{REPUBLISHED_VERSION}.dist-info"
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=site) as name:
        temporary = Path(name)
        metadata = temporary / metadata_name
        metadata.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                path = Path(member)
                if path.parts[0] == "detectron2" and not re.match(r"_C\b.*\.(so|pyd)$", path.name):
                    archive.extract(member, temporary)
                elif path.parts[0].endswith(".dist-info") and path.name.startswith("LICENSE"):
                    (metadata / path.name).write_bytes(archive.read(member))
        if not (temporary / "detectron2" / "__init__.py").is_file():
            raise SetupError(f"{wheel.name} is refused: there is no package detectron2 in it.")
        header = [
            "Metadata-Version: 2.1", "Name: detectron2", f"Version: {REPUBLISHED_VERSION}",
            f"Summary: Detectron2, the Python part of {REPUBLICATION} {REPUBLISHED_VERSION} from PyPI",
            "License: Apache-2.0", *(f"Requires-Dist: {requirement}" for requirement in REQUIREMENTS),
        ]  # fmt: skip
        (metadata / "METADATA").write_text("\n".join(header) + "\n")
        (metadata / "INSTALLER").write_text("detr_family tools/install_detectron2.py\n")
        (metadata / "WHEEL").write_text("Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        (metadata / "top_level.txt").write_text("detectron2\n")
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        lines = [record_line(path, temporary) for path in files]
        (metadata / "RECORD").write_text("".join(lines) + f"{metadata_name}/RECORD,,\n")
        if (site / metadata_name).exists():
            shutil.rmtree(site / metadata_name)
        os.rename(metadata, site / metadata_name)
        os.rename(temporary / "detectron2", site / "detectron2")


def install(pip: Pip, site: Path) -> str:
    """Make Detectron2 available; returns the line that says how. Raises SetupError where that fails."""
    clear_leftovers(site)
    found = find_detectron2()
    if found is not None:
        return f"taken as it already is: {found[0]} in {found[1]}"
    if importlib.util.find_spec("torch") is None:
        raise SetupError(
            "It needs torch, and torch is not installed. `make setup` installs everything in order."
        )
    reason = why_not_from_repository()
    if reason is None:
        reason = build_from_repository(pip, site)
    if reason is None:
        line = f"built from its repository at commit {COMMIT[:12]} (there was none here)"
    else:
        with tempfile.TemporaryDirectory() as folder:
            unpack_republication(download_republication(pip, Path(folder)), site)
        line = (
            f"the Python part of {REPUBLICATION} {REPUBLISHED_VERSION} from PyPI, sha256 as pinned "
            f"(not from its repository: {reason})"
        )
    if find_detectron2() is None:
        raise SetupError("It was installed but this Python does not find it.")
    return line


def main() -> int:
    """Install Detectron2 where it is missing; returns the exit status."""
    progress = Progress(sys.stderr)
    site = Path(sysconfig.get_paths()["purelib"])
    root = Path(__file__).resolve().parents[1]
    state = Path(sys.prefix) / ".setup"  # there is one in a .venv that setup_env.py has made
    pip = Pip(sys.executable, progress, str(state / "pip.log") if state.is_dir() else None, str(root))
    try:
        line = install(pip, site)
    except SetupError as error:
        print(f"\nDetectron2 is not installed. {without_hosts(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            clear_leftovers(site)
        return 130
    print(f"Detectron2: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
