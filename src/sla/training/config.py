"""The schema of an experiment: what a YAML file under configs/ may say.

Plain dataclasses; each number's default has its one home here or beside the class that uses it.
`sla.config` reads YAML into these.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sla.attention import AttentionConfig
from sla.data.latents import LatentsConfig
from sla.data.module import DataConfig
from sla.models.autoencoders import AutoencoderConfig
from sla.models.dit import DiTConfig
from sla.models.schedulers import SCHEDULERS
from sla.models.text import TextEncoderConfig, TrainedTextEncoderConfig
from sla.models.video_model import ModelConfig


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


@dataclass
class RunConfig:
    """Where a run is kept and how it starts.

    Attributes:
        name: folder of the run under `dir`.
        dir: folder of all runs.
        seed: seed of initial weights, noise and timesteps (`data.seed` is that of the data).
        resume: `auto` continues the run of this name from its last checkpoint, if there is one;
            `never` renames an older run of this name and starts anew; anything else is the path
            of a checkpoint to continue from.
        init_weights: where the pretrained model is: a safetensors file of ours if `model.name` is
            `dit`, a hub id or folder of diffusers if it is `wan`; `random` draws the weights from
            the seed; empty for a run that starts from scratch.
        router_weights: safetensors file of the routers and mixing ratios that fine-tuning with
            `sla2` starts from (stage 1, `python -m sla router`), or null for SLA's routing.
    """

    name: str = "run"
    dir: str = "runs"
    seed: int = 0
    resume: str = "auto"
    init_weights: str = ""
    router_weights: str | None = None

    def __post_init__(self) -> None:
        _require(bool(self.name) and "/" not in self.name, "run.name", self.name, "a folder name")


@dataclass
class FlowConfig:
    """Flow matching as Wan2.1 does it (`sla.diffusion.flow_matching`).

    Attributes:
        shift: timestep shift s: sigma' = s sigma / (1 + (s - 1) sigma).
        timesteps: density of sigma before the shift in training: `logit_normal` or `uniform`.
        target: what fine-tuning learns: `data`, the velocity noise - x0, or `teacher`, the velocity
            that the frozen pretrained model with full attention predicts from the same noisy
            latents (as the authors' later recipe). Validation is against `data` always.
    """

    shift: float = 3.0
    timesteps: str = "logit_normal"
    target: str = "data"

    def __post_init__(self) -> None:
        _require(self.shift > 0, "flow.shift", self.shift, "positive")
        _require(
            self.timesteps in ("logit_normal", "uniform"),
            "flow.timesteps",
            self.timesteps,
            "'logit_normal' or 'uniform'",
        )
        known = self.target in ("data", "teacher")
        _require(known, "flow.target", self.target, "'data' or 'teacher'")


@dataclass
class OptimConfig:
    """AdamW, its schedule, clipping and averaging.

    Attributes:
        learning_rate: peak learning rate.
        method_lr_scale: factor on the learning rate of the attention method's own parameters
            (Proj): they start at zero, where all other weights are pretrained.
        weight_decay: decoupled weight decay; matrices only, Proj and other one-dimensional or
            method parameters are left out.
        beta1, beta2: AdamW's averaging coefficients.
        warmup_steps: steps of linear warm-up.
        schedule: after the warm-up `constant`, or `cosine` to `final_lr_fraction` at max_steps.
        final_lr_fraction: last learning rate over the peak one, for `cosine`.
        grad_clip: largest norm of the gradient; 0 for no clipping.
        ema_decay: decay of the exponential moving average of the weights per step; 0 for none.
            Validation, final samples and exported weights use the average.
        accumulate: batches per optimiser step.
        trainable: `all` weights; `methods`, the attention methods' own parameters (Proj) alone; or
            `lora`, those and low-rank additions (peft) to the linear layers.
        lora_rank, lora_alpha: rank of these additions, and their scale times the rank.
        lora_targets: ends of the names of the layers that get one; empty takes the model family's.
    """

    learning_rate: float = 1e-4
    method_lr_scale: float = 1.0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    warmup_steps: int = 0
    schedule: str = "constant"
    final_lr_fraction: float = 0.1
    grad_clip: float = 1.0
    ema_decay: float = 0.0
    accumulate: int = 1
    trainable: str = "all"
    lora_rank: int = 32
    lora_alpha: int = 32
    lora_targets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        trainable = self.trainable in ("all", "lora", "methods")
        _require(trainable, "optim.trainable", self.trainable, "'all', 'lora' or 'methods'")
        _require(self.lora_rank >= 1, "optim.lora_rank", self.lora_rank, ">= 1")
        _require(self.lora_alpha >= 1, "optim.lora_alpha", self.lora_alpha, ">= 1")
        _require(self.learning_rate > 0, "optim.learning_rate", self.learning_rate, "positive")
        _require(0 <= self.ema_decay < 1, "optim.ema_decay", self.ema_decay, "in [0, 1)")
        _require(self.grad_clip >= 0, "optim.grad_clip", self.grad_clip, ">= 0")
        _require(self.accumulate >= 1, "optim.accumulate", self.accumulate, ">= 1")
        _require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, ">= 0")
        _require(
            self.schedule in ("constant", "cosine"),
            "optim.schedule",
            self.schedule,
            "'constant' or 'cosine'",
        )


@dataclass
class TrainerConfig:
    """What goes to Lightning's Trainer.

    Attributes:
        max_steps: optimiser steps of the whole run.
        accelerator, devices, num_nodes: as Lightning's; `auto` uses a GPU if there is one. Nodes
            are started by torchrun or SLURM, whose environment Lightning reads.
        strategy: `auto` and `ddp` as Lightning's, every rank with the whole model; or `fsdp2`,
            weights, gradients, optimiser and average in equal parts on all ranks, and checkpoints
            in folders (`python -m sla consolidate` makes one file of such a folder).
        sequence_parallel: neighbouring ranks that share the tokens of each sample, with any
            strategy; `data.batch_size` is then of such a group. 1 for none; more for `wan` alone.
        precision: `auto` is bf16-mixed on a GPU that has bf16 and 32-true elsewhere.
        compile: torch.compile the network.
        cuda_graphs: replay compiled blocks as CUDA graphs: for small networks, whose steps are
            bound by the host.
        activation_checkpointing: recompute each block in the backward to save memory.
        val_every: validate every n steps.
        val_strata: timestep strata at which each validation clip is measured.
        checkpoint_every: checkpoint every n steps (and at the end).
        log_every: write scalars every n steps.
        progress_bar: show Lightning's progress bar.
    """

    max_steps: int = 1000
    accelerator: str = "auto"
    devices: str = "auto"
    strategy: str = "auto"
    sequence_parallel: int = 1
    num_nodes: int = 1
    precision: str = "auto"
    compile: bool = False
    cuda_graphs: bool = False
    activation_checkpointing: bool = False
    val_every: int = 100
    val_strata: int = 4
    checkpoint_every: int = 100
    log_every: int = 10
    progress_bar: bool = True

    def __post_init__(self) -> None:
        graphs = not self.cuda_graphs or self.compile
        _require(graphs, "trainer.cuda_graphs", self.cuda_graphs, "false without trainer.compile")
        steps = ("max_steps", "val_every", "val_strata", "checkpoint_every", "log_every")
        for name in (*steps, "sequence_parallel"):
            _require(getattr(self, name) >= 1, f"trainer.{name}", getattr(self, name), ">= 1")


@dataclass
class SamplingConfig:
    """Sample videos, written at the end of a run and every `every` steps.

    Attributes:
        prompts: captions to sample; empty takes the first `num_prompts` validation captions.
        num_prompts: how many validation captions to take.
        scheduler: `euler`, or `unipc` (second order), as Wan2.1 samples.
        steps: steps of the scheduler; the network runs once a step.
        guidance: classifier-free guidance scale; 1 for none.
        batched_guidance: run the network once on the prompt and the empty caption together; false
            runs it twice a step, with half the memory for activations.
        batch_size: videos that are sampled together.
        seed: seed of the first prompt's noise; prompt i has seed + i.
        every: sample to TensorBoard every n training steps; 0 only at the end.
        fps: frames per second of the files written.
    """

    prompts: list[str] = field(default_factory=list)
    num_prompts: int = 2
    scheduler: str = "euler"
    steps: int = 16
    guidance: float = 3.0
    batched_guidance: bool = True
    batch_size: int = 1
    seed: int = 0
    every: int = 0
    fps: int = 8

    def __post_init__(self) -> None:
        known = self.scheduler in SCHEDULERS
        _require(known, "sampling.scheduler", self.scheduler, f"one of {', '.join(SCHEDULERS)}")
        _require(self.steps >= 1, "sampling.steps", self.steps, ">= 1")
        _require(self.batch_size >= 1, "sampling.batch_size", self.batch_size, ">= 1")
        _require(self.fps >= 1, "sampling.fps", self.fps, ">= 1")
        _require(self.num_prompts >= 0, "sampling.num_prompts", self.num_prompts, ">= 0")
        _require(self.every >= 0, "sampling.every", self.every, ">= 0")


@dataclass
class RouterConfig:
    """Stage 1 of SLA2: router and mixing ratio of each layer on captured queries, keys and values.

    The paper gives `critical` and `tau`; the other numbers are ours.

    Attributes:
        clips: training clips to capture; each passes the model at one timestep.
        critical: critical fractions to train at, one after the other. The mixing ratio ends at
            that of the last one.
        steps: Adam steps of each layer, shared out evenly among the fractions.
        learning_rate: of the router's matrices.
        mixing_learning_rate: of the mixing ratio's logit, which has further to go.
        tau: temperature of SoftTop-k.
        straight_through: compute with the hard top-k and take only the gradient from SoftTop-k.
            Not the paper's. With many key blocks and the paper's tau the soft output is nearly
            exact attention whatever the router does, and the mixing ratio goes to 1.
        query_blocks: query blocks, drawn anew for each step, at which the outputs are compared; as
            many are measured for the report.
        max_gib: the most that the captured samples may take.
    """

    clips: int = 16
    critical: list[float] = field(default_factory=lambda: [0.05, 0.04, 0.03])
    steps: int = 300
    learning_rate: float = 1e-3
    mixing_learning_rate: float = 3e-2
    tau: float = 0.1
    straight_through: bool = False
    query_blocks: int = 8
    max_gib: float = 8.0

    def __post_init__(self) -> None:
        inside = bool(self.critical) and all(0 < fraction < 1 for fraction in self.critical)
        _require(inside, "router.critical", self.critical, "one or more fractions in (0, 1)")
        for name in ("clips", "query_blocks"):
            _require(getattr(self, name) >= 1, f"router.{name}", getattr(self, name), ">= 1")
        enough = self.steps >= len(self.critical)
        _require(enough, "router.steps", self.steps, "at least one for each of router.critical")
        for name in ("learning_rate", "mixing_learning_rate", "tau", "max_gib"):
            _require(getattr(self, name) > 0, f"router.{name}", getattr(self, name), "positive")


@dataclass
class EvalConfig:
    """What `make eval` generates and measures.

    Attributes:
        methods: attention methods beside full attention, whose videos are the reference; empty
            takes the config's own.
        weights: model file of each method that has been fine-tuned; the config's own method takes
            its run's. Others are measured with the pretrained weights, and are labelled so.
        prompts: file of prompts, or `builtin`, or `vbench` (`sla_eval.prompts`); empty takes
            `sampling.prompts`, or validation captions.
        num_prompts: how many of a file's prompts to take, evenly over the list; 0 for all.
        metrics: names of metrics, or `all`.
        require: fail if a metric is not available.
        weights_dir: folder of the metrics' networks; empty for the default one.
        workers: processes that score on a CPU, threads that decode on a GPU; null chooses.
        processes: processes that score on one GPU, each with networks of its own; 0 is this one
            alone. Not looked at on a CPU.
        validation: measure validation loss and attention error too.
        reuse: keep videos that the same weights, prompt, seed and sampling have made before.
    """

    methods: list[str] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)
    prompts: str = ""
    num_prompts: int = 0
    metrics: list[str] = field(default_factory=lambda: ["all"])
    require: bool = False
    weights_dir: str = ""
    workers: int | None = None
    processes: int = 0
    validation: bool = True
    reuse: bool = True

    def __post_init__(self) -> None:
        _require(self.num_prompts >= 0, "eval.num_prompts", self.num_prompts, ">= 0")
        _require(bool(self.metrics), "eval.metrics", self.metrics, "['all'] or names of metrics")
        given = self.workers
        _require(given is None or given >= 0, "eval.workers", given, "null or >= 0")
        _require(self.processes >= 0, "eval.processes", self.processes, ">= 0")


@dataclass
class Experiment:
    """Everything that defines a run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=DiTConfig)
    text: TrainedTextEncoderConfig = field(default_factory=TrainedTextEncoderConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
