"""What a training starts from equals the releases': every parameter after the backbone, before any step.

`tests/golden_init/*.json` hold what the releases' own builders make, over four seeds. A `*` stands for the layers that
have the same facts. Where the folder with one entry per tensor is, that is held too.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

import projects.deformable  # noqa: F401  (registers its detectors and keys)
from detr_family.checkpoint.releases import released_name
from detr_family.config import load_config

ROOT = Path(__file__).resolve().parents[2]
COMPACT = ROOT / "tests" / "golden_init"
CONFIGS = {
    "detr_r50": "configs/detr_r50.yaml",
    "conditional_detr_r50": "configs/conditional_detr_r50.yaml",
    "dab_detr_r50": "configs/dab_detr_r50.yaml",
    "dn_detr_r50": "configs/dn_detr_r50.yaml",
    "dino_r50_4scale": "configs/dino_r50_4scale.yaml",
    "deformable_detr_r50": "projects/deformable/configs/deformable_detr_r50.yaml",
}
SEEDS = 4  # that the releases' means and deviations are pooled over
Facts = dict[str, dict[str, Any]]


class BareBackbone(Backbone):
    """The feature maps of ResNet-50, as many as are asked for, without anything that makes them."""

    def __init__(self, features: list[str]) -> None:
        super().__init__()
        self.features = features

    def output_shape(self) -> dict[str, ShapeSpec]:
        stages = {f"res{i}": ShapeSpec(channels=64 * 2**i, stride=2**i) for i in range(2, 6)}
        return {name: stages[name] for name in self.features}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


@BACKBONE_REGISTRY.register()
def build_bare_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    return BareBackbone(cfg.MODEL.RESNETS.OUT_FEATURES)


def build(name: str) -> nn.Module:
    cfg = load_config(str(ROOT / CONFIGS[name]))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.DETR.NUM_CLASSES = 91
    cfg.MODEL.BACKBONE.NAME = "build_bare_backbone"
    torch.manual_seed(17)
    return build_model(cfg)


def compact(facts: Facts) -> Facts:
    """Tensors that differ by the index of a layer alone become one entry, numbers have five digits."""
    groups: dict[str, Facts] = {}
    for name, fact in facts.items():
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", name, count=1), {})[name] = fact

    def rounded(x: float) -> float:
        return float(f"{x:.5g}") if abs(x) > 1e-6 else 0.0

    result: Facts = {}
    for pattern, members in groups.items():
        kinds = {json.dumps([f["shape"], f["constant"], f.get("values"), f["tied_to"]]) for f in members.values()}
        # Heads, which are copies of one another, stay apart.
        together = len(members) > 1 and len(kinds) == 1 and "embed" not in pattern
        for name, part in [(pattern, members)] if together else [(k, {k: f}) for k, f in members.items()]:
            first, count = next(iter(part.values())), len(part)
            mean = sum(f["mean"] for f in part.values()) / count
            entry = {"shape": first["shape"], "mean": rounded(mean)}
            if first["constant"]:
                entry["constant"] = True
            elif "values" in first:
                entry["values"] = [rounded(x) for x in first["values"]]
            else:
                entry["std"] = rounded(math.sqrt(sum(f["std"] ** 2 + f["mean"] ** 2 for f in part.values()) / count))
                entry["max"] = rounded(max(f["max"] for f in part.values()))
            for key in ("tied_to", "copy_of"):
                if first.get(key) and not together:
                    entry[key] = first[key]
            result[name] = entry
    return result


def wrong(model: nn.Module, facts: Facts) -> list[str]:
    """What of the model does not start as the facts say, in words."""
    state = {k: v for k, v in model.state_dict(keep_vars=True).items() if not k.startswith("backbone.")}
    facts = {name if "*" in name else released_name(name): fact for name, fact in facts.items()}
    wildcards = {re.compile(re.escape(k).replace(r"\*", r"\d+")): k for k in facts if "*" in k}
    found: dict[str, str] = {}
    for name in state:
        entry = name if name in facts else next((k for x, k in wildcards.items() if x.fullmatch(name)), None)
        if entry is None:
            return [f"{name} is none of the release's"]
        found[name] = entry
    missing = facts.keys() - found.values()
    complaints = [f"{name} of the release is missing" for name in sorted(missing)]
    for name, entry in found.items():
        complaints += [f"{name}: {x}" for x in wrong_tensor(state[name].detach(), facts[entry])]
        for key, same in (("tied_to", lambda a, b: a is b), ("copy_of", torch.equal)):
            other = facts[entry].get(key)
            # That biases inside of deep-copied layers start equal is an accident of the releases.
            if other and (key == "tied_to" or "embed" in other) and not same(state[name], state[released_name(other)]):
                complaints.append(f"{name} is not {key.replace('_', ' ')} {other}")
    return complaints


def wrong_tensor(x: Tensor, fact: dict[str, Any]) -> list[str]:
    if list(x.shape) != fact["shape"]:
        return [f"shape {list(x.shape)}, not {fact['shape']}"]
    if fact.get("constant"):
        return [] if torch.allclose(x, torch.tensor(fact["mean"]), rtol=1e-4, atol=1e-7) else ["not constant"]
    if "values" in fact:
        same = torch.allclose(x.flatten(), torch.tensor(fact["values"]), rtol=1e-4, atol=1e-6)
        return [] if same else ["not the release's pattern"]
    # Both are samples. The deviation's own standard error is 0.45 (uniform) to 0.71 (normal) of the mean's.
    error = fact["std"] * math.sqrt((1 + 1 / SEEDS) / x.numel())
    mean, std = x.mean().item(), x.std(correction=0).item()
    complaints = []
    if abs(mean - fact["mean"]) > 6 * error:
        complaints.append(f"mean {mean:.4g}, not {fact['mean']:.4g}")
    if abs(std - fact["std"]) > 6 * 0.71 * error:
        complaints.append(f"standard deviation {std:.4g}, not {fact['std']:.4g}")
    if x.numel() >= 1000 and (x.max() < 2 * std) != (fact["max"] < 2 * fact["std"]):
        complaints.append("uniform in place of normal values, or the other way round")
    return complaints


def released(name: str) -> Facts:
    path = golden.FOLDER / "init" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"no starting values in {path.parent} (set DETR_FAMILY_SHARED to the folder that holds golden/)")
    return json.loads(path.read_text())["parameters"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_starts_as_in_the_release(name: str) -> None:
    assert not wrong(build(name), json.loads((COMPACT / f"{name}.json").read_text()))


@pytest.mark.golden
@pytest.mark.parametrize("name", CONFIGS)
def test_the_short_form_and_every_single_tensor(name: str) -> None:
    facts = released(name)
    assert compact(facts) == json.loads((COMPACT / f"{name}.json").read_text())
    assert not wrong(build(name), facts)


def spoil(model: nn.Module, what: str) -> None:
    if what == "queries":
        nn.init.normal_(model.transformer.tgt_embed.weight)
    elif what == "heads":
        nn.init.xavier_uniform_(model.class_embed[0].weight)
    elif what == "bias":
        nn.init.zeros_(model.class_embed[0].bias)
    elif what == "copies":
        nn.init.kaiming_uniform_(model.transformer.enc_out_bbox_embed.layers[1].weight, a=math.sqrt(5))
    elif what == "pattern":
        model.transformer.decoder.layers[3].cross_attn.sampling_offsets.bias.data[7] += 0.5
    else:
        nn.init.normal_(model.transformer.encoder.layers[2].linear1.weight, std=0.0295)


@pytest.mark.parametrize("what", ["queries", "heads", "bias", "copies", "pattern", "distribution"])
def test_another_starting_value_is_noticed(what: str) -> None:
    model = build("dino_r50_4scale")
    with torch.no_grad():
        spoil(model, what)
    assert wrong(model, json.loads((COMPACT / "dino_r50_4scale.json").read_text()))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("configs/dino_r50_4scale.yaml", ["MODEL.DINO.SHARE_HEADS", "False"]),
        ("projects/deformable/configs/deformable_detr_r50_refine.yaml", []),
        ("projects/deformable/configs/deformable_detr_r50_two_stage.yaml", []),
        ("projects/deformable/configs/dab_deformable_detr_r50.yaml", []),
        ("projects/deformable/configs/dn_deformable_detr_r50.yaml", []),
    ],
)
def test_heads_of_their_own_start_alike(name: str, keys: list[str]) -> None:
    cfg = load_config(str(ROOT / name), ["MODEL.BACKBONE.NAME", "build_bare_backbone", "MODEL.DEVICE", "cpu", *keys])
    model = build_model(cfg)
    classes, boxes = list(model.class_embed), list(model.bbox_embed)
    assert len({id(head) for head in classes}) == len(classes) == len(boxes) == (7 if "two_stage" in name else 6)
    for head in classes:
        assert torch.equal(head.weight[: len(classes[0].weight)], classes[0].weight)
    for head in boxes:
        assert torch.equal(head.layers[0].weight, boxes[0].layers[0].weight)
        assert not head.layers[2].weight.any() and not head.layers[2].bias[:2].any()
    sizes = {tuple(head.layers[2].bias[2:].tolist()) for head in boxes[1:]}
    first = 0.0 if len(boxes) == 7 or "dino" in name else -2.0
    assert sizes == {(0.0, 0.0)} and boxes[0].layers[2].bias[2:].tolist() == [first, first]


@pytest.mark.parametrize("selection", ["mixed", "none"])
def test_dinos_heads_may_be_drawn_apart(selection: str) -> None:
    def parts(independent: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        cfg = load_config(str(ROOT / "configs" / "dino_quickstart.yaml"))
        cfg.MODEL.DEVICE, cfg.MODEL.DETR.NUM_CLASSES = "cpu", 91
        cfg.MODEL.DINO.QUERY_SELECTION, cfg.MODEL.DINO.INDEPENDENT_HEADS = selection, independent
        cfg.MODEL.DINO.SHARE_HEADS = False
        transformer = build_model(cfg).transformer
        heads = [*transformer.decoder.class_embed], [*transformer.decoder.bbox_embed]
        if selection != "none":
            heads[0].append(transformer.enc_out_class_embed)
            heads[1].append(transformer.enc_out_bbox_embed)
        assert all(not head.layers[-1].weight.any() for head in heads[1])
        return [head.weight for head in heads[0]], [layer.weight for head in heads[1] for layer in head.layers[:-1]]

    assert all(torch.equal(a, b) for a, b in itertools.pairwise(parts(False)[0]))
    classes, boxes = parts(True)
    assert len(classes) == len(boxes) // 2 == (3 if selection == "none" else 4)
    for weights in (classes, boxes):
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(weights, 2))
    # D 128, 91 classes: Xavier's deviation is sqrt(2 / (in + out)).
    assert [float(w.detach().std()) for w in classes] == pytest.approx([math.sqrt(2 / 219)] * len(classes), rel=0.05)
    assert [float(w.detach().std()) for w in boxes] == pytest.approx([math.sqrt(2 / 256)] * len(boxes), rel=0.05)
