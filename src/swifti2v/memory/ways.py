"""The ways in which each phase of a run can be had, with their bytes and predicted seconds.

Phases follow each other and give the device back, except the last: encoding, Stage II and decoding take turns for every
segment, so their weights and features are on the device together. Costs are measured (`costs.py`); seconds are these
costs over assumed rates (`devices.py`), plus the transfers that no work hides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

from swifti2v.geometry import Size
from swifti2v.memory.costs import Clip, Decoding, Encoding, Forward, Weights, Work
from swifti2v.memory.table import measured
from swifti2v.segments import plan_segments, plan_windows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swifti2v.memory.costs import ClipCost, ForwardCost, StreamCost, WeightCost
    from swifti2v.memory.devices import DeviceRates
    from swifti2v.memory.networks import Network, PipelineNetworks
    from swifti2v.memory.placement import Placement
    from swifti2v.segments import Segment
    from swifti2v.settings import GenerationSettings, Storage

OVERLAP_PIXELS = 128
GRIDS = ((1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 4), (6, 6))
"""Columns and rows of codec tiles that are tried."""
BLOCKS_IN_FLIGHT = 3
"""Blocks of a streamed transformer on the device: one at work, the next, and one on its way (`placement.Pace`)."""
TEXT_BLOCKS_IN_FLIGHT = 2
"""Of a text encoder, which streams layer by layer: no more than there are in two blocks."""

PhaseName = Literal["text encoding", "stage one", "refinement"]


class Task(NamedTuple):
    """A part of a run: tokens of its largest forward pass and number of passes (0 for a codec), and its work."""

    name: str
    num_tokens: int
    num_forwards: int
    work: Work


@dataclass(frozen=True)
class CodecWay:
    """How Stage II's codec runs.

    Args:
        columns, rows: of tiles.
        tile: its size in pixels; that of the frame where there is one tile.
        offloads_features: caches lie in host memory while another tile or the transformer is at work.
    """

    columns: int
    rows: int
    tile: Size
    offloads_features: bool

    def __str__(self) -> str:
        tiles = "untiled" if self.columns * self.rows == 1 else f"in {self.columns}x{self.rows} tiles"
        return f"codec {tiles}{', features offloaded' * self.offloads_features}"


@dataclass(frozen=True)
class Way:
    """One way to run one phase.

    Args:
        phase: `refinement` is encoding, Stage II and decoding.
        placement: `loaded`: each network once.
        weight_bytes: on the device.
        working_bytes: beyond the weights, at the peak.
        transfer_bytes: between host and device.
        seconds: predicted.
        codec: how Stage II's codec runs.
        offloaded_bytes: of features in host memory.
        overlap_bytes: beyond `working_bytes`, where decoding runs beside the denoising of the next segment.
    """

    phase: PhaseName
    placement: Placement
    weight_bytes: int
    working_bytes: int
    transfer_bytes: int
    seconds: float
    codec: CodecWay | None = None
    offloaded_bytes: int = 0
    overlap_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Device memory of the phase."""
        return self.weight_bytes + self.working_bytes

    @property
    def description(self) -> str:
        """What this way does, in words."""
        words = {"resident": "weights stay", "loaded": "weights come and go", "streamed": "weights stream by block"}
        return words[self.placement] + (f", {self.codec}" if self.codec is not None else "")


class _Coding(NamedTuple):
    """A way to run the codec, and what it takes.

    Args:
        way: the way.
        share: pixels of all tiles over those of the frame.
        idle_bytes: of features on the device while the transformer works.
        offloaded_bytes: of features in host memory.
        transfer_bytes: between host and device.
        seconds: predicted, of all coding in the run.
    """

    way: CodecWay
    share: float
    idle_bytes: int
    offloaded_bytes: int
    transfer_bytes: int
    seconds: float


