"""Speed as ratios within one run, on any machine: Stage II against diffusers, segments against the full sequence, ...

Command: ``python -m benchmarks.speed``. Seconds are processor time of one thread, the least of a few rounds in which
the compared ways take turns, so that other work on the machine disturbs little; ratios are what counts. Compiled blocks
(`compile_blocks`, for diffusers' class as for ours) need a C++ compiler.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

from benchmarks.results import add_result_arguments, markdown_table, number, say, settings_of, write_results

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch


TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "ffn_dim": 600,  # 4.67 times the width, as in the 5B
    "num_layers": 4,
    "text_dim": 64,
    "freq_dim": 256,
}
"""With 132 tokens a frame attention and linear layers share the work of a window as in the 5B at 2560x1408."""
ROWS, COLUMNS = 11 * 2, 12 * 2
TOKENS_PER_FRAME = (ROWS // 2) * (COLUMNS // 2)


@dataclass(frozen=True)
class Ratio:
    """Seconds of the way that is compared with, and of ours; `graphs` counts what was compiled for ours."""

    name: str
    other_seconds: float
    seconds: float
    graphs: int | None = None

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.other_seconds / self.seconds


def best_seconds(run: Callable[[], object], *, repeats: int) -> float:
    """Return the least processor time of a few runs."""
    return least_seconds({"": run}, rounds=repeats)[""]


def least_seconds(ways: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Return the least processor time of each way.

    They run in turn, so that a machine that slows down slows all of them, and every other round backwards, so that none
    always follows the same one.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name in list(ways) if turn % 2 == 0 else reversed(list(ways)):
            started = time.thread_time()
            ways[name]()
            found[name].append(time.thread_time() - started)
    return {name: min(seconds) for name, seconds in found.items()}


def num_graphs() -> int:
    """Return how many graphs this process has compiled so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def stage_two_forward(repeats: int, *, targets_only: bool) -> Ratio:
    """Compare one five-frame forward with diffusers' class, timesteps per token, the same weights, equal output.

    With `targets_only` ours gives the three targets, which is all that Stage II asks of it; else all five frames.
    """
    import torch
    from diffusers import WanTransformer3DModel

    from swifti2v.wan.transformer import StageTwoTransformer

    torch.manual_seed(0)
    stock = WanTransformer3DModel(in_channels=48, out_channels=48, **TINY).eval()
    ours = StageTwoTransformer.from_wan(stock)
    latents, text = torch.randn(1, 48, 5, ROWS, COLUMNS), torch.randn(1, 16, 64)
    per_frame = torch.tensor([[0.0, 0.0, 500.0, 500.0, 500.0]])
    per_token = per_frame.repeat_interleave(TOKENS_PER_FRAME, dim=1)
    frames = slice(2, 5) if targets_only else slice(0, 5)

    def forward() -> torch.Tensor:
        sample: torch.Tensor = ours(latents, per_frame, text, output_frames=frames).sample
        return sample

    with torch.no_grad():
        theirs = stock(latents, per_token, text).sample[:, :, frames]
        torch.testing.assert_close(forward(), theirs, rtol=1e-4, atol=1e-5)
        ways = {"theirs": lambda: stock(latents, per_token, text), "ours": forward}
        seconds = least_seconds(ways, rounds=4 * repeats)
    name = f"Stage II forward, 5 frames{', 3 of them targets' * targets_only}, against diffusers per token"
    return Ratio(name, seconds["theirs"], seconds["ours"])


