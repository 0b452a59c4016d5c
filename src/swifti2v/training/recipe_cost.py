"""What a recipe costs: from the settings of its file to the arithmetic of `memory/`. Nothing is loaded or run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from swifti2v.errors import ConfigurationError
from swifti2v.geometry import CodecGeometry, Size
from swifti2v.memory.budget import plan_run
from swifti2v.memory.run_settings import RunSettings
from swifti2v.memory.training_cost import TrainingSetup, TrainingWork, window_shares
from swifti2v.segments import plan_segments
from swifti2v.training.low_res.lora import LoraOptions
from swifti2v.training.low_res.run import LowResCacheRun, LowResLoraRun
from swifti2v.training.refiner.distribution_matching import DistributionMatchingOptions
from swifti2v.training.refiner.run import DistillationRun, RefinerRun, TransitionRun
from swifti2v.training.refiner.transition import light_schedule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from swifti2v.memory.budget import PipelineDimensions
    from swifti2v.training.engine.loop import LoopOptions
    from swifti2v.training.refiner.distillation import DistillationOptions
    from swifti2v.training.refiner.network import NetworkOptions
    from swifti2v.training.refiner.validation import ValidationOfRefiner
    from swifti2v.training.refiner.windows import WindowSourceOptions

Recipe = LowResCacheRun | LowResLoraRun | TransitionRun | RefinerRun | DistillationRun
"""Recipes that begin with a checkpoint."""


@dataclass(frozen=True)
class ValidationCost:
    """What it costs to judge a training while it runs.

    Args:
        num_validations: in the whole run.
        num_clips: of each; processes, or groups that share a sample, divide them.
        tflop_per_clip: forwards of all steps of all segments.
    """

    num_validations: int = 0
    num_clips: int = 0
    tflop_per_clip: float = 0.0

    def tflop(self, num_groups: int) -> float:
        """TFLOP of all devices; groups that are left without a clip repeat another's."""
        rounds = -(-self.num_clips // num_groups)
        return self.num_validations * rounds * num_groups * self.tflop_per_clip


@dataclass(frozen=True)
class TrainingCost:
    """A training as its recipe has it.

    Args:
        setup: with the longest sample that it meets.
        tflop_per_sample: mean of the samples that it meets, what others than the trained network do included.
        num_steps: of the optimiser, of each run.
        batches_per_step: of each device, where the recipe says that.
        samples_per_step: of all devices together, where the recipe says that instead.
        num_runs: trained one after the other.
        validation: beside the steps.
    """

    setup: TrainingSetup
    tflop_per_sample: float
    num_steps: int
    batches_per_step: int = 1
    samples_per_step: int | None = None
    num_runs: int = 1
    validation: ValidationCost = ValidationCost()

    def num_samples(self, num_devices: int) -> int:
        """Return how many samples are trained on in all."""
        own = self.setup.batch_size * self.batches_per_step * self._num_groups(num_devices)
        return self.num_runs * self.num_steps * (self.samples_per_step or own)

    def tflop(self, num_devices: int) -> float:
        """TFLOP of all devices for the whole run, validation included."""
        return self.num_samples(num_devices) * self.tflop_per_sample + self.validation.tflop(
            self._num_groups(num_devices)
        )

    def _num_groups(self, num_devices: int) -> int:
        return max(1, num_devices // self.setup.context_parallel)


@dataclass(frozen=True)
class EncodingCost:
    """A cache as its recipe has it.

    Args:
        tflop_per_clip: of all networks.
        weight_bytes: of those that stand on the device, in bfloat16.
        working_bytes: peak beyond the weights.
    """

    tflop_per_clip: float
    weight_bytes: int
    working_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Bytes on each device."""
        return self.weight_bytes + self.working_bytes


def cost_of_recipe(
    run: Recipe, dimensions: PipelineDimensions, *, size: Size, num_frames: int
) -> TrainingCost | EncodingCost:
    """Count a recipe.

    Args:
        run: the recipe.
        dimensions: of its checkpoint.
        size: of the clips that Stage II is trained on; Stage I is trained at the size of its motion reference.
        num_frames: of the clips. Recipes of caches say both themselves.

    Raises:
        ConfigurationError: the recipe has a LoRA on other layers than those that are counted.
        InvalidInputError: size or length do not divide.
    """
    if isinstance(run, LowResCacheRun):
        return _low_res_cache(run, dimensions)
    if isinstance(run, TransitionRun):
        return _transition(run, dimensions)
    if isinstance(run, LowResLoraRun):
        return _low_res_lora(run, dimensions, size, num_frames)
    if isinstance(run, RefinerRun):
        return _refiner(run, dimensions, size, num_frames)
    return _distillation(run, dimensions, size, num_frames)


def _low_res_lora(run: LowResLoraRun, dimensions: PipelineDimensions, size: Size, num_frames: int) -> TrainingCost:
    _check_targets(run.lora.targets)
    expert, codec = dimensions.stage_one, dimensions.stage_one_codec
    geometry = CodecGeometry(codec.spatial_factor, codec.temporal_factor, expert.patch_size[1])
    tokens = expert.num_tokens(*geometry.latent_shape(dimensions.reference_size(size), num_frames))
    work = TrainingWork(expert, trains_all=False, lora_rank=run.lora.rank)
    text, again = dimensions.text_tokens, run.gradient_checkpointing
    return TrainingCost(
        setup=_setup(run, work, tokens, checkpointing=again),
        tflop_per_sample=work.step_tflop(tokens, text_tokens=text, gradient_checkpointing=again),
        num_steps=run.loop.num_steps,
        samples_per_step=run.samples_per_step,
        num_runs=len(run.experts),
    )


def _refiner(run: RefinerRun, dimensions: PipelineDimensions, size: Size, num_frames: int) -> TrainingCost:
    work = _refiner_work(run.network, dimensions)
    shares = _token_shares(run.flow, dimensions, size, num_frames)
    text, again = dimensions.text_tokens, run.network.gradient_checkpointing
    step = sum(
        share * work.step_tflop(tokens, text_tokens=text, gradient_checkpointing=again)
        for tokens, share in shares.items()
    )
    return TrainingCost(
        setup=_setup(run, work, max(shares), checkpointing=again),
        tflop_per_sample=step + _own_context_tflop(run.flow, work, dimensions, size),
        num_steps=run.loop.num_steps,
        batches_per_step=run.loop.gradient_accumulation,
        validation=_validation(run.loop, run.validation, dimensions, size, num_frames),
    )


def _distillation(run: DistillationRun, dimensions: PipelineDimensions, size: Size, num_frames: int) -> TrainingCost:
    options = run.distillation
    work = _refiner_work(run.network, dimensions)
    shares = _token_shares(options.source_options, dimensions, size, num_frames)
    text, again = dimensions.text_tokens, run.network.gradient_checkpointing
    is_matching = isinstance(options, DistributionMatchingOptions)
    trained, forwards, windows = _work_of_student(options)
    step = sum(
        share
        * (
            trained * work.step_tflop(tokens, text_tokens=text, gradient_checkpointing=again)
            + forwards * dimensions.stage_two.forward_cost(tokens, text_tokens=text).tflop
        )
        for tokens, share in shares.items()
    )
    return TrainingCost(
        setup=_setup(run, work, max(shares), checkpointing=again, has_teacher=True, has_critic=is_matching),
        tflop_per_sample=step + windows * _own_context_tflop(options.source_options, work, dimensions, size),
        num_steps=run.loop.num_steps,
        batches_per_step=run.loop.gradient_accumulation,
        validation=_validation(run.loop, run.sampling, dimensions, size, num_frames),
    )


def _work_of_student(options: DistillationOptions | DistributionMatchingOptions) -> tuple[int, float, int]:
    """Return passes with a gradient, those without, and windows drawn, of a step of one sample."""
    guided = 2 if options.guidance_scale > 1 else 1
    if not isinstance(options, DistributionMatchingOptions):
        return 1, options.teacher_steps_per_step * guided, 1
    # The critic learns from windows of its own, and the student walks to one of its steps before each. Teacher and
    # critic look at what it made; what the critic learns from is made without gradient.
    turns = 1 + options.critic_steps_per_step
    walked = (options.num_student_steps - 1) / 2
    return turns, turns * walked + options.critic_steps_per_step + guided + 1, turns


def _validation(
    loop: LoopOptions, sampling: ValidationOfRefiner, dimensions: PipelineDimensions, size: Size, num_frames: int
) -> ValidationCost:
    if not loop.validate_every or not sampling.num_samples:
        return ValidationCost()
    plan = plan_segments(
        _latent_frames(dimensions, num_frames),
        segment_size=sampling.segment_size,
        neighbors_before=sampling.neighbors_before,
    )
    per_frame, text = _tokens_per_frame(dimensions, size), dimensions.text_tokens
    windows = [per_frame * len(segment.window) for segment in plan]
    forwards = sum(dimensions.stage_two.forward_cost(tokens, text_tokens=text).tflop for tokens in windows)
    return ValidationCost(loop.num_steps // loop.validate_every, sampling.num_samples, sampling.num_steps * forwards)


def _setup(
    run: LowResLoraRun | RefinerRun | DistillationRun,
    work: TrainingWork,
    num_tokens: int,
    *,
    checkpointing: bool,
    has_teacher: bool = False,
    has_critic: bool = False,
) -> TrainingSetup:
    return TrainingSetup(
        work=work,
        num_tokens=num_tokens,
        batch_size=run.batch_size,
        optimizer=run.loop.optimizer,
        gradient_checkpointing=checkpointing,
        num_devices=run.loop.context_parallel,  # the least; a machine sets its own
        shards=run.loop.sharding == "shard",
        context_parallel=run.loop.context_parallel,
        has_teacher=has_teacher,
        has_critic=has_critic,
    )


def _refiner_work(network: NetworkOptions, dimensions: PipelineDimensions) -> TrainingWork:
    if network.lora_rank:
        _check_targets(network.lora_targets)
    return TrainingWork(dimensions.stage_two, trains_all=not network.lora_rank, lora_rank=network.lora_rank)


def _check_targets(targets: tuple[str, ...]) -> None:
    if set(targets) != set(LoraOptions().targets):
        msg = f"a LoRA on {', '.join(targets)} is not counted; give the recipe {', '.join(LoraOptions().targets)}"
        raise ConfigurationError(msg)


def _tokens_per_frame(dimensions: PipelineDimensions, size: Size) -> int:
    codec = dimensions.stage_two_codec
    geometry = CodecGeometry(codec.spatial_factor, codec.temporal_factor, dimensions.stage_two.patch_size[1])
    return geometry.tokens_per_frame(size)


def _latent_frames(dimensions: PipelineDimensions, num_frames: int) -> int:
    return CodecGeometry(temporal=dimensions.stage_two_codec.temporal_factor).latent_frames(num_frames)


def _token_shares(
    flow: WindowSourceOptions, dimensions: PipelineDimensions, size: Size, num_frames: int
) -> Mapping[int, float]:
    windows = flow.windows
    shares = window_shares(
        windows.segment_size,
        full_share=windows.full_share,
        # Windows whose neighbour the network makes itself have one for certain.
        before_share=flow.own_context_share + (1 - flow.own_context_share) * windows.before_share,
        after_share=windows.after_share,
    )
    held = _latent_frames(dimensions, num_frames)
    per_frame, by_tokens = _tokens_per_frame(dimensions, size), dict[int, float]()
    for length, share in shares.items():
        tokens = per_frame * min(length, held)  # short clips cut windows short
        by_tokens[tokens] = by_tokens.get(tokens, 0.0) + share
    return by_tokens


def _own_context_tflop(
    flow: WindowSourceOptions, work: TrainingWork, dimensions: PipelineDimensions, size: Size
) -> float:
    tokens = (2 + flow.windows.segment_size) * _tokens_per_frame(dimensions, size)
    forward = work.transformer.forward_cost(tokens, text_tokens=dimensions.text_tokens).tflop
    segments = (1 + flow.own_context_segments) / 2  # drawn from 1 to the most
    return flow.own_context_share * segments * flow.num_own_context_steps * forward


def _low_res_cache(run: LowResCacheRun, dimensions: PipelineDimensions) -> EncodingCost:
    videos, codec, text = run.videos, dimensions.stage_one_codec, dimensions.text_encoder
    size = Size(videos.width, videos.height)
    # The video, and the condition: its first frame followed by empty ones.
    tflop = 2 * codec.encode_tflop(size, videos.clips.num_frames) + text.forward_cost(dimensions.text_tokens).tflop
    working = max(codec.encode_bytes(size), text.activation_bytes(dimensions.text_tokens))
    return EncodingCost(tflop, 4 * codec.num_parameters + 2 * text.num_parameters, working)


def _transition(run: TransitionRun, dimensions: PipelineDimensions) -> EncodingCost:
    videos, encoding = run.videos, run.encoding
    size, frames = Size(videos.width, videos.height), videos.clips.num_frames
    phases = {phase.name: phase for phase in plan_run(dimensions, RunSettings(size, frames, stage_one_steps=1)).phases}
    stage_one, encode, text = (phases[name] for name in ("stage one", "reference encode", "text encoding"))
    codec, reduced = dimensions.stage_one_codec, dimensions.reference_size(size)
    coding = codec.encode_tflop(reduced, frames) + codec.decode_tflop(reduced, frames)
    redrawn, variants = 0.0, 0
    if encoding.transition is not None:
        levels, variants = encoding.transition.levels, encoding.transition.num_variants
        steps = sum(len(light_schedule(sigma)) for sigma in levels) / len(levels) if levels else 0.0
        # The clip is encoded beside the condition; a pass of one step has both codings of the condition and the video.
        redrawn = coding + codec.encode_tflop(reduced, frames) + steps * (stage_one.tflop - coding)
    encodings = 1 + (variants + encoding.unchanged) * len(encoding.modes)
    experts = dimensions.num_experts * dimensions.stage_one.num_parameters
    codecs = codec.num_parameters + dimensions.stage_two_codec.num_parameters
    return EncodingCost(
        tflop_per_clip=text.tflop + encodings * encode.tflop + variants * redrawn,
        weight_bytes=2 * (experts + codecs + dimensions.text_encoder.num_parameters),
        working_bytes=max(phase.activation_bytes for phase in (stage_one, encode, text)),
    )
