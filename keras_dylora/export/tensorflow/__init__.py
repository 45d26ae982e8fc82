"""The writers of artifacts, all of which import TensorFlow."""
