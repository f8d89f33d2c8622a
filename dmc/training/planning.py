"""What a run will need before it is started: its layout, the memory of a rank, its tokens, steps and time.

Weights, gradients and optimizer states are counted exactly. Activations are those that autograd keeps in this
code's attention and megatron-core's layers; `tests/training/test_planning.py` holds both against a built model.
Not in the sum: the GPU's context, NCCL's buffers and the allocator's fragmentation (`RESERVE`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dmc.families import ModelShape
from dmc.training import flops, setup
from dmc.training.config import Config
from dmc.training.schedule import Schedule

GIB = 2**30
RESERVE = 4 * GIB  # assumed, a rank: CUDA context, NCCL buffers, fragmentation


@dataclass(frozen=True)
class Layout:
    """How ``world`` ranks share a run: ``tensor x pipeline x context x data``."""

    world: int
    tensor: int
    pipeline: int
    context: int
    virtual: int  # chunks of layers a pipeline stage
    sequence: bool
    sharded: bool  # optimizer states over the data-parallel ranks
    micro_batches: int  # a step and data-parallel rank

    @property
    def data(self) -> int:
        """Data-parallel ranks."""
        return self.world // (self.tensor * self.pipeline * self.context)

    @classmethod
    def of(cls, config: Config, world: int) -> Layout:
        """The layout that a configuration gives ``world`` ranks.

        Raises:
            ValueError: naming the numbers that do not divide.
        """
        setup.check_world(config, world)
        p, o = config.parallel, config.optim
        data = world // (p.tensor * p.pipeline * p.context)
        return cls(
            world,
            p.tensor,
            p.pipeline,
            p.context,
            p.virtual,
            p.sequence,
            p.distributed_optimizer,
            o.global_batch // (o.micro_batch * data),
        )


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of one rank, by what optimizers make of them."""

    matrices: int  # hidden matrices
    embeddings: int  # embedding and output layer
    vectors: int  # norms and biases
    decisions: int  # decision heads
    updates: int = 0  # low-rank, of the layers' matrices

    @property
    def total(self) -> int:
        """All of them."""
        return self.matrices + self.embeddings + self.vectors + self.decisions + self.updates


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    logits: int
    reserve: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(dataclasses.astuple(self))


def memory(config: Config, hf: ModelShape, layout: Layout, stage: int, *, on_gpu: bool = True) -> Memory:
    """Memory of a rank of pipeline stage ``stage``.

    Args:
        on_gpu: RMSNorm is one kernel that keeps its input alone, where on the CPU torch keeps two fp32 tensors; and
            there is a `RESERVE`.
    """
    size = _size(config)
    own = parameters(config, hf, layout, stage)
    frozen = config.dmc.frozen
    trained = Parameters(0, 0, 0, own.decisions, own.updates) if frozen else own
    # A frozen base model is its own teacher.
    copies = flops.distils(config) and not (frozen and not config.distill.teacher)
    return Memory(
        weights=own.total * size,
        gradients=trained.total * 4,
        optimizer=optimizer_bytes(config, trained, layout),
        teacher=copies * parameters(config, hf, layout, stage, decisions=False).total * size,
        activations=activations(config, hf, layout, stage, on_gpu=on_gpu),
        logits=logits(config, hf, layout) if stage == layout.pipeline - 1 else 0,
        reserve=RESERVE if on_gpu else 0,
    )


@dataclass(frozen=True)
class Cost:
    """Work and time of a whole run."""

    steps: dict[str, int]  # of each phase: `Schedule.phase_steps`
    tokens: int
    flops: float  # of all ranks, recomputation and teacher included
    seconds: float | None  # None where the speed of a rank is not known


def cost(config: Config, hf: ModelShape, layout: Layout, *, peak_tflops: float | None) -> Cost:
    """Steps, tokens, FLOPs, and the time at ``plan.utilisation`` of ``peak_tflops`` of every rank."""
    schedule = Schedule(config)
    length = config.data.sequence_length
    tokens = schedule.steps * config.optim.global_batch * length
    again = {
        "none": 0,
        "selective": hf.num_hidden_layers * flops.attention_flops(hf, length),
        "full": flops.forward_flops(hf, length) - 2 * hf.vocab_size * hf.hidden_size,
    }[config.parallel.recompute]
    work = float(tokens * (flops.model_flops(config, hf) + again))
    seconds = work / (peak_tflops * 1e12 * config.plan.utilisation * layout.world) if peak_tflops else None
    return Cost(schedule.phase_steps(), tokens, work, seconds)


def parameters(config: Config, hf: ModelShape, layout: Layout, stage: int, *, decisions: bool = True) -> Parameters:
    """What a rank of a stage holds; ``decisions=False`` leaves the decision heads out, as in a teacher."""
    layers, hidden, tensor = hf.num_hidden_layers // layout.pipeline, hf.hidden_size, layout.tensor
    head = decisions and config.dmc.compresses and config.dmc.decision == "head"
    logits = setup.layer_settings(config).logits_per_head
    per_logit = hf.hidden_size + config.dmc.looks_ahead  # with a bias
    first, last = stage == 0, stage == layout.pipeline - 1
    table = hf.vocab_size * hidden // tensor
    # Tied embeddings: the last stage holds a copy of its own where the first is another.
    tables = first + (last and not (first and hf.tie_word_embeddings))
    return Parameters(
        matrices=layers * flops.layer_matrices(hf) // tensor,
        embeddings=tables * table,
        vectors=(2 * layers + last) * hidden + layers * flops.layer_vectors(hf, tensor),
        decisions=layers * head * logits * hf.num_key_value_heads * per_logit // tensor,
        updates=layers * flops.layer_updates(config, hf, tensor) if decisions else 0,
    )


