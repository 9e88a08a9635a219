"""The commands that README and docs print, and which of them no test executes, with the reason."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "projects").glob("*/README.md"))]

# Those that tests/test_commands_run.py does not execute: an expression that the whole command fits, and why.
NOT_RUN = {
    r"pip .*|uv .*|git .*": "needs the network",
    r"cd .*|export .*|[A-Z_]+(\.[A-Z_]+)+ .*": "no command of its own: a folder, a variable, keys for the end of one",
    r"make (quickstart|test)": "makes an environment: .ci/run does it, test_quickstart.py runs what follows",
    r"tools/gpu_check\.sh.*": "needs a GPU; tests/benchmarks/test_gpu_check.py rehearses it",
    r"uvicorn .*|curl .*": "a server and its client: projects/serving/tests/test_serving.py starts both",
    r"python tools/export_model\.py .* --precision int8 .*": "calibrates long: tests/export/test_int8.py does it",
    r"python tools/export_model\.py --import projects\.deformable .*": "takes a minute to trace: "
    "projects/deformable/tests/test_deformable_export.py does it",
    r"python projects/convergence/run\.py .*": "trains five detectors; projects/convergence/tests runs it on tiny ones",
    r"python -m detr_family\.analysis ablation .*": "trains for hours; test_analysis_ablation.py does it small",
    r"python -m detr_family\.analysis (matching --run|convergence) .*": "draws trainings of many epochs; "
    "test_analysis_matching.py and test_analysis_convergence.py draw such",
}


def commands_of(page: Path) -> list[str]:
    """The commands of a page's bash blocks, lines put together, comments left out."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found.append(shlex.join(words))
    return found


COMMANDS = [(page, command) for page in PAGES for command in commands_of(page)]
EXECUTED = list(dict.fromkeys(c for _, c in COMMANDS if not any(re.fullmatch(why, c) for why in NOT_RUN)))
