"""Every snippet of docs/data.md builds."""

import re
from pathlib import Path

import pytest

from drpo_lightning import cli

ROOT = Path(__file__).parents[2]
SNIPPETS = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_builds(snippet, tmp_path, monkeypatch):
    (tmp_path / "snippet.yaml").write_text(snippet)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["drpo"])
    built = cli.DRPOCommandLine(
        cli.PolicyModule,
        cli.RolloutDataModule,
        args=["--config=configs/quickstart.yaml", f"--config={tmp_path}/snippet.yaml"],
        run=False,
        save_config_callback=None,
        **cli.COMMAND_LINE,
    )
    for name in re.findall(r"drpo_lightning\.datamodules\.(\w+)", snippet)[:1]:
        assert type(built.datamodule.prompts).__name__ == name
