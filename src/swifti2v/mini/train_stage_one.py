"""Train Stage I of `mini`: flow matching in x0 form on motion that is known exactly; no frame is ever rendered.

An interrupted run continues at its last checkpoint with the same losses: a batch depends on the seed and its number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from swifti2v.mini.motion_examples import draw_example, draw_view
from swifti2v.mini.network import GLOBALS, PATCH, MotionLatents, shifted
from swifti2v.mini.path import MAP_CHANNELS
from swifti2v.mini.text import encoded
from swifti2v.training.engine.samples import Prefetcher

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

    from swifti2v.mini.motion_examples import Example
    from swifti2v.mini.network import MotionNetwork

_SLOTS = np.repeat([0, 1, 2], [2, 4, 4])  # of the channels of a map: steady, sway, ripple


@dataclass(frozen=True)
class Phase:
    """From which share of the run on how many examples make a batch, and of how many places of their pictures."""

    begins: float
    batch_size: int
    num_places: int


@dataclass(frozen=True)
class StageOneRecipe:
    """Everything that decides what Stage I of `mini` becomes, but for the data.

    Args:
        width, num_layers, num_heads: of the transformer.
        text_width, text_layers, vocabulary_size, max_sequence_length: of the text encoder.
        phases: what the words mean is learned first, from many prompts and few places of a picture; then where things
            move, from fewer prompts and all places.
        num_views: crops of the photographs that are drawn from.
        places_weight: of the loss of the maps beside that of the rates.
        energy_floor: mean square of a motion (latents) down to which its errors count in proportion to it.
        num_steps: of the run.
    """

    width: int = 160
    num_layers: int = 4
    num_heads: int = 5
    text_width: int = 96
    text_layers: int = 2
    vocabulary_size: int = 1024
    max_sequence_length: int = 64
    phases: tuple[Phase, ...] = (Phase(0.0, 96, 9), Phase(0.62, 48, 40), Phase(0.92, 12, 208))
    num_views: int = 1200
    places_weight: float = 2.0
    energy_floor: float = 0.08
    num_steps: int = 4000
    seed: int = 0


class StageOneObjective:
    """Predict clean motion from noisy motion, a picture and a prompt; the `Objective` of Stage I."""

    def __init__(
        self,
        recipe: StageOneRecipe,
        *,
        tokenizer: PreTrainedTokenizerFast,
        text_encoder: UMT5EncoderModel,
        network: MotionNetwork,
        photographs: Sequence[NDArray[np.uint8]],
        captions: Sequence[str],
    ) -> None:
        self.recipe = recipe
        self.module: nn.Module = nn.ModuleDict({"network": network, "text_encoder": text_encoder})
        self._tokenizer, self._text_encoder, self._network = tokenizer, text_encoder, network
        rng = np.random.default_rng([recipe.seed, recipe.num_views])
        chosen = [index % len(photographs) for index in range(recipe.num_views)]
        self._views = [draw_view(photographs[index], captions[index], rng) for index in chosen]
        self._batches = Prefetcher(self._batch)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of one batch, a function of the weights and `step`."""
        features, clean, waves, prompts = self._batches.take(step)
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        count = len(prompts)
        sigma = shifted(torch.rand(count, generator=generator).clamp(min=0.02))
        sigma = torch.where(torch.rand(count, generator=generator) < 0.3, torch.ones(count), sigma)
        noise = MotionLatents(*(torch.randn(part.shape, generator=generator) for part in clean))
        noisy = MotionLatents(
            *(
                torch.lerp(part, added, sigma.view(-1, *[1] * (part.ndim - 1)))
                for part, added in zip(clean, noise, strict=True)
            )
        )
        longest = self.recipe.max_sequence_length
        text = encoded(self._tokenizer, self._text_encoder, prompts, max_sequence_length=longest)
        return self._compare(self._network(noisy, sigma, features, text), clean, waves)

    def _compare(self, made: MotionLatents, clean: MotionLatents, waves: Tensor) -> tuple[Tensor, dict[str, float]]:
        floor = self.recipe.energy_floor

        def judged(error: Tensor, truth: Tensor) -> Tensor:  # [B,C,...]: a small motion counts for more than its size
            axes = tuple(range(1, error.ndim))
            energy = truth.square().mean(dim=axes)
            return error.square().mean(dim=axes) * (energy + floor).rsqrt()

        camera = judged((made.rates - clean.rates)[:, :4], clean.rates[:, :4]).mean()
        cycles = ((made.rates - clean.rates)[:, 4:].square() * waves).sum() / waves.sum().clamp(min=1)
        slots = torch.from_numpy(_SLOTS)
        error, truth = (
            torch.unflatten(part, -1, (-1, MAP_CHANNELS)) for part in (made.places - clean.places, clean.places)
        )
        maps = [judged(error[..., slots == slot], truth[..., slots == slot]).mean() for slot in range(3)]
        # Waves are seldom and small, and learned last of all.
        places = maps[0] + 2.5 * (maps[1] + maps[2])
        loss = camera + 0.3 * cycles + self.recipe.places_weight * places
        numbers = {"camera": camera, "cycles": cycles, "steady": maps[0], "sway": maps[1], "ripple": maps[2]}
        return loss, {name: float(value.detach()) for name, value in numbers.items()}

    def _batch(self, step: int) -> tuple[Tensor, MotionLatents, Tensor, list[str]]:
        rng = np.random.default_rng([self.recipe.seed, step])
        progress = step / self.recipe.num_steps
        phase = [phase for phase in self.recipe.phases if phase.begins <= progress][-1]
        views = [self._views[index] for index in rng.integers(len(self._views), size=phase.batch_size)]
        fewest = min(len(view.features) for view in views)
        examples = [draw_example(view, rng, num_places=min(phase.num_places, fewest)) for view in views]
        clean = MotionLatents(_stacked(examples, "rates"), _stacked(examples, "places"))
        return _stacked(examples, "features"), clean, _stacked(examples, "waves"), [e.prompt for e in examples]


