"""Functions that make the Keras twin of a transformers model of any family."""

import keras_hub
import transformers

from keras_dylora.adapters.peft.families import layout_of
from keras_dylora.layers.kinds import geometry
from keras_dylora.layers.tree import Tree
from tests.models import VOCABULARY
from tests.peft.twins import with_head

HUB = keras_hub.models
LENGTH = 8
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
}
DECODER = {
    **SIZES,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2 * LENGTH,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def of(twin, config, **options):
    """A class of transformers with a configuration."""
    return (
        getattr(transformers, twin),
        getattr(transformers, config)(**options),
    )


def classifier(cls, backbone, head):
    """A function that makes a KerasHub classifier with the head of its twin."""

    def build(folder, twin):
        body = getattr(HUB, backbone).from_preset(str(folder))
        model = getattr(HUB, cls)(body, num_classes=3)
        return with_head(model, twin, head)

    return build


def task(cls):
    def build(folder, twin):
        return getattr(HUB, cls).from_preset(str(folder), preprocessor=None)

    return build


def by_hand(cls, backbone, names, **sizes):
    """A function that makes a model that KerasHub converts no checkpoint of.

    `names` is a dict of the names of variables that aren't of linear layers to
    those of transformers, with the number of the block left open; or makes it
    of KerasHub's variables by path.
    """

    def build(folder, twin):
        body = getattr(HUB, backbone)(
            **{
                "num_layers": 2,
                "hidden_dim": 16,
                "intermediate_dim": 24,
                **sizes,
            }
        )
        head = {"num_classes": 3} if cls.endswith("Classifier") else {}
        model = getattr(HUB, cls)(body, **head) if cls != backbone else body
        values = {k: x.detach().numpy() for k, x in twin.named_parameters()}
        tree, layout = Tree(model), layout_of(model)
        for module, paths in layout.modules(tree).items():
            if module == f"{layout.prefix}{layout.embedding}":
                continue  # is among the `names`
            ours = [tree.layers[path] for path in paths]
            columns = layout.columns(ours)
            for layer, places in zip(ours, columns, strict=True):
                matrix = values[f"{module}.weight"].T[:, places]
                layer.kernel.assign(geometry(layer).kernel(matrix))
                if layer.bias is not None:
                    bias = values[f"{module}.bias"][places]
                    layer.bias.assign(bias.reshape(layer.bias.shape))
        weights = tree.weights
        pairs = names(weights) if callable(names) else names
        for name, theirs in pairs.items():
            for i in range(2) if "{}" in name else [0]:
                weight = weights[name.format(i)]
                value = values[theirs.format(i)]
                if name.endswith(("reverse_embeddings", "/kernel")):
                    value = value.T
                # OPT has two rows before that of the first position.
                weight.assign(value[-weight.shape[0] :])
        return model

    return build


def norms(pairs, keras="gamma beta"):
    """The names of two norms' variables, by those of the norms."""
    theirs = ["weight", "bias"]
    return {
        f"{ours}/{a}": f"{name}.{b}"
        for ours, name in pairs.items()
        for a, b in zip(keras.split(), theirs, strict=False)
    }


LAYER = "transformer_layer_{}"
ENCODER_NORMS = {
    f"{LAYER}/self_attention_layer_norm": (
        "encoder.layer.{}.attention.output.LayerNorm"
    ),
    f"{LAYER}/feedforward_layer_norm": "encoder.layer.{}.output.LayerNorm",
}


def t5_names(weights):
    places = {"encoder": (0, 1), "decoder": (0, 1, 2)}
    theirs = [
        f"{half}.block.{i}.layer.{n}.layer_norm.weight"
        for half, numbers in places.items()
        for i in range(2)
        for n in numbers
    ]
    # Keras numbers them by itself, in this order.
    ours = [path for path in weights if "t5_layer_norm" in path]
    names = dict(zip(ours, theirs, strict=True))
    names["token_embedding/embeddings"] = "shared.weight"
    for half in places:
        names[f"{half}_output_layer_norm/weight"] = (
            f"{half}.final_layer_norm.weight"
        )
        bias = f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias"
        names[f"transformer_{half}_layer_0/self_attention/embeddings"] = (
            f"{bias}.weight"
        )
    return names


def t5(gated):
    return (
        of(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            feed_forward_proj="gated-relu" if gated else "relu",
        ),
        by_hand(
            "T5Seq2SeqLM",
            "T5Backbone",
            t5_names,
            vocabulary_size=VOCABULARY,
            num_heads=2,
            activation="relu",
            use_gated_activation=gated,
            dropout=0.0,
        ),
    )


def resnet(layer_type, filters):
    """A ResNet of two stages, of which KerasHub reads timm's alone."""
    stages = [(f"stack{i}_block{j}", i, j) for i in (0, 1) for j in (0, 1)]

    def build(folder, twin):
        body = HUB.ResNetBackbone(
            input_conv_filters=[64],
            input_conv_kernel_sizes=[7],
            stackwise_num_filters=[64, 8],
            stackwise_num_blocks=[2, 2],
            stackwise_num_strides=[1, 2],
            block_type=f"{layer_type}_block",
            image_shape=(32, 32, 3),
        )
        pairs = {"conv1": "embedder.embedder"}
        for ours, i, j in stages:
            theirs = f"encoder.stages.{i}.layers.{j}"
            pairs[f"{ours}_0"] = f"{theirs}.shortcut"
            pairs |= {
                f"{ours}_{n + 1}": f"{theirs}.layer.{n}" for n in range(3)
            }
        for ours, theirs in pairs.items():
            if f"{ours}_conv" not in [layer.name for layer in body.layers]:
                continue
            module = twin.resnet.get_submodule(theirs)
            kernel = module.convolution.weight.detach().numpy()
            body.get_layer(f"{ours}_conv").set_weights(
                [kernel.transpose(2, 3, 1, 0)]
            )
            norm = module.normalization
            values = norm.weight, norm.bias, norm.running_mean, norm.running_var
            body.get_layer(f"{ours}_bn").set_weights(
                [x.detach().numpy() for x in values]
            )
        model = HUB.ResNetImageClassifier(body, num_classes=3)
        return with_head(model, twin, {"predictions": "classifier.1"})

    twin = of(
        "ResNetForImageClassification",
        "ResNetConfig",
        hidden_sizes=filters,
        depths=[2, 2],
        layer_type=layer_type,
        num_labels=3,
    )
    return twin, build
