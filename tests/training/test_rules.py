"""Baselines that decide by a rule of positions: against lists of entries written out here, and as runs of the trainer."""

import math
import subprocess
import sys

import pytest
import torch

from checkpoints import convert
from dmc import LLM
from dmc.families import shape_of
from dmc.kernels import backend
from dmc.training import decoder, rules, setup
from dmc.training.attention import row_info
from dmc.training.config import ParallelConfig, load
from dmc.training.rules import Rule
from dmc.training.state import DecisionCounts, LayerState, Settings
from tests.equality.test_equality import random_case, whole_model
from tests.functional import reference as ref
from tests.training.helpers import ROOT, arguments, assert_same_run, evaluations, metrics, small_run, tiny_model, tiny_text, train
from tests.training.test_dms import held_out_rows

LENGTH, WINDOW, SINKS = 40, 6, 2
CASES = [("dms", "all"), ("dmc", "periodic"), ("dms", "periodic"), ("dms", "random"), ("dmc", "random")]
IDS = ["-".join(case) for case in CASES]


def rule(method, name, length=LENGTH):
    return Rule(name, method == "dms", None if name == "all" else WINDOW, SINKS, length)


def hashed(layer, head, position):
    """Between 0 and 1, by 32-bit integers."""

    def mix(x):
        x &= 0xFFFFFFFF
        x = ((x ^ x >> 16) * 0x21F0AAAD) & 0xFFFFFFFF
        x = ((x ^ x >> 15) * 0x735A2D97) & 0xFFFFFFFF
        return x ^ x >> 15

    state = mix(0)
    for number in (0, 0, layer):
        state = mix((state ^ number) + 0x9E3779B9)
    state = mix(mix(state + head * 0x85EBCA77) + position * 0xC2B2AE3D)
    return ((state >> 9) + 0.5) / 2**23


def opens(name, target, layer, head, length=LENGTH, *, evicts):
    """Which of the tokens of a document stay, or open an entry, once they have left the window."""
    budget = math.floor(length / target)
    held = SINKS + WINDOW + (not evicts)
    share = (budget - held) / (length - held)
    found = []
    for position in range(length):
        place = position - SINKS
        if place < 0 or (place == 0 and not evicts):
            found.append(True)
        elif name == "all":
            found.append(False)
        elif name == "periodic":
            found.append(math.floor(place * share) > math.floor((place - 1) * share))
        else:
            found.append(hashed(layer, head, position) < share)
    return found


class Lists:
    """Attention of one layer after the other, token by token, each over the list of entries that its query sees."""

    def __init__(self, method, name, target):
        self.evicts, self.name, self.target, self.layer = method == "dms", name, target, 0
        self.window = WINDOW if name != "all" else math.floor(LENGTH / target) - SINKS

    def __call__(self, query, key, value):
        heads, groups = key.shape[0], query.shape[0] // key.shape[0]
        out, held = torch.zeros_like(query), []
        for h in range(heads):
            stays = opens(self.name, self.target, self.layer, h, evicts=self.evicts)
            for i in range(key.shape[1]):
                entries = self.entries(key[h], value[h], stays, i)
                for g in range(h * groups, (h + 1) * groups):
                    scores = torch.stack([k for k, _ in entries]) @ ref.rotate_one(query[g, i], i) / math.sqrt(key.shape[2])
                    out[g, i] = scores.softmax(0) @ torch.stack([v for _, v in entries])
            oldest = key.shape[1] - 1 - self.window  # an evicting cache has decided about it once the last query is done
            held.append(len(entries) - (self.evicts and not stays[oldest]))
        self.layer += 1
        return out, torch.tensor(held)

    def entries(self, key, value, stays, i):
        recent = [(ref.rotate_one(key[j], j), value[j]) for j in range(max(0, i - self.window), i + 1)]
        behind = range(max(0, i - self.window))
        if self.evicts:
            return recent + [(ref.rotate_one(key[j], j), value[j]) for j in behind if stays[j]]
        groups = []
        for j in behind:
            groups = [*groups, [j]] if stays[j] else [*groups[:-1], [*groups[-1], j]]
        return recent + [(ref.rotate_one(key[g].mean(0), g[-1]), value[g].mean(0)) for g in groups]


