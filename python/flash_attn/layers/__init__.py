"""Layers: rotary position embedding, patch embedding."""
