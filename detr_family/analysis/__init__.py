"""The papers' tables and figures by command, over one's own configuration, weights and data.

`python -m detr_family.analysis COMMAND --help` says what each takes. Every command writes an image (PNG and SVG) and
the numbers behind it (CSV or JSON). Nothing here is imported by the detectors, and nothing here changes them: attention
weights are recomputed from what hooks see while somebody looks (`attention_weights`).
"""
