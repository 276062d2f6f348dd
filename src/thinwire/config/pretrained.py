"""Models in a folder as Hugging Face keeps them: config.json (the shape), model.safetensors (the weights), tokenizer.json.

Taken are those of thinwire's own shape, which is Llama's (Touvron et al. 2023): SmolLM2, TinyLlama, Llama 2, the first Llama 3,
Mistral without a sliding window. What a model has beyond it (biases, scaled positions, other activations) is refused by name,
since leaving it out would give another model. No torch; the weights are read in `models/llama.py`.
"""

import json
import math
from pathlib import Path
from typing import Any

from thinwire.config.model import ModelConfig
from thinwire.errors import UserError

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
BYTES, BYTE_VALUES = "bytes", 256
KINDS = ("llama", "mistral")
NORM_EPSILON = 1e-5
_ONLY = {
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "mlp_bias": (False, False),
    "sliding_window": (None, None),
    "rms_norm_eps": (NORM_EPSILON, 1e-6),
}
"""By key: what thinwire's model has, and what holds where the file does not say."""
_FIELDS = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "vocabulary": "vocab_size",
    "context": "max_position_embeddings",
}


def is_pretrained(folder: Path) -> bool:
    """Whether this is such a folder."""
    return (folder / CONFIG).is_file()


def tokenizer_of(folder: Path) -> str:
    """As data.tokenizer takes it: the folder's own; where there is none and the vocabulary is 256, bytes."""
    if not (folder / TOKENIZER).is_file() and is_pretrained(folder) and read_config(folder).get("vocab_size") == BYTE_VALUES:
        return BYTES
    return str(folder / TOKENIZER)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json. UserError if it is not there, or no JSON object."""
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; give a folder as `save_pretrained` of transformers writes it"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def read_shape(folder: Path) -> dict[str, Any]:
    """Fields of `ModelConfig` for the model in a folder. UserError for one of another shape than thinwire's."""
    path, content = folder / CONFIG, read_config(folder)
    if content.get("model_type") not in KINDS:
        raise UserError(f"{path}: model_type = {content.get('model_type')!r}; thinwire reads models of {' and '.join(KINDS)}")
    for key, (own, default) in _ONLY.items():
        value = content.get(key, default)
        if value != own and not (isinstance(own, float) and isinstance(value, float) and math.isclose(value, own, rel_tol=1e-6)):
            raise UserError(f"{path}: {key} = {value!r}, and thinwire's model has {own!r}; take a model that has it too")
    positions = content.get("rope_parameters") or content.get("rope_scaling") or {}
    kind = positions.get("rope_type", positions.get("type", "default"))
    if kind != "default":
        raise UserError(f"{path}: positions are scaled ({kind!r}), which thinwire's model does not do; take a model without")
    for key in _FIELDS.values():
        if not isinstance(content.get(key), int):
            raise UserError(f"{path}: {key} = {content.get(key)!r} is no whole number")
    shape = {field: content[key] for field, key in _FIELDS.items()}
    if (content.get("head_dim") or shape["width"] // shape["heads"]) * shape["heads"] != shape["width"]:
        raise UserError(f"{path}: {shape['heads']} heads of head_dim = {content['head_dim']} are not the width {shape['width']}")
    return shape | {
        "kv_heads": content.get("num_key_value_heads") or shape["heads"],
        "rotary_base": float(content.get("rope_theta") or positions.get("rope_theta") or 10_000.0),
        "tied": bool(content.get("tie_word_embeddings", False)),
        "positions": "rotary",
        "norm": "rms",
        "mlp": "swiglu",
    }


def config_of(shape: ModelConfig, end: int | None) -> dict[str, Any]:
    """config.json for a model of this shape. end: the token that ends a text. UserError for a shape that is not Llama's."""
    for field, own in (("positions", "rotary"), ("norm", "rms"), ("mlp", "swiglu")):
        if getattr(shape, field) != own:
            raise UserError(
                f"model.{field} = {getattr(shape, field)!r}: models of Llama's shape, which have {own!r}, are exported"
            )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(shape, field) for field, key in _FIELDS.items()},
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_width,
        "rope_theta": shape.rotary_base,
        "tie_word_embeddings": shape.tied,
        **{key: own for key, (own, _) in _ONLY.items() if key != "sliding_window"},
        "initializer_range": shape.init_std,
        "torch_dtype": shape.dtype,
        "bos_token_id": end,
        "eos_token_id": end,
    }
