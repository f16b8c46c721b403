"""Interleaved timings and peak memory."""