def inputs(case, x, layer):
    config, w, prefix = case.config, case.weights, f"model.layers.{layer}."
    normed = torch.nn.functional.rms_norm(x, x.shape[-1:], w[prefix + "input_layernorm.weight"].to(x), config.rms_norm_eps)
    return tuple(
        (normed @ w[f"{prefix}self_attn.{n}_proj.weight"].to(x).T).unflatten(-1, (-1, config.head_dim)).transpose(0, 1)
        for n in "qkv"
    )


def built(case, method, name, target, mode):
    state = LayerState(
        Settings(name, method=method, window=None if name == "all" else WINDOW, rule=rule(method, name)),
        mode=mode,
        target_cr=target,
        decisions=DecisionCounts(case.config.num_hidden_layers, case.config.num_key_value_heads),
    )
    config = shape_of(case.config.to_dict())
    model = decoder.build(config, ParallelConfig(), state, sequence_length=2 * LENGTH, dtype=torch.float32)[0]
    setup.load_weights(model, convert.loader(config, case.weights.__getitem__))
    return model, state


def run_on(model, tokens, starts=(0,)):
    marks = torch.zeros(tokens.shape, dtype=torch.bool)
    marks[:, list(starts)] = True
    rows = row_info(torch.zeros(len(tokens), dtype=torch.long), marks)
    return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), rows)


