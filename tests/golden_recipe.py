"""Deterministic weights and inputs, by name and shape alone (numpy PCG64: the same on every machine)."""

import math
import zlib

import numpy as np


def rng(key):
    return np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))


def fill(name, shape):
    """The value of the parameter or buffer called `name` (official checkpoint naming), float32.

    Class heads are as training leaves them: the rows that no COCO category uses never fire.
    """
    value = _fill(name, shape)
    if "class_embed" in name and shape and shape[0] in (91, 92):
        value[UNUSED] = 0.0 if len(shape) > 1 else -20.0
    return value


def _fill(name, shape):
    r = rng(name)
    shape = tuple(shape)
    z = r.standard_normal(shape).astype(np.float32) if shape else np.float32(r.standard_normal())
    if name.endswith("running_var"):
        return (1.0 + 0.2 * np.abs(z)).astype(np.float32)
    if name.endswith("running_mean"):
        return (0.1 * z).astype(np.float32)
    if len(shape) >= 2:
        if (
            ("embed" in name and "bbox_embed" not in name and "class_embed" not in name and "input_proj" not in name)
            or name.endswith("query_feat.weight")
            or "tgt_embed" in name
            or "label_enc" in name
        ):
            return z  # embedding tables: unit normal
        fan_in = int(np.prod(shape[1:]))
        gain = 1.0
        if "backbone" in name:
            gain = math.sqrt(2.0) * 0.7
        elif (
            "in_proj" in name
            or "qcontent" in name
            or "kcontent" in name
            or "qpos" in name
            or "kpos" in name
            or "query_scale" in name
        ):
            gain = 2.5  # sharp attention, so that queries differ
        return (z * (gain / math.sqrt(fan_in))).astype(np.float32)
    if name.endswith("weight"):  # 1-d weights: norms
        return (1.0 + 0.1 * z).astype(np.float32)
    if "class_embed" in name:
        return (0.1 * z - 4.6).astype(np.float32)  # the focal-loss prior
    return (0.1 * z).astype(np.float32)  # biases and the rest


def image(key, h, w):
    """A smooth uint8 RGB image of shape (h, w, 3) with some texture."""
    r = rng("image:" + key)
    yy, xx = np.mgrid[0:h, 0:w].astype(np.float64)
    out = np.zeros((h, w, 3))
    for c in range(3):
        acc = np.zeros((h, w))
        for _ in range(6):
            fy, fx, ph = r.uniform(0.005, 0.12), r.uniform(0.005, 0.12), r.uniform(0, 6.28)
            acc += r.uniform(0.3, 1.0) * np.sin(fy * yy + fx * xx + ph)
        out[..., c] = acc
    for _ in range(5):
        y, x = r.integers(0, h), r.integers(0, w)
        hh, ww = r.integers(h // 8, h // 2), r.integers(w // 8, w // 2)
        out[y : y + hh, x : x + ww] += r.uniform(-3, 3, size=3)
    out = (out - out.min()) / (out.max() - out.min())
    return np.round(out * 255).astype(np.uint8)


def targets(key, h, w, n, num_classes):
    """`n` boxes (xyxy, pixels, float32) and labels in [0, num_classes)."""
    r = rng("targets:" + key)
    c = r.uniform([0.2 * w, 0.2 * h], [0.8 * w, 0.8 * h], size=(n, 2))
    s = r.uniform([0.08 * w, 0.08 * h], [0.36 * w, 0.36 * h], size=(n, 2))
    boxes = np.concatenate([c - s / 2, c + s / 2], 1).astype(np.float32)
    return boxes, r.integers(0, num_classes, size=n).astype(np.int64)


# The 80 COCO category ids, in order: contiguous class i is category COCO_IDS[i].
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
UNUSED = [i for i in range(91) if i not in COCO_IDS]  # rows of a published class head that no category uses

IMAGES = [("a", 240, 331, 4), ("b", 288, 217, 2)]  # key, height, width, number of boxes
