"""Measure interleaved timings and peak memory."""
