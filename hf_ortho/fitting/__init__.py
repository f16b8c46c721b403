"""Fits of a parametric family to a function by weighted least squares: numbers only, no modules."""