def text(tokens, rows=1, seed=3):
    return torch.randint(2, 2000, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("target", [3.0, pytest.param(1.5, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("method", "name"), CASES, ids=IDS)
def test_the_trained_form_is_a_list_of_entries(process_group, method, name, target):
    """Logits, and the counted entries, of training and evaluation."""
    case, (tokens,) = random_case("head"), text(LENGTH)
    wanted, held = whole_model(case, tokens, Lists(method, name, target), inputs)
    model, state = built(case, method, name, target, "hard")
    for mode in ("hard", "soft"):
        state.mode = mode
        with torch.no_grad():
            logits = run_on(model.train(mode == "soft").eval(), tokens[None])[0]
        torch.testing.assert_close(logits.double(), wanted, rtol=0, atol=1e-4)
        assert torch.equal(state.decisions.total().long(), torch.stack([held, held]))
    if name != "random":  # the target is reached exactly, in every head
        assert (held == math.floor(LENGTH / target)).all()


@pytest.mark.parametrize(("method", "name"), CASES, ids=IDS)
def test_documents_of_a_row_are_each_alone(process_group, method, name):
    case, tokens = random_case("head"), text(LENGTH)
    model, state = built(case, method, name, 3.0, "hard")
    with torch.no_grad():
        packed = run_on(model.eval(), tokens, (0, 5, 31))
        together = state.decisions.total()
        # RoPE is relative: a document alone, at position 0, has the same scores.
        alone = [run_on(model.eval(), part) for part in tokens.split((5, 26, 9), 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)
    assert torch.equal(together, state.decisions.total())


@pytest.mark.parametrize(("method", "name"), CASES, ids=IDS)
def test_gradients_are_those_of_the_reference(process_group, method, name):
    """Keys that are gone have a bias of minus infinity: no gradient becomes NaN of it."""
    case, tokens = random_case("head"), text(LENGTH, rows=2)
    gradients = []
    try:
        for chosen in ("torch", "reference"):
            backend.set_default(chosen)
            model, _ = built(case, method, name, 3.0, "soft")
            run_on(model.train(), tokens, (0, 17)).square().mean().backward()
            gradients.append({key: weight.grad for key, weight in model.named_parameters()})
    finally:
        backend.set_default("auto")
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_at_a_target_of_1_nothing_changes(process_group):
    case, tokens = random_case("head"), text(LENGTH)
    for method, name in CASES:
        model, state = built(case, method, name, 1.0, "plain")
        with torch.no_grad():
            plain = run_on(model.eval(), tokens)
            state.mode = "hard"
            torch.testing.assert_close(run_on(model, tokens), plain, rtol=1e-5, atol=1e-5)
        assert (state.decisions.total()[1] == LENGTH).all()


def test_random_tokens_stay_as_often_as_the_target_says():
    heads, positions = torch.arange(32), torch.arange(LENGTH := 4096)[None]
    made = Rule("random", True, 64, 4, LENGTH)
    alpha = made.alpha(4.0, positions, 3, heads)
    kept = 1 - alpha[0, :, 4:].mean(-1)
    share = (LENGTH // 4 - 68) / (LENGTH - 68)
    assert kept.mean().item() == pytest.approx(share, rel=0.02) and made.share(4.0) == share
    assert kept.std() == pytest.approx((share * (1 - share) / (LENGTH - 4)) ** 0.5, rel=0.5)  # heads draw each for themselves
    assert (made.alpha(3.0, positions, 3, heads) <= alpha).all()  # what goes early on the ramp stays away
    assert not torch.equal(alpha, made.alpha(4.0, positions, 4, heads))


def test_positions_count_from_each_start():
    starts = torch.tensor([[True, False, False, True, False], [False, False, True, True, False]])
    assert rules.positions(starts).tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 1]]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["dmc.method=dms", "dmc.decision=all", "dmc.target_cr=300"],
            "holds at least 5 entries of data.sequence_length 1024 tokens (dmc.sinks 4, 0 newest tokens, 1 more), so the largest "
            "possible CR is 1024 / 5 = 205 and dmc.target_cr 300 is out of reach",
        ),
        (
            ["dmc.decision=periodic", "dmc.window=300"],
            "(dmc.sinks 4, 301 newest tokens, 1 more), so the largest possible CR is 1024 / 306 = 3.35 and dmc.target_cr 4 is "
            "out of reach: lower dmc.target_cr, dmc.window or dmc",
        ),
        (["dmc.method=dms", "dmc.decision=random", "dmc.window=2000"], "1024 / 2005 = 0.511"),
        (["dmc.decision=all"], "set dmc.method=dms"),
        (["dmc.decision=periodic"], "set dmc.window, such as dmc.window=64"),
        (["dmc.decision=random", "dmc.window=64", "dmc.decide=late"], "dmc.decide=arrival"),
        (
            ["dmc.method=dms", "dmc.decision=all", "dmc.window=64"],
            "dmc.window is 64, and with dmc.decision=all the window follows",
        ),
        (["dmc.decision=random", "dmc.window=64", "dmc.init=F"], "leave dmc.init out"),
        (["dmc.decision=random", "dmc.window=64", "dmc.sinks=0"], "dmc.sinks is 0: it must be at least 1"),
        (["dmc.decision=random", "dmc.window=64", "dmc.train=decision"], "dmc.train=decision trains the added decision"),
    ],
)
def test_settings_that_cannot_work_are_one_sentence(overrides, words):
    with pytest.raises(ValueError) as caught:
        load(overrides=overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_largest_ratio_can_be_asked_for():
    for overrides, most in (
        (["dmc.method=dms", "dmc.decision=all"], 5),
        (["dmc.decision=periodic", "dmc.window=64"], 70),
        (["dmc.method=dms", "dmc.decision=random"], 69),
    ):
        config = load(overrides=[*overrides, f"dmc.target_cr={1024 / most}"])
        assert config.dmc.rule(1024).fewest == most


# ------------------------------------------------------------------------------------------- runs of the trainer

STREAMING = ("--method", "dms", "dmc.decision=all")
POOLING = ("dmc.decision=periodic", "dmc.window=6")
RANDOM = ("--method", "dms", "dmc.decision=random", "dmc.window=6")
STEPS = ("dmc.hold_steps=6", "dmc.sinks=2", "optim.lr=3e-4", "run.save_every=6")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("rules")
    tiny_model(tmp / "model", num_hidden_layers=4)
    tiny_text(tmp / "text.jsonl", words=40)  # documents are packed
    tiny_text(tmp / "held.jsonl", documents=4)
    return tmp


def run(tmp, name, *settings, processes=1):
    return small_run(tmp, name, *STEPS, f"data.held_out={tmp / 'held.jsonl'}", *settings, processes=processes)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [STREAMING, POOLING, RANDOM], ids=["streaming", "pooling", "random"])
