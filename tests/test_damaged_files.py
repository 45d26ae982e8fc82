"""Damaged files are refused, and leave the model as it was."""

import json
import shutil

import numpy as np
import pytest
from safetensors import numpy as safetensors

import keras_dylora as kd
from tests import backend
from tests.models import randomize, randomize_adapters, roberta_classifier


def enabled():
    model = randomize(roberta_classifier(num_layers=1), scale=0.1)
    kd.enable_dylora(model, rank=2, verbose=0)
    return randomize_adapters(model)


def plain_peft(model, folder):
    kd.to_peft(model, folder)
    (folder / "keras_dylora.json").unlink()


DOORS = {
    "native": (kd.save_adapter, kd.load_adapter),
    "peft": (kd.to_peft, kd.from_peft),
    "plain-peft": (plain_peft, kd.from_peft),
}


def cut(content):
    for size in range(0, len(content), 10):
        yield content[:size]


def flipped(content):
    rng = np.random.default_rng(0)
    for place in range(0, len(content), max(len(content) // 400, 1)):
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        yield bytes(changed)


def huge_header(content):
    for size in (2**20, 2**40, 2**63, 2**64 - 1):
        yield size.to_bytes(8, "little") + content[8:]


def swapped(content):
    tensors = safetensors.load(content)
    names = sorted(tensors)
    for a in names:
        for b in names[names.index(a) + 1 :]:
            if tensors[a].shape == tensors[b].shape:
                yield safetensors.save(
                    {**tensors, a: tensors[b], b: tensors[a]}
                )


def other_fields(content):
    fields = json.loads(content)
    for value in (None, -1, 1e400, "x", [], {}, True, {"a": [[]]}):
        for name in [*fields, "unknown"]:
            yield json.dumps({**fields, name: value}).encode()
    for name in fields:
        rest = {k: v for k, v in fields.items() if k != name}
        yield json.dumps(rest).encode()


DAMAGES = {
    "json": (cut, flipped, other_fields),
    "safetensors": (cut, flipped, huge_header, swapped),
    "md": (),  # for people, and nothing of it is read
}


def values(model):
    return [type(model), *backend.snapshot(model.variables)]


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "door",
    [
        "native",
        pytest.param("peft", marks=pytest.mark.long),
        pytest.param("plain-peft", marks=pytest.mark.long),
    ],
)
@pytest.mark.once
def test_damaged_files(door, tmp_path):
    save, load = DOORS[door]
    source = enabled()
    save(source, tmp_path / "whole")
    model = enabled()
    for layer in model.dylora_layers:
        layer.up.assign(np.zeros(layer.up.shape))
    untouched, loaded = values(model), values(source)
    damaged = 0
    for path in sorted((tmp_path / "whole").iterdir()):
        content = path.read_bytes()
        kind = path.suffix[1:]
        for damage in DAMAGES[kind]:
            for changed in damage(content):
                folder = tmp_path / "damaged"
                shutil.copytree(tmp_path / "whole", folder)
                (folder / path.name).write_bytes(changed)
                damaged += 1
                what = f"{damage.__name__} {path.name} {changed!r:.300}"
                try:
                    load(model, folder)
                except (ValueError, TypeError) as error:
                    assert "Received" in str(error), (what, error)
                    assert same(values(model), untouched), what
                else:
                    # What changed is of no effect. PEFT's own files have no
                    # checksum, so there it may be another adapter.
                    if door != "plain-peft":
                        assert same(values(model), loaded), what
                    for a, b in zip(
                        model.variables, untouched[1:], strict=True
                    ):
                        a.assign(b)
                shutil.rmtree(folder)
    print(f"{damaged} damaged files")
    assert damaged > 1000
