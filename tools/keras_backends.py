"""`examples/horovod_keras_mnist.py` without codes and with int8: accuracy, and what each rank's ledger has of gradients.

    KERAS_BACKEND=jax torchrun --nproc-per-node 2 tools/keras_backends.py [OPTION OF THE EXAMPLE ...]

Collectives are gloo's own, so that nothing is tried; metrics and the weights of rank 0 are counted too.
"""

import contextlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import horovod_keras_mnist as example
import keras

import thinwire


def main() -> None:
    """On each rank that torchrun has started."""
    ledger = thinwire.init(collectives="native")
    for kind in ("none", "int8"):
        before = ledger.sent_bytes
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
            accuracy = example.main(["--compression", kind, *sys.argv[1:]])
        if example.hvd.rank() == 0:
            run = f"{keras.config.backend()} | {example.hvd.size()} | {kind}"
            print(f"| {run} | {100 * accuracy:.2f} % | {(ledger.sent_bytes - before) / 1e6:.1f} MB |", flush=True)


if __name__ == "__main__":
    main()
