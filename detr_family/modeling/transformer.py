"""What the transformers of all papers take, and what they start from.

Letters: D channels, N decoder layers.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import nn
from typing_extensions import TypedDict, Unpack


class LayerArguments(TypedDict):
    """What every encoder and decoder layer takes: a transformer hands these on to all of its layers.

    Attributes:
        dim: D, the model's width, a multiple of 4.
        num_heads: attention heads, a divisor of `dim`.
        feedforward_dim: width of the feed-forward networks' hidden layer.
        dropout: probability in every sublayer and in the weights of plain attention.
    """

    dim: int
    num_heads: int
    feedforward_dim: int
    dropout: float


class TransformerArguments(LayerArguments):
    """What every transformer takes, beside what is its own.

    Attributes:
        encoder_layers: layers of the encoder, possibly 0.
        decoder_layers: N, layers of the decoder, at least 1.
    """

    encoder_layers: int
    decoder_layers: int


def depths_and_layer(
    *, encoder_layers: int, decoder_layers: int, **layer: Unpack[LayerArguments]
) -> tuple[int, int, LayerArguments]:
    """`TransformerArguments` as depth of the encoder, depth of the decoder and what every layer takes.

    Raises:
        ValueError: a decoder without layers, an encoder with fewer than none, a width that the heads do not divide.
    """
    dim, num_heads = layer["dim"], layer["num_heads"]
    if dim % num_heads:
        raise ValueError(f"MODEL.DETR.HIDDEN_DIM {dim} is no multiple of MODEL.DETR.NUM_HEADS {num_heads}")
    if decoder_layers < 1 or encoder_layers < 0:
        raise ValueError(
            f"MODEL.DETR.DEC_LAYERS {decoder_layers} must be at least 1, ENC_LAYERS {encoder_layers} at least 0"
        )
    return encoder_layers, decoder_layers, layer


def transformer_arguments(cfg: CfgNode) -> TransformerArguments:
    """What every `from_config` reads alike for its transformer."""
    detr = cfg.MODEL.DETR
    return {
        "dim": detr.HIDDEN_DIM,
        "num_heads": detr.NUM_HEADS,
        "encoder_layers": detr.ENC_LAYERS,
        "decoder_layers": detr.DEC_LAYERS,
        "feedforward_dim": detr.FEEDFORWARD_DIM,
        "dropout": detr.DROPOUT,
    }


def xavier_matrices(module: nn.Module) -> None:
    """Xavier's uniform values (Glorot and Bengio, 2010) for every parameter of two dimensions or more, in place.

    This is where all releases start their transformers from; what is added to a module later keeps its own values.
    """
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
