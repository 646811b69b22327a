"""The inference service, and the image code that it shares with training."""
