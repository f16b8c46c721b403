"""The card of a folder that is pushed."""

import pytest
from huggingface_hub import ModelCard, ModelCardData

import hf_ortho
from hf_ortho.errors import CheckpointError
from hf_ortho.hub import card_of, write_card


@pytest.fixture
def folder(make_gpt2, save_parts, tmp_path):
    model, _ = make_gpt2()
    hf_ortho.convert(model, "hermite_3")
    folder = save_parts(tmp_path / "local", model)
    write_card(folder)
    return folder


def test_the_repository_takes_the_place_of_the_folder(folder):
    local = (folder / "README.md").read_text()
    pushed = card_of(folder, repo_id="me/pushed", remote_code=False)
    assert pushed == local.replace(str(folder), "me/pushed").replace("\n# local\n", "\n# pushed\n")
    assert 'from_pretrained("me/pushed")' in pushed
    assert "trust_remote_code" not in pushed
    assert (folder / "README.md").read_text() == local


def test_remote_code_is_shown_and_goes_away_again(folder):
    local = (folder / "README.md").read_text()
    with_code = card_of(folder, repo_id="me/pushed", remote_code=True)
    assert 'AutoModelForCausalLM.from_pretrained("me/pushed", trust_remote_code=True)' in with_code
    assert "requires hf_ortho" not in with_code
    (folder / "README.md").write_text(with_code)
    again = card_of(folder, repo_id=str(folder), remote_code=False)
    assert again == local.replace("\n# local\n", "\n# pushed\n")


def test_what_the_user_wrote_is_kept(folder):
    text = (folder / "README.md").read_text()
    edited = text.replace("# local", "# A model\n\nMine, \\1 and all.").replace("## Limits", "## My limits")
    edited = edited.replace("library_name: transformers", "library_name: transformers  # a comment")
    (folder / "README.md").write_text(edited)
    found = card_of(folder, repo_id="me/pushed", remote_code=False)
    assert found == edited.replace(str(folder), "me/pushed")


def test_a_card_of_someone_else_is_left_alone(folder):
    (folder / "README.md").write_text("# Mine\n\n[More Information Needed] about x.\n")
    assert card_of(folder, repo_id="me/pushed", remote_code=True) == "# Mine\n\n[More Information Needed] about x.\n"


@pytest.mark.parametrize(
    "form",
    [
        str(ModelCard.from_template(ModelCardData())) + "### Framework versions\n\n- PEFT 0.21.2",
        "---\nlibrary_name: transformers\n---\n\n<!-- This model card has been generated automatically according to "
        "the information the Trainer had access to. You\nshould probably proofread and complete it -->\n\n# local\n",
    ],
    ids=["peft", "trainer"],
)
def test_a_form_that_nobody_filled_in_is_replaced(folder, form):
    own = card_of(folder, repo_id="me/pushed", remote_code=False)
    (folder / "README.md").write_text(form)
    found = card_of(folder, repo_id="me/pushed", remote_code=False)
    assert "hermite_3" in found
    assert ModelCard(found).data.to_dict() == ModelCard(own).data.to_dict()


@pytest.mark.parametrize("config", [None, "{"])
def test_a_folder_that_holds_no_model(tmp_path, config):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        card_of(tmp_path, repo_id="me/pushed", remote_code=False)