def compiled_forwards(repeats: int) -> list[Ratio]:
    """Compare the five-frame forward with compiled blocks with diffusers' class, as it is and compiled in the same way.

    Equal output of all three, to 1e-4 and 1e-5.
    """
    import torch
    from diffusers import WanTransformer3DModel

    from swifti2v.runner.acceleration import compile_blocks
    from swifti2v.wan.transformer import StageTwoTransformer

    def theirs() -> WanTransformer3DModel:
        torch.manual_seed(0)
        return WanTransformer3DModel(in_channels=48, out_channels=48, **TINY).eval()

    eager, compiled, ours = theirs(), theirs(), StageTwoTransformer.from_wan(theirs())
    compile_blocks([compiled, ours])
    latents, text = torch.randn(1, 48, 5, ROWS, COLUMNS), torch.randn(1, 16, 64)
    per_frame = torch.tensor([[0.0, 0.0, 500.0, 500.0, 500.0]])
    per_token = per_frame.repeat_interleave(TOKENS_PER_FRAME, dim=1)
    ways = {
        "theirs": lambda: eager(latents, per_token, text),
        "theirs compiled": lambda: compiled(latents, per_token, text),
        "ours": lambda: ours(latents, per_frame, text),
    }
    with torch.no_grad():
        expected = ways["theirs"]().sample
        torch.testing.assert_close(ways["theirs compiled"]().sample, expected, rtol=1e-4, atol=1e-5)
        before = num_graphs()
        torch.testing.assert_close(ways["ours"]().sample, expected, rtol=1e-4, atol=1e-5)
        graphs = num_graphs() - before
        seconds = least_seconds(ways, rounds=4 * repeats)
    name = "Stage II forward, 5 frames, blocks compiled, against diffusers per token"
    return [
        Ratio(name, seconds["theirs"], seconds["ours"], graphs=graphs),
        Ratio(f"{name}, compiled", seconds["theirs compiled"], seconds["ours"], graphs=graphs),
    ]


def kept_text(repeats: int) -> Ratio:
    """Compare a five-frame forward that knows its text, 512 tokens, with one that reads it, with equal output."""
    import torch

    from swifti2v.wan.transformer import StageTwoTransformer

    torch.manual_seed(0)
    network = StageTwoTransformer(in_channels=96, reference_channels=48, out_channels=48, **TINY).eval()
    latents, text = torch.randn(1, 96, 5, ROWS, COLUMNS), torch.randn(1, 512, 64)
    timestep = torch.tensor([[0.0, 0.0, 500.0, 500.0, 500.0]])

    def forward() -> torch.Tensor:
        sample: torch.Tensor = network(latents, timestep, text).sample
        return sample

    def reading() -> None:
        with network.text_kept():  # a new one: nothing is known in it yet
            forward()

    with torch.no_grad():
        expected = forward()
        with network.text_kept():
            forward()
            if not torch.equal(forward(), expected):
                msg = "a kept text changes the output"
                raise AssertionError(msg)
            seconds = least_seconds({"reading": reading, "knowing": forward}, rounds=repeats)
    name = "Stage II forward with its text kept, 512 tokens, against reading it"
    return Ratio(name, seconds["reading"], seconds["knowing"])


def segments_against_full_sequence(num_latent_frames: int, *, repeats: int, is_compiled: bool = False) -> Ratio:
    """Compare one step over all segments, as the sampler runs them, with one step over the whole clip.

    One tiny transformer, its blocks compiled for both or for neither; a segment asks for its targets, and the text is
    read once a clip.
    """
    import torch

    from swifti2v.runner.acceleration import compile_blocks
    from swifti2v.segments import plan_segments
    from swifti2v.wan.transformer import StageTwoTransformer

    torch.manual_seed(0)
    network = StageTwoTransformer(in_channels=96, reference_channels=48, out_channels=48, **TINY).eval()
    if is_compiled:
        compile_blocks([network])
    clip, text = torch.randn(1, 96, num_latent_frames, ROWS, COLUMNS), torch.randn(1, 16, 64)

    def forward(frames: torch.Tensor, targets: slice) -> None:
        network(frames, torch.full((1, frames.shape[2]), 500.0), text, output_frames=targets)

    def by_segment() -> None:
        for segment in plan_segments(num_latent_frames):
            forward(clip[:, :, list(segment.window)], segment.target_slice)

    def whole() -> None:
        forward(clip, slice(1, num_latent_frames))

    graphs = None
    with torch.no_grad(), network.text_kept():
        forward(clip[:, :, :5], slice(2, 5))
        if is_compiled:
            before = num_graphs()
            by_segment()
            graphs = num_graphs() - before
            whole()
        seconds = least_seconds({"ours": by_segment, "whole": whole}, rounds=repeats)
    name = f"segments against the full sequence, {num_latent_frames} latent frames{', blocks compiled' * is_compiled}"
    return Ratio(name, seconds["whole"], seconds["ours"], graphs)


