"""`light`: a small trained network in pixel space that refines the motion reference of any model."""
