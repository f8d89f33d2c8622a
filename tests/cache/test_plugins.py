"""Policies and codecs of another package, by entry point and by ``module:Class``."""

import sys

import pytest
import torch

from dmc import LLM, SamplingParams
from dmc.cache import codec, policy, policy_class
from dmc.cache.codecs.base import Blocks, Codec
from dmc.cache.codecs.int8 import Int8Codec
from dmc.cache.policies.streaming import StreamingPolicy
from dmc.cli import main
from dmc.evaluation.grid import cells, choose
from dmc.evaluation.spec import named
from dmc.kernels.backend import using
from tests.model import tiny

MODULE = """
from dmc.cache.codecs.int8 import Int8Codec
from dmc.cache.policies.streaming import StreamingPolicy


class Newest(StreamingPolicy):
    name = "newest"

    def __init__(self, *, recent: int = 8) -> None:
        super().__init__(sinks=0, recent=recent)


class Mine(Int8Codec):
    name = "mine"


class Broken(StreamingPolicy):
    name = "broken"

    def keep(self, entries):
        raise ArithmeticError("the reason of a user's policy")


class Failing(Int8Codec):
    name = "failing"
    pages = 10_000

    def encode(self, keys, values):
        type(self).pages -= len(keys)
        if type(self).pages < 0:
            raise ArithmeticError("the reason of a user's codec")
        return super().encode(keys, values)


nothing = 3
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package: a module, and metadata with entry points."""
    (tmp_path / "acme_kv.py").write_text(MODULE)
    info = tmp_path / "acme_kv-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-kv\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[dmc.policies]\nnewest = acme_kv:Newest\nlost = acme_kv:Lost\n\n[dmc.codecs]\nmine = acme_kv:Mine\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("acme_kv", None)


def directory(tmp_path):
    fields = tiny.config()
    return tiny.write(tmp_path / "model", fields, tiny.weights(fields))


@pytest.mark.parametrize("name", ["newest", "acme_kv:Newest"])
def test_it_serves_like_the_policy_that_it_is(package, tmp_path, name):
    path = directory(tmp_path)
    tokens = [torch.randint(3, tiny.VOCAB, (40,), generator=torch.Generator().manual_seed(0)).tolist()]
    mine = LLM(path, device="cpu", policy=name, policy_settings={"recent": 6}, codec="mine").score(tokens, prompt_tokens=1)[0]
    theirs = StreamingPolicy(sinks=0, recent=6)
    known = LLM(path, device="cpu", policy=theirs, codec="int8").score(tokens, prompt_tokens=1)[0]
    assert torch.equal(mine.logprobs, known.logprobs) and torch.equal(mine.stats.entries, known.stats.entries)
    assert int(mine.stats.entries.max()) == 5  # and the next query itself


def test_the_names(package):
    assert type(policy("newest", recent=9)).__name__ == "Newest" and isinstance(codec("mine"), Int8Codec)
    assert named("acme_kv:Newest:recent=9") == ("acme_kv:Newest", {"recent": 9})
    assert named("newest:recent=9") == ("newest", {"recent": 9}) and named("acme_kv:Mine") == ("acme_kv:Mine", {})
    for name, words in (
        ("oldest", "unknown policy 'oldest'; known: full, .*gate, .*newest.*; or module:Class of your own"),
        ("lost", "the policy lost .acme_kv:Lost. cannot be imported: AttributeError"),
        ("acme_nothing:Newest", "cannot be imported: ModuleNotFoundError"),
        ("acme_kv:nothing", "is not a subclass of dmc.cache.policies.base.Policy"),
        ("acme_kv:Mine", "is not a subclass of"),
    ):
        with pytest.raises(ValueError, match=words):
            policy_class(name)
    with pytest.raises(ValueError, match="the newest policy has no setting sinks; it has: recent"):
        policy("newest", sinks=3)


