import re

import pytest
from pydantic import ValidationError

from thinwire.config.model import PRESETS, ModelConfig, preset
from thinwire.errors import UserError
from thinwire.workload import Workload

SCALE = {"m": 1e6, "b": 1e9, "t": 1e12}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_as_large_as_its_name(name: str) -> None:
    config = preset(name)
    named = float(name[:-1]) * SCALE[name[-1]]
    assert Workload.of_transformer(config, 1, 1).num_parameters == pytest.approx(named, rel=0.10)


def test_presets_grow() -> None:
    sizes = [Workload.of_transformer(preset(name), 1, 1).num_parameters for name in PRESETS]
    assert sizes == sorted(sizes)


def test_an_unknown_preset_names_those_that_exist() -> None:
    with pytest.raises(UserError, match=r"'2m' does not exist; there are 1m, 3m, .*, 1t"):
        preset("2m")


def test_the_usual_values_are_filled_in_and_survive_a_round_trip() -> None:
    config = ModelConfig(layers=2, width=96, heads=3)
    assert (config.kv_heads, config.hidden, config.head_width) == (3, 256, 32)
    assert ModelConfig(layers=2, width=96, heads=3, mlp="gelu").hidden == 384
    assert ModelConfig.model_validate(config.model_dump()) == config


def test_a_changed_preset_fills_in_anew() -> None:
    assert (preset("3m").hidden, preset("3m", {"width": 384}).hidden) == (512, 1024)
    with pytest.raises(UserError, match="width 100 is not a multiple of heads 3"):
        preset("1m", {"width": 100, "heads": 3})
    with pytest.raises(UserError, match="unknown key depth; allowed: layers, width, "):
        preset("1m", {"depth": 3})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 100, "heads": 3}, "width 100 is not a multiple of heads 3"),
        ({"width": 96, "heads": 6, "kv_heads": 4}, "heads 6 is not a multiple of kv_heads 4"),
        ({"width": 9, "heads": 3}, "even head: width 9 / heads 3 = 3"),
        ({"width": 96, "heads": 0}, "greater than or equal to 1"),
        ({"width": 96, "heads": 3, "mlp": "relu"}, "'gelu' or 'swiglu'"),
        ({"width": "wide", "heads": 3}, "width"),
        ({"width": 96, "heads": 3, "bias": True}, "bias"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        ModelConfig.model_validate({"layers": 1, **fields})
