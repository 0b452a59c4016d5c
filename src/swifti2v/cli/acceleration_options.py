"""How runs are accelerated, as options of every command that runs them (`swifti2v.runner.acceleration`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from swifti2v.cli.option_groups import with_option_group

if TYPE_CHECKING:
    from swifti2v.runner.acceleration import Acceleration


@dataclass(frozen=True)
class AccelerationOptions:
    """The options, declared once; `with_acceleration_options` gives them to a command."""

    attention: Annotated[str, typer.Option(help="auto, native, cudnn, flash, flash3, sage or xformers.")] = "auto"
    compile_blocks: Annotated[bool, typer.Option("--compile", help="Compile the transformers' blocks.")] = False
    quantization: Annotated[
        Literal["none", "float8", "int8"],
        typer.Option(help="Multiply eight bits in the transformers' blocks: inexact; faster with --compile."),
    ] = "none"
    decoder: Annotated[
        Literal["exact", "light"], typer.Option(help="The checkpoint's decoder, or a small one of lower fidelity.")
    ] = "exact"
    decoder_weights: Annotated[
        str | None, typer.Option(help="Of the light decoder: a file, or OWNER/NAME/FILE on the hub.")
    ] = None
    decode_device: Annotated[
        str | None, typer.Option(help="Decode there, cuda:1 for instance, beside the denoising.")
    ] = None

    def acceleration(self, *, num_processes: int = 1, decodes: bool = True) -> Acceleration:
        """Return what the pipeline is given; a process that does not decode is given no decoder of its own.

        Raises:
            InvalidInputError: as `Acceleration` does.
        """
        from swifti2v.runner.acceleration import Acceleration

        decoding: dict[str, Any] = {}
        if decodes:
            decoding = {
                "decoder": self.decoder,
                "decoder_weights": self.decoder_weights,
                "decode_device": self.decode_device,
            }
        return Acceleration(
            attention=self.attention,
            compile_blocks=self.compile_blocks,
            quantization=self.quantization,
            num_processes=num_processes,
            **decoding,
        )


with_acceleration_options = partial(with_option_group, parameter="accelerated_by", group=AccelerationOptions)
"""Decorator: the options stand in place of the parameter `accelerated_by`, an `AccelerationOptions`."""
