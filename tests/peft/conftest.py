"""Transformers models and their Keras twins, by name."""

import copy

import pytest
import torch

from tests.peft.twins import MODELS, ROBERTA


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    """Transformers models by name, each with a folder that holds it."""
    made = {}

    def get(name):
        if name not in made:
            config, twin_class, _, _ = MODELS[name]
            torch.manual_seed(0)
            twin = twin_class(config).eval()
            for parameter in twin.parameters():  # so that biases count too
                parameter.data += 0.1 * torch.randn_like(parameter)
            if config is ROBERTA:  # zeros in the published weights
                twin.roberta.embeddings.token_type_embeddings.weight.data[:] = 0
            folder = tmp_path_factory.mktemp(name)
            twin.save_pretrained(folder)
            made[name] = twin, folder
        twin, folder = made[name]
        return copy.deepcopy(twin), folder

    return get


@pytest.fixture(scope="session")
def pair(twins):
    """A function that gives a transformers model and its Keras twin."""

    def make(name):
        twin, folder = twins(name)
        _, _, backbone_class, build = MODELS[name]
        return twin, build(backbone_class.from_preset(str(folder)), twin)

    return make
