"""The benchmark of a detector's forms: a line for each, and why one is left out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from detr_family.benchmarks.inference import built, forms_of, main, measure

ROOT = Path(__file__).resolve().parents[2]
LINE = r"(\S+) +(\S+) +[\d.]+ +[\d.]+ +[\d.]+x"


def lines(printed: str) -> dict[str, str]:
    return {line.split()[1]: line for line in printed.splitlines()[3:]}


def test_a_line_for_each_form_and_the_reason_for_none(capsys: pytest.CaptureFixture) -> None:
    forms = ["eager", "prepared", "bfloat16", "transformers"]
    main(["dino_quickstart", "--size", "64", "80", "--repeats", "1", "--threads", "1", "--forms", *forms])
    printed = capsys.readouterr().out
    assert "1 image(s) of 64x80 a pass, 1 thread(s)" in printed and ", torch 2." in printed
    found = lines(printed)
    assert list(found) == forms and all(re.fullmatch(LINE, found[name]) for name in forms[:3])
    assert "left out: transformers has no DINO" in found["transformers"]


def test_what_is_not_installed_is_named(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    import detr_family.export.exporting as exporting
    from detr_family.errors import UserError

    def absent(module: str, extra: str) -> None:
        raise UserError(f"this needs {module}, which cannot be imported: pip install 'detr_family[{extra}]'")

    monkeypatch.setattr(exporting, "require", absent)
    main(["dino_quickstart", "--size", "64", "80", "--repeats", "1", "--forms", "onnx", "--cpu-time"])
    assert "left out: this needs onnx, which cannot be imported: pip install" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parity
def test_all_forms_of_detr_find_the_same(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("onnxruntime")
    detr = {"ENC_LAYERS": 1, "DEC_LAYERS": 1, "HIDDEN_DIM": 32, "NUM_HEADS": 4, "FEEDFORWARD_DIM": 48, "NUM_QUERIES": 9}
    small = {"_BASE_": str(ROOT / "configs" / "detr_r50.yaml"), "MODEL": {"DETR": detr}}
    (tmp_path / "small.yaml").write_text(json.dumps(small))
    case = built(str(tmp_path / "small.yaml"), (96, 128), 2, 1, tmp_path)
    names = ["eager", "onnx", "transformers", "transformers_onnx"]
    models, missing = forms_of(case, names)
    assert not missing
    times = measure(case, models, 1)
    assert list(times) == names and all(value > 0 for value in times.values())
    batch = [{"image": torch.randint(256, (3, 96, 128), dtype=torch.uint8)} for _ in range(2)]
    with torch.no_grad():
        expected, port = case.model(batch), models["transformers"](batch)
        best = port[0].softmax(-1)[..., :-1].max(-1)[0].sort(descending=True)[0]
        again = torch.from_numpy(models["transformers_onnx"](batch)[0])
    assert torch.allclose(again, port[0], atol=1e-3)
    for i in range(2):
        scores = expected[i]["instances"].scores
        assert torch.allclose(scores, models["onnx"](batch)[i]["instances"].scores, atol=1e-4)
        assert torch.allclose(scores[0], best[i, 0], atol=1e-4)
