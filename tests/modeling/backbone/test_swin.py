"""Swin: equal to torchvision's, its settings, and which files load."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

from detr_family.checkpoint import DETRCheckpointer
from detr_family.checkpoint.releases import released_name
from detr_family.config import load_config
from detr_family.data.datasets import objects365
from detr_family.layers.checkpointing import backbone_blocks, checkpoint_activations

swin = pytest.importorskip(
    "detr_family.modeling.backbone.swin", exc_type=ImportError, reason="this Detectron2 has no SwinTransformer"
)
SIZES, Swin = swin.SIZES, swin.Swin


def build(cfg: CfgNode, **keys: Any) -> Swin:
    cfg.MODEL.BACKBONE.NAME = "build_swin_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = keys.pop("FREEZE_AT", 0)
    for key, value in keys.items():
        cfg.MODEL.SWIN[key] = value
    torch.manual_seed(3)
    return build_backbone(cfg)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that is quick, in the place of T."""
    monkeypatch.setitem(SIZES, "T", {"embed_dim": 12, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 3, 4)})


def torchvision_name(name: str) -> str:
    name = re.sub(r"^features\.0\.0\.", "patch_embed.proj.", name)
    name = re.sub(r"^features\.0\.2\.", "patch_embed.norm.", name)
    stage = re.match(r"features\.(\d)\.", name)
    if stage:
        number = int(stage[1])
        kind = f"layers.{number // 2}.blocks." if number % 2 else f"layers.{number // 2 - 1}.downsample."
        name = kind + name[stage.end() :]
    return name.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("window", [4, 5])
def test_features_equal_torchvisions(cfg: CfgNode, window: int) -> None:
    size = SIZES["T"]
    torch.manual_seed(0)
    theirs = TorchvisionSwin(
        [4, 4],
        size["embed_dim"],
        list(size["depths"]),
        list(size["num_heads"]),
        [window, window],
        stochastic_depth_prob=0.0,
    ).eval()
    ours = build(cfg, WINDOW_SIZE=window, OUT_FEATURES=["p0", "p1", "p2", "p3"]).eval()
    for module in (theirs, ours):
        with torch.no_grad():
            for parameter in module.parameters():  # away from zero biases and unit scales
                parameter.add_(0.1 * torch.randn_like(parameter))
    state = {
        torchvision_name(k): v
        for k, v in theirs.state_dict().items()
        if not k.startswith(("head.", "norm.")) and not k.endswith("relative_position_index")
    }
    result = ours.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert {k.split(".")[0] for k in result.missing_keys} == {"norm0", "norm1", "norm2", "norm3"}

    # No multiple of the window on any stage, and the last stage larger than the window: torchvision does not
    # shift in a smaller one. Its patches are of 4 pixels each; ours pad the rest.
    image = torch.randn(2, 3, 224, 260)
    with torch.no_grad():
        actual = ours(image)
        x = image
        for i, stage in enumerate(theirs.features):
            x = stage(x)  # B x H x W x C
            if i % 2:
                norm = getattr(ours, f"norm{i // 2}")
                feature = actual[f"p{i // 2}"]
                torch.testing.assert_close(feature, norm(x).permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4)
    assert min(x.shape[1:3]) > window and feature.shape[-2:] == (7, 9)


@pytest.mark.usefixtures("small")
def test_features_are_named_with_their_strides_and_any_size_of_image_will_do(cfg: CfgNode) -> None:
    backbone = build(cfg, OUT_FEATURES=["p1", "p3"])
    shape = backbone.output_shape()
    assert {k: (s.channels, s.stride) for k, s in shape.items()} == {"p1": (24, 8), "p3": (96, 32)}
    assert backbone.size_divisibility == 0
    features = backbone(torch.randn(1, 3, 45, 67))
    assert {k: tuple(v.shape) for k, v in features.items()} == {"p1": (1, 24, 6, 9), "p3": (1, 96, 2, 3)}


