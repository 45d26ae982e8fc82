"""Adapters in the format of Hugging Face PEFT, saved and loaded."""
