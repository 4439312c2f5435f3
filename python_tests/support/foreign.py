"""Marks of tests that need a package which only `make test-integrations` installs."""

import importlib.util

import pytest

_found = importlib.util.find_spec("megatron") is not None and importlib.util.find_spec("megatron.core") is not None
needs_megatron = pytest.mark.skipif(not _found, reason="megatron-core is not installed (the [megatron] extra)")
