"""Stands in for sglang-router where its process is tested."""
