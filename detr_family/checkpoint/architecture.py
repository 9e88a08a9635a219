"""Which published architecture a state dict is of, and so which config file it belongs to."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_SWIN_SIZES = {(96, 6): "t", (96, 18): "s", (128, 18): "b", (192, 18): "l"}  # width, blocks of the third stage


def config_file(state: Mapping[str, Tensor], *, dilated: bool = False, folder: str = "") -> str:
    """The config file of the published detector that has such names and shapes.

    Args:
        state: under the names here.
        dilated: whether the backbone's last stage is dilated (DC5), which weights do not tell.
        folder: where within configs/ the origin has its own, with a slash at the end.

    Returns:
        A path from the repository's root. There may be several of one architecture, of other lengths of training.
    """
    detector, home = _detector(state)
    parts = [detector, _backbone(state)]
    if detector == "dino":
        parts.append(f"{len(state['transformer.level_embed'])}scale")
    if dilated:
        parts.append("dc5")
    if "transformer.patterns.weight" in state:
        parts.append(f"{len(state['transformer.patterns.weight'])}pat")
    if home and "transformer.enc_output.weight" in state:
        parts.append("two_stage")
    elif detector == "deformable_detr" and any(x.startswith("transformer.decoder.bbox_embed.") for x in state):
        parts.append("refine")
    return f"{home}configs/{folder}{'_'.join(filter(None, parts))}.yaml"


def _detector(state: Mapping[str, Tensor]) -> tuple[str, str]:
    """The detector's name, and the folder of the project that has it."""
    denoising, anchors = "label_enc.weight" in state, "refpoint_embed.weight" in state
    points = "transformer.decoder.ref_point_head.layers.0.weight" in state
    if "transformer.level_embed" in state:
        if "transformer.decoder.norm.weight" in state:
            return "dino", ""
        kind = "dn_" if denoising else "dab_" if points else ""
        return f"{kind}deformable_detr", "projects/deformable/"
    if anchors:
        return ("dn_detr" if denoising else "dab_detr"), ""
    return ("conditional_detr" if points else "detr"), ""


def _backbone(state: Mapping[str, Tensor]) -> str:
    if "backbone.patch_embed.proj.weight" in state:
        blocks = {name.split(".")[4] for name in state if name.startswith("backbone.layers.2.blocks.")}
        size = _SWIN_SIZES.get((len(state["backbone.patch_embed.proj.weight"]), len(blocks)), "")
        table = state.get("backbone.layers.0.blocks.0.attn.relative_position_bias_table")
        small_windows = table is not None and len(table) == (2 * 7 - 1) ** 2
        return f"swin_{size}" + ("_224" if size in ("b", "l") and small_windows else "")
    return "r101" if "backbone.res4.22.conv1.weight" in state else "r50"
