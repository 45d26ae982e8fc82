"""Adapters in the formats of other libraries."""

from keras_dylora.interop.peft import from_peft
from keras_dylora.interop.peft import to_peft
