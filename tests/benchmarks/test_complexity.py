"""Parameters and multiply-adds: of what can be counted by hand, and beside the published figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from detr_family.benchmarks import complexity
from detr_family.benchmarks.complexity import attention_flops, count_gflops, count_params
from detr_family.config import load_config
from detr_family.layers.deformable_attention import MSDeformAttn
from detr_family.model_zoo.published import PUBLISHED, figures_of

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_attention_is_counted() -> None:
    """Scores: 2 * 3 heads, 5 queries, 7 keys, 4 channels; and the values' 6 channels are summed over the keys."""
    inputs = tuple(torch.randn(2, 3, *size) for size in ((5, 4), (7, 4), (7, 6)))
    analysis = FlopCountAnalysis(Attend(), inputs)
    analysis.set_op_handle("aten::scaled_dot_product_attention", attention_flops)
    assert analysis.total() == 2 * 3 * 5 * 7 * (4 + 6)


def test_sampling_of_deformable_attention_is_counted() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = MSDeformAttn(embed_dim=16, num_heads=2, num_levels=2, num_points=3)

        def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
            return self.attention(query, torch.full((1, 5, 2, 2), 0.5), tokens, [(4, 6), (2, 3)], [0, 24])

    count = FlopCountAnalysis(Fixed(), (torch.randn(1, 5, 16), torch.randn(1, 30, 16))).total()
    linear = 5 * 16 * (2 * 2 * 3 * 2 + 2 * 2 * 3) + 30 * 16 * 16 + 5 * 16 * 16
    samples = 5 * 2 * 2 * 3 * 8  # queries, heads, levels, points, channels of a head
    assert linear + 4 * samples <= count <= linear + 8 * samples


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_every_detector_is_counted(name: str) -> None:
    model = tiny.build(name).train()
    small, large = count_gflops(model, 64, 96), count_gflops(model, 128, 96)
    assert 1.2 * small < large < 4 * small and model.training
    assert count_params(model) == sum(p.numel() for p in model.parameters()) / 1e6


def test_layers_count_once_each() -> None:
    """A further decoder layer costs what its projections and feed-forward network do, and the two attentions."""
    deeper, deep = (count_gflops(tiny.build("DETR", DEC_LAYERS=n), 64, 96) * 1e9 for n in (3, 2))
    queries, tokens, dim, hidden = 7, 24, 16, 24
    projections = dim * dim * (4 * queries + 2 * queries + 2 * tokens)
    attention = 2 * dim * queries * (queries + tokens)
    heads = queries * (dim * 4 + 2 * dim * dim + 4 * dim)
    expected = projections + attention + 2 * queries * dim * hidden + heads
    assert deeper - deep == pytest.approx(expected, rel=0.1)  # norms are counted too


def test_the_table_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(CONFIGS / "detr_r50.yaml")
    monkeypatch.setattr("sys.argv", ["complexity", path, "--size", "64", "96", "--import", "projects.deformable"])
    complexity.main()
    printed = capsys.readouterr().out
    assert re.search(r"detr_r50 +41\.52 +41 +\+1\.3 +64x96 +\d\.\d +86 +-\d+\.\d", printed)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PUBLISHED if (CONFIGS / f"{n}.yaml").is_file()])
def test_it_is_what_the_papers_published(name: str) -> None:
    published = PUBLISHED[name]
    differences = [float(x) for x in re.findall(r" ([+-]\d+\.\d)", complexity.row(CONFIGS / f"{name}.yaml", None))]
    assert abs(differences[0]) <= 2
    if published.gflops is not None:
        assert abs(differences[1]) <= 6 or published.why


def test_published_names_are_those_of_config_files() -> None:
    files = {p.stem for folder in (ROOT / "configs", *ROOT.glob("projects/*/configs")) for p in folder.glob("*.yaml")}
    assert set(PUBLISHED) <= files


def test_the_model_zoo_says_the_same() -> None:
    rows = {}
    for line in (ROOT / "docs" / "MODEL_ZOO.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 11:
            rows[cells[0].strip("`")] = cells[1:]
    own = {name: p for name, p in PUBLISHED.items() if (CONFIGS / f"{name}.yaml").is_file()}
    assert own.keys() <= rows.keys()
    for name, published in own.items():
        *ap, epochs, gflops, params, file = rows[name]
        assert ap == [f"{x:.1f}" for x in published.ap] + [""] * (6 - len(published.ap)), name
        assert epochs == str(published.epochs or ""), name
        assert gflops == str(published.gflops or "") and params == f"{published.params}M", name
        reached = "" if published.released is None else f" ({published.released} AP)"
        assert file == published.file + reached, name


def test_figures_are_those_of_this_architecture() -> None:
    """46.9, 48.6 and 43.4 are of deformable attention in the encoder only, which is not here."""
    deformable = {name: p.ap[0] for name, p in PUBLISHED.items() if "deformable" in name}
    assert deformable == {
        "deformable_detr_r50": 43.8, "dab_deformable_detr_r50": 48.7, "dn_deformable_detr_r50": 49.5
    }  # fmt: skip
    folder = ROOT / "projects" / "deformable"
    for path in (*folder.glob("configs/da*.yaml"), *folder.glob("configs/dn*.yaml")):
        assert not re.search(r"46\.9|48\.6|43\.4", path.read_text()), path
    rows = [x for x in (folder / "README.md").read_text().splitlines() if x.startswith(("| `dab_", "| `dn_"))]
    assert len(rows) == 3 and not re.search(r"46\.9|48\.6|43\.4", "".join(rows))


def test_recipes_have_the_published_number_of_epochs() -> None:
    for name, published in PUBLISHED.items():
        if published.epochs and (CONFIGS / f"{name}.yaml").is_file():
            assert published.epochs == load_config(str(CONFIGS / f"{name}.yaml")).SOLVER.EPOCHS, name


def test_figures_of_the_papers_are_not_those_of_others() -> None:
    ours = PUBLISHED["dino_r50_4scale"]
    assert figures_of("dino_r50_4scale") is ours and figures_of("/a/configs/dino_r50_4scale.yaml") is ours
    assert figures_of("detrex/dino_r50_4scale") is None and figures_of("configs/detrex/dino_r50_4scale.yaml") is None
