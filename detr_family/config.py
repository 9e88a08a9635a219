"""Every key that detr_family adds to Detectron2's configuration: meaning, unit, where the paper has it."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog


def add_detr_family_config(cfg: CfgNode) -> None:
    """Add the keys below to a configuration made by `detectron2.config.get_cfg()`, in place.

    No key of Detectron2's own is changed: the recipes are in the YAML files.
    """
    cfg.MODEL.DETR = CfgNode()
    _C = cfg.MODEL.DETR

    # Classes of the data set, without no-object. -1: as the metadata of DATASETS.TRAIN[0] says.
    _C.NUM_CLASSES = -1
    # Size of the predicted set, well above the number of objects in any picture (DETR, section 3.1).
    _C.NUM_QUERIES = 100
    # Width of the transformer, channels; a multiple of NUM_HEADS and, for sine encodings, of 4.
    _C.HIDDEN_DIM = 256
    _C.NUM_HEADS = 8
    _C.ENC_LAYERS = 6
    _C.DEC_LAYERS = 6
    # Width of the feed-forward networks' hidden layer, channels.
    _C.FEEDFORWARD_DIM = 2048
    # Probability, in every sublayer and in the attention weights.
    _C.DROPOUT = 0.1
    # Normalise before each sublayer in place of after it.
    _C.PRE_NORM = False
    # Train every decoder layer's set, not the last one's alone (DETR, section 3.2).
    _C.AUX_LOSS = True

    # The encoding of positions in the feature map (DETR, table 3).
    _C.SPATIAL_ENCODING = CfgNode()
    # "sine" or "learned".
    _C.SPATIAL_ENCODING.TYPE = "sine"
    # Longest wavelength of the sine encoding, in units of 2 pi (10000 in DETR, 20 from DAB-DETR on).
    _C.SPATIAL_ENCODING.TEMPERATURE = 10000.0
    # The most rows and columns that the learned encoding has a vector for.
    _C.SPATIAL_ENCODING.LEARNED_SIZE = 50
    # Where it enters: "attention" (queries and keys of every layer), "input" (added once) or "none".
    _C.SPATIAL_ENCODING.ENCODER = "attention"
    # The same for the decoder's memory: keys of every cross-attention, once to the memory, or never.
    _C.SPATIAL_ENCODING.DECODER = "attention"
    # Where the object queries enter the decoder (the paper's "output pos. enc."): "attention" or "input".
    _C.QUERY_ENCODING = "attention"

    # Weights of the matching cost (DETR, section 3.1, equation 1).
    _C.COST = CfgNode()
    _C.COST.CLASS = 1.0
    _C.COST.L1 = 5.0
    _C.COST.GIOU = 2.0
    # Weights of the loss (DETR, section 3.1, equation 2); 0 switches a term off.
    _C.LOSS = CfgNode()
    _C.LOSS.CLASS = 1.0
    _C.LOSS.L1 = 5.0
    _C.LOSS.GIOU = 2.0
    # Weight of the no-object class in the cross-entropy (DETR, section 3.1).
    _C.NO_OBJECT_WEIGHT = 0.1

    # The backbone's learning rate as a factor of SOLVER.BASE_LR.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    # Length of the training in passes over the training set. Above 0 it takes the place of SOLVER.MAX_ITER.
    cfg.SOLVER.EPOCHS = 0
    # Where the learning rate is multiplied by SOLVER.GAMMA, in epochs; takes the place of SOLVER.STEPS.
    cfg.SOLVER.DROP_EPOCHS = ()
    # Epochs between checkpoints; above 0 it takes the place of SOLVER.CHECKPOINT_PERIOD.
    cfg.SOLVER.CHECKPOINT_EPOCHS = 0
    # Epochs between evaluations; above 0 it takes the place of TEST.EVAL_PERIOD.
    cfg.TEST.EVAL_EPOCHS = 0
    # What a loss or gradient that is not finite does: "stop" the run, or "skip" the step. Either way the
    # batch is saved and its pictures are named in the log; the weights stay as they were.
    cfg.SOLVER.NONFINITE = "stop"
    # SOLVER.CLIP_GRADIENTS.CLIP_TYPE takes one more value, "full_model": the norm of the whole gradient.

    # Shorter sides that a picture is resized to before it is cropped, pixels (DETR, section A.4).
    cfg.INPUT.CROP.RESIZE = [400, 500, 600]

    # Data sets in COCO format: a list of [name, annotation file, picture folder]. The names can then be used
    # in DATASETS.TRAIN and DATASETS.TEST like Detectron2's own.
    cfg.DATASETS.COCO_FORMAT = []


def class_names(cfg: CfgNode) -> list[str] | None:
    """Names of the classes, as the metadata of the first training set (else test set) says.

    Returns:
        The names in contiguous order, or None where there is no data set or it has no names.

    Raises:
        ValueError: a data set that is not registered.
    """
    for name in (*cfg.DATASETS.TRAIN[:1], *cfg.DATASETS.TEST[:1]):
        if name not in DatasetCatalog.list():
            raise ValueError(
                f"data set {name!r} is not registered: name it in DATASETS.COCO_FORMAT with its annotation file and "
                "picture folder, or correct DATASETS.TRAIN / DATASETS.TEST"
            )
        if not hasattr(MetadataCatalog.get(name), "thing_classes"):
            DatasetCatalog.get(name)  # Detectron2's own COCO loader sets the names while loading
        names = MetadataCatalog.get(name).get("thing_classes", None)
        if names is not None:
            return list(names)
    return None


def num_classes(cfg: CfgNode) -> int:
    """MODEL.DETR.NUM_CLASSES, or where that is -1 the number of classes that the data set's metadata names.

    Raises:
        ValueError: neither the key nor a data set tells, or the key is 0 or below -1.
    """
    if cfg.MODEL.DETR.NUM_CLASSES != -1:
        if cfg.MODEL.DETR.NUM_CLASSES < 1:
            raise ValueError(f"MODEL.DETR.NUM_CLASSES is {cfg.MODEL.DETR.NUM_CLASSES}; it must be positive, or -1")
        return cfg.MODEL.DETR.NUM_CLASSES
    names = class_names(cfg)
    if names is None:
        raise ValueError(
            "MODEL.DETR.NUM_CLASSES is -1 and no data set in DATASETS.TRAIN or DATASETS.TEST names its classes: "
            "set one of the two"
        )
    return len(names)
