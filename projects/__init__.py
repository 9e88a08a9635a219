"""What builds on detr_family and is not one of its five detectors; detr_family imports nothing from here."""
