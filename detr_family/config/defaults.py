"""Every key that detr_family adds to Detectron2's configuration: meaning, unit, where the paper has it."""

from __future__ import annotations

from detectron2.config import CfgNode

from detr_family.config.projects import add_project_configs


def add_detr_family_config(cfg: CfgNode) -> None:
    """Add the keys below, and those of imported projects, to a configuration, in place.

    No key of Detectron2's own is changed: the recipes are in the YAML files.

    Args:
        cfg: made by `detectron2.config.get_cfg()`.
    """
    cfg.MODEL.DETR = CfgNode()
    _C = cfg.MODEL.DETR

    # Classes of the dataset, without no-object. -1: as the metadata of DATASETS.TRAIN[0] says.
    _C.NUM_CLASSES = -1
    # Size of the predicted set, well above the number of objects in any image (DETR, section 3.1).
    _C.NUM_QUERIES = 100
    # Width of the transformer, channels; a multiple of NUM_HEADS and, for sine encodings, of 4.
    _C.HIDDEN_DIM = 256
    # Heads of every attention.
    _C.NUM_HEADS = 8
    # Layers of the encoder, possibly 0.
    _C.ENC_LAYERS = 6
    # Layers of the decoder, at least 1.
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
    # Added to a token's place, which is counted from 1, before the sine encoding scales it: 0 in the five papers, -0.5
    # in detrex's DINO. The deformable detectors of projects/ have their papers' own, -0.5, whatever stands here.
    _C.SPATIAL_ENCODING.OFFSET = 0.0
    # The most rows and columns that the learned encoding has a vector for.
    _C.SPATIAL_ENCODING.LEARNED_SIZE = 50
    # Where it enters: "attention" (queries and keys of every layer), "input" (added once) or "none".
    _C.SPATIAL_ENCODING.ENCODER = "attention"
    # The same for the decoder's memory: keys of every cross-attention, once to the memory, or never.
    _C.SPATIAL_ENCODING.DECODER = "attention"
    # Where the object queries enter the decoder (the paper's "output pos. enc."): "attention" or "input".
    _C.QUERY_ENCODING = "attention"

    # How near to 0 and 1 the inverse sigmoid of reference points and anchors is exact, in Conditional DETR, DAB-DETR
    # and Deformable DETR. 0: as in the paper's release (1e-5, 1e-3, 1e-5); detrex has 1e-3, transformers 1e-5.
    _C.INVERSE_SIGMOID_EPS = 0.0

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
    # Weight of positives and exponent of the focal loss and its matching cost, of all detectors after DETR
    # (arXiv 1708.02002, equation 5).
    _C.FOCAL_ALPHA = 0.25
    _C.FOCAL_GAMMA = 2.0

    # What becomes of MODEL.WEIGHTS of a detector with other classes: "exact" refuses them; "match" keeps the rows of
    # the classes whose names are the same and lets the others start as in a new model; "new" lets all start so.
    _C.CLASS_ROWS = "exact"
    # Keep only what goes into each layer and compute the rest again in the backward pass: less memory, about a
    # third more time, the same gradients.
    _C.CHECKPOINT = CfgNode()
    # The blocks of the backbone's stages.
    _C.CHECKPOINT.BACKBONE = False
    # The encoder's layers.
    _C.CHECKPOINT.ENCODER = False
    # The decoder's layers.
    _C.CHECKPOINT.DECODER = False
    # Regular expressions, found anywhere in a parameter's name: those parameters are not trained, and batch norms
    # among them keep their statistics. ["^backbone", "encoder"] leaves decoder and heads.
    _C.FREEZE = []

    cfg.MODEL.DAB = CfgNode()
    # Learned contents that every anchor is decoded with; 0: one content of zeros (DAB-DETR, starred rows of table 2).
    cfg.MODEL.DAB.NUM_PATTERNS = 0
    # Modulate positional attention by the anchors' width and height (DAB-DETR, section 4.4, equation 6).
    cfg.MODEL.DAB.MODULATE = True
    # Draw the anchors' centres uniformly and keep them (DAB-DETR, table 4). The release's setting of that name
    # freezes nothing; this one does.
    cfg.MODEL.DAB.FIX_CENTRES = False
    # Width and height of all anchors at the start, as shares of the image's, with centres spread evenly; 0 draws all
    # four from a normal distribution before the sigmoid, as the release does. For few steps on small objects.
    cfg.MODEL.DAB.ANCHOR_SIZE = 0.0

    # The backbone build_swin_backbone (arXiv 2103.14030). MODEL.BACKBONE.FREEZE_AT freezes it as it does a ResNet: 1
    # the patch embedding, 2 the first stage too; the papers' releases freeze nothing of it, 0.
    cfg.MODEL.SWIN = CfgNode()
    # "T", "S", "B" or "L" (table 7 of the paper).
    cfg.MODEL.SWIN.SIZE = "T"
    # Side of the attention windows, tokens: 7, or 12 where the ImageNet weights were made at 384 pixels.
    cfg.MODEL.SWIN.WINDOW_SIZE = 7
    # Stochastic depth: probability of leaving out a branch of the last block, rising linearly from 0.
    cfg.MODEL.SWIN.DROP_PATH_RATE = 0.2
    # Stages that the detector sees: p0, p1, p2, p3 of strides 4, 8, 16, 32.
    cfg.MODEL.SWIN.OUT_FEATURES = ["p1", "p2", "p3"]

    # The backbone build_timm_backbone: any of the timm package that gives feature maps.
    cfg.MODEL.TIMM = CfgNode()
    # timm's name, with or without the tag of its weights: "convnext_tiny.fb_in22k", "vit_small_patch16_dinov3".
    cfg.MODEL.TIMM.NAME = "convnext_tiny"
    # Start a training from timm's ImageNet weights of that name, where MODEL.WEIGHTS names none; fetched from the
    # Hugging Face Hub. Not looked at in an evaluation or prediction.
    cfg.MODEL.TIMM.PRETRAINED = False
    # Stages that the detector sees, by their strides. A plain Vision Transformer gives MODEL.PYRAMID in their place.
    cfg.MODEL.TIMM.OUT_FEATURES = ["stride8", "stride16", "stride32"]
    # Stochastic depth, for those of timm that have it.
    cfg.MODEL.TIMM.DROP_PATH_RATE = 0.0

    # The backbone build_vit_backbone: Detectron2's plain Vision Transformer (ViTDet, arXiv 2203.16527).
    cfg.MODEL.VIT = CfgNode()
    # "T", "S", "B", "L" or "H".
    cfg.MODEL.VIT.SIZE = "B"
    # Side of a patch, pixels.
    cfg.MODEL.VIT.PATCH_SIZE = 16
    # Side of the attention windows, tokens; the last block of each quarter sees the whole image. 0: all do.
    cfg.MODEL.VIT.WINDOW_SIZE = 14
    # Side of the images that the tables of relative positions are made for, pixels; interpolated for others.
    cfg.MODEL.VIT.IMAGE_SIZE = 1024
    # Stochastic depth: probability of leaving out a branch of the last block, rising linearly from 0.
    cfg.MODEL.VIT.DROP_PATH_RATE = 0.1

    # The simple feature pyramid that is made from the last map of a plain Vision Transformer (ViTDet, section 3).
    cfg.MODEL.PYRAMID = CfgNode()
    # Its maps against the backbone's: a run of 4.0, 2.0, 1.0, 0.5. Of patches of 16 pixels: strides 4, 8, 16, 32.
    cfg.MODEL.PYRAMID.SCALES = [2.0, 1.0, 0.5]
    # Channels of every map.
    cfg.MODEL.PYRAMID.CHANNELS = 256
    # Detectron2's name of the norm after each convolution.
    cfg.MODEL.PYRAMID.NORM = "LN"

    cfg.MODEL.DN = CfgNode()
    # Denoising groups in training, each with every box of an image; 0: no denoising (DN-DETR, section 4.2, table 5).
    cfg.MODEL.DN.GROUPS = 5
    # The most denoising queries of an image. With more boxes than MAX_QUERIES // GROUPS a group has a random choice.
    cfg.MODEL.DN.MAX_QUERIES = 1000
    # Probability that a label is flipped, the true one included among the draws (DN-DETR, section 4.2, gamma).
    cfg.MODEL.DN.LABEL_NOISE = 0.2
    # Largest shift of a box's centre, in half widths and heights, and largest relative change of its width and
    # height (DN-DETR, section 4.2, lambda).
    cfg.MODEL.DN.BOX_NOISE = 0.4

    cfg.MODEL.DINO = CfgNode()
    # Feature levels. The coarsest maps of the backbone are taken, as many as there are; further levels are made from
    # the last one by strided convolutions (DINO, section 4.1: 4 or 5).
    cfg.MODEL.DINO.NUM_LEVELS = 4
    # Points that a head samples on each level, in the encoder and in the decoder (Deformable DETR, section 4.1: K).
    cfg.MODEL.DINO.ENC_POINTS = 4
    cfg.MODEL.DINO.DEC_POINTS = 4
    # Where the decoder's first queries come from: "mixed" (anchors from the encoder, learned content), "pure" (content
    # from the encoder too) or "none" (both learned) (DINO, section 3.4, table 4).
    cfg.MODEL.DINO.QUERY_SELECTION = "mixed"
    # A layer's box loss also reaches the layer before (DINO, section 3.5, figure 6); False: look forward once.
    cfg.MODEL.DINO.LOOK_FORWARD_TWICE = True
    # One class and one box head for all decoder layers; False: one of each per layer.
    cfg.MODEL.DINO.SHARE_HEADS = True
    # "contrastive", "dn" (positives alone, noised as in DN-DETR) or "none" (DINO, section 3.3, table 4).
    cfg.MODEL.DINO.DENOISING = "contrastive"
    # Pairs of a positive and a negative (of "dn": positives) per image. They make as many groups as the most crowded
    # image of the batch allows, at least one (DINO, section D.2: 100).
    cfg.MODEL.DINO.DN_PAIRS = 100
    # The most denoising queries of an image. Where one group alone would be more, it has a random choice of the boxes.
    cfg.MODEL.DINO.DN_MAX_QUERIES = 200
    # A label is flipped with half this probability, the true one included among the draws, as in the release.
    cfg.MODEL.DINO.LABEL_NOISE = 0.5
    # Scale of the box noise: corners of a positive move by less than this times half of the width and height, those
    # of a negative by once to twice as much (DINO, section 3.3, lambda_1 and lambda_2). Of "dn": as MODEL.DN.BOX_NOISE.
    cfg.MODEL.DINO.BOX_NOISE = 1.0
    # Leave out negatives whose noise has turned width or height negative. The release keeps them.
    cfg.MODEL.DINO.DN_DROP_INVERTED = False
    # What is predicted for an image does not depend on what it is batched with. False, as in the release: padding
    # counts in the statistics of the group norm after the projection of feature maps, competes with an image's tokens
    # in query selection, and shrinks the anchors that queries are encoded from.
    cfg.MODEL.DINO.IGNORE_PADDING = False
    # Draw the encoder's heads and the decoder's (each layer's, if SHARE_HEADS is False) for themselves, from Xavier's
    # values. False, as in the release: copies of one, which starts narrower. A small detector that is trained for
    # minutes gains by it (docs/dino.md).
    cfg.MODEL.DINO.INDEPENDENT_HEADS = False

    # The learning rate of the backbone, and of a learned spatial encoding, as a factor of SOLVER.BASE_LR.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    # Learning rates of single parameters: a list of [regular expression, factor]. A parameter whose name an
    # expression is found in has SOLVER.BASE_LR times the first such factor, and a backbone's as much less.
    # (Deformable DETR, appendix A.4: 0.1 for what predicts reference points and sampling offsets.)
    cfg.SOLVER.LR_FACTORS = []
    # Length of the training in passes over the training set. Above 0 it takes the place of SOLVER.MAX_ITER.
    cfg.SOLVER.EPOCHS = 0
    # Where the learning rate is multiplied by SOLVER.GAMMA, in epochs; takes the place of SOLVER.STEPS.
    cfg.SOLVER.DROP_EPOCHS = ()
    # Epochs between checkpoints; above 0 it takes the place of SOLVER.CHECKPOINT_PERIOD.
    cfg.SOLVER.CHECKPOINT_EPOCHS = 0
    # How many of the checkpoints that are written in between stay; 0: all. model_final.pth and model_best.pth stay too.
    cfg.SOLVER.MAX_TO_KEEP = 5
    # Whenever this is the highest so far, model_best.pth is written; as in metrics.json ("bbox/AP50", "ema/bbox/AP").
    # Of several test sets the first counts, if none is named ("cells_val/bbox/AP"). "": none is written.
    cfg.SOLVER.BEST_METRIC = "bbox/AP"
    # The training ends once SOLVER.BEST_METRIC has not risen by more than MIN_DELTA (in %) in PATIENCE evaluations.
    cfg.SOLVER.EARLY_STOP = CfgNode()
    cfg.SOLVER.EARLY_STOP.PATIENCE = 0
    cfg.SOLVER.EARLY_STOP.MIN_DELTA = 0.0
    # Epochs between evaluations; above 0 it takes the place of TEST.EVAL_PERIOD.
    cfg.TEST.EVAL_EPOCHS = 0
    # The most detections of an image that count in COCO's AP and AR (the protocol's 100). Where an image has more
    # objects, the evaluation warns and gives AP without the limit beside it.
    cfg.TEST.EVAL_DETECTIONS = 100
    # What computes COCO's AP and AR: "faster-coco-eval", "detectron2" (its compiled form) or "pycocotools"; "": the
    # first of these that is installed. The figures are the same.
    cfg.TEST.COCO_EVALUATION = ""
    # Detectron2's TEST.AUG (ENABLED, MIN_SIZES, MAX_SIZE, FLIP) is test-time augmentation in every evaluation, in
    # Predictor and in the demo. How the views' boxes of one class are merged: "wbf", weighted boxes fusion (arXiv
    # 1910.13302), or "nms".
    cfg.TEST.AUG.MERGE = "wbf"
    # From which IoU on two boxes are one.
    cfg.TEST.AUG.MERGE_IOU = 0.55
    # Training images on which the instability of matching is measured after every epoch, evenly spaced; 0: not at
    # all (DN-DETR, section 3.2).
    cfg.TEST.INSTABILITY_IMAGES = 0
    # Images that go through the model together in an evaluation, on each process, at most: only those of one size
    # do, so that nothing is padded and the results are those of one by one.
    cfg.TEST.IMS_PER_BATCH = 1
    # Parts that each process computes its share of SOLVER.IMS_PER_BATCH in, one after the other, for one step of the
    # optimizer: the recipe's batch on fewer or smaller GPUs. Losses and gradients are those of the whole batch.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # The most images that a process puts through the model at once in training; a larger share of
    # SOLVER.IMS_PER_BATCH is computed in more parts, as by ACCUMULATION_STEPS. 0: no limit. It decides how images are
    # padded and, in DINO, how many denoising groups there are; the recipes have what their releases were trained with.
    cfg.SOLVER.IMAGES_PER_FORWARD = 0
    # What SOLVER.AMP.ENABLED computes in: "float16", with a scaled loss, or "bfloat16". Boxes, matching and losses
    # are float32 either way.
    cfg.SOLVER.AMP.PRECISION = "float16"
    # An exponential moving average of the weights, evaluated and saved beside them. The published figures have none.
    cfg.SOLVER.EMA = CfgNode()
    cfg.SOLVER.EMA.ENABLED = False
    # Share of the average that each step leaves; the average is over about 1 / (1 - DECAY) steps.
    cfg.SOLVER.EMA.DECAY = 0.9997
    # Evaluate (--eval-only) and predict with the averaged weights in the checkpoint MODEL.WEIGHTS, not the plain ones.
    cfg.TEST.EMA = False
    # What a loss or gradient that is not finite does: "stop" the run, or "skip" the step. Either way the
    # batch is saved (of skipped steps the first ten) and its images are named in the log; the weights stay as they
    # were.
    cfg.SOLVER.NONFINITE = "stop"
    # SOLVER.CLIP_GRADIENTS.CLIP_TYPE takes one more value, "full_model": the norm of the whole gradient.

    # Write curves.png, metrics.csv and report.html, one page on the run, at its end. (Detectron2's VIS_PERIOD: every so
    # many iterations predictions are drawn beside ground truth, in TensorBoard and OUTPUT_DIR/vis.)
    cfg.VIS_REPORT = True

    # Loggers that a training writes to beside TensorBoard and metrics.json: "wandb", "mlflow", "clearml". Where to and
    # how is for their own environment variables (docs/watching.md).
    cfg.LOGGERS = []

    # How the sides of a resized image become whole pixels, in training, evaluation and prediction alike: "detectron2"
    # rounds both; "detr", as the papers' releases, cuts off the longer side's fraction and rounds the shorter side
    # where MAX_SIZE limits the longer.
    cfg.INPUT.RESIZE_ROUNDING = "detectron2"
    # Shorter sides that an image is resized to before it is cropped, pixels (DETR, section A.4).
    cfg.INPUT.CROP.RESIZE = [400, 500, 600]

    # In training, decode JPEGs at a half, a quarter or an eighth of their size where the augmentation makes them
    # smaller than that anyway: faster, with pixels that differ a little. For photographs of several megapixels.
    cfg.INPUT.DRAFT = False

    # Large-scale jitter (arXiv 2012.07177) in place of crop and resizing in training: an image is scaled to fit into a
    # square of SIZE pixels times a factor between the two, and cut to the square. The paper has 0.1, 2.0 and 1024.
    cfg.INPUT.SCALE_JITTER = CfgNode()
    cfg.INPUT.SCALE_JITTER.ENABLED = False
    cfg.INPUT.SCALE_JITTER.MIN_SCALE = 0.1
    cfg.INPUT.SCALE_JITTER.MAX_SCALE = 2.0
    cfg.INPUT.SCALE_JITTER.SIZE = 1024
    # Transforms of torchvision.transforms.v2 for training images with their boxes, after all others: a list of [name,
    # {argument: value}], such as [["ColorJitter", {"brightness": 0.3}]].
    cfg.INPUT.TORCHVISION = []

    # Datasets in COCO format: a list of [name, annotation file, image folder]. The names can then be used
    # in DATASETS.TRAIN and DATASETS.TEST like Detectron2's own.
    cfg.DATASETS.COCO_FORMAT = []
    # A folder in the format of COCO, YOLO, Pascal VOC or CSV, or its data.yaml, annotation or CSV file (--data of
    # the commands): recognised when a run begins, and put into COCO_FORMAT, TRAIN, TEST and FINAL_TEST, over what these
    # were. See docs/own_data.md.
    cfg.DATASETS.FOLDER = ""
    # "coco", "yolo", "voc" or "csv" for a FOLDER that has annotations in several formats.
    cfg.DATASETS.FOLDER_FORMAT = ""
    # Share of the training images that is kept apart for the validation where FOLDER has no split for it, and the seed
    # of the choice.
    cfg.DATASETS.VAL_SHARE = 0.2
    cfg.DATASETS.VAL_SEED = 0
    # Datasets that are evaluated once, at the end of a training (with model_best.pth where there is one) or of
    # --eval-only, after those in TEST.
    cfg.DATASETS.FINAL_TEST = ()

    add_project_configs(cfg)
