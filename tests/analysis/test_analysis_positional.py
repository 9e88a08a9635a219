"""Positional attention: what DAB-DETR's figures say must hold of the numbers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from detr_family.analysis import loading, positional
from detr_family.analysis.command_line import main
from detr_family.modeling.dab_detr import DABDETR

DENSE = [name for name in tiny.DETECTORS if name != "DINO"]


def spread(values: np.ndarray) -> tuple[float, float]:
    """Standard deviations across and down."""
    side = np.arange(len(values)) + 0.5
    across, down = values.sum(0), values.sum(1)
    return tuple(float(np.sqrt((p * side**2).sum() - (p * side).sum() ** 2)) for p in (across, down))  # type: ignore


def test_a_map_peaks_at_its_query_and_flattens_with_the_temperature() -> None:
    maps = [positional.analytic_map((0.25, 0.75), temperature=t) for t in (20.0, 10000.0)]
    for values in maps:
        assert values.sum() == pytest.approx(1, abs=1e-4)
        row, column = np.unravel_index(values.argmax(), values.shape)
        assert abs(column - 9) <= 1 and abs(row - 29) <= 1
    assert maps[0].max() > 1.5 * maps[1].max()


def test_a_map_widens_along_the_longer_side() -> None:
    even, tall, wide = (positional.analytic_map((0.5, 0.5), size=s) for s in ((0.2, 0.2), (0.2, 0.5), (0.5, 0.2)))
    assert spread(tall)[1] > spread(even)[1] and spread(wide)[0] > spread(even)[0]
    assert spread(tall)[0] == pytest.approx(spread(even)[0], rel=0.02)
    np.testing.assert_allclose(tall, wide.T, atol=1e-6)


def test_the_modulation_is_laid_out_as_the_decoders() -> None:
    model = tiny.build("DABDETR")
    assert isinstance(model, DABDETR)
    decoder = model.transformer.decoder
    assert decoder.ref_anchor_head is not None
    for parameter in decoder.ref_anchor_head.parameters():
        torch.nn.init.zeros_(parameter)  # the reference is then sigmoid(0) = 0.5
    anchor = torch.tensor([[[0.5, 0.5, 0.25, 0.8]]])
    ours = positional.modulation((0.25, 0.8), reference=0.5, dim=16)
    torch.testing.assert_close(decoder.modulation(torch.zeros(1, 1, 16), anchor)[0, 0], ours)


def test_without_models_two_figures(work: Any) -> None:
    written = main(["positional", "--output", str(work.output), "--temperatures", "1,20"])
    assert {p.name for p in written if p.suffix == ".png"} == {"positional_temperature.png", "positional_size.png"}
    data = json.loads(written[-1].read_text())
    assert [x["temperature"] for x in data["temperature"]] == [1, 20] and len(data["size"]) == 4


def test_models_side_by_side(work: Any) -> None:
    models = [part for name in DENSE for part in ("--model", work.config(name), work.weights(name))]
    written = main(["positional", *models, "--queries", "3", "--output", str(work.output)])
    data = json.loads(written[-1].read_text())
    assert [x["detector"] for x in data] == [loading.TITLES.get(name, name) for name in DENSE]
    assert all(len(x["queries"]) == 3 and np.sum(x["maps"]) == pytest.approx(3, abs=0.01) for x in data)


@torch.no_grad()
def test_detrs_map_is_that_of_its_layer_when_the_content_is_zero(work: Any) -> None:
    cfg = loading.load_cfg(work.config("DETR"), ["MODEL.DETR.DEC_LAYERS", "1"])
    model = loading.load_detector(cfg, untrained=True)
    image = loading.choose_image(cfg)
    maps = positional.model_maps(model, image)
    layer = model.transformer.decoder.layers[0].multihead_attn
    grid = torch.zeros(1, *maps.shape[1:], dtype=torch.bool)
    position = model.position_encoding(grid).flatten(1, 2)
    weights = layer(model.query_embed.weight[None], position, position, need_weights=True)[1]
    np.testing.assert_allclose(maps.reshape(len(maps), -1), weights[0].numpy(), atol=1e-6)


def test_similar_queries_are_found_by_where_they_look() -> None:
    first = np.zeros((4, 5, 5))
    for i, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        first[i, row, column] = 1
    chosen = positional.similar_queries([first, first[::-1]], 4)
    assert sorted(chosen[0]) == [0, 1, 2, 3] and (chosen[1] == 3 - chosen[0]).all()


def test_mistakes(work: Any) -> None:
    with pytest.raises(SystemExit, match="a temperature must be positive"):
        main(["positional", "--temperatures", "0", "--output", str(work.output)])
    model = ["--model", work.config("DETR"), "untrained", "--output", str(work.output)]
    with pytest.raises(SystemExit, match="--layer 5: the decoder of DETR has layers 0 to 1"):
        main(["positional", *model, "--layer", "5"])
    with pytest.raises(SystemExit, match=r"needs MODEL\.DETR\.SPATIAL_ENCODING\.DECODER"):
        main(["positional", *model, "MODEL.DETR.SPATIAL_ENCODING.DECODER", "none"])
