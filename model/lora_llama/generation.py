"""Answers from a causal language model: prompts rendered, batched, generated greedily, decoded."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_llama.batching import padding_id
from lora_llama.data import check_token_ids, encode_prompt

Prompt = str | list[dict[str, Any]]


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    batch_size: int = 16,
) -> list[str]:
    """The model's answers, one per prompt, without special tokens.

    Args:
        prompts: strings (one user turn), or lists of messages; the chat template renders them.
        temperature: 0 takes the likeliest token each time.
        batch_size: prompts generated together, padded on the left.

    Raises:
        ValueError: a prompt is malformed, has no token, or one that the model does not know.
    """
    pad = padding_id(tokenizer)
    encoded = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    if not all(len(row) for row in encoded):
        raise ValueError("prompts: expected at least one token in each")
    check_token_ids([*encoded, torch.tensor([pad])], model.config.vocab_size)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=_stop_tokens(model, tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        **sampling,
    )
    answers: list[str] = []
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(encoded), batch_size):
            rows = encoded[start : start + batch_size]
            length = max(len(row) for row in rows)
            input_ids = torch.full((len(rows), length), pad, dtype=torch.int64)
            attention_mask = torch.zeros_like(input_ids)
            for i, row in enumerate(rows):
                input_ids[i, length - len(row) :] = row
                attention_mask[i, length - len(row) :] = 1
            output = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                generation_config=settings,
            )
            answers += tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
    finally:
        model.train(was_training)
    return answers


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """What ends an answer: the model's own tokens, and the tokenizer's, which training appends."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    tokens = own if isinstance(own, list) else [own]
    stop = {token for token in (*tokens, tokenizer.eos_token_id) if token is not None}
    return sorted(stop) or None
