"""Weighted least-squares fits of a parametric family to a function: arrays only, no modules."""
