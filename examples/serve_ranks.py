"""Answers requests at different ranks in one batch, with TensorFlow alone.

    python -m examples.export_every_rank --output serving
    python examples/serve_ranks.py serving/shared 1 8

TensorFlow Serving takes the same artifact and the same requests:

    POST /v1/models/classifier:predict
    {"signature_name": "serve",
     "inputs": {"token_ids": [[…], […]], "padding_mask": [[…], […]],
                "segment_ids": [[…], […]], "rank": [1, 8]}}
"""

import argparse

import numpy as np
import tensorflow as tf


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", help="an export with the shared layout")
    parser.add_argument("ranks", nargs="+", type=int, help="one for each row")
    args = parser.parse_args(argv)
    serve = tf.saved_model.load(args.directory).signatures["serve"]
    _, specs = serve.structured_input_signature
    # The same tokens in every row, so that only the rank makes a difference.
    row = np.arange(1000, 1012)
    tensors = {
        name: tf.cast(np.tile(row, (len(args.ranks), 1)), spec.dtype)
        for name, spec in specs.items()
        if name != "rank"
    }
    if "segment_ids" in tensors:
        tensors["segment_ids"] = tf.zeros_like(tensors["segment_ids"])
    outputs = serve(rank=tf.constant(args.ranks), **tensors)
    for b, logits in zip(args.ranks, outputs["output_0"].numpy(), strict=True):
        print(f"rank {b}: logits {np.round(logits, 4)}")


if __name__ == "__main__":
    main()
