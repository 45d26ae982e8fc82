"""Guides: scripts that are notebooks too."""
