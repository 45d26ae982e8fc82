"""export_ranks: artifacts for serving, written on any backend."""

from keras_dylora.export.api import export_ranks

__all__ = ["export_ranks"]
