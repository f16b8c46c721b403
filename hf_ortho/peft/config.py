"""The configuration of an adapter, saved in ``adapter_config.json``."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig
from peft.utils import PeftType

from .. import activations
from ..checkpoints.adapter import PEFT_TYPE
from ..checkpoints.provenance import Provenance
from ..conversion import ConversionReport
from ..errors import AdapterError, FitError
from ..fitting.options import FitOptions


def _peft_type() -> PeftType:
    """The member ``HF_ORTHO`` of ``PeftType``, added if missing: peft accepts only methods in this enum."""
    if PEFT_TYPE not in PeftType.__members__:
        member = str.__new__(PeftType, PEFT_TYPE)
        member._name_ = member._value_ = PEFT_TYPE
        type.__setattr__(PeftType, PEFT_TYPE, member)
        PeftType._member_names_.append(PEFT_TYPE)
        PeftType._member_map_[PEFT_TYPE] = PeftType._value2member_map_[PEFT_TYPE] = member
    return PeftType(PEFT_TYPE)


HF_ORTHO = _peft_type()


@dataclass
class OrthoConfig(PeftConfig):
    """Config of an adapter that replaces the activations driven by the model's config with learnable ones.

    Each learnable activation is initialized by a weighted least-squares fit to the activation that it replaces. Only
    the parameters of its series are trained. Its domain and tail slopes are fixed, and saved in ``layers``, not among
    the adapter's weights; with groups of channels, the domains are among the weights.

    Args:
        activation: ``FAMILY_DEGREE``, for example ``hermite_8``; ``FAMILY_DEGREE_gN`` with one function for each of N
            groups of channels; or a family with its default degree.
        target_modules: names, suffixes of names, or a regular expression of the activations to replace; all by default.
        fields: the config fields whose activations are replaced, for example ``["text_config.hidden_act"]``; all by
            default.
        modules_to_save: other modules to train and save, for example ``["score"]``.
        norms: also train and save the normalization layers of the model. They are added to ``modules_to_save``.
        derivative_weight, domain: options of the fits, as in ``hf_ortho.convert``.

    Attributes (set by the fit; leave them out of a new config):
        layers: path, field, source, domain, tail slopes and errors of the fit of each activation. If they are given,
            the adapter is not fitted: its parameters are NaN until its weights are loaded.
        source_activations: the value of each driving field in the config of the base model.
        calibrated: whether the fits were weighted by data.
        base_commit: the resolved commit of the base model on the Hub, None for a folder.
        hf_ortho_version: the version that made the fits.
        report: the ``ConversionReport`` of the fits, None for a loaded adapter; it is not saved.

    Raises:
        ActivationNameError: the family or degree does not exist.
        AdapterError: ``derivative_weight``, ``domain`` or ``norms`` is out of range.

    Example:
        >>> import peft
        >>> adapted = peft.get_peft_model(model, hf_ortho.peft.OrthoConfig(activation="hermite_4"))
        >>> adapted.get_nb_trainable_parameters()[0]  # 2 layers, 5 coefficients each
        10
    """

    activation: str = field(default="hermite_8", metadata={"help": "FAMILY_DEGREE of the learnable activations."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, suffixes or a regex of the activations to replace; all by default."}
    )
    fields: list[str] | None = field(
        default=None, metadata={"help": "The config fields whose activations are replaced; all by default."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train and save, for example a new head."}
    )
    norms: bool = field(default=False, metadata={"help": "Also train and save the normalization layers."})
    derivative_weight: float | None = field(
        default=None, metadata={"help": "Weight of the derivative in the fits, at least 0; by default of the family."}
    )
    domain: tuple[float, float] | None = field(
        default=None,
        metadata={"help": "One interval [lo, hi] for all activations; searched per fit by default."},
    )
    layers: list[dict] | None = field(default=None, metadata={"help": "The record of each activation's fit."})
    source_activations: dict[str, str] | None = field(
        default=None, metadata={"help": "The driving fields in the config of the base model."}
    )
    calibrated: bool = field(default=False, metadata={"help": "Whether the fits were weighted by data."})
    base_commit: str | None = field(default=None, metadata={"help": "The commit of the base model on the Hub."})
    hf_ortho_version: str | None = field(default=None, metadata={"help": "The version that made the fits."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = HF_ORTHO
        self.activation = activations.parse(self.activation).name
        if not isinstance(self.norms, bool):
            raise AdapterError(f"norms {self.norms!r} of the OrthoConfig: must be True or False")
        self.report: ConversionReport | None = None
        try:
            _ = self.options
        except FitError as error:
            raise AdapterError(f"OrthoConfig, or the adapter_config.json it was read from: {error}") from error

    @property
    def options(self) -> FitOptions:
        """The options of the fits."""
        return FitOptions(self.derivative_weight, self.domain)

    @property
    def provenance(self) -> Provenance:
        """The record of the fits.

        Raises:
            CheckpointError: an entry is invalid.
        """
        return Provenance.of_adapter(vars(self), "the OrthoConfig")
