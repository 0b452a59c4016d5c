"""How runs are accelerated, as options of every command that runs them (`swifti2v.pipelines.acceleration`)."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

AttentionOption = Annotated[str, typer.Option(help="auto, native, cudnn, flash, flash3, sage or xformers.")]
CompileOption = Annotated[bool, typer.Option("--compile", help="Compile the transformers' blocks.")]
QuantizationOption = Annotated[
    Literal["none", "float8", "int8"],
    typer.Option(help="Multiply eight bits in the transformers' blocks: inexact; faster with --compile."),
]
DecoderOption = Annotated[
    Literal["exact", "light"], typer.Option(help="The checkpoint's decoder, or a small one of lower fidelity.")
]
DecoderWeightsOption = Annotated[
    str | None, typer.Option(help="Of the light decoder: a file, or OWNER/NAME/FILE on the hub.")
]
DecodeDeviceOption = Annotated[
    str | None, typer.Option(help="Decode there, cuda:1 for instance, beside the denoising.")
]