@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.tensor=2", "parallel.sequence=true"),
        ("parallel.context=2", "parallel.recompute=selective"),
        ("parallel.pipeline=2",),
    ],
    ids=["tensor", "context", "pipeline"],
)
def test_every_layout_is_the_same_run(place, settings, layout):
    name = "-".join(settings)
    one = place / name
    if not one.exists():
        run(place, name, *settings)
        assert len({line["measured_cr"] for line in metrics(one)}) > 3  # the ratio rises along the ramp
        assert evaluations(one)[-1]["eval_cr"] == pytest.approx(2, rel=0.1 if settings == RANDOM else 1e-9)
    output = run(place, f"{name}-{layout[0]}", *settings, *layout, processes=2)
    assert_same_run(output, one, tolerance=2e-4, absolute=1e-5)
    assert evaluations(output)[-1]["eval_cr"] == pytest.approx(evaluations(one)[-1]["eval_cr"], rel=1e-9)


@pytest.mark.slow
def test_a_run_with_other_sinks_is_another_run(place):
    one = run(place, "sinks", *POOLING)
    again = run(place, "again", *POOLING, "--resume", one / "checkpoints" / "step000006")
    assert_same_run(again, one, tolerance=0, steps=6)
    done = train(
        *arguments(place, place / "other"),
        *STEPS,
        *POOLING,
        "dmc.sinks=3",
        f"data.held_out={place / 'held.jsonl'}",
        "--resume",
        one / "checkpoints" / "step000006",
        check=False,
    )
    assert done.returncode == 2 and "dmc.sinks=2, here it is 3" in done.stderr


@pytest.mark.slow
def test_the_streaming_export_reaches_what_training_measured(place, tmp_path):
    """Perplexity and entries of the last evaluation again, by the policy that the export names."""
    output = run(place, "streamed", *STREAMING)
    done = export(output, tmp_path / "hf")
    policy = "streaming:sinks=2,recent=31"
    assert done.returncode == 0 and f"--policy {policy}" in done.stdout and policy in (tmp_path / "hf" / "README.md").read_text()
    rows = held_out_rows(place, 64)
    llm = LLM(tmp_path / "hf", policy="streaming", policy_settings={"sinks": 2, "recent": 31}, dtype="fp32", device="cpu")
    last = evaluations(output)[-1]
    for prompt in (1, 64):
        scores = llm.score(rows.tolist(), prompt_tokens=prompt)
        logprobs = torch.cat([score.logprobs for score in scores]).double()
        assert logprobs.mean().neg().exp().item() == pytest.approx(last["eval_perplexity"], rel=1e-3)
        assert 64 / scores[0].stats.entries.double().mean().item() == pytest.approx(last["eval_cr"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "name"), [(POOLING, "periodic"), (RANDOM, "random")])
def test_what_no_policy_carries_out_is_not_exported(place, tmp_path, settings, name):
    done = export(run(place, f"not-{name}", *settings), tmp_path / "hf")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and f"trained with dmc.decision={name}" in done.stderr
    assert not (tmp_path / "hf").exists()


def export(output, out):
    command = [sys.executable, ROOT / "scripts" / "export_hf.py", output / "checkpoints" / "final", out]
    return subprocess.run(command, capture_output=True, text=True)
