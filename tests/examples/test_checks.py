"""The demo's checks, shown to fail: on wrong digests, on one wrong bit, on each damage to a paged cache."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from handoff.checks import (
    CheckFailed,
    block_digests,
    check_blocks,
    check_differs,
    check_equal,
    differing_rows,
)
from handoff.controls import controls
from handoff.model import STEPS, Batch, Generation, decode, kv_shape, prefill, reference
from handoff.paged_cache import KVShape, PagedCache, PagedMemory
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = KVShape(num_layers=2, num_kv_heads=2, head_dim=4, dtype=torch.bfloat16, tokens_per_block=4)
LENGTHS = {"a": 9, "b": 4, "c": 7}
DIGESTS = {"a": [["1", "2"], ["3", "4"]], "b": [["5"], ["6"]]}


def generation() -> Generation:
    torch.manual_seed(1)
    return Generation(torch.arange(12).reshape(3, 4), torch.randn(3, 3, 8, dtype=torch.bfloat16))


def test_blocks_are_counted() -> None:
    assert check_blocks(DIGESTS, DIGESTS) == 6


@pytest.mark.parametrize(
    ("received", "complaint"),
    [
        ({**DIGESTS, "a": [["1", "2"], ["4", "3"]]}, "a: bytes differ in layer 1"),
        ({**DIGESTS, "b": [["5"], ["5"]]}, "b: bytes differ in layer 1"),
        ({**DIGESTS, "b": [["5"]]}, "b: these are not as many"),
        ({**DIGESTS, "a": [["1"], ["3"]]}, "a: these are not as many"),
        ({"a": DIGESTS["a"]}, "requests differ"),
    ],
)
def test_wrong_blocks_are_noticed(received: dict[str, list[list[str]]], complaint: str) -> None:
    with pytest.raises(CheckFailed, match=complaint):
        check_blocks(received, DIGESTS)


def test_a_digest_covers_every_byte_of_its_block_and_no_other() -> None:
    tensors = SHAPE.allocate(num_blocks=3, fill=0.0)
    before = block_digests(tensors, [0, 1, 2])
    raw = tensors[1].view(torch.uint8)
    for place in range(raw[0].numel()):
        raw[1].view(-1)[place] ^= 1
        after = block_digests(tensors, [0, 1, 2])
        assert [after[0], after[1][0], after[1][2]] == [before[0], before[1][0], before[1][2]]
        assert after[1][1] != before[1][1]
        raw[1].view(-1)[place] ^= 1


def test_equal_runs_are_equal() -> None:
    check_equal(generation(), generation())


@pytest.mark.parametrize("row", [0, 1, 2])
def test_one_wrong_bit_of_one_logit_is_noticed(row: int) -> None:
    wrong = generation()
    wrong.logits[row].view(torch.uint8)[-1, -1] ^= 1
    with pytest.raises(CheckFailed, match=rf"requests \[{row}\]"):
        check_equal(wrong, generation())


def test_one_wrong_token_is_noticed() -> None:
    wrong = generation()
    wrong.tokens[2, 3] += 1
    with pytest.raises(CheckFailed, match="tokens are not"):
        check_equal(wrong, generation())


def test_equal_means_bits_not_numbers() -> None:
    zeros = generation()
    zeros.logits.zero_()
    negative = replace(zeros, logits=-zeros.logits)
    assert torch.equal(zeros.logits, negative.logits)
    assert differing_rows(zeros, negative) == [0, 1, 2]
    nan = replace(zeros, logits=zeros.logits + float("nan"))
    assert differing_rows(nan, nan) == []


def test_logits_of_another_form_are_noticed() -> None:
    with pytest.raises(CheckFailed, match="another form"):
        check_equal(replace(generation(), logits=generation().logits.float()), generation())


def test_a_control_that_changes_nothing_fails() -> None:
    with pytest.raises(CheckFailed, match="control 'x'"):
        check_differs("x", generation(), generation(), [0])


def test_a_control_that_changes_too_much_fails() -> None:
    wrong = generation()
    wrong.logits.zero_()
    assert check_differs("x", wrong, generation(), range(3)) == 0
    with pytest.raises(CheckFailed, match=r"\[0\] should differ, \[0, 1, 2\] do"):
        check_differs("x", wrong, generation(), [0])


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


class Paged:
    """A computed prompt in blocks that began as NaN, and the stock run that it must equal."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        prompts = [[5, 6, 7] * 7, [8, 9] * 8, [10] * 30]
        lengths = {f"r{index}": len(prompt) for index, prompt in enumerate(prompts)}
        self.model, self.batch = model, Batch.of(prompts)
        self.memory = PagedMemory(kv_shape(model), lengths, room=STEPS, spare=5, seed=4, fill=float("nan"))
        self.stored: list[int] = []
        cache = PagedCache(self.memory, on_layer_stored=self.stored.append)
        self.first = prefill(model, self.batch, cache)
        self.want = reference(model, self.batch)

    def generate(self) -> Generation:
        cache = PagedCache(self.memory, length=self.batch.width)
        return decode(self.model, self.batch, cache, self.first)


def test_a_paged_cache_computes_what_a_stock_cache_computes(model: LlamaForCausalLM) -> None:
    paged = Paged(model)
    check_equal(paged.generate(), paged.want)
    assert paged.stored == [0, 1, 2]  # each layer told once, in order: what a gate needs


def test_a_prompt_is_written_to_its_own_slots_only(model: LlamaForCausalLM) -> None:
    memory = Paged(model).memory
    for blocks in memory.tensors:
        written = ~blocks.isnan().any(dim=-1).any(dim=1)  # [blocks, tokens]
        assert written.sum() == sum(memory.lengths.values())
        for key, ids in memory.prompt_ids.items():
            assert written[ids].flatten()[: memory.lengths[key]].all()


@pytest.mark.parametrize("control", ["one block swapped", "one layer shifted", "KV zeroed"])
def test_each_damage_is_noticed(model: LlamaForCausalLM, control: str) -> None:
    paged = Paged(model)
    (chosen,) = [found for found in controls(paged.memory) if found.name == control]
    chosen.damage()
    damaged = paged.generate()
    check_differs(control, damaged, paged.want, chosen.rows)
    with pytest.raises(CheckFailed, match="logits differ"):
        check_equal(damaged, paged.want)


def first_slot(memory: PagedMemory) -> None:
    """One element of one key of the first request."""
    memory.tensors[0][memory.prompt_ids["r0"][0], 0, 0, 0] += 1


def never_received(memory: PagedMemory) -> None:
    """A block that stayed as it was allocated."""
    memory.tensors[2][memory.prompt_ids["r1"][0]] = float("nan")


@pytest.mark.parametrize(("damage", "row"), [(first_slot, 0), (never_received, 1)])
def test_small_damage_is_noticed(
    model: LlamaForCausalLM, damage: Callable[[PagedMemory], None], row: int
) -> None:
    paged = Paged(model)
    damage(paged.memory)
    with pytest.raises(CheckFailed, match=rf"requests \[{row}\]"):
        check_equal(paged.generate(), paged.want)
