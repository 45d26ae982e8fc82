"""Files of adapters: our own, and those of Hugging Face PEFT."""

from keras_dylora.adapters.native import load_adapter, save_adapter
from keras_dylora.adapters.peft.load import from_peft
from keras_dylora.adapters.peft.save import to_peft
