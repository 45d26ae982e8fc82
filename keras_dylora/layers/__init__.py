"""Layers with an adapter: a kernel as a matrix, and a model as a tree."""
