"""Measurements against peers and physical limits; no part of the package."""
