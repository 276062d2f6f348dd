"""Weights that passes see rounded as `shrink` will store them, in any model (quantisation-aware training, Jacob et al. 2018).

    r = what is stored of w, dense again     in forward and backward passes
    w <- w - update(d loss / d r)            w in full, at which the gradient at r is taken as it is (Bengio et al. 2013)

Whatever holds the weights computes with them: linear layers, convolutions, embeddings, an LSTM; and the score that is taken
inside is that of the shrunk model. `torchao_weights` rounds linear layers alone, in the formats of torchao.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from thinwire.compress.weights.shrink import Method


@contextmanager
def rounded(model: nn.Module, method: Method) -> Iterator[None]:
    """Inside, the matrices of `model` are what `method` keeps of them; afterwards what they were. Around a forward pass and its
    backward pass, not around the optimizer's step. Gradients stay where they are."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    with torch.no_grad():
        whole = [parameter.clone() for parameter in matrices]
        for parameter in matrices:
            parameter.copy_(method(parameter.detach().to("cpu", torch.float32)).dense())
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(matrices, whole, strict=True):
                parameter.copy_(values)
