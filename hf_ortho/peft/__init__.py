"""Learnable activations as a peft adapter; importing registers the method, so that stock peft knows it."""

from peft.utils import register_peft_method

from .config import OrthoConfig
from .layer import OrthoLayer
from .model import OrthoModel, calibrate

__all__ = ["OrthoConfig", "OrthoLayer", "OrthoModel", "calibrate"]

register_peft_method(name="hf_ortho", config_cls=OrthoConfig, model_cls=OrthoModel)
