"""The model, the prompts and greedy decoding: plain transformers, the same on both sides.

Both processes must compute the same bits, so all that could make a difference is fixed here: the seed, the
dtype, the number of threads, and the shape of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils.logging import disable_progress_bar

from handoff.paged_cache import KVShape

NUM_REQUESTS = 16
STEPS = 16  # tokens that decode generates after the one that prefill found


def load_model(directory: str | None, threads: int) -> Any:
    """The model in `directory`, else a small Llama with random weights, the same in both processes."""
    torch.set_num_threads(threads)  # a matrix product that is split differently may round differently
    if directory is not None:
        disable_progress_bar()  # two processes' bars would run into one another
        return AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype="auto").eval()
    torch.manual_seed(2026)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        # At the usual 0.02 a random model repeats one token whatever it reads; that would prove nothing.
        initializer_range=0.06,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def kv_shape(model: Any) -> KVShape:
    """The shape of the model's KV cache. This demo pages full attention only: no sliding windows, no MLA."""
    config = model.config.get_text_config()
    # Older configurations, Mistral's among them, have no layer_types and say it by the window alone.
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    kind = "sliding_attention" if slides else "full_attention"
    kinds = set(getattr(config, "layer_types", None) or [kind])
    if kinds != {"full_attention"}:
        raise SystemExit(f"this demo pages full attention only, and the model has {', '.join(sorted(kinds))}")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return KVShape(config.num_hidden_layers, heads, head_dim, model.dtype)


def make_prompts(model: Any) -> dict[str, list[int]]:
    """Requests of 40 to 256 tokens, most of them with a partly filled last block."""
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(16)
    lengths = torch.randint(40, 257, (NUM_REQUESTS,), generator=generator).tolist()
    return {
        f"req-{index}": torch.randint(3, vocab_size, (length,), generator=generator).tolist()
        for index, length in enumerate(lengths)
    }


@dataclass(frozen=True)
class Batch:
    """Prompts padded on the left, so that every request's next token falls into the same column."""

    ids: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]]) -> Batch:
        width = max(map(len, prompts))
        ids = torch.tensor([[*[0] * (width - len(prompt)), *prompt] for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        return cls(ids, mask)

    @property
    def width(self) -> int:
        return int(self.ids.shape[1])


@dataclass(frozen=True)
class Generation:
    """What a run produced: tokens [requests, 1 + steps] and logits [requests, steps, vocabulary]."""

    tokens: torch.Tensor
    logits: torch.Tensor


def prefill(model: Any, batch: Batch, cache: Cache) -> torch.Tensor:
    """Fills the cache with the prompts; returns each request's first token."""
    positions = (batch.mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.inference_mode():
        out = model(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        )
    first: torch.Tensor = out.logits[:, -1].argmax(dim=-1)
    return first


def decode(model: Any, batch: Batch, cache: Cache, first: torch.Tensor) -> Generation:
    """Greedy decoding over a cache that holds the prompts."""
    tokens, logits, mask = [first], [], batch.mask
    for _ in range(STEPS):
        mask = torch.cat([mask, mask.new_ones(len(first), 1)], dim=1)
        with torch.inference_mode():
            out = model(
                input_ids=tokens[-1][:, None],
                attention_mask=mask,
                position_ids=mask.sum(dim=1, keepdim=True) - 1,
                past_key_values=cache,
            )
        logits.append(out.logits[:, -1])
        tokens.append(logits[-1].argmax(dim=-1))
    return Generation(torch.stack(tokens, dim=1), torch.stack(logits, dim=1))


def reference(model: Any, batch: Batch) -> Generation:
    """The same requests in this process alone: transformers' own cache, no blocks, no hand-off."""
    cache = DynamicCache(config=model.config)
    return decode(model, batch, cache, prefill(model, batch, cache))
