"""Dockerfile, compose.yaml and .dockerignore agree with each other and with the code; read without any container."""

import re
from pathlib import Path

import yaml

from common.config import FIELDS
from common.container import TRAIN

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


def instructions(name):
    joined = re.sub(r"\\\n", " ", DOCKERFILE)
    return [line.partition(" ")[2] for line in joined.splitlines() if line.startswith(f"{name} ")]


def test_compose_builds_with_the_dockerfile_s_own_defaults():
    defaults = dict(argument.split("=", 1) for argument in instructions("ARG"))
    assert set(defaults) == {"BASE_IMAGE", "TORCH_INDEX"}
    for service in COMPOSE["services"].values():
        given = {name: re.fullmatch(r"\$\{(\w+):?-(.*)\}", text).groups() for name, text in service["build"]["args"].items()}
        assert given == {name: (name, default) for name, default in defaults.items()}


def test_compose_numbers_its_ranks_and_names_flags_that_exist():
    services = COMPOSE["services"]
    group = {"WORLD_SIZE": len(services), "MASTER_ADDR": "rank0", "MASTER_PORT": 29500}
    for number, (name, service) in enumerate(services.items()):
        environment = service["environment"]
        assert name == f"rank{number}" and environment["RANK"] == number and environment.items() >= group.items()
        flags = {variable for variable, value in environment.items() if value is None}
        assert flags and flags <= {field.upper() for field in FIELDS}
    assert services["rank0"]["volumes"] == ["./out:/out"] and "volumes" not in services["rank1"]


def test_the_dockerfile_installs_pinned_versions_only():
    pinned = {re.split(r"[=;]", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line}
    for installed in (line for line in instructions("RUN") if "pip install" in line):
        words = installed.partition("&&")[0].split()
        assert "-c" in words
        packages = words[words.index("-c") + 2 :]
        assert packages and set(packages) <= pinned


def test_the_entry_is_where_the_dockerfile_puts_it():
    workdir = instructions("WORKDIR")[0]
    assert f'"{workdir}/common/container.py"]' in instructions("ENTRYPOINT")[0]
    assert TRAIN[1].startswith(f"{workdir}/launchers/") and (ROOT / TRAIN[1].removeprefix(f"{workdir}/")).is_file()


def test_only_what_is_named_goes_into_the_image():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = {word for line in instructions("COPY") if "--from" not in line for word in line.split()[:-1]}
    assert copied == allowed and all((ROOT / name).exists() for name in allowed)
