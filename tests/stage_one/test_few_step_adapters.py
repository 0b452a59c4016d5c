"""Turning the few-step adapters of one network on and off, with PEFT's own layers as they are loaded."""

from __future__ import annotations

import warnings

import pytest
from peft import LoraConfig

from swifti2v.errors import AdapterError
from swifti2v.stage_one import few_step_adapters


@pytest.fixture
def network(tiny_wan_dit):
    network = tiny_wan_dit(36, 16)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # PEFT says so for a second adapter
        for name in ("few_step", "low_res"):
            network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]), adapter_name=name)
    network.set_adapters(["few_step", "low_res"], [0.5, 0.7])
    return network


def test_merged_few_step_adapters_cannot_be_turned_off(network):
    network.fuse_lora(adapter_names=["few_step"])
    with pytest.raises(AdapterError, match="unfuse them"), few_step_adapters(network, enabled=False):
        pass
    with few_step_adapters(network, enabled=True):
        pass


def test_other_merged_adapters_would_hide_the_few_step_ones(network):
    network.fuse_lora(adapter_names=["low_res"])
    with pytest.raises(AdapterError, match="unfuse them"), few_step_adapters(network, enabled=True):
        pass


def test_disabled_adapters_stay_disabled(network):
    network.disable_adapters()
    layers = [module for module in network.modules() if hasattr(module, "lora_A")]
    assert layers
    with few_step_adapters(network, enabled=True):
        assert all(layer.active_adapters == ["few_step"] and not layer.disable_adapters for layer in layers)
    assert all(layer.disable_adapters for layer in layers)
