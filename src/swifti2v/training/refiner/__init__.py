"""Stage II of any checkpoint: stage-transition, segment flow matching, distillation."""
