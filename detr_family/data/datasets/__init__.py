"""Datasets: users' own in COCO format, Objects365, and a generated one to try things on."""
