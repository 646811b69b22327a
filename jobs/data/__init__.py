"""Data sources, and batches of images on the device."""
