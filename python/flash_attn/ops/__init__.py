"""Operators beside attention, composed of PyTorch operators for every device."""
