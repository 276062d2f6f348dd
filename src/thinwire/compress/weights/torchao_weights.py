"""Quantised weights by torchao (extra `torchao`): after training, or trained with the rounding in place.

    prepare_qat(model, 4)      each linear layer computes with its weight as it will be stored; gradients pass straight through
    ... train ...
    convert(model)             the weight becomes the rounded one: the outputs stay what they were, to the bit

int8 has one scale for each row, int4 one for each `GROUP` values of a row. Embeddings stay as they are, and with them a head
that is tied to one. torchao keeps int4 values in a byte each (its packed kernels need a GPU): `stored_bytes` says what is
really there; `weights` packs two in a byte. Jacob et al. 2018 (quantisation-aware training).
"""

from typing import Any

import torch
from torch import nn

from thinwire.errors import UserError

GROUP = 32


def prepare_qat(model: nn.Module, bits: int) -> None:
    """Round weights in every forward pass from now on; in place, before the optimizer is made. UserError without torchao."""
    quantisation, qat = _torchao()
    _check_groups(model, bits)
    quantisation.quantize_(model, qat.QATConfig(_config(bits), step="prepare"))


def convert(model: nn.Module) -> None:
    """Store the weights of a prepared and trained model as rounded; in place. UserError for a model that was not prepared."""
    quantisation, qat = _torchao()
    prepared = [module for module in model.modules() if isinstance(module, qat.linear.FakeQuantizedLinear)]
    if not prepared:
        raise UserError("this model was not prepared for rounding; call prepare_qat before training, or round_weights after it")
    bits = 8 if prepared[0].weight_fake_quantizer.config.dtype == torch.int8 else 4
    quantisation.quantize_(model, qat.QATConfig(_config(bits), step="convert"))


def round_weights(model: nn.Module, bits: int) -> None:
    """Store the weights of a model that was trained without rounding; in place."""
    quantisation, _ = _torchao()
    _check_groups(model, bits)
    quantisation.quantize_(model, quantisation.Int8WeightOnlyConfig() if bits == 8 else _config(bits))


def stored_bytes(model: nn.Module) -> int:
    """Of all parameters, each once: of a quantised one the numbers, scales and zero points that torchao keeps."""
    return sum(_bytes(parameter) for parameter in model.parameters())


def _bytes(values: torch.Tensor) -> int:
    names = getattr(values, "tensor_data_names", ())
    if not names:
        return values.numel() * values.element_size()
    return sum(_bytes(getattr(values, name)) for name in names)


def _config(bits: int) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup

    if bits == 8:
        return IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))  # type: ignore[attr-defined]


def _check_groups(model: nn.Module, bits: int) -> None:
    if bits not in (4, 8):
        raise UserError(f"{bits} bits: torchao's weights have 8 or 4 here")
    for name, module in model.named_modules():
        if bits == 4 and isinstance(module, nn.Linear) and module.in_features % GROUP:
            raise UserError(f"{name} has {module.in_features} inputs, and int4 wants a multiple of {GROUP}; use 8 bits")


def _torchao() -> tuple[Any, Any]:
    try:
        from torchao import quantization
        from torchao.quantization import qat
    except ImportError:
        raise UserError("torchao is not installed; pip install 'thinwire[torchao]'") from None
    return quantization, qat
