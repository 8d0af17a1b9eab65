"""Continuing a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def continue_text(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
    **given: Any,
) -> list[str]:
    """Continue each prompt by up to `tokens` tokens, stopping at the end of the document.

    Args:
        model: a causal model of `transformers`; partitioned under ZeRO 3, it is called on every rank alike.
        tokenizer: a `millrace.data.tokenizer.Tokenizer`.
        temperature: 0 takes the likeliest token; otherwise sampling from the 50 likeliest.
        given: what the model's forward gets beside the tokens, such as images.

    Returns:
        The continuations, without the prompts.
    """
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
    texts = []
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 50} if temperature else {"do_sample": False}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for prompt in prompts:
            ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode([prompt])[0].tolist()]], device=device)
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                eos_token_id=tokenizer.eos_id,
                pad_token_id=tokenizer.eos_id,
                synced_gpus=hasattr(model.get_input_embeddings().weight, "ds_id"),
                use_cache=True,
                **sampling,
                **given,
            )
            new = [t for t in out[0, ids.shape[1] :].tolist() if t != tokenizer.eos_id]
            texts.append(tokenizer.decode(new))
    model.train(was_training)
    return texts
