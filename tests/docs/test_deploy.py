"""Files of deploy/: every path, extra, flag and port in them exists. Nothing is built: Docker is not needed."""

import fnmatch
import json
import re

import pytest
import yaml

from dmc import cli
from tests.docs.blocks import ROOT
from tests.docs.programs import setup_arguments

FOLDER = ROOT / "deploy"
IMAGES = sorted(FOLDER.glob("Dockerfile.*"))


def lines(image):
    """Instructions of a Dockerfile as (name, text), without comments and with continued lines joined."""
    text = re.sub(r"^#.*\n", "", image.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def check_serve(words):
    """Arguments of `dmc serve`, as its parser takes them."""
    parser, _ = cli._parsers()
    options, unknown = parser.parse_known_args(words)
    assert options.command == "serve" and not unknown
    return options


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_an_image_copies_and_installs_what_there_is(image):
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    named = {}
    for name, text in lines(image):
        named.setdefault(name, []).append(text)
    sources = [word for text in named["COPY"] for word in text.split()[:-1]]
    assert sources and all((ROOT / source).exists() and source in kept for source in sources)
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", " ".join(named["RUN"]))
    assert set(extras.split(",")) <= set(setup_arguments()["extras_require"])
    assert named["FROM"][0].startswith("python:3.12")
    options = check_serve([*json.loads(named["ENTRYPOINT"][0]), *json.loads(named["CMD"][0])][1:])
    assert named["EXPOSE"] == [str(options.port)] and options.host == "0.0.0.0"
    assert f":{options.port}/health" in named["HEALTHCHECK"][0]


def test_what_the_images_copy_is_all_that_the_package_needs():
    """Package data and the readme, which setup reads, are among the copied files; `data` and `checkpoints` are not imported."""
    arguments = setup_arguments()
    assert all((ROOT / package.replace(".", "/")).is_relative_to(ROOT / "dmc") for package in arguments["packages"])
    for package, patterns in arguments["package_data"].items():
        folder = ROOT / package.replace(".", "/")
        files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        assert all(fnmatch.filter(files, pattern) for pattern in patterns)
    readme = re.search(r'^readme = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"!{readme}" in (ROOT / ".dockerignore").read_text().splitlines()


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_compose_names_files_and_flags_that_exist(name):
    services = yaml.safe_load((FOLDER / name).read_text())["services"]
    assert (ROOT / services["dmc"]["build"]["dockerfile"]).is_file()
    check_serve(["serve", "/model", *services["dmc"]["command"]])
    folder = re.search(r"ENV .*NUMBA_CACHE_DIR=(\S+)", (ROOT / services["dmc"]["build"]["dockerfile"]).read_text())[1]
    volumes = [volume for service in services.values() for volume in service.get("volumes", ())]
    known = yaml.safe_load((FOLDER / name).read_text())["volumes"]
    for volume in volumes:
        source, target = volume.removesuffix(":ro").rsplit(":", 1)
        assert source in known or source.startswith("${MODEL:?") or (FOLDER / source).is_file()
        assert source not in ("numba", "triton") or target == folder.replace("numba", source)


def test_prometheus_reads_the_server_of_compose():
    (job,) = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())["scrape_configs"]
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert host in services and services[host]["ports"] == [f"127.0.0.1:{port}:{port}"] and job["metrics_path"] == "/metrics"
    assert any("prometheus.yaml" in volume for volume in services["prometheus"]["volumes"])
