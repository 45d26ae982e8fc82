"""The tokenizer of a task as a TensorFlow graph."""

import tempfile

import keras


class Preprocessing:
    """The preprocessing of a KerasHub task, without traces of its use.

    Args:
        model: a task with a `preprocessor`.
    """

    def __init__(self, model):
        original = model.preprocessor
        # The tokenizer keeps words that it has seen in a table, so the artifact
        # would contain words of the training data.
        self.layer = type(original).from_config(original.get_config())
        with tempfile.TemporaryDirectory() as folder:
            original.tokenizer.save_assets(folder)
            self.layer.tokenizer.load_assets(folder)

    def __call__(self, text):
        """The model's inputs for a tensor of strings, to be traced."""
        return keras.utils.unpack_x_y_sample_weight(self.layer(text))[0]