def kept_context(num_latent_frames: int, *, repeats: int) -> Ratio:
    """Compare four steps by segments whose context runs in the first of them with four over the whole clip."""
    import torch

    from swifti2v.segments import Segment, plan_segments
    from swifti2v.wan.context_attention import KVCache
    from swifti2v.wan.transformer import StageTwoTransformer

    torch.manual_seed(0)
    network = StageTwoTransformer(in_channels=96, reference_channels=48, out_channels=48, **TINY).eval()
    clip, text = torch.randn(1, 96, num_latent_frames, ROWS, COLUMNS), torch.randn(1, 16, 64)

    def forward(frames: Sequence[int], kinds: Sequence[int], targets: slice, memory: KVCache | None) -> None:
        network(
            clip[:, :, list(frames)],
            torch.full((1, len(frames)), 500.0),
            text,
            frame_kinds=torch.tensor(kinds),
            kv_cache=memory,
            output_frames=targets,
        )

    def steps(segment: Segment) -> None:
        memory = KVCache(len(network.blocks))
        forward(segment.window, segment.kinds, segment.target_slice, memory)
        for _ in range(3):
            forward(segment.targets, segment.kinds[segment.target_slice], slice(0, len(segment.targets)), memory)

    def by_segment() -> None:
        for segment in plan_segments(num_latent_frames):
            steps(segment)

    def whole() -> None:
        forward(range(num_latent_frames), [0] * num_latent_frames, slice(1, num_latent_frames), None)

    with torch.no_grad(), network.text_kept():
        steps(plan_segments(5)[0])
        seconds = least_seconds({"ours": by_segment, "whole": whole}, rounds=repeats)
    name = f"segments with context kept over 4 steps against the full sequence, {num_latent_frames} latent frames"
    return Ratio(name, 4 * seconds["whole"], seconds["ours"])


def streaming_decode(repeats: int) -> Ratio:
    """Compare the streaming decode with ``vae.decode``, on a Wan2.2 codec an eighth as wide."""
    import torch
    from diffusers import AutoencoderKLWan

    from benchmarks.full_size_networks import VAE22
    from swifti2v.wan.streaming import WanStreamingCodec

    torch.manual_seed(0)
    vae = AutoencoderKLWan(**(VAE22 | {"base_dim": 20, "decoder_base_dim": 32})).eval()
    codec = WanStreamingCodec(vae)
    latents = torch.randn(1, 48, 3, 6, 8)
    with torch.no_grad():
        ours = torch.cat(list(codec.decode_pixel_stream([latents])), dim=2)
        torch.testing.assert_close(ours, vae.decode(latents).sample, rtol=1e-3, atol=1e-4)
        ways = {"ours": lambda: list(codec.decode_pixel_stream([latents])), "theirs": lambda: vae.decode(latents)}
        seconds = least_seconds(ways, rounds=repeats)
    return Ratio("streaming decode against vae.decode", seconds["theirs"], seconds["ours"])


