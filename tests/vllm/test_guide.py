"""docs/serving.md, word for word: its code, its server, its requests."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from patience import PATIENCE

from prefixattn.vllm.testing import Server, free_port

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
SERVER = "python -m vllm.entrypoints.openai.api_server"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def commands():
    """What a reader types, one for each prompt."""
    typed = re.split(r"^\$ ", "".join(blocks("console")), flags=re.MULTILINE)
    return [command.strip() for command in typed if command]


def test_the_guide_word_for_word(made_world, tmp_path):
    (tmp_path / "path/to").mkdir(parents=True)
    shutil.copytree(made_world / "model", tmp_path / "path/to/model")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {"PATH": path, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    port = free_port()

    def run(command):
        done = subprocess.run(
            ["bash", "-c", command.replace("localhost:8000", f"localhost:{port}")],
            cwd=tmp_path,
            env=os.environ | env,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        return done.stdout

    code = tmp_path / "code.py"
    code.write_text("".join(blocks("python")))
    run(f"python {code}")
    found = commands()
    (serve,) = (command for command in found if command.startswith(SERVER))
    (check,) = (command for command in found if command.startswith("prefixattn vllm"))
    assert json.loads(run(check))["kv_connector"] == "PrefixConnector"

    line = f'exec {serve} "$@"'
    options = {"command": ["bash", "-c", line, "bash"], "port": port, "cwd": tmp_path}
    with Server([], tmp_path / "log", env=env, **options):
        asked = [command for command in found if command.startswith("curl ")]
        by_model, chat, listed, by_parameter = (json.loads(run(command)) for command in asked)
    assert by_model["usage"]["completion_tokens"] > 1
    assert chat["choices"][0]["message"]["content"]
    assert {"base", "brief", "formal"} == {model["id"] for model in listed["data"]}
    texts = [answer["choices"][0]["text"] for answer in (by_model, by_parameter)]
    assert len(set(texts)) == 1
