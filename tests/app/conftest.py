import pytest


@pytest.fixture(scope="session")
def converted_folder(tmp_path_factory, gpt2_folder, hf_ortho_command):
    folder = tmp_path_factory.mktemp("app") / "converted"
    assert hf_ortho_command("convert", gpt2_folder, "-o", folder).code == 0
    return folder
