"""Models of transformers in which computations are replaced by ours: equal to transformers' own, compiled too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from transformers import AutoModelForCausalLM

from millrace.models.architecture import adopt
from millrace.models.packing import document_inputs
from tests.models.conftest import SIZES
from tests.models.test_packed import loud, positions

KINDS = ("recurrent_gemma", "mamba2")


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_by_transformers_alone_it_is_the_same(
    kind: str, build: Callable, ids_BT: torch.Tensor, tmp_path: Path
) -> None:
    """Logits and gradients of rows of one document, and what is generated with a cache."""
    ours = loud(build(kind))
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert {type(module).__module__.split(".")[0] for module in theirs.modules()} <= {"transformers", "torch"}
    found = []
    for model in (ours, theirs):
        logits = model(input_ids=ids_BT, use_cache=False).logits
        logits.square().mean().backward()
        found.append([logits.detach(), {name: p.grad for name, p in model.named_parameters()}])
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        prompts = (ids_BT[:, :7], ids_BT[:, :1], ids_BT[:, :7])  # states of one are gone before the next
        texts = [[m.eval().generate(p, max_new_tokens=6, do_sample=False) for p in prompts] for m in (ours, theirs)]
        assert all(map(torch.equal, *texts))
        for number in range(7, 13):
            whole = ours(input_ids=texts[0][2][:, :number], use_cache=False).logits[:, -1].argmax(-1)
            assert torch.equal(whole, texts[0][2][:, number])


@pytest.mark.parametrize("kind", KINDS)
def test_is_adopted_once(kind: str, build: Callable) -> None:
    model = build(kind)
    before = [type(module) for module in model.modules()]
    adopt(model)
    assert [type(module) for module in model.modules()] == before
    assert any(cls.__module__.startswith("millrace.models") for cls in before)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_once_for_all_document_lengths(kind: str, build: Callable, ids_BT: torch.Tensor) -> None:
    """No break of the graph; loss and gradients equal those of eager."""
    torch._dynamo.reset()
    model: Any = build(kind, config={**SIZES[kind], "num_hidden_layers": 1})
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.base_model, backend=graphs, fullgraph=True)
    for rows in ([[10, 54], [64]], [[1, 2, 3], [30, 34]]):
        inputs = document_inputs(positions(rows, 64), rows, model.config._attn_implementation)
        found = []
        for run in (compiled, model.base_model):
            model.zero_grad()
            out = run(input_ids=ids_BT, **inputs).last_hidden_state
            out.square().sum().backward()
            found.append([out.detach(), *(p.grad.clone() for p in model.base_model.parameters())])
        torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    assert graphs.frame_count == 1


def test_nothing_of_a_step_is_kept(build: Callable, ids_BT: torch.Tensor) -> None:
    """transformers keeps the last state of every layer in the module, and with it the graph of the step."""
    model = build("recurrent_gemma")
    model(input_ids=ids_BT, use_cache=False)
    states = [module.recurrent_states for module in model.modules() if hasattr(module, "recurrent_states")]
    assert states and all(state is None for state in states)


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_recurrences_are_those_of_fp32(kind: str, build: Callable, ids_BT: torch.Tensor) -> None:
    """Given the same inputs: gates, decays and states are not rounded, nor are the gradients of their parameters."""
    model = build(kind)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out, leaves = _recurrence(model, ids_BT.shape)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=ids_BT, use_cache=False).logits.square().mean()
    loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def _recurrence(model: Any, shape: torch.Size) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Outputs of the first layer's recurrence, and parameters of it."""
    random, at = torch.Generator().manual_seed(0), torch.arange(shape[1])[None]
    if model.config.model_type == "mamba2":
        mixer = model.backbone.layers[0].mixer
        sizes = (mixer.intermediate_size, mixer.ssm_state_size, mixer.ssm_state_size, mixer.num_heads)
        *mixed, raw = (torch.randn(*shape, size, generator=random) for size in sizes)
        module, out = mixer, mixer._scan(tuple(mixed), raw, at)
        names = ("A_log", "dt_bias", "D")
    else:
        module = model.model.layers[0].temporal_block.rg_lru
        out = module(torch.randn(*shape, model.config.lru_width, generator=random), at)
        names = ("recurrent_param", "input_gate_weight", "recurrent_gate_bias")
    return out, [getattr(module, name) for name in names]
