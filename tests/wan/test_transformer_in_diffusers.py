"""StageTwoTransformer inside diffusers' machinery: checkpointing, compilation, LoRAs, offloading, several ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, attention_backend
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from peft import LoraConfig

from swifti2v.wan.transformer import StageTwoTransformer
from tests.wan.stage_two_inputs import TOKENS_PER_FRAME, TOLERANCE, make_inputs, run

if TYPE_CHECKING:
    from pathlib import Path


class TestInsideDiffusers:
    def test_gradient_checkpointing(self, transformer: StageTwoTransformer) -> None:
        def gradients() -> dict[str, torch.Tensor]:
            transformer.zero_grad()
            transformer(**make_inputs(), frame_kinds=torch.tensor([1, 2, 0])).sample.square().mean().backward()
            return {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}

        plain = gradients()
        transformer.enable_gradient_checkpointing()
        checkpointed = gradients()
        assert plain.keys() == checkpointed.keys() == dict(transformer.named_parameters()).keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed[name], gradient, msg=name)

    def test_regional_compilation(self, transformer: StageTwoTransformer) -> None:
        inputs = make_inputs()
        expected = run(transformer, inputs)
        compiled = 0

        def backend(graph: Any, example_inputs: Any) -> Any:
            nonlocal compiled
            compiled += 1
            return graph.forward

        torch._dynamo.reset()
        transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
        torch.testing.assert_close(run(transformer, inputs), expected, **TOLERANCE)
        assert compiled == 1  # once for all blocks
        torch._dynamo.reset()

    def test_lora(self, transformer: StageTwoTransformer, base: Any, tmp_path: Path) -> None:
        inputs = make_inputs()
        expected = run(transformer, inputs)
        targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
        transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=targets), "style")
        adapted = run(transformer, inputs)
        assert (adapted - expected).abs().max() > 1e-3
        scaled = run(transformer, inputs, attention_kwargs={"scale": 0.0})
        torch.testing.assert_close(scaled, expected, **TOLERANCE)
        transformer.save_lora_adapter(tmp_path, "style")
        again = StageTwoTransformer.from_wan(base)
        again.load_lora_adapter(tmp_path, prefix=None, adapter_name="style", use_safetensors=True)
        again.set_adapters(["style"], [1.0])
        torch.testing.assert_close(run(again, inputs), adapted, **TOLERANCE)

    @pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
    def test_group_offload(self, transformer: StageTwoTransformer, offload_type: str) -> None:
        inputs = make_inputs()
        expected = run(transformer, inputs)
        options = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
        cpu = torch.device("cpu")
        transformer.enable_group_offload(cpu, cpu, offload_type=offload_type, use_stream=False, **options)
        torch.testing.assert_close(run(transformer, inputs), expected, rtol=0, atol=0)

    def test_layerwise_casting_keeps_the_kinds(self, transformer: StageTwoTransformer) -> None:
        inputs = make_inputs()
        expected = run(transformer, inputs)
        transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        assert transformer.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
        assert transformer.frame_kind_table.dtype == torch.float32
        assert (run(transformer, inputs) - expected).abs().max() < 0.2 * expected.abs().max()

    def test_first_block_cache(self, transformer: StageTwoTransformer) -> None:
        inputs = make_inputs()
        other = inputs | {"hidden_states": inputs["hidden_states"] * 1.01}
        expected = run(transformer, inputs)
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        transformer.enable_cache(FirstBlockCacheConfig(threshold=1e3))
        transformer.blocks[1].attn1.to_q.register_forward_hook(count)
        with transformer.cache_context("segment"):
            torch.testing.assert_close(run(transformer, inputs), expected, **TOLERANCE)
            run(transformer, other)
        assert calls == 1
        transformer.disable_cache()
        run(transformer, other)
        assert calls == 2

    def test_attention_goes_through_the_dispatcher(
        self, transformer: StageTwoTransformer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        attentions = [attention for block in transformer.blocks for attention in (block.attn1, block.attn2)]
        assert all(type(attention.processor) is WanAttnProcessor for attention in attentions)
        inputs = make_inputs()
        expected = run(transformer, inputs)
        backend = AttentionBackendName._NATIVE_MATH
        original, calls = _AttentionBackendRegistry._backends[backend], []
        monkeypatch.setitem(
            _AttentionBackendRegistry._backends, backend, lambda **options: calls.append(1) or original(**options)
        )
        with attention_backend("_native_math"):
            torch.testing.assert_close(run(transformer, inputs), expected, **TOLERANCE)
        assert len(calls) == len(attentions)

    def test_block_names_are_declared(self, transformer: StageTwoTransformer) -> None:
        """device_map and regional compilation find the blocks by the name of their class."""
        names = {type(block).__name__ for block in transformer.blocks}
        assert set(transformer._no_split_modules) == set(transformer._repeated_blocks) == names


CONTEXT_PARALLEL_CASES = [
    # Three frames on two ranks: the middle one is split between them.
    ({"ulysses_degree": 2}, 3),
    ({"ulysses_degree": 2}, 2),
]  # ring attention needs a backend that returns its log-sum-exp, and no CPU one does


def run_both_ways(transformer: Any, frames: int) -> list[torch.Tensor]:
    inputs = make_inputs(frames=frames)
    positions, kinds = torch.arange(frames) * 2, torch.arange(frames) % 4
    return [
        run(transformer, inputs, frame_positions=positions, frame_kinds=kinds),
        run(transformer, inputs | {"timestep": torch.tensor([500.0, 20.0])}),
    ]


def context_parallel_rank(rank: int, folder: str) -> None:
    import torch.distributed as dist
    from diffusers import ContextParallelConfig

    torch.set_num_threads(1)
    # diffusers numbers the devices of the accelerator, and a machine without one has none.
    torch.accelerator.device_count = lambda: 1
    torch._C._get_accelerator = lambda: torch.device("cpu")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = []
    for degrees, frames in CONTEXT_PARALLEL_CASES:
        transformer = StageTwoTransformer.from_pretrained(folder)
        lengths: list[int] = []
        for block in transformer.blocks:
            block.register_forward_hook(lambda _module, _inputs, output, kept=lengths: kept.append(output.shape[1]))
        transformer.enable_parallelism(config=ContextParallelConfig(**degrees))
        results.append((run_both_ways(transformer, frames), lengths))
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_context_parallel_of_two_processes(transformer: StageTwoTransformer, tmp_path: Path) -> None:
    torch.nn.init.normal_(transformer.frame_kind_table)
    transformer.save_pretrained(tmp_path)
    torch.multiprocessing.spawn(context_parallel_rank, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        results = torch.load(tmp_path / f"rank{rank}.pt")
        for (degrees, frames), (outputs, lengths) in zip(CONTEXT_PARALLEL_CASES, results, strict=True):
            assert lengths == [frames * TOKENS_PER_FRAME // 2] * 4, (degrees, frames)
            for output, expected in zip(outputs, run_both_ways(transformer, frames), strict=True):
                torch.testing.assert_close(output, expected, **TOLERANCE)
