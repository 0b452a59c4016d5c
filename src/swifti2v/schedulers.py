"""Stage I's two schedules as diffusers schedulers, for a pipeline that only passes a number of steps."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin, UniPCMultistepScheduler
from diffusers.configuration_utils import register_to_config

from swifti2v.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# SchedulerMixin stands here for diffusers' loader: it finds how to load a class of a third-party module by looking for
# the base classes among that module's attributes (diffusers/pipelines/pipeline_loading_utils.py).
__all__ = ["FixedSigmaScheduler", "SchedulerMixin", "WanUniPCScheduler"]


class FixedSigmaScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler steps of rectified flow at exactly the sigmas that a distilled network was trained on.

    An unmodified `WanImageToVideoPipeline` calls ``set_timesteps(n, device)`` and nothing else, for which the parent
    makes another curve (it shifts its smallest sigma twice, so that the last of four steps is nearly empty).
    For ``n == len(fixed_sigmas)`` this one gives `fixed_sigmas`; for another n the curve they come from,
    ``linspace(1, 0, n + 1)`` shifted by `shift`. Timesteps are float32 ``1000 * sigma``.

    Args:
        num_train_timesteps: timestep at sigma 1.
        shift: of the curve for other numbers of steps.
        fixed_sigmas: strictly descending in (0, 1], without the final 0. Default: the public 4-step Wan2.2
            distillations (ModelTC/Wan2.2-Lightning; timesteps 1000, 937.5, 833.33, 625).

    Raises:
        InvalidInputError: `fixed_sigmas` is not such a list.
    """

    # The parent records its own arguments in the configuration; named here, they are not reported as unknown.
    _compatibles = ["FlowMatchEulerDiscreteScheduler"]  # noqa: RUF012 - diffusers' class attribute, read as a list

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 5.0,
        fixed_sigmas: Sequence[float] = (1.0, 0.9375, 5 / 6, 0.625),
    ) -> None:
        values = tuple(fixed_sigmas)
        ends_well = bool(values) and values[0] <= 1.0 and values[-1] > 0.0
        if not ends_well or any(after >= before for before, after in itertools.pairwise(values)):
            msg = f"fixed_sigmas {values} do not descend strictly within (0, 1]; leave the final 0 out"
            raise InvalidInputError(msg)
        super().__init__(num_train_timesteps=num_train_timesteps, shift=shift)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Prepare a run of `num_inference_steps` steps (None: as many as `fixed_sigmas`).

        `sigmas`, `mu` and `timesteps` are the parent's and mean what they mean there (sigmas are shifted by `shift`).
        """
        if sigmas is not None or timesteps is not None:
            super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas, mu=mu, timesteps=timesteps)
            return
        fixed = tuple(self.config.fixed_sigmas)
        num_steps = len(fixed) if num_inference_steps is None else num_inference_steps
        if num_steps != len(fixed):
            even = [1.0 - step / num_steps for step in range(num_steps)]
            super().set_timesteps(num_steps, device=device, sigmas=even)
            return
        # The parent shifts whatever it is given, so fixed values are set here instead of being passed up.
        self.num_inference_steps = num_steps
        self.sigmas = torch.tensor([*fixed, 0.0], dtype=torch.float32, device=device)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self._step_index = None
        self._begin_index = None

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, *arguments: Any, **keywords: Any
    ) -> Any:
        """Take one Euler step in float32 and return float32, whatever the dtype of `model_output`.

        The parent returns the dtype of the network, so that a bfloat16 network would round the latents at every step.
        """
        return super().step(model_output.float(), timestep, sample, *arguments, **keywords)


class WanUniPCScheduler(UniPCMultistepScheduler):
    """UniPC at the noise levels of Wan's own code.

    For n steps Wan takes the first n of ``linspace(0.999, 0, n + 1)``, shifted once by `flow_shift`; its parent, of
    ``linspace(1, 0.001, n + 1)``. Both give the network the whole part of ``1000 * sigma`` (int64) and end at 0. To be
    made with ``prediction_type="flow_prediction"`` and ``use_flow_sigmas=True``. Source: Wan-Video/Wan2.2 at 42bf4cf,
    ``wan/utils/fm_solvers_unipc.py``, made with shift 1 and given its shift when timesteps are set.
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Prepare a run of `num_inference_steps` steps; `sigmas` and `mu` are the parent's and mean what they do there.

        Raises:
            InvalidInputError: there is neither a number of steps nor a list of sigmas.
        """
        levels: Any = sigmas
        if levels is None:
            if num_inference_steps is None:
                msg = "there is neither num_inference_steps nor sigmas; give the number of steps, for instance 40"
                raise InvalidInputError(msg)
            # Wan reads its highest level, 999 of 1000, from a table in float32.
            highest = float(np.float32(1 - 1 / self.config.num_train_timesteps))
            levels = np.linspace(highest, 0, num_inference_steps + 1)[:-1]  # the parent shifts them
        super().set_timesteps(device=device, sigmas=levels, mu=mu)
        # Else the first step looks its place up by its timestep, and takes the second of two with the same whole part.
        self.set_begin_index(0)

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, *arguments: Any, **keywords: Any
    ) -> Any:
        """Take one step in float32, whatever the dtype of `model_output`: Wan's networks return float32.

        The parent would round the product of a bfloat16 velocity with sigma to bfloat16.
        """
        return super().step(model_output.float(), timestep, sample, *arguments, **keywords)
