"""The families that PEFT adapters fit, and where their layers are in each."""

import dataclasses

from keras_dylora.paths import layer_paths


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of one model class in Keras and in transformers.

    A linear layer of transformers stands for one Keras layer, or for several
    whose outputs it holds side by side, such as GPT-2's `c_attn`.

    Args:
        backbone: str. The class of the KerasHub backbone.
        block: str. Path of one transformer layer, with its number left open.
        linear: dict of the linear layers of a block to tuples of the paths
            that their Keras layers have in `transformer_layer_{i}`.
        outside: dict like `linear`, for the layers outside of the blocks.
        transposed: bool. Whether transformers stores these weights as
            `(inputs, outputs)`, in `Conv1D` layers.
        prefix: str. Where the transformers model keeps its base model.
        task_type: str. PEFT's name of the task.
        head: dict of the weights of the head to the paths of their Keras
            variables.
    """

    backbone: str
    block: str
    linear: dict
    outside: dict = dataclasses.field(default_factory=dict)
    transposed: bool = False
    prefix: str = ""
    task_type: str = "FEATURE_EXTRACTION"
    head: dict = dataclasses.field(default_factory=dict)

    def modules(self, model):
        """The linear layers of a model's twin, with the paths of their Keras
        layers; raises a `ValueError` if the model has no such layer."""
        found = {}
        for i in range(getattr(model, "backbone", model).num_layers):
            for name, layers in self.linear.items():
                found[f"{self.prefix}{self.block.format(i)}.{name}"] = tuple(
                    f"transformer_layer_{i}/{layer}" for layer in layers
                )
        for name, layers in self.outside.items():
            found[f"{self.prefix}{name}"] = layers
        wanted = {path for layers in found.values() for path in layers}
        missing = sorted(wanted - set(layer_paths(model)))
        if missing:
            raise ValueError(
                "The layers of the model must have the names that KerasHub "
                f"gives them. Received: a {type(model).__name__} without "
                f"{missing}"
            )
        return found


def layout_of(model):
    """The `Layout` of a KerasHub model, or a `ValueError`."""
    names = _class_names(model)
    backbone = _class_names(getattr(model, "backbone", model))
    for name, layout in LAYOUTS.items():
        # Both, since another model may reuse the class of a task.
        if name in names and layout.backbone in backbone:
            return layout
    raise ValueError(
        "PEFT adapters can be exchanged for the KerasHub models "
        f"{sorted(LAYOUTS)} and their subclasses. "
        f"Received: a {type(model).__name__}"
    )


def _class_names(instance):
    return {cls.__name__ for cls in type(instance).__mro__}


_ENCODER = {
    "attention.self.query": ("self_attention_layer/query",),
    "attention.self.key": ("self_attention_layer/key",),
    "attention.self.value": ("self_attention_layer/value",),
    "attention.output.dense": ("self_attention_layer/attention_output",),
    "intermediate.dense": ("feedforward_intermediate_dense",),
    "output.dense": ("feedforward_output_dense",),
}

ROBERTA = Layout("RobertaBackbone", "encoder.layer.{}", _ENCODER)

BERT = Layout(
    "BertBackbone",
    "encoder.layer.{}",
    _ENCODER,
    outside={"pooler.dense": ("pooled_dense",)},
)

GPT2 = Layout(
    "GPT2Backbone",
    "h.{}",
    {
        "attn.c_attn": (
            "self_attention/query",
            "self_attention/key",
            "self_attention/value",
        ),
        "attn.c_proj": ("self_attention/attention_output",),
        "mlp.c_fc": ("feedforward_intermediate_dense",),
        "mlp.c_proj": ("feedforward_output_dense",),
    },
    transposed=True,
)

LLAMA = Layout(
    "LlamaBackbone",
    "layers.{}",
    {
        "self_attn.q_proj": ("self_attention/query",),
        "self_attn.k_proj": ("self_attention/key",),
        "self_attn.v_proj": ("self_attention/value",),
        "self_attn.o_proj": ("self_attention/attention_output",),
        "mlp.gate_proj": ("feedforward_gate_dense",),
        "mlp.up_proj": ("feedforward_intermediate_dense",),
        "mlp.down_proj": ("feedforward_output_dense",),
    },
)

LAYOUTS = {
    "RobertaBackbone": ROBERTA,
    "RobertaTextClassifier": dataclasses.replace(
        ROBERTA,
        prefix="roberta.",
        task_type="SEQ_CLS",
        head={
            "classifier.dense.weight": "pooled_dense/kernel",
            "classifier.dense.bias": "pooled_dense/bias",
            "classifier.out_proj.weight": "logits/kernel",
            "classifier.out_proj.bias": "logits/bias",
        },
    ),
    "BertBackbone": BERT,
    "BertTextClassifier": dataclasses.replace(
        BERT,
        prefix="bert.",
        task_type="SEQ_CLS",
        head={
            "classifier.weight": "logits/kernel",
            "classifier.bias": "logits/bias",
        },
    ),
    "GPT2Backbone": GPT2,
    "GPT2CausalLM": dataclasses.replace(
        GPT2, prefix="transformer.", task_type="CAUSAL_LM"
    ),
    "LlamaBackbone": LLAMA,
    "LlamaCausalLM": dataclasses.replace(
        LLAMA, prefix="model.", task_type="CAUSAL_LM"
    ),
}
