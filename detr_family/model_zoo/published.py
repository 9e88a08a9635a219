"""What the papers published of each configuration: AP on COCO val2017, GFLOPs, parameters. No figure of our own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# The papers up to DN-DETR give the mean over the first 100 images of COCO val2017, shorter side 800, longer at most
# 1333. These have 889 thousand pixels on average, as an image of this size has; the square of the number of tokens, on
# which attention depends, is larger by 1 % on average than that of the average.
MEAN_IMAGE = (800, 1111)
# DINO's paper does not say of which images its figures are. Both that can be counted here, DN-Deformable-DETR's and
# its own, are those of this size, to 1 %.
LARGER_IMAGE = (800, 1280)

_R101 = "R101 is 80 more than R50 in this paper's tables, in DETR's and Conditional DETR's and counted 66"


@dataclass(frozen=True)
class Published:
    """One row of a paper's table.

    Attributes:
        ap: AP, AP50, AP75, APs, APm, APl on COCO val2017, in percent; fewer where the paper gives fewer.
        epochs: length of the training; None where it is not that of the figure alone.
        gflops: of a forward pass, in billions of multiply-adds.
        params: trainable parameters, in millions.
        file: the authors' released file.
        released: AP of that file as its authors give it, where it is not the paper's, in percent.
        size: height and width of the image that the GFLOPs are of, pixels.
        why: where what is counted here differs by more than rounding, the reason.
    """

    ap: tuple[float, ...] = ()
    epochs: int | None = None
    gflops: float | None = None
    params: float | None = None
    file: str = ""
    size: tuple[int, int] = MEAN_IMAGE
    why: str = ""
    released: float | None = None


PUBLISHED: dict[str, Published] = {
    "detr_r50": Published((42.0, 62.4, 44.2, 20.5, 45.8, 61.1), 500, 86, 41, "detr-r50-e632da11.pth"),
    "detr_r50_dc5": Published((43.3, 63.1, 45.9, 22.5, 47.3, 61.1), 500, 187, 41, "detr-r50-dc5-f0fb7ef5.pth"),
    "detr_r101": Published((43.5, 63.8, 46.4, 21.9, 48.0, 61.8), 500, 152, 60, "detr-r101-2c7b67e5.pth"),
    "detr_r101_dc5": Published((44.9, 64.7, 47.7, 23.7, 49.5, 62.3), 500, 253, 60, "detr-r101-dc5-a2e86def.pth"),
    "conditional_detr_r50": Published(
        (40.9, 61.8, 43.3, 20.8, 44.6, 59.2), 50, 90, 44, "ConditionalDETR_r50_epoch50.pth", released=41.0
    ),
    "conditional_detr_r50_dc5": Published(
        (43.8, 64.4, 46.7, 24.0, 47.6, 60.7), 50, 195, 44, "ConditionalDETR_r50dc5_epoch50.pth", released=43.7
    ),
    "conditional_detr_r101": Published(
        (42.8, 63.7, 46.0, 21.7, 46.6, 60.9), 50, 156, 63, "ConditionalDETR_r101_epoch50.pth"
    ),
    "conditional_detr_r101_dc5": Published(
        (45.0, 65.5, 48.4, 26.1, 48.9, 62.8), 50, 262, 63, "ConditionalDETR_r101dc5_epoch50.pth"
    ),
    "dab_detr_r50": Published((42.2, 63.1, 44.7, 21.5, 45.7, 60.3), 50, 94, 44, "R50, checkpoint.pth"),
    "dab_detr_r50_3pat": Published(
        (42.6, 63.2, 45.6, 21.8, 46.2, 61.1), 50, 100, 44, "R50, three patterns, checkpoint.pth"
    ),
    "dab_detr_r50_dc5": Published((44.5, 65.1, 47.7, 25.3, 48.2, 62.3), 50, 202, 44, "R50-DC5, checkpoint.pth"),
    "dab_detr_r50_dc5_3pat": Published(
        (45.7, 66.2, 49.0, 26.1, 49.4, 63.1), 50, 216, 44, "R50-DC5, three patterns, checkpoint.pth"
    ),
    "dab_detr_r101": Published((43.5, 63.9, 46.6, 23.6, 47.3, 61.5), 50, 174, 63, why=_R101),
    "dab_detr_r101_dc5": Published((45.8, 65.9, 49.3, 27.0, 49.8, 63.8), 50, 282, 63, why=_R101),
    "dn_detr_r50": Published((44.1, 64.4, 46.7, 22.9, 48.0, 63.4), 50, 94, 44, "R50, checkpoint.pth", released=44.4),
    "dn_detr_r101": Published((45.2, 65.5, 48.3, 24.1, 49.1, 65.1), 50, 174, 63, why=_R101),
    "dn_detr_r50_dc5": Published((46.3, 66.4, 49.7, 26.7, 50.0, 64.3), 50, 202, 44, "R50-DC5, checkpoint.pth"),
    "dn_detr_r101_dc5": Published((47.3, 67.5, 50.8, 28.6, 51.5, 65.0), 50, 282, 63, why=_R101),
    "dino_r50_4scale": Published(
        (49.0, 66.6, 53.5, 32.0, 52.3, 63.0), 12, 279, 47, "checkpoint0011_4scale.pth", LARGER_IMAGE
    ),
    "dino_r50_5scale": Published(
        (49.4, 66.9, 53.8, 32.3, 52.5, 63.9), 12, 860, 47, "checkpoint0011_5scale.pth", LARGER_IMAGE
    ),
    "dino_swin_l_4scale": Published((56.8,), 12, None, 218, "Swin-L, 4 scales"),
    "dino_swin_l_5scale": Published((57.3,), 12, None, 218, "Swin-L, 5 scales"),
    "dino_swin_l_4scale_o365_ft": Published((63.1,), 18, None, 218),
    "deformable_detr_r50": Published(
        (43.8, 62.6, 47.7, 26.4, 47.1, 58.0), 50, 173, 40, "r50_deformable_detr-checkpoint.pth", released=44.5
    ),
    # The papers of DAB-DETR and DN-DETR have 46.9, 48.6 and (12 epochs) 43.4 AP of another architecture, with
    # deformable attention in the encoder only. Of this one, the releases' "v2", there is what the authors' files reach.
    "dab_deformable_detr_r50": Published((48.7,), 50, file="DAB-Deformable-DETR-R50-v2, checkpoint.pth"),
    "dn_deformable_detr_r50": Published(
        (49.5,), 50, 265, 48, "DN-DAB-Deformable-DETR-R50-v2, checkpoint.pth", LARGER_IMAGE
    ),
}


def figures_of(config_file: str) -> Published | None:
    """What a paper published of a configuration; None where it did not, as of detrex's, which are named like ours.

    Args:
        config_file: a file or a name.
    """
    path = Path(config_file)
    return None if path.parent.name == "detrex" else PUBLISHED.get(path.stem)
