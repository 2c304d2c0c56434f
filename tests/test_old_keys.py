"""Weights that version 0.1 stored are read: each class whose layers have changed name lists the old names."""

from __future__ import annotations

import copy
import importlib
import pkgutil

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import unigen
from unigen.backends.connector import Connector, ConnectorConfig
from unigen.hub.weights import load_strict, rename_old_keys
from unigen.inference.engine import Engine
from unigen.models.var import VARTransformer
from unigen.nn.denoisers import DiT
from unigen.nn.llamagen import TextBackbone


def old_state(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a module under the names of version 0.1."""
    state = dict(module.state_dict())
    for path, submodule in reversed([*module.named_modules()]):  # children first
        prefix = f"{path}." if path else ""
        for old, new in getattr(submodule, "OLD_KEYS", {}).items():
            for key in [key for key in state if f"{key}.".startswith(f"{prefix}{new}.")]:
                state[prefix + old + key[len(prefix + new) :]] = state.pop(key)
    return state


@pytest.fixture(scope="module")
def renamed_modules(engine: Engine) -> list[nn.Module]:
    """Modules that have, together, all classes with old names."""
    sizes = {"input_dim": 4, "output_dim": 4, "max_length": 2, "width": 8, "heads": 2, "layers": 1}
    connector = Connector(ConnectorConfig(**sizes, pooled_dim=4, variable_length=True))  # type: ignore[arg-type]
    llama = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=4)
    )
    t5 = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 5, "eos_token_id": 1}
    var = [VARTransformer(3, 64, 1, 5, shared) for shared in (False, True)]
    cross = DiT("dit-cross", 4, 2, 8, 1, 2, 8, 1)
    return [engine.model, TextBackbone(llama, t5, 2, 2), *var, cross, connector]


def test_old_weights_are_read(renamed_modules: list[nn.Module]) -> None:
    for module in renamed_modules:
        state = old_state(module)
        fresh = copy.deepcopy(module)
        with torch.no_grad():
            for p in fresh.parameters():
                p.zero_()
        load_strict(fresh, state, "an old file")
        for name, tensor in module.state_dict().items():
            assert torch.equal(fresh.state_dict()[name], tensor), name


def test_without_the_table_they_are_unknown(renamed_modules: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    connector = renamed_modules[-1]
    state = old_state(connector)
    assert rename_old_keys(connector, state).keys() == connector.state_dict().keys() != state.keys()
    monkeypatch.setattr(Connector, "OLD_KEYS", {})
    with pytest.raises(ValueError, match=r"missing: proj_in.*unknown: "):
        load_strict(connector, state, "an old file")


def test_old_and_new_names_together_are_refused(renamed_modules: list[nn.Module]) -> None:
    connector = renamed_modules[-1]
    with pytest.raises(ValueError, match=r"unknown: "):
        load_strict(connector, connector.state_dict() | old_state(connector), "a mixed file")


def test_all_classes_with_old_names_are_tested(renamed_modules: list[nn.Module]) -> None:
    for module in pkgutil.walk_packages(unigen.__path__, "unigen."):
        if "vllm" not in module.name and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    tested = {type(part) for module in renamed_modules for part in module.modules()}
    pending = [nn.Module]
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        assert "OLD_KEYS" not in vars(kind) or any(issubclass(other, kind) for other in tested), kind
