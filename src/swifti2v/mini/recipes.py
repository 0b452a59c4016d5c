"""Train the embedded model `mini` from a recipe, and put its parts together as a checkpoint.

```
swifti2v train stage-one recipes/mini/stage_one.yaml --data INDEX.csv --output runs/mini
swifti2v train stage-two recipes/mini/stage_two.yaml --data INDEX.csv --output runs/mini
swifti2v train export runs/mini --output CHECKPOINT
```
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import cv2
import torch
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from swifti2v.data.sources import read_index
from swifti2v.errors import ConfigurationError
from swifti2v.mini.network import MotionNetwork
from swifti2v.mini.reference_pairs import PairOptions, ReferencePair, clip_pairs, read_clip
from swifti2v.mini.stage_one import PathStageOne, write_settings
from swifti2v.mini.text import make_text_encoder, train_tokenizer
from swifti2v.mini.train_stage_one import StageOneObjective, StageOneRecipe
from swifti2v.mini.train_stage_two import (
    StageTwoObjective,
    StageTwoRecipe,
    fit_block_codec,
    make_stage_two_transformer,
)
from swifti2v.mini.transform_codec import BlockTransformCodec
from swifti2v.mini.words import all_phrases
from swifti2v.pixels import from_uint8
from swifti2v.training.engine.loop import LoopOptions, TrainingLoop
from swifti2v.wan.checkpoint_files import write_checksums
from swifti2v.wan.checkpoint_index import (
    INDEX_NAME,
    CheckpointIndex,
    DefaultsEntry,
    StageOneEntry,
    StageTwoEntry,
    write_index,
)
from swifti2v.wan.checkpoints import Part, resolve
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from swifti2v.data.sources import MediaItem
    from swifti2v.training.engine.loop import StepReport


@dataclass(frozen=True)
class SourceOptions:
    """Which files of an index are trained on.

    Args:
        tiers: grades of licence that the index gives; weights are shipped, so only those that allow it.
        max_clip_width: wider clips are held back for evaluation.
        photograph_width: photographs are reduced to this.
    """

    tiers: tuple[str, ...] = ("A",)
    max_clip_width: int = 1151
    photograph_width: int = 800

    def photographs(self, items: list[MediaItem]) -> list[MediaItem]:
        """Return the photographs to train on."""
        return self._chosen([item for item in items if item.kind == "photo"], "photographs")

    def clips(self, items: list[MediaItem]) -> list[MediaItem]:
        """Return the clips to train on."""
        narrow = [item for item in items if item.kind == "clip" and item.width <= self.max_clip_width]
        return self._chosen(narrow, "clips")

    def _chosen(self, items: list[MediaItem], name: str) -> list[MediaItem]:
        chosen = [item for item in items if item.tier in self.tiers]
        if not chosen:
            msg = f"the index has no {name} of the tiers {self.tiers}; choose other tiers or another index"
            raise ConfigurationError(msg)
        return chosen


@dataclass(frozen=True)
class StageOneRun:
    """The recipe file of Stage I."""

    loop: LoopOptions
    model: StageOneRecipe = field(default_factory=StageOneRecipe)
    sources: SourceOptions = field(default_factory=SourceOptions)


@dataclass(frozen=True)
class StageTwoRun:
    """The recipe file of Stage II."""

    loop: LoopOptions
    model: StageTwoRecipe = field(default_factory=StageTwoRecipe)
    sources: SourceOptions = field(default_factory=SourceOptions)
    pairs: PairOptions = field(default_factory=PairOptions)


def load_photographs(items: Sequence[MediaItem], *, max_width: int) -> list[NDArray[np.uint8]]:
    """Read photographs as uint8 [H,W,3], reduced to `max_width`."""
    photographs = []
    for item in items:
        picture = cv2.cvtColor(cv2.imread(str(item.path), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        scale = min(1.0, max_width / picture.shape[1])
        photographs.append(cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
    return photographs


def train_stage_one(
    run: StageOneRun,
    *,
    index: Path,
    output: Path,
    initial: str | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> None:
    """Train tokenizer, text encoder and network into ``output/stage_one``.

    With `initial`, a checkpoint's name or folder, its tokenizer is kept and its weights are trained on.
    """
    folder = output / "stage_one"
    folder.mkdir(parents=True, exist_ok=True)
    start = _folder_of(initial, "stage_one")
    chosen = run.sources.photographs(read_index(index))
    photographs = load_photographs(chosen, max_width=run.sources.photograph_width)
    captions = [_without_motion(item.caption) for item in chosen]
    if start:
        shutil.copytree(start / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    elif not (folder / "tokenizer").exists():
        corpus = captions + 3 * all_phrases()
        train_tokenizer(corpus, vocabulary_size=run.model.vocabulary_size).save_pretrained(folder / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    text_encoder = make_text_encoder(
        vocabulary_size=len(tokenizer),
        width=run.model.text_width,
        num_layers=run.model.text_layers,
        seed=run.model.seed,
    )
    torch.manual_seed(run.model.seed)
    network = MotionNetwork(
        width=run.model.width,
        num_layers=run.model.num_layers,
        num_heads=run.model.num_heads,
        text_width=run.model.text_width,
    )
    if start:
        network.load_state_dict(MotionNetwork.from_pretrained(start / "network").state_dict())
        text_encoder.load_state_dict(UMT5EncoderModel.from_pretrained(start / "text_encoder").state_dict())
    objective = StageOneObjective(
        run.model,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        network=network,
        photographs=photographs,
        captions=captions,
    )

    def save(_step: int) -> None:
        network.save_pretrained(folder / "network")
        text_encoder.save_pretrained(folder / "text_encoder")
        write_settings(folder, max_sequence_length=run.model.max_sequence_length)

    TrainingLoop(objective, folder, run.loop).run(on_step=on_step, on_checkpoint=save)


def train_stage_two(
    run: StageTwoRun,
    *,
    index: Path,
    output: Path,
    initial: str | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> None:
    """Fit the block codec, make the pairs, train the transformer.

    With `initial`, a checkpoint's name or folder, its codec is kept and its weights are trained on.
    """
    folder = output / "stage_two"
    folder.mkdir(parents=True, exist_ok=True)
    start = _folder_of(initial, "stage_two")
    if start:
        shutil.copytree(start / "vae", folder / "vae", dirs_exist_ok=True)
    items = read_index(index)
    clips = run.sources.clips(items)
    photographs = load_photographs(run.sources.photographs(items), max_width=run.sources.photograph_width)
    if not (folder / "vae").exists():
        codec = fit_block_codec(_codec_chunks(clips, photographs), num_channels=run.model.num_channels)
        codec.save_pretrained(folder / "vae")
    codec = BlockTransformCodec.from_pretrained(folder / "vae")
    pairs_path = folder / "pairs.pt"
    if not pairs_path.exists():
        made = clip_pairs(
            clips,
            photographs,
            codec=codec,
            options=run.pairs,
            seed=run.model.seed,
        )
        torch.save([(pair.truth, pair.reference) for pair in made], pairs_path)
    pairs = [ReferencePair(*pair) for pair in torch.load(pairs_path, weights_only=True)]
    transformer = make_stage_two_transformer(run.model)
    if start:
        transformer.load_state_dict(StageTwoTransformer.from_pretrained(start / "transformer").state_dict())
    objective = StageTwoObjective(run.model, codec=codec, transformer=transformer, pairs=pairs)
    loop = TrainingLoop(objective, folder, run.loop)
    loop.run(on_step=on_step, on_checkpoint=lambda _step: transformer.save_pretrained(folder / "transformer"))


def export_mini(run: Path, output: Path) -> None:
    """Write the checkpoint (layout of `wan/checkpoints.py`, networks in bfloat16, codecs in float32)."""
    one, two = run / "stage_one", run / "stage_two"
    for folder in (one / "network", two / "transformer"):
        if not folder.is_dir():
            msg = f"there is no {folder}; train that stage first"
            raise ConfigurationError(msg)
    if output.exists():
        shutil.rmtree(output)
    PathStageOne.from_pretrained(one).save_pretrained(output / "stage_one")
    transformer = StageTwoTransformer.from_pretrained(two / "transformer", torch_dtype=torch.bfloat16)
    transformer.save_pretrained(output / "stage_two" / "transformer")
    BlockTransformCodec.from_pretrained(two / "vae").save_pretrained(output / "stage_two" / "vae")
    for config in output.rglob("config.json"):
        _forget_origin(config)
    write_index(_index(), output / INDEX_NAME)
    write_checksums(output)


def _folder_of(checkpoint: str | None, part: Part) -> Path | None:
    return resolve(checkpoint, parts=(part,)).folder_of(part) if checkpoint else None


def _forget_origin(config: Path) -> None:
    """Remove the place on this machine that diffusers notes in a configuration."""
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _index() -> CheckpointIndex:
    return CheckpointIndex(
        format=1,
        name="mini",
        stage_one=StageOneEntry(
            source="./stage_one",
            kind="path",
            max_sequence_length=64,
            max_area=320 * 176,
            num_inference_steps=4,
            guidance_scale=1.0,
            negative_prompt="",
        ),
        stage_two=StageTwoEntry(source="./stage_two", refiner="light", num_inference_steps=1, uses_prompt=False),
        defaults=DefaultsEntry(width=1280, height=704, num_frames=81, fps=16.0),
        licence="Apache-2.0",
        attribution="Trained by recipes/mini; sources of the training data in docs/mini.md.",
    )


def _without_motion(caption: str) -> str:
    """Return a caption, or nothing where it speaks of drifting mist or of ripples that the path would not have."""
    return (
        "" if any(word in caption.lower() for word in ("drift", "rippl", "sway", "wave", "flow", "still")) else caption
    )


def _codec_chunks(clips: list[MediaItem], photographs: list[np.ndarray]) -> list[Tensor]:
    """Return the first frame and two later chunks of each clip, and the photographs as stills."""
    chunks = []
    for item in clips:
        frames = from_uint8(read_clip(item.path, num_frames=29))
        chunks += [frames[:, :, :1], frames[:, :, 5:9], frames[:, :, -4:]]
    for photograph in photographs:
        height, width = (side // 8 * 8 for side in photograph.shape[:2])
        chunks.append(from_uint8(photograph[None, :height, :width]))
    return chunks
