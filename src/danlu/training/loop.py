"""The training loop, for pre-training and every kind of fine-tuning. Read `Trainer.run` top to bottom.

A task is a stream of rows (:class:`Rows`), the summed loss of a batch of them, and, if it likes, what to measure on
held-out rows (:class:`Measurement`). Packed text is the default.

Exactness: a run is a function of its config, its data and the number of threads. Whatever moves while it runs (weights,
optimizer state, position in the data, random states, the recent losses that decide about skipping) is in the
checkpoint, so a run that is killed at any moment and started again ends with the same bits as one that was not.
"""

from __future__ import annotations

import math
import shutil
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from danlu import config as configs
from danlu import console, files, hardware
from danlu.adapters.lora import training_flops
from danlu.adapters.sites import n_weights
from danlu.data.packing import Batch, RowStream
from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.models.load import Model
from danlu.nn.moe import Routing, keep_out_of_graphs
from danlu.objectives.causal_lm import next_token_nll_sum
from danlu.objectives.routing import load_balancing_loss, router_z_loss
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training import checkpoint
from danlu.training.config import TrainingConfig
from danlu.training.logprobs import nll_sum
from danlu.training.metrics import MetricsLog, Numbers
from danlu.training.neftune import noise_amplitude
from danlu.training.optim import BETAS, build_optimizers
from danlu.training.schedule import learning_rate_share, muon_momentum

COMPILE_PAYS_AFTER_MINUTES = 4.0
"""torch.compile takes about half a minute on two cores; on a shorter run it costs more than it saves."""

CPU_LOGITS_AT_ONCE, GPU_LOGITS_AT_ONCE = 1 << 25, 1 << 30
"""Logits of a micro-batch that are compiled as one: 128 MiB in fp32, and 4 GiB. More are made in pieces, uncompiled."""

PLAN = "checkpoints/plan.json"
"""Length of the run in steps, written down before the first one."""


class StepBatch(Protocol):
    """Rows of one step. Its loss is divided by ``n_targets``; ``n_tokens`` counts what the model reads."""

    @property
    def n_targets(self) -> int: ...
    @property
    def n_tokens(self) -> int: ...
    def split(self, rows: int) -> Iterator[Self]: ...
    def to(self, device: torch.device) -> Self: ...


class Rows(Protocol):
    """Where batches come from: endless, and at a position that can be saved. ``row_len`` is the length of the longest
    row in tokens."""

    @property
    def row_len(self) -> int: ...
    @property
    def rows_per_epoch(self) -> int: ...
    def next(self, n_rows: int) -> StepBatch: ...
    def state(self) -> dict[str, int]: ...
    def restore(self, state: dict[str, int]) -> None: ...


LossSum = Callable[[Any], Tensor]
"""A batch -> the sum of the losses of its targets, in nats."""


class Measurement(Protocol):
    """What is measured on held-out rows now and then, by name."""

    def measure(self, loss_sum: LossSum, micro_rows: int, device: torch.device) -> Numbers: ...


