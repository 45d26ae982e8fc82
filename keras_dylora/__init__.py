"""DyLoRA for Keras 3: fine-tune once, use at every rank."""

from keras_dylora.adapters import from_peft, load_adapter, save_adapter, to_peft
from keras_dylora.adapters.combine import combine_adapters
from keras_dylora.allocation import RankAllocation
from keras_dylora.config import DyLoRAConfig
from keras_dylora.distributions import Categorical, Geometric, Uniform
from keras_dylora.export import export_ranks
from keras_dylora.layers.conv import DyLoRAConv1D, DyLoRAConv2D, DyLoRAConv3D
from keras_dylora.layers.dense import DyLoRADense
from keras_dylora.layers.einsum_dense import DyLoRAEinsumDense
from keras_dylora.layers.embedding import DyLoRAEmbedding
from keras_dylora.live.enable import disable_dylora, enable_dylora
from keras_dylora.live.merge import merge
from keras_dylora.live.model import DyLoRAModel
from keras_dylora.live.ordering import order_ranks
from keras_dylora.live.truncate import truncate
from keras_dylora.reports.allocate import allocate_ranks
from keras_dylora.reports.evaluation import RankEvaluation, evaluate_ranks
from keras_dylora.reports.report import RankReport
from keras_dylora.reports.tune import tune_ranks
from keras_dylora.schedule import ProgressiveDecay
from keras_dylora.version import __version__

__all__ = [
    "Categorical", "DyLoRAConfig", "DyLoRAConv1D", "DyLoRAConv2D",
    "DyLoRAConv3D", "DyLoRADense", "DyLoRAEinsumDense",
    "DyLoRAEmbedding", "DyLoRAModel", "Geometric", "ProgressiveDecay",
    "RankAllocation",
    "RankEvaluation", "RankReport", "Uniform", "__version__",
    "allocate_ranks", "combine_adapters", "disable_dylora",
    "enable_dylora", "evaluate_ranks",
    "export_ranks", "from_peft", "load_adapter", "merge", "order_ranks",
    "save_adapter", "to_peft", "truncate", "tune_ranks",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__
