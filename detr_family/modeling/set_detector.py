"""What all five detectors have in common: images in, losses or `Instances` out."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn
from typing_extensions import NotRequired, TypedDict

from detr_family.config import num_classes
from detr_family.layers.checkpointing import backbone_blocks, checkpoint_activations
from detr_family.layers.position_encoding import SinePositionEncoding
from detr_family.layers.shapes import nearest
from detr_family.modeling.criterion import ClassLoss, SetCriterion
from detr_family.modeling.freezing import freeze, keep_frozen_statistics, trained_though_matched
from detr_family.modeling.inputs import explain_boxes, images_of, instances_of, size_of
from detr_family.modeling.loading import refuse_half_a_checkpoint
from detr_family.modeling.matcher import ClassCost, HungarianMatcher
from detr_family.modeling.postprocessing import Selection, to_instances
from detr_family.modeling.structures import SetPrediction, Targets


class CommonArguments(TypedDict):
    """What every detector takes, beside what is its own: its constructor hands these on to `SetDetector`.

    From a configuration they come from `common_arguments`; without one they are keyword arguments like any other.

    Attributes:
        backbone: a Detectron2 backbone. Detectors of one feature map read its coarsest, deformable ones several.
        position_encoding: (B, H, W) mask -> (B, H, W, D), for the tokens of a feature map.
        num_classes: K, classes of the dataset, without no-object.
        aux_loss: train the sets of the earlier decoder layers too.
        matcher: pairs predictions with ground truth.
        criterion: the loss of matched pairs; where there are others, of denoised boxes and of proposals too.
        topk: detections per image (TEST.DETECTIONS_PER_IMAGE), at most as many as the detector can make.
        pixel_mean: three means, in the channel order of the input.
        pixel_std: three standard deviations.
        freeze: expressions for names of parameters that are not trained, see `detr_family.modeling.freezing.freeze`
            (MODEL.DETR.FREEZE). Left out: none.
        checkpoint: parts whose layers keep only their inputs for the backward pass, of BACKBONE, ENCODER, DECODER
            (MODEL.DETR.CHECKPOINT). Left out: none.
    """

    backbone: Backbone
    position_encoding: nn.Module
    num_classes: int
    aux_loss: bool
    matcher: HungarianMatcher
    criterion: SetCriterion
    topk: int
    pixel_mean: Sequence[float]
    pixel_std: Sequence[float]
    freeze: NotRequired[Sequence[str]]
    checkpoint: NotRequired[Collection[str]]


class SetDetector(nn.Module):
    """Normalises and pads images, makes targets, and turns predicted sets into Detectron2's results.

    A detector says how it predicts (`predict`); one that is trained with more than matched sets adds to `losses`. The
    last line of its constructor is `self.finish(TheClass)`, which freezes and checkpoints what it was told to; without
    it a detector that was told to refuses to run.

    Args:
        select: (logits, boxes, topk) -> scores, classes, boxes: see `detr_family.modeling.postprocessing`.
        backbone, position_encoding, ..., checkpoint: see `CommonArguments`.

    Attributes:
        allow_partial_weights: let `load_state_dict(..., strict=False)` fill some of the detector only; see
            `detr_family.modeling.loading`.

    Raises:
        ValueError: no class or no detection at all, or standard deviations that cannot be.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        select: Selection,
        backbone: Backbone,
        position_encoding: nn.Module,
        num_classes: int,
        aux_loss: bool,
        matcher: HungarianMatcher,
        criterion: SetCriterion,
        topk: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        freeze: Sequence[str] = (),
        checkpoint: Collection[str] = (),
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"a detector needs at least one class, got {num_classes} (MODEL.DETR.NUM_CLASSES)")
        if topk < 1:
            raise ValueError(f"a detector needs to give at least one detection, got {topk} (TEST.DETECTIONS_PER_IMAGE)")
        if not all(0 < x < float("inf") for x in pixel_std):
            raise ValueError(f"standard deviations must be above 0, got {list(pixel_std)} (MODEL.PIXEL_STD)")
        if len(pixel_std) not in (1, len(pixel_mean)):
            raise ValueError(
                f"{len(pixel_mean)} means and {len(pixel_std)} standard deviations were given (MODEL.PIXEL_MEAN, _STD)"
            )
        self.backbone = backbone
        self.position_encoding = position_encoding
        self.num_classes = num_classes
        self.aux_loss = aux_loss
        self.matcher = matcher
        self.criterion = criterion
        self.select = select
        self.topk = topk
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self._pixel_statistics = (tuple(pixel_mean), tuple(pixel_std))
        self.allow_partial_weights = False
        self.register_load_state_dict_pre_hook(refuse_half_a_checkpoint)
        self._to_freeze = tuple(freeze)
        self._to_checkpoint = tuple(checkpoint)
        self._finished = False

    def finish(self, of: type[SetDetector]) -> None:
        """Freeze and checkpoint what the arguments `freeze` and `checkpoint` say: the last line of a constructor.

        Args:
            of: the class whose constructor it is. A subclass that adds parameters in a constructor of its own calls
                `finish` with itself, again at the end.

        Raises:
            ValueError: an expression without a parameter, or a part that there is not.
        """
        self._finished = type(self).__init__ is of.__init__  # else a subclass's constructor is not through
        freeze(self, self._to_freeze, all_match=self._finished)
        if self._to_checkpoint:
            layers = self.checkpointable_layers()
            for part in self._to_checkpoint:
                if part not in layers:
                    raise ValueError(f"there is no part {part!r} to checkpoint; there are {', '.join(layers)}")
                checkpoint_activations(layers[part])
        self._to_checkpoint = ()

    def _check_finished(self) -> None:
        """Refuse to run with something trained, or kept in memory, that was not to be.

        Raises:
            TypeError: a constructor did not end with `finish`, and there was something to do.
        """
        if not self._finished:
            if self._to_checkpoint or trained_though_matched(self, self._to_freeze):
                name = type(self).__name__
                raise TypeError(
                    f"the constructor of {name} must end with self.finish({name}), which freezes and checkpoints what "
                    "MODEL.DETR.FREEZE and CHECKPOINT say"
                )
            self._finished = True

    def predict(self, images: ImageList, targets: Targets | None = None) -> SetPrediction:
        """The predicted sets of every decoder layer.

        Args:
            images: from `preprocess_image`.
            targets: in training, for detectors that learn to denoise them; the others do not look.
        """
        raise NotImplementedError

    def losses(self, prediction: SetPrediction, targets: Targets) -> dict[str, Tensor]:
        """Weighted losses whose sum is to be minimised, named as the papers' releases name them.

        Returns:
            `loss_ce`, `loss_bbox`, `loss_giou`, and with `aux_loss` the same with `_0`, `_1`, ... for the earlier
            decoder layers.
        """
        if not self.aux_loss:
            prediction = prediction.layers(-1)
        return self.criterion(prediction, targets, self.matcher(prediction, targets))

    @torch.compiler.disable(recursive=False)
    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Detectron2's contract for meta-architectures.

        Under torch.compile, what makes tensors of lists and `Instances` of tensors stays Python, as does matching:
        `detect`, and in training `predict`, are compiled whole.

        Args:
            batched_inputs: one dict per image with `image`, a (C, H, W) tensor of values in [0, 255] in
                the channel order of INPUT.FORMAT. In training `instances` with `gt_boxes` (pixels, xyxy) and
                `gt_classes`, possibly none at all; else optionally `height` and `width` of the result.

        Returns:
            In training a dict of weighted losses, else one `{"instances": Instances}` per image with
            `pred_boxes` (pixels of the result, clipped to it), `scores` and `pred_classes`.

        Raises:
            ValueError: an image without pixels, a label that the detector has no class for, a box that is not
                finite, training in 16 bits.
        """
        images, sizes = self._inputs(batched_inputs)
        if self.training:
            self._check_trainable()
            targets = self._targets(batched_inputs)
            return self._losses(self.predict(ImageList(images.tensor, sizes), targets), targets)
        detections = self.detect(images.tensor, sizes)
        return self._results(batched_inputs, detections, images)

    @torch.compiler.disable
    def _inputs(self, batched_inputs: list[dict[str, Any]]) -> tuple[ImageList, Any]:
        """The images, and their sizes as `detect` takes them: as numbers they would be compiled in."""
        images = self.preprocess_image(batched_inputs)
        if not self.has_padding(images):
            return images, None
        return images, torch.tensor(images.image_sizes).to(self.device, non_blocking=True)

    @torch.compiler.disable
    def _targets(self, batched_inputs: list[dict[str, Any]]) -> Targets:
        return self.targets(batched_inputs)

    @torch.compiler.disable
    def _losses(self, prediction: SetPrediction, targets: Targets) -> dict[str, Tensor]:
        return self.losses(prediction, targets)

    @torch.compiler.disable
    def _results(
        self, batched_inputs: list[dict[str, Any]], detections: tuple[Tensor, Tensor, Tensor], images: ImageList
    ) -> list[dict[str, Instances]]:
        """What `detect` found as `Instances` of the size that is asked for."""
        results = []
        for x, instances in zip(batched_inputs, to_instances(*detections, images.image_sizes), strict=True):
            try:
                instances = detector_postprocess(instances, *size_of(x, instances.image_size))
            except AssertionError as error:  # Detectron2's
                raise ValueError(
                    f"the predicted boxes are not finite: {explain_boxes(batched_inputs, self)}"
                ) from error
            results.append({"instances": instances})
        return results

    def detect(self, images: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Tensors in, tensors out: the part of an evaluation that is compiled and exported.

        Args:
            images: (B, 3, H, W), normalised, zeros in the padding.
            sizes: (B, 2) int64, height and width that each image fills; None where none is padded.

        Returns:
            scores (B, k) in descending order, classes (B, k), and boxes (B, k, 4) as cxcywh in [0, 1] of the unpadded
            image.
        """
        prediction = self.predict(ImageList(images, sizes))
        return self.select(prediction.logits, prediction.boxes, self.topk)

    def compile(self, **options: Any) -> None:
        """`detect` through torch.compile from now on, for any size of image; training runs as before.

        What stands before and after it, lists of images and Detectron2's `Instances`, is no tensor arithmetic. There
        are a few graphs: of one image or several, padded or not; the images' sizes add none.

        Args:
            options: of torch.compile; by default `fullgraph=True, dynamic=True`.
        """
        compiled: Any = torch.compile(type(self).detect, **{"fullgraph": True, "dynamic": True, **options})
        self.detect = functools.partial(compiled, self)  # type: ignore[method-assign]

    def train(self, mode: bool = True) -> SetDetector:
        """Training or evaluation mode; batch norms with frozen weights keep their statistics in both."""
        super().train(mode)
        keep_frozen_statistics(self)
        return self

    def checkpointable_layers(self) -> dict[str, list[nn.Module]]:
        """Keys of MODEL.DETR.CHECKPOINT with the layers that each checkpoints."""
        transformer: Any = self.transformer
        return {
            "BACKBONE": backbone_blocks(self.backbone),
            "ENCODER": list(transformer.encoder.layers),
            "DECODER": list(transformer.decoder.layers),
        }

    @property
    def device(self) -> torch.device:
        """Where the images go."""
        return self.pixel_mean.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, as `half`, `to` or weights of another type set it; images are handed on in it.

        Positions, references and boxes are computed in float32 whatever it is.
        """
        weights = (x.dtype for x in self.backbone.parameters() if x.is_floating_point())
        return next(weights, self.pixel_mean.dtype)

    def normalize(self, pixels: Tensor) -> Tensor:
        """(..., C, H, W) values in [0, 255] -> the same, normalised in float32 or better, in the model's type."""
        mean, std = self.pixel_mean, self.pixel_std
        if self.dtype.itemsize < 4:  # 123.675 is 123.5 in bfloat16
            mean, std = (pixels.new_tensor(x, dtype=torch.float32).view(-1, 1, 1) for x in self._pixel_statistics)
        return ((pixels.to(mean.dtype) - mean) / std).to(self.dtype)

    def _check_trainable(self) -> None:
        """Refuse weights of 16 bits: a step of the learning rate is lost in their rounding.

        Raises:
            ValueError: the weights have 16 bits.
        """
        if self.dtype.itemsize < 4:
            raise ValueError(
                f"the detector's weights are {self.dtype}, too coarse for the steps of a training: call model.float(), "
                "and for mixed precision set SOLVER.AMP.ENABLED True (or run it under torch.autocast)"
            )

    def preprocess_image(self, batched_inputs: Sequence[dict[str, Any]]) -> ImageList:
        """Normalise the images and pad them with zeros, at the right and below, to one size.

        Returns:
            `ImageList` whose tensor is (B, C, H, W) in the model's type.

        Raises:
            ValueError: see `images_of`.
            TypeError: the detector's constructor should have ended with `finish`.
        """
        self._check_finished()
        images = [
            self.normalize(image.to(self.device, non_blocking=True))
            for image in images_of(batched_inputs, len(self.pixel_mean))
        ]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    @staticmethod
    def padding_mask(images: ImageList) -> Tensor:
        """(B, H, W) bool, True where a pixel is padding.

        The sizes of `images` are pairs of ints; where they are not known to the host, as in an exported graph, one
        (B, 2) tensor (or one of (2,) per image, as Detectron2 has them while tracing).
        """
        height, width = images.tensor.shape[-2:]
        device = images.tensor.device
        sizes = images.image_sizes
        if sizes is None:  # see `detect`
            return torch.zeros(images.tensor.shape[0], height, width, dtype=torch.bool, device=device)
        if not isinstance(sizes, Tensor):
            sizes = torch.stack(sizes) if _on_device(sizes) else torch.as_tensor(sizes)  # B x 2
        sizes = sizes.to(device, non_blocking=True)
        below = torch.arange(height, device=device)[None, :, None] >= sizes[:, 0, None, None]
        right = torch.arange(width, device=device)[None, None, :] >= sizes[:, 1, None, None]
        return below | right

    @staticmethod
    def has_padding(images: ImageList) -> bool:
        """Whether any image is smaller than the batch's tensor, known without asking the device.

        Sizes in a tensor are not looked at: there may be padding.
        """
        if images.image_sizes is None:
            return False
        if isinstance(images.image_sizes, Tensor) or _on_device(images.image_sizes):
            return True
        height, width = images.tensor.shape[-2:]
        return any((h, w) != (height, width) for h, w in images.image_sizes)

    @staticmethod
    def level_mask(mask: Tensor, feature: Tensor) -> Tensor:
        """The image's mask at a feature map's size, by the nearest pixel as in the releases.

        The first token of an image is never padding, so that no attention finds every key masked.

        Args:
            mask: (B, H, W) bool.
            feature: (B, C, h, w).

        Returns:
            (B, h, w) bool.
        """
        return nearest(mask, feature.shape[-2:])

    def targets(self, batched_inputs: Sequence[dict[str, Any]]) -> Targets:
        """Ground truth of a batch, checked on the host before it can do harm on the device."""
        return Targets.from_instances(instances_of(batched_inputs, self.num_classes), self.device)


