"""The names in ACT2FN and ACT2CLS."""

import re

import pytest
from transformers.activations import ACT2CLS, ACT2FN

from hf_ortho.activations import FAMILIES, build, named, parse
from hf_ortho.errors import ActivationNameError, HfOrthoError


@pytest.mark.parametrize("make", [lambda name: ACT2FN[name], lambda name: ACT2CLS[name]()], ids=["ACT2FN", "ACT2CLS"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_degree_has_a_name(family, make):
    for degree in range(1, 33):
        module = make(f"{family}_{degree}")
        assert type(module) is FAMILIES[family]
        assert (module.degree, module.name, module.init) == (degree, f"{family}_{degree}", "paper")
    assert type(make(family)) is FAMILIES[family]
    assert make(family).degree == FAMILIES[family].default_degree


@pytest.mark.parametrize("family", FAMILIES)
def test_names_survive_configs_that_split_on_dashes(family):
    assert re.fullmatch(r"[a-z0-9_]+", family)
    assert FAMILIES[family].family == family


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_an_equation_for_cards(family):
    assert FAMILIES[family].equation.startswith("S(x) = ")


def test_each_look_up_builds_a_fresh_module():
    assert ACT2FN["hermite_8"] is not ACT2FN["hermite_8"]
    assert ACT2FN["hermite_8"].coefficients is not ACT2FN["hermite_8"].coefficients


def test_the_activations_of_transformers_are_left_alone():
    assert type(ACT2FN["gelu"]).__name__ == "GELUActivation"


@pytest.mark.parametrize("family", FAMILIES)
def test_parse_and_build(family):
    assert parse(family) == (FAMILIES[family], FAMILIES[family].default_degree, 1)
    assert parse(f"{family}_7") == (FAMILIES[family], 7, 1)
    assert parse(f"{family}_7_g12") == (FAMILIES[family], 7, 12)
    module = build(f"{family}_7", init="unit")
    assert (type(module), module.degree, module.init) == (FAMILIES[family], 7, "unit")


@pytest.mark.parametrize("degree", ["0", "33", "-1", "x", "", "08", "+8", " 8", "8.0", "1e1", "²", "٣"])
def test_wrong_degrees(degree):
    """With a name that is the start of another, and with one that has an underscore itself."""
    for name in (f"tropical_{degree}", f"tropical_rational_{degree}"):
        with pytest.raises(ActivationNameError, match="1 to 32") as caught:
            parse(name)
        assert isinstance(caught.value, ValueError)
        assert isinstance(caught.value, HfOrthoError)
        assert name not in ACT2FN


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("hermit_3", "hermite_3"),
        ("furier_6", "fourier_6"),
        ("tropic_2", "tropical_2"),
        ("tropical_ratio_2", "tropical_rational_2"),
    ],
)
def test_unknown_families_name_the_closest(name, closest):
    with pytest.raises(ActivationNameError, match=rf"did you mean {closest}\?"):
        parse(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hermite_3_g16_g2", "unknown activation 'hermite_3_g16_g2'"),
        ("hermit_3_g16", r"unknown activation 'hermit_3_g16'.*did you mean hermite_3_g16\?"),
        ("hermite_g16", "degree '' of hermite: must be an integer from 1 to 32, as in hermite_3_g16$"),
        ("tropical_rational_g4", "degree '' of tropical_rational: .*as in tropical_rational_3_g4$"),
        ("hermite_3_g1", "groups '1' of hermite_3: must be an integer from 2 to 65536"),
        ("hermite_3_g016", "groups '016' of hermite_3"),
        ("hermite_3_g1000000000", "groups '1000000000' of hermite_3"),
    ],
)
def test_wrong_groups(name, message):
    with pytest.raises(ActivationNameError, match=message):
        parse(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hermite", 3, 0), "groups 0 of hermite: must be an integer from 1 to 65536"),
        (("hermite", 3, "8"), "groups '8' of hermite"),
        (("hermite", 3, True), "groups True of hermite"),
        (("hermite", 3, 8.0), "groups 8.0 of hermite"),
        (("hermite_3_g4", None, 8), "'hermite_3_g4' already names its groups: give the family 'hermite' with groups 8"),
        (("hermite_3", 4, None), "'hermite_3' already names its degree: give the family 'hermite' with degree 4"),
        (("hermite", "3_g4", 8), "degree '3_g4' of hermite"),
        (("tropical", "rational_3", None), "degree 'rational_3' of tropical"),
    ],
)
def test_what_names_are_not_made_of(arguments, message):
    with pytest.raises(ActivationNameError, match=message):
        named(*arguments)


def test_named():
    assert named("hermite_3", groups=4) == named("hermite", 3, 4) == named("hermite_3_g4") == "hermite_3_g4"
    assert named("hermite", groups=1) == "hermite_8"


@pytest.mark.parametrize("name", ["", "_", "gelu", "zzz_3", "HERMITE_3", "hermite-3", None, 3])
def test_unknown_families(name):
    with pytest.raises(ActivationNameError, match="hermite, fourier, tropical, tropical_rational"):
        parse(name)


def test_any_number_of_groups_is_in_the_map():
    assert "hermite_3_g12" in ACT2FN
    assert "hermite_3_g12" not in list(ACT2FN)
    assert (ACT2FN["hermite_3_g12"].name, ACT2FN["hermite_3_g12"].groups) == ("hermite_3_g12", 12)
    for name in ("hermit_3_g12", "hermite_3_g0", "hermite_3_g65537", "hermite_g4", 7):
        assert name not in ACT2FN
        with pytest.raises(KeyError):
            ACT2FN[name]