def test_a_frontier_measures_it_on_plain_models(package, tmp_path):
    path = directory(tmp_path)
    made = cells([path], policies=[choose("newest", recent=9), choose("acme_kv:Newest")], codecs=[choose("mine")])
    assert [str(cell.policy) for cell in made] == ["newest:recent=9", "acme_kv:Newest"]


def test_the_command_line_takes_them_and_says_what_is_wrong(package, tmp_path, capsys):
    path = directory(tmp_path)
    rest = ["--prompt", "abcdefgh", "--max-tokens", "4", "--device", "cpu"]
    assert main(["generate", str(path), *rest, "--policy", "acme_kv:Newest:recent=5", "--codec", "mine"]) == 0
    assert main(["generate", str(path), *rest, "--policy", "newest:recent=1"]) == 2
    assert "recent" in capsys.readouterr().err


def test_a_policy_that_raises_ends_with_its_own_error_and_the_pool_is_intact(package, tmp_path):
    llm = LLM(directory(tmp_path), device="cpu", policy="acme_kv:Broken")
    with pytest.raises(ArithmeticError, match="the reason of a user's policy"):
        llm.generate([[5, 6, 7, 8]])
    llm.cache.check_integrity()


@pytest.mark.parametrize("pages", [0, 6, 8])  # 8 of the prompt, of two layers and two heads, and then one of a step
def test_a_codec_that_raises_ends_with_its_own_error_and_the_pool_is_intact(package, tmp_path, pages):
    llm = LLM(directory(tmp_path), device="cpu", codec="acme_kv:Failing", page_size=4)
    failing = sys.modules["acme_kv"].Failing
    failing.pages = pages
    with pytest.raises(ArithmeticError, match="the reason of a user's codec"):
        llm.generate([list(range(5, 18))], SamplingParams(max_tokens=12))
    llm.cache.check_integrity()
    assert not llm.cache.used_pages
    failing.pages = 10_000
    assert llm.generate([list(range(5, 18))], SamplingParams(max_tokens=12))[0].token_ids  # and it goes on
    assert not llm.cache.used_pages


class Halves(Int8Codec):
    """INT8 with fp16 scales, as a copy of the package's codec that changes only the dtype."""

    def encode(self, keys, values):
        blocks = super().encode(keys, values)
        kept = {name: x.half() if name.endswith("scale") else x for name, x in blocks.tensors.items()}
        return Blocks(kept, blocks.entries, blocks.head_size)


class Zeros(Int8Codec):
    """INT8 with another field."""

    def encode(self, keys, values):
        blocks = super().encode(keys, values)
        return Blocks(blocks.tensors | {"k_zero": blocks.tensors["k_scale"]}, blocks.entries, blocks.head_size)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (
            Halves,
            r"int8 pages: the kernels read k_scale as bfloat16 \[16\], and the codec stores float16 \[16\]; without make_page",
        ),
        (Zeros, "int8 pages: the kernels do not read the field k_zero; without make_page_format in the codec, PyTorch reads"),
    ],
)
def test_pages_that_kernels_would_misread_are_rejected(tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong().page_format(16, 8, torch.float32)
    with pytest.raises(ValueError, match=words):
        LLM(directory(tmp_path), device="cpu", codec=wrong())


def test_without_the_format_of_the_copy_pytorch_reads_its_pages(tmp_path):
    right = type("Right", (Halves,), {"make_page_format": Codec.make_page_format})
    path, found = directory(tmp_path), {}
    tokens = torch.randint(3, tiny.VOCAB, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    kinds = {"auto": right(), "torch": right(), "int8": "int8", "dense": "dense"}
    for name, kind in kinds.items():
        with using("auto" if name == "auto" else "torch"):
            llm = LLM(path, device="cpu", codec=kind, page_size=16, sink_tokens=0)
            found[name] = llm.score([tokens], prompt_tokens=1)[0].logprobs
    torch.testing.assert_close(found["auto"], found["torch"], atol=1e-5, rtol=1e-5)
    ours, theirs = ((found[name] - found["dense"]).abs().mean() for name in ("auto", "int8"))
    assert 0 < ours < 1.5 * theirs
