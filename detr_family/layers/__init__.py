"""Parts that several of the detectors are made of; nothing here knows a detector."""
