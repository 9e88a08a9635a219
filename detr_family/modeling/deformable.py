"""Encoder and decoder layers over several feature levels: what Deformable DETR (arXiv 2010.04159) gave to DINO.

- The tokens of all levels, flattened one behind the other, are one sequence; queries look at a few sampled points of
  every level in place of all tokens (`detr_family.layers.deformable_attention`).
- Coarser levels than the backbone's come from strided convolutions (section 4.1, appendix A.2).
- A learned vector tells a token which level it is of (section 4.1).
- The encoder can propose the decoder's first boxes, one for every token (two-stage, section 4.2 and appendix A.4).

How decoder layers are strung together is each paper's own. Sizes of the levels are lists of (height, width): nothing
here waits for the device. Parameter names are the releases'. Letters: B images, Q queries, D channels, L levels,
S tokens of all levels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from torch import Tensor, nn
from typing_extensions import Unpack

from detr_family.layers.deformable_attention import MSDeformAttn
from detr_family.layers.fused import feed_forward
from detr_family.layers.shapes import nearest
from detr_family.modeling.transformer import LayerArguments, xavier_matrices


@dataclass
class Levels:
    """How the tokens of a batch lie in their images.

    Images are padded at the right and below, so an image fills the same share of every level, up to rounding.

    Attributes:
        shapes: (height, width) of each level in tokens, finest first.
        padding: (B, S) bool, True = padding; None where no image of the batch is padded.
        valid_ratios: (B, L, 2), the share x, y of each level that the image fills.
        centres: (B, S, 2), the tokens' centres x, y in [0, 1] of the unpadded image; above 1 in the padding.
    """

    shapes: list[tuple[int, int]]
    padding: Tensor | None
    valid_ratios: Tensor
    centres: Tensor

    @classmethod
    def from_masks(cls, masks: Sequence[Tensor], *, padded: bool) -> Levels:
        """Describe levels by their masks.

        Args:
            masks: (B, H, W) bool per level, True = padding; the first token of an image is never padding.
            padded: whether any token is padding, as the host knows from the images' sizes.
        """
        ratios, centres = [], []
        for mask in masks:
            height, width = mask.shape[1:]
            valid_x, valid_y = (~mask[:, 0]).sum(1).float(), (~mask[:, :, 0]).sum(1).float()  # B
            x = torch.arange(width, dtype=torch.float32, device=mask.device) + 0.5
            y = torch.arange(height, dtype=torch.float32, device=mask.device) + 0.5
            grid = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).flatten(0, 1)  # HW x 2
            centres.append(grid / torch.stack([valid_x, valid_y], -1)[:, None])
            ratios.append(torch.stack([valid_x / width, valid_y / height], -1))
        return cls(
            shapes=[(mask.shape[1], mask.shape[2]) for mask in masks],
            padding=torch.cat([mask.flatten(1) for mask in masks], 1) if padded else None,
            valid_ratios=torch.stack(ratios, 1),
            centres=torch.cat(centres, 1),
        )

    @property
    def starts(self) -> list[int]:
        """The first token of each level."""
        return list(itertools.accumulate((h * w for h, w in self.shapes[:-1]), initial=0))

    def on_levels(self, reference: Tensor) -> Tensor:
        """Points or boxes of the unpadded image, in the coordinates of each level with its padding.

        Args:
            reference: (B, Q, 2) as x, y or (B, Q, 4) as x, y, w, h.

        Returns:
            (B, Q, L, 2 or 4).
        """
        ratios = self.valid_ratios if reference.shape[-1] == 2 else self.valid_ratios.repeat(1, 1, 2)
        return reference[:, :, None] * ratios[:, None]

    def proposals(self) -> tuple[Tensor, Tensor]:
        """A box on every token, of a size that doubles from level to level (appendix A.4).

        Returns:
            (B, S, 4) boxes x, y, w, h before the sigmoid, and (B, S) bool, whether a token may propose at all: one
            that is no padding and whose box has centre and size within (0.01, 0.99). Where it may not, the box is
            infinite.
        """
        size = torch.cat([self.centres.new_full((h * w,), 0.05 * 2.0**i) for i, (h, w) in enumerate(self.shapes)])
        boxes = torch.cat([self.centres, size[:, None].expand(self.centres.shape[0], -1, 2)], -1)  # B x S x 4
        # A centre of just 0.99, as of 50 tokens the last, is not within, however a runtime rounds quotients.
        usable = ((boxes > 0.01 + 1e-6) & (boxes < 0.99 - 1e-6)).all(-1)
        if self.padding is not None:
            usable = usable & ~self.padding
        logits = (boxes / (1 - boxes)).log().masked_fill(~usable[..., None], torch.inf)
        return logits, usable


class MaskedGroupNorm(nn.GroupNorm):
    """Group normalisation (arXiv 1803.08494) whose mean and variance may leave out padding."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, H, W), and (B, H, W) bool with True = padding that does not count -> (B, C, H, W)."""
        if mask is None:
            return super().forward(x)
        valid = (~mask)[:, None, None]  # B x 1 x 1 x H x W
        groups = x.unflatten(1, (self.num_groups, -1))  # B x G x C/G x H x W
        if x.dtype.itemsize < 4:  # float16 ends at 65504, fewer than there may be pixels
            groups = groups.float()
        count = valid.sum((2, 3, 4), keepdim=True) * groups.shape[2]
        mean = (groups * valid).sum((2, 3, 4), keepdim=True) / count
        variance = ((groups - mean).square() * valid).sum((2, 3, 4), keepdim=True) / count
        x = ((groups - mean) * (variance + self.eps).rsqrt()).flatten(1, 2)
        return (x * self.weight[:, None, None] + self.bias[:, None, None]).to(self.weight.dtype)


