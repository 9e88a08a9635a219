"""Make the working environment of this folder: `.venv` with everything that detr_family needs.

    python3 tools/setup_env.py                   make, complete or repair .venv (what `make` does first)
    python3 tools/setup_env.py --extras parity   also install requirements/parity.txt
    python3 tools/setup_env.py --here            install into the environment that runs this script instead

- Every step that is done leaves a stamp in `.venv/.setup`, keyed by what it depends on. A repeat with nothing
  changed reads the stamps and ends; a changed C++ source repeats only the step that builds the package.
- A stamp is written when its step has ended. After an interruption the next try goes on with the step that
  was at work, once packages that pip left half copied have been taken out.
- pip's index, proxy and cache are used as they are configured; no address of theirs is printed or written.

This file runs under the system's Python, whatever its age, so that it can say that it is too old: its syntax
is that of Python 3.6 and it imports nothing outside the standard library.
"""

import argparse
import csv
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from typing import IO, Callable, Dict, List, Optional, Tuple

MINIMUM_PYTHON = (3, 10)
MINIMUM_TORCH = (2, 10)
VENV_COMMAND = ["-m", "venv", "--clear"]
SOURCE_SUFFIXES = (".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".inl")
LIBRARY_SUFFIXES = (".so", ".pyd", ".dylib")
CHECK = """
import torch, torchvision, detectron2.modeling, detectron2.engine, detectron2.evaluation, detr_family
torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
versions = torch.__version__, torchvision.__version__, detectron2.__version__
print("imports work: torch %s, torchvision %s, Detectron2 %s" % versions)
"""


class SetupError(Exception):
    """Something that the user has to know or to provide; the message is all that is shown."""


# ---------------------------------------------------------------- running things, visibly


class Progress:
    """Lines that stay, and on a terminal one line that is rewritten while a long step runs."""

    def __init__(self, stream: Optional[IO[str]] = None) -> None:
        self.stream = sys.stdout if stream is None else stream
        self.terminal = self.stream.isatty()
        self.interval = 1.0 if self.terminal else 15.0
        self._status_shown = False
        self._last = time.time()
        self._lock = threading.RLock()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        with self._lock:
            if self._status_shown:
                self.stream.write("\r\033[K")
                self._status_shown = False
            self.stream.write(text + "\n")
            self.stream.flush()
            self._last = time.time()

    def status(self, text: str) -> None:
        """Show what goes on now: rewritten in place on a terminal, else one line now and then."""
        if time.time() - self._last < self.interval:
            return
        if not self.terminal:
            self.say(text)
            return
        with self._lock:
            width = shutil.get_terminal_size().columns
            self.stream.write("\r\033[K" + text[: width - 1])
            self.stream.flush()
            self._status_shown = True
            self._last = time.time()


def without_hosts(text: str) -> str:
    """The text with the host and the credentials of every address taken out."""
    text = re.sub(r"(\w+://)[^/\s'\"]+", r"\1...", text)
    return re.sub(r"(host=)(['\"])[^'\"]*\2", r"\1...", text)


def interesting(line: str) -> Optional[str]:
    """What of one line of pip's output is worth a line that stays, or None."""
    match = re.match(r"\s*(?:Downloading|Using cached) (\S+) \(([\d.]+) ([MG]B)\)", line)
    if match:
        name, size, unit = match.groups()
        if unit == "GB" or float(size) >= 50:
            return "      {} ({} {})".format(name.split("/")[-1].split("-")[0], size, unit)
    if line.startswith("Installing collected packages:"):
        count = line.count(",") + 1
        return "      unpacking {} package{}".format(count, "" if count == 1 else "s")
    return None


def run_logged(
    command: List[str], progress: Progress, log: Optional[str] = None, **options: object
) -> Tuple[int, str]:
    """Run a command while showing that it works; returns its exit status and its output, free of host names.

    `log` names a file that the output is appended to. Further options go to subprocess.Popen.
    """
    process = subprocess.Popen(  # type: ignore[call-overload]
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
        errors="replace",
        **options,
    )
    lines: List[str] = []
    doing = ["working"]
    ended = threading.Event()
    start = time.time()

    def heartbeat() -> None:
        while not ended.wait(0.5):
            progress.status("      {} ({:.0f} s)".format(doing[0], time.time() - start))

    beat = threading.Thread(target=heartbeat, daemon=True)
    beat.start()
    try:
        for line in process.stdout:
            line = line.rstrip()
            share = re.match(r"Progress (\d+) of (\d+)$", line)
            if share:
                done, size = int(share.group(1)) / 1e6, int(share.group(2)) / 1e6
                doing[0] = re.sub(r":.*", "", doing[0]) + ": {:.0f} of {:.0f} MB".format(done, size)
                continue
            lines.append(without_hosts(line))
            shown = interesting(line)
            if shown is not None:
                progress.say(shown)
            doing[0] = activity(line) or doing[0]
        status = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        ended.set()
        beat.join()
    if log is not None:
        with open(log, "a", encoding="utf-8") as file:
            file.write(
                "\n".join(["$ " + without_hosts(" ".join(command))] + lines + ["exit status %d" % status, ""])
            )
    return status, "\n".join(lines)


def activity(line: str) -> Optional[str]:
    """The few words that say what pip is at, from one line of its output, or None."""
    match = re.match(r"\s*(Collecting|Downloading|Building|Installing|Cloning) .*?([\w.]*)", line)
    if match is None:
        return None
    if match.group(1) == "Downloading":
        return "downloading " + line.split()[1].split("/")[-1].split("-")[0]
    return {
        "Collecting": "looking for packages",
        "Building": "building",
        "Installing": "unpacking",
        "Cloning": "cloning",
    }[match.group(1)]


NETWORK_REASONS = (
    (r"CERTIFICATE_VERIFY_FAILED|SSLError|SSLCertVerificationError", "its certificate is not accepted"),
    (r"ProxyError|Cannot connect to proxy|Tunnel connection failed", "the configured proxy does not answer"),
    (r"NameResolutionError|Name or service not known|name resolution|getaddrinfo|resolve host|nodename nor",
     "its name cannot be resolved"),
    (r"Connection refused", "the connection is refused"),
    (r"Network is unreachable|No route to host", "there is no network"),
    (r"ConnectTimeout|ReadTimeout|[Tt]imed out", "it does not answer in time"),
    (r"NewConnection|[Cc]onnection ?(?:broken|[Ee]rror|aborted|reset)|Max retries exceeded|IncompleteRead",
     "the connection fails"),
)  # fmt: skip


def network_reason(output: str) -> Optional[str]:
    """Why the package index could not be reached, from pip's output; None where something else failed."""
    for pattern, reason in NETWORK_REASONS:
        if re.search(pattern, output):
            return reason
    return None


def explain_pip_failure(what: str, output: str, log: Optional[str] = None) -> str:
    """One message from the output of a pip that failed while it installed `what`."""
    if "DO NOT MATCH THE HASHES" in output:
        return "{} is refused: what the package index holds is not the file with the pinned sha256.".format(
            what
        )
    if "No space left on device" in output:
        return "The disk is full: {} could not be installed. A complete .venv takes about 6 GB.".format(what)
    reason = network_reason(output)
    if reason is not None:
        return (
            "The package index cannot be reached: {reason}.\n"
            "  Tried:  to install {what} with pip, with its settings as they are here.\n"
            "  Needed: a network connection to a Python package index; or pip settings that name a mirror\n"
            "          (PIP_INDEX_URL), a proxy (PIP_PROXY) or a folder of wheels (PIP_FIND_LINKS).\n"
            "  What is already installed stays; the same command goes on from here."
        ).format(reason=reason, what=what)
    missing = re.search(r"No matching distribution found for (\S+)", output)
    if missing:
        return (
            "The package index offers no file of {} for this Python and platform.\n"
            "  Another Python may help (the pinned versions are those for 3.10 to 3.13): PYTHON=..."
        ).format(missing.group(1))
    tail = [line for line in output.splitlines() if line.strip() and "is ignored" not in line][-15:]
    where = "" if log is None else "\n  pip's whole output is in {}".format(log)
    return "pip could not install {}:\n    {}{}".format(what, "\n    ".join(tail), where)


class Pip:
    """pip of one environment, run visibly; where there is no network it gives up quickly."""

    def __init__(
        self, python: str, progress: Progress, log: Optional[str] = None, cwd: Optional[str] = None,
        keep_open: Tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self.python = python
        self.progress = progress
        self.log = log
        self.cwd = cwd
        self.keep_open = keep_open
        self.version: Optional[Tuple[int, ...]] = None
        self._unreachable: Optional[bool] = None

    def run(self, *arguments: str) -> Tuple[int, str]:
        """Run `pip ARGUMENTS`; returns its exit status and output."""
        patience: List[str] = []  # as pip is configured: a slow index may need its time for a large file
        if "--no-index" not in arguments:
            if self._unreachable is None:
                self._unreachable = self._is_unreachable()
            if self._unreachable:  # perhaps all is there already
                patience = ["--timeout", "5", "--retries", "0"]
        return self._call(patience + list(arguments))

    def _is_unreachable(self) -> bool:
        """Whether not even a small file can be fetched, found out quickly."""
        with tempfile.TemporaryDirectory() as folder:
            patience = ["--timeout", "15", "--retries", "1"]
            status, output = self._call(patience + ["download", "--no-deps", "--dest", folder, "wheel"])
        return status != 0 and network_reason(output) is not None

    def _call(self, arguments: List[str]) -> Tuple[int, str]:
        environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_USER="0", PYTHONUNBUFFERED="1")
        environment["PIP_PROGRESS_BAR"] = "raw" if self._find_version() >= (24, 1) else "off"
        environment["PIP_ROOT_USER_ACTION"] = "ignore"
        environment["GIT_TERMINAL_PROMPT"] = "0"
        return run_logged(
            [self.python, "-m", "pip", "--no-input"] + arguments,
            self.progress, self.log, env=environment, cwd=self.cwd, pass_fds=self.keep_open,
        )  # fmt: skip

    def install(self, what: str, *arguments: str) -> None:
        """Run `pip install ARGUMENTS`; raises SetupError with one clear message where that fails."""
        status, output = self.run("install", *arguments)
        if status != 0:
            raise SetupError(explain_pip_failure(what, output, self.log))

    def _find_version(self) -> Tuple[int, ...]:
        if self.version is None:
            command = [self.python, "-c", "import pip; print(pip.__version__)"]
            text = subprocess.check_output(command, universal_newlines=True, cwd=self.cwd)
            self.version = version_tuple(text)
        return self.version


# ---------------------------------------------------------------- Python itself


def version_tuple(text: str) -> Tuple[int, ...]:
    """The leading numbers of a version: '2.12.1+cpu' -> (2, 12, 1)."""
    match = re.match(r"\d+(?:\.\d+)*", text.strip())
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def newer_pythons() -> List[str]:
    """Names on PATH of interpreters that are new enough and start."""
    found = []
    for minor in range(13, MINIMUM_PYTHON[1] - 1, -1):
        name = "python3.{}".format(minor)
        if shutil.which(name) is None:
            continue
        with open(os.devnull, "w") as nothing:
            if subprocess.call([name, "-c", "import venv, ensurepip"], stdout=nothing, stderr=nothing) == 0:
                found.append(name)
    return found


def check_python(version: Tuple[int, ...], find_newer: Callable[[], List[str]] = newer_pythons) -> None:
    """Raise SetupError where this Python is older than MINIMUM_PYTHON, naming newer ones that are there."""
    if tuple(version[:2]) >= MINIMUM_PYTHON:
        return
    found = find_newer()
    text = "Python {} is too old: detr_family needs Python {}.{} or newer.\n".format(
        ".".join(str(part) for part in version[:3]), *MINIMUM_PYTHON
    )
    if found:
        text += "  Found here: {}. Try again with PYTHON={}".format(", ".join(found), found[0])
    else:
        text += "  Install one and name it with PYTHON=..., for example PYTHON=/path/to/python3.12"
    raise SetupError(text)


def check_venv_module() -> None:
    """Raise SetupError naming the package to install where this Python cannot make environments."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        name = "python{}.{}-venv".format(*sys.version_info[:2])
        raise SetupError(
            "This Python cannot make an environment: {}.\n"
            "  Debian and Ubuntu keep that in a package of its own: sudo apt install {}\n"
            "  Other systems: a Python with the modules venv and ensurepip, named with PYTHON=...".format(
                error, name
            )
        ) from error


# ---------------------------------------------------------------- what the steps depend on


def digest(*parts: object) -> str:
    """A short hash of the parts."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode("utf-8")).hexdigest()[:24]


def file_digest(*paths: str) -> str:
    """A hash of the contents of the files; a missing file counts as such."""
    sums = []
    for path in paths:
        if os.path.isfile(path):
            with open(path, "rb") as file:
                sums.append(hashlib.sha256(file.read()).hexdigest())
        else:
            sums.append("missing")
    return digest(*sums)


def find_files(folder: str, suffixes: Tuple[str, ...]) -> List[str]:
    """The files below a folder whose names end in one of the suffixes, sorted."""
    return sorted(
        os.path.join(where, name)
        for where, _, names in os.walk(folder)
        for name in names
        if name.endswith(suffixes)
    )


def find_compiler() -> Optional[str]:
    """The C++ compiler on PATH (or named by CXX), or None."""
    named = os.environ.get("CXX", "").split()
    return next((path for path in map(shutil.which, named[:1] + ["c++", "g++", "clang++"]) if path), None)


def pinned_versions(constraints: str) -> Dict[str, str]:
    """The versions of torch and torchvision that a constraints file pins."""
    with open(constraints, encoding="utf-8") as file:
        return dict(re.findall(r"(?m)^(torch|torchvision)==([^\s;]+)", file.read()))


def torch_pair_fits(versions: Dict[str, str]) -> bool:
    """Whether torch is new enough and torchvision the release made for it (2.N goes with 0.(N+15))."""
    torch, vision = version_tuple(versions.get("torch", "")), version_tuple(versions.get("torchvision", ""))
    return torch[:2] >= MINIMUM_TORCH and vision[:2] == (torch[0] - 2, torch[1] + 15)


def remove_damage(site: str) -> List[str]:
    """Take out of a site-packages folder what a killed pip left half copied; returns those packages' names.

    A package counts as damaged where its RECORD is missing, or names a file that is not there or of another
    size. Without its metadata folder pip no longer takes it for installed and copies it again.
    """
    damaged = []
    for path in glob.glob(os.path.join(glob.escape(site), "~*")):
        shutil.rmtree(path, ignore_errors=True)
    for folder in glob.glob(os.path.join(glob.escape(site), "*.dist-info")):
        try:
            with open(os.path.join(folder, "RECORD"), encoding="utf-8", newline="") as file:
                rows = list(csv.reader(file))
            for row in rows:
                if row[2] and os.path.getsize(os.path.join(site, row[0])) != int(row[2]):
                    raise ValueError("another size")
        except (OSError, ValueError, IndexError):
            damaged.append(os.path.basename(folder).split("-")[0])
            shutil.rmtree(folder)
    return sorted(damaged)


# ---------------------------------------------------------------- the set-up


class Setup:
    """The environment of one folder: `.venv` in it, or (`here`) the environment that runs this script."""

    def __init__(self, root: str, extras: List[str], here: bool = False, exact_python: bool = False) -> None:
        self.root = root
        self.here = here
        self.exact_python = exact_python
        self.extras = extras
        self.venv = sys.prefix if here else os.path.join(root, ".venv")
        self.python = sys.executable if here else os.path.join(self.venv, "bin", "python")
        self.state = os.path.join(self.venv, ".setup")
        self.log = None if here else os.path.join(self.state, "pip.log")
        self.constraints = os.path.join(root, "requirements", "constraints.txt")
        self.progress = Progress()
        self.lock: Optional[int] = None
        self._site: Optional[str] = None
        self.scratch = tempfile.TemporaryDirectory(prefix="set-up-") if here else None
        for name in extras:
            if not os.path.isfile(self.requirements(name)):
                raise SetupError(
                    "There is no extra named {!r}: no file requirements/{}.txt".format(name, name)
                )

    def requirements(self, name: str) -> str:
        """The path of requirements/NAME.txt."""
        return os.path.join(self.root, "requirements", name + ".txt")

    # What each step depends on; the order is that of the steps.

    def keys(self) -> Dict[str, str]:
        """Step -> hash of all that decides what the step does."""
        script = file_digest(os.path.abspath(__file__))
        pins = sorted(pinned_versions(self.constraints).items())
        everything = file_digest(self.constraints)
        package = os.path.join(self.root, "detr_family")
        keys = {
            "venv": digest(self.root),
            "build": digest(script, everything, file_digest(self.requirements("build"))),
            "torch": digest(script, pins),
            "packages": digest(
                script, everything, file_digest(self.requirements("run"), self.requirements("dev"))
            ),
        }
        for name in self.extras:
            keys["extra-" + name] = digest(script, everything, file_digest(self.requirements(name)))
        keys["detectron2"] = digest(
            script, pins, file_digest(os.path.join(self.root, "tools", "install_detectron2.py"))
        )
        keys["package"] = digest(
            script, pins, self.root, find_compiler(), shutil.which("nvcc"), os.environ.get("CUDA_HOME"),
            file_digest(*(os.path.join(self.root, name) for name in ("setup.py", "build_ext.py", "pyproject.toml"))),
            [os.path.relpath(path, self.root) for path in find_files(package, SOURCE_SUFFIXES)],
            file_digest(*find_files(package, SOURCE_SUFFIXES)),
        )  # fmt: skip
        keys["check"] = digest(*sorted(key for step, key in keys.items() if not step.startswith("extra-")))
        return keys

    def stamp_path(self, step: str) -> str:
        """Where the stamp of a step lies."""
        return os.path.join(self.state, step + ".json")

    def is_done(self, step: str, key: str) -> bool:
        """Whether the stamp of a step fits and what the step installed is still there."""
        try:
            with open(self.stamp_path(step), encoding="utf-8") as file:
                stamp = json.load(file)
            return bool(stamp["key"] == key) and all(os.path.exists(path) for path in stamp["witnesses"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def write_stamp(self, step: str, key: str, witnesses: List[str]) -> None:
        """Note that a step has ended; written at once or not at all."""
        temporary = self.stamp_path(step) + ".new"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({"key": key, "witnesses": witnesses}, file)
        os.replace(temporary, self.stamp_path(step))

    def python_starts(self) -> bool:
        """Whether the environment's interpreter is there and starts."""
        try:
            return subprocess.call([self.python, "-I", "-S", "-c", ""], stderr=subprocess.DEVNULL) == 0
        except OSError:
            return False

    def is_complete(self) -> bool:
        """Whether nothing is left to do; reads stamps and starts the interpreter, calls no pip."""
        return (
            all(self.is_done(step, key) for step, key in self.keys().items())
            and self.python_starts()
            and not self.wants_another_python()
        )

    def venv_version(self) -> Tuple[int, ...]:
        """The version of Python that .venv runs, () where it does not start."""
        command = [self.python, "-I", "-S", "-c", "import sys; print('%d.%d.%d' % sys.version_info[:3])"]
        try:
            return version_tuple(subprocess.check_output(command, universal_newlines=True))
        except (OSError, subprocess.CalledProcessError):
            return ()

    def wants_another_python(self) -> bool:
        """Whether the user named an interpreter of another version than that of .venv."""
        return self.exact_python and self.venv_version()[:2] != tuple(sys.version_info[:2])

    def why_make_venv(self) -> Optional[str]:
        """Why .venv has to be made anew, or None where the one that is there is sound."""
        if not os.path.lexists(self.venv):
            return ""
        if not self.python_starts():
            return "the one here is incomplete or its Python is gone"
        if os.path.exists(self.stamp_path("venv")) and not self.is_done("venv", self.keys()["venv"]):
            return "the one here was made in another folder"
        code = (
            "import importlib.metadata as m, os, sys, pip\n"
            "assert m.distribution('pip').read_text('RECORD')\n"
            "assert os.path.samefile(sys.prefix, sys.argv[1])\n"
        )
        command = [self.python, "-c", code, self.venv]
        if subprocess.call(command, stderr=subprocess.DEVNULL, cwd=self.root) != 0:
            return "the one here is incomplete"
        if self.wants_another_python() or self.venv_version()[:2] < MINIMUM_PYTHON:
            return "the one here has Python {}".format(".".join(str(part) for part in self.venv_version()))
        return None

    def site(self) -> str:
        """The site-packages folder of the environment."""
        if self._site is None:
            command = [self.python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
            self._site = subprocess.check_output(command, universal_newlines=True, cwd=self.root).strip()
        return self._site

    def take_lock(self) -> None:
        """Wait until no other set-up works in this folder. pip holds the lock too: an orphan counts."""
        try:
            import fcntl

            self.lock = os.open(self.root, os.O_RDONLY)
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.progress.say("Another set-up is at work in this folder; waiting for it to end.")
                fcntl.flock(self.lock, fcntl.LOCK_EX)
        except (ImportError, OSError):
            return  # no such locks on this system

    # The steps.

    def run(self) -> None:
        """Do what is left to do. Raises SetupError where something is missing."""
        if not self.here and self.is_complete():
            self.progress.say("Environment: .venv is complete.")
            return
        self.take_lock()
        start = time.time()
        if self.here:
            check_python(sys.version_info[:3])
        else:
            self.make_venv()
        pip = Pip(self.python, self.progress, self.log, self.root, () if self.lock is None else (self.lock,))
        steps: List[Tuple[str, str, Callable[[Pip], List[str]]]] = [
            ("build", "Build tools", self.install_build_tools),
            ("torch", "torch {torch} and torchvision {torchvision}, the largest part".format(
                **pinned_versions(self.constraints)), self.install_torch),
            ("packages", "Other packages", self.install_packages),
        ]  # fmt: skip
        for name in self.extras:
            steps.append(("extra-" + name, "Extra: " + name, self.install_extra(name)))
        steps += [
            ("detectron2", "Detectron2", self.install_detectron2),
            ("package", "detr_family", self.install_package),
            ("check", "Check", self.check),
        ]
        keys = self.keys()
        for number, (step, heading, action) in enumerate(steps, start=1):
            if not self.here and self.is_done(step, keys[step]):
                continue
            self.progress.say("[{}/{}] {}".format(number, len(steps), heading))
            if self.here:
                action(pip)
                continue
            self.begin(step)
            witnesses = action(pip)
            self.write_stamp(step, keys[step], witnesses)
            os.remove(self.unfinished())
        self.progress.say("Environment: {} is complete ({:.0f} s).".format(
            self.venv if self.here else ".venv", time.time() - start))  # fmt: skip

    def unfinished(self) -> str:
        """The file that exists while a step is at work."""
        return os.path.join(self.state, "unfinished")

    def begin(self, step: str) -> None:
        """Note that a step is at work, and take out what an interrupted earlier one left half copied."""
        if os.path.exists(self.unfinished()):
            damaged = remove_damage(self.site())
            if damaged:
                self.progress.say("      an earlier try was interrupted; again: " + ", ".join(damaged))
        with open(self.unfinished(), "w", encoding="utf-8") as file:
            file.write(step)

    def make_venv(self) -> None:
        """Make .venv, unless a sound one is there."""
        why = self.why_make_venv()
        if why is not None:
            check_python(sys.version_info[:3])
            check_venv_module()
            version = ".".join(str(part) for part in sys.version_info[:3])
            self.progress.say(
                "Making .venv with Python {}{}".format(version, " again: " + why if why else "")
            )
            status, output = run_logged(
                [sys.executable] + VENV_COMMAND + [self.venv], self.progress, cwd=self.root
            )
            if status != 0:
                raise SetupError("python -m venv failed:\n    " + "\n    ".join(output.splitlines()[-10:]))
        if not os.path.isdir(self.state):
            os.mkdir(self.state)
        self.write_stamp("venv", self.keys()["venv"], [])

    def constraint_options(self) -> List[str]:
        """pip's options that hold versions: the pinned ones; `here`, whatever is installed stays as it is."""
        if self.here:
            code = (
                "import importlib.metadata as m\n"
                "for d in m.distributions(): print(d.metadata['Name'], d.version)"
            )
            output = subprocess.check_output(
                [self.python, "-c", code], universal_newlines=True, cwd=self.root
            )
            held = dict(line.split() for line in output.splitlines() if len(line.split()) == 2)
            lines = ["{}=={}\n".format(name, version) for name, version in sorted(held.items())]
            return ["-c", self.write_constraints(lines)]
        kept = os.path.join(self.state, "constraints.txt")
        return ["-c", kept if os.path.exists(kept) else self.constraints]

    def write_constraints(self, lines: List[str]) -> str:
        """Write a constraints file of this environment's own; returns its path."""
        path = os.path.join(self.state if self.scratch is None else self.scratch.name, "constraints.txt")
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(lines)
        return path

    def hold_torch(self, found: Dict[str, str]) -> None:
        """From now on hold the versions of torch and torchvision that were found, not the pinned ones."""
        with open(self.constraints, encoding="utf-8") as file:
            others = [line for line in file if not re.match("(torch|torchvision)==", line)]
        self.write_constraints(others + ["{}=={}\n".format(*pair) for pair in sorted(found.items())])

    def install_build_tools(self, pip: Pip) -> List[str]:
        """pip, setuptools, wheel and ninja; `here` only what is missing."""
        pip.install("the build tools", "-r", self.requirements("build"), *self.constraint_options())
        pip.version = None  # it may be another one now
        return [os.path.join(self.site(), "setuptools")]

    def install_torch(self, pip: Pip) -> List[str]:
        """The pinned pair, unless an environment that the user made already has one that fits."""
        site = self.site()
        ours = os.path.exists(self.stamp_path("torch"))
        found = {name: version for name, version in self.torch_versions().items() if version}
        kept = os.path.join(self.state, "constraints.txt")
        if os.path.exists(kept):
            os.remove(kept)
        as_pinned = {name: version.split("+")[0] for name, version in found.items()} == pinned_versions(
            self.constraints
        )
        if torch_pair_fits(found) and not as_pinned and (self.here or not ours):
            self.progress.say(
                "      kept as they are: torch {torch}, torchvision {torchvision}".format(**found)
            )
            if not self.here:
                self.hold_torch(found)
        elif self.here and "torch" in found and not as_pinned:
            raise SetupError(
                "This environment has torch {} and {}; detr_family needs torch {}.{} or newer\n"
                "  with the torchvision made for it. They are yours, so they are not changed: change them,\n"
                "  or use `make`, which has its own environment in .venv.".format(
                    found["torch"],
                    "torchvision " + found["torchvision"] if "torchvision" in found else "no torchvision",
                    *MINIMUM_TORCH,
                )
            )
        else:
            pip.install("torch and torchvision", "torch", "torchvision", "-c", self.constraints)
        return [os.path.join(site, "torch"), os.path.join(site, "torchvision")]

    def torch_versions(self) -> Dict[str, str]:
        """The installed versions of torch and torchvision, '' where one is missing."""
        code = (
            "import importlib.metadata as m, json\n"
            "def v(n):\n"
            "    try: return m.version(n)\n"
            "    except m.PackageNotFoundError: return ''\n"
            "print(json.dumps({n: v(n) for n in ('torch', 'torchvision')}))"
        )
        output = subprocess.check_output([self.python, "-c", code], universal_newlines=True, cwd=self.root)
        versions: Dict[str, str] = json.loads(output)
        return versions

    def install_packages(self, pip: Pip) -> List[str]:
        """What detr_family and Detectron2 need; in .venv also what tests, linter and type checker need."""
        files = ["-r", self.requirements("run")] + ([] if self.here else ["-r", self.requirements("dev")])
        pip.install("the other packages", "--no-build-isolation", *(files + self.constraint_options()))
        return [os.path.join(self.site(), "fvcore")]

    def install_extra(self, name: str) -> Callable[[Pip], List[str]]:
        """The step that installs requirements/NAME.txt."""

        def action(pip: Pip) -> List[str]:
            pip.install(
                "the extra " + name,
                "--no-build-isolation",
                "-r",
                self.requirements(name),
                *self.constraint_options(),
            )
            return []

        return action

    def install_detectron2(self, pip: Pip) -> List[str]:
        """Detectron2, by the script that chooses where from and says so."""
        script = os.path.join(self.root, "tools", "install_detectron2.py")
        status = subprocess.call([self.python, script], pass_fds=pip.keep_open, cwd=self.root)
        if status != 0:
            raise SetupError("")  # the script has said why
        return glob.glob(os.path.join(glob.escape(self.site()), "detectron2", "__init__.py"))

    def install_package(self, pip: Pip) -> List[str]:
        """This package in editable mode, with its native libraries where a compiler is there."""
        package = os.path.join(self.root, "detr_family")
        for path in find_files(package, LIBRARY_SUFFIXES):
            os.remove(path)  # so that none of older sources stays where building fails
        # -v brings the compiler's words into the log
        pip.install("detr_family", "-v", "--no-index", "--no-build-isolation", "--no-deps", "-e", self.root)
        libraries = find_files(package, LIBRARY_SUFFIXES)
        if libraries:
            names = ", ".join(os.path.basename(path).split(".")[0] for path in libraries)
            self.progress.say("      native operator: built ({})".format(names))
        elif find_files(package, SOURCE_SUFFIXES):
            reason = "there is no C++ compiler"
            if find_compiler() is not None:
                reason = "building it failed" + (", see .venv/.setup/pip.log" if pip.log else "")
            self.progress.say("      native operator: not built ({}); pure torch is used".format(reason))
        return libraries

    def check(self, pip: Pip) -> List[str]:
        """Import what was installed, from outside this folder, and use torchvision's operators once."""
        status, output = run_logged(
            [self.python, "-c", CHECK], self.progress, self.log, cwd=tempfile.gettempdir()
        )
        if status != 0:
            tail = "\n    ".join(output.splitlines()[-8:])
            raise SetupError("What was installed does not import:\n    {}".format(tail))
        self.progress.say("      " + output.splitlines()[-1])
        return []


def main(arguments: Optional[List[str]] = None) -> int:
    """Parse the command line, run the set-up; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--extras", default="", help="further sets of packages: names of requirements/NAME.txt"
    )
    parser.add_argument(
        "--here", action="store_true", help="install into the environment that runs this script"
    )
    parser.add_argument(
        "--exact-python", action="store_true", help="make .venv again where it has another version of Python"
    )
    options = parser.parse_args(arguments)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        extras = [name for name in re.split(r"[,\s]+", options.extras) if name]
        Setup(root, extras, options.here, options.exact_python).run()
    except SetupError as error:
        sys.stdout.flush()
        if str(error):
            sys.stderr.write("\nset-up stopped. {}\n".format(error))
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nset-up interrupted; the same command goes on from here.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