def optimizer_bytes(config: Config, own: Parameters, layout: Layout) -> int:
    """Moments in fp32, and fp32 main weights next to bf16 ones; a share of them with a distributed optimizer."""
    main = 4 if config.run.precision == "bf16" else 0
    matrix = main + (4 if config.optim.name == "muon" else 8)
    whole = own.matrices * matrix + (own.total - own.matrices) * (main + 8)
    return whole // (layout.data * layout.context) if layout.sharded else whole


def activations(config: Config, hf: ModelShape, layout: Layout, stage: int, *, on_gpu: bool = True) -> int:
    """Bytes that autograd keeps at the peak: micro-batches in flight, and one layer being recomputed."""
    whole, kept = layer_activations(config, hf, layout, on_gpu=on_gpu)
    layers = hf.num_hidden_layers // (layout.pipeline * layout.virtual)  # of a chunk
    total = layers * kept * _in_flight(layout, stage) + (whole - kept)
    if stage == layout.pipeline - 1:  # the final norm and the input of the output layer
        total += _tokens(config, layout) * hf.hidden_size * _norm_and_input(config, on_gpu) // _shards(layout)
    return total


def layer_activations(config: Config, hf: ModelShape, layout: Layout, *, on_gpu: bool = True) -> tuple[int, int]:
    """Bytes of one layer and one micro-batch: all that its forward pass keeps, and what recomputation leaves."""
    size, tokens = _size(config), _tokens(config, layout)
    hidden = size * tokens * hf.hidden_size // _shards(layout)  # its input
    norms = 2 * tokens * hf.hidden_size * _norm_and_input(config, on_gpu) // _shards(layout)
    mlp = 5 * size * tokens * hf.intermediate_size // layout.tensor
    core, core_inputs = _attention(config, hf, layout, on_gpu)
    projected = size * tokens * hf.num_attention_heads * hf.head_dim // layout.tensor  # into the output projection
    whole = norms + core + projected + mlp
    left = {"none": whole, "selective": whole - core + core_inputs, "full": hidden}[config.parallel.recompute]
    return whole, left


def logits(config: Config, hf: ModelShape, layout: Layout) -> int:
    """Bytes of the logits and of the loss's fp32 temporaries at their peak, on a rank that computes the loss."""
    size = _size(config)
    each = 2 * size + 28 if flops.distils(config) else size + 12
    return _tokens(config, layout) * hf.vocab_size // layout.tensor * each


def _attention(config: Config, hf: ModelShape, layout: Layout, on_gpu: bool) -> tuple[int, int]:
    """Bytes that the core of attention keeps, and those of its inputs (what is kept where it is recomputed).

    Under context parallelism keys, values and decisions are those of the whole sequence, queries the rank's.
    """
    size, depth = _size(config), hf.head_dim
    rows = _tokens(config, layout)
    keys = rows * layout.context * hf.num_key_value_heads // layout.tensor  # (token, head) pairs
    queries = rows * hf.num_attention_heads // layout.tensor
    projections = size * depth * (queries + 2 * keys)
    tables = 8 * rows // config.optim.micro_batch * depth  # cos and sin at the queries' positions
    if not config.dmc.compresses:
        return projections + size * depth * (2 * queries + keys) + 4 * queries + tables, projections
    features = depth + (2 if size == 4 else 4)
    if on_gpu:
        features += -features % 8  # the kernels' multiple
    if config.dmc.method == "dms":
        rule = config.dmc.rule(config.data.sequence_length)
        recent = config.dmc.recent if rule is None else rule.window_at(config.dmc.target_cr)
        behind = max(0.0, 1 - recent / config.data.sequence_length)  # share of the queries that see past the band
        band = size * depth * (queries + keys) + (4 + (size if size == 2 else 0)) * depth * queries + 4 * queries
        far = int(behind * (2 * size * features * (keys + queries) + 4 * queries))
        return projections + band + far + 12 * keys + (4 * queries if size == 2 else 0) + tables, projections + 4 * keys
    scan = keys * (8 * depth + 4 * (2 * depth + 1))  # its inputs and its states, fp32
    if config.dmc.recent is not None:
        behind = max(0.0, 1 - (config.dmc.recent + 1) / config.data.sequence_length)
        near = depth * queries * (size + 4 + behind * (size + (4 if size == 2 else 0))) + 2 * size * depth * keys
        rest = behind * (2 * size * features * (keys + queries) + 16 * queries)
        values = keys * depth * (8 if size == 4 else 2)
        return int(scan + near + rest + values + 32 * keys + 4 * queries + tables), projections + 8 * keys
    scores = size * depth * (keys + queries) + 2 * size * features * (keys + queries)
    values = keys * depth * (8 if size == 4 else 2)
    return scan + scores + values + 32 * keys + 8 * queries + tables, projections + 8 * keys


def _norm_and_input(config: Config, on_gpu: bool) -> int:
    """Bytes per hidden value that a norm and the projection behind it keep."""
    return _size(config) + (_size(config) if on_gpu else 8)


def _in_flight(layout: Layout, stage: int) -> int:
    """Chunks whose activations a stage holds at once under 1F1B, plain or interleaved."""
    if layout.pipeline == 1:
        return layout.virtual
    chunks = layout.micro_batches * layout.virtual
    if layout.virtual == 1:
        return min(layout.pipeline - stage, chunks)
    return min(2 * (layout.pipeline - stage - 1) + (layout.virtual - 1) * layout.pipeline + 1, chunks)


def _tokens(config: Config, layout: Layout) -> int:
    """Tokens of a micro-batch on one rank."""
    return config.optim.micro_batch * config.data.sequence_length // layout.context


def _shards(layout: Layout) -> int:
    return layout.tensor if layout.sequence else 1


def _size(config: Config) -> int:
    return setup.dtype_of(config).itemsize
