"""Programs other people wrote, unchanged, against a served model (scripts/clients)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from server_process import BIN, Running, free_port
from small_model import CONFIG, write_random_model

ROOT = Path(__file__).parent.parent.parent
RUN = ROOT / "scripts" / "clients" / "run.py"
KEY = "secret"


@pytest.mark.slow
@pytest.mark.server
def test_every_client_passes(tmp_path):
    """Installs them where ``MOEYARD_CLIENTS`` says, or anew: minutes, and 5 GB."""
    venvs = os.environ.get("MOEYARD_CLIENTS", str(tmp_path / "venvs"))
    folder, port = tmp_path / "demo", free_port()
    write_random_model(folder, CONFIG.model_copy(update={"max_positions": 1024}))
    command = [str(BIN / "moeyard"), "serve", str(folder), "--port", str(port), "--api-key", KEY]
    command += ["--chat-template", str(ROOT / "configs" / "serve" / "chatml.jinja")]
    server = Running([*command, "--num-threads", "1"], tmp_path / "log.txt", port)
    try:
        server.wait_until_ready()
        clients = [sys.executable, str(RUN), server.base, "demo", str(folder), "--venvs", venvs]
        done = subprocess.run(clients, env=os.environ | {"OPENAI_API_KEY": KEY}, check=False)
        assert done.returncode == 0
    finally:
        server.stop()


def test_the_page_names_the_versions_that_were_run():
    pinned = dict(re.findall(r'"([a-z-]+)(?:\[[a-z,]+\])?==([\d.]+)"', RUN.read_text()))
    pinned.pop("torch")
    page = (ROOT / "docs" / "serving.md").read_text()
    rows = dict(re.findall(r"^\| ([a-z-]+) \| ([\d.]+) \|", page, re.M))
    assert pinned and {name: rows.get(name) for name in pinned} == pinned
