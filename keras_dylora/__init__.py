"""DyLoRA for Keras 3: fine-tune once, use at every rank."""

from keras_dylora.adapter import load_adapter
from keras_dylora.adapter import save_adapter
from keras_dylora.attach import disable_dylora
from keras_dylora.attach import enable_dylora
from keras_dylora.config import DyLoRAConfig
from keras_dylora.evaluation import RankEvaluation
from keras_dylora.evaluation import evaluate_ranks
from keras_dylora.export import export_ranks
from keras_dylora.interop import from_peft
from keras_dylora.interop import to_peft
from keras_dylora.layers import DyLoRADense
from keras_dylora.layers import DyLoRAEinsumDense
from keras_dylora.merging import merge
from keras_dylora.merging import truncate
from keras_dylora.model import DyLoRAModel
from keras_dylora.ranks import Categorical
from keras_dylora.ranks import Geometric
from keras_dylora.ranks import Uniform
from keras_dylora.report import RankReport
from keras_dylora.version import __version__
