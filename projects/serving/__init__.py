"""Detection over HTTP; see docs/serving.md."""
