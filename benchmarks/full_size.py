"""Cost of 2560x1408 at full size, without trained weights: compute and memory do not depend on their values.

Commands:
    python -m benchmarks.full_size                   on a GPU: the real pipeline, seconds, GiB, TFLOP/s a phase
    python -m benchmarks.full_size --cap 24GiB       the same while PyTorch may take no more than that, planned for it
    python -m benchmarks.full_size --decoder light   the same with TAEHV's small decoder
    python -m benchmarks.full_size --compile --quantization float8    with compiled blocks and float8 products; or int8
    python -m benchmarks.full_size --baseline        diffusers' own classes on the same shapes as well
    python -m benchmarks.full_size --device meta     anywhere: exact FLOPs and peak live bytes of each phase

Without a GPU ``meta`` is the default. Live bytes leave out weights, workspaces of kernels and fragmentation. Shares of
the roofline are of bfloat16's, whatever is multiplied. Phases are timed in a run that does one thing at a time, the
whole in another, as it is run; compiled blocks are compiled in one before.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import wraps
from typing import TYPE_CHECKING, Any

from benchmarks import full_size_networks as networks
from benchmarks.full_size_account import Row, accounts
from benchmarks.results import add_result_arguments, markdown_table, number, say, settings_of
from benchmarks.results import write_results as write
from swifti2v.memory.amounts import GIB

if TYPE_CHECKING:
    from collections.abc import Callable

    from swifti2v.geometry import Size

BF16_TFLOP_PER_SECOND = {
    "H200": 989.0,
    "H100": 989.0,
    "H800": 989.0,
    "RTX 4090": 165.0,
    "A100": 312.0,
    "RTX 3090": 71.0,
}
"""Dense bfloat16 peaks of the makers' data sheets; the roofline that shares refer to."""


