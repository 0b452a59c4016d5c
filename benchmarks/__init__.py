"""Programs that measure the system: Markdown on stdout, JSON in ``results/<theme>_<hardware>_<date>.json``."""
