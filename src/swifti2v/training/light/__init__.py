"""Training of `light`: damage that motion references carry, pairs of clips and photographs, the loop."""
