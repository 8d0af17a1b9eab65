"""millrace: distributed pretraining that never spills a sample on the way."""

__version__ = "0.1.0"
