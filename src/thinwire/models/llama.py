"""The weights of a `Transformer` under the names of Hugging Face's Llama, in safetensors files.

thinwire's projections are fused, Llama's are not: one matrix here is several there, one above the other.

    attention.qkv = [q_proj; k_proj; v_proj]      mlp.up = [gate_proj; up_proj]      all others one to one

Both turn the pairs (x[i], x[i + D/2]) of a head by the same angles, so no rows change places.
"""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from thinwire.config.model import ModelConfig
from thinwire.errors import UserError
from thinwire.models.transformer import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_COMPUTED = ("rotary_emb.inv_freq",)
"""Ends of names in old files that hold no weights."""


def names_of(config: ModelConfig) -> dict[str, tuple[tuple[str, int], ...]]:
    """By parameter of the `Transformer`: Llama's names, each with its number of rows, in the order in which they are stacked.
    UserError for one of experts, which Llama has not."""
    if config.experts:
        raise UserError(f"model.experts = {config.experts}: folders of Llama's shape have one MLP a block; set it to 0")
    width, keys = config.width, config.kv_heads * config.head_width
    block = {
        "attention_norm.weight": (("input_layernorm", width),),
        "attention.qkv.weight": (("self_attn.q_proj", width), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)),
        "attention.out.weight": (("self_attn.o_proj", width),),
        "mlp_norm.weight": (("post_attention_layernorm", width),),
        "mlp.up.weight": (("mlp.gate_proj", config.hidden), ("mlp.up_proj", config.hidden)),
        "mlp.down.weight": (("mlp.down_proj", width),),
    }
    return {
        "embed.weight": (("model.embed_tokens.weight", config.vocabulary),),
        **{
            f"blocks.{index}.{name}": tuple((f"model.layers.{index}.{their}.weight", rows) for their, rows in parts)
            for index in range(config.layers)
            for name, parts in block.items()
        },
        "norm.weight": (("model.norm.weight", width),),
        **({} if config.tied else {"head.weight": (("lm_head.weight", config.vocabulary),)}),
    }


@torch.no_grad()
def read_weights(model: Transformer, folder: Path) -> None:
    """Into a model of the folder's shape, in the dtype and on the device that it has. UserError for files that lack a weight,
    have one of another shape, or have one that the model does not."""
    safe_open = _safetensors().safe_open
    with ExitStack() as opened:
        files = [opened.enter_context(safe_open(path, framework="pt")) for path in _files(folder)]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
        names, tied = names_of(model.config), {"lm_head.weight"} if model.config.tied else set()
        known = {their for parts in names.values() for their, _ in parts} | tied
        if unknown := [name for name in where if name not in known and not name.endswith(_COMPUTED)]:
            raise UserError(f"{folder} holds {unknown[0]}, which thinwire's model has not; without it, it would be another model")
        for name, parameter in model.named_parameters():
            begin = 0
            for their, rows in names[name]:
                part = parameter[begin : begin + rows]
                if their not in where:
                    raise UserError(f"{folder} holds no {their}, which its config.json asks for")
                read = where[their].get_tensor(their)
                if read.shape != part.shape:
                    raise UserError(
                        f"{folder}: {their} has the shape {list(read.shape)}, and the model's is {list(part.shape)}; leave the "
                        "shape in [model] to the folder's config.json"
                    )
                part.copy_(read)
                begin += rows


def write_weights(model: Transformer, path: Path) -> None:
    """All weights to one file, in their dtype."""
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        parts = names_of(model.config)[name]
        for (their, _), part in zip(parts, parameter.detach().cpu().split([rows for _, rows in parts]), strict=True):
            state[their] = part.clone()
    _safetensors()
    from safetensors.torch import save_file

    save_file(state, path, metadata={"format": "pt"})


def _files(folder: Path) -> Iterable[Path]:
    """One, or those that the index lists."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} holds neither {WEIGHTS} nor {INDEX}; save it with `save_pretrained` of transformers")
    listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    files = [folder / name for name in dict.fromkeys(listed)]
    if absent := [path for path in files if not path.is_file()]:
        raise UserError(f"{folder} lacks {absent[0].name}, which {INDEX} lists; copy the whole folder")
    return files


def _safetensors() -> Any:
    try:
        import safetensors
    except ImportError:
        raise UserError("weights in safetensors files need the extra `pretrained`; pip install 'thinwire[pretrained]'") from None
    return safetensors
