"""What a recipe costs, measured: its windows are drawn, its networks are run without memory (`step_cost.py`)."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import Size
from swifti2v.memory.costs import Clip, Encoding, Forward, Weights
from swifti2v.memory.devices import device_rates
from swifti2v.memory.table import measured
from swifti2v.segments import plan_segments
from swifti2v.training.low_res.run import LowResCacheRun, LowResLoraRun
from swifti2v.training.refiner.distribution_matching import DistributionMatchingOptions
from swifti2v.training.refiner.network import INPUT_WEIGHTS
from swifti2v.training.refiner.run import DistillationRun, RefinerRun, TransitionRun
from swifti2v.training.refiner.transition import light_schedule
from swifti2v.training.refiner.windows import drawn_own_segments, earlier_segments
from swifti2v.training.step_cost import TrainedNetwork, measured_bytes, measured_flops

if TYPE_CHECKING:
    from collections.abc import Mapping

    from swifti2v.memory.networks import Network, PipelineNetworks
    from swifti2v.training.engine.loop import LoopOptions
    from swifti2v.training.engine.optimizers import Optimizer
    from swifti2v.training.refiner.distillation import DistillationOptions
    from swifti2v.training.refiner.network import NetworkOptions
    from swifti2v.training.refiner.validation import ValidationOfRefiner
    from swifti2v.training.refiner.windows import WindowSourceOptions

Recipe = LowResCacheRun | LowResLoraRun | TransitionRun | RefinerRun | DistillationRun
"""Recipes that begin with a checkpoint."""

MOMENT_BYTES: dict[Optimizer, float] = {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256)}
"""Bytes per trained weight of both moments; 8 bits with a float32 scale for each 256."""
RESERVED_BYTES = 2**30
"""Of each card: the driver's context and workspaces. What fragmentation takes comes on top and is not known."""
SHARE_OF_RATE = 4 / 7
"""Of a card's assumed rate of matrix products, reached by a training: 40% of an H100's peak. An assumption."""
NUM_DRAWN = 4000
"""Windows that are drawn to see how long they are."""
LORA_RANK_TRIED = 64
CARDS_TRIED = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Machine:
    """Cards of one kind, by the name that `memory.devices` knows."""

    card: str
    num_cards: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.num_cards}x {device_rates(self.card).name}"

    def holds(self, num_bytes: int) -> bool:
        """Whether so many bytes and the reserved ones fit on a card."""
        return num_bytes + RESERVED_BYTES <= device_rates(self.card).memory_bytes

    def gpu_hours(self, tflop: float) -> float:
        """Hours of one card for so much arithmetic."""
        return tflop / (SHARE_OF_RATE * device_rates(self.card).matmul_tflop_per_second) / 3600


MACHINES = (Machine("RTX 4090", 1), Machine("H100", 1), Machine("H100", 8))