@dataclass
class HeldOut:
    """Held-out text measured during training. ``token_bytes`` (vocab,) is the UTF-8 length of each token, 0 for special
    ones."""

    batch: Batch
    token_bytes: Tensor

    @classmethod
    def first_rows(cls, rows: RowStream, config: TrainingConfig, tokenizer: Tokenizer) -> HeldOut:
        """About ``config.heldout_tokens`` of these rows, always the same ones."""
        batch = rows.first_rows(max(1, config.heldout_tokens // config.seq_len))
        return cls(batch, torch.from_numpy(tokenizer.token_bytes()).long())

    def measure(self, loss_sum: LossSum, micro_rows: int, device: torch.device) -> Numbers:
        """Bits per byte: sum of -log2 p over the bytes of the targets."""
        nll, n_bytes = 0.0, 0
        for micro in self.batch.split(micro_rows):
            nll += loss_sum(micro.to(device)).item()
            n_bytes += int(self.token_bytes[micro.targets.clamp(min=0)].masked_fill(micro.targets < 0, 0).sum())
        return {"heldout_bits_per_byte": nll / (math.log(2) * max(1, n_bytes))}


@dataclass
class Progress:
    """What moves besides tensors; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    seconds: float = 0.0
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=128))
    grad_norms: deque[float] = field(default_factory=lambda: deque(maxlen=128))


class Trainer:
    """Trains one model on one stream of rows into one output folder.

    Args:
        config: the run.
        model: fp32 weights; they become the master weights. What does not require a gradient stays as it is, and out of
            the checkpoints.
        rows: where batches come from.
        held_out: measured now and then, or None.
        rates: peak learning rates: ``matrix_lr``, ``embed_lr``, ``head_lr``, ``norm_lr``.
        batch_tokens: tokens per optimizer step; rounded down to whole rows.
        default_epochs: length of the run when the config gives none.
        loss_sum: the loss of a batch; None: next tokens of packed text.
        betas: of AdamW.
        balance_loss, router_z_loss: weights of the losses on a mixture's routers (`objectives/routing.py`).
        neftune_alpha: noise on the embeddings of packed text while it is learned (`training/neftune.py`); 0: none.
        step_numbers: more to log of each step, called after it.
        stop_early: called after it too; why the run should end here, if it should. The model is then written as it is.
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: Model,
        rows: Rows,
        *,
        held_out: Measurement | None,
        rates: dict[str, float],
        batch_tokens: int,
        default_epochs: float = 1.0,
        loss_sum: LossSum | None = None,
        betas: tuple[float, float] = BETAS,
        balance_loss: float = 0.0,
        router_z_loss: float = 0.0,
        neftune_alpha: float = 0.0,
        step_numbers: Callable[[], Numbers] | None = None,
        stop_early: Callable[[], str | None] | None = None,
    ) -> None:
        self.started = time.perf_counter()
        self.config, self.rows, self.held_out, self.default_epochs = config, rows, held_out, default_epochs
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = hardware.pick_device(config.device)
        if self.device.type == "cpu":
            hardware.keep_freed_memory()
        self.precision = hardware.pick_precision(config.precision, self.device)
        self.dtype = hardware.DTYPES[self.precision]
        self.model = model.to(self.device).train()
        self.model.compute_dtype = self.dtype
        self.model.gradient_checkpointing = config.gradient_checkpointing
        self.rows_per_step = max(1, batch_tokens // rows.row_len)
        self.micro_rows = max(1, (config.micro_batch_tokens or self._default_micro_tokens()) // rows.row_len)
        half = self.precision != "fp32" and hardware.computes_bf16(self.device)
        muon_dtype = torch.bfloat16 if half else torch.float32
        self.optimizers = build_optimizers(
            model, optimizer=config.optimizer, weight_decay=config.weight_decay, muon_dtype=muon_dtype, betas=betas,
            **rates,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.loss_sum: LossSum = self._packed_nll if loss_sum is None else loss_sum
        self.balance_loss, self.router_z_loss = balance_loss, router_z_loss
        self.neftune_alpha = neftune_alpha
        self.step_numbers, self.stop_early = step_numbers, stop_early
        self.stopped_early: str | None = None
        self.nll_sum: Callable[[Tensor, Tensor], Tensor] = self._nll_sum
        self.progress = Progress()
        self.compiled = False
        self.compile_seconds = 0.0
        self.peak = 0.0
        self.total_steps = 0

    def run(self) -> dict[str, Any]:
        """Train to the end and return the metrics for the card.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; a checkpoint has been saved.
            DanluError: too many skipped steps, or the disk is full.
        """
        config, out = self.config, self.config.out
        if config.steps != 0:
            files.require_space(out, 16 * self._n_trained() * (config.keep_checkpoints + 1), "checkpoints")
            self.peak = hardware.matmul_peak(hardware.product_dtype(self.dtype, self.device), self.device)
            self._compile()
        plan_file = out / PLAN
        if plan_file.exists():
            self.total_steps = int(files.read_json(plan_file)["steps"])
        else:
            self.total_steps = self._plan_steps()
            files.write_json(plan_file, {"steps": self.total_steps})
        torch.manual_seed(config.seed)  # dropout draws from it
        self._resume()
        progress = self.progress
        heldout_every = config.heldout_every or max(1, self.total_steps // 10)
        flops_per_token = training_flops(self.model, self.rows.row_len)
        found: Numbers = {}
        if self.total_steps:
            console.note(self._describe())

        with (
            MetricsLog(out, log_to=config.log_to, resume_step=progress.step, config=configs.to_dict(config)) as log,
            console.progress("training", total=self.total_steps, unit="steps") as advance,
            _stop_on_ctrl_c() as stop_asked,
        ):
            advance(progress.step)
            while progress.step < self.total_steps:
                begin, tokens_before = time.perf_counter(), progress.tokens
                try:
                    loss, grad_norm, lr = self._step()
                except DanluError:  # a verifier that fails, say: what has been learned is not lost with it
                    if progress.step:
                        self._save()
                    raise
                hardware.synchronize(self.device)
                more = {} if self.step_numbers is None else self.step_numbers()
                seconds = time.perf_counter() - begin
                tokens = progress.tokens - tokens_before
                progress.step += 1
                progress.seconds += seconds
                last = progress.step == self.total_steps
                measured = self.held_out is not None and (last or progress.step % heldout_every == 0)
                if measured:
                    found = self.measure_held_out()
                if measured or progress.step % config.log_every == 0:
                    line: Numbers = {
                        "tokens": progress.tokens,
                        "seconds": round(progress.seconds, 3),
                        "loss": loss,
                        "lr": lr,
                        "tokens_per_second": tokens / seconds,
                        "flops_per_second": flops_per_token * tokens / seconds,
                        "grad_norm": grad_norm,
                        **more,
                    }
                    log.write(progress.step, {**line, **found} if measured else line)
                rate = progress.tokens / progress.seconds
                held_out = "".join(f"  {name.replace('_', ' ')} {value or 0:.3f}" for name, value in found.items())
                share = f" ({rate * flops_per_token / self.peak:.0%} of peak)"
                advance(
                    1,
                    text=f"loss {loss:.3f}{held_out}  {rate:,.0f} tok/s  "
                    f"{rate * flops_per_token / 1e9:,.0f} GFLOP/s{share}",
                )
                if not last and (progress.step % config.checkpoint_every == 0 or stop_asked()):
                    self._save()
                if stop_asked() and not last:
                    console.note(
                        f"stopped at step {progress.step} of {self.total_steps}; run the same command again to go on"
                    )
                    raise KeyboardInterrupt
                if self.stop_early is not None and (reason := self.stop_early()) is not None:
                    console.warn(f"{out}: ended at step {progress.step} of {self.total_steps}: {reason}")
                    self.stopped_early = reason
                    break
        if progress.skipped == progress.step > 0:
            raise DanluError(
                f"{out}: every step was skipped, since no loss was finite; nothing was learned. Look at the data and "
                "at what is rewarded, and begin again with --overwrite"
            )
        return self._metrics(found, flops_per_token)

    def _step(self) -> tuple[float, float, float]:
        """One optimizer step over ``rows_per_step`` rows; returns loss (nats per target), gradient norm and
        share-scaled rate."""
        config, progress = self.config, self.progress
        share = learning_rate_share(
            progress.step,
            self.total_steps,
            schedule=config.schedule,
            warmup=config.warmup_steps,
            decay_share=config.decay_share,
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * share
                group["weight_decay"] = group["initial_decay"] * (1 - progress.step / self.total_steps)
                if "momentum" in group:
                    group["momentum"] = muon_momentum(progress.step)

        batch = self.rows.next(self.rows_per_step)
        progress.tokens += batch.n_tokens
        n_targets = max(1, batch.n_targets)  # of the whole step: see objectives/causal_lm.py
        nll = torch.zeros((), device=self.device)
        for micro in batch.to(self.device).split(self.micro_rows):
            micro_nll = self.loss_sum(micro)
            self.scaler.scale(micro_nll / n_targets).backward()  # type: ignore[no-untyped-call]
            nll += micro_nll.detach()
        loss = nll.item() / n_targets

        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(grads).item()
        if self._acceptable(loss, grad_norm):
            if config.clip_norm and grad_norm > config.clip_norm:
                torch._foreach_mul_(grads, config.clip_norm / grad_norm)
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        else:
            progress.skipped += 1
            console.warn(f"step {progress.step + 1} skipped: loss {loss:.3f}, gradient norm {grad_norm:.3g}")
            if progress.skipped > max(20, self.total_steps // 10):
                raise DanluError(
                    f"{self.config.out}: {progress.skipped} steps were skipped; lower the learning rates "
                    "(matrix_lr, embed_lr) or look at the data"
                )
        if self.scaler.is_enabled():
            self.scaler.update()
        for p in self.model.parameters():
            p.grad = None
        return loss, grad_norm, self.optimizers[0].param_groups[0]["lr"]

    def _packed_nll(self, batch: Batch) -> Tensor:
        assert isinstance(self.model, CausalLM)
        learns_routing = torch.is_grad_enabled() and (self.balance_loss or self.router_z_loss)
        routings: list[Routing] | None = [] if learns_routing else None
        noise = None
        if self.neftune_alpha and self.model.training:
            noise = noise_amplitude(batch.segments, self.model.config.dim, self.neftune_alpha)
        hidden = self.model.hidden_states(
            batch.ids, batch.positions, batch.segments, routings=routings, noise_bt=noise
        )  # fmt: skip
        nll = self.nll_sum(hidden, batch.targets)
        return nll + self._routing_loss(routings, batch) if routings else nll

    def _routing_loss(self, routings: list[Routing], batch: Batch) -> Tensor:
        """The losses on the routers, as a sum over targets like the rest; padding does not count."""
        logits, real = [routing.logits_ne for routing in routings], batch.segments >= 0
        balance = load_balancing_loss(logits, routings[0].experts_nk.shape[1], real)
        z = router_z_loss(logits, real) / real.sum().clamp(min=1)
        return batch.n_targets * (self.balance_loss * balance + self.router_z_loss * z)

    def _nll_sum(self, hidden_btd: Tensor, targets_bt: Tensor) -> Tensor:
        assert isinstance(self.model, CausalLM)
        return nll_sum(self.model.head, hidden_btd, targets_bt)

    def _nll_sum_at_once(self, hidden_btd: Tensor, targets_bt: Tensor) -> Tensor:
        """The same with all logits at once and of one shape, for the compiler, which makes few copies of them."""
        assert isinstance(self.model, CausalLM)
        return next_token_nll_sum(self.model.head(hidden_btd), targets_bt)

    def _acceptable(self, loss: float, grad_norm: float) -> bool:
        """False for a non-finite step and for a spike: further above the recent mean than noise explains (as in OLMo 2,
        arXiv:2501.00656). Accepted values join the history."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return False
        for value, history in ((loss, self.progress.losses), (grad_norm, self.progress.grad_norms)):
            if self.config.skip_sigma and len(history) == history.maxlen:
                spread = max(statistics.pstdev(history), 0.01 * abs(statistics.fmean(history)))
                if value > statistics.fmean(history) + self.config.skip_sigma * spread:
                    return False
        self.progress.losses.append(loss)
        self.progress.grad_norms.append(grad_norm)
        return True

    @torch.no_grad()
    def measure_held_out(self) -> Numbers:
        """The figures of the held-out rows as the model is now."""
        assert self.held_out is not None
        self.model.eval()  # an adapter may have dropout
        try:
            return self.held_out.measure(self.loss_sum, self.micro_rows, self.device)
        finally:
            self.model.train()

    def _compile(self) -> None:
        """Compile block and loss, run them once, and fall back to eager where that fails. Only for packed text: each
        width of a padded batch would be compiled anew."""
        wanted = self.config.compile
        minutes = self.config.minutes
        if wanted == "auto":
            short = minutes is not None and minutes < COMPILE_PAYS_AFTER_MINUTES and self.precision == "fp32"
            wanted = (
                "always"
                if self.device.type == "cuda" or (hardware.has_compiler() and not short and not _tiny(self))
                else "never"
            )
        if wanted == "always" and isinstance(self.model, CausalLM):
            begin = time.perf_counter()
            try:
                keep_out_of_graphs(self.model)
                for block in self.model.layers:  # one graph serves all blocks: they differ in weights only
                    block.compile(dynamic=False)
                logits = self.micro_rows * self.rows.row_len * self.model.config.vocab_size
                if logits <= (CPU_LOGITS_AT_ONCE if self.device.type == "cpu" else GPU_LOGITS_AT_ONCE):
                    self.nll_sum = torch.compile(self._nll_sum_at_once, dynamic=False)
                self._warm_up()
                self.compiled = True
            except Exception as error:  # whatever the compiler stumbles over, eager does the same work
                first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
                console.warn(f"torch.compile failed ({type(error).__name__}: {first_line[:200]}); running eager")
                for block in self.model.layers:
                    block._compiled_call_impl = None
                self.nll_sum = self._nll_sum
            self.compile_seconds = time.perf_counter() - begin

    def _warm_up(self) -> None:
        """One forward and backward pass of each shape the run will see, without a trace in the run."""
        position = self.rows.state()
        sizes = {self.micro_rows, self.rows_per_step % self.micro_rows or self.micro_rows}
        for n_rows in sizes:
            self.loss_sum(self.rows.next(n_rows).to(self.device)).backward()  # type: ignore[no-untyped-call]
        self.rows.restore(position)
        for p in self.model.parameters():
            p.grad = None

    def _plan_steps(self) -> int:
        """Length of the run in steps. A budget of minutes is turned into steps by timing a few real ones and undoing
        them; fixed here and written down, so that a resumed run has the same schedule."""
        config = self.config
        if config.steps is not None:
            return config.steps
        if config.minutes is None:
            epochs = self.default_epochs if config.epochs is None else config.epochs
            return max(1, math.ceil(epochs * self.rows.rows_per_epoch / self.rows_per_step))
        saved = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        position = self.rows.state()
        self.total_steps = 1_000_000
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            self._step()
            hardware.synchronize(self.device)
            times.append(time.perf_counter() - begin)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name in saved:
                    p.copy_(saved[name])
        for optimizer in self.optimizers:
            optimizer.state.clear()
        self.rows.restore(position)
        self.progress = Progress()
        step_seconds = statistics.median(times[1:])
        measuring = 0.0
        if self.held_out is not None:
            self.measure_held_out()  # the first time it is compiled
            begin = time.perf_counter()
            self.measure_held_out()
            measuring = 10 * (time.perf_counter() - begin)
        left = 60 * config.minutes - (time.perf_counter() - self.started) - measuring
        return max(1, int(0.97 * left / step_seconds))

    def _resume(self) -> None:
        found = checkpoint.load_latest(self.config.out)
        if found is None:
            return
        tensors, state = found
        checkpoint.restore_tensors(tensors, self.model, self.optimizers)
        checkpoint.restore_random_states(state["random"])
        self.rows.restore(state["rows"])
        self.scaler.load_state_dict(state["scaler"])
        counters = state["progress"]
        self.progress.step, self.progress.tokens = counters["step"], counters["tokens"]
        self.progress.skipped, self.progress.seconds = counters["skipped"], counters["seconds"]
        self.progress.losses.extend(counters["losses"])
        self.progress.grad_norms.extend(counters["grad_norms"])
        console.note(f"resuming at step {self.progress.step} of {self.total_steps}")

    def _save(self) -> None:
        p = self.progress
        counters = {"step": p.step, "tokens": p.tokens, "skipped": p.skipped, "seconds": p.seconds,
                    "losses": list(p.losses), "grad_norms": list(p.grad_norms)}  # fmt: skip
        state = {
            "progress": counters,
            "rows": self.rows.state(),
            "scaler": self.scaler.state_dict(),
            "random": checkpoint.random_states(),
        }
        tensors = checkpoint.training_tensors(self.model, self.optimizers)
        checkpoint.save_checkpoint(self.config.out, p.step, tensors, state, self.config.keep_checkpoints)

    def _default_micro_tokens(self) -> int:
        # Enough rows to fill the matrix units, few enough that activations stay near
        # the caches.
        return 65_536 if self.device.type == "cuda" else 4_096

    def _n_trained(self) -> int:
        """Weights that are not frozen."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def _describe(self) -> str:
        c = self.config
        how = "compiled" if self.compiled else "eager"
        total, trained = n_weights(self.model), self._n_trained()
        part = "" if trained == total else f" ({trained / 1e6:.2f} M trained)"
        return (
            f"{total / 1e6:.2f} M weights{part}, {self.precision} {how} on {self.device.type} "
            f"({torch.get_num_threads()} threads, matmul peak {self.peak / 1e9:,.0f} GFLOP/s); "
            f"{self.total_steps:,} steps of {self.rows_per_step} x {self.rows.row_len} tokens, "
            f"{'adamw' if c.optimizer == 'adamw' else 'muon'}, {c.schedule}"
        )

    def _metrics(self, held_out: Numbers, flops_per_token: int) -> dict[str, Any]:
        p = self.progress
        rate = p.tokens / p.seconds if p.seconds else 0.0
        recent = list(p.losses)[-20:]
        return {
            "steps": p.step,
            "tokens": p.tokens,
            "skipped_steps": p.skipped,
            "parameters": n_weights(self.model),
            "trained_parameters": self._n_trained(),
            "train_loss": statistics.fmean(recent) if recent else None,
            **held_out,
            "tokens_per_second": rate,
            "flops_per_second": rate * flops_per_token,
            "matmul_peak_flops": self.peak or None,
            "share_of_peak": rate * flops_per_token / self.peak if self.peak else None,
            "train_seconds": p.seconds,
            "compile_seconds": self.compile_seconds,
            "peak_memory_bytes": hardware.peak_memory_bytes(self.device),
        }

    def clean_up(self) -> None:
        """Delete what only an unfinished run needs; call it when the model folder is whole."""
        shutil.rmtree(self.config.out / checkpoint.FOLDER, ignore_errors=True)

    def details(self) -> dict[str, Any]:
        """How the run was done, for the card."""
        return {
            "model_config": configs.to_dict(self.model.config),
            "precision": self.precision,
            "compiled": self.compiled,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "batch_tokens": self.rows_per_step * self.rows.row_len,
            **({} if self.stopped_early is None else {"stopped_early": self.stopped_early}),
        }


def _tiny(trainer: Trainer) -> bool:
    """A run of a few steps never earns its compilation back."""
    steps = trainer.config.steps
    return steps is not None and steps * trainer.rows_per_step * trainer.rows.row_len < 1_000_000


@contextmanager
def _stop_on_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C (or SIGTERM) came; a second one stops at once."""
    asked = False

    def handler(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        console.note("stopping after this step (once more to stop at once)")

    try:
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for number, old in before.items():
            signal.signal(number, old)
