"""Stands in for SGLang where its processes are tested: it starts in no time, and ends as it is told."""
