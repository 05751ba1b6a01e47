"""Sonic: audio-driven portrait animation that can be trained. The public API is `sonic_implementation`."""

__version__ = "0.7"