def at_least_one(num_queries: int) -> int:
    """The number of queries, refused with a ValueError below 1."""
    if num_queries < 1:
        raise ValueError(f"a detector needs at least one query, got {num_queries} (MODEL.DETR.NUM_QUERIES)")
    return num_queries


def _on_device(sizes: Sequence[Any]) -> bool:
    """Whether the sizes of images are tensors, as while tracing."""
    return any(isinstance(size, Tensor) for size in sizes)


def sine_encoding(cfg: CfgNode, *, offset: float | None = None) -> SinePositionEncoding:
    """The spatial encoding that MODEL.DETR.SPATIAL_ENCODING.TEMPERATURE and OFFSET say.

    Args:
        cfg: Detectron2's configuration with detr_family's keys.
        offset: of the tokens' places, see `SinePositionEncoding`, in place of the key's.
    """
    encoding = cfg.MODEL.DETR.SPATIAL_ENCODING
    return SinePositionEncoding(
        cfg.MODEL.DETR.HIDDEN_DIM,
        temperature_x=encoding.TEMPERATURE,
        temperature_y=encoding.TEMPERATURE,
        offset=encoding.OFFSET if offset is None else offset,
    )


def inverse_sigmoid_eps(cfg: CfgNode, paper: float) -> float:
    """MODEL.DETR.INVERSE_SIGMOID_EPS, or where that is 0 the paper's own.

    Raises:
        ValueError: it cannot be.
    """
    eps: float = cfg.MODEL.DETR.INVERSE_SIGMOID_EPS
    if not 0 <= eps < 0.5:
        raise ValueError(f"MODEL.DETR.INVERSE_SIGMOID_EPS is {eps}; it must be at least 0 and less than 0.5")
    return eps or paper