def weights_of(networks: PipelineNetworks, storage: Storage) -> dict[str, WeightCost]:
    """Return the weights of each network of the stages that are held, as `placement.store_weights` stores them."""
    dtype = networks.compute_dtype

    def of_transformer(network: Network) -> Weights:
        return Weights(network, dtype, _transformer_storage(networks, storage), networks.quantization)

    asked: dict[str, Weights] = {}
    if "stage_one" in networks.planned:
        asked["text encoder"] = Weights(networks.text_encoder, dtype, storage)
        asked |= {f"expert {number}": of_transformer(networks.stage_one) for number in range(networks.num_experts)}
        asked["codec of stage one"] = Weights(networks.stage_one_codec, "float32")
    if "stage_two" in networks.planned:
        asked["stage two"] = of_transformer(networks.stage_two)
        asked["codec"] = Weights(networks.stage_two_codec, dtype)
        if networks.light_decoder is not None:
            asked["light decoder"] = Weights(networks.light_decoder, dtype)
    return {name: measured(question) for name, question in asked.items()}


def stored_bytes(networks: PipelineNetworks, storage: Storage) -> int:
    """Return the bytes of all weights of the stages that are held."""
    return sum(cost.num_bytes for cost in weights_of(networks, storage).values())


def _transformer_storage(networks: PipelineNetworks, storage: Storage) -> Storage:
    """Quantized layers hold one byte per weight, however the other weights are stored."""
    return storage if networks.quantization == "none" else networks.compute_dtype


