"""What writes artifacts under TensorFlow, which all of it imports."""
