"""Parts of `benchmarks/data_peers.py`; they run in every peer's environment and import nothing of millrace's."""
