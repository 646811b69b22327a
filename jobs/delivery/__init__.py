"""Delivery of a run: export, storage, model registry (versions and channels), deployment."""
