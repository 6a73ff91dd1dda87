"""Keeps directories equal to a published casync archive."""

__version__ = "1.0.0"
