"""A whole detector as a file that other programs run: ONNX, torch.export, OpenVINO, TorchScript, AOTInductor."""

from detr_family.export.exporting import export_model

__all__ = ["export_model"]
