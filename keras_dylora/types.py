"""Types that several public signatures share."""

from typing import TypeVar

import keras

from keras_dylora.allocation import RankAllocation

# What a function that changes a model in place takes, and gives back.
Model = TypeVar("Model", bound=keras.Model)
Rank = int | RankAllocation