def sampler_overhead() -> float:
    """Return what share of refining 49 frames with `mini` its sampler takes: neither network, nor codec, nor noise."""
    import torch

    from swifti2v.runner.loading import load_parts
    from swifti2v.sampling import segmented
    from swifti2v.sampling.schedules import shifted_sigmas
    from swifti2v.sampling.segmented import sample_segments
    from swifti2v.segments import plan_segments
    from swifti2v.wan.condition import predict_targets

    parts = load_parts("mini", device="cpu")
    transformer, settings = parts.stage_two.transformer, parts.defaults
    text = torch.zeros(1, 1, transformer.config.text_dim)
    geometry = parts.stage_two.geometry
    cells = (settings.size.height // geometry.spatial, settings.size.width // geometry.spatial)
    reference = [torch.randn(1, parts.stage_two.codec.num_channels, 1, *cells) for _ in range(13)]
    inside = 0.0
    draw = segmented.frame_noise

    def timed_noise(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal inside
        started = time.thread_time()
        noise = draw(*arguments, **options)
        inside += time.thread_time() - started
        return noise

    def denoise(window: Any, targets: torch.Tensor, sigma: float) -> torch.Tensor:
        nonlocal inside
        started = time.thread_time()
        predicted = predict_targets(
            transformer,
            segment=window.segment,
            reference=window.reference,
            targets=targets,
            sigma=sigma,
            prompt_embeds=text,
            position_mode=settings.positions,
        )
        inside += time.thread_time() - started
        return predicted

    sigmas = shifted_sigmas(settings.num_inference_steps, shift=settings.flow_shift, start=settings.sigma_start)
    with mock.patch.object(segmented, "frame_noise", timed_noise):
        started = time.thread_time()
        refined = [
            latents
            for _, latents in sample_segments(reference, plan_segments(13), denoise=denoise, sigmas=sigmas, seed=0)
        ]
        sampling = time.thread_time() - started
    chunks = [torch.zeros(1, 3, count, settings.size.height, settings.size.width) for count in (1, *[4] * 12)]
    coding = best_seconds(lambda: list(parts.stage_two.codec.encode_stream(chunks)), repeats=1)
    coding += best_seconds(lambda: list(parts.stage_two.codec.decode_stream([reference[0], *refined])), repeats=1)
    return (sampling - inside) / (sampling + coding)


def help_seconds(repeats: int) -> float:
    """Return the least processor time of ``swifti2v --help``, its children's included."""
    found = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "swifti2v.cli.main", "--help"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def main() -> None:
    """Read the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--longest", type=int, default=161, help="latent frames of the longest clip")
    add_result_arguments(parser, pictures=False)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    ratios: list[Ratio] = []
    for measure in (
        lambda: stage_two_forward(arguments.repeats, targets_only=True),
        lambda: stage_two_forward(arguments.repeats, targets_only=False),
        lambda: kept_text(arguments.repeats),
        lambda: segments_against_full_sequence(41, repeats=max(2, arguments.repeats // 2)),
        lambda: segments_against_full_sequence(arguments.longest, repeats=2),
        lambda: kept_context(41, repeats=max(2, arguments.repeats // 2)),
        lambda: kept_context(arguments.longest, repeats=2),
        lambda: streaming_decode(arguments.repeats),
        lambda: compiled_forwards(arguments.repeats),
        lambda: segments_against_full_sequence(41, repeats=max(2, arguments.repeats // 2), is_compiled=True),
        lambda: segments_against_full_sequence(arguments.longest, repeats=2, is_compiled=True),
    ):
        measured = measure()
        for ratio in measured if isinstance(measured, list) else [measured]:
            ratios.append(ratio)
            say(f"{ratio.name}: {ratio.ratio:.2f}x")
    overheads = {"sampler_share": sampler_overhead(), "help_seconds": help_seconds(arguments.repeats)}
    rows = [(r.name, number(r.other_seconds, 3), number(r.seconds, 3), f"{r.ratio:.2f}") for r in ratios]
    print(markdown_table(("what", "other s", "ours s", "ratio"), rows), overheads, sep="\n\n")
    content = {"settings": settings_of(arguments), "ratios": [asdict(r) | {"ratio": r.ratio} for r in ratios]}
    say(f"written to {write_results('speed', content | overheads, arguments.output)}")


if __name__ == "__main__":
    main()