def common_arguments(
    cfg: CfgNode, *, position_encoding: nn.Module, class_cost: ClassCost, class_loss: ClassLoss
) -> CommonArguments:
    """What every detector's `from_config` reads alike.

    Args:
        cfg: Detectron2's configuration with detr_family's keys.
        position_encoding: the paper's, see `CommonArguments`.
        class_cost: the paper's class term of the matching.
        class_loss: the paper's class loss.
    """
    detr = cfg.MODEL.DETR
    classes = num_classes(cfg)
    return {
        "backbone": build_backbone(cfg),
        "position_encoding": position_encoding,
        "num_classes": classes,
        "aux_loss": detr.AUX_LOSS,
        "matcher": HungarianMatcher(
            class_cost=class_cost, cost_class=detr.COST.CLASS, cost_l1=detr.COST.L1, cost_giou=detr.COST.GIOU
        ),
        "criterion": SetCriterion(
            class_loss=class_loss,
            background=classes,
            weight_class=detr.LOSS.CLASS,
            weight_l1=detr.LOSS.L1,
            weight_giou=detr.LOSS.GIOU,
        ),
        "topk": cfg.TEST.DETECTIONS_PER_IMAGE,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
        "freeze": detr.FREEZE,
        "checkpoint": [part for part, wanted in detr.CHECKPOINT.items() if wanted],
    }
