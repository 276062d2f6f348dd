"""Published measurements of training steps: read, predicted, calibrated on, scored."""