@dataclass(frozen=True)
class DeviceBytes:
    """Bytes on one card.

    Args:
        weights: its part of frozen weights and masters, the critic's too, and the teacher if there is one.
        gradients: its part of the gradients.
        optimizer: its part of the moments, the critic's too.
        average: its part of the averaged weights.
        gathered: blocks that are put together from all cards to run.
        activations: what a step makes, at its peak.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    gathered: int
    activations: int

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class TrainingSetup:
    """What decides the memory of a training.

    Args:
        network: what is trained.
        latent_shape: [B,T,h,w] of the longest batch.
        text_tokens: length of the prompts.
        optimizer, shards, context_parallel: see `LoopOptions`.
        has_teacher: whether each card holds a frozen copy of the network in bfloat16 as well.
        has_critic: whether a second network is trained in turn with it: its weights and moments, but no average, and
            never its gradients or activations at the same time.
    """

    network: TrainedNetwork
    latent_shape: tuple[int, int, int, int]
    text_tokens: int
    optimizer: Optimizer = "adamw"
    shards: bool = True
    context_parallel: int = 1
    has_teacher: bool = False
    has_critic: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest sample."""
        _, frames, height, width = self.latent_shape
        _, patch_height, patch_width = self.network.network.config.get("patch_size", (1, 2, 2))
        return frames * (height // patch_height) * (width // patch_width)

    def device_bytes(self, num_cards: int) -> DeviceBytes:
        """Return what each of `num_cards` holds."""
        step = measured_bytes(self.network, self.latent_shape, text_tokens=self.text_tokens)
        parts, networks, master = (num_cards if self.shards else 1), 1 + self.has_critic, 4 * step.num_trained
        teacher = 2 * (step.num_trained + step.frozen // 2) if self.has_teacher else 0
        moments = MOMENT_BYTES[self.optimizer]
        if self.network.lora_rank:  # of a LoRA's two matrices only the one with long rows is kept in 8 bits
            moments = (moments + MOMENT_BYTES["adamw"]) / 2
        # FSDP2 gathers the next block while one runs; gradients of a trained block are whole before they are reduced.
        gathered = 2 * step.block + step.block_trained if num_cards > 1 else 0
        return DeviceBytes(
            weights=networks * (step.frozen + master) // parts + teacher,
            gradients=master // parts,
            optimizer=round(networks * moments * step.num_trained) // parts,
            average=master // parts,
            gathered=gathered,
            activations=step.activations // min(self.context_parallel, num_cards),
        )

    def fits(self, machine: Machine) -> bool:
        """Whether each card of `machine` holds its part."""
        return machine.holds(self.device_bytes(machine.num_cards).peak)

    def min_cards(self, machine: Machine) -> int | None:
        """Return the fewest cards of the machine's kind that hold it unchanged, sharded; None: more than were tried."""
        sharded = replace(self, shards=True)
        counts = (count for count in CARDS_TRIED if count > machine.num_cards)
        return next((count for count in counts if sharded.fits(replace(machine, num_cards=count))), None)

    def ways_to_fit(self, machine: Machine) -> tuple[tuple[str, ...], ...]:
        """Return the smallest sets of settings, written as in a recipe, with which it fits `machine`."""
        changes = self._changes(machine.num_cards)
        for count in range(1, len(changes) + 1):
            ways = [names for names in combinations(changes, count) if self._changed(names, changes).fits(machine)]
            if ways:
                return tuple(ways)
        return ()

    def _changes(self, num_cards: int) -> dict[str, dict[str, Any]]:
        network, batch = self.network, self.latent_shape[0]
        changes: tuple[tuple[str, bool, dict[str, Any]], ...] = (
            ("gradient_checkpointing: true", not network.gradient_checkpointing, {"gradient_checkpointing": True}),
            ("batch_size: 1", batch > 1, {"latent_shape": (1, *self.latent_shape[1:])}),
            ("sharding: shard", num_cards > 1 and not self.shards, {"shards": True}),
            ("optimizer: adamw8bit", self.optimizer == "adamw", {"optimizer": "adamw8bit"}),
            (f"context_parallel: {num_cards}", self.context_parallel < num_cards, {"context_parallel": num_cards}),
            (f"lora_rank: {LORA_RANK_TRIED}", not network.lora_rank, {"lora_rank": LORA_RANK_TRIED}),
        )
        return {name: fields for name, is_open, fields in changes if is_open}

    def _changed(self, names: tuple[str, ...], changes: Mapping[str, dict[str, Any]]) -> TrainingSetup:
        fields: dict[str, Any] = {}
        for name in names:
            fields |= changes[name]
        own = {name: fields.pop(name) for name in ("gradient_checkpointing", "lora_rank") if name in fields}
        return replace(self, network=replace(self.network, **own), **fields)


@dataclass(frozen=True)
class TrainingCost:
    """A training as its recipe has it.

    Args:
        setup: with the longest sample that it meets.
        tflop_per_sample: mean of the samples that it meets, what others than the trained network do included.
        num_steps: of the optimizer, of each run.
        batches_per_step: of each card, where the recipe says that.
        samples_per_step: of all cards together, where the recipe says that instead.
        num_runs: trained one after the other.
        num_validations: in the whole run.
        clips_per_validation: processes, or groups that share a sample, divide them.
        tflop_per_validated_clip: forwards of all steps of all segments.
    """

    setup: TrainingSetup
    tflop_per_sample: float
    num_steps: int
    batches_per_step: int = 1
    samples_per_step: int | None = None
    num_runs: int = 1
    num_validations: int = 0
    clips_per_validation: int = 0
    tflop_per_validated_clip: float = 0.0

    def num_samples(self, num_cards: int) -> int:
        """Return how many samples are trained on in all."""
        own = self.setup.latent_shape[0] * self.batches_per_step * self._num_groups(num_cards)
        return self.num_runs * self.num_steps * (self.samples_per_step or own)

    def tflop(self, num_cards: int) -> float:
        """TFLOP of all cards for the whole run; in a validation, groups left without a clip repeat another's."""
        groups = self._num_groups(num_cards)
        validated = self.num_validations * -(-self.clips_per_validation // groups) * groups
        return self.num_samples(num_cards) * self.tflop_per_sample + validated * self.tflop_per_validated_clip

    def _num_groups(self, num_cards: int) -> int:
        return max(1, num_cards // self.setup.context_parallel)


@dataclass(frozen=True)
class EncodingCost:
    """A cache as its recipe has it: TFLOP of a clip, bytes of the weights on each card and of the work beyond them."""

    tflop_per_clip: float
    weight_bytes: int
    working_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Bytes on each card."""
        return self.weight_bytes + self.working_bytes


def cost_of_recipe(
    run: Recipe, networks: PipelineNetworks, *, size: Size, num_frames: int
) -> TrainingCost | EncodingCost:
    """Measure a recipe.

    Args:
        run: the recipe.
        networks: of its checkpoint.
        size: of the clips that Stage II is trained on; Stage I is trained at the size of its motion reference.
        num_frames: of the clips. Recipes of caches say both themselves.

    Raises:
        InvalidInputError: size or length do not divide.
    """
    if isinstance(run, LowResCacheRun | LowResLoraRun) and networks.stage_one_kind != "wan":
        msg = f"checkpoint {run.checkpoint} has no Stage I of Wan; name another one for a Low-Res LoRA"
        raise InvalidInputError(msg, param="checkpoint", value=run.checkpoint)
    if isinstance(run, LowResCacheRun):
        return _low_res_cache(run, networks)
    if isinstance(run, TransitionRun):
        return _transition(run, networks)
    if isinstance(run, LowResLoraRun):
        return _low_res_lora(run, networks, size, num_frames)
    return _StageTwoCost(networks, size, num_frames).of(run)


def _low_res_lora(run: LowResLoraRun, networks: PipelineNetworks, size: Size, num_frames: int) -> TrainingCost:
    shape = networks.stage_one_geometry.latent_shape(networks.reference_size(size), num_frames)
    trained = TrainedNetwork(
        networks.stage_one, run.lora.rank, run.lora.targets, gradient_checkpointing=run.gradient_checkpointing
    )
    return TrainingCost(
        setup=_setup(run, trained, shape, networks.text_tokens),
        tflop_per_sample=measured_flops(trained, (1, *shape), text_tokens=networks.text_tokens).step,
        num_steps=run.loop.num_steps,
        samples_per_step=run.samples_per_step,
        num_runs=len(run.experts),
    )


class _StageTwoCost:
    """Costs of trainings of Stage II on clips of one size."""

    def __init__(self, networks: PipelineNetworks, size: Size, num_frames: int) -> None:
        self.network = networks.stage_two
        self.text_tokens = networks.text_tokens
        self.num_latent_frames, *self.sides = networks.stage_two_geometry.latent_shape(size, num_frames)

    def of(self, run: RefinerRun | DistillationRun) -> TrainingCost:
        options = None if isinstance(run, RefinerRun) else run.distillation
        flow = run.flow if isinstance(run, RefinerRun) else run.distillation.source_options
        sampling = run.validation if isinstance(run, RefinerRun) else run.sampling
        trained = self._trained(run.network)
        passes, forwards, windows = _work_of_sample(options)
        lengths, earlier = self._drawn(flow)
        tflop = 0.0
        for num_frames, share in lengths.items():
            flops = measured_flops(trained, self._shape(num_frames), text_tokens=self.text_tokens)
            tflop += share * (passes * flops.step + forwards * flops.forward)
        for num_frames, share in earlier.items():
            tflop += windows * share * flow.num_own_context_steps * self._forward(trained, num_frames)
        setup = _setup(run, trained, self._shape(max(lengths))[1:], self.text_tokens)
        is_matching = isinstance(options, DistributionMatchingOptions)
        return TrainingCost(
            setup=replace(setup, has_teacher=options is not None, has_critic=is_matching),
            tflop_per_sample=tflop,
            num_steps=run.loop.num_steps,
            batches_per_step=run.loop.gradient_accumulation,
            **self._validation(run.loop, sampling, trained),
        )

    def _trained(self, options: NetworkOptions) -> TrainedNetwork:
        return TrainedNetwork(
            self.network, options.lora_rank, options.lora_targets, INPUT_WEIGHTS, options.gradient_checkpointing
        )

    def _shape(self, num_frames: int) -> tuple[int, int, int, int]:
        height, width = self.sides
        return 1, num_frames, height, width

    def _forward(self, trained: TrainedNetwork, num_frames: int) -> float:
        return measured_flops(trained, self._shape(num_frames), text_tokens=self.text_tokens).forward

    def _drawn(self, flow: WindowSourceOptions) -> tuple[dict[int, float], dict[int, float]]:
        """Draw windows as training does; return how many of each length a sample has, and how many earlier ones."""
        rng = np.random.default_rng(0)
        lengths, earlier = Counter[int](), Counter[int]()
        for _ in range(NUM_DRAWN):
            own = drawn_own_segments(rng, share=flow.own_context_share, most=flow.own_context_segments)
            segment = flow.windows.draw(rng, self.num_latent_frames, segments_before=own)
            lengths[len(segment.window)] += 1
            made = earlier_segments(segment, segment_size=flow.windows.segment_size, count=own)
            earlier.update(len(each.window) for each in made)
        shares = [{length: count / NUM_DRAWN for length, count in counts.items()} for counts in (lengths, earlier)]
        return shares[0], shares[1]

    def _validation(self, loop: LoopOptions, sampling: ValidationOfRefiner, trained: TrainedNetwork) -> dict[str, Any]:
        if not loop.validate_every or not sampling.num_samples:
            return {}
        plan = plan_segments(
            self.num_latent_frames, segment_size=sampling.segment_size, neighbors_before=sampling.neighbors_before
        )
        forwards = sum(self._forward(trained, len(segment.window)) for segment in plan)
        return {
            "num_validations": loop.num_steps // loop.validate_every,
            "clips_per_validation": sampling.num_samples,
            "tflop_per_validated_clip": sampling.num_steps * forwards,
        }


def _work_of_sample(options: DistillationOptions | DistributionMatchingOptions | None) -> tuple[int, float, int]:
    """Return passes with a gradient, those without, and windows drawn, of a step of one sample."""
    if options is None:
        return 1, 0.0, 1
    guided = 2 if options.guidance_scale > 1 else 1
    if not isinstance(options, DistributionMatchingOptions):
        return 1, options.teacher_steps_per_step * guided, 1
    # The critic learns from windows of its own, and the student walks to one of its steps before each. Teacher and
    # critic look at what it made; what the critic learns from is made without gradient.
    turns = 1 + options.critic_steps_per_step
    walked = (options.num_student_steps - 1) / 2
    return turns, turns * walked + options.critic_steps_per_step + guided + 1, turns


def _setup(
    run: LowResLoraRun | RefinerRun | DistillationRun,
    trained: TrainedNetwork,
    shape: tuple[int, ...],
    text_tokens: int,
) -> TrainingSetup:
    frames, height, width = shape
    return TrainingSetup(
        trained,
        (run.batch_size, frames, height, width),
        text_tokens,
        optimizer=run.loop.optimizer,
        shards=run.loop.sharding == "shard",
        context_parallel=run.loop.context_parallel,
    )


def _low_res_cache(run: LowResCacheRun, networks: PipelineNetworks) -> EncodingCost:
    size, frames = Size(run.videos.width, run.videos.height), run.videos.clips.num_frames
    text = _text_forward(networks)
    encode = measured(Encoding(networks.stage_one_codec, "float32", size.width, size.height))
    # The video, and the condition: its first frame followed by empty ones.
    tflop = 2 * encode.work(networks.stage_one_geometry.latent_frames(frames)).tflop + text.work.tflop
    weights = _weight_bytes(networks.stage_one_codec, "float32") + _weight_bytes(networks.text_encoder)
    return EncodingCost(tflop, weights, max(encode.peak_bytes, text.working_bytes))


def _transition(run: TransitionRun, networks: PipelineNetworks) -> EncodingCost:
    size, frames = Size(run.videos.width, run.videos.height), run.videos.clips.num_frames
    encode = measured(Encoding(networks.stage_two_codec, "bfloat16", size.width, size.height))
    encoded_tflop = encode.work(networks.stage_two_geometry.latent_frames(frames)).tflop
    if networks.stage_one_kind != "wan":  # a clip's own reduced frames, and prompts at the cost of nothing
        encodings = 1 + run.encoding.unchanged * len(run.encoding.modes)
        return EncodingCost(encodings * encoded_tflop, _weight_bytes(networks.stage_two_codec), encode.peak_bytes)
    reduced, text = networks.reference_size(size), _text_forward(networks)
    redrawn, variants, working = 0.0, 0, [encode.peak_bytes, text.working_bytes]
    if run.encoding.transition is not None:
        levels, variants = run.encoding.transition.levels, run.encoding.transition.num_variants
        steps = sum(len(light_schedule(sigma)) for sigma in levels) / len(levels) if levels else 0.0
        codec = networks.stage_one_codec
        coding = measured(Clip(codec, "float32", reduced.width, reduced.height, frames))
        again = measured(Encoding(codec, "float32", reduced.width, reduced.height))
        latent = networks.stage_one_geometry.latent_shape(reduced, frames)
        forward = measured(_forward_of(networks.stage_one, networks.text_tokens, *latent))
        # The condition is encoded and the video decoded as in any pass of Stage I; the clip is encoded besides.
        encoded = again.work(latent[0]).tflop
        redrawn = coding.tflop + encoded + steps * forward.work.tflop
        working += [coding.peak_bytes, forward.working_bytes]
    encodings = 1 + (variants + run.encoding.unchanged) * len(run.encoding.modes)
    weights = networks.num_experts * _weight_bytes(networks.stage_one) + _weight_bytes(networks.text_encoder)
    weights += _weight_bytes(networks.stage_one_codec, "float32") + _weight_bytes(networks.stage_two_codec)
    return EncodingCost(
        tflop_per_clip=text.work.tflop + encodings * encoded_tflop + variants * redrawn,
        weight_bytes=weights,
        working_bytes=max(working),
    )


def _text_forward(networks: PipelineNetworks) -> Any:
    return measured(Forward(networks.text_encoder, "bfloat16", "bfloat16", "none", networks.text_tokens))


def _forward_of(network: Network, text_tokens: int, frames: int, height: int, width: int) -> Forward:
    channels = network.config["in_channels"]
    return Forward(network, "bfloat16", "bfloat16", "none", text_tokens, channels, frames, height, width)


def _weight_bytes(network: Network, dtype: str = "bfloat16") -> int:
    return measured(Weights(network, dtype, storage=dtype)).num_bytes  # type: ignore[arg-type]
