"""Measurements that docs/ cites; each module is a command: python -m detr_family.benchmarks.<module>."""
