"""One of two processes that share the sequence of both stages' networks; started by `test_acceleration.py`.

Command: ``python sharing_process.py RANK MEETING_FILE``. Writes the largest differences to the networks alone as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from swifti2v.errors import InvalidInputError
from swifti2v.runner.acceleration import share_sequence
from swifti2v.wan.transformer import StageTwoTransformer

TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 32,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}


def main(rank: int, meeting_file: str) -> None:
    """Run both networks alone, then together."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=2)
    # diffusers 0.42 takes the rank modulo the number of accelerators, and a CPU counts as none.
    torch.accelerator.device_count = lambda: 1
    torch.manual_seed(0)
    refiner = StageTwoTransformer(in_channels=96, out_channels=48, reference_channels=48, **TINY).eval()
    expert = WanTransformer3DModel(in_channels=36, out_channels=16, **TINY).eval()
    # Three frames of 3x4 tokens: the cut goes through the middle frame, whose timestep is not that of the first.
    window, noisy, text = torch.randn(1, 96, 3, 6, 8), torch.randn(1, 36, 3, 6, 8), torch.randn(1, 7, 32)
    timestep = torch.tensor([[0.0, 500.0, 250.0]])

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        refined = refiner(window, timestep, text, output_frames=slice(1, 3)).sample
        return refined, expert(noisy, torch.tensor([300.0]), text, return_dict=False)[0]

    with torch.no_grad():
        alone = run()
        share_sequence([refiner, expert], 2)
        together = run()
        with refiner.text_kept():
            run()
            kept = run()
        try:
            refiner(window[..., :2, :6], timestep, text)
            refusal = ""
        except InvalidInputError as error:
            refusal = str(error)
    pairs = [*zip(alone, together, strict=True), *zip(alone, kept, strict=True)]
    differences = [float((one - other).abs().max()) for one, other in pairs]
    found = {"differences": differences, "scale": float(alone[0].abs().max()), "refusal": refusal}
    sys.stdout.write(json.dumps(found) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