class LevelProjection(nn.Sequential):
    """A convolution and the normalisation of its output.

    Args:
        convolution: its weight starts from Xavier's values, its bias from zeros.
        norm: may leave out padding.
    """

    def __init__(self, convolution: nn.Conv2d, norm: MaskedGroupNorm) -> None:
        super().__init__(convolution, norm)
        for parameter in convolution.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, h, w), and (B, H, W) bool with True = padding that does not count -> (B, D, H, W)."""
        return self[1](self[0](x), mask)


class LevelProjections(nn.ModuleList):
    """Feature maps to D channels each, and further levels from strided convolutions (appendix A.2).

    The first further level comes from the backbone's coarsest map, each next one from the one before. Every
    projection is normalised in groups of 8 channels (32 groups at the papers' 256).

    Args:
        channels: of the backbone's maps, finest first.
        dim: D, a multiple of 4.
        num_levels: L. Where the backbone has more maps than that, the coarsest L are used.
        ignore_padding: padding does not count in the statistics of the normalisation and is not read by strided
            convolutions, so that an image's features do not depend on what it is batched with. The releases: False.
    """

    def __init__(self, channels: Sequence[int], dim: int, num_levels: int, *, ignore_padding: bool) -> None:
        super().__init__()
        self.num_levels = num_levels
        self.num_maps = min(len(channels), num_levels)
        self.ignore_padding = ignore_padding
        convolutions = [nn.Conv2d(c, dim, kernel_size=1) for c in channels[-self.num_maps :]]
        for i in range(num_levels - self.num_maps):
            convolutions.append(nn.Conv2d(dim if i else channels[-1], dim, kernel_size=3, stride=2, padding=1))
        for convolution in convolutions:
            self.append(LevelProjection(convolution, MaskedGroupNorm(dim // (4 if dim % 8 else 8), dim)))

    def forward(self, maps: Sequence[Tensor], mask: Tensor, *, padded: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Project.

        Args:
            maps: the backbone's, (B, C, H, W) each, finest first.
            mask: (B, H, W) bool of the images' pixels, True = padding.
            padded: whether any pixel is padding, as the host knows.

        Returns:
            (B, D, H, W) per level, and (B, H, W) bool masks of the same sizes, by the nearest pixel as in the
            releases: the first token of an image is never padding.
        """
        maps = maps[-self.num_maps :]
        sizes = [x.shape[-2:] for x in maps]
        while len(sizes) < self.num_levels:
            sizes.append(torch.Size([(sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2]))
        masks = [nearest(mask, size) for size in sizes]

        apart = padded and self.ignore_padding
        projected: list[Tensor] = []
        for i, projection in enumerate(self):
            x = maps[min(i, self.num_maps - 1)] if i <= self.num_maps else projected[-1]
            if apart and i >= self.num_maps:  # a strided convolution would see the padding
                x = x.masked_fill(masks[i - 1][:, None], 0.0)
            projected.append(projection(x, masks[i] if apart else None))
        return projected, masks


def level_tokens(detector: Any, images: ImageList) -> dict[str, Any]:
    """What a transformer on several feature levels reads of the images.

    Args:
        detector: with the names of its feature maps, `features`, finest first; their projections, `input_proj`; and a
            transformer with a learned vector of each level, `level_embed`.
        images: from `preprocess_image`.

    Returns:
        `tokens` (B, S, D), the levels one behind the other, each row by row; `position` (B, S, D), the spatial encoding
        of their places and the learned vector of their level; and how they lie, `levels`.
    """
    features = detector.backbone(images.tensor)
    padded = detector.has_padding(images)
    maps, masks = detector.input_proj(
        [features[name] for name in detector.features], detector.padding_mask(images), padded=padded
    )
    encodings = [detector.position_encoding(mask) for mask in masks]
    return {
        "tokens": flatten_levels(maps),
        "position": level_position(encodings, detector.transformer.level_embed).to(images.tensor.dtype),
        "levels": Levels.from_masks(masks, padded=padded),
    }


def flatten_levels(maps: Sequence[Tensor]) -> Tensor:
    """(B, D, H, W) per level -> (B, S, D), the levels one behind the other, each row by row."""
    return torch.cat([x.flatten(2) for x in maps], 2).transpose(1, 2)


def level_position(encodings: Sequence[Tensor], level_embed: Tensor) -> Tensor:
    """Where a token is: the spatial encoding of its place and the learned vector of its level.

    Args:
        encodings: (B, H, W, D) per level.
        level_embed: (L, D).

    Returns:
        (B, S, D).
    """
    return torch.cat([x.flatten(1, 2) + level for x, level in zip(encodings, level_embed, strict=True)], 1)


def best_tokens(scores: Tensor, usable: Tensor, count: int, *, ignore_padding: bool) -> tuple[Tensor, Tensor]:
    """The tokens of highest score, padding never among them.

    Args:
        scores: (B, S); of a token that is not usable, the score of a memory of zeros.
        usable: (B, S) bool, as `Levels.proposals` says.
        count: Q.
        ignore_padding: only usable tokens compete. False: as in the releases, where the score of zeros is better than
            that of a usable token, a place that could have been the latter's stays empty: so an image's tokens
            compete with its padding.

    Returns:
        (B, Q) int64 indices, best first, and (B, Q) bool, whether there is a token at all: an empty place is to have a
        memory of zeros and an infinite box. An image with fewer tokens than Q has empty places, too.
    """
    if ignore_padding:
        scores = scores.masked_fill(~usable, -torch.inf)
    # With `count` tokens more that are never better, there are enough of them whatever the image's size is.
    index = F.pad(scores, (0, count), value=-torch.inf).topk(count, 1).indices
    found = F.pad(usable, (0, count)).gather(1, index)
    return index.masked_fill(index >= scores.shape[1], 0), found


def take_tokens(x: Tensor, index: Tensor, found: Tensor, empty: float) -> Tensor:
    """(B, S, C), and indices and places of `best_tokens` -> (B, Q, C), `empty` where a place is empty."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1])).masked_fill(~found[..., None], empty)


class DeformableEncoder(nn.Module):
    """A stack of `DeformableEncoderLayer`.

    Args:
        layers: the layers, first to last.
    """

    def __init__(self, layers: Sequence[DeformableEncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, tokens: Tensor, *, position: Tensor, levels: Levels) -> Tensor:
        """(B, S, D) tokens and their encoding (B, S, D) -> (B, S, D) memory."""
        reference = levels.on_levels(levels.centres)
        for layer in self.layers:
            tokens = layer(tokens, position=position, reference=reference, levels=levels)
        return tokens


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each with a residual connection and a norm after it.

    Args:
        dim: D.
        num_heads: attention heads.
        feedforward_dim: width of the hidden layer.
        dropout: probability in both sublayers.
        num_levels: L.
        num_points: points that a head samples on each level.
        activation: between the two linear layers.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float,
        *,
        num_levels: int,
        num_points: int,
        activation: nn.Module,
    ) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(embed_dim=dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.activation = activation

    def forward(self, tokens: Tensor, *, position: Tensor, reference: Tensor, levels: Levels) -> Tensor:
        """Encode one layer further.

        Args:
            tokens: (B, S, D).
            position: (B, S, D), added to the queries.
            reference: (B, S, L, 2), each token's own place on every level.
            levels: how the tokens lie.

        Returns:
            (B, S, D).
        """
        seen = self.self_attn(tokens + position, reference, tokens, levels.shapes, levels.starts, levels.padding)
        tokens = self.norm1(tokens + self.dropout(seen))
        seen = feed_forward(tokens, self.linear1, self.activation, self.dropout, self.linear2)
        return self.norm2(tokens + self.dropout(seen))


class DeformableDecoderLayer(nn.Module):
    """Self-attention of the queries, deformable cross-attention to the memory, a feed-forward network.

    The norms are numbered as in the releases: norm2 stands after the self-attention, norm1 after the cross-attention.

    Args:
        dim: D.
        num_heads: attention heads.
        feedforward_dim: width of the hidden layer.
        dropout: probability in the three sublayers and in the self-attention's weights.
        num_levels: L.
        num_points: points that a head samples on each level.
        activation: between the two linear layers.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float,
        *,
        num_levels: int,
        num_points: int,
        activation: nn.Module,
    ) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attn = MSDeformAttn(embed_dim=dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.activation = activation

    def forward(
        self,
        content: Tensor,
        memory: Tensor,
        *,
        position: Tensor,
        reference: Tensor,
        levels: Levels,
        blocked: Tensor | None,
    ) -> Tensor:
        """Decode one layer further.

        Args:
            content: (B, Q, D) decoder embeddings.
            memory: (B, S, D).
            position: (B, Q, D), added to queries and keys of the self-attention and to queries of the
                cross-attention.
            reference: (B, Q, L, 2) points or (B, Q, L, 4) boxes on every level, see `Levels.on_levels`.
            levels: how the memory's tokens lie.
            blocked: (Q, Q) bool, True = this query does not see that one; None where all do.

        Returns:
            (B, Q, D).
        """
        q = k = content + position
        seen = self.self_attn(q, k, content, attn_mask=blocked, need_weights=False)[0]
        content = self.norm2(content + self.dropout(seen))
        seen = self.cross_attn(content + position, reference, memory, levels.shapes, levels.starts, levels.padding)
        content = self.norm1(content + self.dropout(seen))
        seen = feed_forward(content, self.linear1, self.activation, self.dropout, self.linear2)
        return self.norm3(content + self.dropout(seen))


def encoder_of(count: int, *, num_levels: int, num_points: int, **layer: Unpack[LayerArguments]) -> DeformableEncoder:
    """An encoder of `count` layers with ReLU, see `DeformableEncoderLayer`."""
    return DeformableEncoder(
        [
            DeformableEncoderLayer(**layer, num_levels=num_levels, num_points=num_points, activation=nn.ReLU())
            for _ in range(count)
        ]
    )


def decoder_layers_of(
    count: int, *, num_levels: int, num_points: int, **layer: Unpack[LayerArguments]
) -> list[DeformableDecoderLayer]:
    """`count` decoder layers with ReLU, see `DeformableDecoderLayer`."""
    return [
        DeformableDecoderLayer(**layer, num_levels=num_levels, num_points=num_points, activation=nn.ReLU())
        for _ in range(count)
    ]


def init_transformer(transformer: nn.Module) -> None:
    """Starting values of the releases: Xavier's for every matrix; deformable attention keeps its own."""
    xavier_matrices(transformer)
    for module in transformer.modules():
        if isinstance(module, MSDeformAttn):
            module.reset_parameters()
