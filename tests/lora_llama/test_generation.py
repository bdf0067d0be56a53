"""Answers: batched as alone, sampled as asked, ended in time, and the model left as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lora_kernels import LoraConfig
from lora_llama.data import encode_prompt
from lora_llama.generation import generate_answers
from lora_llama.model import LoraLlamaForCausalLM
from lora_llama.options import ALL_PROJECTIONS

PROMPTS = ["a", "please add 12+34", "what?", [{"role": "user", "content": "hello " * 6}], "b c"]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def model(tiny_llama: Path) -> LoraLlamaForCausalLM:
    """Float32, with an adapter that has an effect."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=list(ALL_PROJECTIONS), init_lora_weights=False
    )
    return LoraLlamaForCausalLM.from_pretrained(tiny_llama, lora=config, dtype=torch.float32)


@pytest.fixture
def calls(model: LoraLlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each call of `model.generate` was given, and what it returned as "output"."""
    seen: list[dict[str, Any]] = []
    generate: Callable[..., Any] = model.generate

    def spy(**kwargs: Any) -> Any:
        output = generate(**kwargs)
        seen.append(kwargs | {"output": output, "training": model.training})
        return output

    monkeypatch.setattr(model, "generate", spy)
    return seen


def test_batched_answers_equal_single_ones(model, tokenizer, calls):
    alone = [generate_answers(model, tokenizer, [prompt], 12)[0] for prompt in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)
    lengths = [len(encode_prompt(prompt, tokenizer)) for prompt in PROMPTS]
    assert len(set(lengths)) == len(PROMPTS)
    for batch_size, batches in ((16, [5]), (2, [2, 2, 1]), (5, [5])):
        calls.clear()
        together = generate_answers(model, tokenizer, PROMPTS, 12, batch_size=batch_size)
        assert together == alone
        assert [len(call["input_ids"]) for call in calls] == batches
        # Padded on the left, and only as far as the batch needs.
        masks = [call["attention_mask"] for call in calls]
        assert [int(row.sum()) for mask in masks for row in mask] == lengths
        assert all(mask[:, -1].all() and mask.all(1).any() for mask in masks)
        assert all((mask.diff() >= 0).all() for mask in masks)


def test_an_answer_is_what_greedy_decoding_by_hand_gives(model, tokenizer):
    model.eval()
    for prompt in PROMPTS[:3]:
        ids = encode_prompt(prompt, tokenizer)
        chosen: list[int] = []
        while len(chosen) < 12 and tokenizer.eos_token_id not in chosen:
            row = torch.cat([ids, torch.tensor(chosen, dtype=torch.int64)])
            with torch.no_grad():
                chosen.append(int(model(row[None]).logits[0, -1].argmax()))
        expected = tokenizer.decode(chosen, skip_special_tokens=True)
        assert generate_answers(model, tokenizer, [prompt], 12) == [expected]


@pytest.mark.parametrize("limit", [1, 5])
def test_max_new_tokens(limit, model, tokenizer, calls):
    generate_answers(model, tokenizer, PROMPTS, limit)
    output, given = calls[0]["output"], calls[0]["input_ids"]
    assert output.shape == (len(PROMPTS), given.shape[1] + limit)


def test_temperature(model, tokenizer):
    def sampled(seed: int, temperature: float) -> list[str]:
        torch.manual_seed(seed)
        return generate_answers(model, tokenizer, PROMPTS, 12, temperature)

    assert sampled(0, 1.5) == sampled(0, 1.5) != sampled(1, 1.5)
    greedy = sampled(0, 0.0)
    assert sampled(1, 0.0) == greedy != sampled(0, 1.5)
    # Next to no temperature leaves the likeliest token.
    assert sampled(0, 1e-4) == greedy


def test_the_models_and_the_tokenizers_end_tokens_stop(model, tokenizer, calls):
    def generated() -> list[int]:
        calls.clear()
        generate_answers(model, tokenizer, ["a"], 12)
        return calls[0]["output"][0, calls[0]["input_ids"].shape[1] :].tolist()

    whole = generated()
    assert len(whole) == 12
    end = next(i for i in range(2, 12) if whole[i] not in whole[:i])
    for own in (whole[end], [261, whole[end]]):
        model.generation_config.eos_token_id = own
        assert generated() == whole[: end + 1]
    for own in (None, 1, [1, 261]):
        model.generation_config.eos_token_id = own
        assert generated() == whole
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(whole[end])
        assert generated() == whole[: end + 1]
        tokenizer.eos_token = "<|end|>"


@pytest.mark.parametrize("training", [False, True])
def test_the_training_mode_is_what_it_was(training, model, tokenizer, calls, monkeypatch):
    model.train(training)
    generate_answers(model, tokenizer, PROMPTS, 2)
    assert model.training is training and calls[0]["training"] is False

    def fail(**kwargs: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(torch.OutOfMemoryError):
        generate_answers(model, tokenizer, PROMPTS, 2)
    assert model.training is training
    assert all(module.training is training for module in model.modules())


def test_answers_leave_no_gradient_and_ignore_dropout(tiny_llama, tokenizer):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_dropout=0.9, target_modules=["v_proj"], init_lora_weights=False)
    model = LoraLlamaForCausalLM.from_pretrained(tiny_llama, lora=config).train()
    first = generate_answers(model, tokenizer, PROMPTS, 8)
    assert generate_answers(model, tokenizer, PROMPTS, 8) == first
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_a_chat_template_a_prompt_is_continued(model, tokenizer, calls):
    tokenizer.chat_template = None
    generate_answers(model, tokenizer, ["abc"], 2)
    assert calls[0]["input_ids"].tolist() == [tokenizer("abc")["input_ids"]]
    with pytest.raises(ValueError, match="at least one token"):
        generate_answers(model, tokenizer, ["abc", ""], 2)
    with pytest.raises(ValueError, match="no chat template"):
        generate_answers(model, tokenizer, [PROMPTS[3]], 2)
    assert len(calls) == 1


def test_no_prompts(model, tokenizer):
    assert generate_answers(model, tokenizer, []) == []


def test_a_token_that_the_model_does_not_know_is_an_error(model, tokenizer, calls):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    with pytest.raises(ValueError, match=r"^tokenizer: .* below 261, got 261"):
        generate_answers(model, tokenizer, ["a", "b <|new|>"], 2)
    assert not calls and len(generate_answers(model, tokenizer, ["a"], 2)) == 1
    # Padding is looked up too.
    tokenizer.pad_token = "<|new|>"
    with pytest.raises(ValueError, match=r"^tokenizer: .* below 261, got 261"):
        generate_answers(model, tokenizer, ["a"], 2)