class PhaseClock:
    """Seconds, calls and peak bytes of wrapped methods, with the device waited for around each call, in a context."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        self._wrapped = ExitStack()

    def __enter__(self) -> PhaseClock:
        return self

    def __exit__(self, *_error: object) -> None:
        self._wrapped.close()

    def wrap(self, owner: Any, method: str, phase: str) -> None:
        """Time every call of ``owner.method`` as part of `phase`."""
        import torch

        call = getattr(owner, method)

        @wraps(call)
        def timed(*arguments: Any, **options: Any) -> Any:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            result = call(*arguments, **options)
            torch.cuda.synchronize()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started
            self.calls[phase] = self.calls.get(phase, 0) + 1
            self.peaks[phase] = max(self.peaks.get(phase, 0), torch.cuda.max_memory_allocated())
            return result

        is_own = method in vars(owner)
        setattr(owner, method, timed)
        self._wrapped.callback(*((setattr, owner, method, call) if is_own else (delattr, owner, method)))


def measured(arguments: argparse.Namespace, size: Size) -> tuple[list[Row], dict[str, Any]]:
    """Run the real pipeline with random weights on the device."""
    import torch
    from PIL import Image

    from swifti2v.memory.limits import MemoryLimits
    from swifti2v.memory.networks import WAN22
    from swifti2v.memory.ways import RunCosts
    from swifti2v.runner.acceleration import Acceleration, accelerated
    from swifti2v.runner.two_stage import TwoStagePipeline
    from swifti2v.wan.streaming import WanStreamingCodec
    from swifti2v.wan.taehv import LightDecoder

    limits = MemoryLimits.parse(arguments.cap) if arguments.cap else None
    ways = Acceleration("native", compile_blocks=arguments.compile, quantization=arguments.quantization)
    parts = accelerated(networks.parts(arguments.device, limits, light=arguments.decoder == "light"), ways)
    torch.cuda.empty_cache()
    # From here on: the networks were made on the device one by one, each larger than some caps.
    if limits is not None and limits.device_bytes is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limits.device_bytes / total))
    pipeline = TwoStagePipeline(parts)
    options = {
        "size": size,
        "num_frames": arguments.frames,
        "num_inference_steps": arguments.steps,
        "keep_context": arguments.keep_context,
    }
    request = pipeline.request(Image.linear_gradient("L").convert("RGB").resize(size), "a wave", **options)
    if arguments.compile:
        _streamed(pipeline, request)
    with PhaseClock() as clock:
        clock.wrap(parts.stage_one, "encode_prompt", "text encoding")
        clock.wrap(parts.stage_one, "_run", "stage one")
        clock.wrap(parts.stage_two.transformer, "forward", "stage two")
        clock.wrap(WanStreamingCodec, "_encode_chunk", "reference encode")
        clock.wrap(WanStreamingCodec, "_decode_group", "decode")
        clock.wrap(LightDecoder, "_decode", "decode")
        # One after the other: side by side, a phase would wait for the other's work, and be charged with it.
        _streamed(TwoStagePipeline(replace(parts, overlap="none")), request)
    whole = _streamed(pipeline, request)
    costs = RunCosts(
        WAN22.with_light_decoder() if arguments.decoder == "light" else WAN22, request.settings, "bfloat16"
    ).tasks
    roofline = next(
        (rate for name, rate in BF16_TFLOP_PER_SECOND.items() if name in torch.cuda.get_device_name()), None
    )
    rows = []
    for phase, seconds in clock.seconds.items():
        tflop = costs[phase].work.tflop
        rate = tflop / seconds
        share = rate / roofline if roofline else None
        rows.append(Row(phase, tflop, clock.peaks[phase] / GIB, clock.calls[phase], seconds, rate, share))
    return rows, whole


def _streamed(pipeline: Any, request: Any) -> dict[str, Any]:
    started, first_seconds = time.perf_counter(), 0.0
    for piece in pipeline.stream(request):
        first_seconds = first_seconds or time.perf_counter() - started
        del piece
    return {"seconds": time.perf_counter() - started, "first_frames_seconds": first_seconds}


def measured_baseline(size: Size, device: str) -> list[Row]:
    """Time diffusers' own classes on the same shapes: Stage II per token, and the whole decode of three latents."""
    import torch

    def timed(name: str, run: Callable[[], object], tflop: float) -> Row:
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        return Row(name, tflop, torch.cuda.max_memory_allocated() / GIB, 1, seconds, tflop / seconds)

    from swifti2v.memory.costs import Decoding, Forward
    from swifti2v.memory.networks import WAN22
    from swifti2v.memory.table import measured as cost_of

    rows = []
    tokens = (size.height // 32) * (size.width // 32)
    random = {"device": device, "dtype": torch.bfloat16}
    latents = torch.randn(1, 96, 5, size.height // 16, size.width // 16, **random)
    text, timestep = torch.randn(1, 512, 4096, **random), torch.full((1, 5), 500.0, device=device)
    shape = (96, 5, size.height // 16, size.width // 16)
    tflop = cost_of(Forward(WAN22.stage_two, "bfloat16", "bfloat16", "none", 512, *shape)).work.tflop
    with torch.no_grad():
        for name, make, times in (
            ("Stage II, 5 frames", networks.stage_two, timestep),
            ("diffusers: Stage II per token, 5 frames", networks.stage_two_of_diffusers,
             timestep.repeat_interleave(tokens, dim=1)),
        ):  # fmt: skip
            network = make(device)
            rows.append(timed(name, lambda network=network, times=times: network(latents, times, text), tflop))
            del network
        codec = networks.codec(networks.VAE22, device)
        clip = torch.randn(1, 48, 3, size.height // 16, size.width // 16, **random)
        decode_tflop = cost_of(Decoding(WAN22.stage_two_codec, "bfloat16", *size)).work(3).tflop
        rows.append(timed("diffusers: decode, 3 latent frames", lambda: codec.decode(clip), decode_tflop))
        from swifti2v.wan.streaming import WanStreamingCodec

        streaming = WanStreamingCodec(codec)
        rows.append(timed("decode, 3 latent frames", lambda: list(streaming.decode_pixel_stream([clip])), decode_tflop))
    return rows


def table(rows: list[Row]) -> str:
    """Return the Markdown table."""
    header = ("phase", "calls", "TFLOP", "peak GiB", "s", "TFLOP/s", "of roofline")
    return markdown_table(
        header,
        [
            (
                row.name,
                str(row.calls),
                number(row.tflop, 1),
                number(row.peak_gib),
                number(row.seconds),
                number(row.tflop_per_second, 0),
                "-" if row.roofline_share is None else f"{row.roofline_share:.0%}",
            )
            for row in rows
        ],
    )


def main() -> None:
    """Read the command line, count or measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda or meta; default: cuda if there is one")
    parser.add_argument("--size", default="2560x1408")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=4, help="of Stage II")
    parser.add_argument("--keep-context", action="store_true", help="run a segment's context in its first step only")
    parser.add_argument("--cap", help="device memory that the run may take, for instance 24GiB")
    parser.add_argument("--decoder", choices=("exact", "light"), default="exact", help="of the run on a GPU")
    parser.add_argument(
        "--quantization", choices=("none", "float8", "int8"), default="none", help="of the transformers"
    )
    parser.add_argument("--compile", action="store_true", help="the transformers' blocks, on a GPU")
    parser.add_argument("--baseline", action="store_true", help="diffusers' own classes on the same shapes as well")
    add_result_arguments(parser, pictures=False)
    arguments = parser.parse_args()
    import torch

    from swifti2v.geometry import Size

    size = Size.parse(arguments.size)
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "meta")
    whole: dict[str, Any] = {}
    if arguments.device == "meta":
        rows = accounts(size, baseline=arguments.baseline, quantization=arguments.quantization)
    else:
        rows, whole = measured(arguments, size)
        torch.cuda.empty_cache()
        rows += measured_baseline(size, arguments.device) if arguments.baseline else []
        whole["device"] = torch.cuda.get_device_name()
    print(table(rows), whole or "", sep="\n\n")
    content = {"settings": settings_of(arguments), "rows": [asdict(row) for row in rows], "whole": whole}
    theme = "full_size_account" if arguments.device == "meta" else "full_size"
    say(f"written to {write(theme, content, arguments.output)}")


if __name__ == "__main__":
    main()
