"""A tiny text classifier that takes raw strings."""

import keras_hub

WORDS = "the plot a film is good bad dull warm funny never very".split()
TEXTS = [
    "the plot is bad",
    "a very warm film",
    "never funny, the film is dull",
    "good good good",
]


def text_classifier():
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, ","]
    tokenizer = keras_hub.models.BertTokenizer(vocabulary, lowercase=True)
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(
        tokenizer, sequence_length=12
    )
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=len(vocabulary),
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=24,
        max_sequence_length=12,
        dropout=0.0,
    )
    return keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, dropout=0.0, preprocessor=preprocessor
    )
