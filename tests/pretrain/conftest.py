"""The tiny corpus and configuration of the engine's tests."""

from tests.engine.conftest import config_file, corpus, scenarios  # noqa: F401
