"""Layouts: what KerasHub's layers are called in Hugging Face's models."""

import dataclasses

from keras_dylora.attachment import layer_paths


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the layers of one architecture are named on both sides.

    Args:
        backbone: str. Class of the KerasHub backbone.
        task_type: str. PEFT's name of the task.
        block: str. Name of a Hugging Face block, `{}` for its number.
        block_modules: dict of module name, in a block, to the Keras layers
            that it is made of, in the order of its outputs.
        modules: the same for modules outside of the blocks.
        saved: dict of module that is trained in full to the Keras layers in
            it, each by the name it has in the module, `""` for the module
            itself.
        fan_in_fan_out: bool. Whether modules store kernels as Keras does.
    """

    backbone: str
    task_type: str
    block: str
    block_modules: dict
    modules: dict = dataclasses.field(default_factory=dict)
    saved: dict = dataclasses.field(default_factory=dict)
    fan_in_fan_out: bool = False

    def modules_of(self, model):
        """All modules of a model that can be adapted.

        Args:
            model: the KerasHub task.

        Returns:
            A dict of module name to a dict of path to Keras layer.
        """
        paths = layer_paths(model)
        found = {}
        for i in range(model.backbone.num_layers):
            for module, layers in self.block_modules.items():
                found[f"{self.block.format(i)}.{module}"] = [
                    f"transformer_layer_{i}/{layer}" for layer in layers
                ]
        found.update(self.modules)
        return {
            module: {path: paths[path] for path in group}
            for module, group in found.items()
        }


def _encoder(prefix):
    """Blocks of the BERT family."""
    return {
        "task_type": "SEQ_CLS",
        "block": f"{prefix}.encoder.layer.{{}}",
        "block_modules": {
            "attention.self.query": ["self_attention_layer/query"],
            "attention.self.key": ["self_attention_layer/key"],
            "attention.self.value": ["self_attention_layer/value"],
            "attention.output.dense": ["self_attention_layer/attention_output"],
            "intermediate.dense": ["feedforward_intermediate_dense"],
            "output.dense": ["feedforward_output_dense"],
        },
    }


_LLAMA = {
    "task_type": "CAUSAL_LM",
    "block": "model.layers.{}",
    "block_modules": {
        "self_attn.q_proj": ["self_attention/query"],
        "self_attn.k_proj": ["self_attention/key"],
        "self_attn.v_proj": ["self_attention/value"],
        "self_attn.o_proj": ["self_attention/attention_output"],
        "mlp.gate_proj": ["feedforward_gate_dense"],
        "mlp.up_proj": ["feedforward_intermediate_dense"],
        "mlp.down_proj": ["feedforward_output_dense"],
    },
}

LAYOUTS = {
    "RobertaTextClassifier": Layout(
        backbone="RobertaBackbone",
        saved={"classifier": {"dense": "pooled_dense", "out_proj": "logits"}},
        **_encoder("roberta"),
    ),
    "BertTextClassifier": Layout(
        backbone="BertBackbone",
        modules={"bert.pooler.dense": ["pooled_dense"]},
        saved={
            "bert.pooler.dense": {"": "pooled_dense"},
            "classifier": {"": "logits"},
        },
        **_encoder("bert"),
    ),
    "GPT2CausalLM": Layout(
        backbone="GPT2Backbone",
        task_type="CAUSAL_LM",
        block="transformer.h.{}",
        block_modules={
            "attn.c_attn": [
                "self_attention/query",
                "self_attention/key",
                "self_attention/value",
            ],
            "attn.c_proj": ["self_attention/attention_output"],
            "mlp.c_fc": ["feedforward_intermediate_dense"],
            "mlp.c_proj": ["feedforward_output_dense"],
        },
        fan_in_fan_out=True,
    ),
    "Llama3CausalLM": Layout(backbone="LlamaBackbone", **_LLAMA),
    "LlamaCausalLM": Layout(backbone="LlamaBackbone", **_LLAMA),
}


def layout_of(model):
    """The `Layout` of a KerasHub task, or a `ValueError`."""
    names = [cls.__name__ for cls in type(model).__mro__]
    backbone = type(getattr(model, "backbone", None)).__mro__
    for name in names:
        layout = LAYOUTS.get(name)
        # Some tasks inherit from one of another architecture.
        if layout and layout.backbone in [cls.__name__ for cls in backbone]:
            return layout
    raise ValueError(
        "The architecture must be one that has a Hugging Face counterpart "
        f"here: {', '.join(LAYOUTS)}. Received: {model!r} (of type "
        f"{getattr(type(model), 'original_class', type(model)).__name__})"
    )
