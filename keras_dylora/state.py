"""What a DyLoRAModel keeps beside its layers."""

import keras
import numpy as np

from keras_dylora._keras import unlocked
from keras_dylora.attachment import layer_paths
from keras_dylora.low_rank import LowRankAdapter
from keras_dylora.ranks import RankDraw


class DyLoRAState:
    """The choices, the layers and the rank sequence of a DyLoRAModel.

    Args:
        model: the `DyLoRAModel`.
        config: `DyLoRAConfig`.
        layers: its adapted layers, in forward order.
        attachment: how `enable_dylora` made it, or `None`.
    """

    def __init__(self, model, config, layers, attachment=None):
        self.config = config
        self.layers = layers
        self.attachment = attachment
        self.summing = False
        self.probabilities = config.rank_probabilities
        self.gates = list({id(x._gate): x._gate for x in layers}.values())
        self.draw = RankDraw(
            config.distribution, config.min_rank, config.rank, config.seed
        )
        with unlocked(model):
            # Positions in the rank sequence: how many ranks were drawn.
            model._ranks_drawn = keras.Variable(
                0,
                dtype="int",
                trainable=False,
                aggregation="only_first_replica",
                name="ranks_drawn",
            )
            if config.frozen:
                # Columns of the ranks drawn since the last weight update.
                model._open_columns = keras.Variable(
                    np.zeros((config.rank,), dtype="float32"),
                    trainable=False,
                    autocast=False,
                    aggregation="only_first_replica",
                    name="open_columns",
                )


def adapters(model):
    """The adapted layers below a model, in forward order."""
    return list(adapters_by_path(model).values())


def adapters_by_path(model):
    """The adapted layers of a model by their path."""
    return {
        path: layer
        for path, layer in layer_paths(model).items()
        if isinstance(layer, LowRankAdapter)
    }