def _stacked(examples: Sequence[Example], name: str) -> Tensor:
    return torch.from_numpy(np.stack([getattr(example, name) for example in examples]))


@torch.no_grad()
def refit_readouts(
    network: MotionNetwork, batches: Iterable[tuple[MotionLatents, MotionLatents, Tensor, Tensor, Tensor]]
) -> None:
    """Solve the last linear layers in closed form for what all layers before them say: minutes of training saved.

    Gates by logistic regression; then rates, and maps behind the gates, by least squares, both drawn to the weights
    that they have.

    Args:
        network: changed in place.
        batches: noisy latents, clean latents, sigma [B], features [B,N,C], text [B,L,D].
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in ("token", "rates", "hidden", "features", "places")}
    taken: dict[str, Tensor] = {}
    hooks = [
        network.to_rates.register_forward_hook(lambda _m, inputs, _o: taken.__setitem__("token", inputs[0])),
        network.to_places[2].register_forward_hook(lambda _m, inputs, _o: taken.__setitem__("hidden", inputs[0])),
    ]
    for noisy, clean, sigma, features, text in batches:
        network(noisy, sigma, features, text)
        values = (taken["token"], clean.rates, taken["hidden"], features, clean.places)
        for name, value in zip(kept, values, strict=True):
            kept[name].append(value)
    for hook in hooks:
        hook.remove()
    token, rates, hidden, features, places = (torch.cat(values).double() for values in kept.values())
    slots = torch.from_numpy(_SLOTS)
    energy = torch.stack(
        [
            torch.unflatten(places, -1, (-1, MAP_CHANNELS))[..., slots == slot].square().mean(dim=(1, 2, 3))
            for slot in range(3)
        ],
        dim=1,
    )
    active = (energy > 1e-6).double()
    weight, bias = network.to_rates.weight.double(), network.to_rates.bias.double()
    gates = _logistic(token, active, weight[GLOBALS:], bias[GLOBALS:])
    # Cycles are asked for where there is a wave; camera rates everywhere, small ones weighed up as in the loss.
    scale = (rates[:, :4].square().mean(dim=1) + 0.08).rsqrt().sqrt()
    camera = _least_squares(token, rates[:, :4], weight[:4], bias[:4], scale)
    cycles = [
        _least_squares(token, rates[:, [4 + wave]], weight[[4 + wave]], bias[[4 + wave]], active[:, 1 + wave])
        for wave in range(2)
    ]
    for rows, (solved, offset) in zip(
        (slice(0, 4), slice(4, 5), slice(5, 6), slice(GLOBALS, None)), (camera, *cycles, gates), strict=True
    ):
        network.to_rates.weight[rows] = solved.float()
        network.to_rates.bias[rows] = offset.float()
    last, direct = cast("nn.Linear", network.to_places[2]), network.to_places_directly
    gate = torch.sigmoid(4 * (token @ gates[0].T + gates[1]))
    joined = torch.cat([hidden, features], dim=-1)
    of_slot = slots.repeat(PATCH**2)
    for slot in range(3):
        columns = of_slot == slot
        scale = (energy[:, slot] + 0.08).rsqrt().sqrt()[:, None].expand(-1, places.shape[1]).flatten()
        opened = gate[:, slot][:, None].expand(-1, places.shape[1]).flatten()
        old = torch.cat([last.weight[columns], direct.weight[columns]], dim=1).double()
        offset = (last.bias + direct.bias)[columns].double()
        solved, offset = _least_squares(
            joined.flatten(0, 1), places[..., columns].flatten(0, 1), old, offset, scale, opened=opened
        )
        last.weight[columns], direct.weight[columns] = torch.split(
            solved.float(), [hidden.shape[-1], features.shape[-1]], dim=1
        )
        last.bias[columns], direct.bias[columns] = offset.float(), 0.0


def _least_squares(
    values: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, *, opened: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return weight and bias of ``targets = opened * (weight @ values + bias)``, rows weighed by `scale`."""
    rows = torch.cat([values, torch.ones_like(values[:, :1])], dim=1)
    rows = rows if opened is None else rows * opened[:, None]
    old = torch.cat([weight, bias[:, None]], dim=1)
    error = (targets - rows @ old.T) * scale[:, None]
    rows = rows * scale[:, None]
    ridge = 3e-4 * rows.square().sum(dim=0).mean() * torch.eye(rows.shape[1], dtype=rows.dtype)
    change = torch.linalg.solve(rows.T @ rows + ridge, rows.T @ error).T
    solved = old + change
    return solved[:, :-1], solved[:, -1]


def _logistic(values: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the gates, ``labels = sigmoid(4 * (weight @ values + bias))``."""
    with torch.enable_grad():
        solved, offset = (value.clone().requires_grad_() for value in (weight, bias))
        solver = torch.optim.LBFGS([solved, offset], max_iter=60, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            solver.zero_grad()
            says = 4 * (values @ solved.T + offset)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(says, labels)
            loss = loss + 2e-3 * (solved - weight).square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        solver.step(closure)  # type: ignore[no-untyped-call]
    return solved.detach(), offset.detach()
