"""Learnable activations as a peft adapter; importing this package registers the method in peft."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from .config import HF_ORTHO, OrthoConfig
from .layer import OrthoLayer
from .model import OrthoModel, calibrate

__all__ = ["OrthoConfig", "OrthoLayer", "OrthoModel", "calibrate"]

if HF_ORTHO not in PEFT_TYPE_TO_CONFIG_MAPPING:  # False after a reload of this module
    register_peft_method(name="hf_ortho", config_cls=OrthoConfig, model_cls=OrthoModel)
