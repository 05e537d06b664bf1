"""What the tests of data modules share."""

import json
import shutil

import pytest


@pytest.fixture
def copied_model(model_folder, tmp_path):
    """Copies the small model with changes to its JSON files; None removes an entry, or the file."""

    def copy(**changes):
        folder = tmp_path / "model"
        shutil.copytree(model_folder, folder)
        for name, entries in changes.items():
            path = folder / f"{name}.json"
            if entries is None:
                path.unlink()
                continue
            content = json.loads(path.read_text()) | entries
            path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        return str(folder)

    return copy