@pytest.mark.parametrize(
    ("size", "millions", "channels"), [("T", 27.5, 768), ("S", 48.8, 768), ("B", 86.7, 1024), ("L", 195.0, 1536)]
)
def test_sizes_are_the_papers(size: str, millions: float, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The papers' tables count the classifier too: 28.3, 49.6, 87.8 and 196.5 million."""
    for name in ("trunc_normal_", "kaiming_uniform_"):  # the values do not matter
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
    backbone = Swin(
        in_channels=3, size=size, window_size=7, drop_path_rate=0.0, out_features=["p1", "p2", "p3"],
        freeze_at=0,
    )  # fmt: skip
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, rel=0.003)
    assert backbone.output_shape()["p3"].channels == channels


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"SIZE": "XL"}, r"MODEL\.SWIN\.SIZE is 'XL'; it may be one of T, S, B, L"),
        ({"OUT_FEATURES": ["p2", "p1"]}, r"MODEL\.SWIN\.OUT_FEATURES is \['p2', 'p1'\].*in order"),
        ({"OUT_FEATURES": ["res5"]}, r"MODEL\.SWIN\.OUT_FEATURES is \['res5'\]"),
        ({"OUT_FEATURES": []}, r"MODEL\.SWIN\.OUT_FEATURES is \[\]"),
        ({"WINDOW_SIZE": 0}, r"MODEL\.SWIN\.WINDOW_SIZE is 0"),
        ({"DROP_PATH_RATE": 1.0}, r"MODEL\.SWIN\.DROP_PATH_RATE is 1\.0"),
        ({"FREEZE_AT": 6}, r"MODEL\.BACKBONE\.FREEZE_AT is 6.*0 to 5"),
    ],
)
def test_settings_that_cannot_be_are_named(cfg: CfgNode, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(cfg, **keys)


def test_a_detectron2_without_swin_is_told_what_to_install(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "detr_family.modeling.backbone.swin", raising=False)
    monkeypatch.setitem(sys.modules, "detectron2.modeling.backbone.swin", None)
    with pytest.raises(ImportError, match=r"no SwinTransformer.*tools/install_detectron2\.py"):
        build(cfg)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("freeze_at", "frozen"),
    [(0, set()), (1, {"patch_embed"}), (2, {"patch_embed", "layers.0"}), (3, {"patch_embed", "layers.0", "layers.1"})],
)
def test_freeze_at_counts_as_for_a_resnet(cfg: CfgNode, freeze_at: int, frozen: set[str]) -> None:
    backbone = build(cfg, FREEZE_AT=freeze_at).train()
    parts = {re.match(r"patch_embed|layers\.\d|norm\d", k)[0]: False for k, _ in backbone.named_parameters()}
    for name, parameter in backbone.named_parameters():
        parts[re.match(r"patch_embed|layers\.\d|norm\d", name)[0]] |= parameter.requires_grad
    assert {part for part, trained in parts.items() if not trained} == frozen
    assert backbone.layers[0].training == (freeze_at < 2) and backbone.layers[3].training


