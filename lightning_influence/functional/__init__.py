"""Stateless mathematics on tensors; nothing here knows of models, files or trainers."""
