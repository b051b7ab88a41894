"""What deploy/ says is what the programs take. Containers cannot be made by these tests."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from liveact.commands.cli import parser
from liveact.engine import Engine
from liveact.errors import InputError
from liveact.integrations import ray as replicas
from liveact.integrations.ray import Replicas, settings_of
from liveact.integrations.ray_proxy import PROXY_CALLBACK, proxy_layers
from liveact.serve.app import create_app
from liveact.serve.settings import ServeSettings
from tests.support.paths import REPOSITORY

DEPLOY = REPOSITORY / "deploy"


def dockerfile(word: str) -> list[str]:
    """What follows a word, continued lines as one."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.removeprefix(word).strip() for line in text.splitlines() if line.startswith(word)]


def read(name: str) -> dict[str, Any]:
    found = yaml.safe_load((DEPLOY / name).read_text())
    assert isinstance(found, dict)
    return found


def test_the_container_starts_a_command_that_exists() -> None:
    (entry,) = dockerfile("ENTRYPOINT")
    service = read("compose.yaml")["services"]["liveact"]
    words = [*yaml.safe_load(entry), *service["command"]]
    assert words[0] == "liveact"
    options = parser().parse_args(words[1:])
    assert (options.command, options.host, options.port) == ("serve", "0.0.0.0", 8080)
    assert options.checkpoint == Path("/model") and options.drain_s == 30
    assert float(service["stop_grace_period"].rstrip("s")) > options.drain_s + 5  # and the rest
    targets = {volume.split(":")[-2] for volume in service["volumes"]}
    assert targets == {str(options.checkpoint), str(options.portraits)}
    (secret,) = service["secrets"]
    assert options.token_file == Path("/run/secrets") / secret


def test_the_container_is_asked_where_the_server_answers(engine: Engine) -> None:
    (check,) = dockerfile("HEALTHCHECK")
    found = re.search(r"http://127\.0\.0\.1:8080(/\w+)", check)
    assert found is not None
    paths = create_app(engine, ServeSettings()).openapi()["paths"]
    assert found[1] in paths
    (port,) = dockerfile("EXPOSE")
    to = shlex.split(read("compose.yaml")["services"]["proxy"]["command"])
    assert to[to.index("--to") + 1] == f"127.0.0.1:{port}"


def test_the_image_is_made_of_what_is_here() -> None:
    made = (REPOSITORY / "Makefile").read_text()
    assert any("make wheel" in command for command in dockerfile("RUN")) and "\nwheel:" in made
    extras = (REPOSITORY / "pyproject.toml").read_text()
    assert any("[serve]" in command for command in dockerfile("RUN")) and "\nserve = [" in extras


def test_ray_finds_the_application_and_its_arguments() -> None:
    (application,) = read("ray-serve.yaml")["applications"]
    module, name = application["import_path"].split(":")
    assert getattr(importlib.import_module(module), name) is replicas.application
    options = Replicas.model_validate(application["args"])
    assert options.num_gpus == 1 and options.max_replicas == 8
    module, _, name = PROXY_CALLBACK.rpartition(".")
    assert getattr(importlib.import_module(module), name) is proxy_layers
    assert PROXY_CALLBACK in (DEPLOY / "ray-serve.yaml").read_text()
    # Ray kills a proxy that takes long to start.
    loaded = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", loaded], check=True)


def test_arguments_of_replicas_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="gpus"):
        Replicas.model_validate({"checkpoint": "x", "gpus": 1})
    with pytest.raises(InputError, match="token"):
        settings_of(Replicas(checkpoint="x", token_file=str(tmp_path / "none")))
    (tmp_path / "token").write_text("a-token-of-some-length\n")
    found = settings_of(Replicas(checkpoint="x", size=(64, 32), token_file=str(tmp_path / "token")))
    assert (found.size, found.token) == ((64, 32), "a-token-of-some-length")
    assert not found.is_loopback
