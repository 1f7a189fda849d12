"""seallmd: one daemon that owns every GPU of a machine and serves many language models on them."""

__version__ = "0.1.0"
