"""Precision advice is text that the libraries it is for can load and run."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from foreshock.api.diagnosis import CAUSES, Cause
from foreshock.api.precision_advice import abstains, precision_advice

LAYERS = ("blocks.0.mlp.down", "blocks.2.attention.qkv")


def cause(name: str, probability: float = 0.9) -> Cause:
    return Cause(
        name=name,
        probability=probability,
        layers=LAYERS,
        role="input",
        statistic="headroom_log2",
        since_step=3,
        evidence="",
        remedy="",
        source="",
    )


def test_there_is_none_for_what_is_no_matter_of_precision() -> None:
    for name in ("learning_rate", "bad_data", "unknown"):
        assert precision_advice([cause(name)]) is None
    assert precision_advice([cause("scale", 0.4), cause("outlier", 0.3)]) is None
    assert precision_advice([]) is None
    assert {n for n in CAUSES if precision_advice([cause(n)])} == {"scale", "underflow", "outlier"}


def test_it_abstains_when_nothing_stands_out() -> None:
    assert abstains([])
    assert abstains([cause("unknown", 0.9)])
    assert abstains([cause("scale", 0.4)])
    assert not abstains([cause("scale", 0.6)])


def test_the_debug_config_names_the_layers_and_no_others() -> None:
    config_manager: Any = pytest.importorskip("nvdlfw_inspect.config_manager")
    advice = precision_advice([cause("outlier")])
    assert advice is not None
    (section,) = yaml.safe_load(advice.transformer_engine_debug).values()
    assert section["enabled"] is True
    assert section["transformer_engine"] == {"DisableFP8Layer": {"enabled": True}}
    spec = config_manager.LayerSpec()
    config_manager.set_all_spec_attributes(spec, section["layers"])
    spec.verify_validity()
    pattern = re.compile(section["layers"]["layer_name_regex_pattern"])
    matched = [
        name
        for name in (*LAYERS, f"model.{LAYERS[0]}", "blocks.0.mlp.down_too", "blocks.10.mlp.down")
        if pattern.match(name)
    ]
    assert matched == [*LAYERS, f"model.{LAYERS[0]}"]


def test_the_filter_runs_in_torchao_and_leaves_the_layers_alone() -> None:
    float8: Any = pytest.importorskip("torchao.float8")
    import torch
    from torch import nn

    advice = precision_advice([cause("scale")])
    assert advice is not None
    scope: dict[str, Any] = {}
    exec(advice.torchao_filter, scope)
    attention = nn.ModuleDict({"qkv": nn.Linear(16, 48), "out": nn.Linear(16, 16)})
    block = nn.ModuleDict(
        {"attention": attention, "mlp": nn.ModuleDict({"down": nn.Linear(32, 16)})}
    )
    model = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    float8.convert_to_float8_training(model, module_filter_fn=scope["module_filter_fn"])
    kinds = {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert kinds == {
        "blocks.0.attention.qkv": "Float8Linear",
        "blocks.0.attention.out": "Float8Linear",
        "blocks.0.mlp.down": "Linear",
    }
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["scale", "underflow", "outlier"])
def test_the_recipe_is_python(name: str) -> None:
    advice = precision_advice([cause(name)])
    assert advice is not None
    compile(advice.transformer_engine_recipe, "recipe", "exec")
