"""A family with what it must have and nothing else."""

import torch

from hf_ortho.activations.base import LearnableActivation


class Sine(LearnableActivation):
    family = "sine"
    equation = "S(x) = sum_{k=1..n} a_k sin(k x)"
    default_degree = 2

    @classmethod
    def initial_parameters(cls, degree, init):
        return {"amplitudes": [1.0 / k for k in range(1, degree + 1)]}

    @staticmethod
    def series(x, amplitudes):
        return sum(a * torch.sin(k * x) for k, a in enumerate(amplitudes, 1))

    @staticmethod
    def series_derivative(x, amplitudes):
        return sum(k * a * torch.cos(k * x) for k, a in enumerate(amplitudes, 1))
