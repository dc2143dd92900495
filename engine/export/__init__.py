"""A student that its user can take away: weights, configuration, model card, and an ONNX file."""