@pytest.mark.usefixtures("small")
def test_stochastic_depth_rises_and_rests_in_evaluation(cfg: CfgNode) -> None:
    backbone = build(cfg, DROP_PATH_RATE=0.5)
    blocks = [block for layer in backbone.layers for block in layer.blocks]
    assert [getattr(b.drop_path, "p", 0.0) for b in blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert not torch.equal(backbone.train()(image)["p3"], backbone(image)["p3"])
        assert torch.equal(backbone.eval()(image)["p3"], backbone(image)["p3"])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("freeze_at", [0, 1, 2])
def test_checkpointed_blocks_give_the_same_gradients(cfg: CfgNode, freeze_at: int) -> None:
    plain = build(cfg, FREEZE_AT=freeze_at).train()
    checkpointed = build(cfg, FREEZE_AT=freeze_at).train()
    blocks = backbone_blocks(checkpointed)
    assert blocks == [block for layer in checkpointed.layers for block in layer.blocks]
    checkpoint_activations(blocks)
    image = torch.randn(2, 3, 64, 72)

    def gradients(backbone: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(7)  # of stochastic depth
        sum(x.square().mean() for x in backbone(image).values()).backward()
        return {k: p.grad for k, p in backbone.named_parameters() if p.requires_grad}

    expected, actual = gradients(plain), gradients(checkpointed)
    assert expected.keys() == actual.keys() and not [k for k, g in actual.items() if g is None]
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


class Detector(nn.Module):
    """A backbone and a head, which is all that the checkpointer looks at."""

    num_classes = 80

    def __init__(self, backbone: Swin) -> None:
        super().__init__()
        self.backbone = backbone
        self.class_embed = nn.Linear(5, self.num_classes)


def made_up(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights whose values differ from each other, as a file of those names and shapes would hold."""
    generator = torch.Generator().manual_seed(9)
    return {k: torch.randn(s, generator=generator) for k, s in shapes.items()}


def authors_shapes(window: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an ImageNet file of Swin's authors, of the size of the fixture `small`."""
    dim, depths, heads = (SIZES["T"][k] for k in ("embed_dim", "depths", "num_heads"))
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (dim, 3, 4, 4), "patch_embed.proj.bias": (dim,),
        "patch_embed.norm.weight": (dim,), "patch_embed.norm.bias": (dim,),
        "norm.weight": (dim * 8,), "norm.bias": (dim * 8,), "head.weight": (1000, dim * 8), "head.bias": (1000,),
    }  # fmt: skip
    for i, (depth, m) in enumerate(zip(depths, heads, strict=True)):
        c = dim * 2**i
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}."
            for norm in ("norm1", "norm2"):
                shapes |= {f"{block}{norm}.weight": (c,), f"{block}{norm}.bias": (c,)}
            for name, (out, into) in {
                "attn.qkv": (3 * c, c), "attn.proj": (c, c), "mlp.fc1": (4 * c, c), "mlp.fc2": (c, 4 * c)
            }.items():  # fmt: skip
                shapes |= {f"{block}{name}.weight": (out, into), f"{block}{name}.bias": (out,)}
            shapes[f"{block}attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, m)
            shapes[f"{block}attn.relative_position_index"] = (window**2, window**2)
            if j % 2 and i < 3:
                shapes[f"{block}attn_mask"] = (4, window**2, window**2)
        if i < 3:
            shapes |= {f"layers.{i}.downsample.reduction.weight": (2 * c, 4 * c)}
            shapes |= {f"layers.{i}.downsample.norm.{p}": (4 * c,) for p in ("weight", "bias")}
    return shapes


@pytest.mark.usefixtures("small")
def test_weights_of_its_authors_load_as_a_backbone(cfg: CfgNode, tmp_path: Path) -> None:
    model = Detector(build(cfg))
    state = made_up(authors_shapes(window=7))
    torch.save({"model": state}, tmp_path / "swin.pth")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    index = model.backbone.layers[0].blocks[0].attn.relative_position_index.clone()
    DETRCheckpointer(model).load(str(tmp_path / "swin.pth"))
    for name, value in model.state_dict().items():
        given = state.get(name.removeprefix("backbone."))
        own = re.match(r"class_embed|backbone\.norm[123]\.", name)  # what such a file has nothing for
        assert bool(own) == (given is None), name
        assert torch.equal(value, before[name] if given is None else given), name
    assert torch.equal(model.backbone.layers[0].blocks[0].attn.relative_position_index, index)
    with pytest.raises(ValueError, match=r"swin\.pth holds a backbone without a detector"):
        DETRCheckpointer(model, whole=True).load(str(tmp_path / "swin.pth"))


@pytest.mark.usefixtures("small")
def test_a_file_of_another_window_is_refused(cfg: CfgNode, tmp_path: Path) -> None:
    torch.save({"model": made_up(authors_shapes(window=12))}, tmp_path / "swin.pth")
    with pytest.raises(ValueError, match=r"swin\.pth is a Swin that does not fit.*WINDOW_SIZE"):
        DETRCheckpointer(Detector(build(cfg))).load(str(tmp_path / "swin.pth"))


@pytest.mark.usefixtures("small")
def test_a_papers_release_fills_it(cfg: CfgNode, tmp_path: Path) -> None:
    shapes = {k: s for k, s in authors_shapes(window=12).items() if not k.startswith(("norm.", "head."))}
    for i in (1, 2, 3):
        shapes |= {f"norm{i}.weight": (12 * 2**i,), f"norm{i}.bias": (12 * 2**i,)}
    state = {f"backbone.0.{k}": v for k, v in made_up(shapes).items()}
    head = {"class_embed.weight": torch.randn(91, 5), "class_embed.bias": torch.randn(91)}
    torch.save({"model": state | head}, tmp_path / "release.pth")
    model = Detector(build(cfg, WINDOW_SIZE=12))
    DETRCheckpointer(model, whole=True).load(str(tmp_path / "release.pth"))
    filled = {released_name(k) for k in state} & model.state_dict().keys()
    assert filled == {k for k in model.state_dict() if k.startswith("backbone.")}
    for name, tensor in state.items():
        if released_name(name) in filled:
            assert torch.equal(model.state_dict()[released_name(name)], tensor), name


@pytest.mark.usefixtures("small")
def test_own_checkpoints_and_those_with_detectron2s_buffers_load(cfg: CfgNode, tmp_path: Path) -> None:
    model = Detector(build(cfg))
    state = model.state_dict()
    assert not [k for k in state if "relative_position_index" in k]
    state["backbone.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    torch.save({"model": {k: v + 1 for k, v in state.items()}}, tmp_path / "own.pth")
    DETRCheckpointer(model, whole=True).load(str(tmp_path / "own.pth"))


@pytest.mark.usefixtures("small")
def test_dino_sees_its_stages_and_a_release_fills_both(tmp_path: Path) -> None:
    cfg = tiny.cfg_of("DINO")
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_swin_backbone", 0
    cfg.MODEL.SWIN.OUT_FEATURES = ["p0", "p2", "p3"]
    cfg.MODEL.DINO.NUM_LEVELS = 4
    cfg.MODEL.DETR.CHECKPOINT.BACKBONE = True
    model = build_model(cfg).train()
    assert [projection[0].in_channels for projection in model.input_proj] == [12, 48, 96, 96]
    sum(model(tiny.batch()).values()).backward()
    assert not [k for k, p in model.named_parameters() if k.startswith("backbone.") and p.grad is None]

    released = {re.sub(r"^backbone\.", "backbone.0.", k): v + 1 for k, v in model.state_dict().items()}
    released["backbone.0.layers.1.blocks.1.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    torch.save({"model": released}, tmp_path / "release.pth")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    DETRCheckpointer(model, whole=True).load(str(tmp_path / "release.pth"))
    assert all(torch.equal(v, before[k] + 1) for k, v in model.state_dict().items())


CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def config(name: str) -> CfgNode:
    return load_config(str(CONFIGS / f"{name}.yaml"), ["MODEL.DEVICE", "cpu", "MODEL.DETR.NUM_CLASSES", "80"])


@pytest.mark.parametrize(
    ("name", "window", "levels"),
    [("dino_swin_t_4scale", 7, 4), ("dino_swin_s_4scale", 7, 4), ("dino_swin_b_4scale", 12, 4),
     ("dino_swin_l_4scale", 12, 4), ("dino_swin_l_5scale", 12, 5)],
)  # fmt: skip
def test_configs_of_dino(name: str, window: int, levels: int) -> None:
    cfg = config(name)
    assert name.split("_")[2].upper() == cfg.MODEL.SWIN.SIZE and window == cfg.MODEL.SWIN.WINDOW_SIZE
    assert f"window{window}" in cfg.MODEL.WEIGHTS and cfg.MODEL.BACKBONE.FREEZE_AT == 0
    assert levels == cfg.MODEL.DINO.NUM_LEVELS and len(cfg.MODEL.SWIN.OUT_FEATURES) == levels - 1
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.BACKBONE_MULTIPLIER, cfg.SOLVER.IMS_PER_BATCH) == (1e-4, 0.1, 16)


@pytest.mark.parametrize("name", ["dino_swin_t_4scale", pytest.param("dino_swin_l_5scale", marks=pytest.mark.slow)])
def test_they_build(name: str) -> None:
    model = build_model(config(name))
    assert len(model.input_proj) == config(name).MODEL.DINO.NUM_LEVELS
    assert not [k for k, p in model.named_parameters() if not p.requires_grad]


def test_configs_with_objects365_are_the_papers() -> None:
    pretraining, tuning = config("dino_swin_l_4scale_o365"), config("dino_swin_l_4scale_o365_ft")
    assert (pretraining.SOLVER.EPOCHS, pretraining.SOLVER.IMS_PER_BATCH) == (26, 64)
    assert (tuning.SOLVER.EPOCHS, tuning.SOLVER.IMS_PER_BATCH) == (18, 16)
    for cfg in (pretraining, tuning):
        assert cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DETR.CHECKPOINT.BACKBONE and cfg.MODEL.DINO.DN_MAX_QUERIES == 1000
    assert set(pretraining.DATASETS.TRAIN + pretraining.DATASETS.TEST) <= set(objects365.SPLITS)
    assert f"{pretraining.OUTPUT_DIR}/model_final.pth" == tuning.MODEL.WEIGHTS
    assert tuning.DATASETS.TRAIN == ("coco_2017_train",) and tuning.MODEL.DETR.CLASS_ROWS == "match"
    plain = config("dino_swin_l_4scale")
    assert tuple(1.5 * x for x in plain.INPUT.MIN_SIZE_TRAIN) == tuning.INPUT.MIN_SIZE_TRAIN
    assert [1.5 * x for x in plain.INPUT.CROP.SIZE] == tuning.INPUT.CROP.SIZE
    assert [1.5 * x for x in plain.INPUT.CROP.RESIZE] == tuning.INPUT.CROP.RESIZE
    assert (tuning.INPUT.MIN_SIZE_TEST, tuning.INPUT.MAX_SIZE_TEST, tuning.INPUT.MAX_SIZE_TRAIN) == (1200, 2000, 2000)


def test_rows_of_classes_go_from_objects365_to_coco_by_name(tmp_path: Path) -> None:
    """Heads and label embedding, by the detector and the setting of the fine-tuning configuration."""
    theirs, ours = ["Person", "Sneakers", "Traffic Light", "Wild Bird"], ["bird", "traffic light", "person"]
    source, target = (tiny.build("DINO", NUM_CLASSES=len(names)) for names in (theirs, ours))
    DETRCheckpointer(source, str(tmp_path), class_names=theirs).save("o365")
    fresh = {k: v.clone() for k, v in target.state_dict().items()}
    DETRCheckpointer(target, class_rows="match", class_names=ours).load(str(tmp_path / "o365.pth"))
    state, rows = source.state_dict(), re.compile(r"class_embed|label_enc")
    for name, value in target.state_dict().items():
        if rows.search(name):
            assert torch.equal(value[1], state[name][2]) and torch.equal(value[2], state[name][0]), name
            assert torch.equal(value[0], fresh[name][0]), name
        else:
            assert torch.equal(value, state[name]), name


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_another_type_give_the_same(cfg: CfgNode, dtype: torch.dtype) -> None:
    backbone = build(cfg, WINDOW_SIZE=4).eval()
    image = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        expected = backbone(image)
        found = backbone.to(dtype)(image.to(dtype))
    for name, feature in found.items():
        assert feature.dtype == dtype
        assert (feature.float() - expected[name]).norm() < 4 * max(torch.finfo(dtype).eps, 1e-6) * expected[name].norm()
