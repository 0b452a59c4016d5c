"""Write the table of measured costs that is shipped with the package, so that `swifti2v plan` answers at once.

Command: ``python -m benchmarks.measured_costs``, after a change to a network or to how it runs; it takes minutes. What
the table holds already is measured again only with ``--anew``.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from swifti2v.geometry import Size
from swifti2v.memory import table
from swifti2v.memory.devices import device_rates
from swifti2v.memory.models import planned_model
from swifti2v.memory.networks import STORAGES, Network, PipelineNetworks
from swifti2v.memory.ways import RunCosts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swifti2v.settings import GenerationSettings

PATH = Path(__file__).parents[1] / "src" / "swifti2v" / "memory" / table.SHIPPED_TABLE
SIZES = (Size(2560, 1408), Size(1920, 1056), Size(1280, 704))


def standard_runs() -> Iterator[tuple[PipelineNetworks, GenerationSettings]]:
    """Yield the runs whose costs are shipped: sizes of the app's presets, all decoders and kinds of arithmetic."""
    networks, settings = planned_model("wan2.2")
    public = {name: value for name, value in networks.stage_two.config.items() if name != "reference_channels"}
    training_free = replace(
        networks, stage_two=Network.of(networks.stage_two.class_path, public | {"in_channels": public["out_channels"]})
    )
    for size in SIZES:
        run = replace(settings, size=size)
        yield networks, run
        yield networks, replace(run, keep_context=True)
        yield networks.with_light_decoder(), run
        yield training_free, run
        for quantization in ("float8", "int8"):
            yield replace(networks, quantization=quantization), run
    yield planned_model("mini")


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anew", action="store_true", help="measure everything again")
    found = table.shipped_table()
    if parser.parse_args().anew:
        found["networks"].clear()
        found["costs"].clear()
    table.user_table = lambda: found  # what is measured goes here, and all of it into the file
    table.user_table_path = lambda: PATH
    for networks, settings in standard_runs():
        for storage in STORAGES:
            for ways in RunCosts(networks, settings, storage).ways(device_rates("RTX 4090")):
                deque(ways, maxlen=0)
        print(networks.stage_two.class_name, settings.size, len(json.dumps(found)), flush=True)


if __name__ == "__main__":
    main()
