"""How Stage I samples, as options of every command that asks for a video."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import typer

from swifti2v.cli.option_groups import with_option_group


@dataclass(frozen=True)
class StageOneSampling:
    """The options, declared once; `with_stage_one_options` gives them to a command."""

    many_step: Annotated[
        bool, typer.Option("--many-step", help="Stage I without its few-step adapters: many steps, with guidance.")
    ] = False
    stage_one_steps: Annotated[int | None, typer.Option(help="Steps of Stage I.")] = None
    stage_one_guidance: Annotated[float | None, typer.Option(help="Guidance scale of Stage I; 1 turns it off.")] = None
    stage_one_guidance_2: Annotated[
        float | None, typer.Option(help="Of its low-noise expert; default: --stage-one-guidance.")
    ] = None
    stage_one_flow_shift: Annotated[float | None, typer.Option(help="Time shift of Stage I's many steps.")] = None
    negative_prompt: Annotated[
        str | None, typer.Option(help="What to steer away from, where guidance is on; default: the checkpoint's.")
    ] = None

    def choices(self) -> dict[str, Any]:
        """Return what was chosen, as fields of `GenerationSettings`."""
        return {
            "few_step": False if self.many_step else None,
            "stage_one_steps": self.stage_one_steps,
            "stage_one_guidance_scale": self.stage_one_guidance,
            "stage_one_guidance_scale_2": self.stage_one_guidance_2,
            "stage_one_flow_shift": self.stage_one_flow_shift,
            "negative_prompt": self.negative_prompt,
        }


with_stage_one_options = partial(with_option_group, parameter="stage_one", group=StageOneSampling)
"""Decorator: the options stand in place of the parameter `stage_one`, a `StageOneSampling`."""