@dataclass(frozen=True)
class RunCosts:
    """What a run costs, with its weights stored in one way.

    Args:
        networks: of the pipeline.
        settings: of the run.
        storage: of the weights, but for transformers that are quantized.

    Raises:
        InvalidInputError: from the first use on, if size or length cannot be used.
    """

    networks: PipelineNetworks
    settings: GenerationSettings
    storage: Storage

    @cached_property
    def weights(self) -> dict[str, WeightCost]:
        """Weights of each network of the stages that are held."""
        return weights_of(self.networks, self.storage)

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """Text encoding and stage one, unless they are not planned; reference encode, stage two and decode."""
        tasks = self._refinement_tasks
        if self.networks.stage_one_kind == "wan":
            tasks = (*self._stage_one_tasks, *tasks)
        return {task.name: task for task in tasks}

    @property
    def _stage_one_tasks(self) -> tuple[Task, ...]:
        steps = self.settings.stage_one_steps * _texts(self.settings.stage_one_guidance_scale)
        one, clips = self._stage_one_forwards, self._stage_one_clips
        return (
            Task("text encoding", self.networks.text_tokens, self._num_texts, self._text.work.times(self._num_texts)),
            Task(
                "stage one",
                max(self._stage_one_tokens),
                steps * len(one),
                sum((cost.work.times(steps) for cost in one), Work()) + Work(codec=sum(clip.tflop for clip in clips)),
            ),
        )

    @property
    def _refinement_tasks(self) -> tuple[Task, ...]:
        passes = [self._passes(segment) for segment in self._segments]
        largest = max((len(segment.window) for segment in self._segments), default=0)
        frames = self.networks.stage_two_geometry.latent_frames(self.settings.num_frames)
        encode, decode = self._streams(self.settings.size)
        return (
            Task("reference encode", 0, 0, encode.work(frames)),
            Task(
                "stage two",
                largest * self.networks.stage_two_geometry.tokens_per_frame(self.settings.size),
                sum(count for each in passes for _, count in each),
                sum((cost.work.times(count) for each in passes for cost, count in each), Work()),
            ),
            Task("decode", 0, 0, decode.work(frames)),
        )

    def ways(self, rates: DeviceRates, *, most_bytes: int | None = None) -> tuple[Iterator[Way], ...]:
        """Yield the ways of each phase of the stages that are held, the fastest first, none of them `resident`.

        Args:
            rates: of the device.
            most_bytes: some ways that need more are left out, and not measured for that.
        """
        phases: tuple[Iterator[Way], ...] = ()
        if "stage_one" in self.networks.planned:
            phases += (_by_seconds(self._text_ways(rates)), _by_seconds(self._stage_one_ways(rates)))
        if "stage_two" in self.networks.planned:
            phases += (self._refinement_ways(rates, most_bytes),)
        return phases

    def resident_ways(self, rates: DeviceRates) -> tuple[Way, ...]:
        """Return the way of each phase with all weights on the device throughout, and nothing cut or offloaded."""
        free = replace(rates, host_bytes_per_second=float("inf"))
        working = {}
        if "stage_one" in self.networks.planned:
            working["stage one"] = max(self._stage_one_working, self._stage_one_codec_bytes)
        return tuple(
            replace(
                way,
                placement="resident",
                weight_bytes=stored_bytes(self.networks, self.storage),
                working_bytes=working.get(way.phase, way.working_bytes),
                transfer_bytes=0,
            )
            for way in (next(way for way in ways if way.placement == "loaded") for ways in self.ways(free))
        )

    def seconds(self, task: Task, rates: DeviceRates) -> float:
        """Return the predicted time of a task whose weights are on the device, where each pass reads them once."""
        read = {"text encoding": "text encoder", "stage one": "expert 0"}.get(task.name, task.name)
        weight_bytes = self.weights[read].num_bytes if task.num_forwards and read in self.weights else 0
        reading = task.num_forwards * weight_bytes / rates.memory_bytes_per_second
        return max(rates.seconds(task.work, self.networks.quantization), reading)

    # ---- text encoding ----

    @property
    def _num_texts(self) -> int:
        return max(_texts(self.settings.guidance_scale), _texts(self.settings.stage_one_guidance_scale))

    @property
    def _text(self) -> ForwardCost:
        networks = self.networks
        return measured(
            Forward(networks.text_encoder, networks.compute_dtype, self.storage, "none", networks.text_tokens)
        )

    def _text_ways(self, rates: DeviceRates) -> Iterator[Way]:
        weights = self.weights["text encoder"]
        flight = weights.outside_bytes + TEXT_BLOCKS_IN_FLIGHT * weights.block_bytes
        moving = weights.num_bytes / rates.host_bytes_per_second
        seconds = self.seconds(self.tasks["text encoding"], rates) + moving
        placements: tuple[tuple[Placement, int], ...] = (("loaded", weights.num_bytes), ("streamed", flight))
        for placement, held in placements:
            yield Way("text encoding", placement, held, self._text.working_bytes, weights.num_bytes, seconds)

    # ---- Stage I ----

    @cached_property
    def _windows(self) -> tuple[range, ...]:
        networks = self.networks
        return plan_windows(
            self.settings.num_frames,
            window_frames=networks.window_frames,
            overlap_frames=networks.overlap_frames,
            temporal=networks.stage_one_geometry.temporal,
        )

    @cached_property
    def _stage_one_forwards(self) -> list[ForwardCost]:
        codec, geometry = self.networks.stage_one_codec, self.networks.stage_one_geometry
        size = self.networks.reference_size(self.settings.size)
        channels = 2 * codec.config.get("z_dim", 16) + geometry.temporal  # latents, condition, and its mask
        shapes = (geometry.latent_shape(size, len(window)) for window in self._windows)
        return [self._forward(self.networks.stage_one, channels, *shape) for shape in shapes]

    @property
    def _stage_one_tokens(self) -> list[int]:
        geometry, size = self.networks.stage_one_geometry, self.networks.reference_size(self.settings.size)
        return [geometry.latent_frames(len(window)) * geometry.tokens_per_frame(size) for window in self._windows]

    @cached_property
    def _stage_one_clips(self) -> list[ClipCost]:
        size = self.networks.reference_size(self.settings.size)
        codec = self.networks.stage_one_codec
        return [measured(Clip(codec, "float32", size.width, size.height, len(window))) for window in self._windows]

    @property
    def _stage_one_working(self) -> int:
        return max(cost.working_bytes for cost in self._stage_one_forwards)

    @property
    def _stage_one_codec_bytes(self) -> int:
        return max(clip.peak_bytes for clip in self._stage_one_clips)

    def _stage_one_ways(self, rates: DeviceRates) -> Iterator[Way]:
        weights, task = self.weights["expert 0"], self.tasks["stage one"]
        coding = Work(codec=task.work.codec)
        moving = weights.num_bytes / rates.host_bytes_per_second
        visits = len(self._windows) * self.networks.num_experts
        passing = self.seconds(task, rates) - rates.seconds(coding, "none")
        # The experts leave before the codec works (`fitting.py`).
        alone = self.weights["codec of stage one"].num_bytes + self._stage_one_codec_bytes

        def way(placement: Placement, held: int, moves: int, seconds: float) -> Way:
            working = max(self._stage_one_working, alone - held)
            seconds += rates.seconds(coding, "none")
            return Way("stage one", placement, held, working, moves * weights.num_bytes, seconds)

        yield way("loaded", weights.num_bytes, visits, passing + visits * moving)
        count = task.num_forwards
        yield way("streamed", _flight_bytes(weights), count, max(passing, count * moving))

    # ---- refinement ----

    @cached_property
    def _segments(self) -> tuple[Segment, ...]:
        return plan_segments(
            self.networks.stage_two_geometry.latent_frames(self.settings.num_frames),
            segment_size=self.settings.segment_size,
            neighbors_before=self.settings.neighbors_before,
            neighbors_after=self.settings.neighbors_after,
            anchor=self.settings.anchor,
        )

    @property
    def _keeps_context(self) -> bool:
        is_exact = self.networks.stage_two.config.get("context_attention") == "frozen"
        return self.settings.num_inference_steps > 1 and (self.settings.keep_context or is_exact)

    def _passes(self, segment: Segment) -> list[tuple[ForwardCost, int]]:
        """Return the forward passes of a segment: their cost, and how often they are made."""
        steps, texts = self.settings.num_inference_steps, _texts(self.settings.guidance_scale)
        window, targets = len(segment.window), len(segment.targets)
        if not self._keeps_context or window == targets:
            return [(self._window_forward(window), texts * steps)]
        later = self._window_forward(targets, num_context_frames=window - targets)
        return [(self._window_forward(window), texts), (later, texts * (steps - 1))]

    @property
    def stage_two_working_bytes(self) -> int:
        """Peak of Stage II's forward passes, beyond weights and what is kept."""
        passes = (cost for segment in self._segments for cost, _ in self._passes(segment))
        return max((cost.working_bytes for cost in passes), default=0)

    def _window_forward(self, num_frames: int, *, num_context_frames: int = 0) -> ForwardCost:
        network, size = self.networks.stage_two, self.settings.size
        cells = self.networks.stage_two_geometry.latent_shape(size, 1)
        channels = network.config["in_channels"]
        return self._forward(
            network, channels, num_frames, cells.height, cells.width, num_context_frames=num_context_frames
        )

    def _refinement_ways(self, rates: DeviceRates, most_bytes: int | None) -> Iterator[Way]:
        weights, passes = (
            self.weights["stage two"],
            [each for segment in self._segments for each in self._passes(segment)],
        )
        held = sum(self.weights[name].num_bytes for name in ("codec", "light decoder") if name in self.weights)
        task, texts = self.tasks["stage two"], _texts(self.settings.guidance_scale)
        compute, moving = self.seconds(task, rates), weights.num_bytes / rates.host_bytes_per_second
        text = texts * max((cost.kept_text_bytes for cost, _ in passes), default=0)
        context = texts * max((cost.kept_context_bytes for cost, _ in passes), default=0)
        activation = self.stage_two_working_bytes + text + context
        placements: tuple[tuple[Placement, int, int, float], ...] = (
            ("loaded", weights.num_bytes, 1, compute + moving),
            ("streamed", _flight_bytes(weights), task.num_forwards, max(compute, task.num_forwards * moving)),
        )
        choices = [(coding, placement) for coding in self._codings(rates) for placement in placements]
        for coding, (placement, on_device, moves, passing) in sorted(
            choices, key=lambda choice: (choice[0].seconds + choice[1][3], choice[0].share, choice[1][1])
        ):
            if most_bytes is not None and on_device + held + coding.idle_bytes + activation > most_bytes:
                continue
            idle, working = self._codec_bytes(coding.way)
            yield Way(
                "refinement",
                placement,
                weight_bytes=on_device + held,
                working_bytes=max(working + text, idle + activation),
                transfer_bytes=moves * weights.num_bytes + coding.transfer_bytes,
                seconds=passing + coding.seconds,
                codec=coding.way,
                offloaded_bytes=coding.offloaded_bytes,
                # Beside a decode at its peak the other thread encodes or denoises; the caches are counted once.
                overlap_bytes=max(working - idle, activation),
            )

    def _codings(self, rates: DeviceRates) -> Iterator[_Coding]:
        size, geometry = self.settings.size, self.networks.stage_two_geometry
        encode, decode = self._streams(size)
        encoding, decoding = (rates.seconds(self.tasks[name].work, "none") for name in ("reference encode", "decode"))
        is_light = self.networks.light_decoder is not None  # which is never cut into tiles
        frames = geometry.latent_frames(self.settings.num_frames)
        groups = -(-frames // self.settings.segment_size)
        for columns, rows in GRIDS if self.networks.stage_two_codec.is_wan_codec else GRIDS[:1]:
            tile = tile_size(size, columns, rows, multiple=geometry.spatial)
            share = tile.width * tile.height * columns * rows / (size.width * size.height)
            seconds = share * encoding + (1 if is_light else share) * decoding
            cache = round(share * encode.cache_bytes), 0 if is_light else round(share * decode.cache_bytes)
            light = decode.cache_bytes if is_light else 0
            yield _Coding(CodecWay(columns, rows, tile, False), share, light + sum(cache), 0, 0, seconds)
            if self.networks.stage_two_codec.is_wan_codec:
                moved = 2 * (frames * cache[0] + groups * cache[1])
                seconds += moved / rates.host_bytes_per_second
                yield _Coding(CodecWay(columns, rows, tile, True), share, light, sum(cache), moved, seconds)

    def _codec_bytes(self, way: CodecWay) -> tuple[int, int]:
        """Return the bytes of the codec on the device while the transformer works, and at the peak of coding."""
        geometry, count = self.networks.stage_two_geometry, way.columns * way.rows
        encode, decode = self._streams(way.tile)
        picture = 3 * 4 * self.settings.size.width * self.settings.size.height * geometry.temporal
        light = decode.cache_bytes if self.networks.light_decoder is not None else 0
        of_tile = encode.cache_bytes + (0 if light else decode.cache_bytes)
        if way.offloads_features:
            # It decodes a segment at a time, and holds its pictures until they are blended.
            peak = max(encode.peak_bytes, decode.peak_bytes - light)
            return light, light + peak + self.settings.segment_size * picture
        working = max(encode.peak_bytes - encode.cache_bytes, decode.peak_bytes - decode.cache_bytes)
        return light + count * of_tile, light + count * of_tile + working + picture

    def _streams(self, tile: Size) -> tuple[StreamCost, StreamCost]:
        networks, dtype = self.networks, self.networks.compute_dtype
        encode = measured(Encoding(networks.stage_two_codec, dtype, *tile))
        if networks.light_decoder is not None:
            return encode, measured(Decoding(networks.light_decoder, dtype, *self.settings.size))
        return encode, measured(Decoding(networks.stage_two_codec, dtype, *tile))

    # ---- transformers ----

    def _forward(
        self, network: Network, channels: int, frames: int, height: int, width: int, *, num_context_frames: int = 0
    ) -> ForwardCost:
        networks = self.networks
        return measured(
            Forward(
                network,
                networks.compute_dtype,
                _transformer_storage(networks, self.storage),
                networks.quantization,
                networks.text_tokens,
                channels,
                frames,
                height,
                width,
                num_context_frames,
            )
        )


def tile_size(size: Size, columns: int, rows: int, *, multiple: int, overlap: int = OVERLAP_PIXELS) -> Size:
    """Return the smallest tile, in multiples of `multiple`, with which so many columns and rows cover a frame."""

    def side(length: int, count: int) -> int:
        if count == 1:
            return length
        return -(-(length + (count - 1) * overlap) // (count * multiple)) * multiple

    return Size(side(size.width, columns), side(size.height, rows))


def _texts(guidance_scale: float) -> int:
    """Passes per step, one for each text: classifier-free guidance above 1 needs a second one."""
    return 2 if guidance_scale > 1 else 1


def _by_seconds(ways: Iterator[Way]) -> Iterator[Way]:
    return iter(sorted(ways, key=lambda way: (way.seconds, way.peak_bytes)))


def _flight_bytes(weights: WeightCost) -> int:
    """Bytes of a streamed transformer on the device: some blocks, and what is in no block, which comes as a whole."""
    return weights.outside_bytes + BLOCKS_IN_FLIGHT * weights.block_bytes
