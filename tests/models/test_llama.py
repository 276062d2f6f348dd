"""Models in folders as Hugging Face keeps them: what transformers has saved is read as the same model, and what is written is
read by transformers as the same model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from thinwire.config.model import ModelConfig
from thinwire.config.pretrained import NORM_EPSILON, config_of, read_shape, tokenizer_of
from thinwire.errors import UserError
from thinwire.models import transformer
from thinwire.models.llama import WEIGHTS, read_weights, write_weights
from thinwire.models.transformer import Transformer

TOKENS = torch.arange(2 * 24).reshape(2, 24) * 7 % 96


def theirs(folder: Path, **changes: Any) -> Any:
    """A model with drawn weights, saved to `folder` in small files."""
    transformers = pytest.importorskip("transformers")
    shape = {
        "num_hidden_layers": 3,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 80,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "rms_norm_eps": NORM_EPSILON,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | changes)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder, max_shard_size="60KB")
    return model


def ours(folder: Path) -> Transformer:
    model = Transformer(ModelConfig(**read_shape(folder)))
    read_weights(model, folder)
    return model.eval()


def save(model: Transformer, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(model.config, 0)))
    write_weights(model, folder / WEIGHTS)


@pytest.mark.long
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "num_key_value_heads": 6}, {"rope_theta": 5e4}], ids=str)
@torch.no_grad()
def test_a_model_of_transformers_is_read_as_the_same_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = theirs(tmp_path, **changes)
    expected, found = model(TOKENS).logits, ours(tmp_path)(TOKENS)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_what_is_written_is_read_by_transformers_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    theirs(tmp_path / "theirs", tie_word_embeddings=tied)
    model = ours(tmp_path / "theirs")
    save(model, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="float32").eval()
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype="float32").eval()
    assert again.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in again.state_dict().items())
    assert torch.equal(again(TOKENS).logits, before(TOKENS).logits)


def test_reading_what_was_written_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    torch.manual_seed(1)
    model = Transformer(ModelConfig(layers=2, width=32, heads=4, kv_heads=2, vocabulary=50, tied=False))
    save(model, tmp_path / "it")
    again = ours(tmp_path / "it")
    assert again.config.model_copy(update={"init_std": model.config.init_std}) == model.config
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_norms_are_those_of_the_model() -> None:
    assert transformer.NORM_EPSILON == NORM_EPSILON


CONFIG = config_of(ModelConfig(layers=2, width=32, heads=4, vocabulary=256), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type = 'qwen2'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps = 1e-06"),
        ({"sliding_window": 4096, "model_type": "mistral"}, "sliding_window = 4096"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"positions are scaled \('llama3'\)"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"positions are scaled \('yarn'\)"),
        ({"head_dim": 16}, "4 heads of head_dim = 16 are not the width 32"),
        ({"vocab_size": None}, "vocab_size = None is no whole number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_shape_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(UserError, match=message):
        read_shape(tmp_path)


def test_a_number_that_was_float32_once_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"rms_norm_eps": 9.999999747378752e-06}))
    assert read_shape(tmp_path)["width"] == 32


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json cannot be read: No such file"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert tokenizer_of(tmp_path) == "bytes"
    pytest.importorskip("safetensors")
    with pytest.raises(UserError, match=r"holds neither model\.safetensors nor"):
        ours(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(UserError, match=r"lacks model-1\.safetensors"):
        ours(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from safetensors.torch import load_file, save_file

    save(Transformer(ModelConfig(layers=2, width=32, heads=4, vocabulary=256)), tmp_path / "it")
    path = tmp_path / "it" / WEIGHTS
    whole = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    for state, message in (
        (whole | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, r"holds model\.layers\.0\.self_attn\.q_proj\.bias"),
        ({key: value for key, value in whole.items() if key != name}, rf"holds no {name}"),
        (whole | {name: torch.zeros(3, 32)}, rf"{name} has the shape \[3, 32\]"),
    ):
        save_file(state, path)
        with pytest.raises(UserError, match=message):
            ours(tmp_path / "it")


def test_only_models_of_that_shape_are_written() -> None:
    with pytest.raises(UserError, match=r"model\.norm = 'layer'"):
        config_of(ModelConfig(layers=1, width=8, heads=1, norm="layer"), None)
